/* corral-launcher: applies a compiled plan and keeps the sandbox. Started by corral with the control socket as
 * descriptor 3 and nothing else; see keeper.h for the outside, build.h and init.h for the inside.
 *
 *   controller ──plan──▶ keeper ──clone3──▶ first process ──fork──▶ commands
 *
 * Order of the inside, and why: namespaces come with clone3; ids before anything is created; an ordinary user's first
 * process executes this program again, so that its memory is the sandbox's; mounts while the host can still be seen;
 * pivot; routes, rules and sockets while these may be made and low ports be bound; then capabilities, Landlock and, last
 * of all because it may refuse what the others need, the seccomp filter, whose listener the keeper takes. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "build.h"
#include "command.h"
#include "init.h"
#include "keeper.h"
#include "kernel.h"
#include "locks.h"
#include "report.h"
#include "sources.h"

#define NAMESPACES (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)

static struct plan plan; /* written once by the keeper before the clone, read by both sides after it */
static int plan_fd;

static _Noreturn void stop(const char *step, const char *detail)
{
    report_failure(CONTROL_FD, step, detail);
    _exit(EXIT_NO_WALLS);
}

static void drop_pages(const void *start, const void *end)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)start + page - 1) & ~(page - 1), last = (uintptr_t)end & ~(page - 1);
    if (first < last)
        madvise((void *)first, last - first, MADV_DONTNEED);
}

/* Lets go of the code that only the start needed: an idle sandbox should cost little. Nothing writes to code, so what is
 * needed again comes back unchanged. Where this fails it costs memory. */
static void drop_cold_code(void)
{
    extern char __executable_start[], etext[];
    drop_pages(__executable_start, etext);
}

/* ---- inside ---- */

static const char *give_up_privileges(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}, {0}};
    unsigned kept = 0;

    for (int capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
            return "bounding set";
    if (prctl(PR_SET_SECUREBITS,
              SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED |
                  SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED) < 0)
        return "securebits";
    /* Where write_maps had to deny setgroups the caller's groups stay; anywhere else they must go. */
    if (setgroups(0, NULL) < 0 && (errno != EPERM || plan.prepare_outside || plan.maps[MAP_SANDBOX_GID].helper[0]))
        return "setgroups";
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return "no_new_privs";
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
        return "ambient set";
    /* The first process keeps what it needs to start commands as another id; each command drops these too. */
    if (plan.maps[MAP_SANDBOX_UID].become == 0 || plan.maps[MAP_SANDBOX_UID].count > 1)
        kept = 1u << CAP_SETUID | 1u << CAP_SETGID | 1u << CAP_KILL;
    data[0].effective = data[0].permitted = kept;
    if (syscall(SYS_capset, &header, data) < 0)
        return "capset";
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        return "dumpable";
    return NULL;
}

static void receive_sources(int keeper, int *sources)
{
    char go;
    unsigned count;
    int got = receive_message(keeper, &go, 1, sources, PLAN_MAX_SOURCES, &count);
    if (got == 0)
        _exit(1); /* the keeper has reported what went wrong, or is gone */
    if (got < 0)
        stop("start", "take over");
    if (count != (plan.prepare_outside ? plan.sources : 0)) {
        errno = EPROTO;
        stop("start", "take over");
    }
}

static void take_ids(void)
{
    uint32_t gid = plan.maps[MAP_SANDBOX_GID].become, uid = plan.maps[MAP_SANDBOX_UID].become;
    if (gid != UINT32_MAX && setresgid(gid, gid, gid) < 0)
        stop("ids", "setresgid");
    if (uid != UINT32_MAX && setresuid(uid, uid, uid) < 0)
        stop("ids", "setresuid");
}

static void announce(const struct building *building)
{
    struct report report = {.type = REPORT_READY};
    int fds[2 + PLAN_MAX_LISTENERS];
    unsigned count = 0;
    fds[count++] = building->root;
    if (building->layer >= 0)
        fds[count++] = building->layer;
    for (uint32_t i = 0; i < building->listening; i++)
        fds[count++] = building->listeners[i];
    if (send_report(CONTROL_FD, &report, fds, count) < 0)
        _exit(1);
    for (unsigned i = 0; i < count; i++)
        close(fds[i]);
}

/* What the first process holds from here on: the control socket, the list of processes, the keeper's socket. */
static void keep_only(int processes, int keeper)
{
    /* Neither overwrites the other: the keeper's socket is newer than the plan and its pidfd, the descriptors 4 and 5. */
    if (processes != PROCESSES_FD && dup3(processes, PROCESSES_FD, O_CLOEXEC) < 0)
        stop("start", "keep descriptors");
    if (keeper != KEEPER_FD && dup3(keeper, KEEPER_FD, O_CLOEXEC) < 0)
        stop("start", "keep descriptors");
    if (sys_close_range(KEEPER_FD + 1, ~0u) < 0)
        stop("start", "keep descriptors");
}

/* Installs the filter, and has the keeper take its listener. From the filter on, this process makes no call that is
 * notified: nobody may be there to answer. */
