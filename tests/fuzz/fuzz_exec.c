/* exec_parse on any bytes, then every read that command.c makes of an accepted request. */
#include <assert.h>
#include <stdint.h>
#include <string.h>

#include "exec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile size_t sink; /* keeps reads from being optimised away */

static size_t read_strings(char *const *strings)
{
    size_t count = 0;
    for (; strings[count]; count++)
        sink += strlen(strings[count]);
    return count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct exec exec;
    const char *problem = exec_parse(&exec, data, size);
    if (problem) {
        assert(problem[0] && !exec.argv && !exec.envp);
        return 0;
    }
    assert(read_strings(exec.argv) >= 1 && exec.argv[0][0]);
    assert(read_strings(exec.envp) <= EXEC_MAX_STRINGS);
    assert((exec.flags & ~(uint32_t)EXEC_TERMINAL) == 0);
    assert(exec.limits <= EXEC_MAX_LIMITS);
    sink += strlen(exec.directory);
    for (uint32_t i = 0; i < exec.limits; i++)
        sink += (size_t)exec.limit[i].soft;
    exec_free(&exec);
    return 0;
}
