"""The doors of brokers, from inside: what a policy opens can be reached and nothing beside it, whatever is sent there.

The model behind the door is scripted (:mod:`tests.models`), and keeps all that arrives.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from corral.actions import Decision, Ending, Kind, Process, Used, Verdict
from corral.brokers import http
from corral.brokers.service import MAX_CONNECTIONS
from corral.log.places import open_log
from corral.log.writer import Log, LogUnwritable
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.sandbox.box import Sandbox
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import MakeBox, wait_until
from tests.contain.gateway_boxes import PYTHON, decisions, policy_of, python, refusals, shell
from tests.contain.logs import events, verified
from tests.models.script import Endless, Form, Malformed, Script, Silent, Slow, Turn, Usage, says
from tests.models.server import ModelServer

SECRET = "sk-the-real-key-91c2d4"
USAGE = Usage(input=50, output=10)
SCRIPTS = (
    Script("endless", (Turn(usage=USAGE, trouble=Endless()),), when="ENDLESS"),
    Script("silent", (Turn(usage=USAGE, trouble=Silent()),), when="SILENT"),
    Script("slow", (says("slowly " * 20, usage=USAGE, trouble=Slow(between=0.05)),), when="SLOWLY"),
    Script("smuggled", (says("smuggled"),), when="SMUGGLED"),
    *(Script("m", (Turn(trouble=Malformed(form)),), when=f"MALFORMED {form.name}.") for form in Form),
    Script("plain", (says("the plain answer", usage=USAGE),)),
)

ASK = """
import http.client, json, sys
def ask(text, stream=False, host="model.corral.internal"):
    client = http.client.HTTPConnection(host, 80, timeout=60)
    body = {"model": "m-1", "messages": [{"role": "user", "content": text}]}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    client.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return client.getresponse()
"""

# Sends each of several texts to the door, on a connection of its own, and tells what came back.
RAW = """
import json, socket, sys
told = []
for text in json.load(open(sys.argv[1])):
    sock = socket.create_connection(("model.corral.internal", 80), timeout=20)
    got = b""
    try:
        sock.sendall(text.encode("latin-1"))
        while piece := sock.recv(65536):
            got += piece
            sock.settimeout(1)  # it may go on, or stay open
    except TimeoutError:
        got = got or b"nothing at all"
    except OSError as error:
        got += f" ({error})".encode()
    told.append(got.decode("latin-1"))
    sock.close()
