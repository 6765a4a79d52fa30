#include "exec.h"

#include <stdlib.h>
#include <string.h>

#include "wire.h"

static char **take_strings(struct cursor *cursor, uint32_t *count)
{
    *count = take_u32(cursor);
    /* Each string takes at least five bytes, so a count that cannot fit never allocates. */
    if (cursor->bad || *count > EXEC_MAX_STRINGS || (size_t)(cursor->end - cursor->at) / 5 < *count) {
        cursor->bad = true;
        return NULL;
    }
    char **strings = calloc((size_t)*count + 1, sizeof *strings);
    if (!strings) {
        cursor->bad = true;
        return NULL;
    }
    for (uint32_t i = 0; i < *count; i++)
        strings[i] = (char *)(uintptr_t)take_string(cursor);
    return strings;
}

void exec_free(struct exec *exec)
{
    free(exec->argv);
    free(exec->envp);
    exec->argv = exec->envp = NULL;
}

static const char *parse(struct exec *exec, struct cursor *cursor, size_t length)
{
    uint32_t argc, envc;
    struct cursor magic = take_part(cursor, 8);
    if (magic.bad || memcmp(magic.at, "CRLEXEC1", 8) != 0)
        return "not an exec request of this version";
    if (take_u32(cursor) != length)
        return "wrong length";
    exec->flags = take_u32(cursor);
    exec->uid = take_u32(cursor);
    exec->gid = take_u32(cursor);
    exec->directory = take_string(cursor);
    exec->argv = take_strings(cursor, &argc);
    exec->envp = take_strings(cursor, &envc);
    exec->limits = take_u32(cursor);
    if (cursor->bad || exec->limits > EXEC_MAX_LIMITS)
        return "malformed";
    for (uint32_t i = 0; i < exec->limits; i++) {
        exec->limit[i].resource = take_u32(cursor);
        exec->limit[i].soft = take_u64(cursor);
        exec->limit[i].hard = take_u64(cursor);
    }
    if (!cursor_done(cursor))
        return "malformed";
    if (argc == 0 || exec->argv[0][0] == '\0')
        return "no command";
    if (exec->flags & ~(uint32_t)EXEC_TERMINAL)
        return "unknown flag";
    return NULL;
}

const char *exec_parse(struct exec *exec, const void *bytes, size_t length)
{
    struct cursor cursor;
    memset(exec, 0, sizeof *exec);
    if (length > EXEC_MAX_BYTES)
        return "too long";
    cursor_open(&cursor, bytes, length);
    const char *problem = parse(exec, &cursor, length);
    if (problem)
        exec_free(exec);
    return problem;
}
