"""The JSON Schema of policy files, for editors: completion, documentation and most mistakes while typing.

What it accepts is wider than what :mod:`corral.policy.load` accepts: paths, names and patterns are checked there.
"""

from __future__ import annotations

from typing import Any

from corral.policy.schema import PolicyFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema, in the dialect of draft 2020-12, ready for :func:`json.dumps`."""
    generated = PolicyFile.model_json_schema()
    definitions = generated.pop("$defs")
    for definition in (generated, *definitions.values()):
        _clean(definition)
    return {"$schema": DIALECT, **generated, "title": "Corral policy", "$defs": definitions}


def _clean(schema: Any) -> None:
    """Takes out what is noise in an editor, and what no file can hold: titles made of names, and null."""
    if isinstance(schema, list):
        for each in schema:
            _clean(each)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("title"), str):
        del schema["title"]
    if "default" in schema and schema["default"] in (None, "", []):
        del schema["default"]
    choices = schema.get("anyOf")
    if choices and {"type": "null"} in choices:
        choices.remove({"type": "null"})
        if len(choices) == 1:
            del schema["anyOf"]
            schema.update({**choices[0], **schema})
    for name, each in schema.items():
        if name in ("properties", "patternProperties"):
            for field in each.values():
                _clean(field)
        elif name not in ("default", "examples", "enum", "const"):
            _clean(each)
