"""The operations that a policy names, found in a document and understood, or an error of the policy's.

What is not understood of an operation does not exist: a parameter in a form that is not known here is left out where it
is optional, and an error where it is not. Parameters by which a request could be taken for another one (framing,
credentials, "method override") are never taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from corral.brokers.api.document import Document
from corral.brokers.api.media import kind_of, media_type
from corral.brokers.api.paths import PathFault, Paths, Template, template
from corral.brokers.api.shapes import Shapes, told
from corral.brokers.api.values import Argument, BodyKind, Constraint, Join, Media, Operation, Place
from corral.brokers.schemas import SchemaFault
from corral.brokers.strict_json import Json
from corral.errors import RequestError
from corral.policy.model import Operation as Named
from corral.policy.model import Service

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
MAX_PARAMETERS = 256
"""Of one operation."""
MAX_NAME = 128
_TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]{1,128}")
_PRINTABLE = re.compile(r"[^\x00-\x20\x7f-\xa0]{1,128}")
_PLAIN_KINDS = frozenset(("string", "integer", "number", "boolean", "null"))
_NEVER = frozenset(
    "accept accept-encoding accept-charset authorization connection content-encoding content-length content-range "
    "content-type cookie expect forwarded from host http2-settings keep-alive max-forwards origin proxy-authenticate "
    "proxy-authorization proxy-connection range referer te trailer transfer-encoding upgrade user-agent via "
    "x-accel-redirect x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-proto x-forwarded-prefix "
    "x-forwarded-server x-http-method x-http-method-override x-method-override x-original-method x-original-uri "
    "x-original-url x-real-ip x-rewrite-url x-sendfile".split()
)
"""Headers that frame a message, say who asks, or have some servers take it for another one."""
_OVERRIDES = frozenset(("_method", "_httpmethod", "x-http-method", "x-http-method-override", "x-method-override"))
"""Names in a query that do."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A service, read."""

    paths: Paths
    operations: tuple[Operation, ...]
    places: frozenset[tuple[str, str]]
    """All paths and methods of the document."""

    def has(self, path: str, method: str) -> bool:
        """Whether the document has an operation there."""
        return (path, method) in self.places


