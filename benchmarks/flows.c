/* Both ends of connections whose cost is measured, inside and outside.
 *
 *     flows echo                          prints its port, and sends back whatever comes
 *     flows source BYTES                  prints its port, and sends so many bytes to whoever has said something
 *     flows connect WHERE PORT COUNT [FILE]   prints the nanoseconds until the first byte of each connection
 *     flows drain WHERE PORT [PROXY]      prints the nanoseconds and bytes of one stream; PROXY: of an HTTP proxy's port
 *     flows query NAME COUNT fresh|kept   prints each query's nanoseconds, of a new socket or of one for all
 *     flows churn WHERE PORT SECONDS      connects, says and hears a word, closes, and so on; as `connect`
 *     flows hold WHERE PORT COUNT         keeps so many connections that have carried a word, until its input ends
 *
 * WHERE is an address, or a name, for which the resolver of a sandbox is asked. FILE has what a client says first.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 200000
#define CHUNK (1 << 18)
#define PAUSE 2000 /* microseconds */

static char first[4096] = "SSH-2.0-bench\r\n";
static size_t first_length = 15;
static char chunk[CHUNK];
static struct sockaddr_in there = {.sin_family = AF_INET};

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void must(bool done, const char *what)
{
    if (!done) {
        perror(what);
        exit(1);
    }
}

/* ---- servers ---- */

static int serve(void)
{
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t length = sizeof there;
    there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must(bind(listener, (struct sockaddr *)&there, sizeof there) == 0 && listen(listener, 4096) == 0, "listen");
    must(getsockname(listener, (struct sockaddr *)&there, &length) == 0, "getsockname");
    printf("%d\n", ntohs(there.sin_port));
    fflush(stdout);
    return listener;
}

static void echo(void)
{
    int listener = serve(), poll = epoll_create1(EPOLL_CLOEXEC), one = 1;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, found[256];
    must(epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event) == 0, "epoll");
    for (;;) {
        int count = epoll_wait(poll, found, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = found[i].data.fd;
            if (fd == listener) {
                event.data.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
                if (event.data.fd >= 0) {
                    setsockopt(event.data.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    epoll_ctl(poll, EPOLL_CTL_ADD, event.data.fd, &event);
                }
                continue;
            }
            ssize_t got = recv(fd, chunk, sizeof chunk, 0);
            if (got <= 0 || send(fd, chunk, (size_t)got, MSG_NOSIGNAL) != got)
                close(fd);
        }
    }
}

static void source(int64_t bytes)
{
    int listener = serve();
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0 && fork() == 0) {
            if (recv(fd, chunk, sizeof chunk, 0) > 0)
                while (bytes > 0) {
                    ssize_t sent = send(fd, chunk, bytes < CHUNK ? (size_t)bytes : CHUNK, MSG_NOSIGNAL);
                    if (sent <= 0)
                        break;
                    bytes -= sent;
                }
            _exit(0);
        }
        close(fd);
    }
}

/* ---- names ---- */

static size_t question(char *to, const char *name)
{
    char *at = to;
    memcpy(at, "\x12\x34\x01\0\0\1\0\0\0\0\0\0", 12);
    at += 12;
    for (const char *label = name; *label;) {
        size_t length = strcspn(label, ".");
        *at++ = (char)length;
        memcpy(at, label, length);
        at += length;
        label += length + (label[length] == '.');
    }
    memcpy(at, "\0\0\1\0\1", 5);
    return (size_t)(at + 5 - to);
}

static int resolver(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(53)};
    struct timeval patience = {.tv_sec = 10};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    inet_pton(AF_INET, "198.18.0.53", &address.sin_addr);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    must(connect(fd, (struct sockaddr *)&address, sizeof address) == 0, "resolver");
    return fd;
}

static ssize_t ask(int fd, const char *query, size_t length, char *answer, size_t size)
{
    must(send(fd, query, length, 0) == (ssize_t)length, "query");
    ssize_t got = recv(fd, answer, size, 0);
    must(got > 12 && !(answer[3] & 15) && answer[7] == 1, "answer");
    return got;
}

