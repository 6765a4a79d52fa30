/* The compiled plan: what to build, in order. Python decides (corral/sandbox/plan.py), this file only reads.
 *
 * Layout: "CRLPLAN1", u32 total length, u32 number of steps, then per step u32 kind, u32 length, body.
 * A parsed plan points into the buffer, which must outlive it. */
#ifndef CORRAL_PLAN_H
#define CORRAL_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

#define PLAN_MAX_BYTES (1u << 20)
#define PLAN_MAX_STEPS 1024
#define PLAN_MAX_LOWERS 12 /* what one fsconfig string holds */
#define PLAN_MAX_ID_LINES 8
#define PLAN_MAX_SOURCES 240 /* one SCM_RIGHTS message holds 253 descriptors */
#define PLAN_MAX_LISTENERS 32 /* TCP listeners and UDP sockets together */
#define PLAN_MAX_CGROUPS 8
#define PLAN_MAX_NETLINK_BYTES 16384
#define PLAN_MAX_ACKNOWLEDGEMENTS 64

enum step_kind {
    /* done by the keeper, outside */
    STEP_ID_MAP = 1,    /* u32 which, u32 become, string helper, u32 count, count * (u32 inside, outside, length) */
    STEP_CGROUP = 2,    /* u32 version, string directory, u32 count, count * (string file, string value) */
    STEP_WALL_TIME = 3, /* u64 milliseconds */
    STEP_REMOVE = 4,    /* string path: unlinked, or removed as an empty directory, when the controller dies */
    STEP_PREPARE = 5,   /* u32 where: 0 sources are opened inside, 1 by the keeper */

    /* done by the sandbox's first process, inside its namespaces */
    STEP_LAYER = 16,     /* u64 bytes, u64 inodes */
    STEP_LAYER_DIR = 17, /* string path, u32 mode, u32 uid, u32 gid */
    STEP_ROOT = 18,      /* u64 bytes, u64 inodes */
    STEP_DIRECTORY = 19, /* string path, u32 mode */
    STEP_SYMLINK = 20,   /* string target, string path */
    STEP_FILE = 21,      /* string path, u32 mode, bytes content */
    STEP_OVERLAY = 22,   /* string target, string upper, string work, u32 count, count * (u32 idmap, string lower);
                            an empty work: read-only, and upper is an empty directory */
    STEP_BIND = 23,      /* u32 origin, u32 attributes, u32 idmap, string source, string target */
    STEP_PROC = 24,      /* string target, string options */
    STEP_DEVPTS = 25,    /* string target, string options */
    STEP_MQUEUE = 26,    /* string target */
    STEP_SYSCTL = 27,    /* string path below /proc/sys, string value */
    STEP_SEAL_ROOT = 28, /* the root mount becomes read-only */
    STEP_PIVOT = 29,
    STEP_HOSTNAME = 30,  /* string name */
    STEP_LOOPBACK = 31,
    STEP_LISTEN = 32,    /* u32 family (4 or 6), string address, u32 port, u32 backlog */
    STEP_RLIMIT = 33,    /* u32 resource, u64 value */
    STEP_LANDLOCK = 34,  /* u64 fs, u64 net, u64 scopes, u32 count, count * (u64 access, string path) */
    STEP_FILTER = 35,    /* bytes: struct sock_filter[] */
    STEP_AFFINITY = 36,  /* u32 count, count * u32 processor */
    STEP_NETLINK = 37,   /* u32 protocol (0 NETLINK_ROUTE or 12 NETLINK_NETFILTER), u32 acknowledgements, bytes
                            messages: sent in one piece; just so many acknowledgements without an error come back */
    STEP_DATAGRAM = 38,  /* u32 family (4 or 6), string address, u32 port: a UDP socket that tells where each datagram
                            was sent to, and may answer from there; handed out among the listeners */
};

enum id_map_use {
    MAP_SANDBOX_UID = 0,
    MAP_SANDBOX_GID = 1,
    MAP_WORKSPACE_UID = 2,
    MAP_WORKSPACE_GID = 3,
    MAP_COUNT = 4
};

enum bind_origin { ORIGIN_HOST = 0, ORIGIN_LAYER = 1, ORIGIN_ROOT = 2 };
enum bind_attribute {
    BIND_READ_ONLY = 1,
    BIND_DEVICES = 2, /* device nodes stay usable; never together with writable trees */
    BIND_NO_EXEC = 4,
};
enum source_idmap { IDMAP_NONE = 0, IDMAP_SANDBOX = 1, IDMAP_WORKSPACE = 2 };

struct id_line {
    uint32_t inside, outside, length;
};

struct id_map {
    bool present;
    uint32_t become; /* id that the first process takes inside, or UINT32_MAX to stay */
    const char *helper;
    uint32_t count;
    struct id_line lines[PLAN_MAX_ID_LINES];
};

struct step {
    enum step_kind kind;
    const char *text[3];
    uint64_t number[4];
    const uint8_t *bytes; /* contents, filter, or the repeated part, to be read again with a cursor */
    uint32_t length;
    uint32_t count;
};

struct plan {
    struct id_map maps[MAP_COUNT];
    uint64_t wall_time_ms;
    bool prepare_outside;
    uint32_t sources; /* host paths that binds and overlays need, in order */
    uint32_t listeners; /* and UDP sockets */
    uint32_t cgroups;
    uint32_t count;
    struct step steps[PLAN_MAX_STEPS];
};

/* Parses `length` bytes. Returns NULL when good, else what is wrong. Reads nothing outside the buffer and has no
 * effect but on `plan`. */
const char *plan_parse(struct plan *plan, const void *bytes, size_t length);

const char *step_name(enum step_kind kind);

/* Repeated parts of a step that plan_parse has checked. */
struct cursor step_items(const struct step *step);

#endif
