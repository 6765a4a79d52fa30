#include "deputy.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "deputy_move.h"
#include "kernel.h"
#include "wire.h"

#define SOCKET_FD 3
#define PROC_FD 4
#define SIGNALS_FD 5
#define MAX_OPEN (DEPUTY_MAX_FDS + 64)
#define MAX_MESSAGE                                                                                                    \
    (sizeof(struct deputy_request) + 2 * DEPUTY_MAX_PATH + DEPUTY_MAX_ADDRESS + DEPUTY_MAX_DATA)

/* Owned by the deputy, which is single-threaded. pid 0 is a free place. */
struct waiting {
    pid_t pid;
    uint64_t id;
    bool moves; /* cleans up before it ends */
};
static struct waiting waiting[DEPUTY_MAX_WAITING];
static bool changes_ids; /* the sandbox has more than one id; see set_capabilities */
static uint8_t buffer[MAX_MESSAGE + 1];
static struct deputy_message message;
static struct deputy_result result;

/* ---- identity ---- */

/* The ids only while they are changed. CAP_KILL always, where there are several: a child that waits as one user gets the
 * death signal only if the deputy, then another one, might have sent it. It is about no file and no socket. */
static int set_capabilities(bool effective, bool permitted)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}, {0}};
    const unsigned ids = 1u << CAP_SETUID | 1u << CAP_SETGID, ending = 1u << CAP_KILL;
    data[0].effective = (effective ? ids : 0) | (permitted ? ending : 0);
    data[0].permitted = permitted ? ids | ending : 0;
    return (int)syscall(SYS_capset, &header, data);
}

/* Whose rights the next call has. Half a change is seen by the next, which asks the kernel what is. */
static int become(uint32_t uid, uint32_t gid)
{
    if (geteuid() == uid && getegid() == gid)
        return 0;
    errno = EPERM;
    if (!changes_ids)
        return -1;
    if (set_capabilities(true, true) < 0)
        _exit(1);
    int result_of_change = setresgid(gid, gid, gid) < 0 ? -1 : setresuid(uid, uid, uid);
    int error = errno;
    /* Changing ids makes a process as dumpable as fs.suid_dumpable says, and clears the death signal (prctl(2)). While
     * capabilities are permitted, nobody inside may look into it even so (ptrace(2)). */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || set_capabilities(false, true) < 0)
        _exit(1);
    errno = error;
    return result_of_change;
}

static int drop_bounding_set(void)
{
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
            return -1;
    return 0;
}

/* Enters the sandbox and keeps of all rights over it only the one to become its users. */
static int enter(const struct deputy *deputy, const struct plan *plan)
{
    const struct id_map *uids = &plan->maps[MAP_SANDBOX_UID], *gids = &plan->maps[MAP_SANDBOX_GID];
    static const int types[] = {CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWNS};
    struct stat host, root;

    if (stat("/", &host) < 0)
        return -1;
    for (int i = 0; i < 3; i++)
        if (setns(deputy->namespaces[i], types[i]) < 0)
            return -1;
    /* setns(2) makes the root of the mount namespace ours, as it is for everybody inside. */
    if (chdir("/") < 0 || stat("/", &root) < 0)
        return -1;
    if (host.st_dev == root.st_dev && host.st_ino == root.st_ino)
        return -1;

    if (drop_bounding_set() < 0)
        return -1;
    if (prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP |
                                     SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS_LOCKED |
                                     SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED) < 0)
        return -1;
    /* As in the first process: where setgroups had to be denied, the caller's groups stay. */
    if (setgroups(0, NULL) < 0 && (errno != EPERM || plan->prepare_outside || gids->helper[0]))
        return -1;
    if (gids->become != UINT32_MAX && setresgid(gids->become, gids->become, gids->become) < 0)
        return -1;
    if (uids->become != UINT32_MAX && setresuid(uids->become, uids->become, uids->become) < 0)
        return -1;
    changes_ids = uids->count > 1 || uids->lines[0].length > 1;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        return -1;
    if (deputy->domain >= 0 && syscall(SYS_landlock_restrict_self, deputy->domain, 0) < 0)
        return -1;
    return set_capabilities(false, changes_ids);
}

/* ---- replies ---- */

static void answer(uint64_t id, const struct deputy_result *done, bool busy)
{
    struct deputy_reply reply = {
        .id = id, .error = done->error, .value = done->value, .busy = busy, .path_length = done->path_length};
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec parts[2] = {{&reply, sizeof reply}, {(void *)(uintptr_t)done->path, done->path_length}};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = 2};
    if (done->fd >= 0) {
        memset(&control, 0, sizeof control);
        header.msg_control = control.space;
        header.msg_controllen = sizeof control.space;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &done->fd, sizeof(int));
    }
    ssize_t sent;
    do
        sent = sendmsg(SOCKET_FD, &header, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno == ETOOMANYREFS && done->fd >= 0) { /* the agent's user has too many in flight (unix(7)) */
        struct deputy_result none = {.error = ETOOMANYREFS, .fd = -1};
        answer(id, &none, false);
    } else if (sent < 0)
        _exit(1);
    if (done->fd >= 0)
        close(done->fd);
}

