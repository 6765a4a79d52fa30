"""What a rule about a destination may say of the flows to it: permissions, requests, a credential, limits.

A secret that was written where only its place belongs is never echoed.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator

from corral.policy.document import quoted
from corral.policy.fields import MAX_ENTRIES, Duration, Filled, Strict, checked_glob, host_path, nearest, variable
from corral.policy.model import KIB, MIB, Credential, CredentialKind, FlowLimits, Permit, RequestRule
from corral.policy.names import address_and_port, joined
from corral.policy.notation import Short
from corral.policy.units import SIZE, TIB, Size

MAX_RESOLVERS = 8
_DEFAULT = FlowLimits()


# --- Permissions ----------------------------------------------------------------------------------------------------


def _permit(word: object) -> Permit:
    known = [each.value for each in Permit]
    if not isinstance(word, str):
        raise ValueError(f"must be a word (known: {', '.join(known)})")
    if word not in known:
        raise ValueError(f"{quoted(word)} is not a permission ({nearest(word, known)})")
    return Permit(word)


_PERMIT = Annotated[Permit, BeforeValidator(_permit), WithJsonSchema({"enum": [each.value for each in Permit]})]
Permits = Annotated[tuple[_PERMIT, ...], Field(max_length=64), *Filled]


# --- Requests -------------------------------------------------------------------------------------------------------

_METHOD = re.compile(r"[A-Z][A-Z0-9_-]{0,31}")
_METHOD_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"


def _methods(written: object) -> tuple[str, ...]:
    items = written if isinstance(written, tuple) else (written,)
    if not items or len(items) > 64:
        raise ValueError("an empty or endless list of methods (leave it out to mean all)")
    return tuple(sorted({_method(item) for item in items}))


def _method(item: object) -> str:
    if not isinstance(item, str):
        raise ValueError("must be a method, or a list of these (write for example `GET`)")
    name = item.upper()
    if not item.isascii() or not _METHOD.fullmatch(name):
        raise ValueError(f"{quoted(item)} is not the method of a request (write for example `GET`)")
    if name == "CONNECT":
        raise ValueError("`CONNECT` is no request, but a way to somewhere else (write `permit: [connect]`)")
    return name


def _request_path(glob: str) -> str:
    shown = quoted(glob)
    if not glob.startswith("/"):
        raise ValueError(f"{shown} is not the path of a request (write it from its first `/`: `/repos/**`)")
    if "%" in glob:
        raise ValueError(f"{shown}: a path is compared with what is decoded (write it without `%`)")
    if "#" in glob or ";" in glob or "=" in glob.partition("?")[2]:
        raise ValueError(f"{shown}: what follows a `?`, `;` or `#` is not compared (leave it out)")
    return "/" if glob == "/" else checked_glob(glob.removesuffix("/"))


_METHOD_SCHEMA = {"type": "string", "pattern": _METHOD_PATTERN}
_METHODS_SCHEMA = {"anyOf": [_METHOD_SCHEMA, {"type": "array", "items": _METHOD_SCHEMA, "minItems": 1}]}
_PATH_SCHEMA = {"type": "string", "pattern": "^/"}


class RequestRuleFile(Short):
    """HTTP requests, by method and path."""

    method: Annotated[tuple[str, ...], BeforeValidator(_methods), WithJsonSchema(_METHODS_SCHEMA)] = ()
    """A method, or a list of these. Left out: any."""
    path: Annotated[str, AfterValidator(_request_path), WithJsonSchema(_PATH_SCHEMA)] = "/**"
    """A glob of the path, decoded and without its query. Left out: any."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "A method, a glob of the path, or both.",
        "examples": ["GET /repos/**", "/public/**", "GET"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        if text.startswith("/"):
            return {"path": text}
        method, blank, path = text.partition(" ")
        return {"method": method, "path": path} if blank else {"method": method}

    def value(self) -> RequestRule:
        return RequestRule(self.method, self.path)


RequestRules = Annotated[tuple[RequestRuleFile, ...], Field(max_length=MAX_ENTRIES), *Filled]


# --- Credentials ----------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
_FRAMING = frozenset(
    """connection content-encoding content-length content-type expect host http2-settings keep-alive
    proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade""".split()
)
"""What says where a request ends, and where it goes."""
_NO_SOURCE = "must say where the secret is: `env:NAME` or `file:/path` (the secret itself does not belong here)"


def _kind(word: object) -> CredentialKind:
    known = [each.value for each in CredentialKind]
    if not isinstance(word, str):
        raise ValueError(f"must be a word (known: {', '.join(known)})")
    if word not in known:
        raise ValueError(f"is not a kind of credential (known: {', '.join(known)})")
    return CredentialKind(word)


def secret_source(text: object, info: ValidationInfo) -> str:
    """Where a secret is outside. Nothing is echoed."""
    if not isinstance(text, str):
        raise ValueError(_NO_SOURCE)
    kind, colon, where = text.partition(":")
    if not colon or kind not in ("env", "file"):
        raise ValueError(_NO_SOURCE)
    try:
        return f"env:{variable(where)}" if kind == "env" else f"file:{host_path(where, info)}"
    except ValueError:  # what it quotes may be the secret
        place = "the name of a variable" if kind == "env" else "the path of a file"
        raise ValueError(f"is not {place}: {_NO_SOURCE}") from None


def _header(name: str) -> str:
    lower = name.lower()
    if not name.isascii() or not _HEADER.fullmatch(lower):
        raise ValueError("is not the name of a header (write for example `x-api-key`)")
    if lower in _FRAMING:
        raise ValueError(f"`{lower}` is not a header for a credential: it says how requests are read")
    return lower


def _user(name: str) -> str:
    if not name or len(name) > 255 or not name.isprintable() or ":" in name:  # RFC 7617, section 2
        raise ValueError("is not the name of a user (one printable line of up to 255 characters, without `:`)")
    return name


SecretSource = Annotated[
    str, BeforeValidator(secret_source), WithJsonSchema({"type": "string", "pattern": "^(env:[A-Za-z_]|file:.)"})
]


class CredentialFile(Strict):
    """A credential that the gateway puts into requests, and that nothing inside ever sees."""

    type: Annotated[
        CredentialKind, BeforeValidator(_kind), WithJsonSchema({"enum": [each.value for each in CredentialKind]})
    ]
    """How it is put in."""
    source: SecretSource = Field(alias="from")
    """Where the secret is outside: `env:NAME`, or `file:` and a path."""
    header: Annotated[str, AfterValidator(_header)] | None = None
    """The name of the header; with `type: header`."""
    user: Annotated[str, AfterValidator(_user)] | None = None
    """The name of the user; with `type: basic`, and as you like with `git`."""

    @model_validator(mode="after")
    def _fits(self) -> CredentialFile:
        if (self.header is not None) != (self.type is CredentialKind.HEADER):
            raise ValueError("`header` belongs to `type: header`, and to no other")
        if self.user is None and self.type is CredentialKind.BASIC:
            raise ValueError("has no `user` (add it)")
        if self.user is not None and self.type not in (CredentialKind.BASIC, CredentialKind.GIT):
            raise ValueError("`user` belongs to `type: basic` and `type: git`, and to no other")
        return self

    def value(self) -> Credential:
        return Credential(self.type, self.source, self.header or "", self.user or "")


# --- Limits ---------------------------------------------------------------------------------------------------------

_SIZES = WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": SIZE}], "examples": ["10MiB"]})
_ANY_SIZE = Annotated[int, BeforeValidator(Size(1, 1024 * TIB)), _SIZES]
_HEAD_SIZE = Annotated[int, BeforeValidator(Size(KIB, MIB)), _SIZES]


class LimitsFile(Strict):
    """Upper bounds for the flows of one rule."""

    connections: Annotated[int, Field(ge=1, le=65_535)] = _DEFAULT.connections
    """Flows at one time."""
    up: _ANY_SIZE | None = _DEFAULT.up
    """What one flow may send. Left out: no bound."""
    down: _ANY_SIZE | None = _DEFAULT.down
    """What one flow may receive. Left out: no bound."""
    idle: Duration = _DEFAULT.idle
    """How long nothing may pass in either direction."""
    dial: Duration = _DEFAULT.dial
    """How long it may take until the connection to the outside stands."""
    header: _HEAD_SIZE = _DEFAULT.header
    """The head of one request or response, where requests are looked at."""
    body: _ANY_SIZE | None = _DEFAULT.body
    """The body of one request or response, where requests are looked at. Left out: no bound."""
    session_up: _ANY_SIZE | None = _DEFAULT.session_up
    """What all flows of the rule together may send in one session. Left out: no bound."""
    session_down: _ANY_SIZE | None = _DEFAULT.session_down
    """What they may receive. Left out: no bound."""

    def value(self) -> FlowLimits:
        return FlowLimits(**{name: getattr(self, name) for name in type(self).model_fields})


# --- What holds for all flows ---------------------------------------------------------------------------------------


def _resolver(text: str) -> str:
    return joined(*address_and_port(text, 53))


def _proxy(text: str) -> str:
    """Nothing of it is echoed: there may be a password in it."""
    scheme, slashes, rest = text.partition("://")
    try:
        if scheme != "http" or not slashes:
            raise ValueError
        return f"http://{joined(*address_and_port(rest.removesuffix('/')))}"
    except ValueError:
        what = "an address, not a name, with its port, and without a user"
        raise ValueError(f"must be http://ADDRESS:PORT, such as http://192.0.2.1:3128 ({what})") from None


Resolvers = Annotated[tuple[Annotated[str, AfterValidator(_resolver)], ...], Field(max_length=MAX_RESOLVERS)]
Proxy = Annotated[str, AfterValidator(_proxy), WithJsonSchema({"type": "string", "pattern": "^http://"})]
