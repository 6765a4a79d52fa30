"""Races against the emulation of the network calls: what was decided must be what is done (I5).

Each attacker makes 10,000 calls while a thread, or a process that shares its memory, changes what the call is about:
the address, the descriptor, what a path leads to. One of the two values is allowed and one denied. Whoever is at the
denied one must never see anything: the host, or a process of its own that only counts. That both outcomes occur shows
that there was a race.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from corral.actions import Action, Endpoint, Kind, Opinion, Transport, Verdict
from corral.errors import SandboxClosed
from corral.policy.part import PolicyPart
from corral.sandbox.core import State
from corral.sandbox.options import Listener
from tests.contain.attacks import PYTHON
from tests.contain.conftest import Compile, MakeBox

ROUNDS = int(os.environ.get("CORRAL_ROUNDS", "10000"))
"""Of each race. As root, and by itself; the pass as an ordinary user makes fewer (tests/as_user.sh)."""
ALLOWED, DENIED = 20_001, 20_002

ATTACKER = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile int stop;
static union { struct sockaddr_in in; struct sockaddr_un un; } target;
static socklen_t length;
static int is_unix, first = -1, second = -1, fd = -1;
static const char *mode, *operation;

static int is(const char *name) { return strcmp(operation, name) == 0; }
static int sends(const char *name) { return strcmp(is_unix ? operation + 5 : operation, name) == 0; } /* unix_NAME */

static void aim(int denied)
{
    if (is_unix)
        /* one byte, so that no mixture of the two is a third path */
        *(volatile char *)&target.un.sun_path[sizeof "/tmp/race-" - 1] = denied ? 'd' : 'a';
    else
        *(volatile in_port_t *)&target.in.sin_port = htons(denied ? DENIED : ALLOWED);
}

static int race(void *unused)
{
    for (unsigned i = 0; !stop; i++) {
        if (strcmp(mode, "descriptor") == 0)
            dup2(i & 1 ? second : first, fd);
        else if (strcmp(mode, "exchange") == 0)
            syscall(SYS_renameat2, AT_FDCWD, "/tmp/race", AT_FDCWD, "/tmp/other", 2);
        else if (strcmp(mode, "link") == 0) {
            unlink("/tmp/next");
            symlink(i & 1 ? "/tmp/race-d" : "/tmp/race-a", "/tmp/next");
            rename("/tmp/next", "/tmp/race");
        } else
            aim(i & 1);
    }
    return 0;
}

static void *race_thread(void *unused) { race(NULL); return NULL; }

static int make(int family, int type)
{
    int made = socket(family, type | SOCK_NONBLOCK, 0);
    if (made < 0)
        exit(3);
    return made;
}

/* Who is at the two places. */
static int place(int denied, int type)
{
    int made = make(is_unix ? AF_UNIX : AF_INET, type);
    aim(denied);
    if (bind(made, (struct sockaddr *)&target, length) < 0)
        exit(4);
    if (type == SOCK_STREAM && listen(made, 4096) < 0)
        exit(5);
    return made;
}

static int drain(int from, int type)
{
    char byte[64];
    int count = 0, peer;
    if (type == SOCK_STREAM)
        for (; (peer = accept(from, NULL, NULL)) >= 0; count++)
            close(peer);
    else
        for (; recv(from, byte, sizeof byte, MSG_DONTWAIT) >= 0; count++)
            ;
    return count;
}

static int done, refused, other, wrong, right;

static void tell(int rounds)
{
    printf("{\"rounds\": %d, \"done\": %d, \"refused\": %d, \"other\": %d, \"right\": %d, \"wrong\": %d}\n", rounds,
           done, refused, other, right, wrong);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    operation = argv[1];
    mode = argv[2];
    int rounds = atoi(argv[3]);
    is_unix = strncmp(operation, "unix", 4) == 0;
    int type = is("unix_connect") || is("tcp_connect") ? SOCK_STREAM : SOCK_DGRAM;
    int descriptor = strcmp(mode, "descriptor") == 0;

    memset(&target, 0, sizeof target);
    if (is_unix) {
        target.un.sun_family = AF_UNIX;
        strcpy(target.un.sun_path, "/tmp/race-a");
        length = sizeof target.un;
    } else {
        target.in.sin_family = AF_INET;
        target.in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        length = sizeof target.in;
    }
    int good = -1, is_bind = is("bind") || is("unix_bind");
    if (!is_bind)
        good = place(0, type); /* at the denied one is somebody else */
    if (strcmp(mode, "link") == 0 || strcmp(mode, "exchange") == 0) {
        symlink("/tmp/race-a", "/tmp/race");
        symlink("/tmp/race-d", "/tmp/other");
        strcpy(target.un.sun_path, is_bind ? "/tmp/race/s" : "/tmp/race");
    } else if (is("unix_bind"))
        strcpy(target.un.sun_path, "/tmp/race-a/s");

    /* For the race of descriptors: one that may, one that may not. */
    int pair[2] = {-1, -1};
    if (descriptor) {
        aim(1);
        second = make(is_unix ? AF_UNIX : AF_INET, type);
        if (is_unix && !is("unix_connect")) {
            socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
            first = pair[0];
        } else if (is("unix_connect"))
            first = make(AF_INET, SOCK_DGRAM);
        else if (is("bind") || is("connect")) {
            first = make(AF_INET, SOCK_STREAM);
            int server = make(AF_INET, SOCK_STREAM);
            if (is("connect") && (bind(server, (void *)&target, length) < 0 || listen(server, 4096) < 0))
                return 10;
        } else {
            /* a connected stream ignores addresses, so that nothing is decided for it */
            int server = make(AF_INET, SOCK_STREAM);
            struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
            socklen_t size = sizeof own;
            if (bind(server, (void *)&own, size) < 0 || listen(server, 1) < 0)
                return 6;
            getsockname(server, (void *)&own, &size);
            first = socket(AF_INET, SOCK_STREAM, 0);
            if (connect(first, (void *)&own, size) < 0)
                return 7;
            fcntl(first, F_SETFL, O_NONBLOCK);
            pair[1] = accept(server, NULL, NULL);
        }
        fd = dup(first);
    }

    static char stack[1 << 16];
    pthread_t thread;
    int peer = -1;
    if (strcmp(mode, "peer") == 0) {
        if ((peer = clone(race, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL)) < 0)
            return 8;
    } else if (pthread_create(&thread, NULL, race_thread, NULL))
        return 9;

    for (int i = 0; i < rounds; i++) {
        int result, used = fd;
        if (!descriptor && (used < 0 || !sends("sendto") && !sends("sendmsg") && !sends("sendmmsg")))
            used = fd = make(is_unix ? AF_UNIX : AF_INET, type);
        struct iovec vector = {"x", 1};
        struct mmsghdr message = {{.msg_name = &target, .msg_namelen = length, .msg_iov = &vector, .msg_iovlen = 1}};
        if (descriptor && is_unix)
            aim(i & 1); /* else nothing would be allowed */
        if (is_bind)
            result = bind(used, (struct sockaddr *)&target, length);
        else if (sends("sendto"))
            result = sendto(used, "x", 1, MSG_NOSIGNAL, (struct sockaddr *)&target, length);
        else if (sends("sendmsg"))
            result = sendmsg(used, &message.msg_hdr, MSG_NOSIGNAL);
        else if (sends("sendmmsg"))
            result = sendmmsg(used, &message, 1, MSG_NOSIGNAL);
        else {
            result = connect(used, (struct sockaddr *)&target, length);
            if (result < 0 && errno == EINPROGRESS)
                result = 0;
        }
        if (result >= 0)
            done++;
        else if (errno == EACCES)
            refused++;
        else
            other++;
        if (is("connect"))
            send(descriptor ? second : used, "x", 1, MSG_NOSIGNAL); /* says where it is connected to */
        if (is("bind")) {
            struct sockaddr_in own;
            socklen_t size = sizeof own;
            getsockname(descriptor ? second : used, (void *)&own, &size);
            wrong += ntohs(own.sin_port) == DENIED;
            right += descriptor || ntohs(own.sin_port) == ALLOWED;
        }
        if (is("unix_bind")) {
            if (i % 50 == 49)
                tell(i + 1);
            right += unlink("/tmp/race-a/s") == 0;
            wrong += unlink("/tmp/race-d/s") == 0;
        }
        if (!descriptor && (is_bind || type == SOCK_STREAM || is("connect"))) {
            struct linger now = {1, 0};
            setsockopt(used, SOL_SOCKET, SO_LINGER, &now, sizeof now);
            close(used);
            fd = -1;
        }
        if (descriptor && i % 64 == 0 && pair[1] >= 0) {
            static char sink[1 << 16];
            recv(pair[1], sink, sizeof sink, MSG_DONTWAIT);
        }
        if (descriptor && (is("bind") || is("connect")) && i % 16 == 15) {
            /* what is bound or connected once says nothing any more */
            int fresh = make(AF_INET, SOCK_STREAM);
            dup2(fresh, first);
            close(fresh);
        }
        if (good >= 0)
            right += drain(good, type);
    }
    stop = 1;
    if (peer > 0)
        waitpid(peer, NULL, 0);
    else
        pthread_join(thread, NULL);
    if (good >= 0)
        right += drain(good, type);
    tell(rounds);
    return 0;
}
"""