print(json.dumps(told))
"""


async def sent(box: Sandbox, texts: Mapping[str, str]) -> dict[str, str]:
    """What is answered to each of them, by its name."""
    await box.write_file("/tmp/requests.json", json.dumps(list(texts.values())).encode())
    told = (await python(box, RAW, "/tmp/requests.json", timeout=180)).text
    return dict(zip(texts, json.loads(told), strict=True))


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer(SCRIPTS, key=SECRET, models=("m-1",)) as server:
        yield server


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    opened = open_log(tmp_path / "records" / "log")
    yield opened
    with suppress(LogUnwritable):
        await asyncio.to_thread(opened.close)


def document(server: ModelServer, more: str = "") -> str:
    return (
        "model:\n  allow: ['m-*']\n  upstreams:\n"
        f"    - {{name: far, url: '{server.url}/v1', api: openai,\n"
        "       credential: {type: bearer, from: 'env:CORRAL_TEST_KEY'}}\n"
        f"  prices: [{{model: '*', input: 3, output: 15}}]\n{more}"
    )


def with_model(server: ModelServer, more: str = "") -> Policy:
    return parse_policy(document(server, more), source="test.yaml")


@pytest.fixture
def caller() -> dict[str, str]:
    """The controlling process's environment, with keys of its own."""
    mine = {name: f"sk-the-callers-{name}" for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_BASE_URL")}
    return dict(os.environ) | mine | {"CORRAL_TEST_KEY": SECRET}


@pytest.fixture
async def box(make_box: MakeBox, server: ModelServer, log: Log, caller: dict[str, str]) -> Sandbox:
    """One with a model broker, and no other."""
    return await make_box(policy=with_model(server), log=log, environment=caller)


async def used(box: Sandbox, log: Log) -> list[Used]:
    """Ends the sandbox; all accounts."""
    await box.close()
    await asyncio.to_thread(log.seal)
    assert verified(log.directory)
    return events(log.directory, Used)


async def until(condition: Callable[[], bool]) -> None:
    assert await asyncio.to_thread(wait_until, condition, 30)


def all_connections(box: Sandbox) -> list[http.Connection]:
    """Those that the broker has."""
    brokers = box.core.supervision.brokers
    assert brokers is not None
    return [connection for door in brokers.doors.values() for connection in tuple(door.connections)]


def connections(box: Sandbox) -> int:
    return len(all_connections(box))


# ---- what can be reached ----


async def test_only_the_broker_that_the_policy_opens_is_there(box: Sandbox, server: ModelServer) -> None:
    code = """
        import json, socket
        told = {}
        for name in ("model", "data", "api", "other", "x.model", "MODEL"):
            try:
                told[name] = socket.getaddrinfo(name + ".corral.internal", 80, socket.AF_INET)[0][4][0]
            except OSError as error:
                told[name] = None
        address = told["model"]
        for family, where in ((socket.AF_INET, address), (socket.AF_INET, "model.corral.internal")):
            for port in (80, 81, 443, 22, 8080, 53, 1):
                with socket.socket(family) as sock:
                    sock.settimeout(9)
                    told[f"{where == address} {port}"] = sock.connect_ex((where, port))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                told["udp"] = sock.sendto(b"x", (address, 80))
            except OSError as error:
                told["udp"] = str(error)
        print(json.dumps(told))
    """
    told = json.loads((await python(box, code)).text)
    address = told["model"]
    assert address and told["MODEL"] == address
    assert [told[name] for name in ("data", "api", "other", "x.model")] == [None] * 4
    for how in ("True", "False"):
        assert told[f"{how} 80"] == 0
        assert all(told[f"{how} {port}"] for port in (81, 443, 22, 8080, 53, 1)), told
    refused = {str(each.action.subject) for each in refusals(box, Kind.NET_CONNECT)}
    assert {f"model.corral.internal:{port}" for port in (81, 443, 22, 8080)} <= refused
    resolved = {getattr(each.action.subject, "name", "") for each in refusals(box, Kind.NET_RESOLVE)}
    assert {"data.corral.internal", "api.corral.internal", "other.corral.internal"} <= resolved
    assert not server.received


async def test_https_is_not_spoken_there(box: Sandbox, server: ModelServer) -> None:
    for url in ("https://model.corral.internal/v1/models", "https://model.corral.internal:80/v1/models"):
        done = await shell(box, f"curl -sS -k -m 9 {url}")
        assert done.exit_code != 0 and not done.stdout, done
    assert not server.received
    assert (await shell(box, "curl -sS -m 9 http://model.corral.internal/v1/models")).text.count("m-1")


async def test_its_address_is_nobodys_elsewhere(
    box: Sandbox, make_box: MakeBox, workspace: Path, server: ModelServer, caller: dict[str, str]
) -> None:
    """In a sandbox that has another way out, and in one that has none, neither the name nor the address is a broker."""
    address = (await python(box, "import socket; print(socket.gethostbyname('model.corral.internal'))")).text.strip()
    code = f"""
        import socket
        for where in ("model.corral.internal", {address!r}):
            try:
                sock = socket.create_connection((where, 80), timeout=9)
                sock.sendall(b"GET /v1/models HTTP/1.1\\r\\nHost: model.corral.internal\\r\\n\\r\\n")
                print(sock.recv(4096))
            except OSError as error:
                print("refused")
    """
    for policy in (Policy(), policy_of("allow: [{name: host.test, protocol: http}]")):
        other = await make_box(policy=policy, environment=caller)
        assert other.core.supervision.brokers is None
        assert (await python(other, code)).text.split() == ["refused", "refused"]
        variables = (await shell(other, "env")).text
        assert "corral.internal" not in variables and "API_KEY" not in variables
    assert not server.received


async def test_the_variables_are_those_of_the_broker_and_no_key_is_passed(box: Sandbox) -> None:
    told = dict(line.split("=", 1) for line in (await shell(box, "env")).text.splitlines() if "=" in line)
    assert told["OPENAI_BASE_URL"] == told["OPENAI_API_BASE"] == "http://model.corral.internal/v1"
    assert told["OPENAI_API_KEY"] == "kept-by-corral" and told["CORRAL_MODEL_URL"] == "http://model.corral.internal"
    assert not {"ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "CORRAL_DATA_URL", "CORRAL_TEST_KEY"} & set(told)
    assert SECRET not in repr(told) and "sk-the-callers" not in repr(told)


async def test_the_key_is_not_among_variables_that_are_let_in_i8(
    make_box: MakeBox, server: ModelServer, caller: dict[str, str]
) -> None:
    policy = with_model(server, "environment: {allow: ['CORRAL_*']}\n")
    box = await make_box(policy=policy, environment=caller | {"CORRAL_COPY": SECRET, "CORRAL_OTHER": "in"})
    variables = (await shell(box, "env")).text
    assert SECRET not in variables and "CORRAL_OTHER=in" in variables


async def test_a_server_of_tools_is_not_the_upstreams_to_reach(box: Sandbox, server: ModelServer, log: Log) -> None:
    """What the upstream would do itself is a denial like any other: told, recorded, and never sent."""
    code = """
        import http.client, json
        client = http.client.HTTPConnection("model.corral.internal", 80, timeout=60)
        tool = {"type": "mcp", "server_label": "x", "server_url": "https://collector.example/"}
        body = {"model": "m-1", "input": "hi", "tools": [tool]}
        client.request("POST", "/v1/responses", json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        print(answer.status, json.loads(answer.read())["error"]["message"])
    """
    told = (await python(box, code)).text
    assert told.startswith("403 ") and "policy does not let it" in told
    (refused,) = refusals(box, Kind.MODEL_CALL)
    assert refused.rule == "model.hosted_tools" and not server.received
    (account,) = await used(box, log)
    assert (account.ending, account.rule) == (Ending.REFUSED, "model.hosted_tools")


async def test_the_key_is_put_in_and_whatever_is_sent_as_one_is_not(box: Sandbox, server: ModelServer) -> None:
    fields = ("Authorization: Bearer mine", "x-api-key: mine", "api-key: mine", "Proxy-Authorization: Basic mine")
    words = " ".join(f"-H '{field}'" for field in (*fields, "Cookie: mine=1", "X-Forwarded-For: 10.0.0.1"))
    body = json.dumps({"model": "m-1", "messages": [{"role": "user", "content": "x"}]})
    done = await shell(
        box,
        f"curl -sS -m 20 {words} -H 'Content-Type: application/json' -d '{body}' "
        "http://model.corral.internal/v1/chat/completions",
    )
    assert "the plain answer" in done.text, done
    (received,) = server.received
    assert [value for name, value in received.headers if name.lower() == "authorization"] == [f"Bearer {SECRET}"]
    assert b"mine" not in received.raw and b"10.0.0.1" not in received.raw
    assert b"kept-by-corral" not in received.raw and b"corral.internal" not in received.raw


# ---- what is sent ----

HOST = "Host: model.corral.internal\r\n"
GET = "GET /v1/models HTTP/1.1\r\n"
NOT_FOR_IT = {
    "another broker": f"{GET}Host: data.corral.internal\r\n\r\n",
    "another host": f"{GET}Host: example.com\r\n\r\n",
    "the upstream": f"{GET}Host: 127.0.0.1\r\n\r\n",
    "another port": f"{GET}Host: model.corral.internal:8080\r\n\r\n",
    "none": f"{GET}\r\n",
    "none, of an older version": "GET /v1/models HTTP/1.0\r\n\r\n",
    "two": f"{GET}{HOST}{HOST}\r\n",
    "two that differ": f"{GET}{HOST}Host: data.corral.internal\r\n\r\n",
    "a user": f"{GET}Host: x@model.corral.internal\r\n\r\n",
    "a dot": f"{GET}Host: model.corral.internal.\r\n\r\n",
    "absolute, of itself": f"GET http://model.corral.internal/v1/models HTTP/1.1\r\n{HOST}\r\n",
    "absolute, of another": f"GET http://data.corral.internal/v1/models HTTP/1.1\r\n{HOST}\r\n",
    "absolute, of the upstream": f"GET http://127.0.0.1:1/v1/models HTTP/1.1\r\n{HOST}\r\n",
    "a tunnel": f"CONNECT 127.0.0.1:22 HTTP/1.1\r\n{HOST}\r\n",
    "a tunnel to itself": f"CONNECT model.corral.internal:80 HTTP/1.1\r\n{HOST}\r\n",
    "an asterisk": f"OPTIONS * HTTP/1.1\r\n{HOST}\r\n",
    "two slashes": f"GET //127.0.0.1/v1/models HTTP/1.1\r\n{HOST}\r\n",
    "a way up": f"GET /v1/../admin HTTP/1.1\r\n{HOST}\r\n",
    "a way up, written otherwise": f"GET /v1/models/%2e%2e/%2e%2e/admin HTTP/1.1\r\n{HOST}\r\n",
    "another place": f"GET /admin HTTP/1.1\r\n{HOST}\r\n",
    "another method": f"DELETE /v1/models/m-1 HTTP/1.1\r\n{HOST}\r\n",
    "files of the upstream": f"GET /v1/files HTTP/1.1\r\n{HOST}\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "SSH": "SSH-2.0-OpenSSH_9.2p1\r\n\r\n\r\n",
    "a SOCKS greeting": "\x05\x01\x00\r\n\r\n",
    "nothing of the kind": "\x00" * 70_000 + "\r\n\r\n",
}


async def test_requests_for_anything_else_are_refused(box: Sandbox, server: ModelServer) -> None:
    for what, answer in (await sent(box, NOT_FOR_IT)).items():
        assert answer.startswith(("HTTP/1.1 4", " (")), (what, answer)
    # At most it was looked whether there is a model of that name: in the list of all.
    assert {(received.method, received.target) for received in server.received} <= {("GET", "/v1/models")}


BODY = json.dumps({"model": "m-1", "messages": [{"role": "user", "content": "SMUGGLED"}]})
INNER = (
    f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    f"{BODY}"
)
POST = f"POST /v1/chat/completions HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
SMUGGLED = {
    "a length and chunks": f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{INNER}",
    "chunks and a length": f"{POST}Transfer-Encoding: chunked\r\nContent-Length: {len(INNER)}\r\n\r\n0\r\n\r\n{INNER}",
    "two lengths": f"{POST}Content-Length: 0\r\nContent-Length: {len(INNER)}\r\n\r\n{INNER}",
    "two lengths in one": f"{POST}Content-Length: 0, {len(INNER)}\r\n\r\n{INNER}",
    "a signed length": f"{POST}Content-Length: +0\r\n\r\n{INNER}",
    "a negative length": f"{POST}Content-Length: -1\r\n\r\n{INNER}",
    "a length in hexadecimal": f"{POST}Content-Length: 0x0\r\n\r\n{INNER}",
    "a length that is none": f"{POST}Content-Length: \r\n\r\n{INNER}",
    "another coding": f"{POST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{INNER}",
    "two codings": f"{POST}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n{INNER}",
    "chunked twice": f"{POST}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{INNER}",
    "identity": f"{POST}Transfer-Encoding: identity\r\n\r\n{INNER}",
    "a space before the colon": f"{POST}Content-Length : 0\r\n\r\n{INNER}",
    "a bare carriage return": f"{POST}X: y\rContent-Length: 0\r\n\r\n{INNER}",
    "a NUL": f"{POST}X: y\x00\r\n\r\n{INNER}",
    "a bad chunk": f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n{INNER}",
    "a huge chunk": f"{POST}Transfer-Encoding: chunked\r\n\r\n{'f' * 30}\r\n{INNER}",
    "a GET with a body of a request": f"{GET}{HOST}Content-Length: {len(INNER)}\r\n\r\n{INNER}",
}
"""What two parsers may take apart differently; the last is one request, whoever reads it."""


async def test_no_request_is_hidden_in_another(box: Sandbox, server: ModelServer) -> None:
    """Whatever is asked of a model is decided. What is not clear ends the connection."""
    answers = await sent(box, SMUGGLED)
    last = answers.pop("a GET with a body of a request")
    assert last.startswith("HTTP/1.1 200") and "smuggled" not in last
    for what, answer in answers.items():
        assert "smuggled" not in answer.lower(), (what, answer)
        assert answer.startswith(("HTTP/1.1 4", "HTTP/1.1 501", " (")), (what, answer)
    assert not decisions(box, Kind.MODEL_CALL)
    assert not any(received.path.endswith("completions") for received in server.received)


TWO = {
    "one behind the other": f"{POST}Content-Length: 0\r\n\r\n{INNER}",
    "a folded field": f"{POST}X: y\r\n Content-Length: 5\r\n\r\n{INNER}",
    "a bare line feed": f"{POST}X: y\nContent-Length: 0\r\n\r\n{INNER}",
}
"""What is read in one way here (RFC 9112, sections 2.2 and 5.2), and is sent on as something else altogether."""


async def test_a_request_behind_another_is_one_that_is_decided(box: Sandbox, server: ModelServer) -> None:
    for what, answer in (await sent(box, TWO)).items():
        assert answer.startswith("HTTP/1.1 400") and "smuggled" in answer, (what, answer)
    assert len(decisions(box, Kind.MODEL_CALL)) == len(server.received) == len(TWO)
    assert {received.body for received in server.received} == {BODY.encode()}


async def test_two_requests_at_once_are_two_that_are_decided(box: Sandbox, server: ModelServer) -> None:
    """Pipelined, as HTTP/1.1 allows."""
    code = """
        import socket, sys
        sock = socket.create_connection(("model.corral.internal", 80), timeout=20)
        sock.sendall(sys.argv[1].encode() * 2)
        got = b""
        while got.count(b"HTTP/1.1 200") < 2 or not got.endswith(b"}"):
            piece = sock.recv(65536)
            if not piece: break
            got += piece
        print(got.count(b"HTTP/1.1 200"))
    """
    assert (await python(box, code, INNER)).text == "2\n"
    assert len(decisions(box, Kind.MODEL_CALL)) == 2 and len(server.received) == 2


async def test_there_is_no_way_below(box: Sandbox, server: ModelServer) -> None:
    code = """
        import json, socket
        address = socket.gethostbyname("model.corral.internal")
        told = {}
        for name, family, kind, protocol in (
            ("raw", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP),
            ("raw6", socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_TCP),
            ("packet", socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
            ("vsock", 40, socket.SOCK_STREAM, 0),
        ):
            try:
                socket.socket(family, kind, protocol).close()
                told[name] = "made"
            except OSError as error:
                told[name] = "refused"
        # To whatever is near that address, and to the upstream itself.
        first, last = address.rsplit(".", 1)
        for other in (f"{first}.{int(last) + 1}", f"{first}.{int(last) - 1}", "127.0.0.1"):
            for port in (80, PORT):
                with socket.socket() as sock:
                    sock.settimeout(9)
                    told[f"{other == '127.0.0.1'} {other} {port}"] = sock.connect_ex((other, port)) != 0
        print(json.dumps(told))
    """.replace("PORT", str(server.port))
    told = json.loads((await python(box, code)).text)
    assert {told.pop(name) for name in ("raw", "raw6", "packet", "vsock")} == {"refused"}
    assert len(told) >= 4 and all(told.values()), told
    assert not server.received


# ---- many, slow, and gone ----


async def test_a_thousand_connections_are_served_and_gone(box: Sandbox, server: ModelServer) -> None:
    await shell(box, "curl -sS -m 9 http://model.corral.internal/v1/models")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    code = """
        import resource, socket, sys
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        all_ = [socket.create_connection(("model.corral.internal", 80), timeout=60) for _ in range(1000)]
        for sock in all_:
            sock.sendall(b"GET /v1/models HTTP/1.1\\r\\nHost: model.corral.internal\\r\\n\\r\\n")
        served = 0
        for sock in all_:
            got = b""
            while b"m-1" not in got:
                piece = sock.recv(65536)
                if not piece: break
                got += piece
            served += got.startswith(b"HTTP/1.1 200")
        print(served, flush=True)
        sys.stdin.read()
    """
    process = await box.start_process([PYTHON, "-c", "\n".join(line[8:] for line in code.splitlines())])
    async with asyncio.timeout(120):
        assert await process.stdout.readline() == b"1000\n"
    assert connections(box) == 1000 <= MAX_CONNECTIONS
    assert threading.active_count() <= before[1] + 8  # not one for each
    process.close_stdin()
    await process.wait()
    await until(lambda: connections(box) == 0)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before[0] + 16)


async def test_more_connections_than_there_may_be_are_closed(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, server: ModelServer
) -> None:
    monkeypatch.setattr("corral.brokers.service.MAX_CONNECTIONS", 4)
    code = """
        import socket
        all_ = [socket.create_connection(("model.corral.internal", 80), timeout=20) for _ in range(6)]
        served = 0
        for sock in all_:
            try:
                sock.sendall(b"GET /v1/models HTTP/1.1\\r\\nHost: model.corral.internal\\r\\n\\r\\n")
                served += sock.recv(65536).startswith(b"HTTP/1.1 200")
            except OSError:
                pass
        print(served)
    """
    assert (await python(box, code, timeout=60)).text == "4\n"
    await until(lambda: connections(box) == 0)
    assert (await python(box, code, timeout=60)).text == "4\n"


async def test_clients_that_are_slow_hold_nobody_up(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, server: ModelServer
) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 3.0)
    monkeypatch.setattr(http, "BODY_SECONDS", 3.0)
    code = """
        import socket, sys, threading, time
        head = b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: model.corral.internal\\r\\n"
        begun = head + b"Content-Type: application/json\\r\\nContent-Length: 100000\\r\\n\\r\\n{"
        slow = []
        for text in (b"", b"P", head, begun) * 8:
            sock = socket.create_connection(("model.corral.internal", 80), timeout=60)
            sock.sendall(text)
            slow.append(sock)
        print("begun", flush=True)
        ended = 0
        for sock in slow:
            try:
                ended += sock.recv(4096) == b""
            except ConnectionResetError:
                ended += 1
        print(ended, flush=True)
    """
    process = await box.start_process([PYTHON, "-c", "\n".join(line[8:] for line in code.splitlines())])
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"begun\n"
        assert "the plain answer" in (await python(box, ASK + "print(ask('x').read())", timeout=30)).text
        assert await process.stdout.readline() == b"32\n"
    assert len(server.received) == 1
    await process.wait()


