"""What there is of a service for an agent, as immutable values: read from its document once, when a sandbox starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from corral.brokers.api.paths import Template
from corral.brokers.schemas import Schema
from corral.brokers.strict_json import Json


class Place(Enum):
    """Where an argument stands in a request."""

    PATH = "path"
    QUERY = "query"
    HEADER = "header"
    COOKIE = "cookie"


class Join(Enum):
    """How an array becomes text (OpenAPI's ``style`` and ``explode``)."""

    REPEATED = "repeated"
    """``a=1&a=2``: ``form``, exploded."""
    COMMA = ","
    """``simple``, and ``form`` that is not exploded."""
    SPACE = " "
    PIPE = "|"


class BodyKind(Enum):
    """What is known of a body of some media type."""

    JSON = "json"
    FORM = "form"
    """``application/x-www-form-urlencoded``."""
    TEXT = "text"
    """UTF-8 and nothing else."""
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter that an operation declares, in a form that is understood here."""

    name: str
    """Of a header in lower case."""
    place: Place
    is_required: bool
    is_array: bool
    join: Join
    kinds: frozenset[str]
    """JSON Schema's types of its value, or of the elements of an array."""
    schema: Schema
    shape: Mapping[str, Json]
    """The same, to be shown; without definitions."""
    description: str
    values: tuple[str, ...] = ()
    """Globs that the policy has for it; none means any value."""


@dataclass(frozen=True, slots=True)
class Media:
    """One media type of a request's body. ``type`` may be a range: ``image/*``."""

    type: str
    kind: BodyKind
    schema: Schema | None
    shape: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a member of a body may be."""

    name: str
    """As the policy has it: ``body.issue.project``."""
    way: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that the policy names."""

    id: str
    """As the policy has it."""
    method: str
    template: Template
    arguments: tuple[Argument, ...]
    media: tuple[Media, ...]
    needs_body: bool
    constraints: tuple[Constraint, ...]
    definitions: Mapping[str, Json]
    """What ``$ref`` in its shapes leads to."""
    description: str
    rule: str
    """Where the policy names it."""


class Problem(Exception):
    """A request that is not sent. ``status`` is what it is answered with; ``rule`` says where that is written, if it is
    the policy that has something against it."""

    def __init__(self, status: int, reason: str, rule: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.rule = status, reason, rule


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of a call, by name and place, and its body: read, but not checked yet."""

    values: Mapping[tuple[Place, str], Json]
    media: Media | None = None
    media_type: str = ""
    """As it is sent."""
    body: Json | bytes = None
    """A JSON value; of a form an object; of all else bytes."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request that may be sent if the monitor allows it: written from what was checked, and of nothing else."""

    method: str
    target: str
    """Path and query, below the service's URL."""
    headers: tuple[tuple[str, str], ...]
    body: bytes | None
    arguments: bytes
    """All that was asked, as JSON, for those who look later."""
