"""Socket addresses as callers write them: raw bytes in, what they mean out.

Everything here works on a copy that was read once. What an address means can depend on the socket (0.0.0.0 is the
socket's own address, AF_UNSPEC is AF_INET for a datagram), and the socket can change; so the address that is decided is
written out in full, and that is what the kernel gets.
"""

from __future__ import annotations

import functools
import os
import struct
from errno import EACCES, EAFNOSUPPORT, EINVAL
from socket import AF_INET, AF_INET6, AF_UNIX

from corral.actions import Endpoint, Transport
from corral.policy.names import address_of

MAX_LENGTH = 128
"""``sizeof(struct sockaddr_storage)``."""
FAMILY_LENGTH = 2
IPV4_LENGTH = 16
IPV6_LENGTH = 24
"""``SIN6_LEN_RFC2133``: a scope may follow."""
UNIX_LENGTH = 110
NETLINK_LENGTH = 12
UNPRIVILEGED_PORT = 1024
"""The first port that needs no capability (ip(7), ip_unprivileged_port_start; nothing in a sandbox may change it)."""

_MAPPED = bytes(10) + b"\xff\xff"
_LOOPBACK4, _LOOPBACK6 = bytes((127, 0, 0, 1)), bytes(15) + b"\x01"
_ANY4, _ANY6 = bytes(4), bytes(16)
_NETLINK = struct.Struct("=HHII")


def family_of(raw: bytes) -> int:
    """AF_*. Raises OSError (EINVAL) where the address is too short to have one."""
    if len(raw) < FAMILY_LENGTH:
        raise error(EINVAL)
    return int.from_bytes(raw[:FAMILY_LENGTH], "little")


def error(errno: int) -> OSError:
    """The exception for an errno."""
    return OSError(errno, os.strerror(errno))


class WithheldError(OSError):
    """What our rights would allow and the caller's do not; ``reason`` is recorded."""

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(errno, reason)
        self.code, self.reason = errno, reason


# ---- Internet ----


def needs_own_address(raw: bytes) -> bool:
    """Whether this destination means something only together with the socket's own address."""
    family = family_of(raw)
    if family == AF_INET6:
        return raw[8:24] in (_ANY6, _MAPPED + _ANY4)
    return raw[4:8] == _ANY4


def destination(raw: bytes, own: bytes) -> bytes:
    """The destination with ``0.0.0.0`` and ``::`` replaced by what the kernel takes them for: the socket's own IPv4
    address (``own`` is what getsockname(2) gives), where it is bound to one, else loopback."""
    mapped = own[8:20] == _MAPPED and family_of(own) == AF_INET6
    own4 = own[20:24] if mapped else own[4:8] if family_of(own) == AF_INET else _ANY4
    address4 = _LOOPBACK4 if own4 == _ANY4 else own4
    if family_of(raw) == AF_INET:
        return raw[:4] + address4 + raw[8:]
    if raw[8:24] == _ANY6:
        return raw[:8] + (_MAPPED + _LOOPBACK4 if mapped else _LOOPBACK6) + raw[24:]
    return raw[:8] + _MAPPED + address4 + raw[24:]


@functools.lru_cache(maxsize=4096)
def internet(raw: bytes, transport: Transport) -> Endpoint:
    """What an AF_INET or AF_INET6 address names.

    Raises OSError: EINVAL where it is too short, EAFNOSUPPORT for another family, as the kernel does.
    """
    family = family_of(raw)
    if family == AF_INET:
        if len(raw) < IPV4_LENGTH:
            raise error(EINVAL)
        return Endpoint(transport, address_of(raw[4:8]), int.from_bytes(raw[2:4], "big"))
    if family == AF_INET6:
        if len(raw) < IPV6_LENGTH:
            raise error(EINVAL)
        return Endpoint(transport, address_of(raw[8:24]), int.from_bytes(raw[2:4], "big"))
    raise error(EINVAL if len(raw) < IPV4_LENGTH else EAFNOSUPPORT)


def as_ipv4(raw: bytes) -> bytes:
    """An AF_UNSPEC address where the kernel reads it as AF_INET (a datagram's destination on a socket of IPv4)."""
    return AF_INET.to_bytes(FAMILY_LENGTH, "little") + raw[FAMILY_LENGTH:]


def check_port(endpoint: Endpoint) -> None:
    """Raises OSError (EACCES) for a port that only a capability could bind; we have it, the caller does not."""
    if 0 < endpoint.port < UNPRIVILEGED_PORT:
        raise WithheldError(
            EACCES, f"port {endpoint.port} is for programs with more rights (below {UNPRIVILEGED_PORT})"
        )


# ---- netlink ----


def netlink(raw: bytes) -> tuple[int, int]:
    """Port and groups. Raises OSError (EINVAL)."""
    if len(raw) < NETLINK_LENGTH:
        raise error(EINVAL)
    _, _, port, groups = _NETLINK.unpack_from(raw)
    return port, groups


# ---- Unix ----


def unix_name(raw: bytes) -> bytes:
    """``sun_path`` as unix(7) reads it: a path up to its NUL, an abstract name with its NUL in front, or nothing.

    Raises OSError (EINVAL).
    """
    if not FAMILY_LENGTH <= len(raw) <= UNIX_LENGTH or family_of(raw) != AF_UNIX:
        raise error(EINVAL)
    name = raw[FAMILY_LENGTH:]
    return name if name.startswith(b"\0") else name.partition(b"\0")[0]


def unix(name: bytes, directory: bytes = b"") -> Endpoint:
    """What a name from :func:`unix_name` names; a relative path is one from ``directory``."""
    if name.startswith(b"\0"):
        return Endpoint(Transport.UNIX, path="@" + shown(name[1:]))
    path = name if name.startswith(b"/") or not name else os.path.join(directory, name)
    return Endpoint(Transport.UNIX, path=shown(path))


def shown(name: bytes) -> str:
    """Bytes as text, in which what cannot be printed is escaped, and the sign of an escape too."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = "\\"
    if text.isprintable() and "\\" not in text:
        return text
    return name.decode("latin-1").encode("unicode_escape").decode("ascii")
