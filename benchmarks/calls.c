/* Makes one kind of system call again and again, and prints what one takes: what is measured inside and outside.
 *
 *     calls KIND BATCHES EACH        prints the median, over the batches, of the nanoseconds of one call
 *     calls steady SECONDS PAUSE     connects, waits PAUSE microseconds, and so on; prints each call's nanoseconds
 *     calls flood SECONDS            connects without a pause; prints how often
 *     calls nothing                  ends at once: a program to start
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 100000

static const char *self;
static int each;
static int made[1024], pair[2], udp, zero, server;
static struct sockaddr_in address = {.sin_family = AF_INET};
static char searched[4096];

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

static void end_child(pid_t child)
{
    int status;
    must(waitpid(child, &status, 0) == child && status == 0, "child");
}

/* ---- what comes before a batch and after it is not measured ---- */

static void nothing(void)
{
}

static void make_datagram(void)
{
    for (int i = 0; i < each; i++)
        must((made[i] = socket(AF_INET, SOCK_DGRAM, 0)) >= 0, "socket");
}

static void make_streams(void)
{
    for (int i = 0; i < each; i++)
        must((made[i] = socket(AF_INET, SOCK_STREAM, 0)) >= 0, "socket");
}

static void close_made(void)
{
    for (int i = 0; i < each; i++)
        close(made[i]);
}

static void reset_streams(void)
{
    struct linger at_once = {1, 0}; /* no port stays in TIME_WAIT */
    for (int i = 0; i < each; i++) {
        int peer = accept(server, NULL, NULL);
        setsockopt(made[i], SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        close(made[i]);
        close(peer);
    }
}

static void drain(void)
{
    char byte;
    for (int i = 0; i < each; i++)
        must(recv(pair[1], &byte, 1, MSG_DONTWAIT) == 1, "recv");
}

/* ---- the calls ---- */

static void call_getppid(int i)
{
    (void)i;
    syscall(SYS_getppid);
}

static void call_read(int i)
{
    char byte;
    (void)i;
    must(read(zero, &byte, 1) == 1, "read");
}

static void call_refused(int i)
{
    (void)i;
    must(syscall(SYS_bpf, -1, NULL, 0) < 0, "bpf");
}

static void call_connect(int i)
{
    (void)i;
    must(connect(udp, (struct sockaddr *)&address, sizeof address) == 0, "connect");
}

static void call_connect_stream(int i)
{
    must(connect(made[i], (struct sockaddr *)&address, sizeof address) == 0, "connect");
}

static void call_bind(int i)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    must(bind(made[i], (struct sockaddr *)&any, sizeof any) == 0, "bind");
}

static void call_sendto(int i)
{
    (void)i;
    must(sendto(udp, "x", 1, 0, (struct sockaddr *)&address, sizeof address) == 1, "sendto");
}

static void call_sendmsg(int i)
{
    struct iovec vector = {"x", 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
    (void)i;
    must(sendmsg(pair[0], &message, 0) == 1, "sendmsg");
}

static void call_fork_exec(int i)
{
    (void)i;
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        execl(self, self, "nothing", (char *)NULL);
        _exit(127);
    }
    end_child(child);
}

static void call_search(int i)
{
    (void)i;
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        setenv("PATH", searched, 1);
        execlp(strrchr(self, '/') + 1, self, "nothing", (char *)NULL);
        _exit(127);
    }
    end_child(child);
}

static void call_shell(int i)
{
    char loop[PATH_MAX + 100], count[16];
    if (i > 0)
        return; /* one shell makes the whole batch */
    snprintf(count, sizeof count, "%d", each);
    snprintf(loop, sizeof loop, "i=0; while [ $i -lt $1 ]; do %s nothing; i=$((i+1)); done", self);
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        execl("/bin/sh", "sh", "-c", loop, "sh", count, (char *)NULL);
        _exit(127);
    }
    end_child(child);
}

