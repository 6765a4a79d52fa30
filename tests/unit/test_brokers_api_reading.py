"""OpenAPI documents: what is understood of them, what does not exist, and what is an error of the policy's."""

from __future__ import annotations

import json
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from corral.brokers.api.broker import prepare
from corral.brokers.api.cut import Cutter
from corral.brokers.api.document import MAX_BYTES, Document, load
from corral.brokers.api.media import FORM, matching
from corral.brokers.api.paths import PathFault, template
from corral.brokers.api.reading import Declared, Reader
from corral.brokers.api.tools import Described, described
from corral.brokers.api.values import BodyKind, Join, Media, Place
from corral.brokers.setting import Setting
from corral.errors import RequestError
from corral.policy.model import Api, Operation, Policy, Service
from tests.unit.api_bench import CREDENTIAL, DOCUMENT, operations


def read(paths: dict[str, Any], *names: str, version: Any = "3.1.0", components: Any = None, **globs: Any) -> Declared:
    root = {"openapi": version, "paths": paths, "components": components or {}}
    service = Service("s", "", "", operations(*names, **globs))
    return Reader(Document(root), service, "api.services[0]", "api-key").read()


def get(*parameters: Any, **more: Any) -> dict[str, Any]:
    return {"/x": {"get": {"operationId": "op", "parameters": list(parameters), **more}}}


def query(schema: Any, **more: Any) -> dict[str, Any]:
    return {"name": "a", "in": "query", "schema": schema, **more}


def post(schema: Any, type_: str = "application/json", **more: Any) -> dict[str, Any]:
    return {"/x": {"post": {"operationId": "op", "requestBody": {"content": {type_: {"schema": schema}}, **more}}}}


# ---- files ----


def test_json_and_yaml_are_read_alike(tmp_path: Path) -> None:
    value = yaml.safe_load(DOCUMENT.read_text())
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert load(str(tmp_path / "x.json")).root == load(str(DOCUMENT)).root == value


def test_scalars_are_those_of_json(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("openapi: 3.0.0\nx: {a: no, b: 2020-01-01, c: 010, 200: 1:20, d: 1.5, e: ~, f: on, g: 1_0, h: 0x1}")
    assert load(str(file)).root["x"] == {
        "a": "no",
        "b": "2020-01-01",
        "c": "010",
        "200": "1:20",
        "d": 1.5,
        "e": None,
        "f": "on",
        "g": "1_0",
        "h": "0x1",
    }


GOOD = "openapi: 3.0.0\npaths: {/x: {get: {operationId: a}}}\n"
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "x",
        "{}",
        "paths: {/x: {get: {operationId: a}}}",
        "openapi: 2.0\npaths: {/x: {get: {operationId: a}}}",
        "swagger: '2.0'\npaths: {/x: {get: {operationId: a}}}",
        "openapi: 3.2.0\npaths: {/x: {get: {operationId: a}}}",
        "openapi: 3.0.0\npaths: []",
        '{"openapi":"3.0.0","paths":{},"paths":{"/x":{"get":{"operationId":"a"}}}}',
        '{"openapi":"3.0.0","paths":{"/x":{"get":{"operationId":"a"}}}}x',
        f"{GOOD}openapi: 3.1.0",
        f"{GOOD}x: {{y: 1, y: 1}}",
        f"{GOOD}x: {{200: 1, '200': 1}}",
        f"{GOOD}x: !!python/object/apply:os.system [id]",
        f"{GOOD}x: !!binary aGVsbG8=",
        f"{GOOD}x: !!timestamp 2020-01-01",
        f"{GOOD}x: !!set {{a}}",
        f"{GOOD}x: !!float .inf",
        f"{GOOD}x: &x [*x]",
        f"{GOOD}? [1]\n: 2",
        f"{GOOD}true: 2",
        f"{GOOD}--- \nopenapi: 3.0.0",
        f"{GOOD}x: " + "[" * 100 + "]" * 100,
        f"{GOOD}x: " + "[" * 100_000,
        GOOD + LAUGHS,
        f'{GOOD}x: "\\U00110000"',
        f"{GOOD}x: '" + "x" * MAX_BYTES + "'",
    ],
)
def test_a_file_that_is_no_document_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    policy = Policy(api=Api(services=(Service("s", str(file), "http://x.example", operations("a")),)))
    file.write_text(GOOD + "x: 1")
    prepare(policy, {})
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        prepare(policy, {})
    assert str(caught.value).startswith("api.services[0]: ") and len(str(caught.value)) < 500


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", Path("/dev/zero"), Path("/x\0y")):
        with pytest.raises(RequestError):
            load(str(path))


