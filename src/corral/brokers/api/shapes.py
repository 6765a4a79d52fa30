"""Schemas of an OpenAPI document as JSON Schema 2020-12 that stands on its own.

A document of 3.0 says some things in its own way (``nullable``, a boolean ``exclusiveMinimum``); members that only
answers have (``readOnly``) are not required of a request. What cannot be said in JSON Schema as it is checked here
(:mod:`corral.brokers.schemas`) is an error: a check that is left out would let through what the document refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from corral.brokers.api.document import Document
from corral.brokers.schemas import Schema, check_schema
from corral.brokers.strict_json import Json
from corral.errors import RequestError
from corral.policy.document import escaped

MAX_SHAPES = 50_000
"""Schemas that the arguments of all operations are made of."""
MAX_TEXT = 1000
"""Characters of a description."""

_KEPT = frozenset(
    "const enum format maxItems maxLength maxProperties maximum minItems minLength minProperties minimum multipleOf "
    "pattern required type uniqueItems exclusiveMinimum exclusiveMaximum default dependentRequired minContains "
    "maxContains".split()
)
_ONE = ("items", "not", "additionalProperties", "contains", "propertyNames", "if", "then", "else")
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "dependentSchemas")
_REFUSED = frozenset(
    "$id $anchor $dynamicRef $dynamicAnchor $recursiveRef $recursiveAnchor patternProperties unevaluatedProperties "
    "unevaluatedItems".split()
)
_DEFINITIONS = "#/$defs/"
_NOT_NAME = re.compile(r"[^A-Za-z0-9_.-]")
_KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}
_MAX_WAY = 16


def told(text: object, limit: int = MAX_TEXT) -> str:
    """What somebody else has written, for a model to read: printable, except for line breaks, and not endless."""
    if not isinstance(text, str):
        return ""
    lines = (escaped(line) for line in text[:limit].replace("\r\n", "\n").split("\n"))
    return "\n".join(lines).strip() + ("..." if len(text) > limit else "")


class Shapes:
    """The schemas of one document, which share their definitions: each is read and checked once."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._names: dict[str, str] = {}
        self._waiting: list[str] = []
        self._count = 0
        self._definitions: dict[str, dict[str, Json]] = {}
        self._leads_to: dict[str, frozenset[str]] = {}

    def shape(self, schema: Json) -> dict[str, Json]:
        """Raises RequestError."""
        self._count += 1
        if self._count > MAX_SHAPES:
            raise RequestError("has schemas that are too large")
        if schema is True or schema is None:
            return {}
        if schema is False:
            return {"not": {}}
        if not isinstance(schema, dict):
            raise RequestError("has a schema that is none")
        if refused := sorted(_REFUSED.intersection(schema)):
            raise RequestError(f"has a schema with `{refused[0]}`, which is not taken here")
        if "$ref" in schema:
            reference: dict[str, Json] = {"$ref": _DEFINITIONS + self._name(schema["$ref"])}
            others = {} if self._document.is_old else {k: v for k, v in schema.items() if k != "$ref"}
            return {**self.shape(others), **reference} if others else reference
        found = {keyword: value for keyword, value in schema.items() if keyword in _KEPT}
        for keyword in _ONE:
            if keyword in schema:
                value = schema[keyword]
                found[keyword] = value if isinstance(value, bool) else self.shape(value)
        for keyword in _SEVERAL:
            if keyword in schema:
                found[keyword] = [self.shape(each) for each in _list(schema[keyword])]
        for keyword in _NAMED:
            if keyword in schema:
                found[keyword] = {name: self.shape(each) for name, each in _object(schema[keyword]).items()}
        for keyword in ("title", "description"):
            if text := told(schema.get(keyword)):
                found[keyword] = text
        self._without_answers(schema, found)
        if self._document.is_old:
            _modern(schema, found)
        return found

    def finish(self) -> None:
        """Completes the definitions. Raises RequestError."""
        while self._waiting:
            reference = self._waiting.pop()
            name, shape = self._names[reference], self.shape(self._document.at(reference))
            check_schema(shape)
            self._definitions[name], self._leads_to[name] = shape, frozenset(_references(shape))

    def definitions(self, *shapes: Mapping[str, Json]) -> dict[str, Json]:
        """What their references lead to. After :meth:`finish`."""
        found: dict[str, Json] = {}
        waiting = [name for shape in shapes for name in _references(shape)]
        while waiting:
            name = waiting.pop()
            if name not in found and name in self._definitions:
                found[name] = self._definitions[name]
                waiting.extend(self._leads_to[name])
        return dict(sorted(found.items()))

    def compiled(self, shape: Mapping[str, Json]) -> Schema:
        """After :meth:`finish`. Raises SchemaFault."""
        check_schema(shape)
        definitions = self.definitions(shape)
        return Schema({**shape, "$defs": definitions} if definitions else shape, is_checked=True)

    def kinds(self, shape: Mapping[str, Json]) -> frozenset[str]:
        """Which of JSON Schema's types its values may have; none where it does not say. After :meth:`finish`."""
        return self._kinds(shape, _MAX_WAY)

    def elements(self, shape: Mapping[str, Json]) -> frozenset[str]:
        """The same of the elements of an array."""
        for _ in range(_MAX_WAY):
            items = shape.get("items")
            if isinstance(items, dict):
                return self.kinds(items)
            target = self._target(shape)
            if target is None:
                break
            shape = target
        return frozenset()

    def _target(self, shape: Mapping[str, Json]) -> Mapping[str, Json] | None:
        reference = shape.get("$ref")
        if not isinstance(reference, str):
            return None
        return self._definitions.get(reference.removeprefix(_DEFINITIONS))

    def _kinds(self, shape: Mapping[str, Json], left: int) -> frozenset[str]:
        stated = shape.get("type")
        if isinstance(stated, str):
            return frozenset((stated,))
        if isinstance(stated, list):
            return frozenset(each for each in stated if isinstance(each, str))
        if isinstance(values := shape.get("enum"), list):
            return frozenset(_KINDS[type(value)] for value in values)
        if "const" in shape:
            return frozenset((_KINDS[type(shape["const"])],))
        if not left:
            return frozenset()
        if (target := self._target(shape)) is not None:
            return self._kinds(target, left - 1)
        if isinstance(every := shape.get("allOf"), list):
            for each in every:
                if isinstance(each, dict) and (found := self._kinds(each, left - 1)):
                    return found
        for keyword in ("anyOf", "oneOf"):
            if isinstance(choices := shape.get(keyword), list):
                sets = [self._kinds(each, left - 1) for each in choices if isinstance(each, dict)]
                return frozenset().union(*sets) if all(sets) else frozenset()
        return frozenset()

    def _name(self, reference: Json) -> str:
        if not isinstance(reference, str):
            raise RequestError("has a `$ref` that is no text")
        if reference not in self._names:
            base = _NOT_NAME.sub("_", reference.rpartition("/")[2])[:64] or "schema"
            taken = set(self._names.values())
            name, number = base, 2
            while name in taken:
                name, number = f"{base}-{number}", number + 1
            self._names[reference] = name
            self._waiting.append(reference)
        return self._names[reference]

    def _without_answers(self, schema: Mapping[str, Json], found: dict[str, Json]) -> None:
        required, properties = schema.get("required"), schema.get("properties")
        if isinstance(required, list) and isinstance(properties, dict):
            found["required"] = [name for name in required if not self._is_of_answers(properties.get(str(name)))]

    def _is_of_answers(self, schema: Json) -> bool:
        return isinstance(schema, dict) and self._document.resolved(schema).get("readOnly") is True


def _references(shape: Json | Mapping[str, Json]) -> Iterator[str]:
    """The names of definitions that are referred to; also those that data only looks like, where they are there."""
    waiting: list[Json | Mapping[str, Json]] = [shape]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting.extend(each)
        elif isinstance(each, Mapping):
            reference = each.get("$ref")
            if isinstance(reference, str) and reference.startswith(_DEFINITIONS):
                yield reference.removeprefix(_DEFINITIONS)
            waiting.extend(each.values())


def _modern(schema: Mapping[str, Json], found: dict[str, Json]) -> None:
    """What 3.0 says in its own way."""
    if schema.get("nullable") is True and isinstance(kind := found.get("type"), str):
        found["type"] = [kind, "null"]
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        flag = found.get(exclusive)
        if isinstance(flag, bool):
            del found[exclusive]
            if flag and bound in found:
                found[exclusive] = found.pop(bound)


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise RequestError("has a schema that is none")
    return value


def _object(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise RequestError("has a schema that is none")
    return value
