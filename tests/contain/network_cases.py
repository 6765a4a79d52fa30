"""Runs many uses of the network calls and prints what came of each: the same inside a sandbox as outside."""

import array
import asyncio
import ctypes
import errno
import multiprocessing
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
V4 = "127.0.0.1"


def name(code):
    return errno.errorcode.get(code, str(code))


def attempt(function, *arguments):
    """The result, or the errno's name."""
    try:
        return function(*arguments)
    except TimeoutError as error:
        return name(error.errno) if error.errno else "timed out"
    except OSError as error:
        return name(error.errno)


def raw(function, *arguments):
    """A call of libc: its value, or the errno's name."""
    ctypes.set_errno(0)
    value = getattr(libc, function)(*arguments)
    return name(ctypes.get_errno()) if value < 0 else value


def pair(kind=socket.SOCK_STREAM, family=socket.AF_INET, address=(V4, 0)):
    """A listener, or a receiver, and its address."""
    sock = socket.socket(family, kind)
    sock.bind(address)
    if kind != socket.SOCK_DGRAM:
        sock.listen(8)
    return sock, sock.getsockname()


def closed_port(kind=socket.SOCK_STREAM, family=socket.AF_INET, host=V4):
    with socket.socket(family, kind) as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]


def full_listener(kind=socket.SOCK_STREAM):
    """A Unix listener whose queue is full, with those that fill it."""
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind("")
    listener.listen(0)
    filled = []
    while True:
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.setblocking(False)
        if attempt(sock.connect, listener.getsockname()) == "EAGAIN":
            return listener, filled
        filled.append(sock)


def sockaddr(port, address=bytes((127, 0, 0, 1)), family=socket.AF_INET, tail=bytes(8)):
    return family.to_bytes(2, "little") + port.to_bytes(2, "big") + address + tail


class Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Mmsghdr(ctypes.Structure):
    _fields_ = (("header", Msghdr), ("length", ctypes.c_uint))


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


KEPT = []


def header(data, address=b""):
    buffer, place = ctypes.create_string_buffer(data, len(data)), ctypes.create_string_buffer(address, len(address))
    vector = Iovec(ctypes.addressof(buffer), len(data))
    KEPT.extend([buffer, place, vector])
    return Msghdr(ctypes.addressof(place) if address else None, len(address), ctypes.addressof(vector), 1, None, 0, 0)


class Alarm:
    """SIGALRM in a moment, with a handler."""

    def __init__(self, restart=False, after=0.15):
        self.restart, self.after, self.seen = restart, after, 0

    def __enter__(self):
        def seen(*_):
            self.seen += 1

        signal.signal(signal.SIGALRM, seen)
        signal.siginterrupt(signal.SIGALRM, not self.restart)
        signal.setitimer(signal.ITIMER_REAL, self.after)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


# ---- connect ----


def tcp_connects():
    listener, address = pair()
    client = socket.socket()
    yield attempt(client.connect, address), client.getpeername() == address
    server, peer = listener.accept()
    yield peer == client.getsockname(), attempt(client.connect, address)
    yield attempt(client.send, b"one"), server.recv(10), attempt(server.sendmsg, [b"t", b"wo"]), client.recv(10)
    yield attempt(socket.socket().connect, (V4, closed_port()))
    client = socket.socket()
    yield attempt(client.connect, ("0.0.0.0", address[1])), client.getpeername() == address
    client = socket.socket()
    client.bind((V4, 0))
    own = client.getsockname()
    yield attempt(client.connect, address), client.getsockname() == own


def tcp_without_blocking():
    _listener, address = pair()
    client = socket.socket()
    client.setblocking(False)
    first = client.connect_ex(address)
    yield first in (0, errno.EINPROGRESS), [bool(each) for each in select.select([], [client], [], 5)]
    yield client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), client.connect_ex(address) in (0, errno.EISCONN)
    yield name(client.connect_ex(address)), client.getblocking()
    client = socket.socket()
    client.setblocking(False)
    first = client.connect_ex((V4, closed_port()))
    select.select([], [client], [], 5)
    later = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or first
    yield name(later)


