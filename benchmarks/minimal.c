/* The least that a supervisor of system calls can do, in C: what Corral's is measured against.
 *
 *     minimal PROGRAM ARGUMENT...
 *
 * Runs the program under a filter that notifies some calls, and answers them: refused ones with EPERM, execve by letting
 * it go on, the network calls by doing them on copies of descriptor and memory. It decides nothing, records nothing,
 * checks nothing, and knows of its callers only the pidfd of the last one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#endif
#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

#define NOTIFIED(number) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF)

static void must(int done, const char *what)
{
    if (!done) {
        perror(what);
        exit(1);
    }
}

static int install(void)
{
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        NOTIFIED(SYS_bpf),    NOTIFIED(SYS_connect), NOTIFIED(SYS_bind),  NOTIFIED(SYS_sendmsg),
        NOTIFIED(SYS_execve), NOTIFIED(SYS_sendto),  NOTIFIED(SYS_clone3),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog whole = {sizeof program / sizeof program[0], program};
    must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
                        SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &whole);
}

static int copy(pid_t caller, uint64_t number)
{
    static pid_t last;
    static int pidfd = -1;
    if (caller != last) {
        close(pidfd);
        pidfd = (int)syscall(SYS_pidfd_open, caller, 0);
        last = caller;
    }
    return (int)syscall(SYS_pidfd_getfd, pidfd, (int)number, 0);
}

static size_t look(pid_t caller, void *to, uint64_t from, size_t length)
{
    struct iovec here = {to, length}, there = {(void *)from, length};
    return process_vm_readv(caller, &here, 1, &there, 1, 0) == (ssize_t)length ? length : 0;
}

static long carry_out(const struct seccomp_notif *call)
{
    const __u64 *argument = call->data.args;
    struct sockaddr_storage address;
    struct msghdr message;
    struct iovec vector;
    char data[4096];
    long result = -1;
    int fd = copy((pid_t)call->pid, argument[0]);
    if (fd < 0)
        return -errno;
    errno = EFAULT;
    if (call->data.nr == SYS_connect && look(call->pid, &address, argument[1], argument[2]))
        result = connect(fd, (struct sockaddr *)&address, (socklen_t)argument[2]);
    else if (call->data.nr == SYS_bind && look(call->pid, &address, argument[1], argument[2]))
        result = bind(fd, (struct sockaddr *)&address, (socklen_t)argument[2]);
    else if (call->data.nr == SYS_sendto && look(call->pid, data, argument[1], argument[2]) &&
             look(call->pid, &address, argument[4], argument[5]))
        result = sendto(fd, data, argument[2], (int)argument[3], (struct sockaddr *)&address, (socklen_t)argument[5]);
    else if (call->data.nr == SYS_sendmsg && look(call->pid, &message, argument[1], sizeof message) &&
             look(call->pid, &vector, (uint64_t)message.msg_iov, sizeof vector) &&
             look(call->pid, data, (uint64_t)vector.iov_base, vector.iov_len)) {
        vector.iov_base = data;
        message = (struct msghdr){.msg_iov = &vector, .msg_iovlen = 1};
        result = sendmsg(fd, &message, (int)argument[2]);
    }
    int error = errno;
    close(fd);
    return result < 0 ? -error : result;
}

static void serve(int listener)
{
    struct pollfd ready = {.fd = listener, .events = POLLIN};
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP); /* Linux 6.6 */
    while (poll(&ready, 1, -1) == 1 && ready.revents & POLLIN) {
        struct seccomp_notif call = {0};
        struct seccomp_notif_resp answer = {0};
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
            continue;
        answer.id = call.id;
        if (call.data.nr == SYS_execve) {
            answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
        } else if (call.data.nr == SYS_sendto && !call.data.args[4]) {
            answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
        } else if (call.data.nr == SYS_bpf || call.data.nr == SYS_clone3) {
            answer.error = call.data.nr == SYS_bpf ? -EPERM : -ENOSYS;
        } else {
            long result = carry_out(&call);
            answer.error = result < 0 ? (int)result : 0;
            answer.val = result < 0 ? 0 : result;
        }
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    }
}

int main(int argc, char **argv)
{
    int numbers[2], listener, status;
    must(argc > 1, "a program");
    must(pipe(numbers) == 0, "pipe");
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        listener = install();
        must(listener >= 0, "seccomp");
        must(write(numbers[1], &listener, sizeof listener) == sizeof listener, "write");
        close(numbers[1]);
        close(numbers[0]);
        execv(argv[1], argv + 1); /* waits until somebody answers; the listener goes with it (close-on-exec) */
        _exit(127);
    }
    must(read(numbers[0], &listener, sizeof listener) == sizeof listener, "read");
    int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    listener = (int)syscall(SYS_pidfd_getfd, pidfd, listener, 0);
    must(listener >= 0, "pidfd_getfd");
    close(pidfd);
    close(numbers[0]);
    close(numbers[1]);
    serve(listener);
    must(waitpid(child, &status, 0) == child, "waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}
