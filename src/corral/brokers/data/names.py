"""How the dialects tell names apart, and how a name is written for each."""

from __future__ import annotations

import string

from corral.errors import RequestError
from corral.policy.model import Dialect

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def fold(name: str, *, quoted: bool, dialect: Dialect) -> str:
    """What a server makes of a name that a query has. Only PostgreSQL changes it, where it is not quoted."""
    return name if quoted or dialect is not Dialect.POSTGRESQL else name.translate(_LOWER)


def key(name: str, dialect: Dialect) -> str:
    """Equal for names that a server takes for the same. ASCII only: no server agrees with another about the rest."""
    return name if dialect is Dialect.POSTGRESQL else name.translate(_LOWER)


def quote(name: str, dialect: Dialect) -> str:
    """The name as it is written in a query. Raises RequestError for one that cannot be."""
    if not name or any(ord(character) < 32 or "\ue000" <= character <= "\uf8ff" for character in name):
        raise RequestError(f"a name of a table or column is empty or holds a control character: {name[:100]!r}")
    mark = "`" if dialect is Dialect.MYSQL else '"'
    return f"{mark}{name.replace(mark, mark * 2)}{mark}"
