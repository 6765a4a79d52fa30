"""A policy file laid over the policy that it starts from.

One rule: what can only tighten is added to, and everything else is replaced. So nothing that a profile denies, asks
for, watches or detects can be lost by inheriting from it, and nothing that it opens stays open unseen once a file says
what is open.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from corral.policy.fields import Strict
from corral.policy.model import Policy
from corral.policy.notation import Entry
from corral.policy.schema import PolicyFile

ADDED = frozenset({"deny", "ask", "watch", "rules"})
"""Lists whose entries are added to those of the profile; all of them can only tighten."""
_OF_THE_FILE = frozenset({"version", "profile", "allow_degraded"})
_ANSWERS = frozenset({"irreversible"})
"""Fields of the file that are no sections."""


def merged(base: Policy, file: PolicyFile) -> Policy:
    """``base`` with what ``file`` says. ``allow_degraded`` is never inherited: weakness is said where it is used."""
    sections = {
        name: _section(getattr(base, name), getattr(file, name))
        for name in file.model_fields_set - _OF_THE_FILE - _ANSWERS
    }
    answers = {name: getattr(file, name) for name in file.model_fields_set & _ANSWERS}
    return replace(base, **sections, **answers, allow_degraded=frozenset(file.allow_degraded))


def _section(base: Any, given: Strict) -> Any:
    """A section, or a mapping within one: field by field, so that a budget that a file gives takes no other away."""
    changes: dict[str, Any] = {}
    for name in given.model_fields_set:
        said = getattr(given, name)
        if isinstance(said, Strict):
            changes[name] = _section(getattr(base, name), said)
        elif name in ADDED:
            changes[name] = tuple(dict.fromkeys((*getattr(base, name), *_value(said))))
        else:
            changes[name] = _value(said)
    return replace(base, **changes)


def _value(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(dict.fromkeys(each.value() if isinstance(each, Entry) else each for each in given))
    if isinstance(given, dict):
        return tuple(given.items())
    return given
