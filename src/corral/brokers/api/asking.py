"""Requests from inside, read: what they say as arguments of an operation, whatever it is. Checked later, all alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote_to_bytes

from corral.brokers.api.media import matching, media_type
from corral.brokers.api.values import Argument, Asked, BodyKind, Join, Media, Operation, Place, Problem
from corral.brokers.http import Request
from corral.brokers.strict_json import Json, NotJson, parse

MAX_PAIRS = 1000
"""Of one query or form."""
MAX_DEPTH = 32
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,30})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,30})(?:\.[0-9]{1,30})?(?:[eE][-+]?[0-9]{1,3})?")
_COOKIE_PAIR = re.compile(r"([-!#$%&'*+.^_`|~0-9A-Za-z]+)=([\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*)")


def read(operation: Operation, request: Request, path: Mapping[str, str]) -> Asked:
    """``path`` are the arguments in its path, decoded. Raises Problem."""
    found: dict[tuple[Place, str], list[str]] = {(Place.PATH, name): [value] for name, value in path.items()}
    for name, value in pairs(request.query, "the query"):
        found.setdefault((Place.QUERY, name), []).append(value)
    declared = {(each.place, each.name): each for each in operation.arguments}
    for raw_name, raw_value in request.headers:
        name = raw_name.decode("latin-1")
        if (Place.HEADER, name) in declared:  # others are not sent on
            found.setdefault((Place.HEADER, name), []).append(_field(name, raw_value))
        elif raw_name == b"cookie":
            for name, value in _cookies(raw_value):
                if (Place.COOKIE, name) in declared:
                    found.setdefault((Place.COOKIE, name), []).append(value)
    values: dict[tuple[Place, str], Json] = {}
    for (place, name), texts in found.items():
        argument = declared.get((place, name))
        if argument is None:
            raise Problem(400, f"This operation has no parameter {shown(name)} in its {place.value}.")
        values[place, name] = value_of(argument, texts)
    media, type_, body = _body(operation, request)
    return Asked(values, media, type_, body)


def pairs(text: str, what: str) -> Iterator[tuple[str, str]]:
    """Of a query or a form, decoded once. Raises Problem."""
    if not text:
        return
    if _BROKEN_ESCAPE.search(text) or not text.isascii() or not text.isprintable():
        raise Problem(400, f"There is something in {what} that is not encoded as it must be.")
    parts = text.split("&")
    if len(parts) > MAX_PAIRS:
        raise Problem(400, f"There are more than {MAX_PAIRS} parameters in {what}.")
    for part in parts:
        name, _, value = part.partition("=")
        try:
            pair = tuple(unquote_to_bytes(each.replace("+", " ")).decode("utf-8") for each in (name, value))
        except UnicodeDecodeError:
            raise Problem(400, f"There is something in {what} that is not UTF-8.") from None
        if not pair[0] or "\x00" in pair[0] + pair[1]:
            raise Problem(400, f"There is a parameter without a name, or a NUL, in {what}.")
        yield pair[0], pair[1]


def value_of(argument: Argument, texts: list[str]) -> Json:
    """The value that its texts stand for. Raises Problem."""
    if not argument.is_array:
        if len(texts) > 1:
            raise Problem(400, f"The parameter {shown(argument.name)} is there more than once.")
        return _plain(argument, texts[0])
    if argument.join is Join.REPEATED:
        return [_plain(argument, text) for text in texts]
    if len(texts) > 1:
        raise Problem(400, f"The parameter {shown(argument.name)} is there more than once.")
    # Whether the delimiter was encoded makes no difference here, as it makes none to many servers.
    elements = texts[0].split(argument.join.value) if texts[0] else []
    if argument.place is Place.HEADER:
        elements = [each.strip(" \t") for each in elements]
    return [_plain(argument, element) for element in elements]


def _plain(argument: Argument, text: str) -> Json:
    if "integer" in argument.kinds and _INTEGER.fullmatch(text):
        return int(text)
    if "number" in argument.kinds and _NUMBER.fullmatch(text):
        value = parse(text.encode("ascii")) if abs(float(text)) != float("inf") else None
        if value is not None:
            return value
    if "boolean" in argument.kinds and text in ("true", "false"):
        return text == "true"
    if "string" in argument.kinds:
        return text
    kinds = " or ".join(sorted(argument.kinds))
    raise Problem(400, f"The parameter {shown(argument.name)} is no {kinds}.")


def _field(name: str, value: bytes) -> str:
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        raise Problem(400, f"The header {shown(name)} is not ASCII.") from None


def _cookies(value: bytes) -> Iterator[tuple[str, str]]:
    for part in value.decode("latin-1").split(";"):
        found = _COOKIE_PAIR.fullmatch(part.strip(" \t"))
        if found is None:
            raise Problem(400, "The header cookie is none.")
        yield found[1], found[2]


# ---- bodies ----


def _body(operation: Operation, request: Request) -> tuple[Media | None, str, Json | bytes]:
    if not request.body:
        return None, "", None
    if not operation.media:
        raise Problem(400, "This operation takes no body.")
    types = [value for name, value in request.headers if name == b"content-type"]
    type_ = media_type(types[0].decode("latin-1")) if len(types) == 1 else None
    media = matching(operation.media, type_) if type_ else None
    if media is None or type_ is None:
        known = ", ".join(each.type for each in operation.media)
        raise Problem(415, f"The body of this operation is one of: {known}.")
    return media, type_, _content(media, request.body)


def _content(media: Media, body: bytes) -> Json | bytes:
    match media.kind:
        case BodyKind.JSON:
            try:
                return parse(body, depth=MAX_DEPTH)
            except NotJson as problem:
                raise Problem(400, f"The body is no JSON that is taken here: {problem}.") from None
        case BodyKind.FORM:
            return _form(body)
        case BodyKind.TEXT:
            try:
                body.decode("utf-8")
            except UnicodeDecodeError:
                raise Problem(400, "The body is not UTF-8.") from None
    return body


def _form(body: bytes) -> Json:
    """An object of texts, and of arrays where a name is there more than once."""
    found: dict[str, Json] = {}
    for name, value in pairs(body.decode("latin-1"), "the body"):
        before = found.get(name)
        if before is None:
            found[name] = value
        elif isinstance(before, list):
            before.append(value)
        else:
            found[name] = [before, value]
    return found


def shown(name: str) -> str:
    """What somebody has called something, in a sentence of ours."""
    cut = name[:60]
    return f"`{cut if cut.isprintable() else cut.encode('unicode_escape').decode('ascii')}`"