# ---- operations ----


def test_an_operation_is_named_once_and_is_there() -> None:
    paths = {"/x": {"get": {"operationId": "a"}, "post": {"operationId": "b"}}, "/y": {"get": {"operationId": "b"}}}
    assert [each.method for each in read(paths, "a", "POST /x").operations] == ["GET", "POST"]
    for names in (("c",), ("b",), ("GET /z",), ("PUT /x",), ("a", "GET /x"), ("get /x ",)):
        with pytest.raises(RequestError, match="operation"):
            read(paths, *names)


@pytest.mark.parametrize(
    "path",
    [
        "x",
        "",
        "//",
        "/a//b",
        "/{a}{b}",
        "/{a}-{b}",
        "/{a",
        "/a}",
        "/{}",
        "/../a",
        "/./a",
        "/a?b",
        "/a#b",
        "/a b",
        "/%2e%2e",
        "/é",
    ],
)
def test_a_path_that_is_none_is_an_error(path: str) -> None:
    with pytest.raises(PathFault):
        template(path)
    with pytest.raises(RequestError, match="op"):
        read({path: {"get": {"operationId": "op"}}}, "op")


def test_a_path_says_what_its_parameters_are() -> None:
    with pytest.raises(RequestError, match="does not declare 'id'"):
        read({"/x/{id}": {"get": {"operationId": "op"}}}, "op")
    with pytest.raises(RequestError, match="needs the parameter 'id'"):
        parameter = {"name": "id", "in": "path", "style": "matrix", "schema": {"type": "string"}}
        read({"/x/{id}": {"get": {"operationId": "op", "parameters": [parameter]}}}, "op")


def test_an_operation_of_its_own_goes_before_that_of_its_path() -> None:
    paths: dict[str, Any] = {"/x": {"parameters": [query({"type": "integer"})], "get": {"operationId": "op"}}}
    paths["/x"]["get"]["parameters"] = [query({"type": "boolean"})]
    (operation,) = read(paths, "op").operations
    assert [each.kinds for each in operation.arguments] == [{"boolean"}]


STRING = {"type": "string"}
ARRAY = {"type": "array", "items": STRING}


@pytest.mark.parametrize(
    ("parameter", "join"),
    [
        (query(STRING), Join.REPEATED),
        (query(ARRAY), Join.REPEATED),
        (query(ARRAY, explode=False), Join.COMMA),
        (query(ARRAY, style="form", explode=False), Join.COMMA),
        (query(ARRAY, style="spaceDelimited"), Join.SPACE),
        (query(ARRAY, style="pipeDelimited", explode=False), Join.PIPE),
        (query(ARRAY, style="pipeDelimited", explode=True), Join.REPEATED),
        (query({"type": ["string", "null"]}), Join.REPEATED),
        (query({"anyOf": [STRING, {"type": "integer"}]}), Join.REPEATED),
        ({"name": "A-b", "in": "header", "schema": ARRAY}, Join.COMMA),
        (query({"type": "object"}), None),
        (query(ARRAY, style="deepObject"), None),
        (query(STRING, style="matrix"), None),
        (query({"type": "array", "items": {"type": "object"}}), None),
        (query({"type": "array", "items": ARRAY}), None),
        (query({"type": "array"}, explode=False), Join.COMMA),
        (query({"anyOf": [STRING, ARRAY]}), None),
        ({"name": "a", "in": "query", "content": {"application/json": {}}}, None),
        ({"name": "a", "in": "body", "schema": STRING}, None),
        ({"name": "a", "in": "cookie", "schema": ARRAY}, None),
        ({"name": "a b", "in": "cookie", "schema": STRING}, None),
        ({"name": "", "in": "query", "schema": STRING}, None),
        ({"name": "x" * 200, "in": "query", "schema": STRING}, None),
        *(
            ({"name": name, "in": "header", "schema": STRING}, None)
            for name in ("Host", "Api_Key", "Cookie", "X-Original-URL", "Content-Type", "Transfer-Encoding", "a:b", "é")
        ),
        *(
            ({"name": name, "in": "query", "schema": STRING}, None)
            for name in ("_method", "_Method", "X-HTTP-Method-Override")
        ),
    ],
)
def test_a_parameter_in_a_form_that_is_not_known_does_not_exist(parameter: dict[str, Any], join: Join | None) -> None:
    (operation,) = read(get(parameter), "op").operations
    assert [each.join for each in operation.arguments] == ([] if join is None else [join])
    required = {**parameter, "required": True}
    is_dropped = parameter["in"] == "header" and join is None  # of headers that are never taken there are none to need
    if join is None and not is_dropped:
        with pytest.raises(RequestError, match="op"):
            read(get(required), "op")