class Reader:
    """Reads one service. ``rule`` is where the policy has it."""

    def __init__(self, document: Document, service: Service, rule: str, secret_header: str) -> None:
        """``secret_header`` is what the credential is put into, in lower case; empty where there is none."""
        self._document, self._service, self._rule = document, service, rule
        self._never = _NEVER | {secret_header.replace("_", "-")}
        self._places = dict(self._all_places())
        self._shapes = Shapes(document)

    def read(self) -> Declared:
        """Raises RequestError, which says what of the document it is about."""
        operations: list[Operation] = []
        seen: set[tuple[str, str]] = set()
        for index, named in enumerate(self._service.operations):
            try:
                path, method, body = self._found(named.id)
                if (path, method) in seen:
                    raise RequestError("is named twice, by its id and by its path")
                seen.add((path, method))
                operations.append(self._operation(named, f"{self._rule}.operations[{index}]", path, method, body))
            except SchemaFault as fault:
                raise RequestError(f"operation {named.id!r} has a schema that {fault}") from None
            except RequestError as error:
                raise RequestError(f"operation {named.id!r} {error}") from None
        places = frozenset((path, method.upper()) for path, method in self._places)
        return Declared(Paths(self._templates()), tuple(operations), places)

    # ---- where they are ----

    def _all_places(self) -> Iterator[tuple[tuple[str, str], tuple[dict[str, Json], dict[str, Json]]]]:
        """All operations of the document, by path and method, each with its path's item."""
        paths = self._document.root.get("paths", {})
        if not isinstance(paths, dict):
            raise RequestError("has no paths")
        for path, written in paths.items():
            if path.startswith("x-"):
                continue
            item = self._document.resolved(written)
            for method in METHODS:
                if isinstance(operation := item.get(method), dict):
                    yield (path, method), (item, operation)

    def _found(self, wanted: str) -> tuple[str, str, dict[str, Json]]:
        method, space, path = wanted.partition(" ")
        if space:
            if (path, method.lower()) not in self._places:
                raise RequestError("is not in the document")
            return path, method.lower(), self._places[path, method.lower()][1]
        found = [place for place, (_, operation) in self._places.items() if operation.get("operationId") == wanted]
        if not found:
            raise RequestError("is not in the document")
        if len(found) > 1:
            raise RequestError("is in the document more than once")
        return *found[0], self._places[found[0]][1]

    def _templates(self) -> Iterator[Template]:
        for path in dict.fromkeys(path for path, _ in self._places):
            try:
                yield template(path)
            except PathFault:  # nobody can ask for it, and it stands in nobody's way
                continue

    # ---- what they are ----

    def _operation(self, named: Named, rule: str, path: str, method: str, body: dict[str, Json]) -> Operation:
        try:
            where = template(path)
        except PathFault as fault:
            raise RequestError(f"has a path that is not taken: {fault}") from None
        shapes = self._shapes
        written = list(self._parameters(self._places[path, method][0], body))
        shaped = [(parameter, shapes.shape(parameter.get("schema"))) for parameter in written]
        needs_body, bodies = self._bodies(shapes, body, method)
        shapes.finish()
        arguments = tuple(
            argument
            for parameter, shape in shaped
            if (argument := self._argument(shapes, parameter, shape)) is not None
        )
        names = {
            (each.place, each.name.replace("_", "-") if each.place is Place.HEADER else each.name) for each in arguments
        }
        if len(names) != len(arguments):
            raise RequestError("has two headers that are one to most servers")
        missing = set(where.names) - {each.name for each in arguments if each.place is Place.PATH}
        if missing:
            raise RequestError(
                f"does not declare {sorted(missing)[0]!r} of its path, or not in a form that is known here"
            )
        media = tuple(
            Media(type_, kind, shapes.compiled(shape), shape)
            if kind in (BodyKind.JSON, BodyKind.FORM)
            else Media(type_, kind, None, shape)
            for type_, kind, shape in bodies
        )
        if needs_body and not media:
            raise RequestError("needs a body of a media type that is not known here")
        arguments, constraints = _constrained(named, arguments, media)
        description = "\n\n".join(text for name in ("summary", "description") if (text := told(body.get(name))))
        return Operation(
            named.id,
            method.upper(),
            where,
            arguments,
            media,
            needs_body,
            constraints,
            shapes.definitions(*(each.shape for each in arguments), *(each.shape for each in media)),
            description,
            rule,
        )

    def _parameters(self, item: Mapping[str, Json], body: Mapping[str, Json]) -> Iterator[dict[str, Json]]:
        """An operation's own go before those of its path."""
        found: dict[tuple[Json, Json], dict[str, Json]] = {}
        for level in (item, body):
            listed = level.get("parameters", [])
            if not isinstance(listed, list) or len(listed) > MAX_PARAMETERS:
                raise RequestError("has parameters that are no list, or too many")
            own: dict[tuple[Json, Json], dict[str, Json]] = {}
            for each in listed:
                parameter = self._document.resolved(each)
                name, place = parameter.get("name"), parameter.get("in")
                if not isinstance(name, str) or not isinstance(place, str) or (name, place) in own:
                    raise RequestError("has a parameter without a name or a place, or one twice")
                own[name, place] = parameter
            found.update(own)
        yield from found.values()

    def _argument(self, shapes: Shapes, parameter: Mapping[str, Json], shape: dict[str, Json]) -> Argument | None:
        """None for what is left out."""
        name, place = str(parameter["name"]), Place(parameter["in"]) if parameter["in"] in _PLACES else None
        is_required = parameter.get("required") is True or place is Place.PATH
        if place is Place.HEADER:
            name = name.lower()
            if name.replace("_", "-") in self._never or not name.isascii():
                return None  # OpenAPI, "Parameter Object": the first three of them are ignored
        in_head = place in (Place.HEADER, Place.COOKIE)
        is_plain = bool((_TOKEN if in_head else _PRINTABLE).fullmatch(name)) and name.lower() not in _OVERRIDES
        kinds = shapes.kinds(shape)
        is_array = "array" in kinds
        elements = shapes.elements(shape) if is_array else kinds
        join = _join(parameter, place, is_array=is_array)
        is_known = is_plain and elements <= _PLAIN_KINDS and (not is_array or kinds <= {"array", "null"})
        if place is None or join is None or not is_known or "schema" not in parameter:
            if is_required:
                raise RequestError(f"needs the parameter {name[:MAX_NAME]!r}, which has a form that is not known here")
            return None
        return Argument(
            name,
            place,
            is_required,
            is_array,
            join,
            (elements - {"null"}) or frozenset(("string",)),
            shapes.compiled(shape),
            shape,
            told(parameter.get("description")),
        )

    def _bodies(
        self, shapes: Shapes, body: Mapping[str, Json], method: str
    ) -> tuple[bool, list[tuple[str, BodyKind, dict[str, Json]]]]:
        if "requestBody" not in body or method in ("get", "head", "trace"):  # RFC 9110, section 9.3: it means nothing
            return False, []
        described = self._document.resolved(body["requestBody"])
        content = described.get("content", {})
        if not isinstance(content, dict):
            raise RequestError("has a body without media types")
        found = []
        for written, described_media in content.items():
            type_ = media_type(written, ranges=True)
            if type_ is None or (kind := kind_of(type_)) is None:
                continue
            media = self._document.resolved(described_media)
            found.append((type_, kind, shapes.shape(media.get("schema"))))
        return described.get("required") is True, found