def tcp_that_hangs():
    # The queue of a listener that accepts nobody is full, and further connections hang in it.
    listener = socket.socket()
    listener.bind((V4, 0))
    listener.listen(0)
    address = listener.getsockname()
    waiting = []
    for _ in range(16):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(address)
        waiting.append(sock)
    time.sleep(0.1)
    hanging = next(sock for sock in reversed(waiting) if not select.select([], [sock], [], 0)[1])
    yield name(hanging.connect_ex(address)), raw("listen", hanging.fileno(), 1)
    hanging.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 200000))
    hanging.setblocking(True)
    packed = sockaddr(address[1])
    yield raw("connect", hanging.fileno(), packed, 16)
    fresh = socket.socket()
    fresh.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 200000))
    yield raw("connect", fresh.fileno(), packed, 16), raw("connect", fresh.fileno(), packed, 16)
    fresh = socket.socket()
    with Alarm() as alarm:
        yield raw("connect", fresh.fileno(), packed, 16), alarm.seen
    fresh.setblocking(False)
    yield raw("connect", fresh.fileno(), packed, 16)
    fresh = socket.socket()
    with Alarm(restart=True):
        threading.Timer(0.5, listener.close).start()  # resets all; the call is made again, and ends by that
        yield raw("connect", fresh.fileno(), packed, 16) in ("ECONNREFUSED", "ECONNRESET", "EINTR")
    for sock in waiting:
        sock.close()


def ipv6():
    listener = socket.socket(socket.AF_INET6)
    yield attempt(listener.bind, ("::1", 0)), attempt(listener.listen, 1)
    port = listener.getsockname()[1]
    for host in ("::1", "::"):
        client = socket.socket(socket.AF_INET6)
        yield attempt(client.connect, (host, port)), client.getpeername()[0]
    yield attempt(socket.socket(socket.AF_INET6).connect, ("::ffff:127.0.0.1", port))
    yield attempt(socket.socket(socket.AF_INET6).connect, (V4, port)), attempt(socket.socket().connect, (V4, port))
    both, address = pair(family=socket.AF_INET6, address=("::", 0))
    for host in ("::ffff:127.0.0.1", "::ffff:0.0.0.0", "::1"):
        client = socket.socket(socket.AF_INET6)
        yield attempt(client.connect, (host, address[1])), client.getpeername()[0], both.accept()[1][0]
    mapped = socket.socket(socket.AF_INET6)
    mapped.bind(("::ffff:0.0.0.0", 0))
    yield attempt(mapped.connect, ("::", address[1])), mapped.getpeername()[0]
    receiver, address = pair(socket.SOCK_DGRAM, socket.AF_INET6, ("::1", 0))
    sender = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    yield attempt(sender.sendto, b"x", ("::1", address[1])), receiver.recv(10)
    yield attempt(sender.sendto, b"y", ("::", address[1])), receiver.recv(10)
    yield attempt(sender.sendmsg, [b"z"], [(41, 67, struct.pack("i", 4))], 0, address), receiver.recv(10)


def udp():
    receiver, address = pair(socket.SOCK_DGRAM)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    yield attempt(sender.send, b"x"), attempt(sender.sendmsg, [b"x"])
    yield attempt(sender.sendto, b"one", address), receiver.recvfrom(10)[0]
    yield attempt(sender.sendto, b"any", ("0.0.0.0", address[1])), receiver.recv(10)
    yield attempt(sender.sendmsg, [b"t", b"wo"], [], 0, address), receiver.recv(10)
    yield attempt(sender.sendto, b"", address), receiver.recv(10)
    yield attempt(sender.sendto, b"x", (V4, 0)), attempt(sender.sendto, bytes(70000), address)
    yield attempt(sender.sendto, b"x", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, address), receiver.recv(10)
    yield attempt(sender.connect, address), sender.getpeername() == address
    yield attempt(sender.send, b"3"), attempt(sender.sendmsg, [b"4"]), receiver.recv(10), receiver.recv(10)
    other, elsewhere = pair(socket.SOCK_DGRAM)
    yield attempt(sender.sendto, b"past the peer", elsewhere), other.recv(20)
    yield raw("connect", sender.fileno(), bytes(16), 16), attempt(sender.getpeername), attempt(sender.send, b"x")
    yield attempt(sender.connect, (V4, closed_port(socket.SOCK_DGRAM))), attempt(sender.sendmsg, [b"x"])
    time.sleep(0.05)
    yield attempt(sender.sendmsg, [b"x"])
    yield attempt(sender.sendmsg, [b"a", b"bc"], [(0, 2, struct.pack("i", 9)), (0, 1, struct.pack("i", 8))], 0, address)
    yield receiver.recv(10), attempt(sender.sendmsg, [b"x" * 20], [(17, 103, struct.pack("H", 8))], 0, address)
    yield [receiver.recv(100) for _ in range(3)]
    unspecified = sockaddr(address[1], family=0)
    yield raw("sendto", sender.fileno(), b"unspec", 6, 0, unspecified, 16), receiver.recv(10)
    yield attempt(sender.sendmsg, [b"x"], [(0, 8, struct.pack("iII", 0, 0x0100007F, 0))], 0, address), receiver.recv(9)


