/* A bounds-checked cursor over untrusted bytes: every read either succeeds whole or marks the cursor bad for good.
 *
 * Integers are little-endian. A string is a 32-bit length, that many bytes without NUL, and one NUL, so that it can be
 * used in place. Readers return zero or an empty string once the cursor is bad; callers check `bad` once at the end. */
#ifndef CORRAL_WIRE_H
#define CORRAL_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cursor {
    const uint8_t *at;
    const uint8_t *end;
    bool bad;
};

void cursor_open(struct cursor *cursor, const void *bytes, size_t length);
uint32_t take_u32(struct cursor *cursor);
uint64_t take_u64(struct cursor *cursor);
const char *take_string(struct cursor *cursor);
const uint8_t *take_bytes(struct cursor *cursor, uint32_t *length);
/* Splits off the next `length` bytes as a cursor of their own. */
struct cursor take_part(struct cursor *cursor, uint32_t length);
bool cursor_done(const struct cursor *cursor); /* good, and nothing left over */

#endif