def test_a_range_of_types_is_for_bytes_only() -> None:
    """What would be read strictly if it were named must not get through unread."""
    anything = (Media("*/*", BodyKind.BYTES, None, {}),)
    assert matching(anything, "image/png") is matching(anything, "application/pdf") is anything[0]
    for type_ in ("application/json", "application/problem+json", FORM, "text/plain", "multipart/form-data"):
        assert matching(anything, type_) is None


def test_two_headers_that_are_one_are_an_error() -> None:
    for other in ("x-a", "X_A"):
        with pytest.raises(RequestError, match="two headers"):
            read(get(*({"name": name, "in": "header", "schema": STRING} for name in ("X-A", other))), "op")


def test_bodies_of_known_kinds() -> None:
    content: dict[str, Any] = {
        "application/json": {},
        "text/csv": {},
        "multipart/form-data": {},
        "image/*": {},
        "APPLICATION/X-WWW-FORM-URLENCODED": {},
        "x": {},
        "application/merge-patch+json": {},
    }
    (operation,) = read({"/x": {"post": {"operationId": "op", "requestBody": {"content": content}}}}, "op").operations
    assert {each.type: each.kind for each in operation.media} == {
        "application/json": BodyKind.JSON,
        "text/csv": BodyKind.TEXT,
        "image/*": BodyKind.BYTES,
        "application/x-www-form-urlencoded": BodyKind.FORM,
        "application/merge-patch+json": BodyKind.JSON,
    }
    with pytest.raises(RequestError, match="media type"):
        read(post(STRING, "multipart/form-data", required=True), "op")


def test_a_constraint_is_of_something_that_is_there() -> None:
    paths = post({"type": "object"})
    paths["/x"]["post"]["parameters"] = [query(STRING), {"name": "X-A", "in": "header", "schema": STRING}]
    (operation,) = read(paths, "op", a=["1"], body__b__c=["2"], **{"X-A": ["3"]}).operations
    assert {each.name: each.values for each in operation.arguments} == {"a": ("1",), "x-a": ("3",)}
    assert [(each.way, each.values) for each in operation.constraints] == [(("b", "c"), ("2",))]
    for wrong in ("b", "A", "body", "body__", "body__a____b", "header__a"):
        with pytest.raises(RequestError, match="parameter"):
            read(paths, "op", **{wrong: ["1"]})
    for other in (get(query(STRING)), post(STRING, "text/plain")):
        with pytest.raises(RequestError, match="cannot be looked for"):
            read(other, "op", body__a=["1"])


# ---- schemas ----


def compiled(schema: Any, version: str = "3.1.0", components: Any = None) -> Any:
    (operation,) = read(post(schema, required=True), "op", version=version, components=components).operations
    return operation.media[0].schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "other.yaml#/x"},
        {"$ref": "http://169.254.169.254/x"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/components/schemas/None"},
        {"$ref": "#foo"},
        {"$ref": 3},
        {"$id": "http://x.example/"},
        {"$dynamicRef": "#x"},
        {"patternProperties": {"(a+)+$": {}}},
        {"unevaluatedProperties": False},
        {"items": {"pattern": "(?!x)"}},
        {"pattern": "(("},
        {"type": "strin"},
        {"type": "string", "maxLength": -1},
        {"properties": []},
        {"allOf": {}},
        "x",
        [],
        {"properties": {"a": {"allOf": [{"$ref": "#/components/schemas/Bad"}]}}},
    ],
)
def test_a_schema_that_cannot_be_checked_with_is_an_error(schema: Any) -> None:
    with pytest.raises(RequestError, match="op"):
        compiled(schema, components={"schemas": {"Bad": {"patternProperties": {"x": {}}}}})


@pytest.mark.timeout(60)
def test_references_in_a_circle() -> None:
    schemas = {
        "A": {"type": "object", "properties": {"a": {"$ref": "#/components/schemas/A"}}, "additionalProperties": False},
        "B": {"$ref": "#/components/schemas/C"},
        "C": {"$ref": "#/components/schemas/B"},
        "D": {"anyOf": [{"$ref": "#/components/schemas/D"}, {"$ref": "#/components/schemas/D"}]},
    }
    components = {"schemas": schemas}
    tree = compiled({"$ref": "#/components/schemas/A"}, components=components)
    assert tree.problem({"a": {"a": {}}}) is None and tree.problem({"a": {"b": {}}}) is not None
    for name in "BD":  # of which nothing holds
        assert compiled({"$ref": f"#/components/schemas/{name}"}, components=components).problem({}) is not None
    loop = {"parameters": {"A": {"$ref": "#/components/parameters/A"}}}
    with pytest.raises(RequestError, match="circle"):
        read(get({"$ref": "#/components/parameters/A"}), "op", components=loop)


