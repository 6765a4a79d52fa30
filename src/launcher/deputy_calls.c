#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "deputy.h"
#include "deputy_move.h"
#include "deputy_tree.h"
#include "kernel.h"

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

#define CONNECT_PATIENCE_US 2000

/* Below the host's /proc: the magic link to an object is the object itself, whatever its names now are. /proc inside knows
 * nothing of this process. */
struct link_name {
    char text[32];
};

static struct link_name link_to(int fd)
{
    struct link_name name;
    snprintf(name.text, sizeof name.text, "self/fd/%d", fd);
    return name;
}

static int give(struct deputy_result *result, int fd)
{
    result->fd = fd;
    return fd < 0 ? -1 : 0;
}

/* The path of an object inside, as the kernel names it, or none: no object of a file system that can be seen from the
 * root, or one without a name any more. Fails where there is a path that cannot be told: what nobody can name, no rule
 * would know. */
static int find_path(int proc, int fd, struct deputy_result *result)
{
    static const char mark[] = " (deleted)";
    const size_t tail = sizeof mark - 1;
    struct stat wanted, found;
    if (fstat(fd, &wanted) < 0)
        return -1;
    ssize_t length = readlinkat(proc, link_to(fd).text, result->path, sizeof result->path);
    if (length < 0 && errno == ENAMETOOLONG) {
        result->value = wanted.st_nlink > 0;
        return wanted.st_nlink > 0 ? -1 : 0;
    }
    if (length <= 0)
        return -1;
    if ((size_t)length >= sizeof result->path || result->path[0] != '/')
        return 0;
    result->path[length] = '\0';
    /* What is deleted, and what has a name that says so, look the same. Where others name it still, or it has just been
     * moved, it keeps this one, by which it can be judged. */
    if (wanted.st_nlink == 0 && (size_t)length > tail && strcmp(result->path + length - tail, mark) == 0 &&
        (lstat(result->path, &found) < 0 || !same_file(&wanted, &found)))
        return 0;
    result->path_length = (uint32_t)length;
    return 0;
}

static int resolve(int proc, const struct deputy_message *message, const int *fds, unsigned count,
                   struct deputy_result *result)
{
    const struct deputy_request *request = &message->request;
    if (request->flags & ~(uint32_t)(O_NOFOLLOW | O_DIRECTORY)) {
        errno = EINVAL;
        return -1;
    }
    struct open_how how = {.flags = request->flags | O_PATH | O_CLOEXEC, .resolve = request->resolve};
    const char *path = message->path;
    struct link_name self;
    int start = count > 0 ? fds[0] : AT_FDCWD;
    if (path[0] == '\0') {
        self = link_to(start);
        path = self.text;
        start = proc;
        how.flags &= ~(uint64_t)O_NOFOLLOW; /* the magic link is the only one that is followed */
        how.resolve = 0;
    }
    if (give(result, sys_openat2(start, path, &how)) < 0)
        return -1;
    if (find_path(proc, result->fd, result) < 0) {
        int error = errno;
        close(result->fd);
        result->fd = -1;
        errno = error;
        return -1;
    }
    return 0;
}

static int open_object(int proc, const struct deputy_message *message, int object, bool patient, bool *waits,
                       struct deputy_result *result)
{
    const struct deputy_request *request = &message->request;
    /* O_NOFOLLOW would refuse the magic link; a symbolic link cannot be opened anyway (ELOOP). */
    int flags = ((int)request->flags & ~(O_NOFOLLOW | O_ASYNC)) | O_CLOEXEC | O_NOCTTY;
    struct stat stat;
    if (flags & O_CREAT) {
        errno = EINVAL;
        return -1;
    }
    if (fstat(object, &stat) < 0)
        return -1;
    bool may_wait = !(flags & (O_NONBLOCK | O_PATH));
    if (may_wait && !patient && S_ISFIFO(stat.st_mode) && (flags & O_ACCMODE) != O_RDWR) {
        *waits = true;
        return 0;
    }
    if (may_wait && !patient)
        flags |= O_NONBLOCK;
    int fd = openat(proc, link_to(object).text, flags, (mode_t)request->mode);
    if (fd < 0 && errno == EAGAIN && may_wait && !patient) { /* somebody holds a lease on it (fcntl(2)) */
        *waits = true;
        return 0;
    }
    if (fd >= 0 && may_wait && !patient) {
        int now = fcntl(fd, F_GETFL);
        if (now < 0 || fcntl(fd, F_SETFL, now & ~O_NONBLOCK) < 0) {
            int error = errno;
            close(fd);
            errno = error;
            return -1;
        }
    }
    return give(result, fd);
}