# ---- wrong arguments ----


def wrong_arguments():
    port = closed_port()
    good = sockaddr(port)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        sock = socket.socket(socket.AF_INET, kind)
        fd = sock.fileno()
        yield "connect", [raw("connect", fd, good, length) for length in (-1, 0, 1, 2, 8, 15, 129, 1000000)]
        yield "bind", [raw("bind", fd, good, length) for length in (-1, 0, 1, 2, 8, 15, 129)]
        for function in ("connect", "bind"):
            yield function, raw(function, fd, ctypes.c_void_p(1), 16), raw(function, fd, None, 16)
            yield function, raw(function, -1, good, 16), raw(function, 9999, good, 16), raw(function, 0, good, 16)
            yield function, raw(function, fd, sockaddr(port, family=99), 16)
            yield function, raw(function, fd, sockaddr(port, family=socket.AF_INET6, tail=bytes(20)), 28)
        yield "kept", raw("bind", fd, sockaddr(0), 16), raw("bind", fd, sockaddr(0), 16)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fd = sock.fileno()
    for length in (-1, 0, 1, 8, 15, 129):
        yield "sendto", length, raw("sendto", fd, b"x", 1, 0, good, length)
    yield (
        "sendto",
        raw("sendto", fd, ctypes.c_void_p(1), 1, 0, good, 16),
        raw("sendto", fd, b"x", 1, 0, ctypes.c_void_p(1), 16),
    )
    yield "sendto", raw("sendto", -1, b"x", 1, 0, good, 16), raw("sendto", 0, b"x", 1, 0, good, 16)
    yield "sendto", raw("sendto", fd, b"x", 1, 0, sockaddr(port, family=99), 16)
    yield "sendmsg", raw("sendmsg", fd, None, 0), raw("sendmsg", fd, ctypes.c_void_p(1), 0), raw("sendmsg", -1, None, 0)
    for change in (
        {"iov": None},
        {"iov": 1},
        {"iovlen": 1025},
        {"namelen": 0},
        {"namelen": 0xFFFFFFFF},
        {"namelen": 8},
        {"name": 1},
        {"name": None},
        {"control": 1, "controllen": 20},
        {"control": None, "controllen": 1 << 40},
        {"iovlen": 0},
    ):
        message = header(b"data", good)
        for field, value in change.items():
            setattr(message, field, value)
        yield "sendmsg", sorted(change.items(), key=str), raw("sendmsg", fd, ctypes.byref(message), 0)
    message = header(b"data", good)
    broken = ctypes.create_string_buffer(struct.pack("<Qii", 4, 1, 1))
    message.control, message.controllen = ctypes.addressof(broken), 16
    yield "control", raw("sendmsg", fd, ctypes.byref(message), 0)
    negative = Iovec(ctypes.addressof(broken), 1 << 63)
    message = header(b"data", good)
    message.iov = ctypes.addressof(negative)
    yield "vector", raw("sendmsg", fd, ctypes.byref(message), 0)
    tcp = socket.socket()
    yield "listen", raw("listen", -1, 1), raw("listen", 0, 1), raw("listen", fd, 1), raw("listen", tcp.fileno(), -1)
    yield "listen", tcp.getsockname()[0], raw("listen", tcp.fileno(), 5), raw("connect", tcp.fileno(), good, 16)
    yield "in use", attempt(socket.socket().bind, tcp.getsockname()), attempt(socket.socket().bind, ("192.0.2.1", 0))
    path = os.open("/", os.O_PATH)
    yield "path", raw("connect", path, good, 16), raw("listen", path, 1)
    yield "unconnected", attempt(socket.socket().sendmsg, [b"x"]), attempt(socket.socket().sendto, b"x", (V4, port))
    message = header(b"x")
    yield "compat", raw("sendmsg", fd, ctypes.byref(message), ctypes.c_int(-(1 << 31)))


