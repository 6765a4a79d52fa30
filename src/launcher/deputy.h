/* The deputy: does in the sandbox's file tree what the supervisor has decided, with the agent's rights and no others.
 *
 * The supervisor must not walk that tree itself: it has rights that the agent lacks, and would lend them. The deputy is a
 * process of the keeper's in the sandbox's user, network and mount namespaces, under the same Landlock rules, with the ids
 * that a request names (the calling process's), without capabilities over anything that a call looks at, and outside
 * the PID namespace, where nothing inside can see or signal it. The keeper starts it when the first request is there; when
 * it dies the sandbox ends.
 *
 * What is decided about is what is done: a request names files by descriptors of the objects and directories that
 * DEPUTY_RESOLVE gave, and single names in them. One message is one request or one reply; replies come in any order. The
 * Python side of these layouts is corral/supervisor/deputy.py; a test compares the two. */
#ifndef CORRAL_DEPUTY_H
#define CORRAL_DEPUTY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "plan.h"

#define DEPUTY_MAX_PATH 4095     /* PATH_MAX without its NUL */
#define DEPUTY_MAX_ADDRESS 110   /* sizeof(struct sockaddr_un) */
#define DEPUTY_MAX_DATA 32768    /* in the message itself */
#define DEPUTY_MAX_APART 524288  /* in a memfd; more than wmem_max lets a datagram have */
#define DEPUTY_MAX_FDS 250
#define DEPUTY_MAX_WAITING 64    /* requests that wait for somebody else, each in a process of its own */

/* Descriptors come in the order given here. `path` is a single name (no "/", not ".", "..") unless said otherwise. */
enum deputy_operation {
    DEPUTY_RESOLVE = 1, /* [start]; path: any. Opened with O_PATH and `flags` (O_NOFOLLOW, O_DIRECTORY), `resolve`.
                           An empty path: start itself. Reply: the object, and its path inside. ENAMETOOLONG with
                           `value` 1: there is one, whose path is longer than can be told */
    DEPUTY_OPEN = 2,    /* object; `flags`, `mode`. Reply: the same object, opened (open(2)) */
    DEPUTY_CREATE = 3,  /* directory; path. A new file only, with `flags`, `mode`. Reply: the file */
    DEPUTY_RENAME = 4,  /* old directory, new directory; path: old, second: new; `flags` of renameat2(2). With a `resolve`
                           that is not 0, a directory that the overlay refuses to rename is made anew under the new name,
                           beside it first (deputy_move.h), in a place that this number names. DEPUTY_CANCEL then ends
                           only what has not its new name yet, and there is a reply. `value`: what is of the place */
    DEPUTY_LINK = 5,    /* object, directory; path */
    DEPUTY_SYMLINK = 6, /* directory; path, second: target, any */
    DEPUTY_UNLINK = 7,  /* directory; path; `flags`: AT_REMOVEDIR */
    DEPUTY_CHMOD = 8,   /* object; `mode` */
    DEPUTY_CONNECT = 9, /* socket, and the socket's object, or address: an abstract one, or of family AF_UNSPEC */
    DEPUTY_BIND = 10,   /* socket and address: abstract or unnamed; or socket, directory, [start]; path, [address]: made in
                           directory, and known by the address (resolved from start) where there is one.
                           Reply: then what lies at that place now, for the caller to compare */
    DEPUTY_SEND = 11,   /* socket, [object: DEPUTY_TO_OBJECT], [memfd: DEPUTY_APART], descriptors to pass; [address:
                           abstract], data; `flags` of sendmsg(2). Reply: value is the number of bytes */
    DEPUTY_CANCEL = 12, /* ends the wait of the request with this id (EINTR); has no reply of its own */
    DEPUTY_LISTEN = 13, /* socket; `flags`: the backlog. Whoever connects sees who has listened (SO_PEERCRED) */
    DEPUTY_MAKE = 14,   /* directory; path; `flags`: S_IFREG, S_IFIFO or S_IFSOCK, `mode` (mknod(2)) */
};

enum deputy_option {
    DEPUTY_TO_OBJECT = 1,
    DEPUTY_APART = 2,
};

enum deputy_place {
    DEPUTY_PLACE_IS_GONE = 0,
    DEPUTY_PLACE_IS_UNKNOWN = 1,
    DEPUTY_PLACE_IS_OTHERS = 2,
};

struct deputy_request {
    uint64_t id;
    uint32_t operation;
    uint32_t uid; /* inside, as is gid */
    uint32_t gid;
    uint32_t umask;
    uint32_t flags;
    uint32_t mode;
    uint64_t resolve; /* openat2(2) */
    uint32_t options;
    uint32_t path_length; /* of what follows, in this order and without any NUL between */
    uint32_t second_length;
    uint32_t address_length;
    uint32_t data_length;
    uint32_t reserved;
};

struct deputy_reply {
    uint64_t id;
    int32_t error; /* errno of the call, or 0 */
    uint32_t value;
    uint32_t busy; /* 1: the call was not made, DEPUTY_MAX_WAITING others wait (error is EAGAIN) */
    uint32_t path_length;
};

/* ---- deputy_wire.c: no side effects ---- */

struct deputy_message {
    struct deputy_request request;
    char path[DEPUTY_MAX_PATH + 1]; /* ended by NUL, as is second */
    char second[DEPUTY_MAX_PATH + 1];
    uint8_t address[DEPUTY_MAX_ADDRESS + 1];
    const uint8_t *data; /* in the buffer that was parsed */
};

/* Parses one message with `count` descriptors. Returns NULL when good, else what is wrong; `request` holds what the message
 * had of it, the rest zero. */
const char *deputy_parse(struct deputy_message *message, const void *bytes, size_t length, unsigned count);

/* ---- deputy_calls.c ---- */

struct deputy_result {
    int32_t error;
    uint32_t value;
    int fd; /* to send, or -1 */
    char path[DEPUTY_MAX_PATH + 1];
    uint32_t path_length;
};

/* Does what a message asks for, as whoever this process is now. `proc` is the host's /proc. With `patient` false nothing
 * waits for anybody; returns true when the request can only be done by waiting, and then nothing was done. */
bool deputy_do(int proc, const struct deputy_message *message, const int *fds, unsigned count, bool patient,
               struct deputy_result *result);

/* ---- deputy.c: the process ---- */

#define NO_DEPUTY ((struct deputy){.socket = -1, .namespaces = {-1, -1, -1}, .domain = -1, .pidfd = -1})

struct deputy {
    int socket;        /* the keeper's end, until the deputy has it; -1 then */
    int namespaces[3]; /* user, net, mnt */
    int domain;        /* Landlock ruleset, or -1 */
    pid_t pid;         /* 0: not started */
    int pidfd;
};

/* Opens the namespaces of `init`, and a socket pair; the controller's end is returned in `theirs`. 0, or -1 with errno. */
int deputy_prepare(struct deputy *deputy, pid_t init, int *theirs);

/* Starts the deputy. 0, or -1 with errno. What fails later ends it. */
int deputy_start(struct deputy *deputy, const struct plan *plan);

/* Ends the deputy and whatever waits for it, and closes all that `deputy` holds. */
void deputy_end(struct deputy *deputy);

#endif
