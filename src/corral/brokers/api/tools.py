"""Operations as tools of a model: a name, a schema of all arguments, and the way back from a tool's arguments."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from corral.brokers.api.shapes import MAX_TEXT, told
from corral.brokers.api.values import Argument, Asked, BodyKind, Media, Operation, Place
from corral.brokers.schemas import Schema
from corral.brokers.strict_json import Json

MAX_NAME = 64
"""Characters of a tool's name, as models' APIs have it."""
_NOT_NAME = re.compile(r"[^A-Za-z0-9_-]+")
_BODY = "body"


@dataclass(frozen=True, slots=True)
class Described:
    """One operation as a tool."""

    name: str
    description: str
    input_schema: Mapping[str, Json]
    schema: Schema
    """The same, compiled."""
    operation: Operation
    names: Mapping[str, Argument]
    """Which argument of the operation each of the tool's is."""
    body: str
    """The name of the one that is the body; empty where there is none."""
    media: Media | None

    def asked(self, arguments: Mapping[str, Json]) -> Asked:
        """What a call asks for."""
        values = {
            (argument.place, argument.name): arguments[name]
            for name, argument in self.names.items()
            if arguments.get(name) is not None
        }
        if self.media is None or self.body not in arguments:
            return Asked(values)
        body = arguments[self.body]
        if self.media.kind is BodyKind.TEXT:
            return Asked(values, self.media, self.media.type, str(body).encode("utf-8"))
        return Asked(values, self.media, self.media.type, body)


def described(service: str, operations: Sequence[Operation], taken: set[str]) -> Iterator[Described]:
    """All that can be tools: not those that need a body that a model cannot write. ``taken`` are the names that there
    are, and is added to."""
    for operation in operations:
        media = _media(operation)
        if operation.needs_body and media is None:
            continue
        yield _described(service, operation, media, taken)


def _media(operation: Operation) -> Media | None:
    for kind in (BodyKind.JSON, BodyKind.FORM, BodyKind.TEXT):
        for media in operation.media:
            if media.kind is kind and "*" not in media.type:
                return media
    return None


def _described(service: str, operation: Operation, media: Media | None, taken: set[str]) -> Described:
    names = _names(operation.arguments)
    properties: dict[str, Json] = {name: _property(argument) for name, argument in names.items()}
    required: list[Json] = [name for name, argument in names.items() if argument.is_required]
    body = ""
    if media is not None:
        body = _BODY if _BODY not in names else "request_body"
        properties[body] = {"type": "string"} if media.kind is BodyKind.TEXT else dict(media.shape)
        if operation.needs_body:
            required.append(body)
    schema: dict[str, Json] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    if operation.definitions:
        schema["$defs"] = dict(operation.definitions)
    return Described(
        _tool_name(service, operation.id, taken),
        _description(operation),
        schema,
        Schema(schema, is_checked=True),
        operation,
        names,
        body,
        media,
    )


def _names(arguments: Sequence[Argument]) -> dict[str, Argument]:
    """Two arguments of one name, at different places, are told apart by their place."""
    count: dict[str, int] = {}
    for argument in arguments:
        count[argument.name] = count.get(argument.name, 0) + 1
    found: dict[str, Argument] = {}
    for argument in arguments:
        name = argument.name if count[argument.name] == 1 else f"{argument.place.value}_{argument.name}"
        while name in found:
            name += "_"
        found[name] = argument
    return found


def _property(argument: Argument) -> Json:
    shape = dict(argument.shape)
    text = argument.description or told(shape.get("description"))
    if argument.values:
        text = f"{text}\n\nAllowed values: {', '.join(argument.values)}".strip()
    if argument.place is not Place.QUERY:
        text = f"{text} ({argument.place.value})".strip()
    return {**shape, "description": text} if text else shape


def _description(operation: Operation) -> str:
    text = told(operation.description) or f"{operation.method} {operation.template.text}"
    for constraint in operation.constraints:
        text += f"\n{constraint.name} may be: {', '.join(constraint.values)[:MAX_TEXT]}"
    return text


def _tool_name(service: str, operation: str, taken: set[str]) -> str:
    plain = _NOT_NAME.sub("_", f"{service}_{_NOT_NAME.sub('_', operation).strip('_')}")
    name = plain[:MAX_NAME]
    if len(plain) > MAX_NAME or name in taken:
        name = f"{plain[: MAX_NAME - 9]}_{hashlib.sha256(f'{service} {operation}'.encode()).hexdigest()[:8]}"
    taken.add(name)
    return name
