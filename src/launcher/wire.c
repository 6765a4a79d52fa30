#include "wire.h"

#include <string.h>

void cursor_open(struct cursor *cursor, const void *bytes, size_t length)
{
    cursor->at = bytes;
    cursor->end = length > 0 ? cursor->at + length : cursor->at; /* no bytes may come as NULL */
    cursor->bad = false;
}

static const uint8_t *take(struct cursor *cursor, size_t length)
{
    if (cursor->bad || (size_t)(cursor->end - cursor->at) < length) {
        cursor->bad = true;
        return NULL;
    }
    const uint8_t *found = cursor->at;
    cursor->at += length;
    return found;
}

uint32_t take_u32(struct cursor *cursor)
{
    const uint8_t *b = take(cursor, 4);
    if (!b)
        return 0;
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

uint64_t take_u64(struct cursor *cursor)
{
    uint64_t low = take_u32(cursor);
    return low | (uint64_t)take_u32(cursor) << 32;
}

const uint8_t *take_bytes(struct cursor *cursor, uint32_t *length)
{
    *length = take_u32(cursor);
    const uint8_t *found = take(cursor, *length);
    if (!found)
        *length = 0;
    return found;
}

const char *take_string(struct cursor *cursor)
{
    uint32_t length;
    const uint8_t *found = take_bytes(cursor, &length);
    const uint8_t *nul = take(cursor, 1);
    if (!found || !nul)
        return "";
    if (*nul != 0 || memchr(found, 0, length)) {
        cursor->bad = true;
        return "";
    }
    return (const char *)found;
}

struct cursor take_part(struct cursor *cursor, uint32_t length)
{
    struct cursor part = {NULL, NULL, true};
    const uint8_t *found = take(cursor, length);
    if (found)
        cursor_open(&part, found, length);
    return part;
}

bool cursor_done(const struct cursor *cursor)
{
    return !cursor->bad && cursor->at == cursor->end;
}
