/* plan_parse on any bytes, then every read that the keeper (keeper.c, sources.c) and the first process (build.c) make
 * of an accepted plan. What those never check again must hold here. */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct plan plan;
static volatile size_t sink; /* keeps reads from being optimised away */

static void read_text(const char *text)
{
    sink += strlen(text);
}

static void read_bytes(const uint8_t *bytes, size_t length)
{
    for (size_t i = 0; i < length; i++)
        sink += bytes[i];
}

static void read_id_maps(void)
{
    for (int which = 0; which < MAP_COUNT; which++) {
        const struct id_map *map = &plan.maps[which];
        if (!map->present)
            continue;
        assert(map->count >= 1 && map->count <= PLAN_MAX_ID_LINES);
        read_text(map->helper);
    }
    assert(plan.maps[MAP_SANDBOX_UID].present && plan.maps[MAP_SANDBOX_GID].present);
    assert(plan.maps[MAP_WORKSPACE_UID].present == plan.maps[MAP_WORKSPACE_GID].present);
}

static void read_items(const struct step *step)
{
    struct cursor items = step_items(step);
    for (uint32_t i = 0; i < step->count; i++) {
        switch (step->kind) {
        case STEP_CGROUP:
            read_text(take_string(&items));
            read_text(take_string(&items));
            break;
        case STEP_OVERLAY:
            assert(take_u32(&items) <= IDMAP_WORKSPACE); /* an index into userns */
            read_text(take_string(&items));
            break;
        case STEP_LANDLOCK:
            take_u64(&items);
            read_text(take_string(&items));
            break;
        case STEP_AFFINITY:
            assert(take_u32(&items) < 1024); /* a bit of cpu_set_t */
            break;
        default:
            abort(); /* no other kind has items */
        }
    }
    assert(step->count == 0 || cursor_done(&items));
}

static void read_step(const struct step *step)
{
    read_text(step_name(step->kind));
    for (int i = 0; i < 3; i++)
        if (step->text[i])
            read_text(step->text[i]);
    read_items(step);
    if (step->kind == STEP_FILE || step->kind == STEP_FILTER || step->kind == STEP_NETLINK)
        read_bytes(step->bytes, step->length);
    if (step->kind == STEP_FILTER)
        assert(step->length > 0 && step->length % 8 == 0 && step->length / 8 <= 4096);
    if (step->kind == STEP_BIND)
        assert(step->number[0] <= ORIGIN_ROOT && step->number[2] <= IDMAP_WORKSPACE);
    if (step->kind == STEP_LISTEN || step->kind == STEP_DATAGRAM) {
        assert(step->number[0] == 4 || step->number[0] == 6);
        assert(step->number[1] >= 1 && step->number[1] <= 65535);
    }
    if (step->kind == STEP_NETLINK) {
        assert(step->number[0] == 0 || step->number[0] == 12);
        assert(step->number[1] >= 1 && step->number[1] <= PLAN_MAX_ACKNOWLEDGEMENTS);
        assert(step->length >= 1 && step->length <= PLAN_MAX_NETLINK_BYTES);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *problem = plan_parse(&plan, data, size);
    if (problem) {
        assert(problem[0]);
        return 0;
    }
    uint32_t sources = 0, listeners = 0, cgroups = 0;
    assert(plan.count <= PLAN_MAX_STEPS);
    read_id_maps();
    for (uint32_t i = 0; i < plan.count; i++) {
        const struct step *step = &plan.steps[i];
        read_step(step);
        sources += step->kind == STEP_BIND && step->number[0] == ORIGIN_HOST;
        sources += step->kind == STEP_OVERLAY ? step->count : 0;
        listeners += step->kind == STEP_LISTEN || step->kind == STEP_DATAGRAM;
        cgroups += step->kind == STEP_CGROUP;
    }
    /* These size arrays in main.c, build.h and keeper.h. */
    assert(sources == plan.sources && sources <= PLAN_MAX_SOURCES);
    assert(listeners == plan.listeners && listeners <= PLAN_MAX_LISTENERS);
    assert(cgroups == plan.cgroups && cgroups <= PLAN_MAX_CGROUPS);
    return 0;
}
