"""Rules, compiled: which of them name a thing. What that is worth is decided in :mod:`corral.policy.part`.

Those of destinations are in :mod:`corral.policy.destinations`.

Two kinds of glob, one syntax. ``*`` stands for any characters, ``?`` for one, ``\\`` takes the meaning from the next
character (at the end it is itself); brackets and braces are plain characters. In a glob of *paths* neither crosses a
``/``, and ``**`` as a whole part stands for any number of parts, also none: ``/work/**`` names ``/work`` and all below
it. In a glob of *texts* (arguments, models, tables, operations) a ``/`` is a character like any other.

No text takes more time than its length times that of the glob: every ``*`` is bound to the first place where what
follows it fits (an atomic group of :mod:`re`), which is never worse than a later one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from socket import AF_INET, AF_INET6, inet_pton

from corral.actions import Operation, Program, Query
from corral.policy.model import ApiRule, DataRule, ExecRule, ModelRule
from corral.policy.names import unmapped

Matcher = Callable[[str], object]
"""Says by its truth whether a text matches."""

_MAGIC = frozenset("*?\\")


# ---- globs ----


def escape_glob(text: str) -> str:
    """The glob that matches this text only."""
    return "".join(f"\\{c}" if c in _MAGIC else c for c in text) if not _MAGIC.isdisjoint(text) else text


def text_glob(glob: str) -> Matcher:
    """Compiles a glob of texts."""
    if _MAGIC.isdisjoint(glob):
        return glob.__eq__
    if not glob.strip("*"):
        return _anything
    return re.compile(_text_pattern(glob, "."), re.DOTALL).fullmatch


def path_glob(glob: str) -> Matcher:
    """Compiles a glob of absolute paths."""
    if _MAGIC.isdisjoint(glob):
        return glob.__eq__
    if glob == "/**":
        return _is_absolute
    below = glob.removeprefix("/**")
    if below != glob and below.startswith("/") and _MAGIC.isdisjoint(below):
        return _Anywhere(below)
    above = glob.removesuffix("/**")
    if above != glob and _MAGIC.isdisjoint(above):
        return _Below(above)
    return re.compile(_path_pattern(glob), re.DOTALL).fullmatch


def _anything(text: str) -> object:
    return True


def _is_absolute(path: str) -> object:
    return path.startswith("/")


class _Below:
    """A directory and everything in it."""

    __slots__ = ("_above", "_directory")

    def __init__(self, directory: str) -> None:
        self._directory, self._above = directory, f"{directory}/"

    def __call__(self, path: str) -> bool:
        return path.startswith(self._above) or path == self._directory


class _Anywhere:
    """A name in any directory."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, path: str) -> bool:
        return path.startswith("/") and path.endswith(self._name)


def _pieces(glob: str) -> Iterator[str]:
    """``*``, ``?``, and all else as characters of a regular expression."""
    characters = iter(glob)
    for character in characters:
        if character == "\\":
            yield re.escape(next(characters, "\\"))
        else:
            yield character if character in "*?" else re.escape(character)


def _text_pattern(glob: str, any_character: str) -> str:
    """Each ``*`` with what follows it, up to the next one, is an atomic group; the last one takes what is left."""
    chunks = [""]
    for piece in _pieces(glob):
        if piece == "*":
            chunks.append("")
        else:
            chunks[-1] += any_character if piece == "?" else piece
    first, *others = chunks
    if not others:
        return first
    *middle, last = others
    bound = "".join(f"(?>{any_character}*?{chunk})" for chunk in middle if chunk)
    # The last chunk must be at the end, wherever it occurred before.
    return f"{first}{bound}{any_character}*{last}"


def _path_pattern(glob: str) -> str:
    """As above one level up: between two ``**`` lie runs of parts, each bound to the first place where it fits."""
    runs: list[list[str]] = [[]]
    for part in glob[1:].split("/"):
        if part == "**":
            runs.append([])
        else:
            runs[-1].append(f"/(?=[^/])(?>{_text_pattern(part, '[^/]')}(?=/|\\Z))")
    first, *others = ("".join(run) for run in runs)
    if not others:
        return first
    *middle, last = others
    bound = "".join(f"(?>(?:/[^/]++)*?{run})" for run in middle if run)
    return f"{first}{bound}(?:/[^/]*+)*{last}"


# ---- addresses ----


def packed_address(text: str) -> bytes:
    """4 or 16 bytes; IPv4-mapped IPv6 as 4. Raises ValueError (or OSError) for what is no address."""
    return unmapped(inet_pton(AF_INET6 if ":" in text else AF_INET, text))


# ---- programs ----


