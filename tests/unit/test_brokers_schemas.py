"""JSON that means one thing, and schemas that are checked in bounded time."""

from __future__ import annotations

import json
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from corral.brokers import schemas, strict_json
from corral.brokers.schemas import Schema, SchemaFault
from corral.brokers.strict_json import MAX_VALUES, Json, NotJson, check, parse, write

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"\\u0062":2}}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e400",
        b"1" * 200,
        b'"\\ud800"',
        b'{"\\udfff":1}',
        b'"\xff"',
        b'"\xed\xa0\x80"',  # a surrogate as UTF-8 has none
        b'"\xc0\xaf"',
        b"\xef\xbb\xbf1",
        '"x"'.encode("utf-16"),
        b'"a\nb"',
        b"1 2",
        b"{'a':1}",
        b"[1,]",
        b"01",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 65 + b"]" * 65,
        b"[" + b"1," * MAX_VALUES + b"1]",
    ],
)
def test_what_two_readers_could_take_differently_is_refused(text: bytes) -> None:
    with pytest.raises(NotJson) as caught:
        parse(text)
    assert len(str(caught.value)) < 200


@given(VALUES)
def test_what_is_read_is_what_is_written(value: Any) -> None:
    read = parse(json.dumps(value).encode(), depth=200)
    assert json.dumps(read) == json.dumps(value)
    assert json.dumps(parse(write(read), depth=200)) == json.dumps(value)


@given(st.binary(max_size=60))
def test_whatever_is_read_is_in_bounds(text: bytes) -> None:
    try:
        value = parse(text, depth=4, values=8)
    except NotJson:
        return
    check(value, depth=4, values=8)
    assert json.loads(write(value)) == value


def problem(schema: dict[str, Any], value: Any) -> str | None:
    return Schema(schema).problem(value)


def test_a_value_is_as_the_schema_says() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"pattern": "^[a-z]+$"}}}}
    assert problem(schema, {"a": ["x", "yy"]}) is None
    assert problem(schema, {"a": ["x", "y\n"]}) == "a[1]: 'y\\n' does not match '^[a-z]+$'"  # Python's $ would take it
    assert problem(schema, {"a": ["\u00e9"]}) is not None
    assert problem({"pattern": "^\\u00e9\\d$"}, "é1") is None
    assert problem({"pattern": "^\\d$"}, "\u0661") is not None  # ECMA-262: digits are ASCII


@pytest.mark.parametrize(
    ("items", "unique"),
    [
        ([1, 1.0], False),
        ([1, True], True),
        ([0, False], True),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], False),
        ([[1], [1.0]], False),
        (["1", 1], True),
        ([None, "null"], True),
    ],
)
def test_elements_are_unique_as_the_standard_counts(items: list[Any], unique: bool) -> None:
    assert (problem({"uniqueItems": True}, items) is None) is unique


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://schemas.example/x"},
        {"$ref": "file:///etc/passwd"},
        {"properties": {"a": {"items": {"$ref": "other.json#/x"}}}},
        {"$id": "https://schemas.example/"},
        {"$dynamicRef": "#x"},
        {"patternProperties": {"(a+)+$": {}}},
        {"anyOf": [{"pattern": "(?<=a)b"}]},
        {"pattern": r"(a)\1"},
        {"pattern": "x" * 2000},
        {"pattern": "("},
        {"properties": {"a": {"pattern": "((a{1,900}){1,900}){1,900}"}}},
        {"type": "strin"},
        {"required": "a"},
        {"minimum": "3"},
    ],
)
def test_a_schema_that_cannot_be_checked_with_is_said_to_be_so(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaFault):
        Schema(schema)


def test_words_in_data_are_no_keywords() -> None:
    assert problem({"enum": [{"$id": "x", "patternProperties": 1}], "default": {"$ref": 3}}, {"$id": "x"}) is not None
    assert problem({"properties": {"$id": {"type": "string"}}}, {"$id": "x"}) is None


# A check that is not bounded takes minutes or for ever here, and the test ends by its own time limit.


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, 1),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, 1),
        ({"$ref": "#"}, 1),
        ({"not": {"$ref": "#"}}, 1),
        (
            {
                "$ref": "#/$defs/n",
                "$defs": {
                    "n": {
                        "anyOf": [
                            {"properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["x"]},
                            {"properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["y"]},
                        ]
                    }
                },
            },
            json.loads('{"a":' * 40 + "1" + "}" * 40),
        ),
        ({"items": {"enum": list(range(100_000))}}, ["x"] * 100_000),
        ({"allOf": [{"uniqueItems": True}] * 1000}, list(range(100_000))),
        ({"allOf": [{"anyOf": [{"type": "string"}] * 100}] * 100}, ["x" * 1000] * 10_000),
    ],
)
def test_a_bomb_is_refused(schema: dict[str, Any], value: Any) -> None:
    assert problem(schema, value) is not None


@pytest.mark.timeout(60)
def test_a_pattern_that_would_go_back_and_forth_is_matched_in_linear_time() -> None:
    for pattern in ("^(a+)+$", "^(a|aa)+$", "^(.*a){20}$", "(x+x+)+y"):
        assert problem({"pattern": pattern}, "a" * 100_000 + "!") is not None


