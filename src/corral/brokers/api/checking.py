"""Whether a call is one that its operation and the policy allow, and the request that is sent then.

The order: what is required is there, each value is as the document's schema says, and as the policy's globs say. What
is sent is written from the values that were checked. A constraint means *all* values that its name leads to: each
element of an array, and each object of an array on the way. Where a constrained value is missing (or null, or an empty
array), a server would take one of its own choice: refused, unless one of the globs names the empty text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from urllib.parse import quote

from corral.brokers.api.asking import shown
from corral.brokers.api.paths import PathFault
from corral.brokers.api.values import (
    Argument,
    Asked,
    BodyKind,
    Constraint,
    Join,
    Media,
    Operation,
    Outgoing,
    Place,
    Problem,
)
from corral.brokers.strict_json import Json, NotJson, check, write
from corral.policy.matching import Matcher, text_glob

MAX_TARGET = 8 * 1024
"""Bytes of path and query; servers take heads of 8 KiB and more."""
MAX_HEADER = 4 * 1024
_PLAIN_TYPES = (str, int, float, bool)


async def outgoing(operation: Operation, asked: Asked) -> Outgoing:
    """Raises Problem."""
    texts: dict[tuple[Place, str], list[str]] = {}
    for argument in operation.arguments:
        texts[argument.place, argument.name] = await _argument(operation, argument, asked)
    for place, name in asked.values:
        if (place, name) not in texts:
            raise Problem(400, f"This operation has no parameter {shown(name)} in its {place.value}.")
    body = await _body(operation, asked)
    for constraint in operation.constraints:
        _constrain(operation, constraint, asked.body)
    return Outgoing(
        operation.method,
        _target(operation, texts),
        tuple(_headers(operation, texts, asked)),
        body,
        _arguments(operation, asked),
    )


# ---- one argument ----


async def _argument(operation: Operation, argument: Argument, asked: Asked) -> list[str]:
    """Its texts, as they are sent; none where it is not there."""
    name, value = argument.name, asked.values.get((argument.place, argument.name))
    if value is None:
        if argument.is_required:
            raise Problem(400, f"The parameter {shown(name)} is missing.")
        _allow(operation, argument.name, argument.values, ())
        return []
    if problem := await argument.schema.check(value):
        raise Problem(400, f"The parameter {shown(name)} is not as it must be: {problem}.")
    elements = value if isinstance(value, list) else [value]
    if isinstance(value, list) is not argument.is_array or not all(isinstance(each, _PLAIN_TYPES) for each in elements):
        raise Problem(400, f"The parameter {shown(name)} has a value that cannot be sent.")
    texts = [text_of(each) for each in elements]
    for text in texts:
        _carry(argument, text)
    _allow(operation, name, argument.values, texts)
    return texts


def text_of(value: Json) -> str:
    """A plain value as it stands in a request."""
    return value if isinstance(value, str) else write(value).decode("ascii")


def _carry(argument: Argument, text: str) -> None:
    """Whether a text can be sent where its argument stands, and be read as that text only."""
    if "\x00" in text:
        raise Problem(400, f"The parameter {shown(argument.name)} holds a NUL.")
    if argument.is_array and argument.join is not Join.REPEATED and (not text or argument.join.value in text):
        raise Problem(400, f"The parameter {shown(argument.name)} has an element that is empty or holds its delimiter.")
    if argument.place is Place.HEADER:
        is_carried = text.isascii() and text.isprintable() and text == text.strip() and len(text) <= MAX_HEADER
    elif argument.place is Place.COOKIE:
        is_carried = text.isascii() and text.isprintable() and not set(text) & set(' ",;\\') and len(text) <= MAX_HEADER
    else:
        return
    if not is_carried:
        raise Problem(400, f"The parameter {shown(argument.name)} has a value that a header cannot carry.")


# ---- constraints ----


@lru_cache(4096)
def _globs(values: tuple[str, ...]) -> tuple[Matcher, ...]:
    return tuple(map(text_glob, values))


def _allow(operation: Operation, name: str, values: tuple[str, ...], texts: Sequence[str]) -> None:
    if not values:
        return
    globs = _globs(values)
    for text in texts or ("",):
        if not any(glob(text) for glob in globs):
            allowed = ", ".join(values[:10]) + (", ..." if len(values) > 10 else "")
            what = f"have the value {shown(text)}" if text else "be missing or empty"
            raise Problem(403, f"The policy does not let {shown(name)} {what}. It may be: {allowed}.", operation.rule)


def _constrain(operation: Operation, constraint: Constraint, body: Json | bytes) -> None:
    for value in (None,) if isinstance(body, bytes) else _members(body, constraint.way):
        elements = value if isinstance(value, list) else [value]
        if not all(isinstance(each, (*_PLAIN_TYPES, type(None))) for each in elements):
            raise Problem(403, f"The policy wants {shown(constraint.name)} to be a plain value.", operation.rule)
        _allow(
            operation, constraint.name, constraint.values, ["" if each is None else text_of(each) for each in elements]
        )


def _members(value: Json, way: tuple[str, ...]) -> Iterator[Json]:
    """All that a way leads to; None where it ends before. Raises Problem where other readers might find more."""
    if not way:
        yield value
    elif isinstance(value, list):
        if not value:
            yield None
        for each in value:
            yield from _members(each, way)
    elif isinstance(value, dict):
        name, *rest = way
        readings = _readings(name)
        if any(each != name and readings & _readings(each) for each in value):
            raise Problem(400, f"The body has several members {shown(name)}, in other letters.")
        yield from _members(value.get(name), tuple(rest)) if name in value else (None,)
    else:
        yield None


def _readings(name: str) -> frozenset[str]:
    """Equal in one for names that some reader takes for one: who does not look at case, at ``-`` and ``_``, who takes
    ``name[x]`` and ``name.x`` for members of ``name``, or dots and spaces for ``_`` (PHP)."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return frozenset(
        part.translate(_LITTLE) for part in (re.split(r"[\[.]", plain, maxsplit=1)[0], plain.partition("[")[0])
    )


