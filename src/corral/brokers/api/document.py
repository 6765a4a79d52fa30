"""OpenAPI documents (3.0, 3.1) as plain values, within bounds. What they mean is not known here.

A document is a file of the host's, but mostly somebody else's work: it is read strictly, and nothing that it refers to
is fetched. References lead into the document itself; what leads elsewhere is an error where it is needed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from corral.brokers.strict_json import Json, NotJson, check, parse
from corral.errors import RequestError

MAX_BYTES = 4 << 20
MAX_DEPTH = 64
MAX_VALUES = 500_000
"""With what aliases repeat."""
MAX_REFERENCES = 32
"""One leading to the next."""
_VERSION = re.compile(r"3\.[01]\.[0-9]{1,3}(?:-[0-9A-Za-z.]{1,20})?")

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the other is some fifty times slower
_TAG = "tag:yaml.org,2002:"


class _Loader(_Base):  # type: ignore[misc]
    """Scalars as JSON has them (YAML 1.2, core schema): ``no`` and dates are texts."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise NotJson("the name of a member is no text")
            if str(key) in found:
                raise NotJson(f"a name stands twice in one object, at line {key_node.start_mark.line + 1}")
            found[str(key)] = self.construct_object(value_node, deep=deep)
        return found


for _name, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,40})\Z", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]{1,3})?\Z", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


class Document:
    """One document. Not to be changed."""

    def __init__(self, root: Mapping[str, Json]) -> None:
        """Raises RequestError."""
        version = root.get("openapi")
        if not isinstance(version, str) or not _VERSION.fullmatch(version):
            raise RequestError("is no OpenAPI document of version 3.0 or 3.1")
        self.root = root
        self.is_old = version.startswith("3.0")
        """3.0, whose schemas are not quite JSON Schema."""

    def at(self, reference: str) -> Json:
        """What a reference leads to (RFC 6901). Raises RequestError."""
        if reference != "#" and not reference.startswith("#/"):
            raise RequestError(
                f"refers to {reference[:100]!r}, which is not in it (only references within it are taken)"
            )
        value: Json = dict(self.root)
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and name in value:
                value = value[name]
            elif isinstance(value, list) and name.isascii() and name.isdecimal() and int(name[:6]) < len(value):
                value = value[int(name[:6])]
            else:
                raise RequestError(f"refers to {reference[:100]!r}, which is not there")
        return value

    def resolved(self, value: Json) -> dict[str, Json]:
        """An object that may be a reference to one. Raises RequestError."""
        for _ in range(MAX_REFERENCES):
            if not isinstance(value, dict):
                raise RequestError("has something else where an object must be")
            reference = value.get("$ref")
            if reference is None:
                return value
            if not isinstance(reference, str):
                raise RequestError("has a `$ref` that is no text")
            value = self.at(reference)
        raise RequestError("has references that lead in a circle")


def load(path: str) -> Document:
    """Raises RequestError, which does not say which file it is."""
    return parsed(read(path))


def parsed(data: bytes) -> Document:
    """Raises RequestError."""
    try:
        # Most of JSON is YAML too, but takes ten times as long to read.
        value = parse(data, depth=MAX_DEPTH, values=MAX_VALUES) if data.lstrip()[:1] == b"{" else _from_yaml(data)
    except NotJson as error:
        raise RequestError(f"cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("is no OpenAPI document")
    return Document(value)


def _from_yaml(data: bytes) -> Json:
    """Raises NotJson."""
    try:
        text = data.decode("utf-8")
        value: Json = yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe one)
    except UnicodeDecodeError:
        raise NotJson("it is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise NotJson(f"it is no YAML that is taken here{line}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise (error if isinstance(error, NotJson) else NotJson("it is no YAML that is taken here")) from None
    check(value, depth=MAX_DEPTH, values=MAX_VALUES)
    return value


def read(path: str) -> bytes:
    """Raises RequestError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        cause = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not a path"
        raise RequestError(f"cannot be read: {cause}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RequestError("is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"cannot be read: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise RequestError(f"has more than {MAX_BYTES >> 20} MiB")
    return data