async def test_a_client_that_is_killed_in_the_midst_is_accounted_for(
    box: Sandbox, log: Log, server: ModelServer
) -> None:
    before = threading.active_count()
    code = ASK + "answer = ask('ENDLESS', True)\nwhile True: answer.read(4096); print('some', flush=True)"
    for _ in range(3):
        process = await box.start_process([PYTHON, "-c", code])
        async with asyncio.timeout(60):
            for _ in range(5):
                assert await process.stdout.readline() == b"some\n"
        process.kill()
        await process.wait()
    await until(lambda: connections(box) == 0 and len(server.broken) == 3)
    await until(lambda: threading.active_count() <= before + 6)
    calls = await used(box, log)
    assert [call.ending for call in calls] == [Ending.ABANDONED] * 3
    for call in calls:
        assert call.estimated and call.output_tokens > 10 and call.input_tokens and call.bytes_down > 4096
        assert call.cost == call.input_tokens * 3000 + call.output_tokens * 15000
        assert "gone" in call.reason


async def test_a_client_that_gives_up_before_an_answer_is_accounted_for(
    box: Sandbox, log: Log, server: ModelServer
) -> None:
    process = await box.start_process([PYTHON, "-c", ASK + "ask('SILENT')"])
    await asyncio.to_thread(server.wait_for, 1)
    process.kill()
    await process.wait()
    await until(lambda: connections(box) == 0 and bool(server.broken))
    (call,) = await used(box, log)
    assert call.ending is Ending.ABANDONED and call.estimated and call.input_tokens


