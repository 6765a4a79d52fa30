#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"
#include "report.h"
#include "wire.h"

static int failed(struct keeper *keeper, const char *step, const char *detail)
{
    keeper->step = step;
    keeper->detail = detail;
    return -1;
}

static int write_at(int directory, const char *file, const char *value)
{
    int fd = openat(directory, file, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    size_t length = strlen(value);
    int result = write(fd, value, length) == (ssize_t)length ? 0 : -1;
    int error = errno;
    close(fd);
    errno = error;
    return result;
}

int make_cgroups(struct keeper *keeper)
{
    keeper->cgroup2 = -1;
    for (uint32_t i = 0; i < keeper->plan->count; i++) {
        const struct step *step = &keeper->plan->steps[i];
        if (step->kind != STEP_CGROUP)
            continue;
        uint32_t slot = keeper->cgroups;
        keeper->cgroup_paths[slot] = step->text[0];
        if (mkdir(step->text[0], 0755) < 0)
            return failed(keeper, "cgroup", step->text[0]);
        keeper->cgroups++;
        int directory = open(step->text[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0)
            return failed(keeper, "cgroup", step->text[0]);
        struct cursor items = step_items(step);
        for (uint32_t n = 0; n < step->count; n++) {
            const char *file = take_string(&items);
            const char *value = take_string(&items);
            if (write_at(directory, file, value) < 0)
                return failed(keeper, "cgroup", file);
        }
        if (step->number[0] == 2) {
            keeper->cgroup2 = (int)slot;
            keeper->cgroup_fds[slot] = directory;
            continue;
        }
        /* A thread that writes "0" to `tasks` moves itself without the global lock that a write of a pid to
         * `cgroup.procs` takes (cgroup_procs_write_start); that lock costs 20 ms. */
        keeper->cgroup_fds[slot] = openat(directory, "tasks", O_WRONLY | O_CLOEXEC);
        close(directory);
        if (keeper->cgroup_fds[slot] < 0)
            return failed(keeper, "cgroup", "tasks");
    }
    return 0;
}

void remove_cgroups(struct keeper *keeper)
{
    for (uint32_t i = 0; i < keeper->cgroups; i++) {
        const struct timespec pause = {.tv_nsec = 2000000};
        for (int attempt = 0; attempt < 250; attempt++) {
            if (rmdir(keeper->cgroup_paths[i]) == 0 || errno != EBUSY)
                break;
            nanosleep(&pause, NULL);
        }
    }
    keeper->cgroups = 0;
}

void kill_cgroup(struct keeper *keeper)
{
    if (keeper->cgroup2 >= 0 && keeper->cgroups > (uint32_t)keeper->cgroup2)
        write_at(keeper->cgroup_fds[keeper->cgroup2], "cgroup.kill", "1");
}

static int write_proc(pid_t pid, const char *file, const char *value)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    return write_at(AT_FDCWD, path, value);
}

/* newuidmap(1), newgidmap(1): the setuid helpers that write the ranges of /etc/subuid for an ordinary user. */
static int run_helper(const struct id_map *map, pid_t pid)
{
    char numbers[PLAN_MAX_ID_LINES * 3 + 1][16];
    char *argv[PLAN_MAX_ID_LINES * 3 + 3];
    uint32_t n = 0;
    int status;

    snprintf(numbers[n++], sizeof numbers[0], "%d", pid);
    for (uint32_t i = 0; i < map->count; i++) {
        snprintf(numbers[n++], sizeof numbers[0], "%u", map->lines[i].inside);
        snprintf(numbers[n++], sizeof numbers[0], "%u", map->lines[i].outside);
        snprintf(numbers[n++], sizeof numbers[0], "%u", map->lines[i].length);
    }
    argv[0] = (char *)(uintptr_t)map->helper;
    for (uint32_t i = 0; i < n; i++)
        argv[i + 1] = numbers[i];
    argv[n + 1] = NULL;
    pid_t helper = fork();
    if (helper == 0) {
        char *const nothing[] = {NULL};
        execve(map->helper, argv, nothing);
        _exit(127);
    }
    if (helper < 0 || waitpid(helper, &status, 0) < 0)
        return -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        errno = EPERM;
        return -1;
    }
    return 0;
}

static int write_map(const struct id_map *map, pid_t pid, const char *file)
{
    char text[PLAN_MAX_ID_LINES * 36];
    size_t length = 0;
    if (map->helper[0])
        return run_helper(map, pid);
    for (uint32_t i = 0; i < map->count; i++)
        length += (size_t)snprintf(text + length, sizeof text - length, "%u %u %u\n", map->lines[i].inside,
                                   map->lines[i].outside, map->lines[i].length);
    return write_proc(pid, file, text);
}

