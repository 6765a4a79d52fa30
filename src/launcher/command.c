#include "command.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "exec.h"
#include "kernel.h"
#include "report.h"

int drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}, {0}};
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
        return -1;
    return (int)syscall(SYS_capset, &header, none);
}

static _Noreturn void give_up(int control, uint32_t id, const char *stage, const char *detail)
{
    struct report report = {.type = REPORT_EXEC_FAILED, .id = id, .error = errno};
    strncpy(report.step, stage, sizeof report.step - 1);
    strncpy(report.detail, detail, sizeof report.detail - 1);
    send_report_patiently(control, &report);
    _exit(127);
}

static void default_signals(void)
{
    /* The kernel's struct sigaction, all of it zero, is the default. libc's call would leave out the two signals that
     * it uses itself, and posix_spawn has the launcher ignore just those. */
    static const unsigned long standard[8];
    sigset_t none;
    for (int number = 1; number <= SIGRTMAX; number++)
        syscall(SYS_rt_sigaction, number, standard, NULL, 8);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static int become(const struct exec *exec)
{
    if (getegid() != exec->gid && setresgid(exec->gid, exec->gid, exec->gid) < 0)
        return -1;
    if (geteuid() != exec->uid && setresuid(exec->uid, exec->uid, exec->uid) < 0)
        return -1;
    /* Another id made this process as dumpable as fs.suid_dumpable says. Until the capabilities go too, that id's other
     * processes may not look into it (ptrace(2)); from here on they may not either. */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        return -1;
    return drop_capabilities();
}

/* execvp(3), but a directory of PATH where there is no such file is passed over without execve(2): each of those is
 * reported to the supervisor, and waits for its answer. */
static void search_and_execute(const char *name, char *const argv[])
{
    const char *path = getenv("PATH");
    char file[PATH_MAX];
    bool denied = false;

    if (!path || name[0] == '\0' || strchr(name, '/') || strlen(name) > NAME_MAX) {
        execvp(name, argv);
        return;
    }
    for (const char *end;; path = end + 1) {
        end = strchrnul(path, ':');
        bool empty = end == path; /* the working directory */
        int length = snprintf(file, sizeof file, "%.*s/%s", empty ? 1 : (int)(end - path), empty ? "." : path, name);
        errno = ENOENT;
        if ((size_t)length < sizeof file && (access(file, F_OK) == 0 || (errno != ENOENT && errno != ENOTDIR)))
            execvp(file, argv); /* there is a slash in it, so it searches no more; a file of no format is a script */
        if (errno == EACCES)
            denied = true;
        else if (errno != ENOENT && errno != ENOTDIR && errno != ESTALE && errno != ENODEV && errno != ETIMEDOUT)
            return;
        if (*end == '\0')
            break;
    }
    if (denied)
        errno = EACCES;
}

static _Noreturn void execute(int control, uint32_t id, const struct exec *exec)
{
    default_signals();
    environ = exec->envp;
    search_and_execute(exec->argv[0], exec->argv);
    give_up(control, id, "exec", exec->argv[0]);
}

/* A terminal's command needs a parent in its own session: the kernel drops SIGTSTP for an orphaned process group
 * (setpgid(2)), and Ctrl-Z would do nothing. This process is that parent. It stops itself when the command stops, so
 * that the first process sees it, and ends as the command ended. It is the agent's own user and not dumpable. */
static _Noreturn void lead_terminal(int control, uint32_t id, const struct exec *exec)
{
    bool stopped = false;
    sigset_t all;
    siginfo_t info;

    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    if (ioctl(0, TIOCSCTTY, 0) < 0)
        give_up(control, id, "controlling terminal", "");
    pid_t command = fork();
    if (command < 0)
        give_up(control, id, "fork", "");
    if (command == 0) {
        setpgid(0, 0);
        if (tcsetpgrp(0, getpid()) < 0)
            give_up(control, id, "foreground", "");
        execute(control, id, exec);
    }
    setpgid(command, command);
    sys_close_range(CONTROL_FD, ~0u); /* it never executes anything, so nothing else would close them */
    for (;;) {
        if (sigwaitinfo(&all, &info) < 0)
            continue;
        if (info.si_signo == SIGCONT) {
            if (stopped) /* else a job of the command may rightly be in the foreground */
                tcsetpgrp(0, command);
            stopped = false;
            kill(-command, SIGCONT);
            continue;
        }
        if (info.si_signo != SIGCHLD) {
            kill(-command, info.si_signo);
            continue;
        }
        int status;
        while (waitpid(command, &status, WNOHANG | WUNTRACED) == command) {
            if (WIFSTOPPED(status)) {
                stopped = true;
                raise(SIGSTOP);
            } else if (WIFEXITED(status)) {
                _exit(WEXITSTATUS(status));
            } else {
                default_signals();
                struct rlimit none = {0, 0};
                setrlimit(RLIMIT_CORE, &none);
                raise(WTERMSIG(status));
                _exit(128 + WTERMSIG(status));
            }
        }
    }
}

_Noreturn void run_command(int control, uint32_t id, const int fds[COMMAND_FDS])
{
    struct exec exec;
    unsigned long length;

    const void *payload = map_sealed(fds[0], EXEC_MAX_BYTES, &length);
    if (!payload)
        give_up(control, id, "request", "the payload is not sealed");
    const char *problem = exec_parse(&exec, payload, length);
    if (problem) {
        errno = EPROTO;
        give_up(control, id, "request", problem);
    }
    if (syscall(SYS_setsid, EXEC_SESSION_MARK, (long)id) < 0)
        give_up(control, id, "session", "");

    /* The keeper keeps 0 to 2 open, so none of the received descriptors is one of them. A directory of the host is a
     * way out of the root ("..", openat(2)). */
    for (int i = 0; i < 3; i++) {
        struct stat stat;
        if (fstat(fds[i + 1], &stat) < 0 || dup2(fds[i + 1], i) < 0)
            give_up(control, id, "stdio", "");
        errno = EISDIR;
        if (S_ISDIR(stat.st_mode))
            give_up(control, id, "stdio", "a directory");
    }
    for (uint32_t i = 0; i < exec.limits; i++) {
        struct rlimit limit = {exec.limit[i].soft, exec.limit[i].hard};
        if (setrlimit((int)exec.limit[i].resource, &limit) < 0)
            give_up(control, id, "rlimit", "");
    }
    if (become(&exec) < 0)
        give_up(control, id, "user", "");
    if (chdir(exec.directory) < 0)
        give_up(control, id, "directory", exec.directory);
    if (exec.flags & EXEC_TERMINAL)
        lead_terminal(control, id, &exec);
    execute(control, id, &exec);
}
