#include "network.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef IPV6_FREEBIND
#define IPV6_FREEBIND 78 /* linux/in6.h, which does not go with netinet/in.h */
#endif

union address {
    struct sockaddr any;
    struct sockaddr_in four;
    struct sockaddr_in6 six;
};

static int close_failed(int fd)
{
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

int raise_loopback(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    struct ifreq request = {.ifr_flags = IFF_UP | IFF_RUNNING};
    strcpy(request.ifr_name, "lo");
    if (ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        return close_failed(fd);
    return close(fd);
}

/* Reads one datagram of acknowledgements: returns how many there are in it, 0 where there is none to read, or -1 with
 * errno. */
static int read_acknowledgements(int fd)
{
    union {
        struct nlmsghdr header;
        char bytes[8192];
    } buffer;
    int count = 0;

    ssize_t got = recv(fd, &buffer, sizeof buffer, MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0)
        return errno == EAGAIN ? 0 : -1;
    if ((size_t)got > sizeof buffer) {
        errno = EMSGSIZE;
        return -1;
    }
    ssize_t left = got;
    for (const struct nlmsghdr *at = &buffer.header; NLMSG_OK(at, left); at = NLMSG_NEXT(at, left)) {
        const struct nlmsgerr *answer = NLMSG_DATA(at);
        if (at->nlmsg_type != NLMSG_ERROR || at->nlmsg_len < NLMSG_LENGTH(sizeof *answer)) {
            errno = EPROTO;
            return -1;
        }
        if (answer->error != 0) {
            errno = -answer->error;
            return -1;
        }
        count++;
    }
    if (count == 0)
        errno = EPROTO;
    return count > 0 ? count : -1;
}

int send_netlink(const struct step *step)
{
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    uint64_t acknowledged = 0;
    int count, one = 1;

    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, (int)step->number[0]);
    if (fd < 0)
        return -1;
    /* Errors come without a copy of what was sent. */
    if (setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof one) < 0)
        return close_failed(fd);
    ssize_t sent = sendto(fd, step->bytes, step->length, 0, (struct sockaddr *)&kernel, sizeof kernel);
    if (sent >= 0 && (size_t)sent != step->length)
        errno = EPROTO;
    if (sent != (ssize_t)step->length)
        return close_failed(fd);
    /* The kernel answers before the call returns: what is not there now never comes. All of it is read, also an error
     * that comes after what was asked for. */
    while ((count = read_acknowledgements(fd)) > 0)
        acknowledged += (uint64_t)count;
    if (count == 0 && acknowledged != step->number[1]) {
        errno = EPROTO;
        count = -1;
    }
    if (count < 0)
        return close_failed(fd);
    return close(fd);
}

/* Returns a socket that does not block, bound by bind_address; `family` is the kernel's. */
static int open_socket(const struct step *step, int type, int *family)
{
    int one = 1;
    *family = step->number[0] == 4 ? AF_INET : AF_INET6;
    int fd = socket(*family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    /* Else [::] would take the place of 0.0.0.0, and addresses would come in two forms. */
    if (*family == AF_INET6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one) < 0)
        return close_failed(fd);
    return fd;
}

static int bind_address(int fd, const struct step *step)
{
    union address address = {0};
    in_port_t port = htons((uint16_t)step->number[1]);
    socklen_t length;
    int valid;

    if (step->number[0] == 4) {
        address.four.sin_family = AF_INET;
        address.four.sin_port = port;
        valid = inet_pton(AF_INET, step->text[0], &address.four.sin_addr);
        length = sizeof address.four;
    } else {
        address.six.sin6_family = AF_INET6;
        address.six.sin6_port = port;
        valid = inet_pton(AF_INET6, step->text[0], &address.six.sin6_addr);
        length = sizeof address.six;
    }
    if (valid != 1) {
        errno = EINVAL;
        return -1;
    }
    return bind(fd, &address.any, length);
}

int open_listener(const struct step *step)
{
    int family, one = 1;
    int fd = open_socket(step, SOCK_STREAM, &family);
    if (fd < 0)
        return -1;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0 || bind_address(fd, step) < 0 ||
        listen(fd, (int)step->number[2]) < 0)
        return close_failed(fd);
    return fd;
}

int open_datagram(const struct step *step)
{
    int family, one = 1;
    int fd = open_socket(step, SOCK_DGRAM, &family);
    if (fd < 0)
        return -1;
    int level = family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6;
    int told = family == AF_INET ? IP_PKTINFO : IPV6_RECVPKTINFO;
    int free_bind = family == AF_INET ? IP_FREEBIND : IPV6_FREEBIND;
    if (setsockopt(fd, level, told, &one, sizeof one) < 0 || setsockopt(fd, level, free_bind, &one, sizeof one) < 0 ||
        bind_address(fd, step) < 0)
        return close_failed(fd);
    return fd;
}
