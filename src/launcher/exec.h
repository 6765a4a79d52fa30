/* One exec request, as the forked child reads it from a sealed memfd.
 *
 * Layout: "CRLEXEC1", u32 total length, u32 flags, u32 uid, u32 gid, string directory, u32 argc, strings,
 * u32 envc, strings, u32 limits, limits * (u32 resource, u64 soft, u64 hard). */
#ifndef CORRAL_EXEC_H
#define CORRAL_EXEC_H

#include <stddef.h>
#include <stdint.h>

#define EXEC_MAX_BYTES (8u << 20)
#define EXEC_MAX_STRINGS (1u << 17)
#define EXEC_MAX_LIMITS 16

enum exec_flag { EXEC_TERMINAL = 1 };

struct exec_limit {
    uint32_t resource;
    uint64_t soft, hard;
};

struct exec {
    uint32_t flags, uid, gid;
    const char *directory;
    char **argv; /* both NULL-terminated, allocated; freed by exec_free or by execve */
    char **envp;
    uint32_t limits;
    struct exec_limit limit[EXEC_MAX_LIMITS];
};

/* Returns NULL when good, else what is wrong; after an error nothing needs freeing. */
const char *exec_parse(struct exec *exec, const void *bytes, size_t length);
void exec_free(struct exec *exec);

#endif