/* user_namespaces(7): without CAP_SETGID outside, setgroups must be denied before the gid map is written. */
static int write_maps(struct keeper *keeper, pid_t pid, const struct id_map *uid, const struct id_map *gid)
{
    if (geteuid() != 0 && !gid->helper[0] && write_proc(pid, "setgroups", "deny") < 0)
        return failed(keeper, "id map", "setgroups");
    if (write_map(gid, pid, "gid_map") < 0)
        return failed(keeper, "id map", gid->helper[0] ? gid->helper : "gid_map");
    if (write_map(uid, pid, "uid_map") < 0)
        return failed(keeper, "id map", uid->helper[0] ? uid->helper : "uid_map");
    return 0;
}

int write_id_maps(struct keeper *keeper, pid_t pid)
{
    return write_maps(keeper, pid, &keeper->plan->maps[MAP_SANDBOX_UID], &keeper->plan->maps[MAP_SANDBOX_GID]);
}

int open_workspace_map(struct keeper *keeper)
{
    const struct id_map *maps = keeper->plan->maps;
    errno = 0;
    if (!maps[MAP_WORKSPACE_UID].present)
        return -1;

    /* A user namespace lives as long as somebody holds it: this child only carries it until the mounts do.
     * It is ended later: waiting for an exit takes longer than all the rest of this. */
    struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    pid_t self = getpid(), carrier = sys_clone3(&args);
    if (carrier > 0)
        keeper->carrier = carrier;
    if (carrier == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != self)
            _exit(1); /* the keeper died before that line */
        for (;;)
            pause();
    }
    if (carrier < 0)
        return failed(keeper, "id map", "user namespace of the workspace map");
    int fd = -1;
    if (write_maps(keeper, carrier, &maps[MAP_WORKSPACE_UID], &maps[MAP_WORKSPACE_GID]) == 0) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/ns/user", carrier);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            failed(keeper, "id map", "user namespace of the workspace map");
    }
    return fd;
}

void end_carrier(struct keeper *keeper)
{
    if (keeper->carrier <= 0)
        return;
    kill(keeper->carrier, SIGKILL);
    waitpid(keeper->carrier, NULL, 0);
    keeper->carrier = 0;
}

/* Paths of a dead controller, which it can no longer remove itself. A dying process closes its sockets a moment before
 * its pidfd says so, hence the patience where the control socket has been hung up. */
