"""What pydantic finds, told in our words."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from corral.policy.document import Fault, Route, Tree, escaped, field_name
from corral.policy.fields import nearest
from corral.policy.schema import MAPPINGS, homes

_WORDS = {
    "model_type": "must be a mapping (indented lines of `name: value`)",
    "dict_type": "must be a mapping (indented lines of `name: value`)",
    "tuple_type": "must be a list (indented lines of `- value`)",
    "string_type": "must be text (put the value in quotes)",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be `true` or `false`",
    "finite_number": "must be a finite number",
    "greater_than_equal": "must be at least {ge:.15g}",
    "less_than_equal": "must be at most {le:.15g}",
    "too_long": "has more than {max_length} entries",
}


def faults_of(error: ValidationError, tree: Tree) -> list[Fault]:
    """The findings that the document does not account for already, each with its place."""
    faults = []
    for item in error.errors(include_url=False):
        route: Route = item["loc"]
        if tree.is_refused(route) or (item["type"] == "value_error" and tree.has_refused(route)):
            continue
        of_name = item["type"] == "extra_forbidden"
        message = said(item, route)
        if not tree.is_value(route) and route[-1] == "[key]":  # pydantic's mark for: the name itself is wrong
            route, of_name = route[:-1], True
        while route and not tree.is_value(route):  # a field of a rule that was written as one text, or is missing
            route = route[:-1]
        faults.append(Fault(tree.place(route, of_name=of_name), field_name(route), message))
    return faults


def said(item: ErrorDetails, route: Route) -> str:
    """What is wrong, and what to do."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return f"has no `{route[-1]}` (add it)"
    if kind == "extra_forbidden":
        return f"unknown field ({_meant(route)})"
    if not route:
        return "a policy must be a mapping (lines of `name: value`, such as `resources:`)"
    return _WORDS[kind].format(**context) if kind in _WORDS else escaped(item["msg"])


def _meant(route: Route) -> str:
    name, mapping = str(route[-1]), tuple(part for part in route[:-1] if isinstance(part, str))
    elsewhere = [f"`{home}`" for home in homes(name)] if len(mapping) < 2 else []
    if not elsewhere:
        return nearest(name, [field.alias or known for known, field in MAPPINGS[mapping].model_fields.items()])
    *others, last = elsewhere
    return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
