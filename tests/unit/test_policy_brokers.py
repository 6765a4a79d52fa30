"""What a policy file says of brokers: every fault with its line, one value for one meaning, and what is inherited."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Content
from corral.errors import PolicyError
from corral.policy.canonical import canonical_form, policy_hash
from corral.policy.difference import differences
from corral.policy.doors import Broker, open_brokers
from corral.policy.load import load_policy, parse_policy
from corral.policy.model import (
    MIB,
    Budget,
    Column,
    ColumnUse,
    Credential,
    CredentialKind,
    DataLimits,
    Dialect,
    Guard,
    ModelApi,
    Operation,
    Parameter,
    Patience,
    Policy,
    Price,
    Service,
    Source,
    TableScope,
    Treatment,
    Upstream,
)
from corral.policy.places import host_and_port, is_in_clear, web_url
from corral.policy.services import MAX_VALUES
from corral.policy.sources import MAX_CONDITION
from corral.policy.upstreams import MAX_UPSTREAMS
from tests.unit.policy_documents import DOCUMENTS, Document, document_of, written

SECRET = "s7312345"
"""Must show in no message."""
WHOLE = """\
model:
  allow: [gpt-*, {name: "claude-*"}]
  upstreams:
    - name: openai
      url: https://API.openai.example:443/v1/
      api: openai
      models: [gpt-*]
      credential: {type: bearer, from: "env:OPENAI_API_KEY"}
      rename: {gpt-small: gpt-5-mini}
    - {name: near, url: "http://127.0.0.1:8000", api: anthropic}
  currency: EUR
  prices: [{model: "gpt-*", input: 2.5, output: 10, cached: 1.25}]
  session: {tokens: 1000000, money: 5, requests: 500, requests_per_minute: 60, concurrent: 8, wall_time: 2h}
  agent: {money: 50}
  agent_period: 12h
  patience: {connect: 5s, first: 1m, idle: 30s, total: 30m, retries: 0}
  guard: {scanners: [instructions], finding: record, failure: block}
  hosted_tools: [mcp, "web_search*"]
  remote_content: true
data:
  allow: [crm]
  sources:
    - name: crm
      dialect: postgresql
      url: postgres://reader@db.example/crm
      password: env:CRM_PASSWORD
      role: agent_reader
      tables:
        - name: public.customers
          columns: [id, country, {name: email, use: mask, personal: true}, {name: ssn, use: deny}]
          rows: >
            country = 'DE'
            and id > 7
          statements: [UPDATE, select, select]
      limits: {rows: 10, bytes: 2MiB, time: 3s, cost: 10000, queries_per_minute: 6, concurrent: 2}
      hold_writes: false
    - {name: local, dialect: sqlite, url: data/x.sqlite}
api:
  allow: [tickets, {service: tickets, operations: ["list*"]}]
  services:
    - name: tickets
      document: openapi/tickets.yaml
      url: https://tickets.example/v2
      credential: {type: header, header: X-Key, from: "file:/etc/secrets/tickets"}
      operations: [listTickets, {id: "POST /t/{id}", parameters: {project: demo-*, body.a: [y, x, y]}}]
      requests_per_minute: 30
      concurrent: 1
      time: 5s
      bytes: 1MiB