async def test_a_sandbox_that_ends_in_the_midst_is_accounted_for(box: Sandbox, log: Log, server: ModelServer) -> None:
    process = await box.start_process(
        [PYTHON, "-c", ASK + "answer = ask('ENDLESS', True); answer.read(65536); print(1, flush=True); answer.read()"]
    )
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"1\n"
    (call,) = await used(box, log)
    assert call.ending is Ending.ABANDONED and call.estimated and call.output_tokens
    await until(lambda: bool(server.broken))


async def test_many_streams_at_once_are_each_their_own(box: Sandbox, log: Log, server: ModelServer) -> None:
    code = ASK + (
        "import threading\n"
        "told = []\n"
        "def one(n): told.append((n, ask(f'SLOWLY {n}', True).read().decode()))\n"
        "all_ = [threading.Thread(target=one, args=(n,)) for n in range(40)]\n"
        "[each.start() for each in all_]; [each.join() for each in all_]\n"
        "print(len(told), all('data: [DONE]' in text and text.count('slow') >= 20 for _, text in told))"
    )
    assert (await python(box, code, timeout=120)).text == "40 True\n"
    calls = await used(box, log)
    assert len(calls) == 40 and {call.ending for call in calls} == {Ending.ANSWERED}
    assert {(call.input_tokens, call.output_tokens, call.estimated) for call in calls} == {(50, 10, False)}
    assert len({call.conversation for call in calls}) == 40


