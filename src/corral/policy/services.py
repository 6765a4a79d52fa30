"""What a policy file says of services beside its rules: their documents, and which of their operations there are."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator

from corral.policy.document import quoted
from corral.policy.fields import MAX_ENTRIES, Duration, Label, host_path, whole_glob
from corral.policy.flow_rules import CredentialFile
from corral.policy.model import GIB, KIB, Operation, Parameter, Service
from corral.policy.notation import Entry, Short, distinct
from corral.policy.places import IN_CLEAR, WebUrl, is_in_clear
from corral.policy.units import SIZE, Size

MAX_SERVICES = 64
MAX_PARAMETERS = 64
"""Parameters of one operation that are said something of."""
MAX_VALUES = 256
"""Globs of one parameter."""
_LONGEST = 255
_PLACE = re.compile(r"(?:GET|HEAD|OPTIONS|TRACE|POST|PUT|PATCH|DELETE) /\S*")
_DEFAULT = Service("", "", "")


def operation_id(text: str) -> str:
    """An ``operationId``, or ``METHOD /path`` as the document has them."""
    shown = quoted(text)
    if not text or len(text) > _LONGEST or not text.isprintable() or set(text) & set("*?\\"):
        raise ValueError(f"{shown} is not an operation (name each by its id; patterns are for the rules)")
    if " " in text and not _PLACE.fullmatch(text):
        raise ValueError(f"{shown} is not an operation (its `operationId`, or for example `GET /tickets/{{id}}`)")
    return text


def _parameter(text: str) -> str:
    if not text or len(text) > _LONGEST or not text.isprintable() or " " in text:
        raise ValueError(f"{quoted(text)} is not the name of a parameter (or `body.` and the way to a member)")
    return text


def _values(written: object) -> object:
    items = (written,) if isinstance(written, str) else written
    if items == ():
        raise ValueError("is an empty list (leave the parameter out to mean any value)")
    return items


def _value(text: str) -> str:
    if len(text) > _LONGEST or not text.isprintable():
        raise ValueError(f"{quoted(text)} is not a glob of values (up to {_LONGEST} printable characters)")
    return whole_glob(text)


def _document(path: str, info: ValidationInfo) -> str:
    if "://" in path:
        raise ValueError("must be the path of a file (the document is read here, and not fetched)")
    return host_path(path, info)


_VALUE = Annotated[str, AfterValidator(_value)]
_TEXTS = {"type": "string"}
_VALUES = Annotated[
    tuple[_VALUE, ...],
    BeforeValidator(_values),
    Field(max_length=MAX_VALUES),
    WithJsonSchema({"anyOf": [_TEXTS, {"type": "array", "items": _TEXTS, "minItems": 1}]}),
]


class OperationFile(Short):
    """An operation of a service that there is for the agent."""

    id: Annotated[str, AfterValidator(operation_id)]
    """Its `operationId`, or `METHOD /path` as the document has them."""
    parameters: Annotated[
        dict[Annotated[str, AfterValidator(_parameter)], _VALUES], Field(max_length=MAX_PARAMETERS)
    ] = {}
    """What its arguments may be: globs, by the name of a parameter, or `body.member` of a JSON body."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "An operationId, or METHOD /path.",
        "examples": ["listTickets", "GET /tickets/{id}"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        return {"id": text}

    def value(self) -> Operation:
        parameters = (Parameter(name, tuple(sorted(set(values)))) for name, values in self.parameters.items())
        return Operation(self.id, tuple(sorted(parameters, key=lambda parameter: parameter.name)))


_SIZES = WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": SIZE}], "examples": ["10MiB"]})


class ServiceFile(Entry):
    """An HTTP API, as its OpenAPI document describes it."""

    name: Label
    """What rules, calls and records call it."""
    document: Annotated[str, AfterValidator(_document), WithJsonSchema({"type": "string", "minLength": 1})]
    """The path of its OpenAPI document."""
    url: WebUrl
    """Its server; what the document says of servers is not used."""
    operations: Annotated[
        tuple[OperationFile, ...],
        Field(max_length=MAX_ENTRIES),
        distinct("operations", lambda operation: operation.id),
    ] = ()
    """What there is of it for the agent. What is not named does not exist."""
    credential: CredentialFile | None = None
    """What the broker puts into each request; nothing inside ever sees it."""
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = _DEFAULT.requests_per_minute
    """Requests within a minute."""
    concurrent: Annotated[int, Field(ge=1, le=1024)] = _DEFAULT.concurrent
    """Requests at one time."""
    time: Duration = _DEFAULT.time
    """Of one request."""
    bytes: Annotated[int, BeforeValidator(Size(KIB, GIB)), _SIZES] = _DEFAULT.bytes
    """Of one answer."""

    @model_validator(mode="after")
    def _fits(self) -> ServiceFile:
        if self.credential is not None and is_in_clear(self.url):
            raise ValueError(f"its `credential` {IN_CLEAR}")
        return self

    def value(self) -> Service:
        return Service(
            self.name,
            self.document,
            self.url,
            tuple(operation.value() for operation in self.operations),
            None if self.credential is None else self.credential.value(),
            self.requests_per_minute,
            self.concurrent,
            self.time,
            self.bytes,
        )


Services = Annotated[
    tuple[ServiceFile, ...],
    Field(max_length=MAX_SERVICES),
    distinct("services", lambda service: service.name),
]
