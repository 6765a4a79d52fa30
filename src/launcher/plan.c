#include "plan.h"

#include <linux/netlink.h>
#include <string.h>

#include "wire.h"

static const char *const names[] = {
    [STEP_ID_MAP] = "id map",        [STEP_CGROUP] = "cgroup",           [STEP_WALL_TIME] = "wall time",
    [STEP_REMOVE] = "remove",        [STEP_PREPARE] = "prepare",         [STEP_LAYER] = "layer",
    [STEP_LAYER_DIR] = "layer directory", [STEP_ROOT] = "root",          [STEP_DIRECTORY] = "directory",
    [STEP_SYMLINK] = "symlink",      [STEP_FILE] = "file",               [STEP_OVERLAY] = "overlay",
    [STEP_BIND] = "bind",            [STEP_PROC] = "proc",               [STEP_DEVPTS] = "devpts",
    [STEP_MQUEUE] = "mqueue",        [STEP_SYSCTL] = "sysctl",           [STEP_SEAL_ROOT] = "seal root",
    [STEP_PIVOT] = "pivot",          [STEP_HOSTNAME] = "hostname",       [STEP_LOOPBACK] = "loopback",
    [STEP_LISTEN] = "listen",        [STEP_RLIMIT] = "rlimit",           [STEP_LANDLOCK] = "landlock",
    [STEP_FILTER] = "seccomp filter", [STEP_AFFINITY] = "affinity",      [STEP_NETLINK] = "netlink",
    [STEP_DATAGRAM] = "datagram",
};

const char *step_name(enum step_kind kind)
{
    if ((size_t)kind >= sizeof names / sizeof *names || !names[kind])
        return "unknown step";
    return names[kind];
}

struct cursor step_items(const struct step *step)
{
    struct cursor items;
    cursor_open(&items, step->bytes, step->length);
    return items;
}

static const char *parse_id_map(struct plan *plan, struct cursor *body)
{
    uint32_t which = take_u32(body);
    if (body->bad || which >= MAP_COUNT || plan->maps[which].present)
        return "id map: unknown or repeated map";
    struct id_map *map = &plan->maps[which];
    map->become = take_u32(body);
    map->helper = take_string(body);
    map->count = take_u32(body);
    if (body->bad || map->count == 0 || map->count > PLAN_MAX_ID_LINES)
        return "id map: wrong number of lines";
    for (uint32_t i = 0; i < map->count; i++) {
        map->lines[i].inside = take_u32(body);
        map->lines[i].outside = take_u32(body);
        map->lines[i].length = take_u32(body);
    }
    map->present = true;
    return NULL;
}

/* Keeps the rest of the body for later, after walking over it once with the reader of its items. */
static void keep_items(struct step *step, struct cursor *body)
{
    step->bytes = body->at;
    step->length = (uint32_t)(body->end - body->at);
}

static const char *parse_overlay(struct plan *plan, struct step *step, struct cursor *body)
{
    for (int i = 0; i < 3; i++)
        step->text[i] = take_string(body);
    step->count = take_u32(body);
    if (body->bad || step->count == 0 || step->count > PLAN_MAX_LOWERS)
        return "overlay: wrong number of lower directories";
    keep_items(step, body);
    for (uint32_t i = 0; i < step->count; i++) {
        if (take_u32(body) > IDMAP_WORKSPACE)
            return "overlay: unknown id map";
        take_string(body);
    }
    plan->sources += step->count;
    return NULL;
}

static const char *parse_bind(struct plan *plan, struct step *step, struct cursor *body)
{
    for (int i = 0; i < 3; i++)
        step->number[i] = take_u32(body);
    step->text[0] = take_string(body);
    step->text[1] = take_string(body);
    if (step->number[0] > ORIGIN_ROOT || step->number[1] > 7 || step->number[2] > IDMAP_WORKSPACE)
        return "bind: unknown origin, attribute or id map";
    if ((step->number[1] & BIND_DEVICES) && step->number[0] != ORIGIN_HOST)
        return "bind: devices come from the host only";
    if (step->number[0] == ORIGIN_HOST)
        plan->sources++;
    return NULL;
}

static const char *parse_pairs(struct step *step, struct cursor *body)
{
    step->count = take_u32(body);
    if (body->bad || step->count > 64)
        return "too many settings";
    keep_items(step, body);
    for (uint32_t i = 0; i < step->count; i++) {
        take_string(body);
        take_string(body);
    }
    return NULL;
}

static const char *parse_landlock(struct step *step, struct cursor *body)
{
    for (int i = 0; i < 3; i++)
        step->number[i] = take_u64(body);
    step->count = take_u32(body);
    if (body->bad || step->count > 256)
        return "landlock: too many rules";
    keep_items(step, body);
    for (uint32_t i = 0; i < step->count; i++) {
        take_u64(body);
        take_string(body);
    }
    return NULL;
}

static const char *parse_affinity(struct step *step, struct cursor *body)
{
    step->count = take_u32(body);
    if (body->bad || step->count == 0 || step->count > 1024)
        return "affinity: wrong number of processors";
    keep_items(step, body);
    for (uint32_t i = 0; i < step->count; i++)
        if (take_u32(body) >= 1024)
            return "affinity: no such processor";
    return NULL;
}