def test_what_3_0_says_in_its_own_way() -> None:
    schema = {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 3, "exclusiveMaximum": False}
    checked = compiled(schema, "3.0.1")
    assert [checked.problem(value) is None for value in (1, 2, 3, 4)] == [False, True, True, False]
    assert compiled({"type": "string", "nullable": True}, "3.0.1").problem(None) is None
    assert compiled({"type": "string", "nullable": True}, "3.1.0").problem(None) is not None
    beside = {"$ref": "#/components/schemas/A", "maxLength": 1}
    components = {"schemas": {"A": STRING}}
    assert compiled(beside, "3.0.1", components).problem("xx") is None
    assert compiled(beside, "3.1.0", components).problem("xx") is not None


def test_what_only_answers_have_is_not_required() -> None:
    schema = {"required": ["a", "b"], "properties": {"a": {"readOnly": True}, "b": {}}}
    assert compiled(schema).problem({"b": 1}) is None and compiled(schema).problem({"a": 1}) is not None


def test_a_document_of_many_schemas_is_bounded() -> None:
    schemas: dict[str, Any] = {f"S{n}": {"allOf": [{"properties": {"a": {}}}] * 300} for n in range(100)}
    everything = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in schemas]}
    with pytest.raises(RequestError, match="too large"):
        compiled(everything, components={"schemas": schemas})


# ---- tools ----


def tools(declared: Declared, service: str = "s") -> list[Described]:
    return list(described(service, declared.operations, set()))


def test_tools_have_names_that_models_can_say() -> None:
    ids = ["a.b/c", "a_b_c", "x" * 200, "x" * 199 + "y", "../..", "ünï"]
    paths = {f"/{n}": {"get": {"operationId": name}} for n, name in enumerate(ids)}
    names = [each.name for each in tools(read(paths, *ids))]
    assert len(set(names)) == len(ids) and names[0] == "s_a_b_c"
    for name in names:
        assert 0 < len(name) <= 64 and all(c.isascii() and (c.isalnum() or c in "_-") for c in name)


def test_tools_of_two_services_have_names_of_their_own() -> None:
    declared, taken = (
        read({"/b": {"get": {"operationId": "b_c"}}, "/c": {"get": {"operationId": "c"}}}, "b_c", "c"),
        set[str](),
    )
    names = [each.name for service in ("a", "a_b", "a.b") for each in described(service, declared.operations, taken)]
    assert len(set(names)) == len(names) == 6 and "." not in "".join(names)


def test_what_somebody_else_has_written_is_shown_as_text() -> None:
    paths = get(query(STRING, description="a\x1b[2Jb\u202ec"), description="one\ntwo\x00" + "x" * 5000)
    (tool,) = tools(read(paths, "op"))
    shown = tool.description + json.dumps(tool.input_schema)
    assert "\x1b" not in shown and "\u202e" not in shown and "\x00" not in shown and len(shown) < 2000


def test_arguments_of_one_name_are_told_apart() -> None:
    parameters = [
        query(STRING),
        {"name": "a", "in": "header", "schema": STRING},
        {"name": "body", "in": "query", "schema": STRING},
    ]
    paths = {"/x": {"post": {**post({"type": "object"}, required=True)["/x"]["post"], "parameters": parameters}}}
    (tool,) = tools(read(paths, "op"))
    assert set(tool.input_schema["properties"]) == {"query_a", "header_a", "body", "request_body"}  # type: ignore[arg-type]
    asked = tool.asked({"query_a": "1", "header_a": "2", "body": "3", "request_body": {}})
    assert asked.values == {(Place.QUERY, "a"): "1", (Place.HEADER, "a"): "2", (Place.QUERY, "body"): "3"}
    assert asked.body == {}


def test_the_schema_of_each_tool_stands_on_its_own() -> None:
    declared = Reader(
        load(str(DOCUMENT)), Service("t", "", "", operations("createTicket", "listTickets")), "x", ""
    ).read()
    for tool in tools(declared):
        Draft202012Validator.check_schema(tool.input_schema)
    create = Draft202012Validator(tools(declared)[0].input_schema)
    assert create.is_valid({"body": {"title": "x", "parent": {"title": "y"}}})
    assert not create.is_valid({"body": {"title": "x", "parent": {}}})


