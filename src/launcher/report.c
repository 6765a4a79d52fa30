#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "kernel.h"

static int send_descriptors(int socket, const void *message, unsigned size, const int *fds, unsigned count)
{
    union {
        char space[CMSG_SPACE(sizeof(int) * MESSAGE_MAX_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)message, .iov_len = size};
    struct msghdr header = {.msg_iov = &iov,
                            .msg_iovlen = 1,
                            .msg_control = control.space,
                            .msg_controllen = CMSG_SPACE(sizeof(int) * count)};

    memset(&control, 0, header.msg_controllen);
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * count);
    memcpy(CMSG_DATA(rights), fds, sizeof(int) * count);
    return (int)sendmsg(socket, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
}

int send_message(int socket, const void *message, unsigned size, const int *fds, unsigned count)
{
    int sent;
    if (count > MESSAGE_MAX_FDS) {
        errno = EINVAL;
        return -1;
    }
    do {
        if (count > 0)
            sent = send_descriptors(socket, message, size, fds, count);
        else
            sent = (int)send(socket, message, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    return sent == (int)size ? 0 : -1;
}

int send_report(int socket, const struct report *report, const int *fds, unsigned count)
{
    return send_message(socket, report, sizeof *report, fds, count);
}

int send_report_patiently(int socket, const struct report *report)
{
    struct pollfd writable = {.fd = socket, .events = POLLOUT};
    while (send_report(socket, report, NULL, 0) < 0) {
        if (errno != EAGAIN)
            return -1;
        poll(&writable, 1, 1000);
        if (writable.revents & (POLLHUP | POLLERR)) {
            errno = EPIPE;
            return -1;
        }
    }
    return 0;
}

void report_failure(int socket, const char *step, const char *detail)
{
    struct report report = {.type = REPORT_FAILED, .error = errno};
    strncpy(report.step, step, sizeof report.step - 1);
    strncpy(report.detail, detail, sizeof report.detail - 1);
    send_report(socket, &report, NULL, 0);
}

static void close_all(const int *fds, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        close(fds[i]);
}

int receive_message(int socket, void *message, unsigned size, int *fds, unsigned limit, unsigned *count)
{
    union {
        char space[CMSG_SPACE(sizeof(int) * MESSAGE_MAX_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec iov = {.iov_base = message, .iov_len = size};
    struct msghdr header = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};

    *count = 0;
    ssize_t got;
    do
        got = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        unsigned found = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (unsigned i = 0; i < found; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
            if (*count < limit)
                fds[(*count)++] = fd;
            else {
                close(fd);
                header.msg_flags |= MSG_CTRUNC;
            }
        }
    }
    if (got == 0 && *count == 0)
        return 0;
    bool whole = (unsigned)got == size && !(header.msg_flags & MSG_TRUNC);
    if (whole && !(header.msg_flags & MSG_CTRUNC))
        return 1;
    close_all(fds, *count);
    *count = 0;
    errno = whole ? EMFILE : EPROTO;
    return -1;
}

const void *map_sealed(int fd, unsigned limit, unsigned long *length)
{
    const int needed = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & needed) != needed) {
        errno = EPROTO;
        return NULL;
    }
    struct stat stat;
    if (fstat(fd, &stat) < 0)
        return NULL;
    if (stat.st_size <= 0 || stat.st_size > (off_t)limit) {
        errno = EFBIG;
        return NULL;
    }
    void *bytes = mmap(NULL, (size_t)stat.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (bytes == MAP_FAILED)
        return NULL;
    *length = (unsigned long)stat.st_size;
    return bytes;
}
