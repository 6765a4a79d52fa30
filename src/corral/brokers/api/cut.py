"""A document cut down to what there is of a service, for agents to read: its operations, and what they refer to.

Its servers, its security and all that leads elsewhere are left out: requests go to the broker, which has the
credential.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from corral.brokers.api.document import MAX_VALUES, Document
from corral.brokers.api.values import Argument, Operation, Place
from corral.brokers.strict_json import Json, NotJson, check
from corral.errors import RequestError
from corral.policy.document import escaped

_COMPONENT = re.compile(r"#/components/([A-Za-z]+)/([A-Za-z0-9._-]+)")
_OF_OPERATION = ("operationId", "summary", "description", "deprecated", "requestBody", "responses")
_LEFT_OUT = frozenset(("servers", "security", "callbacks", "links", "externalDocs", "webhooks", "examples", "example"))
"""Wherever they stand as a member of the document's own objects; in schemas the last two are examples only."""
_DEEPEST = 64
_OF_INFO = ("title", "version", "description", "summary")
_NAMING = frozenset(
    ("properties", "responses", "content", "headers", "schemas", "dependentSchemas", "$defs", "mapping")
)


class Cutter:
    """Cuts one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._waiting: list[tuple[str, str]] = []
        self._components: dict[str, Json] = {}
        self._count = 0

    def cut(self, operations: tuple[Operation, ...], url: str) -> dict[str, Json]:
        """``url`` is where the service is inside. Raises RequestError."""
        paths: dict[str, Json] = {}
        for operation in operations:
            item = paths.setdefault(operation.template.text, {})
            if isinstance(item, dict):
                item[operation.method.lower()] = self._operation(operation)
        self._complete()
        info = self._document.root.get("info")
        about = {name: value for name, value in info.items() if name in _OF_INFO} if isinstance(info, dict) else {}
        cut: dict[str, Json] = {
            "openapi": self._document.root["openapi"],
            "info": {"title": "", "version": "", **self._copied(about, 0)},
            "servers": [{"url": url}],
            "paths": paths,
        }
        if self._components:
            cut["components"] = self._components
        try:
            check(cut, values=MAX_VALUES, depth=2 * _DEEPEST)
        except NotJson as problem:
            raise RequestError(f"cannot be cut down to its operations: {problem}") from None
        return cut

    def _operation(self, operation: Operation) -> dict[str, Json]:
        item = self._document.resolved(self._paths()[operation.template.text])
        written = self._document.resolved(item[operation.method.lower()])
        found = self._copied({name: written[name] for name in _OF_OPERATION if name in written}, 0)
        taken = {(each.place.value, each.name): each for each in operation.arguments}
        parameters: dict[tuple[str, str], Json] = {}
        for level in (item, written):
            listed = level.get("parameters", [])
            for each in listed if isinstance(listed, list) else []:
                parameter = self._document.resolved(each)
                place, name = str(parameter.get("in")), str(parameter.get("name"))
                argument = taken.get((place, name.lower() if place == Place.HEADER.value else name))
                if argument is not None:
                    parameters[place, name] = {**self._copied(parameter, 0), **_limits(argument)}
        if parameters:
            found["parameters"] = list(parameters.values())
        if operation.constraints:
            limits = "; ".join(f"{each.name}: {', '.join(each.values)}" for each in operation.constraints)
            found["description"] = f"{found.get('description', '')}\n\nAllowed values: {limits}".strip()
        return found

    def _paths(self) -> Mapping[str, Json]:
        paths = self._document.root["paths"]
        return paths if isinstance(paths, dict) else {}

    def _copied(self, value: Mapping[str, Json], depth: int, *, are_names: bool = False) -> dict[str, Json]:
        """``are_names``: its members are named by whoever wrote it (properties, responses), and mean nothing here."""
        self._count += 1
        if depth > _DEEPEST or self._count > MAX_VALUES:
            raise RequestError("cannot be cut down to its operations: it is too large")
        reference = None if are_names else value.get("$ref")
        if isinstance(reference, str):
            if found := _COMPONENT.fullmatch(reference):
                self._waiting.append((found[1], found[2]))
                return dict(value)
            target = self._document.at(reference)
            return self._copied(target, depth + 1) if isinstance(target, dict) else {}
        copied: dict[str, Json] = {}
        for name, each in value.items():
            if not are_names and (name in _LEFT_OUT or name.startswith("x-")):
                continue
            copied[name] = self._each(each, depth + 1, are_names=not are_names and name in _NAMING)
        return copied

    def _each(self, value: Json, depth: int, *, are_names: bool) -> Json:
        if isinstance(value, dict):
            return self._copied(value, depth, are_names=are_names)
        if isinstance(value, list):
            return [self._each(each, depth + 1, are_names=False) for each in value]
        return _told(value) if isinstance(value, str) else value

    def _complete(self) -> None:
        done: set[tuple[str, str]] = set()
        while self._waiting:
            kind, name = place = self._waiting.pop()
            if place in done:
                continue
            done.add(place)
            target = self._document.at(f"#/components/{kind}/{name}")
            of_kind = self._components.setdefault(kind, {})
            if isinstance(of_kind, dict) and isinstance(target, dict):
                of_kind[name] = self._copied(target, 0)


def _limits(argument: Argument) -> dict[str, Json]:
    if not argument.values:
        return {}
    text = f"{argument.description}\n\nAllowed values: {', '.join(argument.values)}"
    return {"description": text.strip()}


def _told(text: str) -> str:
    """Printable; data (``enum``, ``pattern``) is so anyway, or is not understood by anybody."""
    return "\n".join(escaped(line) for line in text.split("\n"))