_LITTLE = dict.fromkeys(map(ord, "-_. "))


# ---- what is sent ----


async def _body(operation: Operation, asked: Asked) -> bytes | None:
    media, body = asked.media, asked.body
    if media is None:
        if operation.needs_body:
            raise Problem(400, "This operation needs a body.")
        return None
    if isinstance(body, bytes):
        return body
    try:
        check(body)
    except NotJson as problem:
        raise Problem(400, f"The body is nothing that can be sent: {problem}.") from None
    if wrong := await _wrong(media, body):
        raise Problem(400, f"The body is not as it must be: {wrong}.")
    return write(body) if media.kind is BodyKind.JSON else _form(body).encode("ascii")


async def _wrong(media: Media, body: Json) -> str | None:
    if media.schema is None:
        return None
    if media.kind is BodyKind.JSON:
        return await media.schema.check(body)
    return await media.schema.check(_typed(media, body))


def _typed(media: Media, body: Json) -> Json:
    """A form's texts as the values that its schema means, as far as that says so at its first level."""
    properties = media.shape.get("properties")
    if not isinstance(body, dict) or not isinstance(properties, dict):
        return body
    return {name: _form_value(properties.get(name), value) for name, value in body.items()}


def _form_value(shape: Json, value: Json) -> Json:
    kind = shape.get("type") if isinstance(shape, dict) else None
    if kind == "array":
        items = shape.get("items") if isinstance(shape, dict) else None
        return [_form_value(items, each) for each in (value if isinstance(value, list) else [value])]
    if not isinstance(value, str):
        return value
    if kind in ("integer", "number") and value.isascii():
        try:
            number = float(value) if kind == "number" else int(value)
        except ValueError:
            return value
        return number if str(number) == value or kind == "number" else value
    return value == "true" if kind == "boolean" and value in ("true", "false") else value


def _form(body: Json) -> str:
    if not isinstance(body, dict):
        raise Problem(400, "A form is an object.")
    written = []
    for name, value in body.items():
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, _PLAIN_TYPES):
                raise Problem(400, f"The member {shown(name)} of the form is no plain value.")
            written.append(f"{_encoded(name)}={_encoded(text_of(each))}")
    return "&".join(written)


def _encoded(text: str) -> str:
    return quote(text, safe="")


def _target(operation: Operation, texts: Mapping[tuple[Place, str], list[str]]) -> str:
    path = {name: ",".join(found) for (place, name), found in texts.items() if place is Place.PATH}
    try:
        target = operation.template.written(path)
    except PathFault as fault:
        raise Problem(400, f"{str(fault).capitalize()}.") from None
    query = "&".join(
        part
        for argument in operation.arguments
        if argument.place is Place.QUERY
        for part in _query(argument, texts[Place.QUERY, argument.name])
    )
    if len(target) + len(query) > MAX_TARGET:
        raise Problem(414, f"Path and query have at most {MAX_TARGET} bytes.")
    return f"{target}?{query}" if query else target


def _query(argument: Argument, texts: list[str]) -> Iterator[str]:
    name = _encoded(argument.name)
    if not argument.is_array or argument.join is Join.REPEATED:
        yield from (f"{name}={_encoded(text)}" for text in texts)
    elif texts:
        delimiter = {Join.COMMA: ",", Join.SPACE: "%20", Join.PIPE: "%7C"}[argument.join]
        yield f"{name}={delimiter.join(map(_encoded, texts))}"


def _headers(
    operation: Operation, texts: Mapping[tuple[Place, str], list[str]], asked: Asked
) -> Iterator[tuple[str, str]]:
    cookies = []
    for argument in operation.arguments:
        found = texts[argument.place, argument.name]
        if argument.place is Place.HEADER and found:
            yield argument.name, ",".join(found)
        elif argument.place is Place.COOKIE and found:
            cookies.append(f"{argument.name}={found[0]}")
    if cookies:
        yield "cookie", "; ".join(cookies)
    if asked.media is not None:
        yield "content-type", asked.media_type + ("; charset=utf-8" if asked.media.kind is BodyKind.TEXT else "")


def _arguments(operation: Operation, asked: Asked) -> bytes:
    told: dict[str, Json] = {"operation": operation.id}
    for place in Place:
        if values := {name: value for (each, name), value in asked.values.items() if each is place}:
            told[place.value] = values
    if isinstance(asked.body, bytes):
        told["body"] = asked.body.decode("utf-8", "backslashreplace")
    elif asked.media is not None:
        told["body"] = asked.body
    return write(told)