IP = ("connect", "tcp_connect", "bind", "sendto", "sendmsg", "sendmmsg")
UNIX = ("unix_connect", "unix_sendto", "unix_sendmsg")
CASES = [
    *((operation, mode) for operation in IP for mode in ("thread", "peer", "descriptor")),
    *((operation, mode) for operation in UNIX for mode in ("thread", "peer", "descriptor", "link")),
    ("unix_sendmmsg", "thread"),
]
CASES.remove(("tcp_connect", "descriptor"))
CASES.remove(("unix_sendmsg", "peer"))


@contextmanager
def arrivals(directory: str) -> Iterator[Callable[[], int]]:
    """Counts what is made in a directory of a sandbox, from outside (inotify(7), IN_CREATE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert fd >= 0 and libc.inotify_add_watch(fd, os.fsencode(directory), 0x100) >= 0

        def count() -> int:
            found = 0
            with suppress(BlockingIOError):
                while data := os.read(fd, 1 << 16):
                    at = 0
                    while at < len(data):
                        at += 16 + int.from_bytes(data[at + 12 : at + 16], "little")
                        found += 1
            return found

        yield count
    finally:
        os.close(fd)


# Takes what arrives at the denied place, until its input ends; then tells how much it was.
RECORDER = """
import select, socket, sys
kind = getattr(socket, sys.argv[1])
place = sys.argv[2]
here = socket.socket(socket.AF_INET if place.isdecimal() else socket.AF_UNIX, kind)
here.bind(("127.0.0.1", int(place)) if place.isdecimal() else place)
if kind == socket.SOCK_STREAM:
    here.listen(4096)