_PLACES = frozenset(place.value for place in Place)


def _join(parameter: Mapping[str, Json], place: Place | None, *, is_array: bool) -> Join | None:
    """None for a form that is not known here."""
    style = parameter.get("style")
    explode = parameter.get("explode")
    if place in (Place.PATH, Place.HEADER):
        return Join.COMMA if style in (None, "simple") else None
    if place is Place.COOKIE:
        return Join.REPEATED if style in (None, "form") and not is_array else None
    if style in (None, "form"):
        return Join.COMMA if explode is False else Join.REPEATED
    if not is_array:
        return None
    if explode is True:
        return Join.REPEATED if style in ("spaceDelimited", "pipeDelimited") else None
    return {"spaceDelimited": Join.SPACE, "pipeDelimited": Join.PIPE}.get(str(style))


def _constrained(
    named: Named, arguments: tuple[Argument, ...], media: tuple[Media, ...]
) -> tuple[tuple[Argument, ...], tuple[Constraint, ...]]:
    """With what the policy says of them. Raises RequestError for what is not there."""
    globs = {parameter.name: parameter.values for parameter in named.parameters}
    known = {each.name for each in arguments}
    constraints = []
    for name, values in globs.items():
        if name in known or _is_header(name.lower(), arguments):
            continue
        first, *way = name.split(".")
        if first != "body" or not way or "" in way:
            raise RequestError(f"has no parameter {name!r} that is known here")
        if not media or any(each.kind not in (BodyKind.JSON, BodyKind.FORM) for each in media):
            raise RequestError(f"takes a body in which {name!r} cannot be looked for")
        constraints.append(Constraint(name, tuple(way), values))
    limited = tuple(replace(each, values=_values(each, globs)) for each in arguments)
    return limited, tuple(constraints)


def _is_header(name: str, arguments: tuple[Argument, ...]) -> bool:
    return any(each.name == name and each.place is Place.HEADER for each in arguments)


def _values(argument: Argument, globs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Of all that mean it, together: the names of headers have no case."""
    if argument.place is not Place.HEADER:
        return globs.get(argument.name, ())
    found = [values for name, values in globs.items() if name.lower() == argument.name]
    return tuple(each for values in found for each in values)
