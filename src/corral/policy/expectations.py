"""Expected verdicts, kept beside the policy: what it is for, in cases that a person can check.

``policy.yaml`` has its table in ``policy.test.yaml``, a list of cases::

    - action: connect github.com:443
      verdict: ask
    - action: [exec, /usr/bin/git, commit, -m, "two words"]
      verdict: allow
      rule: process.allow[0]      # optional

The actions are those of :mod:`corral.policy.explain`.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from corral.actions import Action, Opinion, Verdict
from corral.errors import PolicyError
from corral.policy.document import MAX_BYTES, Fault, Tree, check_text, escaped, field_name, policy_error, quoted
from corral.policy.explain import parse_action

_VERDICTS = {verdict.name.lower(): verdict for verdict in (Verdict.ALLOW, Verdict.ASK, Verdict.DENY)}
_FIELDS = ("action", "verdict", "rule")


@dataclass(frozen=True, slots=True)
class Expectation:
    """One case of a table."""

    line: int
    words: tuple[str, ...]
    action: Action
    verdict: Verdict
    rule: str = ""
    """The rule that must decide; empty where any may."""

    def holds(self, opinion: Opinion) -> bool:
        return opinion.verdict is self.verdict and self.rule in ("", opinion.rule)


def table_beside(policy: str | os.PathLike[str]) -> str:
    """The path of the table that belongs to a policy file."""
    stem, extension = os.path.splitext(os.fspath(policy))
    return f"{stem}.test{extension or '.yaml'}"


def load_expectations(path: str) -> tuple[Expectation, ...]:
    """Reads a table. Raises PolicyError with every fault and its line; a table without cases is one."""
    try:
        text = _read(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or escaped(str(error))
        raise PolicyError([f"{escaped(path)}: cannot read the table of expected verdicts: {reason}"]) from None
    faults: list[Fault] = []
    check_text(text, faults)
    cases = []
    if not faults:
        tree = Tree(faults)
        rows = tree.read(text)
        if not isinstance(rows, tuple) or not rows:
            if not faults:
                faults.append(Fault((1, 1), "", "must be a list of cases (`- action: ...`, `  verdict: ...`)"))
            rows = ()
        for index, row in enumerate(rows):
            if tree.is_refused((index,)):
                continue
            line, column = tree.place((index,))

            def fault(name: str, message: str, index: int = index, place: tuple[int, int] = (line, column)) -> None:
                route = (index, name) if name else (index,)
                faults.append(Fault(tree.place(route) if tree.is_value(route) else place, field_name(route), message))

            case = _case(row, line, fault)
            if case:
                cases.append(case)
    if faults:
        raise policy_error(path, faults)
    return tuple(cases)


def _read(path: str) -> bytes:
    """At most ``MAX_BYTES + 1`` bytes of a regular file; the parser refuses the one too many."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # a pipe would be waited for
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        return file.read(MAX_BYTES + 1)


def _case(row: object, line: int, fault: Callable[[str, str], None]) -> Expectation | None:
    if not isinstance(row, Mapping):
        fault("", "must be a mapping with `action` and `verdict`")
        return None
    for name in row:
        if name not in _FIELDS:
            fault(name, f"unknown field (known: {', '.join(_FIELDS)})")
            return None
    verdict = row.get("verdict")
    if not isinstance(verdict, str) or verdict not in _VERDICTS:
        fault("verdict", f"must be one of {', '.join(_VERDICTS)}")
        return None
    rule = row.get("rule", "")
    if not isinstance(rule, str):
        fault("rule", "must be text")
        return None
    try:
        words = _words(row.get("action"))
        return Expectation(line, words, parse_action(words), _VERDICTS[verdict], rule)
    except ValueError as error:
        fault("action", str(error))
        return None


def _words(written: object) -> tuple[str, ...]:
    """One text, split as a shell does, or a list of words."""
    if isinstance(written, str):
        try:
            return tuple(shlex.split(written))
        except ValueError:
            raise ValueError(f"{quoted(written)} has an open quote") from None
    if isinstance(written, tuple) and all(isinstance(word, str) for word in written):
        return written
    raise ValueError("must be text, or a list of words (numbers in quotes)")
