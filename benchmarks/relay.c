/* The least that carries connections: what a gateway would cost that decides nothing, records nothing, knows nobody.
 *
 *     relay PORT      prints its own port, and carries what comes there to PORT of this machine and back
 *
 * One thread, and splice(2) between two sockets. It is what the gateway is compared with where the question is what is
 * due to its work, and what to the two connections that any way through a third party is.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 65536
#define CHUNK (1 << 19)
#define FLAGS (SPLICE_F_NONBLOCK | SPLICE_F_MOVE)

/* By its descriptor: one end of a connection that is carried. */
static struct end {
    int other, pipe[2];
    ssize_t held; /* bytes in the pipe, on their way to the other end */
    bool open, ended, waits; /* to be written to: the pipe of the other end is not empty */
} ends[MOST];

static int poll_fd;

static void must(bool done, const char *what)
{
    if (!done) {
        perror(what);
        exit(1);
    }
}

static void watch(int fd, uint32_t events, int how)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    epoll_ctl(poll_fd, how, fd, &event);
}

static void add(int fd, int other)
{
    static const int one = 1;
    must(fd < MOST, "too many");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (ends[fd].pipe[1] == 0) { /* kept for whoever has the number next */
        must(pipe2(ends[fd].pipe, O_NONBLOCK | O_CLOEXEC) == 0, "pipe");
        fcntl(ends[fd].pipe[1], F_SETPIPE_SZ, CHUNK);
    }
    ends[fd].other = other;
    ends[fd].held = 0;
    ends[fd].open = true;
    ends[fd].ended = ends[fd].waits = false;
    watch(fd, EPOLLIN, EPOLL_CTL_ADD);
}

static void drop(int fd)
{
    for (int i = 0; i < 2; i++, fd = ends[fd].other) {
        if (ends[fd].held) {
            close(ends[fd].pipe[0]);
            close(ends[fd].pipe[1]);
            ends[fd].pipe[0] = ends[fd].pipe[1] = 0;
        }
        ends[fd].open = false;
        close(fd);
    }
}

/* What the pipe holds goes to the other end. Returns whether all of it did. */
static bool flush(int fd)
{
    struct end *end = &ends[fd];
    while (end->held > 0) {
        ssize_t sent = splice(end->pipe[0], NULL, end->other, NULL, (size_t)end->held, FLAGS);
        if (sent < 0 && errno == EAGAIN)
            break;
        if (sent <= 0) {
            drop(fd);
            return false;
        }
        end->held -= sent;
    }
    bool waits = end->held > 0;
    if (waits != ends[end->other].waits) {
        ends[end->other].waits = waits;
        watch(end->other, (ends[end->other].ended ? 0 : EPOLLIN) | (waits ? EPOLLOUT : 0), EPOLL_CTL_MOD);
        watch(fd, waits ? 0 : EPOLLIN, EPOLL_CTL_MOD);
    }
    return !waits;
}

static void carry(int fd)
{
    struct end *end = &ends[fd];
    ssize_t got = splice(fd, NULL, end->pipe[1], NULL, CHUNK, FLAGS);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got < 0) {
        drop(fd);
    } else if (got > 0) {
        end->held += got;
        flush(fd);
    } else {
        end->ended = true;
        if (ends[end->other].ended) {
            drop(fd);
            return;
        }
        shutdown(end->other, SHUT_WR);
        watch(fd, end->waits ? EPOLLOUT : 0, EPOLL_CTL_MOD);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in there = {.sin_family = AF_INET}, own = {.sin_family = AF_INET};
    socklen_t length = sizeof own;
    must(argc == 2, "usage");
    signal(SIGPIPE, SIG_IGN);
    there.sin_port = htons((uint16_t)atoi(argv[1]));
    there.sin_addr.s_addr = own.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    must(bind(listener, (struct sockaddr *)&own, sizeof own) == 0 && listen(listener, 4096) == 0, "listen");
    must(getsockname(listener, (struct sockaddr *)&own, &length) == 0, "getsockname");
    printf("%d\n", ntohs(own.sin_port));
    fflush(stdout);
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    watch(listener, EPOLLIN, EPOLL_CTL_ADD);
    for (;;) {
        struct epoll_event found[256];
        int count = epoll_wait(poll_fd, found, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = found[i].data.fd;
            if (fd == listener) {
                int inside = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                int outside = inside < 0 ? -1 : socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
                if (outside < 0)
                    continue;
                must(connect(outside, (struct sockaddr *)&there, sizeof there) == 0, "connect");
                fcntl(outside, F_SETFL, O_NONBLOCK);
                add(inside, outside);
                add(outside, inside);
                continue;
            }
            if (ends[fd].open && (found[i].events & EPOLLOUT))
                flush(ends[fd].other);
            if (ends[fd].open && (found[i].events & ~(uint32_t)EPOLLOUT) && !ends[fd].held)
                carry(fd);
        }
    }
}
