/* The keeper: the launcher's process outside. It prepares what only the outside may (cgroups, id maps, id-mapped
 * mounts), starts the sandbox's first process, and then outlives it just long enough to clean up.
 *
 * It is the reason that nothing is left over however the controller ends: when the control socket or the controller's
 * pidfd says that nobody is there any more, or the wall time is over, it kills the first process (and the cgroup),
 * reaps it and removes the cgroups. When the keeper itself is killed, PR_SET_PDEATHSIG kills the first process. */
#ifndef CORRAL_KEEPER_H
#define CORRAL_KEEPER_H

#include <sys/types.h>

#include "deputy.h"
#include "plan.h"
#include "protocol.h"

#define EXIT_NO_WALLS 2 /* exit status of a first process that has reported REPORT_FAILED */

struct keeper {
    const struct plan *plan;
    int control;
    int controller;                    /* pidfd */
    int first;                         /* socket of the first process, until it has handed over its listener */
    int listener;                      /* of the seccomp filter, or -1 */
    bool met;                          /* the first process has sent the deputy's Landlock rules */
    struct deputy deputy;
    int cgroup_fds[PLAN_MAX_CGROUPS];  /* version 1: the tasks file; version 2: the directory */
    const char *cgroup_paths[PLAN_MAX_CGROUPS];
    uint32_t cgroups;                  /* made so far */
    pid_t carrier;                     /* process of the workspace map's namespace, or 0 */
    int cgroup2;                       /* index into cgroup_fds, or -1 */
    const char *step, *detail;         /* of the last failure */
};

/* Makes the plan's cgroups with their limits. 0, or -1 with errno, step and detail. */
int make_cgroups(struct keeper *keeper);
void remove_cgroups(struct keeper *keeper);
void kill_cgroup(struct keeper *keeper);

/* Writes the sandbox's id maps for `pid`. */
int write_id_maps(struct keeper *keeper, pid_t pid);

/* Opens a user namespace with the plan's workspace maps, or returns -1 with errno 0 when the plan has none. */
int open_workspace_map(struct keeper *keeper);
void end_carrier(struct keeper *keeper);

/* Takes the seccomp listener from the first process and sends it to the controller; then waits for the end of the first
 * process, forcing it where needed; cleans up; returns why it ended.
 *
 * The keeper's copy of the listener stays open until the first process is reaped, and with it all others of its PID
 * namespace: a call that waits for an answer, or is made when the controller has closed its copy, waits until it is
 * killed. Without a listener it would return ENOSYS, and the process would go on. */
enum end_reason keep(struct keeper *keeper, pid_t init, int init_pidfd);

#endif