# ---- the document that agents read ----


def test_only_what_is_named_is_in_the_cut_document() -> None:
    document = load(str(DOCUMENT))
    for names in (("listTickets",), ("getTicket", "putNote"), ("search",)):
        declared = Reader(document, Service("t", "", "", operations(*names)), "x", "").read()
        cut = Cutter(document).cut(declared.operations, "http://inside")
        again = Reader(Document(cut), Service("t", "", "", operations(*names)), "x", "").read()
        for ours, theirs in zip(declared.operations, again.operations, strict=True):
            assert [each.name for each in ours.arguments] == [each.name for each in theirs.arguments]
            assert [each.type for each in ours.media] == [each.type for each in theirs.media]
        assert len(again.places) == len(names)


def test_limits_are_told_in_the_cut_document() -> None:
    document = load(str(DOCUMENT))
    for names, globs in (
        (("listTickets",), {"state": ["open"]}),
        (("createTicket",), {"body__project__key": ["open"]}),
    ):
        declared = Reader(document, Service("t", "", "", operations(*names, **globs)), "x", "").read()
        assert "Allowed values: " in json.dumps(Cutter(document).cut(declared.operations, "u"))


def test_the_cut_document_is_bounded() -> None:
    paths = {"/x": {"get": {"operationId": "op", "responses": {"200": {"$ref": "#/paths/~1x/get"}}}}}
    root: dict[str, Any] = {"openapi": "3.1.0", "paths": paths}
    declared = Reader(Document(root), Service("s", "", "", operations("op")), "x", "").read()
    with pytest.raises(RequestError, match="too large"):
        Cutter(Document(root)).cut(declared.operations, "u")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["#/x", "query", "path", "string"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "$ref",
                    "type",
                    "items",
                    "properties",
                    "parameters",
                    "name",
                    "in",
                    "schema",
                    "requestBody",
                    "content",
                    "application/json",
                    "required",
                    "allOf",
                    "enum",
                    "pattern",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JSON, JSON)
def test_whatever_a_document_holds_it_is_read_or_refused(operation: Any, components: Any) -> None:
    value = {**operation, "operationId": "op"} if isinstance(operation, dict) else operation
    root = {"openapi": "3.1.0", "paths": {"/x": {"post": value}}, "x": components}
    try:
        declared = Reader(Document(root), Service("s", "", "", operations("op")), "x", "").read()
        cut = Cutter(Document(root)).cut(declared.operations, "u")
        found = tools(declared)
    except RequestError:
        return
    assert len(found) <= 1 and json.dumps(cut)


# ---- what is missing is an error of the request ----


def test_a_credential_that_is_missing_is_an_error() -> None:
    service = Service("s", str(DOCUMENT), "http://x.example", operations("listTickets"), CREDENTIAL)
    with pytest.raises(RequestError, match="env:TICKETS_KEY"):
        prepare(Policy(api=Api(services=(service,))), {})
    prepare(Policy(api=Api(services=(service,))), {"TICKETS_KEY": "long enough"})


def test_authorities_that_are_missing_are_an_error() -> None:
    with pytest.raises(RequestError, match="SSL_CERT_FILE"):
        prepare(Policy(), {"SSL_CERT_FILE": "/nowhere"})
    assert ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED


async def test_a_document_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    policy = Policy(api=Api(services=(Service("s", str(file), "http://x.example", (Operation("a"),)),)))
    nobody: Any = object()
    for path in ("/1", "/1", "/2"):
        file.write_text(f"openapi: 3.1.0\npaths: {{{path}: {{get: {{operationId: a}}}}}}")
        handler = prepare(policy, {})(Setting("box", "box", policy, nobody, nobody, (), None, nobody, ""))
        assert path in str(vars(handler)["_listed"])
    file.unlink()
    with pytest.raises(RequestError, match="cannot be read"):
        prepare(policy, {})


async def test_two_services_may_have_one_document_and_tools_that_sound_alike(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("openapi: 3.1.0\npaths: {/a: {get: {operationId: b_c}}, /b: {get: {operationId: c}}}")
    services = tuple(
        Service(name, str(file), "http://x.example", (Operation(each),)) for name, each in (("a", "b_c"), ("a_b", "c"))
    )
    policy = Policy(api=Api(services=services))
    opening = prepare(policy, {})
    nobody: Any = object()
    opening(Setting("box", "box", policy, nobody, nobody, (), None, nobody, ""))  # raises if they are called the same
