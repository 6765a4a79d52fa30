"""The JSON Schema for editors, the models behind it, and the reference: all say the same."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings

from corral.errors import PolicyError
from corral.policy import fields, flow_rules, model, notation, rules, schema, services, sources, upstreams
from corral.policy.json_schema import json_schema
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.policy.profiles import PROFILES
from tests.unit.policy_documents import DOCUMENTS, Document, written

DOC = Path(__file__).parents[2] / "docs" / "policy.md"
SECTIONS = {field.name: getattr(Policy(), field.name) for field in dataclasses.fields(Policy)}
RULES: dict[type[notation.Rule], set[str]] = {
    rules.DeniedRuleFile: {"name", "ip", "cidr", "port", "protocol", "requests"},
    rules.NetworkRuleFile: {"name", "ip", "cidr", "port", "protocol", "requests"}
    | {"permit", "intercept", "credential", "limits"},
    rules.ExecRuleFile: {"path", "argv"},
    rules.ModelRuleFile: {"name"},
    rules.DataRuleFile: {"source", "statements", "tables"},
    rules.ApiRuleFile: {"service", "operations"},
}
PARTS: dict[type[fields.Strict], set[str]] = {
    flow_rules.RequestRuleFile: {"method", "path"},
    flow_rules.CredentialFile: {"type", "from", "header", "user"},
    flow_rules.LimitsFile: {"connections", "up", "down", "session_up", "session_down"}
    | {"idle", "dial", "header", "body"},
    upstreams.UpstreamFile: {"name", "url", "api", "models", "credential", "rename"},
    upstreams.PriceFile: {"model", "input", "output", "cached", "written"},
    upstreams.BudgetFile: {"tokens", "money", "requests", "requests_per_minute", "concurrent", "wall_time"},
    upstreams.PatienceFile: {"connect", "first", "idle", "total", "retries"},
    upstreams.GuardFile: {"scanners", "finding", "failure"},
    sources.SourceFile: {"name", "dialect", "url", "password", "role", "tables", "limits", "hold_writes"},
    sources.TableFile: {"name", "columns", "rows", "statements"},
    sources.ColumnFile: {"name", "use", "personal"},
    sources.DataLimitsFile: {"rows", "bytes", "time", "cost", "queries_per_minute", "concurrent"},
    services.ServiceFile: {"name", "document", "url", "operations", "credential"}
    | {"requests_per_minute", "concurrent", "time", "bytes"},
    services.OperationFile: {"id", "parameters"},
}
NOTE = {"reason", "advice", "private"}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema())


def examples() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", DOC.read_text(), re.DOTALL)


# --- Models, values, reference --------------------------------------------------------------------------------------


def test_the_models_of_the_file_mirror_the_values() -> None:
    assert [name for name in schema.PolicyFile.model_fields if name not in ("version", "profile")] == list(SECTIONS)
    for name, values in SECTIONS.items():
        if dataclasses.is_dataclass(values):
            assert list(schema.MAPPINGS[(name,)].model_fields) == [field.name for field in dataclasses.fields(values)]


def test_the_defaults_of_the_file_are_those_of_the_values() -> None:
    assert parse_policy(written(_all_defaults()), source="/p.yaml") == Policy()


def _all_defaults() -> Document:
    file = schema.PolicyFile()
    document: Document = json.loads(file.model_dump_json(exclude_none=True))
    document["network"] |= {"loopback": "allow", "listen": "allow"}
    document["irreversible"] = "ask"
    return document


def test_the_reference_names_every_field() -> None:
    known = {"version", "profile", "irreversible", "allow_degraded"}
    for name, values in SECTIONS.items():
        if dataclasses.is_dataclass(values):
            known |= {f"{name}.{field.name}" for field in dataclasses.fields(values)}
    rows = re.findall(r"^\| `([a-z_.]+)` \|", DOC.read_text(), re.MULTILINE)
    words = {*rules.PROTOCOLS, *(each.value for each in model.Permit if each.value.isalpha())}
    assert set(rows) > words
    fields_of_parts = set.union(NOTE, *RULES.values(), *PARTS.values())
    assert set(rows) - set(PROFILES) - words == (known | fields_of_parts) - words


def test_rules_have_the_fields_that_the_reference_names() -> None:
    for rule, names in RULES.items():
        assert set(rule.model_fields) == names | NOTE
    for part, names in PARTS.items():
        assert {field.alias or name for name, field in part.model_fields.items()} == names
    kinds = [model.NetworkRule, model.ExecRule, model.ModelRule, model.DataRule, model.ApiRule]
    assert all("note" in {field.name for field in dataclasses.fields(kind)} for kind in kinds)


def test_the_reference_names_every_profile() -> None:
    assert all(f"| `{name}` |" in DOC.read_text() for name in PROFILES)


def test_the_examples_of_the_reference_load_and_use_every_section(validator: jsonschema.Draft202012Validator) -> None:
    used: set[str] = set()
    for example in examples():
        assert isinstance(parse_policy(example, source="/cfg/project/policy.yaml"), Policy)
        document = yaml.safe_load(example)
        validator.validate(document)
        used |= set(document)
    assert used >= set(SECTIONS) - {"detection"}


# --- The schema -----------------------------------------------------------------------------------------------------


def test_the_schema_is_one() -> None:
    found = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert '"null"' not in json.dumps(found)


def test_every_field_is_described() -> None:
    found = json_schema()
    for name, definition in [("", found), *found["$defs"].items()]:
        mapping = next(each for each in definition.get("anyOf", [definition]) if "properties" in each)
        assert mapping["description"], name
        assert mapping["additionalProperties"] is False, name
        for field, each in mapping["properties"].items():
            assert each.get("description") or found["$defs"][each["$ref"].rpartition("/")[2]], f"{name}.{field}"


def test_making_the_schema_leaves_no_trace() -> None:
    assert json_schema() == json_schema()


@pytest.mark.parametrize(
    "text",
    [
        "nonsense: 1",
        "version: 2",
        "profile: lock",
        "resources: {memory: much}",
        "resources: {memory: 512mb}",
        "resources: {cpu: 0}",
        "resources: {cpu: null}",
        "resources: null",
        "network: {listen: kill}",
        "network: {allow: a.example}",
        "network: {allow: [1]}",
        "network: {allow: [{name: a.example, port: 0}]}",
        "network: {allow: [{name: a.example, port: []}]}",
        "network: {allow: [{name: a.example, protocol: x}]}",
        "network: {allow: [{nmae: a.example}]}",
        "network: {allow: [{name: a.example, permit: [magic]}]}",
        "network: {allow: [{name: a.example, permit: []}]}",
        "network: {allow: [{name: a.example, requests: []}]}",
        "network: {allow: [{name: a.example, requests: [{method: []}]}]}",
        "network: {allow: [{name: a.example, requests: [{path: x}]}]}",
        "network: {allow: [{name: a.example, credential: {type: magic, from: 'env:A'}}]}",
        "network: {allow: [{name: a.example, credential: {type: bearer, source: 'env:A'}}]}",
        "network: {allow: [{name: a.example, credential: {type: bearer, from: secret}}]}",
        "network: {allow: [{name: a.example, credential: secret}]}",
        "network: {allow: [{name: a.example, limits: {connections: 0}}]}",
        "network: {allow: [{name: a.example, limits: {up: much}}]}",
        "network: {deny: [{name: a.example, permit: [ech]}]}",
        "network: {resolvers: 192.0.2.1}",
        "network: {proxy: 'socks5://192.0.2.1:1080'}",
        "process: {deny: [{argv: [a]}]}",
        "process: {deny: [{path: a, argv: []}]}",
        "syscalls: {deny: [read]}",
        "environment: {set: {1A: x}}",
        "environment: {set: {A: 1}}",
        "environment: {allow: ['*']}",
        "data: {allow: [{source: w, tables: []}]}",
        "api: {allow: [{service: s, operations: []}]}",
        "api: {services: [{name: s, document: d, url: ftp://a.example}]}",
        "api: {services: [{name: s, document: d, url: https://a.example, operations: [{parameters: {}}]}]}",
        "data: {sources: [{name: s, dialect: oracle, url: ./s}]}",
        "data: {sources: [{name: s, dialect: sqlite, url: ./s, password: secret}]}",
        "data: {sources: [{name: s, dialect: sqlite, url: ./s, tables: [{name: t, columns: []}]}]}",
        "data: {sources: [{name: s, dialect: sqlite, url: ./s, tables: [{name: t}]}]}",
        "model: {upstreams: [{name: u, url: https://a.example}]}",
        "model: {upstreams: [{name: u, url: https://a.example, api: magic}]}",
        "model: {upstreams: [{name: u, url: https://a.example, api: openai, models: []}]}",
        "model: {currency: usd}",
        "model: {prices: [{model: m, input: 1}]}",
        "model: {session: {tokens: 0}}",
        "model: {session: {money: -1}}",
        "model: {patience: {retries: 11}}",
        "model: {guard: {finding: allow}}",
        "approvals: {timeout: soon}",
        "allow_degraded: [seccomp]",
    ],
)
def test_an_editor_sees_what_the_loader_refuses(text: str, validator: jsonschema.Draft202012Validator) -> None:
    with pytest.raises(PolicyError):
        parse_policy(text, source="p.yaml")
    assert not validator.is_valid(yaml.safe_load(text))


@settings(deadline=None)  # documents are large, and machines busy
@given(DOCUMENTS)
def test_what_the_loader_takes_an_editor_takes(document: Document) -> None:
    jsonschema.Draft202012Validator(_SCHEMA).validate(document)


_SCHEMA: dict[str, Any] = json_schema()