def from_below(frames: int, ask: Callable[[], str | None]) -> str | None:
    return ask() if not frames else from_below(frames - 1, ask)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"$ref": "#"}},
        {"$ref": "#"},
        {"anyOf": [{"oneOf": [{"allOf": [{"$ref": "#"}]}]}]},
        {"if": {"$ref": "#"}, "then": {"$ref": "#"}},
        {"items": {"$ref": "#"}, "maxItems": 1},
        {"contains": {"not": {"$ref": "#"}}},
    ],
)
def test_the_stack_never_overflows(schema: dict[str, Any]) -> None:
    """The library's own code under it panics then, with what no `except Exception` catches."""
    value: Json = json.loads("[" * 60 + "2" + "]" * 60)
    checked = Schema(schema)
    room = sys.getrecursionlimit() - sum(1 for _ in traceback.walk_stack(None))
    for frames in range(0, room - 20, 7):
        from_below(frames, lambda: checked.problem(value))  # what it says depends; that it says it does not
    told = {from_below(frames, lambda: checked.problem(1)) for frames in range(300, room - 20, 9)}
    assert "it is too large to be checked" in told


@pytest.mark.parametrize("keyword", ["items", "not", "additionalProperties", "allOf", "properties", "$defs", "if"])
def test_a_schema_that_is_nested_too_deeply_is_said_to_be_so(keyword: str) -> None:
    schema: dict[str, Any] = {}
    for depth in range(1, 60):
        if depth <= schemas.MAX_SCHEMA_DEPTH:
            Schema(schema)
        else:
            with pytest.raises(SchemaFault, match="nested"):
                Schema(schema)
        schema = {
            keyword: [schema] if keyword == "allOf" else {"a": schema} if keyword in ("properties", "$defs") else schema
        }


async def test_a_large_value_is_checked() -> None:
    schema = {"type": "array", "items": {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}}
    value: list[Json] = [{"n": number} for number in range(10_000)]
    assert problem(schema, value) is None and await Schema(schema).check(value) is None
    value.append({"n": "x"})
    assert problem(schema, value) == await Schema(schema).check(value) == "[10000].n: 'x' is not of type 'integer'"


def test_a_problem_is_short_and_printable() -> None:
    told = problem({"properties": {"\x1b[2J": {"type": "string"}}}, {"\x1b[2J": ["\u202e\n"] * 1000})
    assert told is not None and told.isprintable() and len(told) < 500


SIMPLE = st.recursive(
    st.sampled_from(
        [{}, {"type": "string"}, {"type": "integer"}, {"enum": [1, "a", None]}, {"minimum": 0}, {"const": 1}]
    ),
    lambda inner: (
        st.builds(lambda a: {"items": a}, inner)
        | st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
        | st.builds(lambda a, b: {"properties": {"a": a, "b": b}, "additionalProperties": False}, inner, inner)
        | st.builds(lambda a: {"not": a}, inner)
    ),
    max_leaves=5,
)


@given(SIMPLE, VALUES)
def test_what_is_taken_is_what_the_library_takes(schema: dict[str, Any], value: Any) -> None:
    assert (problem(schema, value) is None) is Draft202012Validator(schema).is_valid(value)


def test_the_library_has_no_keyword_that_we_do_not_know_of() -> None:
    """A new one may match patterns, or lead elsewhere."""
    known = set(
        "$ref additionalProperties allOf anyOf const contains dependentRequired dependentSchemas enum "
        "exclusiveMaximum exclusiveMinimum format if items maxItems maxLength maxProperties maximum minItems minLength "
        "minProperties minimum multipleOf not oneOf pattern prefixItems properties propertyNames required type "
        "uniqueItems".split()
    )
    assert set(Draft202012Validator.VALIDATORS) - schemas._NOT_TAKEN == known
    assert not re.search("patternProperties", json.dumps(sorted(known)))


# ---- what is long keeps nobody waiting ----


def test_too_many_values_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *words, **how: pytest.fail("they were"))
    for text in (b"[" + b"1," * 300 + b"1]", b"{" + b",".join(b'"%d":{}' % n for n in range(200)) + b"}", b"[" * 400):
        with pytest.raises(NotJson, match="more than 200 values"):
            parse(text, values=200)


def test_the_bound_before_is_not_stricter() -> None:
    values: tuple[Json, ...] = ([1] * 99, {str(n): n for n in range(66)}, [["," * 500]] * 30, "[,{" * 200)
    for value in values:
        check(value, values=201)
        assert parse(write(value), values=201) == value


async def test_a_long_text_is_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def counted(data: bytes, **bounds: int) -> Json:
        threads.append(threading.get_ident())
        return parse(data, **bounds)

    monkeypatch.setattr(strict_json, "parse", counted)
    assert await strict_json.parse_aside(b"[1]") == [1]
    assert threads == [threading.get_ident()]
    assert await strict_json.parse_aside(write([1] * 5000)) == [1] * 5000
    assert await strict_json.parse_aside(write("x" * 300_000)) == "x" * 300_000
    assert threading.get_ident() not in threads[1:] and len(threads) == 3
    with pytest.raises(NotJson, match="deeper"):
        await strict_json.parse_aside(write([[[]]] * 5000), depth=2)
