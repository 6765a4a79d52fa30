/* The network steps of a plan, applied in the sandbox's own network namespace, which has nothing but a loopback. */
#ifndef CORRAL_NETWORK_H
#define CORRAL_NETWORK_H

#include "plan.h"

/* Each returns -1 with errno. */
int raise_loopback(void);

/* Sends the step's messages to the kernel. Fails with the kernel's error for the first message that it refuses, and
 * with EPROTO where it acknowledges fewer or more, or says anything else. */
int send_netlink(const struct step *step);

/* Returns a descriptor that listens, without blocking. */
int open_listener(const struct step *step);

/* Returns a UDP socket, without blocking: IP_PKTINFO or IPV6_PKTINFO comes with each datagram, and an answer may name
 * any address as its source (ip(7), IP_FREEBIND). */
int open_datagram(const struct step *step);

#endif