static void find(const char *where, const char *port)
{
    there.sin_port = htons((uint16_t)atoi(port));
    if (inet_pton(AF_INET, where, &there.sin_addr) == 1)
        return;
    char query[512], answer[512];
    int fd = resolver();
    ssize_t got = ask(fd, query, question(query, where), answer, sizeof answer);
    for (ssize_t at = 12; at + 14 <= got; at++) /* the one record of type A: class, time to live, length, address */
        if (!memcmp(answer + at, "\0\1\0\1", 4) && !memcmp(answer + at + 8, "\0\4", 2))
            memcpy(&there.sin_addr, answer + at + 10, 4);
    must(there.sin_addr.s_addr != 0, "no address");
    close(fd);
}

static void query(const char *name, long count, bool fresh)
{
    char text[512], answer[512];
    size_t length = question(text, name);
    int fd = -1;
    for (long i = 0; i < count; i++) {
        int64_t since = now();
        if (fd < 0)
            fd = resolver();
        ask(fd, text, length, answer, sizeof answer);
        if (fresh) {
            close(fd);
            fd = -1;
        }
        printf("%lld\n", (long long)(now() - since));
    }
}

/* ---- clients ---- */

static int reach(void)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(fd >= 0, "socket");
    must(connect(fd, (struct sockaddr *)&there, sizeof there) == 0, "connect");
    return fd;
}

static int speak(void)
{
    int fd = reach();
    must(send(fd, first, first_length, 0) == (ssize_t)first_length, "send");
    must(recv(fd, chunk, sizeof chunk, 0) > 0, "recv");
    return fd;
}

static void connections(long count, double seconds, useconds_t pause)
{
    static int64_t taken[MOST];
    long made = 0;
    int64_t end = now() + (int64_t)(seconds * 1e9);
    for (; made < count && now() < end; made++) {
        int64_t since = now();
        int fd = speak();
        taken[made] = now() - since;
        close(fd);
        if (pause)
            usleep(pause); /* what closing costs is not part of the next connection */
    }
    for (long i = 0; i < made; i++)
        printf("%lld\n", (long long)taken[i]);
}

static void drain(const char *proxy)
{
    struct sockaddr_in target = there;
    if (proxy) {
        there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        there.sin_port = htons((uint16_t)atoi(proxy));
    }
    int fd = reach();
    if (proxy) {
        char text[256], host[INET_ADDRSTRLEN];
        inet_ntop(AF_INET, &target.sin_addr, host, sizeof host);
        int length = snprintf(text, sizeof text, "CONNECT %s:%d HTTP/1.1\r\nHost: %s:%d\r\n\r\n", host,
                              ntohs(target.sin_port), host, ntohs(target.sin_port));
        must(send(fd, text, (size_t)length, 0) == length, "CONNECT");
        size_t got = 0;
        while (got < sizeof text && !(got >= 4 && !memcmp(text + got - 4, "\r\n\r\n", 4)))
            must(recv(fd, text + got++, 1, 0) == 1, "proxy");
        must(got > 12 && text[9] == '2', "proxy refuses");
    }
    int64_t since = now(), bytes = 0;
    must(send(fd, first, first_length, 0) == (ssize_t)first_length, "send");
    ssize_t got;
    while ((got = recv(fd, chunk, sizeof chunk, 0)) > 0)
        bytes += got;
    must(got == 0, "recv");
    printf("%lld %lld\n", (long long)(now() - since), (long long)bytes);
}

static void hold(long count)
{
    for (long i = 0; i < count; i++)
        speak();
    printf("ready\n");
    fflush(stdout);
    while (read(0, chunk, sizeof chunk) > 0)
        ;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "echo"))
        echo();
    if (!strcmp(what, "source") && argc == 3)
        source(atoll(argv[2]));
    if (!strcmp(what, "query") && argc == 5) {
        query(argv[2], atol(argv[3]), !strcmp(argv[4], "fresh"));
        return 0;
    }
    must(argc >= 4, "usage");
    find(argv[2], argv[3]);
    if (!strcmp(what, "connect") && argc >= 5) {
        if (argc > 5) {
            int fd = open(argv[5], O_RDONLY | O_CLOEXEC);
            ssize_t got = read(fd, first, sizeof first);
            must(got > 0, argv[5]);
            first_length = (size_t)got;
        }
        connections(atol(argv[4]), 60, PAUSE);
    } else if (!strcmp(what, "churn") && argc == 5)
        connections(MOST, atof(argv[4]), 0);
    else if (!strcmp(what, "drain"))
        drain(argc > 4 ? argv[4] : NULL);
    else if (!strcmp(what, "hold") && argc == 5)
        hold(atol(argv[4]));
    else
        must(false, "usage");
    return 0;
}