static void refuse(uint64_t id, int error, bool busy)
{
    result = (struct deputy_result){.error = error, .fd = -1};
    answer(id, &result, busy);
}

/* ---- waiting ---- */

static struct waiting *find_place(pid_t pid)
{
    for (unsigned i = 0; i < DEPUTY_MAX_WAITING; i++)
        if (waiting[i].pid == pid)
            return &waiting[i];
    return NULL;
}

/* Does the request in a child, which may wait as long as it takes. */
static void wait_apart(const int *fds, unsigned count)
{
    struct waiting *place = find_place(0);
    uint64_t id = message.request.id;
    bool moves = message.request.operation == DEPUTY_RENAME;
    pid_t self = getpid(), pid = place ? fork() : -1;
    if (pid < 0) {
        refuse(id, EAGAIN, true);
        return;
    }
    if (pid > 0) {
        *place = (struct waiting){pid, id, moves};
        return;
    }
    if (set_capabilities(false, false) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 ||
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 || getppid() != self || (moves && deputy_heed_end() < 0))
        _exit(1);
    deputy_do(PROC_FD, &message, fds, count, true, &result);
    answer(id, &result, false);
    _exit(0);
}

static void cancel(uint64_t id)
{
    for (unsigned i = 0; i < DEPUTY_MAX_WAITING; i++)
        if (waiting[i].pid != 0 && waiting[i].id == id)
            kill(waiting[i].pid, waiting[i].moves ? SIGTERM : SIGKILL);
}

static void reap(void)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        struct waiting *place = find_place(pid);
        if (!place)
            continue;
        place->pid = 0;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
            continue;
        result = (struct deputy_result){
            .error = WIFSIGNALED(status) ? EINTR : EIO, .fd = -1,
            .value = place->moves ? DEPUTY_PLACE_IS_UNKNOWN : 0};
        answer(place->id, &result, false);
    }
}

/* ---- requests ---- */

/* Returns the number of descriptors, or -1 when too many came for this process; then none is open. */
static int receive(size_t *length, int *fds)
{
    static union {
        char space[CMSG_SPACE(sizeof(int) * 253)]; /* SCM_MAX_FD */
        struct cmsghdr align;
    } control;
    struct iovec iov = {buffer, sizeof buffer};
    struct msghdr header = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
    int count = 0;
    bool whole = true;

    ssize_t got;
    do
        got = recvmsg(SOCKET_FD, &header, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got <= 0)
        _exit(got < 0);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        unsigned found = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (unsigned i = 0; i < found; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (count < DEPUTY_MAX_FDS)
                fds[count++] = fd;
            else {
                close(fd);
                whole = false;
            }
        }
    }
    *length = (size_t)got;
    if (whole && !(header.msg_flags & MSG_CTRUNC))
        return count;
    while (count > 0)
        close(fds[--count]);
    return -1;
}

static void serve_one(void)
{
    static int fds[DEPUTY_MAX_FDS];
    size_t length;
    int count = receive(&length, fds);
    const char *problem = deputy_parse(&message, buffer, length, count < 0 ? 0 : (unsigned)count);
    uint64_t id = message.request.id;

    if (count < 0)
        refuse(id, EMFILE, false);
    else if (length < sizeof message.request)
        _exit(1); /* nobody to answer, and nobody who knows what they are doing */
    else if (problem)
        refuse(id, EPROTO, false);
    else if (message.request.operation == DEPUTY_CANCEL)
        cancel(id);
    else if (become(message.request.uid, message.request.gid) < 0)
        refuse(id, errno, false);
    else if (deputy_do(PROC_FD, &message, fds, (unsigned)count, false, &result))
        wait_apart(fds, (unsigned)count);
    else
        answer(id, &result, false);
    for (int i = 0; i < count; i++)
        close(fds[i]);
}

static void no_effect(int signal)
{
    (void)signal; /* that it comes is the effect: a call is interrupted */
}

static int heed_signals(void)
{
    struct sigaction alarm = {.sa_handler = no_effect}; /* without SA_RESTART */
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    if (sigaction(SIGALRM, &alarm, NULL) < 0 || sigprocmask(SIG_UNBLOCK, &set, NULL) < 0)
        return -1;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd == SIGNALS_FD ? 0 : dup3(fd, SIGNALS_FD, O_CLOEXEC);
}

