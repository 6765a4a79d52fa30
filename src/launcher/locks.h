/* What the first process puts on itself, and all that it starts inherit: limits, Landlock, the seccomp filter. */
#ifndef CORRAL_LOCKS_H
#define CORRAL_LOCKS_H

#include "build.h"

/* Each returns 0, or -1 with errno. */

/* Only ever lowers: a limit above the caller's hard limit is left at that. */
int set_rlimit(const struct step *step);
int set_affinity(const struct step *step);

/* Also makes building's `domain`, the deputy's ruleset. `detail` is set to what a failure is about. */
int add_landlock(struct building *building, const struct step *step, const char **detail);

/* Installs the seccomp filter of the plan; the very last step, after all privileges are gone. Returns its listener, which
 * is close-on-exec, or -1 with errno and `detail` set. */
int install_filter(const struct step *filter, const char **detail);

#endif