class _Arguments:
    """The ``argv`` of a rule."""

    __slots__ = ("_globs", "_open")

    def __init__(self, globs: tuple[str, ...]) -> None:
        self._open = globs[-1:] == ("**",)
        self._globs = tuple(text_glob(glob) for glob in (globs[:-1] if self._open else globs))

    def match(self, argv: Sequence[str | None], *, cut: bool, certain: bool) -> bool:
        """``None`` is an argument that is not known, and ``cut`` means that more may follow: enough to be asked for or
        denied, too little to be allowed."""
        if cut:
            if certain and not self._open:
                return False
        elif len(argv) < len(self._globs):
            return False
        if len(argv) > len(self._globs) and not self._open:
            return False
        if certain and len(argv) < len(self._globs):
            return False
        return all((not certain if text is None else glob(text)) for glob, text in zip(self._globs, argv, strict=False))


class Programs:
    """A list of exec rules."""

    def __init__(self, rules: tuple[ExecRule, ...]) -> None:
        self._rules = [(path_glob(rule.path), None if rule.argv is None else _Arguments(rule.argv)) for rule in rules]

    def all(self, program: Program, *, certain: bool) -> list[int]:
        """The rules that name it. With ``certain``, as an allow needs it, those that surely do; without, also those
        that may: by arguments that were cut off, or as the interpreter of a script."""
        argv: Sequence[str | None] = program.argv[:-1] if program.truncated else program.argv
        runs = [(program.path, argv)]
        if program.interpreter and not certain:
            # execve(2): interpreter, one optional argument of the script's first line, script, arguments. What the
            # interpreter is called and whether there is such an argument is not known.
            runs += [(program.interpreter, (*unknown, program.path, *argv[1:])) for unknown in ((None,), (None, None))]
        return [
            index
            for index, (path, arguments) in enumerate(self._rules)
            if any(
                path(name) and (arguments is None or arguments.match(words, cut=program.truncated, certain=certain))
                for name, words in runs
            )
        ]


# ---- files, models, data, services ----


class Paths:
    """A list of path globs."""

    def __init__(self, globs: tuple[str, ...]) -> None:
        self._globs = tuple(map(path_glob, globs))

    def all(self, *paths: str) -> list[int]:
        """The globs that name at least one of these paths."""
        return [index for index, glob in enumerate(self._globs) if any(path and glob(path) for path in paths)]


class AppliedPaths:
    """A list of globs of what is applied: each names also what lies below, and does not tell capital letters from
    others, as some file systems do not."""

    def __init__(self, globs: tuple[str, ...]) -> None:
        self._globs = tuple(path_glob(glob.casefold()) for glob in globs)

    def all(self, *paths: str) -> list[int]:
        """The globs that name at least one of these paths, which are relative to the workspace."""
        above = {part for path in paths for part in _ways_to(path.casefold())} if self._globs else set()
        return [index for index, glob in enumerate(self._globs) if any(map(glob, above))]


def _ways_to(path: str) -> Iterator[str]:
    """The path and all above it."""
    at = ""
    for name in path.strip("/").split("/"):
        at = f"{at}/{name}"
        yield at


class Models:
    """A list of model rules."""

    def __init__(self, rules: tuple[ModelRule, ...]) -> None:
        self._globs = tuple(text_glob(rule.name) for rule in rules)

    def all(self, name: str) -> list[int]:
        return [index for index, glob in enumerate(self._globs) if glob(name)]


class Queries:
    """A list of data rules."""

    def __init__(self, rules: tuple[DataRule, ...]) -> None:
        self._rules = [
            (rule.source, frozenset(map(str.lower, rule.statements)), tuple(map(text_glob, rule.tables)))
            for rule in rules
        ]

    def all(self, query: Query, *, certain: bool) -> list[int]:
        """The rules that name it. With ``certain``, as an allow needs it, those that name all of its tables; without,
        those that name one of them. A rule without tables names all of them, and also the query that says none."""
        statement = query.statement.lower()
        found = []
        for index, (source, statements, globs) in enumerate(self._rules):
            if source != query.source or (statements and statement not in statements):
                continue
            named = [any(glob(table) for glob in globs) for table in query.tables]
            if not globs or (bool(named) and all(named) if certain else any(named)):
                found.append(index)
        return found


class Operations:
    """A list of rules about operations of services."""

    def __init__(self, rules: tuple[ApiRule, ...]) -> None:
        self._rules = [(rule.service, tuple(map(text_glob, rule.operations))) for rule in rules]

    def all(self, call: Operation) -> list[int]:
        """The rules that name it. A rule without operations names all of its service."""
        return [
            index
            for index, (service, globs) in enumerate(self._rules)
            if service == call.service and (not globs or any(glob(call.operation) for glob in globs))
        ]
