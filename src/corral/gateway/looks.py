"""What still looks at a flow once it is carried: plain protocols for what they become, old TLS for its certificate."""

from __future__ import annotations

from collections.abc import Callable, Collection

from corral.gateway.hello import CertificateReader
from corral.gateway.recognise import Protocol, Recognised
from corral.gateway.relay import Look
from corral.gateway.watch import AGREED, Direction, Finding, Watch
from corral.policy.model import Permit


class _Plain:
    """What both directions of a plain flow share."""

    def __init__(self, permits: Collection[Permit]) -> None:
        self.watch = Watch()
        self.encrypted = False
        self._permits = permits

    def judge(self, finding: Finding | None) -> str:
        """Why a flow that turned out to be more than plain ends, or ``""``."""
        if finding is None:
            return ""
        if finding.starttls and Permit.STARTTLS in self._permits:
            self.encrypted = self.encrypted or finding == AGREED
            return ""
        return f"it became something else: {finding.detail}"


class _Watching:
    """One direction of a plain flow."""

    def __init__(self, plain: _Plain, direction: Direction) -> None:
        self._plain, self._direction = plain, direction

    @property
    def done(self) -> bool:
        return self._plain.encrypted or self._plain.watch.done(self._direction)

    def feed(self, data: bytes) -> str:
        return self._plain.judge(self._plain.watch.feed(self._direction, data))


class _Reading:
    """The server's side of a TLS flow, until it has shown its certificate."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._reader, self._tell = CertificateReader(), tell
        self.done = False

    def feed(self, data: bytes) -> str:
        self._reader.feed(data)
        self.done = self._reader.done
        if self._reader.certificate:
            self._tell(self._reader.certificate)
        return ""


def looks_for(
    found: Recognised, first: bytes, permits: Collection[Permit], certificate: Callable[[str], None]
) -> tuple[Look | None, Look | None, str]:
    """Who looks at the way up and the way down, and why what was read already (``first``) is not to be passed on, or
    ``""``. ``certificate`` is told of one."""
    if found.protocol is Protocol.TCP:
        plain = _Plain(permits)
        up, down = (_Watching(plain, direction) for direction in Direction)
        # What it was recognised by is its first line; there may be more.
        return up, down, up.feed(first) if first else ""
    if found.protocol is Protocol.TLS and found.hello is not None:
        return None, _Reading(certificate), ""
    return None, None, ""