static int create(const struct deputy_message *message, int directory, struct deputy_result *result)
{
    int flags = (int)message->request.flags & ~O_ASYNC;
    if (flags & (O_PATH | O_DIRECTORY)) {
        errno = EINVAL;
        return -1;
    }
    flags |= O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | O_NOCTTY;
    return give(result, openat(directory, message->path, flags, (mode_t)message->request.mode));
}

static int make_node(const struct deputy_message *message, int directory)
{
    uint32_t type = message->request.flags;
    if (type != S_IFREG && type != S_IFIFO && type != S_IFSOCK) { /* a device node is a door to a driver */
        errno = EPERM;
        return -1;
    }
    return mknodat(directory, message->path, (mode_t)(type | message->request.mode), 0);
}

static int rename_entry(const struct deputy_message *message, const int *fds, bool patient, bool *waits,
                        struct deputy_result *result)
{
    int done = (int)syscall(SYS_renameat2, fds[0], message->path, fds[1], message->second, message->request.flags);
    if (done == 0 || errno != EXDEV)
        return done;
    if (!deputy_may_move(message, fds)) {
        errno = EXDEV;
        return -1;
    }
    if (patient)
        return deputy_move(message, fds, result);
    *waits = true;
    return 0;
}

/* ---- sockets ---- */

static int check_family(int fd)
{
    int domain;
    socklen_t length = sizeof domain;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) < 0)
        return -1;
    errno = EAFNOSUPPORT;
    return domain == AF_UNIX ? 0 : -1;
}

/* An abstract name means something only in the socket's network namespace, and a socket may have come from the host. */
static int check_network(int fd)
{
    uint64_t theirs, ours;
    socklen_t length = sizeof theirs;
    if (getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &theirs, &length) < 0)
        return -1;
    int own = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (own < 0)
        return -1;
    length = sizeof ours;
    int result = getsockopt(own, SOL_SOCKET, SO_NETNS_COOKIE, &ours, &length);
    int error = errno;
    close(own);
    errno = result < 0 ? error : EPERM;
    return result == 0 && theirs == ours ? 0 : -1;
}

/* The address of an object: as a path from the host's /proc, which becomes the working directory. */
static int object_address(int proc, int object, struct sockaddr_un *address, socklen_t *length)
{
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    strcpy(address->sun_path, link_to(object).text);
    *length = sizeof *address;
    return fchdir(proc);
}

/* The address that came with the message; only the abstract ones are looked up in a network. */
static int given_address(const struct deputy_message *message, int fd, struct sockaddr_un *address, socklen_t *length)
{
    memset(address, 0, sizeof *address);
    memcpy(address, message->address, message->request.address_length);
    *length = (socklen_t)message->request.address_length;
    return address->sun_family == AF_UNIX ? check_network(fd) : 0;
}

static int try_connect(int fd, const struct sockaddr_un *address, socklen_t length, bool patient, bool *waits)
{
    const struct itimerval soon = {{0, CONNECT_PATIENCE_US}, {0, CONNECT_PATIENCE_US}}, never = {{0, 0}, {0, 0}};
    if (patient)
        return connect(fd, (const struct sockaddr *)address, length);
    /* A listener with a full queue keeps the caller waiting. O_NONBLOCK would be seen by whoever shares the socket, so an
     * alarm it is: connect(2) to a Unix socket has done nothing when it is interrupted. */
    if (setitimer(ITIMER_REAL, &soon, NULL) < 0)
        return -1;
    int result = connect(fd, (const struct sockaddr *)address, length);
    int error = errno;
    if (setitimer(ITIMER_REAL, &never, NULL) < 0)
        abort();
    *waits = result < 0 && error == EINTR;
    errno = error;
    return *waits ? 0 : result;
}