static const char *parse_netlink(struct step *step, struct cursor *body)
{
    step->number[0] = take_u32(body);
    step->number[1] = take_u32(body);
    step->bytes = take_bytes(body, &step->length);
    if (step->number[0] != NETLINK_ROUTE && step->number[0] != NETLINK_NETFILTER)
        return "netlink: unknown protocol";
    if (step->number[1] == 0 || step->number[1] > PLAN_MAX_ACKNOWLEDGEMENTS)
        return "netlink: wrong number of acknowledgements";
    if (step->length == 0 || step->length > PLAN_MAX_NETLINK_BYTES)
        return "netlink: no messages, or too many";
    return NULL;
}

/* What listeners and UDP sockets have in common: where they stand. */
static const char *parse_address(struct plan *plan, struct step *step, struct cursor *body)
{
    step->number[0] = take_u32(body);
    step->text[0] = take_string(body);
    step->number[1] = take_u32(body);
    if ((step->number[0] != 4 && step->number[0] != 6) || step->number[1] == 0 || step->number[1] > 65535)
        return "listen: unknown family or port";
    if (++plan->listeners > PLAN_MAX_LISTENERS)
        return "listen: too many";
    return NULL;
}

static const char *parse_step(struct plan *plan, struct step *step, struct cursor *body)
{
    switch (step->kind) {
    case STEP_ID_MAP:
        return parse_id_map(plan, body);
    case STEP_CGROUP:
        step->number[0] = take_u32(body);
        step->text[0] = take_string(body);
        if (step->number[0] != 1 && step->number[0] != 2)
            return "cgroup: version must be 1 or 2";
        if (++plan->cgroups > PLAN_MAX_CGROUPS)
            return "cgroup: too many";
        return parse_pairs(step, body);
    case STEP_WALL_TIME:
        plan->wall_time_ms = take_u64(body);
        return NULL;
    case STEP_PREPARE:
        plan->prepare_outside = take_u32(body) == 1;
        return NULL;
    case STEP_LAYER:
    case STEP_ROOT:
        step->number[0] = take_u64(body);
        step->number[1] = take_u64(body);
        return NULL;
    case STEP_LAYER_DIR:
        step->text[0] = take_string(body);
        for (int i = 0; i < 3; i++)
            step->number[i] = take_u32(body);
        return NULL;
    case STEP_DIRECTORY:
        step->text[0] = take_string(body);
        step->number[0] = take_u32(body);
        return NULL;
    case STEP_FILE:
        step->text[0] = take_string(body);
        step->number[0] = take_u32(body);
        step->bytes = take_bytes(body, &step->length);
        return NULL;
    case STEP_OVERLAY:
        return parse_overlay(plan, step, body);
    case STEP_BIND:
        return parse_bind(plan, step, body);
    case STEP_SYMLINK:
    case STEP_PROC:
    case STEP_DEVPTS:
    case STEP_SYSCTL:
        step->text[0] = take_string(body);
        step->text[1] = take_string(body);
        return NULL;
    case STEP_REMOVE:
    case STEP_MQUEUE:
    case STEP_HOSTNAME:
        step->text[0] = take_string(body);
        return NULL;
    case STEP_SEAL_ROOT:
    case STEP_PIVOT:
    case STEP_LOOPBACK:
        return NULL;
    case STEP_LISTEN: {
        const char *problem = parse_address(plan, step, body);
        step->number[2] = take_u32(body);
        return problem;
    }
    case STEP_RLIMIT:
        step->number[0] = take_u32(body);
        step->number[1] = take_u64(body);
        return NULL;
    case STEP_LANDLOCK:
        return parse_landlock(step, body);
    case STEP_FILTER:
        step->bytes = take_bytes(body, &step->length);
        if (step->length == 0 || step->length % 8 != 0 || step->length / 8 > 4096)
            return "seccomp filter: not a BPF program";
        return NULL;
    case STEP_AFFINITY:
        return parse_affinity(step, body);
    case STEP_NETLINK:
        return parse_netlink(step, body);
    case STEP_DATAGRAM:
        return parse_address(plan, step, body);
    }
    return "unknown kind of step";
}

const char *plan_parse(struct plan *plan, const void *bytes, size_t length)
{
    struct cursor cursor;
    uint32_t total, count;

    memset(plan, 0, sizeof *plan);
    if (length > PLAN_MAX_BYTES)
        return "plan: too long";
    cursor_open(&cursor, bytes, length);
    struct cursor magic = take_part(&cursor, 8);
    if (magic.bad || memcmp(magic.at, "CRLPLAN1", 8) != 0)
        return "plan: not a plan of this version";
    total = take_u32(&cursor);
    count = take_u32(&cursor);
    if (cursor.bad || total != length || count > PLAN_MAX_STEPS)
        return "plan: wrong length or too many steps";

    for (uint32_t i = 0; i < count; i++) {
        struct step *step = &plan->steps[i];
        step->kind = (enum step_kind)take_u32(&cursor);
        uint32_t size = take_u32(&cursor);
        struct cursor body = take_part(&cursor, size);
        if (cursor.bad)
            return "plan: step runs past the end";
        const char *problem = parse_step(plan, step, &body);
        if (problem)
            return problem;
        if (!cursor_done(&body))
            return "plan: step is not of its kind's shape";
        plan->count = i + 1;
    }
    if (!cursor_done(&cursor))
        return "plan: bytes left over";
    if (!plan->maps[MAP_SANDBOX_UID].present || !plan->maps[MAP_SANDBOX_GID].present)
        return "plan: no id maps";
    if (plan->maps[MAP_WORKSPACE_UID].present != plan->maps[MAP_WORKSPACE_GID].present)
        return "plan: workspace id maps come in pairs";
    if (plan->sources > PLAN_MAX_SOURCES)
        return "plan: too many sources";
    return NULL;
}
