/* What travels on the control socket (SOCK_SEQPACKET; one struct a message; descriptors by SCM_RIGHTS).
 * The Python side of these layouts is corral/sandbox/channel.py; a test compares the two. */
#ifndef CORRAL_PROTOCOL_H
#define CORRAL_PROTOCOL_H

#include <stdint.h>

#define CONTROL_FD 3

/* Second argument of the setsid() that the leader of every exec makes; the third is the exec's id. setsid(2) takes no
 * arguments, so only the supervisor, which is notified of it, sees them: this session belongs to that exec. */
#define EXEC_SESSION_MARK 0x434f5252414c /* "CORRAL" */

/* A start is READY, then LISTENER: only with both do all walls stand. What fails before LISTENER ends in FAILED or in the
 * end of the stream, also after READY. The first process sends READY, and only then installs the filter, under which a
 * message with descriptors would wait for an answer; so the keeper takes the listener from it and sends LISTENER. */

enum request_type {
    REQUEST_PLAN = 1,   /* descriptors: plan, controller's pidfd, [lease of the id range] */
    REQUEST_EXEC = 2,   /* descriptors: payload, stdin, stdout, stderr */
    REQUEST_SIGNAL = 3, /* argument: signal, to the process group of exec `id` */
    REQUEST_STOP_ALL = 4,
    REQUEST_CONTINUE_ALL = 5,
    REQUEST_KILL_SESSION = 6, /* SIGKILL to every process of the exec's session */
};

struct request {
    uint32_t type;
    uint32_t id;
    uint32_t argument;
    uint32_t reserved;
};

enum report_type {
    REPORT_READY = 16,       /* descriptors: root, layer (if the plan has one), sockets in plan order */
    REPORT_FAILED = 17,      /* text: step; detail; error: errno. Nothing was run. */
    REPORT_EXEC_FAILED = 18, /* text: stage; error: errno; REPORT_EXITED follows */
    REPORT_EXITED = 19,      /* status: wait status; values: rusage */
    REPORT_STOPPED = 20,     /* the terminal's job was stopped; status: signal. Of id 0: REQUEST_STOP_ALL is done */
    REPORT_ENDED = 21,       /* the sandbox is gone and cleaned up; status: enum end_reason */
    REPORT_LISTENER = 22,    /* descriptors: the seccomp listener (seccomp_unotify(2)), the deputy's socket (deputy.h) */
};

enum end_reason {
    END_CLOSED = 0,     /* the control socket was closed, or PID 1 left by itself because of it */
    END_KILLED = 1,     /* the keeper was told to kill (SIGTERM) */
    END_WALL_TIME = 2,  /* the plan's wall time is over */
    END_CONTROLLER = 3, /* the controlling process died */
    END_INIT_DIED = 4,  /* PID 1 was killed by something else, e.g. out of memory */
    END_FAILED = 5,     /* the walls could not be built */
    END_DEPUTY = 6,     /* the deputy died, or could not be started */
};

enum {
    USAGE_USER_US,
    USAGE_SYSTEM_US,
    USAGE_MAXRSS_KIB,
    USAGE_MINOR_FAULTS,
    USAGE_MAJOR_FAULTS,
    USAGE_BLOCKS_IN,
    USAGE_BLOCKS_OUT,
    USAGE_SWITCHES,
    USAGE_COUNT
};

struct report {
    uint32_t type;
    uint32_t id;
    int32_t status;
    int32_t error;
    uint64_t values[USAGE_COUNT];
    char step[48];
    char detail[208];
};

#endif