# ---- streams ----


def stream(family):
    listener, address = pair(family=family, address=(V4, 0) if family == socket.AF_INET else "")
    client = socket.socket(family)
    client.connect(address)
    server, _ = listener.accept()
    data = os.urandom(5_000_000)
    got = bytearray()

    def read():
        while len(got) < len(data):
            got.extend(server.recv(1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    yield "large", client.sendmsg([data[:1000], data[1000:3_000_000], b"", data[3_000_000:]])
    reader.join(20)
    yield "whole", bytes(got) == data
    client.setblocking(False)
    total = quiet = 0
    while quiet < 8:  # buffers grow for a while
        if isinstance(sent := attempt(client.sendmsg, [bytes(100_000)]), int):
            total, quiet = total + sent, 0
        else:
            quiet += 1
            time.sleep(0.1)
    yield "full", sent, total > 0
    yield "still", attempt(client.sendmsg, [b"x"], [], socket.MSG_DONTWAIT)
    client.setblocking(True)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 150000))
    yield "time", attempt(client.sendmsg, [b"x" * 100000])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    with Alarm() as alarm:
        message = header(bytes(100000))
        yield "interrupted", raw("sendmsg", client.fileno(), ctypes.byref(message), 0), alarm.seen
    drain = threading.Timer(0.2, lambda: [attempt(server.recv, 1 << 20, socket.MSG_DONTWAIT) for _ in range(40)])
    drain.start()
    yield "waits", attempt(client.sendmsg, [b"x" * 1000])
    drain.join()
    # After the other end is gone.
    server.close()
    time.sleep(0.3)
    attempt(client.send, b"x")
    attempt(client.send, b"x")
    yield "gone", attempt(client.sendmsg, [b"x"]), attempt(client.sendmsg, [b"x"], [], socket.MSG_NOSIGNAL)


def streams():
    for family in (socket.AF_INET, socket.AF_UNIX):
        yield from stream(family)
    left, right = socket.socketpair()
    yield left.send(b"x", socket.MSG_DONTWAIT), attempt(left.sendto, b"x", b"\0name"), right.recv(10)
    yield attempt(left.sendmsg, [b"u", b"v"]), right.recv(10)
    message = header(bytes(10))
    vectors = (Iovec * 2)(Iovec(message.iov and Iovec.from_address(message.iov).base, 10), Iovec(1, 10))
    message.iov, message.iovlen = ctypes.addressof(vectors), 2
    yield "half there", raw("sendmsg", left.fileno(), ctypes.byref(message), 0)


def broken_pipes():
    script = """
import signal, socket, sys
signal.signal(signal.SIGPIPE, getattr(signal, sys.argv[1]))
left, right = socket.socketpair(socket.AF_UNIX, getattr(socket, sys.argv[2]))
right.close()
flags = socket.MSG_NOSIGNAL if sys.argv[3] == "quiet" else 0
try:
    left.sendmsg([b"x"], [], flags)
except OSError as error:
    print(type(error).__name__)
"""
    for action in ("SIG_DFL", "SIG_IGN"):
        for kind in ("SOCK_STREAM", "SOCK_SEQPACKET", "SOCK_DGRAM"):
            for flags in ("quiet", "loud"):
                command = [sys.executable, "-c", script, action, kind, flags]
                done = subprocess.run(command, capture_output=True, timeout=20)
                yield action, kind, flags, done.returncode, done.stdout


