"""What the proxy asks of messages beside their form, and what it puts into those that go on. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from urllib.parse import unquote_plus

from corral.actions import Meaning
from corral.credentials.secret import Secret, inject
from corral.gateway.handshakes import is_mining_in_http, tunnel_in_http
from corral.gateway.http_heads import Fields, HttpError, RequestHead, ResponseHead
from corral.policy.irreversible import UPLOAD_PACK, fetches
from corral.policy.model import Permit

_UPGRADES = {"websocket": Permit.WEBSOCKET, "h2c": Permit.H2C}
_UNSCRUBBABLE = frozenset((b"accept-encoding", b"range", b"if-range", b"sec-websocket-extensions"))
"""Fields by which a client could have a secret sent back compressed or in pieces."""
_OVERRIDES = frozenset(
    (
        b"x-http-method",
        b"x-http-method-override",
        b"x-method-override",
        b"x-original-method",
        b"x-original-uri",
        b"x-original-url",
        b"x-rewrite-url",
        b"x-forwarded-method",
        b"x-forwarded-uri",
    )
)
"""Fields that some servers take for the method or the path of the request: what was decided on is another."""
_OVERRIDING = frozenset(("-method", "-http-method", "-httpmethod", "$httpmethod", *(n.decode() for n in _OVERRIDES)))
"""Keys of a query from which frameworks take the method or the path of the request, with ``-`` for ``_``."""
_ECHOES = frozenset(("TRACE", "TRACK"))
"""RFC 9110, section 9.3.8, and its name in old servers; some take a method in any case."""
_BODILESS = frozenset(("GET", "HEAD"))
"""Methods whose body has no meaning (RFC 9110, sections 9.3.1 and 9.3.2), so that rules take them for reading."""

_FETCH_TYPE = b"application/x-git-upload-pack-request"


def permit_of(upgrade: str) -> Permit:
    """The permission that an upgrade to this protocol needs (``connect``: a tunnel by CONNECT)."""
    return Permit.CONNECT if upgrade == "connect" else _UPGRADES.get(upgrade, Permit.UPGRADE)


def unwanted(raw: bytes) -> str:
    """Why a request is refused for whom it is from, by the marks of its head; ``""`` if it is from nobody known.

    The first request of a connection was looked at when its protocol was recognised; any may be another's.
    """
    tool = tunnel_in_http(raw)
    if tool:
        return f"it is the handshake of a tunnel ({tool})"
    return "it is a miner's" if is_mining_in_http(raw) else ""


def impossible(head: RequestHead, permits: Set[Permit], *, injecting: bool, judged: bool = False) -> str:
    """Why a request cannot be permitted, whatever the rules for requests say; ``""`` if it can. ``judged``: there are
    such rules."""
    if judged and _asks_for_another(head.target):
        return "the query names another method than the one that is judged"
    if judged and head.method in _BODILESS and (head.chunked or head.length):
        return f"a {head.method} that is judged by its method sends no body"
    if head.method == "CONNECT":
        if Permit.CONNECT not in permits:
            return "CONNECT would lead on to another place, which the rule for this one does not permit"
        if injecting:
            return "a connection through a proxy is not possible where a credential is put in"
    if head.method.upper() in _ECHOES and injecting:
        return f"{head.method} sends back what was sent, credentials too"
    if head.upgrade:
        if judged and head.upgrade != "websocket":
            return f"an upgrade to {head.upgrade} would hide the requests that rules judge"
        if permit_of(head.upgrade) not in permits:
            return f"an upgrade to {head.upgrade} is not permitted by the rule for this place"
        if head.upgrade == "websocket" and head.method != "GET":
            return "an upgrade to websocket is asked for with GET"
        if head.upgrade != "websocket" and injecting:
            return f"an upgrade to {head.upgrade} is not possible where a credential is put in"
    return ""


def meaning_of(head: RequestHead, *, judged: bool) -> Meaning:
    """What a request is for beside its method. Where it is ``judged``, fields that override the method do not go on
    (:func:`outgoing`), and a query that does was refused (:func:`impossible`)."""
    if not judged:
        if any(_is_override(name) for name, _ in head.fields) or _asks_for_another(head.target):
            return Meaning.OVERRIDDEN
        if head.method in _BODILESS and head.has_body:
            return Meaning.BODY
    if b"?" not in head.target and fetches(head.method, head.path):
        types = [value for name, value in head.fields if name.lower() == b"content-type"]
        if types == [_FETCH_TYPE] or not head.path.endswith(UPLOAD_PACK):
            return Meaning.FETCH
    return Meaning.METHOD


def _is_override(name: bytes) -> bool:
    return name.lower().replace(b"_", b"-") in _OVERRIDES


def _asks_for_another(target: bytes) -> bool:
    if b"?" not in target:
        return False
    query = target.partition(b"?")[2].replace(b";", b"&").decode("ascii", "replace")
    keys = (unquote_plus(pair.partition("=")[0]).strip().casefold() for pair in query.split("&"))
    # PHP takes a dot, a space and an open bracket in a key for `_`.
    return any(re.sub(r"[_. \[]", "-", key) in _OVERRIDING for key in keys)


def outgoing(
    head: RequestHead, host: bytes, secret: Secret | None, *, judged: bool = False, injecting: bool = True
) -> Fields:
    """The fields of a request as the server gets them. ``judged``: method and path are what was decided on. Where not
    ``injecting``, the secret is another request's, but its echoes must be found in this answer too."""
    fields = head.fields
    if judged:
        fields = [item for item in fields if not _is_override(item[0])]
    if secret is not None:
        fields = [item for item in fields if item[0].lower().replace(b"_", b"-") not in _UNSCRUBBABLE]
        fields = [*fields, (b"Accept-Encoding", b"identity")]
        if injecting:
            fields = inject(fields, secret)
    return [(b"Host", head.target if head.method == "CONNECT" else host), *fields, *_framing(head)]


def _framing(head: RequestHead) -> Iterable[tuple[bytes, bytes]]:
    """The fields that say how long the body is and what becomes of the connection."""
    if head.chunked:
        yield b"Transfer-Encoding", b"chunked"
    elif head.length is not None:
        yield b"Content-Length", b"%d" % head.length
    if head.upgrade == "h2c" and head.settings is not None:
        yield b"HTTP2-Settings", head.settings
        yield b"Connection", b"upgrade, HTTP2-Settings"
    elif head.upgrade:
        yield b"Connection", b"upgrade"
    elif not head.keep_alive:
        yield b"Connection", b"close"
    if head.upgrade:
        yield b"Upgrade", head.upgrade.encode("ascii")


def check_body(length: int, limit: int | None, status: int) -> None:
    """Raises HttpError."""
    if limit is not None and length > limit:
        raise HttpError(status, f"the body is longer than {limit} bytes")


def check_scrubbable(head: ResponseHead) -> None:
    """Whether echoes of a secret could be found in this answer. Raises HttpError."""
    codings = [value.lower() for name, value in head.fields if name.lower() == b"content-encoding"]
    if any(coding not in (b"identity", b"") for coding in codings):
        raise HttpError(502, "it is compressed, so the credential could not be kept out of it")
    if head.status == 206:
        raise HttpError(502, "it is a part that nobody asked for, so the credential could not be kept out of it")


def without_echoes(fields: Fields, secret: Secret | None) -> Fields:
    """The fields of an answer as the client gets them. A name is masked like a value: ``*`` may be part of one."""
    if secret is None:
        return list(fields)
    return [(secret.scrubbed(name), secret.scrubbed(value)) for name, value in fields]
