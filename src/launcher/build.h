/* Applies the inside half of a plan, in order, in the sandbox's first process. */
#ifndef CORRAL_BUILD_H
#define CORRAL_BUILD_H

#include "plan.h"

struct building {
    const struct plan *plan;
    const int *sources; /* descriptors, in plan order */
    uint32_t used;      /* sources consumed */
    int layer;          /* the layer's file system, or -1 */
    int root;           /* the new root */
    int listeners[PLAN_MAX_LISTENERS];
    uint32_t listening;
    int domain;                /* Landlock rules for the deputy, or -1 where the plan has none */
    int processes;             /* a directory of every process, for the first process alone; see list_processes */
    bool pivoted;
    const struct step *filter; /* installed last, by seal */
    const struct step *failed; /* the step that failed, with errno */
    const char *detail;        /* what about it */
};

/* Returns 0, or -1 with errno, `failed` and `detail` set. */
int build_walls(struct building *building);

#endif