def many():
    receiver, address = pair(socket.SOCK_DGRAM)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    packed = sockaddr(address[1])
    messages = (Mmsghdr * 200)(*(Mmsghdr(header(b"%d" % i, packed), 77) for i in range(200)))
    yield raw("sendmmsg", sender.fileno(), messages, 100, 0), [m.length for m in messages[98:102]]
    yield [receiver.recv(10) for _ in range(100)] == [b"%d" % i for i in range(100)]
    messages[3].header.name, messages[3].header.namelen = 1, 16
    yield raw("sendmmsg", sender.fileno(), messages, 10, 0), [m.length for m in messages[:5]]
    yield (
        raw("sendmmsg", sender.fileno(), ctypes.byref(messages[3]), 2, 0),
        raw("sendmmsg", sender.fileno(), messages, 0, 0),
    )
    yield [receiver.recv(10) for _ in range(3)], raw("sendmmsg", sender.fileno(), ctypes.c_void_p(1), 2, 0)
    yield raw("sendmmsg", -1, messages, 1, 0), raw("sendmmsg", 0, messages, 1, 0)
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    messages = (Mmsghdr * 3)(*(Mmsghdr(header(b"u%d" % i), 77) for i in range(3)))
    yield raw("sendmmsg", left.fileno(), messages, 3, 0), [right.recv(10) for _ in range(3)]


# ---- Unix sockets ----


def unix_names():
    os.mkdir("sub")
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        for place in ("absolute", "relative", "./sub/../dots", "\0abstract", "\0with\0zeros\xff"):
            place = f"{place}{kind}"
            place = os.path.abspath(place) if place.startswith("absolute") else place
            sock = socket.socket(socket.AF_UNIX, kind)
            yield kind, attempt(sock.bind, place), attempt(sock.bind, place)
            if not place.startswith("\0"):
                yield oct(os.lstat(place).st_mode), os.lstat(place).st_uid == os.getuid()
            yield attempt(sock.getsockname) if "absolute" not in place else sock.getsockname() == place
            yield attempt(socket.socket(socket.AF_UNIX, kind).bind, place)
            client = socket.socket(socket.AF_UNIX, kind)
            if kind == socket.SOCK_DGRAM:
                yield attempt(client.sendto, b"x", place), sock.recv(10)
            else:
                yield attempt(client.connect, place), attempt(sock.listen, 1)
            client.close()
            client = socket.socket(socket.AF_UNIX, kind)
            yield attempt(client.connect, place), attempt(client.sendmsg, [b"y"])
            yield client.getpeername() == sock.getsockname(), client.getsockname()
            if kind != socket.SOCK_DGRAM:
                server, peer = sock.accept()
                yield peer, server.recv(10)
                for end in (server, client):
                    uid, gid = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1:]
                    yield uid == os.getuid(), gid == os.getgid()
            if not place.startswith("\0"):
                os.unlink(place)
                yield attempt(socket.socket(socket.AF_UNIX, kind).connect, place)
    listener = socket.socket(socket.AF_UNIX)
    yield attempt(listener.bind, ""), len(listener.getsockname()), attempt(listener.listen, 1)
    yield attempt(socket.socket(socket.AF_UNIX).connect, listener.getsockname())
    for packed in (b"\1\0" + b"y" * 108, b"\1\0short\0and more", b"\1\0open-ended"):
        sock, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        yield raw("bind", sock.fileno(), packed, len(packed)), sorted(os.listdir()), attempt(sock.listen, 1)
        yield raw("connect", client.fileno(), packed, len(packed)), client.getpeername()


