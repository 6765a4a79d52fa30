"""What is different between two policies, in words, by their canonical forms (:mod:`corral.policy.canonical`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import rfc8785

MAX_CHANGES = 100
"""Lines of one comparison; the last one counts the rest."""
_MAX_VALUE = 200
"""Characters of one value."""
_NOTHING: tuple[object, ...] = ("", [], {})
"""Beside null and false, values that are left out: what a rule has where nothing is said."""


def differences(old: bytes, new: bytes) -> tuple[str, ...]:
    """One line for each value that is different, in the order of their names: ``network.allow: added {...}``,
    ``approvals.timeout: 300 -> 60``. None where both are the same.

    Raises ValueError (or RecursionError) for what is no canonical form.
    """
    found = _compared("", _loaded(old), _loaded(new))
    lines = list(islice(found, MAX_CHANGES))
    more = sum(1 for _ in found)
    return (*lines[: MAX_CHANGES - 1], f"and {more + 1} more") if more else tuple(lines)


def _loaded(form: bytes) -> dict[str, Any]:
    loaded = json.loads(form)
    if not isinstance(loaded, dict):
        raise ValueError("it is no form of a policy")
    return loaded


def _compared(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for each in sorted(old.keys() | new.keys()):
            yield from _compared(f"{name}.{each}" if name else each, old.get(each), new.get(each))
    elif isinstance(old, list) and isinstance(new, list):
        before, after = ({rfc8785.dumps(item): item for item in items} for items in (old, new))
        yield from (f"{name}: removed {_said(item)}" for key, item in before.items() if key not in after)
        yield from (f"{name}: added {_said(item)}" for key, item in after.items() if key not in before)
        if old != new and before.keys() == after.keys():
            yield f"{name}: in another order"
    elif type(old) is not type(new) or old != new:
        yield f"{name}: {_said(old)} -> {_said(new)}"


def _said(value: Any) -> str:
    if value is None:
        return "nothing"
    said = json.dumps(_bare(value), ensure_ascii=False)
    return said if len(said) <= _MAX_VALUE else f"{said[:_MAX_VALUE]}..."


def _bare(value: Any) -> Any:
    """Without what says nothing, and with what is short in front."""
    if not isinstance(value, dict):
        return value
    bare = {key: _bare(each) for key, each in value.items()}
    said = {key: each for key, each in bare.items() if each is not None and each is not False and each not in _NOTHING}
    return dict(sorted(said.items(), key=lambda item: (isinstance(item[1], dict), item[0])))