static const struct kind {
    const char *name;
    void (*before)(void), (*call)(int), (*after)(void);
} kinds[] = {
    {"getppid", nothing, call_getppid, nothing},
    {"read", nothing, call_read, nothing},
    {"refused", nothing, call_refused, nothing},
    {"connect", nothing, call_connect, nothing},
    {"tcp", make_streams, call_connect_stream, reset_streams},
    {"bind", make_datagram, call_bind, close_made},
    {"sendto", nothing, call_sendto, nothing},
    {"sendmsg", nothing, call_sendmsg, drain},
    {"exec", nothing, call_fork_exec, nothing},
    {"search", nothing, call_search, nothing},
    {"shell", nothing, call_shell, nothing},
};

static void prepare(void)
{
    const char *slash = strrchr(self, '/');
    socklen_t length = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    must((server = socket(AF_INET, SOCK_STREAM, 0)) >= 0, "socket");
    must(bind(server, (struct sockaddr *)&address, sizeof address) == 0 && listen(server, 1024) == 0, "listen");
    must(getsockname(server, (struct sockaddr *)&address, &length) == 0, "getsockname");
    /* The same port takes datagrams, which nobody reads: the kernel drops what does not fit. */
    int sink = socket(AF_INET, SOCK_DGRAM, 0);
    must(bind(sink, (struct sockaddr *)&address, sizeof address) == 0, "bind");
    must((udp = socket(AF_INET, SOCK_DGRAM, 0)) >= 0, "socket");
    must(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0, "socketpair");
    must((zero = open("/dev/zero", O_RDONLY)) >= 0, "/dev/zero");
    for (int i = 0; i < 9; i++) /* ten directories; it is in the last */
        snprintf(searched + strlen(searched), sizeof searched - strlen(searched), "/usr/share/nowhere%d:", i);
    must(slash && strlen(searched) + (size_t)(slash - self) < sizeof searched, "an absolute path");
    strncat(searched, self, (size_t)(slash - self));
}

static int compare(const void *one, const void *other)
{
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

static int measure(const struct kind *kind, int batches)
{
    static int64_t taken[MOST];
    must(batches > 0 && batches < MOST && each > 0 && (kind->before == nothing || each <= 1024), "numbers");
    for (int batch = -1; batch < batches; batch++) { /* the first only warms up */
        kind->before();
        int64_t started = now();
        for (int i = 0; i < each; i++)
            kind->call(i);
        int64_t ended = now();
        kind->after();
        if (batch >= 0)
            taken[batch] = ended - started;
    }
    qsort(taken, (size_t)batches, sizeof taken[0], compare);
    printf("%.1f\n", (double)taken[batches / 2] / each);
    return 0;
}

static int steadily(double seconds, useconds_t pause)
{
    static int64_t taken[MOST];
    int count = 0;
    int64_t end = now() + (int64_t)(seconds * 1e9);
    usleep((useconds_t)getpid() * 7919 % (pause + 1)); /* not all at the same moment */
    while (count < MOST) {
        int64_t started = now();
        if (started >= end)
            break;
        call_connect(0);
        taken[count++] = now() - started;
        usleep(pause);
    }
    for (int i = 0; i < count; i++)
        printf("%lld\n", (long long)taken[i]);
    return 0;
}

static int flood(double seconds)
{
    long count = 0;
    for (int64_t end = now() + (int64_t)(seconds * 1e9); now() < end; count++)
        call_connect(0);
    printf("%ld\n", count);
    return 0;
}

int main(int argc, char **argv)
{
    self = argv[0];
    if (argc == 2 && strcmp(argv[1], "nothing") == 0)
        return 0;
    prepare();
    if (argc == 4 && strcmp(argv[1], "steady") == 0)
        return steadily(atof(argv[2]), (useconds_t)atoi(argv[3]));
    if (argc == 3 && strcmp(argv[1], "flood") == 0)
        return flood(atof(argv[2]));
    for (size_t i = 0; argc == 4 && i < sizeof kinds / sizeof kinds[0]; i++)
        if (strcmp(argv[1], kinds[i].name) == 0) {
            each = atoi(argv[3]);
            return measure(&kinds[i], atoi(argv[2]));
        }
    fprintf(stderr, "usage: see the top of calls.c\n");
    return 2;
}