def resident() -> int:
    """Bytes that this process, which is the controller, has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_endless_answers_that_nobody_reads_wait_outside(box: Sandbox, log: Log, server: ModelServer) -> None:
    await python(box, ASK + "ask('x').read()")
    before = resident()
    code = ASK + "all_ = [ask('ENDLESS', True) for _ in range(20)]; print(len(all_), flush=True); sys.stdin.read()"
    process = await box.start_process([PYTHON, "-c", code])
    async with asyncio.timeout(100):
        assert await process.stdout.readline() == b"20\n"
    moved = [-1, 0]
    while moved[0] != moved[1]:  # until all that can be in between is full
        moved = [moved[1], sum(each.sent for each in all_connections(box))]
        await asyncio.sleep(0.5)
    assert resident() - before < 20 * (5 << 20)  # what is said, as far as it is looked at, and what is in between
    assert "the plain answer" in (await python(box, ASK + "print(ask('x').read())")).text
    process.kill()
    await process.wait()
    await until(lambda: connections(box) == 0 and len(server.broken) == 20)
    calls = await used(box, log)
    assert [call.ending for call in calls].count(Ending.ABANDONED) == 20 == len(calls) - 2


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_none_is_told_of(
    box: Sandbox, log: Log, server: ModelServer, form: Form, stream: bool
) -> None:
    code = ASK + (
        f"answer = ask('MALFORMED {form.name}.', {stream})\n"
        "try: print(answer.status, answer.read())\n"
        "except (OSError, http.client.HTTPException) as error: print('broken', error)"
    )
    told = (await python(box, code, timeout=60)).text
    (call,) = await used(box, log)
    assert told.startswith(("502", "broken", "200 b'")), told
    if told.startswith("200"):  # what comes whole is passed on, as whoever asks would have got it
        assert form in (Form.NOT_JSON, Form.NOT_AN_OBJECT, Form.WRONG_TYPE)
    else:
        assert call.ending is Ending.FAILED and call.reason
    assert call.estimated and call.input_tokens and not call.tools and not call.opened


def test_a_controller_that_is_killed_leaves_nothing(tmp_path: Path, workspace: Path, server: ModelServer) -> None:
    with adopting_orphans():
        cli = CommandLine(tmp_path, workspace)
        (tmp_path / "policy.yaml").write_text(document(server))
        code = ASK + "answer = ask('ENDLESS', True)\nwhile True: answer.read(4096)"
        words = ("--policy", str(tmp_path / "policy.yaml"), "--", PYTHON, "-c", code)
        with cli.live(*words, env={"CORRAL_TEST_KEY": SECRET}) as (_, process):
            server.wait_for(1)
            process.kill()
            process.wait()
            assert wait_until(lambda: bool(server.broken), 20)
    assert len(server.received) == 1


# ---- who ----


async def test_a_call_is_that_of_the_process_that_makes_it(box: Sandbox, log: Log, server: ModelServer) -> None:
    curl = (
        "curl -sS -m 20 -H 'Content-Type: application/json' "
        """-d '{"model":"m-1","messages":[{"role":"user","content":"of curl"}]}' """
        "http://model.corral.internal/v1/chat/completions"
    )
    answers = await asyncio.gather(shell(box, curl), python(box, ASK + "print(ask('of python').read())"))
    assert all("the plain answer" in each.text for each in answers), answers
    prompts = [received.json["messages"][0]["content"] for received in server.received]
    made = [each for each in decisions(box, Kind.MODEL_CALL) if each.verdict is Verdict.ALLOW]
    calls = await used(box, log)
    programs = {"of curl": "/usr/bin/curl", "of python": os.path.realpath(PYTHON)}
    assert sorted(prompts) == ["of curl", "of python"]
    found: Sequence[Decision | Used]
    for found in (made, calls):
        processes = [origin_of(each) for each in found]
        assert {process.exe for process in processes} == set(programs.values())
        assert len({process.inner_pid for process in processes}) == 2
    assert {call.origin.exec for call in calls} == {1, 2}


def origin_of(each: Decision | Used) -> Process:
    origin = each.action.origin if isinstance(each, Decision) else each.origin
    assert origin.process is not None
    return origin.process


async def test_a_call_that_is_not_allowed_is_not_made(box: Sandbox, log: Log, server: ModelServer) -> None:
    code = ASK.replace('"m-1"', '"other"') + "answer = ask('x'); print(answer.status, answer.read().decode())"
    told = (await python(box, code)).text
    assert told.startswith("403 ") and "may not be asked here" in told
    (decision,) = decisions(box, Kind.MODEL_CALL)
    assert decision.verdict is Verdict.DENY
    (call,) = await used(box, log)
    assert (call.ending, call.status, call.cost, call.name) == (Ending.REFUSED, 403, 0, "other")
    assert not server.received
