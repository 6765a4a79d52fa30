"""The API broker between a client and a service: what arrives, what is answered, what is accounted for."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any
from unittest import mock

import pytest
from mcp import Client

from corral.actions import Content, Ending, Kind, Verdict
from corral.actions import Operation as Tried
from corral.brokers.api import asking
from corral.brokers.api.media import FORM
from corral.monitor.plain import Bounds, to_plain
from corral.policy.model import ApiRule, Credential, CredentialKind, Operation
from tests.unit.api_bench import ALL, CANARY, CREDENTIAL, HOST, Bench, Reply, Seen, bench, operations
from tests.unit.loopback import served


async def test_a_call_arrives_as_it_was_checked() -> None:
    async with bench() as made:
        query = "q=a+b%2Fc%26d&state=open&limit=3&label=a&label=b%26c&ids=1%2C2&words=a|b&flag=true&ratio=1e3"
        got = await made.ask(
            "GET", f"/tickets/tickets?{query}", X_View="a, b", cookie="session=x1; other=2", authorization="Bearer mine"
        )
        assert (got.status, got.json) == (200, {"ok": True})
        arrived = made.arrived
        assert arrived.method == "GET" and arrived.path == ["v1", "tickets"]
        assert arrived.query == [
            ("state", "open"),
            ("limit", "3"),
            ("label", "a"),
            ("label", "b&c"),
            ("ids", "1,2"),
            ("words", "a|b"),
            ("flag", "true"),
            ("ratio", "1000.0"),
            ("q", "a b/c&d"),
        ]
        assert {name for name, _ in arrived.headers} == {
            "host", "accept", "accept-encoding", "user-agent", "x-view", "cookie", "api-key"
        }  # fmt: skip
        assert arrived.header("x-view") == "a,b" and arrived.header("cookie") == "session=x1"
        assert arrived.header("api-key") == CANARY and arrived.header("accept-encoding") == "identity"
        decision = made.decisions[-1]
        assert decision.action.name == "api.call" and str(decision.action.subject) == "listTickets of tickets"
        used = made.used
        assert (used.kind, used.source, used.name) == (Kind.API_CALL, "tickets", "listTickets")
        assert (used.ending, used.status, used.rule) == (Ending.ANSWERED, 200, "api.allow[0]")
        assert used.origin.step == 3 and used.bytes_down == len(got.body) and 0 < used.first <= used.seconds
        ((content, data, is_whole, about),) = made.kept.found
        assert (content, is_whole, about) == (Content.QUERY, True, "listTickets of tickets")
        assert made.kept.calls == [used.call] == [1]
        assert json.loads(data)["query"]["label"] == ["a", "b&c"]


async def test_a_json_body_is_written_anew() -> None:
    async with bench() as made:
        sent = b' { "title" : "h\\u00f6", "priority": 2, "owner": null,\n "extra": [1.50, {"a": true}] } '
        got = await made.ask("POST", "/tickets/tickets", sent, content_type="application/json; charset=UTF-8")
        assert got.status == 200
        assert made.arrived.body == '{"title":"hö","priority":2,"owner":null,"extra":[1.5,{"a":true}]}'.encode()
        assert made.arrived.header("content-type") == "application/json"
        assert made.used.bytes_up == len(made.arrived.body) + len("/tickets")


@pytest.mark.parametrize(
    ("method", "target", "body", "type_", "arrives"),
    [
        ("POST", "/search", b"text=a+b%26&page=2&tags=x&tags=y", FORM, b"text=a%20b%26&page=2&tags=x&tags=y"),
        ("PUT", "/tickets/7/notes/x.y.txt", "höhö".encode(), "text/plain", "höhö".encode()),
        ("PUT", "/tickets/7/notes/a%3Bb.txt", b"\x89PNG\x00", "image/png", b"\x89PNG\x00"),
    ],
)  # fmt: skip
async def test_other_bodies(method: str, target: str, body: bytes, type_: str, arrives: bytes) -> None:
    async with bench() as made:
        assert (await made.ask(method, "/tickets" + target, body, content_type=type_)).status == 200
        assert made.arrived.body == arrives and (made.arrived.header("content-type") or "").partition(";")[0] == type_
        assert made.arrived.target == "/v1" + target


async def test_what_there_is_is_told() -> None:
    async with bench(operations("listTickets", "GET /tickets/{id}")) as made:
        listed = (await made.ask("GET", "/")).json
        assert [each["id"] for each in listed["services"][0]["operations"]] == ["listTickets", "GET /tickets/{id}"]
        text = (await made.ask("GET", "/tickets/openapi.json")).body.decode()
        document = json.loads(text)
        assert document["servers"] == [{"url": "http://api.corral.internal/tickets"}]
        assert {path: set(item) for path, item in document["paths"].items()} == {
            "/tickets": {"get"},
            "/tickets/{id}": {"get"},
        }
        assert set(document["components"]["schemas"]) == {"Ticket", "Project"}
        for absent in (
            "xyzzy",
            "Admin",
            "169.254",
            "evil.example",
            "security",
            "api-key",
            "_method",
            "someone@",
            "deleteTicket",
            "host-17",
            "\x1b",
        ):
            assert absent not in text
        assert made.uses.found == [] and made.upstream.seen == []
        assert (await made.ask("POST", "/tickets/openapi.json")).status == 405
        assert (await made.ask("GET", "/other/openapi.json")).status == 404


async def test_the_answer_is_passed_on() -> None:
    async with bench() as made:
        base = f"http://127.0.0.1:{made.upstream.port}/v1"

        async def answer(seen: Seen, _: Any) -> Reply:
            fields = [("etag", '"1"'), ("link", f'<{base}/tickets?page=2>; rel="next"'), ("set-cookie", "a=b")]
            return 404, [*fields, ("connection", "x-hop"), ("x-hop", "1"), ("content-type", "text/plain")], b"none"

        made.upstream.answer = answer
        got = await made.ask("GET", "/tickets/tickets/1")
        assert (got.status, got.body, got.headers["content-type"]) == (404, b"none", "text/plain")
        assert got.headers["link"] == '<http://api.corral.internal/tickets/tickets?page=2>; rel="next"'
        assert got.headers["etag"] == '"1"' and not {"set-cookie", "x-hop"} & set(got.headers)
        assert (made.used.ending, made.used.status) == (Ending.ANSWERED, 404)


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body(status: int) -> None:
    async with bench() as made:

        async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 %d x\r\n\r\n" % status)
            await writer.drain()

        made.upstream.answer = answer
        got = await made.ask("DELETE", "/tickets/tickets/1")
        assert (got.status, got.body) == (status, b"")


async def test_requests_follow_one_another_on_one_connection() -> None:
    async with bench() as made:
        reader, writer = await asyncio.open_connection(*made.place.split(":"))
        for number in range(3):
            writer.write(f"GET /tickets/tickets/{number} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            assert b"200" in await reader.readuntil(b'{"ok":true}')
        writer.close()
        assert [seen.path[-1] for seen in made.upstream.seen] == ["0", "1", "2"] and len(made.uses.found) == 3


# ---- decisions ----


async def test_a_rule_denies() -> None:
    async with bench(deny=(ApiRule("tickets", ("delete*",)),)) as made:
        got = await made.ask("DELETE", "/tickets/tickets/1")
        assert got.status == 403 and "deleteTicket of tickets is not allowed" in got.detail
        assert (made.used.ending, made.used.rule, made.used.status) == (Ending.REFUSED, "api.deny[0]", 403)
        assert made.upstream.seen == []


async def test_what_no_rule_names_is_denied() -> None:
    async with bench(allow=(ApiRule("others"),)) as made:
        assert (await made.ask("GET", "/tickets/tickets")).status == 403
        assert made.upstream.seen == [] and made.used.ending is Ending.REFUSED


async def test_a_person_is_asked_before_anything_is_sent() -> None:
    async with bench(ask=(ApiRule("tickets", ("createTicket",)),)) as made:
        made.persons.answer = Verdict.DENY
        assert (await made.json("POST", "/tickets/tickets", {"title": "x"})).status == 403
        assert made.upstream.seen == [] and len(made.persons.asked) == 1
        made.persons.answer = Verdict.ALLOW
        assert (await made.json("POST", "/tickets/tickets", {"title": "x"})).status == 200
        assert len(made.upstream.seen) == 1
        assert [used.ending for used in made.uses.found] == [Ending.REFUSED, Ending.ANSWERED]


async def test_who_is_asked_sees_what_would_be_sent_and_no_record_does() -> None:
    async with bench(ask=(ApiRule("tickets", ("createTicket",)),)) as made:
        made.persons.answer = Verdict.DENY
        for title in ("first words", "x" * 9000 + "1", "x" * 9000 + "2"):
            await made.json("POST", "/tickets/tickets", {"title": title})
        shown = [action.subject for action in made.persons.asked]
        assert all(isinstance(each, Tried) for each in shown)
        one, two, three = (each.preview for each in shown if isinstance(each, Tried))
        assert one.startswith("POST /tickets\n") and '{"title":"first words"}' in one
        assert CANARY not in one
        assert len(two) < 4100 and two != three, "what cannot be shown whole is told apart all the same"
        plain, _ = to_plain(shown[0], Bounds())
        assert "first words" not in repr(plain)


async def test_a_write_that_no_rule_names_is_put_to_a_person() -> None:
    async with bench(irreversible=Verdict.ASK) as made:
        made.persons.answer = Verdict.DENY
        assert (await made.ask("GET", "/tickets/tickets")).status == 200
        assert (await made.ask("DELETE", "/tickets/tickets/1")).status == 403
        assert [seen.method for seen in made.upstream.seen] == ["GET"]


async def test_whoever_waits_for_a_person_and_leaves_is_no_longer_asked_for() -> None:
    async with bench(ask=(ApiRule("tickets"),)) as made:
        made.persons.answer = None
        _, writer = await asyncio.open_connection(*made.place.split(":"))
        writer.write(f"GET /tickets/tickets HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        await until(lambda: made.persons.asked)
        writer.close()
        await until(lambda: made.uses.found)
        assert made.used.ending is Ending.ABANDONED and made.upstream.seen == []
        await until(lambda: made.persons.withdrawn)


async def test_what_the_document_has_and_the_policy_has_not_is_a_denial() -> None:
    async with bench(operations("listTickets")) as made:
        for method, target in (
            ("DELETE", "/tickets/tickets/1"),
            ("POST", "/tickets/admin"),
            ("POST", "/tickets/tickets"),
        ):
            made.forget()
            got = await made.ask(method, target)
            assert got.status == 404 and "the policy does not have" in got.detail.lower()
            assert made.upstream.seen == [] and made.used.ending is Ending.REFUSED
            assert made.decisions[-1].verdict is Verdict.DENY and made.decisions[-1].rule == made.used.rule
        assert (await made.ask("PATCH", "/tickets/tickets")).headers["allow"] == "GET"


async def test_an_account_has_no_words_of_the_agent() -> None:
    async with bench(operations("listTickets", state=["open"])) as made:
        for query in ("limit=private", "private=1", "state=closed&q=private", "q=private"):
            assert (await made.ask("GET", f"/tickets/tickets?{query}")).status in (400, 403)
        assert all(used.reason and "private" not in repr(used) for used in made.uses.found)
        assert made.kept.found == []


# ---- limits ----


async def test_requests_per_minute() -> None:
    async with bench(requests_per_minute=2) as made:
        statuses = [(await made.ask("GET", "/tickets/tickets")).status for _ in range(3)]
        assert statuses == [200, 200, 429] and len(made.upstream.seen) == 2
        last = made.uses.found[-1]
        assert last.ending is Ending.REFUSED and last.rule == "api.services[0].requests_per_minute"
        again = await made.ask("GET", "/tickets/tickets")
        assert int(again.headers["retry-after"]) > 0 and "2 requests to tickets a minute" in again.detail


async def test_requests_at_one_time() -> None:
    async with bench(concurrent=2) as made:
        hold = asyncio.Event()

        async def answer(seen: Seen, _: Any) -> Reply:
            await hold.wait()
            return 200, [], b"{}"

        made.upstream.answer = answer
        waiting = [asyncio.create_task(made.ask("GET", "/tickets/tickets")) for _ in range(2)]
        await until(lambda: len(made.upstream.seen) == 2)
        assert (await made.ask("GET", "/tickets/tickets")).status == 429
        hold.set()
        assert [got.status for got in await asyncio.gather(*waiting)] == [200, 200]
        assert (await made.ask("GET", "/tickets/tickets")).status == 200


async def test_limits_hold_with_many_clients() -> None:
    async with bench(concurrent=4, requests_per_minute=200) as made:
        now, most = 0, 0

        async def answer(seen: Seen, _: Any) -> Reply:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.002)
            now -= 1
            return 200, [], b"{}"

        made.upstream.answer = answer

        async def client() -> list[int]:
            return [(await made.ask("GET", "/tickets/tickets")).status for _ in range(10)]

        statuses = [status for each in await asyncio.gather(*(client() for _ in range(64))) for status in each]
        assert set(statuses) == {200, 429} and len(statuses) == 640 == len(made.uses.found)
        assert 1 <= most <= 4 and statuses.count(200) == len(made.upstream.seen) <= 200
        assert sum(used.ending is Ending.ANSWERED for used in made.uses.found) == statuses.count(200)


async def until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


# ---- what the policy says of arguments ----


async def constrained(made: Bench, value: object, *, status: int) -> None:
    made.forget()
    got = await made.json("POST", "/tickets/tickets", value)
    assert got.status == status, got.body
    assert len(made.upstream.seen) == (status == 200)
    if status == 403:
        assert made.used.rule == made.decisions[-1].rule == "api.services[0].operations[0]"
        assert made.decisions[-1].verdict is Verdict.DENY and "policy" in got.detail


async def test_a_member_of_a_body_is_one_of_those_the_policy_names() -> None:
    names = operations("createTicket", body__project__key=["CORE", "DOC-*"], body__labels=["bug", ""])
    async with bench(names) as made:
        project = {"title": "x", "project": {"key": "CORE"}}
        for good in (project, {**project, "project": {"key": "DOC-1"}}, {**project, "labels": ["bug", "bug"]}):
            await constrained(made, good, status=200)
        for key in ("core", "CORE ", "", "OTHER", "XDOC-1"):
            await constrained(made, {"title": "x", "project": {"key": key}}, status=403)
        await constrained(made, {"title": "x"}, status=403)
        await constrained(made, {"title": "x", "project": {}}, status=403)
        await constrained(made, {**project, "labels": ["bug", "security"]}, status=403)
        await constrained(made, {**project, "labels": []}, status=200)  # the globs name the empty text
        await constrained(made, {**project, "project": None}, status=400)  # against the document
        for other in (
            "Key",
            "KEY",
            "k_ey",
            "key[]",
            "key[x]",
            "key.x",
            "\uff4bey",
            "key ",
        ):  # what a server could take for the member, too
            await constrained(made, {"title": "x", "project": {"key": "CORE", other: "OTHER"}}, status=400)
        for other in ("Project", "project[]", "PROJECT", "project[0]", "project[x]", "pro.ject", "pro ject"):
            await constrained(made, {**project, other: {"key": "OTHER"}}, status=400)


async def test_every_element_on_the_way_counts() -> None:
    async with bench(operations("createTicket", body__extra__key=["A"])) as made:
        for good in ({"key": "A"}, [{"key": "A"}, {"key": "A"}], {"key": ["A", "A"]}):
            await constrained(made, {"title": "x", "extra": good}, status=200)
        for bad in (
            [{"key": "A"}, {"key": "B"}],
            [{"key": "A"}, {}],
            [],
            {"key": ["A", "B"]},
            {"key": [["A"]]},
            {"key": {"A": "A"}},
            {"key": None},
            {"key": True},
            "A",
            None,
        ):
            await constrained(made, {"title": "x", "extra": bad}, status=403)


async def test_a_parameter_is_one_of_those_the_policy_names() -> None:
    async with bench(operations("listTickets", state=["open"], label=["a*", ""], ids=["1", "2"])) as made:
        assert (await made.ask("GET", "/tickets/tickets?state=open&ids=1,2&label=ab")).status == 200
        for bad in (
            "state=closed&ids=1",
            "ids=1",
            "state=open",
            "state=open&ids=",
            "state=open&ids=1,3",
            "state=open&ids=1&label=a&label=b",
        ):
            got = await made.ask("GET", f"/tickets/tickets?{bad}")
            assert got.status == 403 and "policy" in got.detail, bad
        assert len(made.upstream.seen) == 1


async def test_a_parameter_of_the_path_is_one_of_those_the_policy_names() -> None:
    async with bench(operations("getTicket", id=["T-*"])) as made:
        assert (await made.ask("GET", "/tickets/tickets/T-1")).status == 200
        assert (await made.ask("GET", "/tickets/tickets/%54-1")).status == 200
        for bad in ("1", "t-1", "x/T-1", "x%2FT-1", "T-1%2F..%2F2"):
            assert (await made.ask("GET", f"/tickets/tickets/{bad}")).status in (400, 403, 404)
        assert [seen.path[-1] for seen in made.upstream.seen] == ["T-1", "T-1"]


# ---- MCP ----


async def test_operations_are_tools_for_the_official_client() -> None:
    async with bench(operations(*ALL)) as made, served(made.handler.handle) as place:
        async with Client(f"http://{place}/mcp") as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert set(tools) == {f"tickets_{name}" for name in ALL}
            create = tools["tickets_createTicket"]
            assert create.input_schema["required"] == ["body"] and "Ticket" in create.input_schema["$defs"]
            assert "\x1b" not in json.dumps(create.input_schema)
            body = {"title": "x", "project": {"key": "A"}}
            result: Any = await client.call_tool("tickets_createTicket", {"body": body})
            assert not result.is_error and result.structured_content == {"ok": True}
            assert json.loads(made.arrived.body) == body and made.used.ending is Ending.ANSWERED
            await client.call_tool("tickets_listTickets", {"label": ["a", "b c"], "limit": 5, "x-view": ["1"]})
            assert made.upstream.seen[-1].query == [("limit", "5"), ("label", "a"), ("label", "b c")]
            assert made.upstream.seen[-1].header("x-view") == "1"
            await client.call_tool("tickets_search", {"body": {"text": "a&b", "page": 2, "tags": ["x"]}})
            assert made.upstream.seen[-1].body == b"text=a%26b&page=2&tags=x"
            await client.call_tool("tickets_putNote", {"id": "1", "note": "n", "body": "höhö"})
            assert made.upstream.seen[-1].body == "höhö".encode()
            count = len(made.upstream.seen)
            for name, arguments in (
                ("createTicket", {}),
                ("createTicket", {"body": {"title": ""}}),
                ("createTicket", {"body": "title"}),
                ("listTickets", {"limit": "5"}),
                ("listTickets", {"unknown": 1}),
                ("listTickets", {"filter": {"a": 1}}),
                ("listTickets", {"_method": "DELETE"}),
                ("listTickets", {"x-view": ["a\r\nEvil: 1"]}),
                ("listTickets", {"x-view": ["a,b"]}),
                ("listTickets", {"session": "a; admin=1"}),
                ("listTickets", {"words": ["a|b"]}),
                ("getTicket", {"id": "../admin"}),
                ("getTicket", {"id": ".."}),
                ("getTicket", {"id": ""}),
                ("getTicket", {"id": "a/b"}),
                ("getTicket", {"id": "%2e%2e"}),
                ("getTicket", {"id": "a\\b"}),
                ("getTicket", {"id": "a\r\n"}),
            ):
                result = await client.call_tool(f"tickets_{name}", arguments)
                assert result.is_error, (name, arguments)
            assert len(made.upstream.seen) == count


async def test_a_tool_that_may_not_be_used_says_so() -> None:
    names = operations("createTicket", body__project__key=["CORE"])
    async with bench(names) as made, served(made.handler.handle) as place, Client(f"http://{place}/mcp") as client:
        listed = await client.list_tools()
        assert "body.project.key may be: CORE" in (listed.tools[0].description or "")
        result: Any = await client.call_tool("tickets_createTicket", {"body": {"title": "x", "project": {"key": "B"}}})
        assert result.is_error and "policy" in result.content[0].text and made.upstream.seen == []


async def test_an_error_of_the_service_is_one_of_the_tool() -> None:
    async with bench() as made, served(made.handler.handle) as place, Client(f"http://{place}/mcp") as client:

        async def answer(seen: Seen, _: Any) -> Reply:
            return 409, [], b'{"why":"because"}'

        made.upstream.answer = answer
        result: Any = await client.call_tool("tickets_getTicket", {"id": "1"})
        assert result.is_error and result.content[0].text == 'HTTP 409\n{"why":"because"}'


# ---- secrets (I8) ----


@pytest.mark.parametrize(
    "credential",
    [
        CREDENTIAL,
        Credential(CredentialKind.BEARER, "env:TICKETS_KEY"),
        Credential(CredentialKind.BASIC, "env:TICKETS_KEY", user="u"),
    ],
)
async def test_the_credential_never_comes_back(credential: Credential) -> None:
    async with bench(credential=credential) as made:

        async def answer(seen: Seen, _: Any) -> Reply:
            value = next(value for name, value in seen.headers if name in ("api-key", "authorization"))
            told = f"{CANARY} {value} {CANARY.encode().hex()}".encode()
            return 200, [("x-echo", value), (f"x-{CANARY}", "1"), ("content-type", f"text/{CANARY}")], told

        made.upstream.answer = answer
        header = "api-key" if credential is CREDENTIAL else "authorization"
        got = await made.raw("GET", "/tickets/tickets", [(header, "Bearer mine"), (header.upper(), "mine")])
        value = made.arrived.header(header)
        assert value and "mine" not in str(made.arrived.headers)
        secret = value.rpartition(" ")[2]
        everything = repr((got, made.uses.found, made.decisions, made.kept.found, made.handler, vars(made.handler)))
        listed = await made.ask("GET", "/tickets/openapi.json")
        for each in (CANARY, secret, CANARY.encode().hex()):
            assert each not in everything and each.encode() not in got.body + listed.body
        assert got.status == 200 and b"*" in got.body


async def test_an_operation_may_be_named_by_its_place() -> None:
    async with bench((Operation("DELETE /tickets/{id}"),), allow=(ApiRule("tickets", ("DELETE /tickets/*",)),)) as made:
        assert (await made.ask("DELETE", "/tickets/tickets/5")).status == 200
        assert made.used.name == "DELETE /tickets/{id}" and made.arrived.method == "DELETE"


async def test_a_long_body_is_read_beside_the_loop() -> None:
    """All sandboxes of a process wait for one loop."""
    threads: list[int] = []

    def counted(*words: Any) -> Any:
        threads.append(threading.get_ident())
        return asking.read(*words)

    with mock.patch("corral.brokers.api.broker.read_request", counted):
        async with bench() as made:
            for labels in (["bug"], ["bug"] * 5000):
                assert (await made.json("POST", "/tickets/tickets", {"title": "x", "extra": labels})).status == 200
            assert (await made.json("POST", "/tickets/tickets", [1] * 5000)).status == 400
    assert [each == threading.get_ident() for each in threads] == [True, False, False]