static void hand_over(const struct step *filter)
{
    const char *detail;
    char byte;

    /* pidfd_getfd(2): of a process that is not dumpable only root may take anything. There is no other inside yet. */
    if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) < 0)
        stop("listener", "dumpable");
    int32_t listener = install_filter(filter, &detail);
    if (listener < 0)
        stop("seccomp filter", detail);
    if (send_message(KEEPER_FD, &listener, sizeof listener, NULL, 0) < 0)
        stop("listener", "hand over");
    if (recv(KEEPER_FD, &byte, 1, 0) != 1)
        _exit(1); /* the keeper has reported what went wrong, or is gone */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || sys_close_range(KEEPER_FD, ~0u) < 0)
        _exit(1);
}

static void read_plan(void)
{
    unsigned long length;
    const void *bytes = map_sealed(plan_fd, PLAN_MAX_BYTES, &length);
    if (!bytes)
        stop("plan", "the plan is not sealed");
    const char *problem = plan_parse(&plan, bytes, length);
    if (problem) {
        errno = EPROTO;
        stop("plan", problem);
    }
}

/* Memory belongs to the user namespace in which its process last executed something, and where the process is not dumpable
 * only those may read it who are privileged there (ptrace(2)). An ordinary user is privileged in the sandbox's, and the
 * supervisor must read what commands are about to execute. So the first process executes this very program once more. */
static _Noreturn void execute_again(int keeper)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    char plan_text[16], keeper_text[16];
    char *argv[] = {(char *)(uintptr_t)"corral-init", plan_text, keeper_text, NULL}, *none[] = {NULL};

    if (syscall(SYS_capget, &header, data) < 0)
        stop("start", "capget");
    for (int i = 0; i < 2; i++)
        data[i].inheritable = data[i].permitted;
    if (syscall(SYS_capset, &header, data) < 0)
        stop("start", "capset");
    for (int i = 0; i < 64; i++)
        if (data[i / 32].permitted & 1u << i % 32 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0) < 0)
            stop("start", "ambient set");
    snprintf(plan_text, sizeof plan_text, "%d", plan_fd);
    snprintf(keeper_text, sizeof keeper_text, "%d", keeper);
    if (fcntl(CONTROL_FD, F_SETFD, 0) < 0 || fcntl(plan_fd, F_SETFD, 0) < 0 || fcntl(keeper, F_SETFD, 0) < 0)
        stop("start", "keep descriptors");
    execve("/proc/self/exe", argv, none);
    stop("start", "execute the launcher inside");
}

static _Noreturn void build(int keeper, int *sources)
{
    struct building building = {
        .plan = &plan, .sources = sources, .layer = -1, .root = -1, .domain = -1, .processes = -1};
    const char *step = "", *problem;

    prctl(PR_SET_NAME, "corral-init", 0, 0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (unshare(CLONE_NEWCGROUP) < 0)
        stop("namespaces", "cgroup");
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        stop("namespaces", "private mounts");
    if (!plan.prepare_outside) {
        const int no_maps[3] = {-1, -1, -1};
        const char *path = open_sources(&plan, no_maps, sources, &step);
        if (path)
            stop(step, path);
    }
    umask(0);
    if (build_walls(&building) < 0)
        stop(building.failed ? step_name(building.failed->kind) : "plan", building.detail);
    umask(022);

    problem = give_up_privileges();
    if (problem)
        stop("privileges", problem);

    /* Setting ids cleared the death signal (prctl(2)). A keeper that died before this line is seen by its socket. */
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    char byte;
    if (recv(keeper, &byte, 1, MSG_DONTWAIT) == 0)
        _exit(1);

    if (send_message(keeper, "", 1, &building.domain, building.domain >= 0) < 0)
        stop("deputy", "hand over");
    announce(&building);
    keep_only(building.processes, keeper);
    hand_over(building.filter);
    drop_cold_code();
    drop_pages(&plan, &plan + 1); /* done with: it reads as zeros from here on */
    serve(CONTROL_FD, PROCESSES_FD);
}

static _Noreturn void inside(int keeper, const struct keeper *outside)
{
    int sources[PLAN_MAX_SOURCES];

    receive_sources(keeper, sources);

    /* Version 1 hierarchies: see make_cgroups. Only then a cgroup namespace, so that its roots are our groups. */
    for (uint32_t i = 0; i < outside->cgroups; i++) {
        if ((int)i != outside->cgroup2 && write(outside->cgroup_fds[i], "0", 1) != 1)
            stop("cgroup", outside->cgroup_paths[i]);
        close(outside->cgroup_fds[i]);
    }
    take_ids();
    if (!plan.prepare_outside)
        execute_again(keeper);
    build(keeper, sources);
}

static _Noreturn void inside_again(char *const *argv)
{
    int keeper = atoi(argv[2]);
    plan_fd = atoi(argv[1]);
    if (fcntl(CONTROL_FD, F_SETFD, FD_CLOEXEC) < 0 || fcntl(plan_fd, F_SETFD, FD_CLOEXEC) < 0 ||
        fcntl(keeper, F_SETFD, FD_CLOEXEC) < 0)
        _exit(1);
    read_plan();
    if (plan.prepare_outside)
        _exit(1);
    int sources[PLAN_MAX_SOURCES];
    build(keeper, sources);
}

/* ---- outside ---- */

/* What the first process waits for: its id maps and, as root, the mounts that it could not make itself. */
static int set_up(struct keeper *keeper, pid_t init, int socket)
{
    int sources[PLAN_MAX_SOURCES], userns[3] = {-1, -1, -1};
    unsigned count = 0;

    if (write_id_maps(keeper, init) < 0)
        return -1;
    if (plan.prepare_outside) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/ns/user", init);
        keeper->step = "id map";
        keeper->detail = "user namespace";
        userns[IDMAP_SANDBOX] = open(path, O_RDONLY | O_CLOEXEC);
        if (userns[IDMAP_SANDBOX] < 0)
            return -1;
        userns[IDMAP_WORKSPACE] = open_workspace_map(keeper);
        if (userns[IDMAP_WORKSPACE] < 0 && errno != 0)
            return -1;
        const char *failed = open_sources(&plan, userns, sources, &keeper->step);
        keeper->detail = failed;
        if (failed)
            return -1;
        count = plan.sources;
    }
    keeper->step = "start";
    keeper->detail = "hand over";
    int result = send_message(socket, "", 1, sources, count);
    for (unsigned i = 0; i < count; i++)
        close(sources[i]);
    close(userns[IDMAP_SANDBOX]);
    close(userns[IDMAP_WORKSPACE]);
    return result;
}

