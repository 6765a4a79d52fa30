"""Where a database is, as the URL of its source says."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from corral.errors import RequestError


@dataclass(frozen=True, slots=True)
class Place:
    """A database of a server."""

    host: str
    port: int
    user: str
    database: str

    @classmethod
    def of(cls, url: str) -> Place:
        """Raises RequestError for another URL than :attr:`corral.policy.model.Source.url` describes."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host, port = "", None
        if not host or port is None or parts.password is not None or parts.query or parts.fragment:
            raise RequestError("the URL of a source is DIALECT://USER@HOST:PORT/DATABASE, without a password")
        return cls(host, port, parts.username or "", parts.path.removeprefix("/"))


def is_near(host: str) -> bool:
    """Whether what is sent there stays on this machine or in a network of its own. Anything else needs TLS with a
    certificate for its name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False
