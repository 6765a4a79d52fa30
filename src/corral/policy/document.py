"""A policy file as plain values that know their place; what the values mean is not known here.

Two stages, each of which distrusts the one before:

1. *Text.* At most 1 MiB of UTF-8. Characters that make a file look other than it is (control characters, bidirectional
   overrides, exotic line ends) are refused before YAML sees them, so that line numbers are those of any editor.
2. *YAML* becomes plain values. The file may be hostile: aliases, anchors, merge keys, duplicate names, tags outside the
   core and deep nesting are refused. Scalars follow YAML 1.2: ``no`` is text, ``010`` is text.

Faults are collected, not raised, so that all of them can be told at once; what a message echoes is escaped and bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from corral.errors import PolicyError
from corral.policy.model import KIB, MIB

MAX_BYTES = MIB
"""Bytes of UTF-8 in one policy file."""
MAX_DEPTH = 16
"""Levels of nesting; a valid policy has nine."""
MAX_NODES = 20_000
"""Names and values in one policy file."""
MAX_PROBLEMS = 100
"""Faults listed in one :class:`PolicyError`; the rest are counted in a last line."""
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


# --- Faults, and how they are shown ---------------------------------------------------------------------------------

Route = tuple[str | int, ...]
"""The way from the top of the document to one value: field names and list positions."""
Place = tuple[int, int]
"""Line and column, both from 1."""


@dataclass(frozen=True, slots=True)
class Fault:
    place: Place
    field: str
    message: str


def policy_error(source: str, faults: list[Fault]) -> PolicyError:
    faults = sorted(faults, key=lambda fault: fault.place)
    name = escaped(source)
    problems = []
    for fault in faults[:MAX_PROBLEMS]:
        field = f"{fault.field}: " if fault.field else ""
        problems.append(f"{name}:{fault.place[0]}: {field}{fault.message}")
    if len(faults) > MAX_PROBLEMS:
        problems.append(f"{name}:{faults[MAX_PROBLEMS].place[0]}: and {len(faults) - MAX_PROBLEMS} more problems")
    return PolicyError(problems)


def escaped(text: str) -> str:
    """``text``, safe for a terminal: what is not printable becomes a backslash escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted(text: str, limit: int = 60) -> str:
    """``text`` in quotes, escaped and bounded; what follows a ``=`` may be a secret and is left out."""
    name, equals, _ = text.partition("=")
    cut = name[:limit]
    return f"{cut!r}..." if len(name) > limit else repr(f"{name}=...") if equals else repr(name)


def field_name(route: Route) -> str:
    text = ""
    for part in route:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _PLAIN_NAME.fullmatch(part) and len(part) <= 60 else quoted(part)
            text += f".{name}" if text else name
    return text


# --- Stage 1: text --------------------------------------------------------------------------------------------------

TOO_LARGE = f"it is larger than {MAX_BYTES // KIB} KiB"
_UNWELCOME = re.compile(
    r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"  # what YAML refuses, BOM
    r"|[\u2028\u2029]|\r(?!\n)"  # line ends for YAML, but not for an editor
    r"|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # text shown in another order than it is read
)


def check_text(text: str, faults: list[Fault]) -> None:
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        faults.append(Fault((1, 1), "", f"cannot read the policy: {TOO_LARGE}"))
        return
    if not _UNWELCOME.search(text):
        return
    for number, line in enumerate(text.split("\n"), start=1):
        # The split took the \n of a \r\n away: give it back, or every \r would look lonely.
        if found := _UNWELCOME.search(line + "\n"):
            message = f'character U+{ord(found[0]):04X} is not allowed (remove it, or write it as "\\uXXXX" in quotes)'
            faults.append(Fault((number, found.start() + 1), "", message))


# --- Stage 2: YAML --------------------------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))\Z"
    r"|\.(?:nan|NaN|NAN)\Z"
)
_SCALARS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT, "str": re.compile("")}
_KINDS = {"map": yaml.MappingNode, "seq": yaml.SequenceNode} | dict.fromkeys(_SCALARS, yaml.ScalarNode)
_LONGEST_NUMBER = 40
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Composes nodes with YAML 1.2's plain scalars, notes anchors and aliases, stops at too much."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliases: set[yaml.Node] = set()
        self.anchored: set[yaml.Node] = set()
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        stream: Any = self  # PyYAML's stubs leave the reading of events untyped
        event = stream.peek_event()
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=event.start_mark)
        if self._depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}", problem_mark=event.start_mark)
        if stream.check_event(yaml.AliasEvent):
            stream.get_event()
            alias = yaml.ScalarNode(f"{_TAG}str", "", event.start_mark, event.end_mark)
            self.aliases.add(alias)
            return alias
        anchor, event.anchor = event.anchor, None
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None and node is not None:
            self.anchored.add(node)
        return node


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _tag, _pattern, _first)


