/* Opening what the plan shows of the host: one detached mount (binds, id-mapped lowers) or one O_PATH descriptor
 * (plain lowers) for each source, in plan order.
 *
 * As root the keeper opens them, because inside the sandbox's user namespace the first process is nobody special to
 * the host and could not even reach /root/.pyenv. As an ordinary user they are opened inside: only there does the
 * caller have the right to clone mounts. */
#ifndef CORRAL_SOURCES_H
#define CORRAL_SOURCES_H

#include "plan.h"

/* Fills `fds` (plan->sources of them). `userns` holds the user namespaces for IDMAP_SANDBOX and IDMAP_WORKSPACE, or
 * -1. Returns NULL, or the path that failed with errno set and `*step` naming the step. */
const char *open_sources(const struct plan *plan, const int userns[3], int *fds, const char **step);

#endif