"""


def parse(text: str) -> Policy:
    return parse_policy(text, source="/cfg/p.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    return [problem.removeprefix("/cfg/p.yaml:") for problem in caught.value.problems]


# ---- values ----


def test_everything_that_can_be_said() -> None:
    policy = parse(WHOLE)
    assert policy.model.upstreams == (
        Upstream(
            "openai",
            "https://api.openai.example/v1",
            ModelApi.OPENAI,
            ("gpt-*",),
            Credential(CredentialKind.BEARER, "env:OPENAI_API_KEY"),
            (("gpt-small", "gpt-5-mini"),),
        ),
        Upstream("near", "http://127.0.0.1:8000", ModelApi.ANTHROPIC),
    )
    assert policy.model.currency == "EUR" and policy.model.agent_period == 12 * 3600
    assert policy.model.prices == (Price("gpt-*", 2.5, 10.0, 1.25),)
    assert policy.model.session == Budget(1_000_000, 5.0, 500, 60, 8, 7200.0)
    assert policy.model.agent == Budget(money=50.0)
    assert policy.model.patience == Patience(5.0, 60.0, 30.0, 1800.0, 0)
    assert policy.model.guard == Guard(("instructions",), Treatment.RECORD, Treatment.BLOCK)
    assert (policy.model.hosted_tools, policy.model.remote_content) == (("mcp", "web_search*"), True)
    assert policy.data.sources == (
        Source(
            "crm",
            Dialect.POSTGRESQL,
            "postgresql://reader@db.example:5432/crm",
            "env:CRM_PASSWORD",
            "agent_reader",
            (
                TableScope(
                    "public.customers",
                    (
                        Column("id"),
                        Column("country"),
                        Column("email", ColumnUse.MASK, personal=True),
                        Column("ssn", ColumnUse.DENY),
                    ),
                    "country = 'DE' and id > 7",
                    ("select", "update"),
                ),
            ),
            DataLimits(10, 2 * MIB, 3.0, 10_000.0, 6, 2),
            hold_writes=False,
        ),
        Source("local", Dialect.SQLITE, "/cfg/data/x.sqlite"),
    )
    assert policy.api.services == (
        Service(
            "tickets",
            "/cfg/openapi/tickets.yaml",
            "https://tickets.example/v2",
            (
                Operation("listTickets"),
                Operation("POST /t/{id}", (Parameter("body.a", ("x", "y")), Parameter("project", ("demo-*",)))),
            ),
            Credential(CredentialKind.HEADER, "file:/etc/secrets/tickets", "x-key"),
            30,
            1,
            5.0,
            MIB,
        ),
    )
    assert open_brokers(policy) == tuple(Broker) and open_brokers(Policy()) == ()


def test_what_brokers_see_can_be_kept() -> None:
    kept = parse("log: {keep: {prompt: 1d, response: 2d, query: 3d}}").log.keep
    assert kept == ((Content.PROMPT, 86400.0), (Content.RESPONSE, 172800.0), (Content.QUERY, 259200.0))


# ---- faults ----

UPSTREAM = "model:\n  upstreams:\n    - name: u\n      api: openai\n      url: {}"
SOURCE = "data:\n  sources:\n    - name: s\n      dialect: postgresql\n      url: {}"
TABLE = SOURCE.format("./s\n      tables:\n        - name: t\n          ").replace("postgresql", "sqlite")
SERVICE = "api:\n  services:\n    - name: s\n      document: ./d\n      url: https://a.example\n      "
QUERY = "has a query or a fragment (leave it out; the place of a secret is `credential`)"
USER = "has a user or a password in it (leave it out; the place of a secret is `credential`)"
SCHEME = "must be a URL that begins with https:// (or http://)"
PLAIN = "is not a URL (up to 2048 plain characters, no blanks)"
HOST = "has no host that is understood (write a name, or an address in its usual form)"
PATH = "has a path that is not plain (letters, digits and `._~:+,=-` between single slashes)"
DATABASE = "postgresql://USER@HOST:5432/DATABASE"
NO_SECRET = "must say where the secret is: `env:NAME` or `file:/path` (the secret itself does not belong here)"
IN_CLEAR = "would be sent in clear, where others can read it (write https://, or an address that is private)"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"https://a.example/v1?key={SECRET}", QUERY),
        (f"https://a.example/v1#{SECRET}", QUERY),
        (f"https://me:{SECRET}@a.example", USER),
        (f"https://{SECRET}@a.example", USER),
        ("ftp://a.example", SCHEME),
        ("HTTPS://a.example", SCHEME),
        (f"{SECRET}", SCHEME),
        ("a.example", SCHEME),
        ("'https://a.example/ x'", PLAIN),
        ("'https://a.example\\x'", PLAIN),
        ("https://ä.example", PLAIN),
        (f"https://a.example/{'x' * 2048}", PLAIN),
        ("'https://'", HOST),
        ("https:///v1", HOST),
        ("https://0x7f.1", HOST),
        ("https://2130706433", HOST),
        ("'https://*.a.example'", HOST),
        ("https://a..example", HOST),
        ("'https://[2001:db8::1%eth0]'", HOST),
        ("'https://[2001:db8::1'", "has no host that is understood (an IPv6 address is written in [])"),
        ("'https://[2001:db8::1]x'", "has no host that is understood (an IPv6 address is written in [])"),
        ("'https://[a.example]'", "has no host that is understood (an IPv6 address is written in [])"),
        ("https://a.example:0", "has a port that is none (1 to 65535)"),
        ("https://a.example:65536", "has a port that is none (1 to 65535)"),
        ("'https://a.example:'", "has a port that is none (1 to 65535)"),
        ("https://a.example/v1//x", PATH),
        ("https://a.example/../x", PATH),
        ("https://a.example/%2e%2e/x", PATH),
        ("https://a.example/./x", PATH),
        (
            "http://model.corral.internal/v1",
            "leads to a broker's own name, which is there inside only (write where it is outside)",
        ),
        (
            "http://X.Corral.Internal./v1",
            "leads to a broker's own name, which is there inside only (write where it is outside)",
        ),
    ],
)
def test_a_url_is_plain_and_holds_no_secret(url: str, message: str) -> None:
    assert problems(UPSTREAM.format(url)) == [f"5: model.upstreams[0].url: {message}"]
    assert problems(f"api:\n  services:\n    - name: s\n      document: ./d\n      url: {url}") == [
        f"5: api.services[0].url: {message}"
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            f"postgresql://me:{SECRET}@db.example/d",
            "has a password in it (leave it out, and say where it is: `password: env:NAME`)",
        ),
        (
            "postgresql://me:@db.example/d",
            "has a password in it (leave it out, and say where it is: `password: env:NAME`)",
        ),
        (
            f"postgresql://me@db.example/d?password={SECRET}",
            f"has options after the database (leave them out: {DATABASE})",
        ),
        ("postgresql://db.example/d", f"has no user that is understood (letters, digits and `_.$-`: {DATABASE})"),
        ("postgresql://a@b@db.example/d", f"has no user that is understood (letters, digits and `_.$-`: {DATABASE})"),
        ("postgresql://%6De@db.example/d", f"has no user that is understood (letters, digits and `_.$-`: {DATABASE})"),
        ("postgresql://me@db.example", f"has no database that is understood (letters, digits and `_.$-`: {DATABASE})"),
        (
            "postgresql://me@db.example/d/e",
            f"has no database that is understood (letters, digits and `_.$-`: {DATABASE})",
        ),
        ("postgresql://me@/d", HOST),
        ("postgresql://me@db.example:x/d", "has a port that is none (1 to 65535)"),
        ("mysql://me@db.example/d", f"must be {DATABASE} (`dialect: postgresql`)"),
        ("./data.sqlite", f"must be {DATABASE} (`dialect: postgresql`)"),
        (f"'postgresql://me@db.example/{SECRET} x'", PLAIN),
    ],
)
def test_a_database_is_where_its_dialect_wants_it(url: str, message: str) -> None:
    assert problems(SOURCE.format(url)) == [f"5: data.sources[0].url: {message}"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # upstreams
        (
            "model:\n  upstreams: [{name: u}]",
            [
                "2: model.upstreams[0]: has no `url` (add it)",
                "2: model.upstreams[0]: has no `api` (add it)",
            ],
        ),
        (
            "model: {upstreams: [{name: u v, url: https://a.example, api: openai}]}",
            [
                "1: model.upstreams[0].name: 'u v': use up to 64 letters, digits and `._+:-`, a letter or digit first",
            ],
        ),
        (
            UPSTREAM.format("https://a.example").replace("openai", "opena"),
            ["4: model.upstreams[0].api: 'opena' is not an API of models that is known (did you mean `openai`?)"],
        ),
        (
            UPSTREAM.format("https://a.example").replace("openai", "7"),
            ["4: model.upstreams[0].api: must be a word (known: anthropic, openai)"],
        ),
        (
            UPSTREAM.format("https://a.example\n      models: []"),
            ["6: model.upstreams[0].models: is an empty list (leave it out to mean all)"],
        ),
        (
            UPSTREAM.format("https://a.example\n      models: ['a b']"),
            [
                "6: model.upstreams[0].models[0]: 'a b' is not a name or a pattern of names (no blanks, at most 255)",
            ],
        ),
        (
            UPSTREAM.format(f"https://a.example\n      credential: {{type: bearer, from: {SECRET}}}"),
            [f"6: model.upstreams[0].credential.from: {NO_SECRET}"],
        ),
        (
            UPSTREAM.format("http://a.example\n      credential: {type: bearer, from: 'env:A'}"),
            [f"3: model.upstreams[0]: its `credential` {IN_CLEAR}"],
        ),
        (
            UPSTREAM.format("http://8.8.8.8\n      credential: {type: bearer, from: 'env:A'}"),
            [f"3: model.upstreams[0]: its `credential` {IN_CLEAR}"],
        ),
        (
            UPSTREAM.format("https://a.example\n      models: [gpt-*]\n      rename: {claude: x}"),
            [
                "3: model.upstreams[0]: `rename` has a name that is not among its `models`, and can never be asked for",
            ],
        ),
        (
            UPSTREAM.format("https://a.example\n      rename: {a: 'b*'}"),
            [
                "6: model.upstreams[0].rename.a: holds what is not the name of one model "
                "(no blanks, no patterns, at most 255 characters)",
            ],
        ),
        (
            UPSTREAM.format("https://a.example\n      rename: {'a b': c}"),
            [
                "6: model.upstreams[0].rename.'a b': holds what is not the name of one model "
                "(no blanks, no patterns, at most 255 characters)",
            ],
        ),
        (
            "model:\n  upstreams:\n"
            "    - {name: u, url: https://a.example, api: openai}\n"
            "    - {name: v, url: https://a.example, api: openai}\n"
            "    - {name: u, url: https://b.example, api: openai}",
            ["3: model.upstreams: has two upstreams of the name 'u', at [0] and [2] (names are unique)"],
        ),
        (
            "model:\n  upstreams: ["
            + ", ".join(f"{{name: u{n}, url: https://a.example, api: openai}}" for n in range(MAX_UPSTREAMS + 1))
            + "]",
            ["2: model.upstreams: has more than 64 entries"],
        ),
        # prices, budgets, patience, guard
        ("model: {currency: euro}", ["1: model.currency: must be the three letters of a currency (ISO 4217: `USD`)"]),
        ("model: {prices: [{model: m, input: 1}]}", ["1: model.prices[0]: has no `output` (add it)"]),
        ("model: {prices: [{model: m, input: -1, output: 1}]}", ["1: model.prices[0].input: must be at least 0"]),
        (
            "model: {prices: [{model: m, input: .nan, output: 1}]}",
            ["1: model.prices[0].input: must be a finite number"],
        ),
        (
            "model: {prices: [{model: m, input: 1, output: 1e9}]}",
            ["1: model.prices[0].output: must be at most 1000000"],
        ),
        ("model: {session: {tokens: 0}}", ["1: model.session.tokens: must be at least 1"]),
        ("model: {session: {tokens: 1.5}}", ["1: model.session.tokens: must be a whole number"]),
        ("model: {session: {money: 0}}", ["1: model.session.money: must be at least 1e-06"]),
        ("model: {agent: {money: .inf}}", ["1: model.agent.money: must be a finite number"]),
        ("model: {agent: {monney: 1}}", ["1: model.agent.monney: unknown field (did you mean `money`?)"]),
        ("model: {agent: 5}", ["1: model.agent: must be a mapping (indented lines of `name: value`)"]),
        ("model: {patience: {retries: 11}}", ["1: model.patience.retries: must be at most 10"]),
        ("model: {patience: {idle: 0}}", ["1: model.patience.idle: must be between 0.001 seconds and 366 days"]),
        (
            "model: {guard: {finding: allow}}",
            ["1: model.guard.finding: 'allow' is not what can become of a request (known: record, block)"],
        ),
        (
            "model: {guard: {scanners: ['a b']}}",
            [
                "1: model.guard.scanners[0]: 'a b': use up to 64 letters, digits and `._+:-`, a letter or digit first",
            ],
        ),
        # sources
        (
            "data: {sources: [{name: s, dialect: oracle, url: x}]}",
            [
                "1: data.sources[0].dialect: 'oracle' is not a kind of database that is known "
                "(known: duckdb, mysql, postgresql, sqlite)",
            ],
        ),
        (
            f"data:\n  sources:\n    - {{name: s, dialect: sqlite, url: 'sqlite:///{SECRET}'}}",
            ["3: data.sources[0].url: must be the path of a file (`dialect: sqlite`)"],
        ),
        (
            "data: {sources: [{name: s, dialect: sqlite, url: ./s, password: 'env:P'}]}",
            ["1: data.sources[0]: `password` is of servers, and `sqlite` is a file"],
        ),
        (
            f"data: {{sources: [{{name: s, dialect: mysql, url: mysql://a@b.example/c, password: {SECRET}}}]}}",
            [f"1: data.sources[0].password: {NO_SECRET}"],
        ),
        (
            "data: {sources: [{name: s, dialect: mysql, url: mysql://a@b.example/c, role: r}]}",
            ["1: data.sources[0]: `role` belongs to `dialect: postgresql`, and there are none in `mysql`"],
        ),
        (
            SOURCE.format("postgresql://a@b.example/c\n      role: NONE"),
            ["6: data.sources[0].role: 'NONE' means no role at all (leave it out, or name one)"],
        ),
        (
            SOURCE.format("postgresql://a@b.example/c\n      role: 'a\"; drop'"),
            ["6: data.sources[0].role: 'a\"; drop' is not the name of a role"],
        ),
        (
            "data: {sources: [{name: s, dialect: duckdb, url: ./s, limits: {cost: 5}}]}",
            ["1: data.sources[0]: `limits.cost` cannot be held: `duckdb` estimates no cost (leave it out)"],
        ),
        (
            "data:\n  sources:\n    - {name: s, dialect: sqlite, url: ./s}\n    - {name: s, dialect: sqlite, url: ./t}",
            ["3: data.sources: has two sources of the name 's', at [0] and [1] (names are unique)"],
        ),
        # tables
        (TABLE + "rows: a = 1", ["7: data.sources[0].tables[0]: has no `columns` (add it)"]),
        (
            TABLE + "columns: []",
            ["7: data.sources[0].tables[0]: has no column that can be seen (name some, or leave the table out)"],
        ),
        (
            TABLE + "columns: [{name: a, use: deny}]",
            [
                "7: data.sources[0].tables[0]: has no column that can be seen (name some, or leave the table out)",
            ],
        ),
        (
            TABLE + "columns: ['*']",
            ["8: data.sources[0].tables[0].columns[0]: '*' is not the name of a column (without quotes, no patterns)"],
        ),
        (
            TABLE + "columns: [a, b, A]",
            [
                "8: data.sources[0].tables[0].columns: has two columns of the name 'a', "
                "at [0] and [2] (names are unique)",
            ],
        ),
        (
            TABLE + "columns: [{name: a, use: hide}]",
            [
                "8: data.sources[0].tables[0].columns[0].use: 'hide' is not what can be seen of a column "
                "(known: deny, hash, mask, show)",
            ],
        ),
        (
            TABLE + "columns: [a]\n          rows: ''",
            ["9: data.sources[0].tables[0].rows: is empty (leave it out to mean all rows)"],
        ),
        (
            TABLE + f"columns: [a]\n          rows: \"a = '{SECRET}'\\n and b\"",
            [
                "9: data.sources[0].tables[0].rows: is not one line of up to 4000 printable characters "
                "(begin a long one with `>-`)",
            ],
        ),
        (
            TABLE + f"columns: [a]\n          rows: {'a' * (MAX_CONDITION + 1)}",
            [
                "9: data.sources[0].tables[0].rows: is not one line of up to 4000 printable characters "
                "(begin a long one with `>-`)",
            ],
        ),
        (
            TABLE + "columns: [a]\n          statements: [drop]",
            [
                "9: data.sources[0].tables[0].statements[0]: 'drop' cannot be done with a table "
                "(known: delete, insert, select, update)",
            ],
        ),
        (
            TABLE + "columns: [a]\n          statements: []",
            ["9: data.sources[0].tables[0].statements: is an empty list (leave it out to mean all)"],
        ),
        (
            TABLE.replace("name: t", "name: a.b.c.d") + "columns: [a]",
            [
                "7: data.sources[0].tables[0].name: 'a.b.c.d' is not the name of a table "
                "(TABLE, SCHEMA.TABLE, or DATABASE.SCHEMA.TABLE)",
            ],
        ),
        (
            TABLE.replace("name: t", "name: public.*") + "columns: [a]",
            [
                "7: data.sources[0].tables[0].name: '*' is not the name of a table (without quotes, no patterns)",
            ],
        ),
        (
            TABLE + "columns: [a]\n        - {name: T, columns: [a]}",
            ["7: data.sources[0].tables: has two tables of the name 't', at [0] and [1] (names are unique)"],
        ),
        # services
        (
            "api:\n  services: [{name: s, document: https://a.example/x, url: https://a.example}]",
            [
                "2: api.services[0].document: must be the path of a file (the document is read here, and not fetched)",
            ],
        ),
        (
            SERVICE.replace("https", "http") + "credential: {type: bearer, from: 'env:A'}",
            [f"3: api.services[0]: its `credential` {IN_CLEAR}"],
        ),
        (
            SERVICE + "operations: ['list*']",
            [
                "6: api.services[0].operations[0]: 'list*' is not an operation "
                "(name each by its id; patterns are for the rules)",
            ],
        ),
        (
            SERVICE + "operations: [get /a]",
            [
                "6: api.services[0].operations[0]: 'get /a' is not an operation "
                "(its `operationId`, or for example `GET /tickets/{id}`)",
            ],
        ),
        (
            SERVICE + "operations: [a, {id: a}]",
            ["6: api.services[0].operations: has two operations of the name 'a', at [0] and [1] (names are unique)"],
        ),
        (
            SERVICE + "operations: [{id: a, parameters: {p: []}}]",
            [
                "6: api.services[0].operations[0].parameters.p: is an empty list "
                "(leave the parameter out to mean any value)",
            ],
        ),
        (
            SERVICE + "operations: [{id: a, parameters: {'p q': x}}]",
            [
                "6: api.services[0].operations[0].parameters.'p q': 'p q' is not the name of a parameter "
                "(or `body.` and the way to a member)",
            ],
        ),
        (
            SERVICE + "operations: [{id: a, parameters: {p: 5}}]",
            ["6: api.services[0].operations[0].parameters.p: must be a list (indented lines of `- value`)"],
        ),
        (
            SERVICE + r"operations: [{id: a, parameters: {p: 'x\'}}]",
            [
                "6: api.services[0].operations[0].parameters.p: "
                r"'x\\': `\` takes the meaning from the next character, and there is none (`\\`?)",
            ],
        ),
        (
            SERVICE
            + f"operations: [{{id: a, parameters: {{p: [{', '.join(f'v{n}' for n in range(MAX_VALUES + 1))}]}}}}]",
            ["6: api.services[0].operations[0].parameters.p: has more than 256 entries"],
        ),
        (
            SERVICE + "bytes: 10",
            ['6: api.services[0].bytes: must be at least 1 KiB (is a unit missing, as in "4GiB"?)'],
        ),
        # rules
        (
            "api: {allow: ['a b']}",
            ["1: api.allow[0]: 'a b': use up to 64 letters, digits and `._+:-`, a letter or digit first"],
        ),
        (
            "api: {allow: [{service: a, operations: []}]}",
            ["1: api.allow[0].operations: is an empty list (leave it out to mean all)"],
        ),
        (
            "api: {allow: [{service: a, operations: [' x']}]}",
            [
                "1: api.allow[0].operations[0]: ' x' is not a glob of operations "
                "(such as `list*`, or `GET /tickets/*`)",
            ],
        ),
        (
            "log: {keep: {prompts: 1d}}",
            ["1: log.keep.prompts: 'prompts' is nothing that can be kept (did you mean `prompt`?)"],
        ),
    ],
)
def test_a_fault_and_its_line(text: str, wanted: list[str]) -> None:
    found = problems(text)
    assert found == wanted
    assert SECRET not in str(found)


@pytest.mark.parametrize("field", ["allow", "ask", "deny"])
@pytest.mark.parametrize(
    "rule",
    [
        "model.corral.internal",
        "MODEL.Corral.internal.:80",
        "corral.internal",
        "'*.corral.internal'",
        "'*.x.corral.internal:443'",
        "{name: any.corral.internal, cidr: 192.0.2.0/24}",
    ],
)
def test_no_rule_about_destinations_names_a_broker(field: str, rule: str) -> None:
    (found,) = problems(f"network:\n  {field}:\n    - {rule}")
    assert found.startswith(f"3: network.{field}[0]")
    assert found.endswith(
        ": `corral.internal` and what is below it are brokers, which `model.upstreams`, `data.sources` and "
        "`api.services` open (remove the rule)"
    )


def test_names_beside_the_brokers_are_like_all_others() -> None:
    rules = "['*.internal', corral.internal.example, notcorral.internal]"
    assert len(parse(f"network: {{allow: {rules}, deny: {rules}}}").network.deny) == 3


@pytest.mark.parametrize(
    ("url", "one_form"),
    [
        ("https://A.example.:443/", "https://a.example"),
        ("http://a.example:80/x/", "http://a.example/x"),
        ("https://a.example:80", "https://a.example:80"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://[2001:DB8::1]:8443/v1", "https://[2001:db8::1]:8443/v1"),
        ("https://[::ffff:192.0.2.1]", "https://192.0.2.1"),
    ],
)
def test_a_url_has_one_form(url: str, one_form: str) -> None:
    assert web_url(url) == one_form == web_url(one_form)


PIECES = st.text(st.sampled_from("htps:/[]@?#.%*\\ a1-_é\x00"), max_size=12)


@given(PIECES, PIECES, st.sampled_from(["https://", "http://", "", "//"]))
def test_a_url_is_taken_in_one_form_or_not_echoed(before: str, after: str, scheme: str) -> None:
    text = f"{scheme}{before}{SECRET}{after}"
    try:
        url = web_url(text)
    except ValueError as error:
        assert SECRET not in str(error)
    else:
        assert web_url(url) == url and set("@?#%\\ ").isdisjoint(url)
        host, port = host_and_port(url)
        assert host and 1 <= port <= 65535


@pytest.mark.parametrize(
    ("url", "readable"),
    [
        ("https://a.example", False),
        ("http://a.example", True),
        ("http://localhost:1/v1", False),
        ("http://localhost.example", True),
        ("http://127.0.0.1", False),
        ("http://10.1.2.3:80", False),
        ("http://[fd00::1]:80", False),
        ("http://[2600::1]", True),
        ("http://8.8.8.8", True),
    ],
)
def test_a_secret_goes_in_clear_only_where_nobody_else_is(url: str, readable: bool) -> None:
    assert is_in_clear(url) is readable


# ---- one meaning, one form ----


@settings(deadline=None)  # documents are large, and machines busy
@given(DOCUMENTS)
def test_file_value_and_form_are_stable(document: Document) -> None:
    policy = parse(written(document))
    again = parse(written(document_of(policy)))
    assert again == policy
    assert canonical_form(again) == canonical_form(policy)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("models: [gpt-*]", "models: [gpt-*, gpt-*]"),
        ("https://API.openai.example:443/v1/", "https://api.openai.example/v1"),
        ("postgres://reader@db.example/crm", "postgresql://reader@DB.example:5432/crm"),
        ("[UPDATE, select, select]", "[select, update]"),
        ("body.a: [y, x, y]", "body.a: [x, y]"),
        ("{project: demo-*, body.a: [y, x, y]}", "{body.a: [x, y], project: [demo-*]}"),
        ("time: 3s", "time: 3.0"),
        ('allow: [gpt-*, {name: "claude-*"}]', "allow: [claude-*, gpt-*]"),
    ],
)
def test_notation_makes_no_difference(old: str, new: str) -> None:
    assert old in WHOLE
    assert policy_hash(parse(WHOLE.replace(old, new))) == policy_hash(parse(WHOLE))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("currency: EUR", "currency: USD", 'model.currency: "EUR" -> "USD"'),
        ("money: 5,", "money: 6,", "model.session.money: 5 -> 6"),
        ("retries: 0", "retries: 1", "model.patience.retries: 0 -> 1"),
        ("finding: record", "finding: block", 'model.guard.finding: "record" -> "block"'),
        ("remote_content: true", "remote_content: false", "model.remote_content: true -> false"),
    ],
)
def test_a_change_is_told(old: str, new: str, said: str) -> None:
    one, other = canonical_form(parse(WHOLE)), canonical_form(parse(WHOLE.replace(old, new)))
    assert differences(one, other) == (said,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("env:OPENAI_API_KEY", "env:OTHER"),
        ("rename: {gpt-small: gpt-5-mini}", "rename: {gpt-small: gpt-5}"),
        ("api: anthropic", "api: openai"),
        ("cached: 1.25", "cached: 0"),
        ("columns: [id, country,", "columns: [country, id,"),
        ("use: mask", "use: hash"),
        ("personal: true", "personal: false"),
        ("id > 7", "id > 8"),
        ("role: agent_reader", "role: other"),
        ("hold_writes: false", "hold_writes: true"),
        ("demo-*", "live-*"),
        ("concurrent: 1\n", "concurrent: 2\n"),
    ],
)
def test_what_differs_has_another_hash(old: str, new: str) -> None:
    assert old in WHOLE
    assert policy_hash(parse(WHOLE.replace(old, new))) != policy_hash(parse(WHOLE))


def test_the_order_of_upstreams_and_prices_counts() -> None:
    first, second = "{name: a, url: https://a.example, api: openai}", "{name: b, url: https://a.example, api: openai}"
    one, other = (parse(f"model: {{upstreams: [{x}, {y}]}}") for x, y in ((first, second), (second, first)))
    assert differences(canonical_form(one), canonical_form(other)) == ("model.upstreams: in another order",)
    cheap, dear = "{model: '*', input: 0, output: 0}", "{model: '*', input: 1, output: 1}"
    one, other = (parse(f"model: {{prices: [{x}, {y}]}}") for x, y in ((cheap, dear), (dear, cheap)))
    assert policy_hash(one) != policy_hash(other)


def test_only_the_place_of_a_password_is_in_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    without = canonical_form(parse(WHOLE))
    monkeypatch.setenv("CRM_PASSWORD", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert canonical_form(parse(WHOLE)) == without and b"env:CRM_PASSWORD" in without


# ---- what is inherited ----


def inherited(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "team.yaml").write_text(WHOLE + "  deny: [{service: tickets, operations: [purge]}]\n")
    (tmp_path / "own.yaml").write_text(f"profile: ./team.yaml\n{text}")
    return load_policy(tmp_path / "own.yaml")


def test_a_budget_that_is_given_takes_no_other_away(tmp_path: Path) -> None:
    policy = inherited(tmp_path, "model: {session: {tokens: 5}, patience: {retries: 3}, guard: {failure: record}}")
    assert policy.model.session == Budget(5, 5.0, 500, 60, 8, 7200.0)
    assert policy.model.agent == Budget(money=50.0)
    assert policy.model.patience == Patience(5.0, 60.0, 30.0, 1800.0, 3)
    assert policy.model.guard == Guard(("instructions",), Treatment.RECORD, Treatment.RECORD)


def test_places_are_replaced_and_denials_kept(tmp_path: Path) -> None:
    policy = inherited(
        tmp_path,
        "model: {upstreams: [{name: x, url: https://x.example, api: openai}], prices: []}\n"
        "data: {sources: []}\n"
        "api: {services: [], allow: [], deny: [{service: other}]}\n",
    )
    assert [upstream.name for upstream in policy.model.upstreams] == ["x"]
    assert policy.model.prices == () and policy.data.sources == () and policy.api.services == ()
    assert policy.api.allow == ()
    assert [rule.service for rule in policy.api.deny] == ["tickets", "other"]
    assert open_brokers(policy) == (Broker.MODEL,)


def test_a_file_that_says_nothing_of_brokers_keeps_them(tmp_path: Path) -> None:
    policy = inherited(tmp_path, "")
    team = load_policy(tmp_path / "team.yaml")
    assert (policy.model, policy.data, policy.api) == (team.model, team.data, team.api)
