"""A policy proposed from what a recorded run did: no wider than that, and a person is asked where it matters.

* What was allowed becomes a rule for exactly that: this name, port, program with these arguments, table.
* What has consequences outside becomes an ``ask``: every destination but the sandbox's own loopback, every query that
  is no ``select``, every operation of a service that does not only read, every system call and file that was asked for,
  and listening. So does what was both allowed and refused, what a person or a grant had to allow, and what cannot be
  written exactly.
* What was refused stays refused; comments say what it was.

Files are not learned: what may be read and written at all is said by the sections that make mounts. Nor are upstreams,
sources and services: no record has what they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from corral.actions import (
    Decision,
    Endpoint,
    File,
    KernelCall,
    Kind,
    ModelCall,
    Operation,
    Program,
    Query,
    Request,
    Reversible,
    Subject,
    Transport,
    Verdict,
)
from corral.policy.document import escaped
from corral.policy.doors import is_reserved
from corral.policy.fields import MAX_ENTRIES, PathGlobs, SystemCalls
from corral.policy.learned_flows import MAX_REQUESTS, Outside, requests_of
from corral.policy.matching import escape_glob
from corral.policy.names import canonical_address, canonical_name
from corral.policy.part import RESOLVER_RULE
from corral.policy.rules import PROTOCOLS, ApiRuleFile, DataRuleFile, ExecRuleFile, ModelRuleFile, NetworkRuleFile

MAX_WORDS = 8_000
"""Arguments in all exec rules together: a policy file has a bounded number of values."""
MAX_LETTERS = 400_000
"""Characters in all of them together, as they are written."""
_MAX_COMMENTS = 200
_REACHED = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what connecting to them reaches
_READS = frozenset({"select"})


@dataclass(slots=True)
class _Use:
    """How one thing was answered."""

    allowed: int = 0
    asked: int = 0
    refused: int = 0

    @property
    def freely(self) -> bool:
        """It was allowed, always, and without asking anybody."""
        return not self.asked and not self.refused


@dataclass(slots=True)
class _Rules:
    """Two lists of rules, each with what is said of it."""

    allow: dict[str, str] = field(default_factory=dict)
    ask: dict[str, str] = field(default_factory=dict)

    def add(self, text: str, *, freely: bool, comment: str = "") -> None:
        """An ask is stronger than an allow, so each thing is in one of them."""
        if freely and text not in self.ask:
            self.allow.setdefault(text, comment)
        else:
            self.allow.pop(text, None)
            self.ask.setdefault(text, comment)


def learn(records: Iterable[tuple[Decision, bool]]) -> str:
    """The policy, as YAML with comments.

    ``records`` are decisions, and whether their subject is exactly what was tried; what is not exact is asked for
    where it can be named at all, and else told in a comment.
    """
    learner = _Learner()
    count = 0
    for decision, exact in records:
        learner.note(decision, exact)
        count += decision.count
    return learner.write(count)


class _Learner:
    def __init__(self) -> None:
        self._uses: dict[tuple[Kind, Subject, bool], _Use] = {}
        self._refused: Counter[str] = Counter()
        self._unnamed: Counter[str] = Counter()
        self._network, self._programs = _Rules(), _Rules()
        self._models, self._data, self._api = _Rules(), _Rules(), _Rules()
        self._loopback = self._listen = False
        self._syscalls: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._looked_up: dict[str, None] = {}
        self._outside: dict[tuple[object, ...], Outside] = {}

    def note(self, decision: Decision, exact: bool) -> None:
        action = decision.action
        subject = action.subject
        if isinstance(subject, Program):  # its content is not what a rule names
            subject = Program(subject.path, subject.argv, subject.truncated or not exact)
            exact = True
        elif decision.rule == RESOLVER_RULE:  # names are learned, not whom they are asked
            return
        elif isinstance(subject, Endpoint) and is_reserved(subject.name) and decision.verdict is Verdict.ALLOW:
            return  # what was asked of the broker is learned
        elif isinstance(subject, KernelCall):
            subject = KernelCall(subject.name, 0, "")
        use = self._uses.setdefault((action.kind, subject, exact), _Use())
        if decision.verdict is Verdict.ALLOW:
            use.allowed += decision.count
            asked = decision.decider in ("approvals", "autonomy") or bool(decision.answered_by)
            use.asked += decision.count * (asked or decision.rule.startswith("filesystem.ask"))
        else:
            use.refused += decision.count
            self._refused[f"{_said(action)}: {escaped(decision.rule)}"] += decision.count

    # ---- what was used ----

    def _learn(self) -> None:
        programs = []
        for (kind, subject, exact), use in self._uses.items():
            if not use.allowed:
                continue
            if not exact:
                self._unnamed[f"{kind.value} {_said(subject)}"] += use.allowed
            elif isinstance(subject, Program):
                programs.append((subject, use))
            elif not self._learn_one(kind, subject, use):
                self._unnamed[f"{kind.value} {_said(subject)}"] += use.allowed
        self._learn_programs(programs)
        self._learn_outside()
        named = self._names()
        for name in self._looked_up:
            if name not in named:
                self._network.add(f"{{name: {_scalar(name)}}}", freely=False, comment="was looked up only")

    def _learn_one(self, kind: Kind, subject: Subject, use: _Use) -> bool:
        """Whether there is a rule for it."""
        if isinstance(subject, Request):
            return self._learn_endpoint(kind, subject.endpoint, use, (subject.method, subject.path))
        if isinstance(subject, Endpoint):
            return self._learn_endpoint(kind, subject, use)
        if isinstance(subject, File):
            if not use.asked:
                return True
            return all(self._learn_file(path) for path in (subject.path, subject.other) if path)
        if isinstance(subject, KernelCall):
            return self._checked(SystemCalls, (subject.name,)) and not self._syscalls.update(
                {_scalar(subject.name): ""}
            )
        if isinstance(subject, ModelCall):
            return self._rule(self._models, ModelRuleFile, {"name": escape_glob(subject.model)}, use.freely)
        if isinstance(subject, Query):
            tables = tuple(sorted({escape_glob(table) for table in subject.tables}))
            rule: dict[str, Any] = {"source": subject.source, "statements": (subject.statement,)}
            freely = use.freely and bool(tables) and subject.statement in _READS
            return self._rule(self._data, DataRuleFile, rule | ({"tables": tables} if tables else {}), freely)
        if isinstance(subject, Operation):
            call = {"service": subject.service, "operations": (escape_glob(subject.operation),)}
            return self._rule(self._api, ApiRuleFile, call, use.freely and subject.reversible is Reversible.YES)
        return kind.value.startswith("sandbox.")

    def _learn_endpoint(
        self, kind: Kind, endpoint: Endpoint, use: _Use, request: tuple[str, str] | None = None
    ) -> bool:
        if kind in (Kind.NET_BIND, Kind.NET_LISTEN):
            self._listen = True
            return True
        if endpoint.transport is Transport.UNIX:
            self._loopback = True
            return True
        try:
            # Nothing that would be a pattern in a policy can be a name or an address here.
            name = None if endpoint.name is None else canonical_name(endpoint.name)
            address = canonical_address(endpoint.address) if endpoint.address else ""
        except ValueError:
            return False
        if kind is Kind.NET_RESOLVE:
            self._looked_up.update({} if name is None else {name: None})
            return name is not None
        address = _REACHED.get(address, address)
        inside = not endpoint.protected and (address == "::1" or address.startswith("127."))
        if inside and not endpoint.port:  # no rule can name it
            self._loopback = True
            return True
        if inside:
            protocol = endpoint.protocol if endpoint.protocol in PROTOCOLS else endpoint.transport.value
            rule: dict[str, Any] = {"ip": address, "port": endpoint.port, "protocol": protocol}
            return self._rule(self._network, NetworkRuleFile, rule, use.freely)
        if endpoint.protocol not in (None, "h2c", *PROTOCOLS):
            return False
        if request is not None and not endpoint.port:  # a rule that names no port would allow connecting to any
            return False
        place: dict[str, Any] = {} if name is None else {"name": name}
        # What is protected is allowed only where its address is named.
        place |= {"ip": address} if name is None or (endpoint.protected and address) else {}
        place |= {"port": endpoint.port} if endpoint.port else {}
        if not place.keys() & {"name", "ip"} or place.get("ip") == "":
            return False
        found = self._outside.setdefault((*place.items(), endpoint.transport), Outside(place, endpoint.transport))
        found.times += use.allowed
        found.spoken.setdefault(endpoint.protocol, {}).update({} if request is None else {request: None})
        return True

    def _learn_outside(self) -> None:
        written = 0
        for found in self._outside.values():
            for protocol, requests in found.protocols().items():
                rule = dict(found.place)
                if protocol == "h2c":
                    rule |= {"protocol": "http", "permit": ("h2c",)}
                elif protocol is not None or not requests or found.transport is not Transport.TCP:
                    rule |= {"protocol": protocol or found.transport.value}
                if found.transport is Transport.TCP and requests and protocol in (None, "tls", "http", "h2c"):
                    rule |= {"requests": requests_of(requests, whole=written < MAX_REQUESTS)}
                    written += len(rule["requests"])
                if not self._rule(self._network, NetworkRuleFile, rule, False):
                    self._unnamed[_written(rule)] += found.times

    def _learn_file(self, path: str) -> bool:
        if not path.startswith("/") or not self._checked(PathGlobs, (escape_glob(path),)):
            return False
        self._files[_scalar(escape_glob(path))] = ""
        return True

    def _learn_programs(self, programs: list[tuple[Program, _Use]]) -> None:
        size: Counter[str] = Counter()
        lines: Counter[str] = Counter()
        for program, _ in programs:
            lines[program.path] += 1
            size[program.path] += len(program.argv) + 4 + sum(map(len, program.argv)) * MAX_WORDS // MAX_LETTERS
        crowded: set[str] = set()
        for path, _ in size.most_common():  # what takes most is named without its arguments
            rest = [other for other in size if other not in crowded]
            if sum(size[o] for o in rest) <= MAX_WORDS and sum(lines[o] for o in rest) + len(crowded) <= MAX_ENTRIES:
                break
            crowded.add(path)
        for program, use in programs:
            if not self._learn_program(program, use.freely, crowded=program.path in crowded):
                self._unnamed[f"process.exec {_said(program)}"] += use.allowed

    def _learn_program(self, program: Program, freely: bool, *, crowded: bool) -> bool:
        if not program.path.startswith("/"):
            return False
        path = escape_glob(program.path)
        if not (crowded or program.truncated):
            argv = tuple(map(escape_glob, program.argv))
            if self._rule(self._programs, ExecRuleFile, {"path": path, "argv": argv}, freely):
                return True
            # Line ends and the like cannot be written, and what stands for them is wider than what was used.
            argv = tuple("".join(c if c.isprintable() else "?" for c in word) for word in argv)
            if self._rule(self._programs, ExecRuleFile, {"path": path, "argv": argv}, False):
                return True
        path = "".join(c if c.isprintable() else "?" for c in path)
        comment = "too many different arguments" if crowded else "its arguments cannot be written exactly"
        return self._rule(self._programs, ExecRuleFile, {"path": path}, False, comment)

    # ---- rules, as text ----

    def _names(self) -> set[str]:
        texts = (*self._network.allow, *self._network.ask)
        return {text.split('"')[1] for text in texts if text.startswith("{name: ")}

    def _rule(
        self, rules: _Rules, kind: type[BaseModel], rule: dict[str, Any], freely: bool, comment: str = ""
    ) -> bool:
        """Adds the rule, if a policy file may hold it."""
        try:
            kind.model_validate(rule)
            text = _written(rule)
        except (ValidationError, ValueError):
            return False
        rules.add(text, freely=freely, comment=comment)
        return True

    @staticmethod
    def _checked(kind: Any, value: object) -> bool:
        try:
            TypeAdapter(kind).validate_python(value, strict=True, context={"directory": "/"})
        except (ValidationError, ValueError):
            return False
        return True

    def write(self, count: int) -> str:
        self._learn()
        lines = [
            f"# Proposed by `corral policy learn` from {count} recorded actions. Read it before you use it:",
            "# `allow` is exactly what was done, and `ask` waits for a person where it has consequences.",
            "version: 1",
            "network:",
            f"  loopback: {'ask    # Unix sockets, or a port that no rule can name' if self._loopback else 'deny'}",
            f"  listen: {'ask' if self._listen else 'deny'}",
            *_listed("allow", self._network.allow),
            *_listed("ask", self._network.ask),
            "process:",
            *(_listed("allow", self._programs.allow) or ["  allow: []"]),
            *_listed("ask", self._programs.ask),
        ]
        for title, rules in (("model", self._models), ("data", self._data), ("api", self._api)):
            if rules.allow or rules.ask:
                lines += [f"{title}:", *_listed("allow", rules.allow), *_listed("ask", rules.ask)]
        for title, names in (("syscalls", self._syscalls), ("filesystem", self._files)):
            if names:
                lines += [f"{title}:", *_listed("ask", names)]
        lines += _told("Was allowed, but there is no rule for it:", self._unnamed)
        lines += _told("Was refused, and is not in this policy:", self._refused)
        return "\n".join(lines) + "\n"


def _listed(name: str, rules: dict[str, str]) -> list[str]:
    if not rules:
        return []
    left_out = len(rules) - MAX_ENTRIES
    lines = [f"    - {text}{f'  # {comment}' if comment else ''}" for text, comment in sorted(rules.items())]
    more = [f"    # and {left_out} more, for which this list has no room"] if left_out > 0 else []
    return [f"  {name}:", *lines[:MAX_ENTRIES], *more]


def _told(title: str, things: Counter[str]) -> list[str]:
    if not things:
        return []
    lines = ["", f"# {title}", *(f"#   {count} x {text}" for text, count in things.most_common(_MAX_COMMENTS))]
    return lines + [f"#   and {len(things) - _MAX_COMMENTS} others"] * (len(things) > _MAX_COMMENTS)


def _said(subject: object) -> str:
    text = str(subject)
    return escaped(f"{text[:200]}..." if len(text) > 200 else text)


def _written(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_written(each)}" for name, each in value.items()) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return _scalar(value) if isinstance(value, str) else str(value)


def _scalar(text: str) -> str:
    """Text in double quotes, YAML 1.2, section 7.3.1. Raises ValueError for bytes that are no text."""
    text.encode("utf-8")
    return '"' + "".join(_character(c) for c in text) + '"'


def _character(c: str) -> str:
    if c in '"\\':
        return f"\\{c}"
    return c if c.isprintable() else f"\\U{ord(c):08x}"
