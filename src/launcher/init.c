#include "init.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "command.h"
#include "kernel.h"
#include "report.h"

#define MAX_RUNNING 1024
#define MAX_PASSES 64 /* about as many milliseconds */
#define MAX_REAPED 256 /* at a time, so that a storm of orphans never keeps requests waiting */

/* Owned by serve(), which is single-threaded. pid 0 is a free place. */
struct running {
    pid_t pid;
    uint32_t id;
};
static struct running table[MAX_RUNNING];
static DIR *processes;
static unsigned used; /* places at and above this were never taken */

static struct running *find_place(pid_t pid)
{
    for (unsigned i = 0; i < used; i++)
        if (table[i].pid == pid)
            return &table[i];
    if (pid == 0 && used < MAX_RUNNING)
        return &table[used++];
    return NULL;
}

static struct running *find_exec(uint32_t id)
{
    for (unsigned i = 0; i < used; i++)
        if (table[i].pid != 0 && table[i].id == id)
            return &table[i];
    return NULL;
}

/* The controller reads this socket; when it does not even keep up with exits it has lost track of what runs here. */
static void must_send(int control, const struct report *report)
{
    if (send_report_patiently(control, report) < 0)
        _exit(errno == EPIPE || errno == ECONNRESET ? 0 : 1);
}

static void report_exit(int control, uint32_t id, int status, const struct rusage *usage)
{
    struct report report = {.type = REPORT_EXITED, .id = id, .status = status};
    report.values[USAGE_USER_US] = (uint64_t)usage->ru_utime.tv_sec * 1000000 + (uint64_t)usage->ru_utime.tv_usec;
    report.values[USAGE_SYSTEM_US] = (uint64_t)usage->ru_stime.tv_sec * 1000000 + (uint64_t)usage->ru_stime.tv_usec;
    report.values[USAGE_MAXRSS_KIB] = (uint64_t)usage->ru_maxrss;
    report.values[USAGE_MINOR_FAULTS] = (uint64_t)usage->ru_minflt;
    report.values[USAGE_MAJOR_FAULTS] = (uint64_t)usage->ru_majflt;
    report.values[USAGE_BLOCKS_IN] = (uint64_t)usage->ru_inblock;
    report.values[USAGE_BLOCKS_OUT] = (uint64_t)usage->ru_oublock;
    report.values[USAGE_SWITCHES] = (uint64_t)usage->ru_nvcsw + (uint64_t)usage->ru_nivcsw;
    must_send(control, &report);
}

static void refuse_exec(int control, uint32_t id, const char *stage)
{
    struct report report = {.type = REPORT_EXEC_FAILED, .id = id, .error = errno};
    struct rusage none = {0};
    strncpy(report.step, stage, sizeof report.step - 1);
    must_send(control, &report);
    report_exit(control, id, 127 << 8, &none);
}

/* Returns whether there may be more. */
static bool reap(int control)
{
    for (int i = 0; i < MAX_REAPED; i++) {
        int status;
        struct rusage usage;
        pid_t pid = wait4(-1, &status, WNOHANG | WUNTRACED, &usage);
        if (pid <= 0)
            return false;
        struct running *running = find_place(pid);
        if (!running)
            continue; /* an orphan */
        if (WIFSTOPPED(status)) {
            struct report report = {.type = REPORT_STOPPED, .id = running->id, .status = WSTOPSIG(status)};
            must_send(control, &report);
            continue;
        }
        uint32_t id = running->id;
        running->pid = 0;
        report_exit(control, id, status, &usage);
    }
    return true;
}

static void start(int control, const struct request *request, int *fds, unsigned count)
{
    if (count != COMMAND_FDS) {
        errno = EPROTO;
        refuse_exec(control, request->id, "request");
        return;
    }
    struct running *place = find_place(0);
    if (!place) {
        errno = EAGAIN;
        refuse_exec(control, request->id, "too many commands at once");
        return;
    }
    pid_t pid = fork();
    if (pid < 0) {
        refuse_exec(control, request->id, "fork");
        return;
    }
    if (pid == 0)
        run_command(control, request->id, fds);
    place->pid = pid;
    place->id = request->id;
}