def unix_errors():
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        sock = socket.socket(socket.AF_UNIX, kind)
        yield [attempt(sock.connect, path) for path in ("absent", "absent/x", "/etc/passwd/x", "\0absent", "")]
        open("plain", "w").close()
        yield attempt(sock.connect, "plain"), attempt(sock.bind, "plain"), attempt(sock.bind, "absent/x")
        yield attempt(sock.bind, "."), attempt(sock.bind, "absent/"), attempt(sock.bind, "plain/x")
        yield attempt(sock.bind, "/"), attempt(sock.bind, "/proc/x")
        os.symlink("loop", "loop")
        yield attempt(sock.connect, "loop"), attempt(sock.connect, "loop/x"), attempt(sock.bind, "loop")
        os.unlink("loop")
        packed = b"\1\0absent\0"
        fd = sock.fileno()
        yield [raw(call, fd, packed, n) for call in ("connect", "bind") for n in (-1, 0, 1, 111, 129)]
        yield raw("connect", fd, packed, 2), raw("connect", fd, sockaddr(80), 16), raw("bind", fd, sockaddr(80), 16)
        yield raw("connect", fd, bytes(16), 16), raw("connect", fd, ctypes.c_void_p(1), 10)
        os.mkdir("closed", 0o000)
        if os.getuid():
            yield attempt(sock.bind, "closed/x"), attempt(sock.connect, "closed/x")
        os.rmdir("closed")
    yield attempt(socket.socket(socket.AF_UNIX).listen, 1)
    stream = socket.socket(socket.AF_UNIX)
    stream.bind("stream")
    stream.listen(1)
    yield attempt(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).connect, "stream")
    yield attempt(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto, b"x", "stream")
    client = socket.socket(socket.AF_UNIX)
    client.connect("stream")
    yield attempt(client.connect, "stream"), attempt(stream.connect, "stream"), attempt(client.listen, 1)
    os.symlink("stream", "link")
    yield attempt(socket.socket(socket.AF_UNIX).connect, "link")
    os.chmod("stream", 0o000)
    if os.getuid():
        yield attempt(socket.socket(socket.AF_UNIX).connect, "stream")
    os.umask(0o077)
    private = socket.socket(socket.AF_UNIX)
    private.bind("private")
    yield oct(os.stat("private").st_mode)
    os.umask(0o022)
    os.mkdir("deep")
    os.chdir("deep")
    here = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    yield attempt(here.bind, "../up"), sorted(os.listdir("..")).count("up")
    os.chdir("..")
    yield attempt(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto, b"found", "up"), here.recv(10)
    directory = os.open("deep", os.O_PATH)
    by_link = socket.socket(socket.AF_UNIX)
    yield attempt(by_link.bind, f"/proc/self/fd/{directory}/s"), os.listdir("deep"), attempt(by_link.listen, 1)
    yield attempt(socket.socket(socket.AF_UNIX).connect, "/proc/self/cwd/deep/s")
    node = os.open("deep/s", os.O_PATH)
    yield attempt(socket.socket(socket.AF_UNIX).connect, f"/proc/self/fd/{node}")


def unix_full():
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        listener, _filled = full_listener(kind)
        waiting = socket.socket(socket.AF_UNIX, kind)
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 150000))
        yield "time", attempt(waiting.connect, listener.getsockname())
        packed = b"\1\0" + listener.getsockname()
        waiting = socket.socket(socket.AF_UNIX, kind)
        with Alarm() as alarm:
            yield "interrupted", raw("connect", waiting.fileno(), packed, len(packed)), alarm.seen
        threading.Timer(0.2, listener.accept).start()
        yield "waits", attempt(waiting.connect, listener.getsockname())
        waiting = socket.socket(socket.AF_UNIX, kind)
        with Alarm(restart=True) as alarm:
            threading.Timer(0.4, listener.accept).start()
            yield "again", raw("connect", waiting.fileno(), packed, len(packed)), alarm.seen
    receiver, address = pair(socket.SOCK_DGRAM, socket.AF_UNIX, "")
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    count = 0
    while attempt(sender.sendto, b"x", socket.MSG_DONTWAIT, address) == 1:
        count += 1
    yield "full", attempt(sender.sendto, b"x", socket.MSG_DONTWAIT, address), count
    packed = b"\1\0" + address
    with Alarm() as alarm:
        yield "interrupted", raw("sendto", sender.fileno(), b"x", 1, 0, packed, len(packed)), alarm.seen
    threading.Timer(0.2, lambda: [receiver.recv(9) for _ in range(count)]).start()
    yield "waits", attempt(sender.sendto, b"x", address)
    sender.connect(address)
    yield "too long", attempt(sender.sendmsg, [bytes(400_000)]), attempt(sender.sendmsg, [bytes(100_000)])


