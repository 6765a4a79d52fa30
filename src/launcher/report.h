/* Sending and receiving on the control socket. Sends never block: the controller's receive queue is its own affair,
 * and a full one means a controller that no longer listens. */
#ifndef CORRAL_REPORT_H
#define CORRAL_REPORT_H

#include <stdbool.h>

#include "protocol.h"

#define MESSAGE_MAX_FDS 250

/* Sends one message with descriptors. Without any it is a plain send(): sendmsg() is a call that the filter notifies, and
 * the first process and the leader of an exec report under it, when nobody may be there to answer. 0, or -1 with errno. */
int send_message(int socket, const void *message, unsigned size, const int *fds, unsigned count);

/* The same for one report. */
int send_report(int socket, const struct report *report, const int *fds, unsigned count);

/* The same without descriptors, but waits while the controller does not keep up. */
int send_report_patiently(int socket, const struct report *report);

/* "The walls cannot be built": names the step, what it was about, and errno as it was on entry. */
void report_failure(int socket, const char *step, const char *detail);

/* Receives one message of exactly `size` bytes and at most `limit` descriptors, all close-on-exec.
 * Returns 1 for a message, 0 for end of stream, -1 for anything else (then no descriptor stays open); errno EMFILE says
 * that the message itself is whole, but there were too many descriptors, for `limit` or for this process. */
int receive_message(int socket, void *message, unsigned size, int *fds, unsigned limit, unsigned *count);

/* Maps a sealed memfd whole and read-only; refuses one that could still change or shrink (a reader would be killed
 * by SIGBUS). Returns NULL with errno. */
const void *map_sealed(int fd, unsigned limit, unsigned long *length);

#endif