/* A zombie still has its session and takes signals; only its pidfd tells that it has ended. */
static bool has_ended(pid_t pid)
{
    struct pollfd process = {.fd = sys_pidfd_open(pid), .events = POLLIN};
    bool ended = process.fd >= 0 ? poll(&process, 1, 0) > 0 : errno == ESRCH;
    close(process.fd);
    return ended;
}

/* Every process whose session is `leader`'s. Stops when a pass over all processes finds nobody left to kill, so one
 * that was forked meanwhile is found by the next pass. */
static void kill_session(pid_t leader)
{
    kill(leader, SIGKILL); /* it may not have made its session yet */
    for (int pass = 0; pass < MAX_PASSES; pass++) {
        bool found = false;
        rewinddir(processes);
        for (struct dirent *entry; (entry = readdir(processes));) {
            char *end;
            long pid = strtol(entry->d_name, &end, 10);
            if (*end != '\0' || pid <= 1 || getsid((pid_t)pid) != leader || has_ended((pid_t)pid))
                continue;
            kill((pid_t)pid, SIGKILL);
            found = true;
        }
        if (!found)
            return;
        if (pass > 0)
            usleep(1000);
    }
}

static void pass_on(const struct request *request)
{
    struct running *running = find_exec(request->id);
    if (!running)
        return; /* it ended meanwhile; its report is on the way */
    if (request->type == REQUEST_KILL_SESSION)
        kill_session(running->pid);
    else if (request->argument > 0 && request->argument < (uint32_t)SIGRTMIN)
        /* Both: the leader may have moved to a group of its own, or may not have made one yet. */
        if (kill(-running->pid, (int)request->argument) < 0)
            kill(running->pid, (int)request->argument);
}

static void answer(int control)
{
    struct request request;
    int fds[COMMAND_FDS];
    unsigned count;
    int got = receive_message(control, &request, sizeof request, fds, COMMAND_FDS, &count);
    if (got == 0)
        _exit(0);
    if (got < 0 && errno != EPROTO && errno != EMFILE)
        _exit(1);
    if (got < 0) {
        if (errno == EMFILE && request.type == REQUEST_EXEC)
            refuse_exec(control, request.id, "request");
        return;
    }
    switch (request.type) {
    case REQUEST_EXEC:
        start(control, &request, fds, count);
        break;
    case REQUEST_SIGNAL:
    case REQUEST_KILL_SESSION:
        pass_on(&request);
        break;
    case REQUEST_STOP_ALL:
        kill(-1, SIGSTOP);
        must_send(control, &(struct report){.type = REPORT_STOPPED}); /* of no exec: every process has it to obey */
        break;
    case REQUEST_CONTINUE_ALL:
        /* Twice: a terminal's leader (command.c) that goes on before its command still sees that stopped, and follows
         * it. The pause gives it the time to do so. */
        kill(-1, SIGCONT);
        usleep(1000);
        kill(-1, SIGCONT);
        break;
    }
    for (unsigned i = 0; i < count; i++)
        close(fds[i]);
}

_Noreturn void serve(int control, int processes_fd)
{
    bool more = false;
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_SETMASK, &children, NULL);
    int signals = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    processes = fdopendir(processes_fd);
    if (signals < 0 || !processes)
        _exit(1);

    struct pollfd watched[2] = {{.fd = control, .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    for (;;) {
        if (poll(watched, 2, more ? 0 : -1) < 0) {
            if (errno != EINTR)
                _exit(1);
            continue;
        }
        if (more || watched[1].revents) {
            struct signalfd_siginfo info;
            while (read(signals, &info, sizeof info) > 0)
                ;
            more = reap(control);
        }
        if (watched[0].revents & POLLIN)
            answer(control);
        else if (watched[0].revents)
            _exit(0);
    }
}