static enum end_reason launch(struct keeper *keeper)
{
    int pair[2], init_pidfd = -1;

    if (make_cgroups(keeper) < 0)
        goto failed;
    keeper->step = "start";
    keeper->detail = "socket pair";
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        goto failed;
    struct clone_args args = {
        .flags = NAMESPACES | CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)&init_pidfd, .exit_signal = SIGCHLD};
    if (keeper->cgroup2 >= 0) {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)keeper->cgroup_fds[keeper->cgroup2];
    }
    keeper->step = "namespaces";
    keeper->detail = "user, mount, pid, net, ipc, uts";
    pid_t init = sys_clone3(&args);
    if (init == 0) {
        close(pair[0]);
        inside(pair[1], keeper);
    }
    if (init < 0)
        goto failed;
    close(pair[1]);
    keeper->first = pair[0];
    bool started = set_up(keeper, init, pair[0]) == 0;
    if (!started) {
        report_failure(CONTROL_FD, keeper->step, keeper->detail);
        sys_pidfd_send_signal(init_pidfd, SIGKILL);
    }
    /* Only now: the first process is a copy of this one, and /proc/PID/uid_map of what is not dumpable is root's. */
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    end_carrier(keeper);
    drop_cold_code();
    enum end_reason reason = keep(keeper, init, init_pidfd);
    close(pair[0]);
    return started ? reason : END_FAILED;

failed:
    report_failure(CONTROL_FD, keeper->step, keeper->detail);
    remove_cgroups(keeper);
    return END_FAILED;
}

/* The controller's terminal and signals are none of the keeper's business: Ctrl-C must not take it down before it has
 * cleaned up. SIGTERM is how the controller asks for the kill. */
static void detach(void)
{
    sigset_t blocked;
    sigfillset(&blocked);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
    signal(SIGCHLD, SIG_DFL); /* a caller that ignores it hands that down, and no child could be waited for */
    setsid();
    prctl(PR_SET_NAME, "corral-keeper", 0, 0, 0);
    if (sys_close_range(CONTROL_FD + 1, ~0u) < 0 || fcntl(CONTROL_FD, F_SETFD, FD_CLOEXEC) < 0)
        stop("start", "close what was inherited");
    for (int fd = 0; fd < 3; fd++) /* open takes the lowest free number */
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            stop("start", "/dev/null");
    umask(077);
    if (chdir("/") < 0)
        _exit(1);
}

int main(int argc, char **argv)
{
    struct keeper keeper = {
        .plan = &plan, .control = CONTROL_FD, .controller = -1, .first = -1, .listener = -1, .deputy = NO_DEPUTY, .cgroup2 = -1};
    struct request request;
    int fds[3];
    unsigned count;

    if (argc == 3 && getpid() == 1)
        inside_again(argv);
    if (argc != 1 || fcntl(CONTROL_FD, F_GETFD) < 0) {
        fprintf(stderr, "%s: this program is started by corral; run `corral --help`\n", argv[0]);
        return 2;
    }
    detach();
    if (receive_message(CONTROL_FD, &request, sizeof request, fds, 3, &count) != 1)
        return 1;
    if (request.type != REQUEST_PLAN || count < 2) {
        errno = EPROTO;
        stop("plan", "not the first message");
    }
    plan_fd = fds[0];
    read_plan();
    keeper.controller = fds[1];
    enum end_reason reason = launch(&keeper);
    struct report report = {.type = REPORT_ENDED, .status = (int32_t)reason};
    send_report(CONTROL_FD, &report, NULL, 0);
    return 0;
}