static void remove_remains(const struct keeper *keeper)
{
    struct pollfd controller = {.fd = keeper->controller, .events = POLLIN};
    struct pollfd control = {.fd = keeper->control, .events = 0};
    int patience = poll(&control, 1, 0) > 0 ? 200 : 0;
    bool dead = false;
    for (uint32_t i = 0; i < keeper->plan->count; i++) {
        const struct step *step = &keeper->plan->steps[i];
        if (step->kind != STEP_REMOVE)
            continue;
        if (!dead && poll(&controller, 1, patience) <= 0)
            return;
        dead = true;
        if (unlink(step->text[0]) < 0)
            rmdir(step->text[0]);
    }
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* What the deputy will need. The namespaces too are taken now, while the first process is dumpable: later only root may. */
static int take_domain(struct keeper *keeper)
{
    char byte;
    unsigned count;
    int got = receive_message(keeper->first, &byte, 1, &keeper->deputy.domain, 1, &count);
    if (got < 0)
        return failed(keeper, "deputy", "Landlock rules");
    keeper->met = got > 0; /* else it has reported what went wrong, or was killed */
    return 0;
}

/* The other side of hand_over() in main.c. */
static int take_listener(struct keeper *keeper, pid_t init, int init_pidfd)
{
    struct report report = {.type = REPORT_LISTENER};
    int32_t number;
    ssize_t got = recv(keeper->first, &number, sizeof number, MSG_DONTWAIT);
    if (got == 0)
        return 0; /* it has reported what went wrong, or was killed */
    if (got != sizeof number) {
        errno = EPROTO;
        return failed(keeper, "listener", "number");
    }
    keeper->listener = sys_pidfd_getfd(init_pidfd, number);
    if (keeper->listener < 0)
        return failed(keeper, "listener", "take over");
    int fds[2] = {keeper->listener, -1};
    if (deputy_prepare(&keeper->deputy, init, &fds[1]) < 0)
        return failed(keeper, "deputy", "namespaces and socket");
    int sent = send_report(keeper->control, &report, fds, 2), error = errno;
    close(fds[1]);
    errno = error;
    if (sent < 0)
        return failed(keeper, "listener", "hand over");
    if (send_message(keeper->first, "", 1, NULL, 0) < 0)
        return failed(keeper, "listener", "acknowledge");
    return 0;
}

/* First come the deputy's rules, then the number of the listener, then nothing else. */
static int take_over(struct keeper *keeper, pid_t init, int init_pidfd, int *watched)
{
    if (!keeper->met) {
        int result = take_domain(keeper);
        if (!keeper->met)
            *watched = -1;
        return result;
    }
    *watched = -1;
    return take_listener(keeper, init, init_pidfd);
}

/* Either the first request for a deputy is there, or the deputy is dead. */
static int heed_deputy(struct keeper *keeper)
{
    struct deputy *deputy = &keeper->deputy;
    char byte;
    if (deputy->pid)
        return -1;
    if (recv(deputy->socket, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0)
        return deputy_start(deputy, keeper->plan);
    close(deputy->socket); /* the controller has closed its end */
    deputy->socket = -1;
    return 0;
}

enum end_reason keep(struct keeper *keeper, pid_t init, int init_pidfd)
{
    enum end_reason reason = END_INIT_DIED;
    bool ending = false;
    int64_t deadline = keeper->plan->wall_time_ms ? now_ms() + (int64_t)keeper->plan->wall_time_ms : 0;
    sigset_t terminate;
    sigemptyset(&terminate);
    sigaddset(&terminate, SIGTERM);
    int signals = signalfd(-1, &terminate, SFD_CLOEXEC | SFD_NONBLOCK);

    enum { INIT, CONTROLLER, CONTROL, SIGNALS, FIRST, DEPUTY, WATCHED };
    struct pollfd watched[WATCHED] = {
        [INIT] = {.fd = init_pidfd, .events = POLLIN},
        [CONTROLLER] = {.fd = keeper->controller, .events = POLLIN},
        [CONTROL] = {.fd = keeper->control, .events = 0}, /* hang-up only: the first process reads it */
        [SIGNALS] = {.fd = signals, .events = POLLIN},
        [FIRST] = {.fd = keeper->first, .events = POLLIN},
        [DEPUTY] = {.fd = -1, .events = POLLIN},
    };
    while (!(watched[INIT].revents & POLLIN)) {
        int64_t left = -1;
        if (deadline && !ending)
            left = deadline > now_ms() ? deadline - now_ms() : 0;
        if (signals < 0 && !ending)
            left = 0; /* nobody could tell us to kill */
        int ready = poll(watched, WATCHED, left > 3600000 ? 3600000 : (int)left);
        if (ready < 0 && errno != EINTR)
            break;
        if (ending || (watched[INIT].revents & POLLIN))
            continue;
        if (watched[CONTROLLER].revents)
            reason = END_CONTROLLER;
        else if (watched[CONTROL].revents)
            reason = END_CLOSED;
        else if (watched[SIGNALS].revents || signals < 0)
            reason = END_KILLED;
        else if (deadline && now_ms() >= deadline)
            reason = END_WALL_TIME;
        else if (watched[FIRST].revents && take_over(keeper, init, init_pidfd, &watched[FIRST].fd) < 0) {
            report_failure(keeper->control, keeper->step, keeper->detail);
            reason = END_FAILED;
        } else if (watched[DEPUTY].revents && heed_deputy(keeper) < 0)
            reason = END_DEPUTY;
        else {
            watched[DEPUTY].fd = keeper->deputy.pid ? keeper->deputy.pidfd : keeper->deputy.socket;
            continue;
        }
        ending = true;
        for (int i = INIT + 1; i < WATCHED; i++)
            watched[i].fd = -1;
        kill_cgroup(keeper);
        sys_pidfd_send_signal(init_pidfd, SIGKILL);
    }
    sys_pidfd_send_signal(init_pidfd, SIGKILL);
    int status = 0;
    while (waitpid(init, &status, 0) < 0 && errno == EINTR)
        ;
    deputy_end(&keeper->deputy);
    if (keeper->listener >= 0)
        close(keeper->listener);
    if (reason == END_INIT_DIED && WIFEXITED(status) && WEXITSTATUS(status) == 0)
        reason = END_CLOSED;
    if (reason == END_INIT_DIED && WIFEXITED(status) && WEXITSTATUS(status) == EXIT_NO_WALLS)
        reason = END_FAILED;
    remove_cgroups(keeper);
    remove_remains(keeper);
    return reason;
}
