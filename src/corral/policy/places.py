"""Where brokers reach what they are for, as a policy file says it: URLs of models, of services, of databases.

Each has one form (small letters; of the web no port that is the default and no slash at the end). No message echoes any
of them: people put secrets into URLs.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo, WithJsonSchema

from corral.policy.doors import is_reserved
from corral.policy.fields import host_path
from corral.policy.model import Dialect
from corral.policy.names import canonical_address, canonical_name

MAX_URL = 2048
"""Characters."""
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}
_ALIASES = {"postgres": "postgresql", "mariadb": "mysql"}
_PATH = re.compile(r"(?:/[A-Za-z0-9._~:+,=-]+)*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.$-]{0,62}")
_DATABASE = _USER


def _authority(text: str, default: int) -> tuple[str, int]:
    """Host and port. Raises ValueError without a word of ``text``."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            raise ValueError("has no host that is understood (an IPv6 address is written in [])")
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = text.partition(":")
    if colon and not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError("has a port that is none (1 to 65535)")
    return _host(host, bracketed=text.startswith("[")), int(port) if colon else default


def _host(text: str, *, bracketed: bool) -> str:
    try:
        address = canonical_address(text)
    except ValueError:
        address = ""
    if address:
        return f"[{address}]" if ":" in address else address
    try:
        name = "" if bracketed else canonical_name(text)
    except ValueError:  # which quotes it
        name = ""
    if not name:
        raise ValueError("has no host that is understood (write a name, or an address in its usual form)")
    if is_reserved(name):
        raise ValueError("leads to a broker's own name, which is there inside only (write where it is outside)")
    return name


def _bounded(text: str) -> None:
    if len(text) > MAX_URL or not text.isascii() or not text.isprintable() or " " in text or "\\" in text:
        raise ValueError(f"is not a URL (up to {MAX_URL} plain characters, no blanks)")


def web_url(text: str) -> str:
    """``https://HOST[:PORT][/PATH]``, or the same with ``http``."""
    _bounded(text)
    scheme, slashes, rest = text.partition("://")
    if not slashes or scheme not in ("http", "https"):
        raise ValueError("must be a URL that begins with https:// (or http://)")
    if "?" in rest or "#" in rest:
        raise ValueError("has a query or a fragment (leave it out; the place of a secret is `credential`)")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise ValueError("has a user or a password in it (leave it out; the place of a secret is `credential`)")
    where = f"{slash}{path}".rstrip("/")
    if not _PATH.fullmatch(where) or any(part in (".", "..") for part in where.split("/")):
        raise ValueError("has a path that is not plain (letters, digits and `._~:+,=-` between single slashes)")
    host, port = _authority(authority, _PORTS[scheme])
    return f"{scheme}://{host}{'' if port == _PORTS[scheme] else f':{port}'}{where}"


def host_and_port(url: str) -> tuple[str, int]:
    """Of a URL in its one form; an IPv6 address without its brackets."""
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0].rpartition("@")[2]
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, str(_PORTS[scheme])
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_in_clear(url: str) -> bool:
    """Whether a secret that is sent there can be read on the way: in clear, and not to a private address."""
    if not url.startswith("http://"):
        return False
    host, _ = host_and_port(url)
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_private
    except ValueError:
        return True


IN_CLEAR = "would be sent in clear, where others can read it (write https://, or an address that is private)"


def database_url(text: str, info: ValidationInfo) -> str:
    """``DIALECT://USER@HOST[:PORT]/DATABASE``, or the path of a file, as the field ``dialect`` before it wants it."""
    dialect = info.data.get("dialect")
    if not isinstance(dialect, Dialect):  # which has its own fault
        return text
    if dialect in (Dialect.SQLITE, Dialect.DUCKDB):
        if "://" in text:
            raise ValueError(f"must be the path of a file (`dialect: {dialect.value}`)")
        return host_path(text, info)
    _bounded(text)
    example = f"{dialect.value}://USER@HOST:{_PORTS[dialect.value]}/DATABASE"
    scheme, slashes, rest = text.partition("://")
    if not slashes or _ALIASES.get(scheme, scheme) != dialect.value:
        raise ValueError(f"must be {example} (`dialect: {dialect.value}`)")
    if "?" in rest or "#" in rest:
        raise ValueError(f"has options after the database (leave them out: {example})")
    authority, _, database = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if ":" in user:
        raise ValueError("has a password in it (leave it out, and say where it is: `password: env:NAME`)")
    if not at or not _USER.fullmatch(user):
        raise ValueError(f"has no user that is understood (letters, digits and `_.$-`: {example})")
    if not _DATABASE.fullmatch(database):
        raise ValueError(f"has no database that is understood (letters, digits and `_.$-`: {example})")
    host, port = _authority(host, _PORTS[dialect.value])
    return f"{dialect.value}://{user}@{host}:{port}/{database}"


WebUrl = Annotated[str, AfterValidator(web_url), WithJsonSchema({"type": "string", "pattern": "^https?://"})]
DatabaseUrl = Annotated[str, AfterValidator(database_url), WithJsonSchema({"type": "string", "minLength": 1})]