static int connect_socket(int proc, const struct deputy_message *message, const int *fds, unsigned count, bool patient,
                          bool *waits)
{
    struct sockaddr_un address;
    socklen_t length;
    if (check_family(fds[0]) < 0)
        return -1;
    if ((count == 2 ? object_address(proc, fds[1], &address, &length)
                    : given_address(message, fds[0], &address, &length)) < 0)
        return -1;
    return try_connect(fds[0], &address, length, patient, waits);
}

/* Where the address as it was given leads now. */
static int leads_to(const struct deputy_message *message, int directory)
{
    char path[DEPUTY_MAX_ADDRESS + 1];
    struct stat wanted, found;
    snprintf(path, sizeof path, "%s", (const char *)message->address + sizeof(sa_family_t));
    char *slash = strrchr(path, '/');
    if (!slash || strcmp(slash + 1, message->path) != 0) {
        errno = ESTALE;
        return -1;
    }
    slash[1] = '\0';
    if (stat(path, &found) < 0 || fstat(directory, &wanted) < 0)
        return -1;
    errno = ESTALE;
    return same_file(&wanted, &found) ? 0 : -1;
}

static int bind_path(const struct deputy_message *message, const int *fds, unsigned count, struct deputy_result *result)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *given = (const char *)message->address + sizeof(sa_family_t);
    bool as_given = message->request.address_length != 0 && strcmp(given, message->path) != 0;
    socklen_t length = sizeof address.sun_family;

    if (fchdir(as_given && count == 3 ? fds[2] : fds[1]) < 0)
        return -1;
    if (message->request.address_length != 0) { /* byte for byte: getsockname(2) gives it back */
        memcpy(&address, message->address, message->request.address_length);
        length = (socklen_t)message->request.address_length;
    } else if (strlen(message->path) < sizeof address.sun_path) {
        strcpy(address.sun_path, message->path);
        length += (socklen_t)strlen(message->path) + 1;
    } else {
        errno = ENAMETOOLONG;
        return -1;
    }
    if (as_given && leads_to(message, fds[1]) < 0)
        return -1;
    if (bind(fds[0], (const struct sockaddr *)&address, length) < 0)
        return -1;
    /* The address may have led elsewhere meanwhile. The supervisor can see what the socket is bound to (SIOCUNIXFILE), and
     * compares: nothing to show is a difference too. */
    if (as_given)
        result->fd = openat(fds[1], message->path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    return 0;
}

static int bind_socket(const struct deputy_message *message, const int *fds, unsigned count,
                       struct deputy_result *result)
{
    struct sockaddr_un address;
    socklen_t length;
    if (check_family(fds[0]) < 0)
        return -1;
    if (count > 1)
        return bind_path(message, fds, count, result);
    if (given_address(message, fds[0], &address, &length) < 0)
        return -1;
    return bind(fds[0], (const struct sockaddr *)&address, length);
}

/* What did not fit into the message: a copy, so that nothing else can change it meanwhile. */
static int read_apart(int fd, void **data, size_t *length)
{
    struct stat stat;
    if (fstat(fd, &stat) < 0)
        return -1;
    if (!S_ISREG(stat.st_mode) || stat.st_size < 0 || stat.st_size > DEPUTY_MAX_APART) {
        errno = EINVAL;
        return -1;
    }
    *length = (size_t)stat.st_size;
    *data = malloc(*length ? *length : 1);
    if (!*data)
        return -1;
    ssize_t got = pread(fd, *data, *length, 0);
    if (got >= 0 && (size_t)got != *length)
        errno = EIO;
    return got >= 0 && (size_t)got == *length ? 0 : -1;
}