here.setblocking(False)
print("ready", flush=True)
arrived = ended = 0
while not ended:
    ended = sys.stdin in select.select([here, sys.stdin], [], [])[0]
    try:
        while True:
            here.accept() if kind == socket.SOCK_STREAM else here.recv(64)
            arrived += 1
    except BlockingIOError:
        pass
print(arrived)
"""


def _deny(monkeypatch: pytest.MonkeyPatch, operation: str, mode: str) -> None:
    """A policy finer than the language of policies has words for: it tells paths, ports and transports apart."""
    judge = PolicyPart.judge
    kinds = (Kind.NET_BIND,) if operation.endswith("bind") else (Kind.NET_CONNECT, Kind.NET_SEND)

    def narrow(self: PolicyPart, action: Action) -> Opinion:
        subject = action.subject
        if action.kind in kinds and isinstance(subject, Endpoint):
            is_udp = subject.transport is Transport.UDP
            if subject.path in ("/tmp/race-d", "/tmp/race-d/s") or (
                subject.port == DENIED and (is_udp or mode != "descriptor")
            ):
                return Opinion(Verdict.DENY, "test")
        return judge(self, action)

    monkeypatch.setattr(PolicyPart, "judge", narrow)


@pytest.mark.parametrize(("operation", "mode"), CASES)
async def test_what_was_decided_is_done(
    operation: str, mode: str, make_box: MakeBox, compile_c: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    _deny(monkeypatch, operation, mode)
    program = compile_c(ATTACKER, "race", f"-DALLOWED={ALLOWED}", f"-DDENIED={DENIED}")
    box = await make_box(listeners=(Listener(DENIED),) if operation == "tcp_connect" else ())
    recorder = None
    if operation not in ("bind", "tcp_connect"):
        kind = "SOCK_STREAM" if operation == "unix_connect" else "SOCK_DGRAM"
        place = "/tmp/race-d" if operation.startswith("unix") else str(DENIED)
        recorder = await box.start_process([PYTHON, "-c", RECORDER, kind, place])
        assert await recorder.stdout.readline() == b"ready\n"
    result = await box.exec([program, operation, mode, str(ROUNDS)], timeout=120)
    assert result.exit_code == 0, (result.exit_code, result.stderr[-500:])
    seen = json.loads(result.stdout)
    assert seen["wrong"] == 0, seen
    assert seen["refused"] > 0, seen  # else nothing was raced
    assert seen["done"] > 0 and (seen["right"] > 0 or mode == "descriptor"), seen
    if recorder is not None:
        recorder.close_stdin()
        assert await recorder.stdout.read() == b"0\n"
    if operation == "tcp_connect":  # read out by the host
        with socket.socket(fileno=os.dup(box.listeners[0])) as host, pytest.raises(BlockingIOError):
            host.setblocking(False)
            host.accept()


@pytest.mark.parametrize("mode", ["thread", "exchange"])
async def test_no_socket_is_made_where_it_was_refused(
    mode: str, make_box: MakeBox, compile_c: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bind(2) takes a path, not an object; what it has led to in that very moment is seen, and ends the sandbox."""
    _deny(monkeypatch, "unix_bind", mode)
    program = compile_c(ATTACKER, "race", f"-DALLOWED={ALLOWED}", f"-DDENIED={DENIED}")
    seen: Counter[str] = Counter()
    ends = 0
    while seen["rounds"] < ROUNDS:
        box = await make_box()
        await box.exec(["/bin/mkdir", "/tmp/race-a", "/tmp/race-d"], check=True)
        with arrivals(f"/proc/self/fd/{box.core.root_fd}/tmp/race-d") as count:
            process = await box.start_process([program, "unix_bind", mode, str(ROUNDS - seen["rounds"])])
            lines = (await process.stdout.read()).splitlines()
            with suppress(SandboxClosed):
                await process.wait()
            if box.state is State.RUNNING:
                assert count() == 0
            else:  # in the very moment, if at all
                assert "deputy" in box.core.end_reason and count() <= 1
                ends += 1
        seen.update(json.loads(lines[-1]) if lines else {"rounds": 1})
        await box.close()
    assert seen["wrong"] == 0, (seen, ends)
    assert seen["refused"] > 0 and seen["done"] > 0 and seen["right"] > 0
