"""The one form of a policy, and its hash: what a record means when it says which policy decided.

Two policies that mean the same by their rules have the same form: lists are sets, so their order and repetitions do
not count, and nothing is left of how a file wrote it. RFC 8785 (JSON Canonicalization Scheme) makes bytes of that.
"""

from __future__ import annotations

import dataclasses
import hashlib
from enum import Enum
from typing import Any

import rfc8785

from corral.actions import Verdict
from corral.policy.model import Environment, ExecRule, Model, Network, Policy, TableScope

VERSION = 7
"""Of this form. Raised whenever the same policy would get other bytes."""
_ORDERED = {
    (ExecRule, "argv"),
    (Network, "resolvers"),
    (Model, "upstreams"),
    (Model, "prices"),
    (TableScope, "columns"),
}
"""The lists whose order means something."""


def canonical_form(policy: Policy) -> bytes:
    """All values of ``policy``, defaults included, as canonical JSON in UTF-8.

    In the place of the values of ``environment.set`` is their SHA-256. That hides nothing that can be guessed: the
    places of secrets are ``credential`` and ``password``, which say only where one is found.
    """
    form = _form(policy)
    form["version"] = VERSION
    return rfc8785.dumps(form)


def policy_hash(policy: Policy) -> str:
    """The policy's version: ``sha256:`` and the SHA-256 of its canonical form in hexadecimal."""
    return f"sha256:{hashlib.sha256(canonical_form(policy)).hexdigest()}"


def _form(value: Any) -> dict[str, Any]:
    return {
        field.name: _field(type(value), field.name, getattr(value, field.name)) for field in dataclasses.fields(value)
    }


def _field(owner: type[object], name: str, value: Any) -> Any:
    if (owner, name) == (Environment, "set"):
        return {key: _digest(each) for key, each in value}
    if isinstance(value, tuple | frozenset):
        items = [_item(each) for each in value]
        if (owner, name) in _ORDERED:
            return items
        unique = {rfc8785.dumps(item): item for item in items}
        return [unique[key] for key in sorted(unique)]
    return _item(value)


def _item(value: Any) -> Any:
    if isinstance(value, Verdict):
        return value.name.lower()
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return _form(value)
    if isinstance(value, tuple):
        return [_item(each) for each in value]
    if isinstance(value, str):
        return _text(value)
    return value


def _digest(value: str) -> str:
    return f"sha256:{hashlib.sha256(value.encode('utf-8', 'surrogateescape')).hexdigest()}"


def _text(text: str) -> str | dict[str, str]:
    """A path's bytes need not be text; those that are none are told apart from every text by their type."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return {"base16": text.encode("utf-8", "surrogateescape").hex()}
    return text