def descriptors():
    left, right = socket.socketpair()
    reader, writer = os.pipe()
    numbers = array.array("i", [reader, writer])
    yield attempt(left.sendmsg, [b"fds"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
    data, control, _, _ = right.recvmsg(10, 100)
    received = array.array("i", control[0][2])
    yield (
        data,
        len(control),
        len(received),
        [os.fstat(a).st_ino == os.fstat(b).st_ino for a, b in zip(received, numbers, strict=True)],
    )
    os.write(received[1], b"through")
    yield os.read(reader, 10)
    for bad in ([-1], [9999], [reader] * 254):
        yield len(bad), attempt(left.sendmsg, [b"x"], [(1, 1, array.array("i", bad))])
    yield (
        attempt(left.sendmsg, [b"x"], [(1, 1, array.array("i", [reader] * 200))]),
        len(right.recvmsg(10, 9000)[1][0][2]),
    )
    yield attempt(left.sendmsg, [b"x"], [(1, 99, b"")]), attempt(left.sendmsg, [b"x"], [(1, 4, bytes(4))])
    yield attempt(left.sendmsg, [b"x"], [(0, 2, bytes(4))]), right.recv(9)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver, address = pair(socket.SOCK_DGRAM)
    yield attempt(sender.sendmsg, [b"x"], [(1, 1, numbers)], 0, address), receiver.recv(10)
    box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    box.bind("rights")
    unbound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    yield attempt(unbound.sendmsg, [b"by path"], [(1, 1, numbers)], 0, "rights")
    yield len(box.recvmsg(10, 100)[1][0][2])
    passed = socket.socketpair()
    yield (
        attempt(left.sendmsg, [b"x" * 300_000], [(1, 1, array.array("i", [passed[0].fileno()]))], socket.MSG_DONTWAIT)
        > 0
    )
    yield [c[:2] for c in right.recvmsg(10, 100)[1]]


def credentials():
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        left, right = socket.socketpair(socket.AF_UNIX, kind)
        right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        own = struct.pack("iII", os.getpid(), os.getuid(), os.getgid())
        for control in ([], [(1, 2, own)]):
            yield attempt(left.sendmsg, [b"x"], control)
            level, number, value = right.recvmsg(10, 100)[1][0]
            yield level, number, value[4:] == own[4:]
        if os.getuid():
            for wrong in ((1, os.getuid(), os.getgid()), (os.getpid(), 0, os.getgid()), (os.getpid(), os.getuid(), 0)):
                yield attempt(left.sendmsg, [b"x"], [(1, 2, struct.pack("iII", *wrong))])
        yield attempt(left.sendmsg, [b"x"], [(1, 2, b"short")])


# ---- programs ----


def square(number):
    return number * number


def programs():
    async def server_and_client():
        async def serve(reader, writer):
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()

        answers = []
        for start, connect in (
            (asyncio.start_server(serve, V4, 0), None),
            (asyncio.start_unix_server(serve, "asyncio"), lambda: asyncio.open_unix_connection("asyncio")),
        ):
            async with await start as server:
                address = server.sockets[0].getsockname()
                for _ in range(5):
                    reader, writer = await (connect() if connect else asyncio.open_connection(*address))
                    writer.write(b"hello\n")
                    answers.append(await reader.read())
                    writer.close()
        return answers

    yield asyncio.run(server_and_client())
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            yield method, pool.map(square, range(5))
        with context.Manager() as manager:
            shared = manager.dict()
            shared["a"] = 1
            yield dict(shared)
    from multiprocessing.connection import Client, Listener

    with Listener("mp-socket", authkey=b"k") as listener:
        thread = threading.Thread(target=lambda: listener.accept().send("hello"))
        thread.start()
        with Client("mp-socket", authkey=b"k") as client:
            yield client.recv()
        thread.join()
    yield bool(socket.getaddrinfo("localhost", 80)), bool(socket.if_nameindex())


def netlink():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        yield attempt(sock.bind, (0, 0)), sock.getsockname()[1]
        ask = struct.pack("IHHIIB", 20, 18, 0x301, 1, 0, 0) + bytes(3)
        yield attempt(sock.sendto, ask, (0, 0)), len(sock.recv(1 << 16)) > 100
        yield attempt(sock.sendmsg, [ask], [], 0, (0, 0))
        yield attempt(sock.sendmsg, [ask]), attempt(sock.connect, (0, 0)), attempt(sock.bind, (0, 1))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as other:
        yield attempt(other.bind, (123456, 0)), other.getsockname(), raw("connect", other.fileno(), sockaddr(80), 16)


def main():
    os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
    socket.setdefaulttimeout(None)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for function in map(globals().get, sys.argv[2:]):
        for number, result in enumerate(function(), 1):
            print(f"{function.__name__} {number}: {result!r}", flush=True)


if __name__ == "__main__":
    main()
