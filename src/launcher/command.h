/* What a child of the first process does with one exec request: becomes the command. */
#ifndef CORRAL_COMMAND_H
#define CORRAL_COMMAND_H

#include <stdint.h>

#define COMMAND_FDS 4 /* payload, stdin, stdout, stderr */

/* Drops to no capability at all; the same for every command, whatever its user id inside. */
int drop_capabilities(void);

/* Runs in the forked child; reports what failed on `control` and never returns. */
_Noreturn void run_command(int control, uint32_t id, const int fds[COMMAND_FDS]);

#endif