class Tree:
    """Plain values from a document, and where each of them was written."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._values: dict[Route, Place] = {}
        self._names: dict[Route, Place] = {}
        self._refused: set[Route] = set()
        """Values that have a fault already: what pydantic says about their stand-in is noise."""

    def read(self, text: str) -> Any:
        """The document as dicts, tuples and scalars. Faults go to the list; what has one is left out or ``None``."""
        loader: Any = _Loader(text)
        try:
            loader.get_event()  # the stream's start
            empty = loader.check_event(yaml.StreamEndEvent)
            root = None if empty else loader.compose_document()
            if not loader.check_event(yaml.StreamEndEvent):
                message = "a second document starts here (a policy file holds exactly one: remove this)"
                self._faults.append(Fault(_place(loader.peek_event().start_mark), "", message))
        except yaml.MarkedYAMLError as error:
            start, mark = error.context_mark, error.problem_mark or loader.get_mark()
            since = f" that began on line {start.line + 1}" if start and start.line != mark.line else ""
            reason = escaped(", ".join(part for part in (error.context, error.problem) if part))[:200]
            self._faults.append(Fault(_place(mark), "", f"not valid YAML{since}: {reason}"))
            return {}
        except (yaml.YAMLError, ValueError, OverflowError):
            # PyYAML lets the bare error of chr() or int() escape for "\U00110000" and for huge version numbers.
            reason = "not valid YAML: an escape or a number is out of range"
            self._faults.append(Fault(_place(loader.get_mark()), "", reason))
            return {}
        if root is None or (root.tag == f"{_TAG}null" and root.value == "" and root not in loader.anchored):
            return {}
        self._loader: _Loader = loader
        return self._value(root, ())

    def is_refused(self, route: Route) -> bool:
        """Whether this value, or one around it, has a fault already: what else is said about it is noise."""
        return any(route[:length] in self._refused for length in range(len(route) + 1))

    def has_refused(self, route: Route) -> bool:
        """Whether something inside this value has a fault already: what is missing there may be missing by that."""
        return any(refused[: len(route)] == route for refused in self._refused)

    def is_value(self, route: Route) -> bool:
        """Whether the document has a value there."""
        return route in self._values

    def place(self, route: Route, *, of_name: bool = False) -> Place:
        """Where a value, or the name before it, was written; the beginning for what was not written at all."""
        return (self._names if of_name else self._values).get(route, (1, 1))

    def _refuse(self, route: Route, message: str, place: Place | None = None) -> None:
        self._faults.append(Fault(place or self._values[route], field_name(route), message))

    def _value(self, node: yaml.Node, route: Route) -> Any:
        self._values[route] = _place(node.start_mark)
        kind = node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else ""
        if node in self._loader.anchored:
            self._refuse(route, "anchors (`&name`) are not allowed (remove it)")
        try:
            if node in self._loader.aliases:
                raise ValueError("aliases (`*name`) are not allowed (write the value out; a leading `*` needs quotes)")
            if kind not in _KINDS or not isinstance(node, _KINDS[kind]):
                raise ValueError(f"the tag {quoted(node.tag)} is not allowed here (remove it)")
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, route)
            if isinstance(node, yaml.SequenceNode):
                return tuple(self._value(item, (*route, index)) for index, item in enumerate(node.value))
            return _scalar(kind, node.value)
        except ValueError as error:
            self._refuse(route, str(error))
            self._refused.add(route)
            return None

    def _mapping(self, node: yaml.MappingNode, route: Route) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            place = _place(key.start_mark)
            if key in self._loader.aliases or key in self._loader.anchored:
                self._refuse(route, "anchors and aliases are not allowed as names (write the name out)", place)
            elif not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str" or _SURROGATE.search(key.value):
                self._refuse(route, "a name must be text (put it in quotes if it is meant as a name)", place)
            elif key.value == "<<":
                self._refuse(route, "merge keys (`<<`) are not allowed (write the fields out)", place)
            elif key.value in values:
                first = self._names[*route, key.value][0]
                self._refuse((*route, key.value), f"is given twice (first on line {first}; keep one)", place)
            else:
                self._names[*route, key.value] = place
                values[key.value] = self._value(value, (*route, key.value))
        return values


def _scalar(kind: str, text: str) -> bool | int | float | str:
    if not _SCALARS[kind].match(text):
        raise ValueError(f"the value does not fit its tag `!!{kind}` (remove the tag)")
    if kind == "null":
        raise ValueError('has no value (remove it to keep the default; `""` is the empty text)')
    if kind in ("int", "float") and len(text) > _LONGEST_NUMBER:
        raise ValueError(f"the number has more than {_LONGEST_NUMBER} characters")
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if _SURROGATE.search(text):
        raise ValueError("half of a surrogate pair is not text")
    return text


def number_or_text(text: str) -> int | float | str:
    """``text`` that looks like a number is read as in a document; any other is taken as it is."""
    kind = "int" if _INT.match(text) else "float" if _FLOAT.match(text) else "str"
    return _scalar(kind, text)


def _place(mark: Any) -> Place:
    return mark.line + 1, mark.column + 1