static int send_socket(int proc, const struct deputy_message *message, const int *fds, unsigned count,
                       struct deputy_result *result)
{
    static union {
        char space[CMSG_SPACE(sizeof(int) * DEPUTY_MAX_FDS)];
        struct cmsghdr align;
    } control;
    const struct deputy_request *request = &message->request;
    struct sockaddr_un address;
    socklen_t address_length = 0;
    void *apart = NULL;
    unsigned next = 1;

    if (request->flags & ~(uint32_t)(MSG_OOB | MSG_EOR | MSG_MORE | MSG_DONTWAIT | MSG_NOSIGNAL)) {
        errno = EINVAL;
        return -1;
    }
    if (check_family(fds[0]) < 0)
        return -1;
    if (request->options & DEPUTY_TO_OBJECT) {
        if (object_address(proc, fds[next++], &address, &address_length) < 0)
            return -1;
    } else if (request->address_length && given_address(message, fds[0], &address, &address_length) < 0)
        return -1;

    struct iovec iov = {.iov_base = (void *)(uintptr_t)message->data, .iov_len = request->data_length};
    if (request->options & DEPUTY_APART && read_apart(fds[next++], &apart, &iov.iov_len) < 0) {
        int error = errno;
        free(apart);
        errno = error;
        return -1;
    }
    if (apart)
        iov.iov_base = apart;
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
    if (address_length) {
        header.msg_name = &address;
        header.msg_namelen = address_length;
    }
    if (count > next) {
        size_t size = sizeof(int) * (count - next);
        memset(&control, 0, sizeof control);
        header.msg_control = control.space;
        header.msg_controllen = CMSG_SPACE(size);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(size);
        memcpy(CMSG_DATA(rights), fds + next, size);
    }
    ssize_t sent = sendmsg(fds[0], &header, (int)request->flags | MSG_DONTWAIT | MSG_NOSIGNAL);
    int error = errno;
    free(apart);
    errno = error;
    if (sent < 0)
        return -1;
    result->value = (uint32_t)sent;
    return 0;
}

/* ---- all ---- */

static int call(int proc, const struct deputy_message *message, const int *fds, unsigned count, bool patient,
                bool *waits, struct deputy_result *result)
{
    const struct deputy_request *request = &message->request;
    switch (request->operation) {
    case DEPUTY_RESOLVE:
        return resolve(proc, message, fds, count, result);
    case DEPUTY_OPEN:
        return open_object(proc, message, fds[0], patient, waits, result);
    case DEPUTY_CREATE:
        return create(message, fds[0], result);
    case DEPUTY_RENAME:
        return rename_entry(message, fds, patient, waits, result);
    case DEPUTY_LINK:
        return linkat(proc, link_to(fds[0]).text, fds[1], message->path, AT_SYMLINK_FOLLOW);
    case DEPUTY_SYMLINK:
        return symlinkat(message->second, fds[0], message->path);
    case DEPUTY_UNLINK:
        return unlinkat(fds[0], message->path, (int)request->flags);
    case DEPUTY_CHMOD:
        return fchmodat(proc, link_to(fds[0]).text, (mode_t)request->mode, 0);
    case DEPUTY_CONNECT:
        return connect_socket(proc, message, fds, count, patient, waits);
    case DEPUTY_BIND:
        return bind_socket(message, fds, count, result);
    case DEPUTY_SEND:
        return send_socket(proc, message, fds, count, result);
    case DEPUTY_MAKE:
        return make_node(message, fds[0]);
    case DEPUTY_LISTEN:
        return check_family(fds[0]) < 0 ? -1 : listen(fds[0], (int)request->flags);
    }
    errno = EINVAL;
    return -1;
}

bool deputy_do(int proc, const struct deputy_message *message, const int *fds, unsigned count, bool patient,
               struct deputy_result *result)
{
    bool waits = false;
    result->error = 0;
    result->value = 0;
    result->fd = -1;
    result->path_length = 0;
    umask((mode_t)message->request.umask);
    if (call(proc, message, fds, count, patient, &waits, result) < 0)
        result->error = errno;
    if (chdir("/") < 0 && fchdir(proc) < 0) /* nowhere of the agent's: that would keep the place from being unmounted */
        abort();
    return waits;
}