/* What is sent through Unix sockets and not yet read is memory of its sender: the deputy's counts as the sandbox's. */
static int join_memory_groups(const struct plan *plan)
{
    for (uint32_t i = 0; i < plan->count; i++) {
        const struct step *step = &plan->steps[i];
        if (step->kind != STEP_CGROUP)
            continue;
        bool has_memory = false;
        struct cursor items = step_items(step);
        for (uint32_t n = 0; n < step->count; n++) {
            has_memory |= strncmp(take_string(&items), "memory.", 7) == 0;
            take_string(&items);
        }
        if (!has_memory)
            continue;
        char path[PATH_MAX];
        const char *file = step->number[0] == 2 ? "cgroup.procs" : "tasks";
        if ((size_t)snprintf(path, sizeof path, "%s/%s", step->text[0], file) >= sizeof path)
            return -1;
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 || write(fd, "0", 1) != 1)
            return -1;
        close(fd);
    }
    return 0;
}

/* Ends by itself when the controller closes its end, and with the keeper. */
static _Noreturn void serve(const struct deputy *deputy, const struct plan *plan, pid_t keeper)
{
    const struct rlimit files = {MAX_OPEN, MAX_OPEN}, core = {1, 1}; /* core_pattern may be a pipe: see limits.py */

    prctl(PR_SET_NAME, "corral-deputy", 0, 0, 0);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    int proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (proc < 0 || join_memory_groups(plan) < 0 || enter(deputy, plan) < 0)
        _exit(1);
    /* Above what either of them may be now, then down to their places; nothing else stays open. */
    int high_socket = fcntl(deputy->socket, F_DUPFD_CLOEXEC, 64), high_proc = fcntl(proc, F_DUPFD_CLOEXEC, 64);
    if (dup3(high_socket, SOCKET_FD, O_CLOEXEC) < 0 || dup3(high_proc, PROC_FD, O_CLOEXEC) < 0 ||
        sys_close_range(SIGNALS_FD, ~0u) < 0 || heed_signals() < 0)
        _exit(1);
    if (setrlimit(RLIMIT_NOFILE, &files) < 0 || setrlimit(RLIMIT_CORE, &core) < 0)
        _exit(1);

    struct pollfd watched[2] = {{.fd = SOCKET_FD, .events = POLLIN}, {.fd = SIGNALS_FD, .events = POLLIN}};
    for (;;) {
        /* Taking ids cleared it, and each change of them clears it again. */
        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 || getppid() != keeper)
            _exit(1);
        if (poll(watched, 2, -1) < 0) {
            if (errno != EINTR)
                _exit(1);
            continue;
        }
        if (watched[1].revents) {
            struct signalfd_siginfo info;
            while (read(SIGNALS_FD, &info, sizeof info) > 0)
                ;
            reap();
        }
        if (watched[0].revents)
            serve_one();
    }
}

/* ---- the keeper's side ---- */

int deputy_prepare(struct deputy *deputy, pid_t init, int *theirs)
{
    static const char *const names[] = {"user", "net", "mnt"};
    int pair[2];
    for (int i = 0; i < 3; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/ns/%s", init, names[i]);
        deputy->namespaces[i] = open(path, O_RDONLY | O_CLOEXEC);
        if (deputy->namespaces[i] < 0)
            return -1;
    }
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -1;
    deputy->socket = pair[0];
    *theirs = pair[1];
    return 0;
}

int deputy_start(struct deputy *deputy, const struct plan *plan)
{
    pid_t self = getpid();
    /* What waits for others are children of the deputy; when it dies, they become ours, and deputy_end waits for them. */
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0)
        return -1;
    struct clone_args args = {
        .flags = CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)&deputy->pidfd, .exit_signal = SIGCHLD};
    pid_t pid = sys_clone3(&args);
    if (pid == 0)
        serve(deputy, plan, self);
    if (pid < 0)
        return -1;
    deputy->pid = pid;
    close(deputy->socket);
    deputy->socket = -1;
    return 0;
}

void deputy_end(struct deputy *deputy)
{
    int *const held[] = {&deputy->socket,        &deputy->namespaces[0], &deputy->namespaces[1],
                         &deputy->namespaces[2], &deputy->domain,        &deputy->pidfd};
    if (deputy->pid > 0) {
        kill(deputy->pid, SIGKILL);
        /* Its children die with it (PR_SET_PDEATHSIG); no other process is a child of the keeper by now. */
        while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
            ;
    }
    deputy->pid = 0;
    for (size_t i = 0; i < sizeof held / sizeof held[0]; i++) {
        if (*held[i] >= 0)
            close(*held[i]);
        *held[i] = -1;
    }
}
