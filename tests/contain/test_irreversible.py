"""``irreversible: ask``: what writes outside waits at the gateway until a person answers, and what reads does not.

Nothing of a held request has arrived anywhere before the yes, and nothing of a refused one ever does.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import socket

import pytest

from corral.actions import Kind, Meaning, Request, Reversible, Verdict
from corral.approvals.queue import Question, Scope
from corral.approvals.waiting import show
from corral.errors import RequestError
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.sandbox.box import Sandbox
from tests.contain.conftest import MakeBox
from tests.contain.gateway_boxes import policy_of, python, refusals, shell
from tests.contain.test_gateway_clients import SPARE, MakePeer, fine, make_peer, needs, questions, resident, until
from tests.internet import packages, places
from tests.internet.world import Internet

__all__ = ["make_peer"]

CURL = "curl -sS -m 15"
BOTH = "allow: [{name: web.test, port: [80, 443], intercept: true}]"


@pytest.fixture(autouse=True)
def trusting(internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gateway trusts upstream."""
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))


def arrived(internet: Internet, address: str = "web.test") -> list[str]:
    """What came: methods and targets."""
    return [f"{each.method} {each.target}" for found in internet.records(address=address) for each in found.requests]


def answer(box: Sandbox, question: Question, verdict: Verdict, scope: Scope = Scope.ONCE, reason: str = "") -> None:
    box.core.supervision.approvals.answer(question.number, verdict, by="test", scope=scope, reason=reason)


def asked_for(question: Question) -> str:
    subject = question.action.subject
    assert isinstance(subject, Request)
    return f"{subject.method} {subject.path}"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_writes_wait_for_a_person_and_reads_do_not(make_box: MakeBox, internet: Internet, scheme: str) -> None:
    box = await make_box(policy=policy_of(BOTH))
    internet.clear()
    url = f"{scheme}://web.test"
    posts = asyncio.create_task(shell(box, f"{CURL} -d body {url}/echo && {CURL} -d more '{url}/echo?again'"))
    await questions(box, 1)
    deletes = asyncio.create_task(shell(box, f"{CURL} -i -X DELETE {url}/status"))
    held = {asked_for(question): question for question in await questions(box, 2)}
    assert set(held) == {"POST /echo", "DELETE /status"}
    overridden = asyncio.create_task(shell(box, f"{CURL} -o /dev/null -H 'X-HTTP-Method-Override: DELETE' {url}/"))
    hidden = (await questions(box, 3))[-1]
    assert isinstance(hidden.action.subject, Request)
    assert (asked_for(hidden), hidden.action.subject.meaning) == ("GET /", Meaning.OVERRIDDEN)
    assert fine(await shell(box, f"{CURL} {url}/")) == "hello from web.test\n"
    assert arrived(internet) == ["GET /"]

    seen = show("box", held["POST /echo"])
    assert (seen.reversible, seen.rule) == ("no", "irreversible")
    assert "cannot be taken back" in seen.reason
    assert "names another method" in show("box", hidden).subject

    answer(box, held["DELETE /status"], Verdict.DENY, reason="Nothing is deleted today.")
    told = fine(await deletes)
    assert told.startswith("HTTP/1.1 403 ")
    assert "x-corral-reason: Nothing is deleted today." in told
    answer(box, hidden, Verdict.DENY)
    fine(await overridden)
    assert arrived(internet) == ["GET /"]
    # The same method and path again, whatever the query: that is what a yes for the session is for.
    answer(box, held["POST /echo"], Verdict.ALLOW, Scope.SESSION)
    assert [json.loads(line)["body"] for line in fine(await posts).splitlines()] == ["body", "more"]
    assert arrived(internet) == ["GET /", "POST /echo", "POST /echo?again"]
    other = asyncio.create_task(shell(box, f"{CURL} -d body {url}/upload"))
    [question] = await questions(box)
    assert asked_for(question) == "POST /upload"
    answer(box, question, Verdict.DENY)
    fine(await other)
    kept = [each.action for each in box.core.supervision.recent.all() if each.action.kind is Kind.HTTP_REQUEST]
    assert {(str(each.subject).split()[0], each.reversible) for each in kept} == {
        ("GET", Reversible.YES),
        ("GET", Reversible.NO),
        ("POST", Reversible.NO),
        ("DELETE", Reversible.NO),
    }


def impatient(rules: str, timeout: str) -> Policy:
    text = f"network:\n  {rules}\n  resolvers: [203.0.113.53]\napprovals: {{timeout: {timeout}}}\n"
    return parse_policy(text, source="test.yaml")


async def test_nobody_answers_and_the_client_hears_why(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=impatient(BOTH, "1s"))
    internet.clear()
    code = """
        import http.client
        c = http.client.HTTPConnection("web.test", timeout=9)
        for method, body in (("POST", b"x" * 1000), ("GET", None)):
            c.request(method, "/", body)
            answer = c.getresponse()
            print(answer.status, answer.headers.get("x-corral-reason"), len(answer.read()) > 0)
    """
    refused, allowed = fine(await python(box, code)).splitlines()
    assert refused == "403 nobody answered within 1 s True"
    assert allowed == "200 None True"
    assert arrived(internet) == ["GET /"]


async def test_a_client_that_is_gone_takes_its_request_back(make_box: MakeBox, internet: Internet) -> None:
    """It gave up, or was killed: what it wanted must not happen minutes later."""
    box = await make_box(policy=policy_of(BOTH))
    internet.clear()
    queue = box.core.supervision.approvals
    schemes = ("http", "https")
    give_up = [asyncio.create_task(shell(box, f"curl -sS -m 2 -d body {each}://web.test/echo")) for each in schemes]
    # More than the kernel takes: that it is gone does not show on the connection.
    kill = "head -c 20000000 /dev/zero | timeout -s KILL 2 curl -sS -H Expect: -T - {}://web.test/upload"
    killed = [asyncio.create_task(shell(box, kill.format(each))) for each in schemes]
    found = await questions(box, 4)
    assert [result.exit_code for result in await asyncio.gather(*give_up)] == [28, 28]
    assert all(result.exit_code != 0 for result in await asyncio.gather(*killed))
    await until(lambda: not queue.waiting())
    for question in found:
        with pytest.raises(RequestError, match="gone"):
            answer(box, question, Verdict.ALLOW)
    reasons = [each.reason for each in refusals(box, Kind.HTTP_REQUEST)]
    assert reasons == ["whoever tried it was gone before the answer"] * 4
    assert arrived(internet) == []


async def test_what_is_pipelined_behind_a_held_request_waits_its_turn(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(BOTH))
    internet.clear()
    code = """
        import re, socket
        s = socket.create_connection(("web.test", 80), timeout=15)
        host = b" HTTP/1.1\\r\\nHost: web.test\\r\\n"
        s.sendall(b"POST /echo" + host + b"Content-Length: 3\\r\\n\\r\\nabc" + b"GET /echo?behind" + host + b"\\r\\n"
            + b"PUT /echo" + host + b"Content-Length: 1\\r\\n\\r\\nx" + b"GET /echo?last" + host
            + b"Connection: close\\r\\n\\r\\n")
        data = b""
        while more := s.recv(65536):
            data += more
        print(re.findall("HTTP/1.1 ([0-9]+)", data.decode()))
    """
    running = asyncio.create_task(python(box, code))
    [post] = await questions(box)
    await asyncio.sleep(0.3)
    assert arrived(internet) == []
    answer(box, post, Verdict.DENY)
    [put] = await questions(box)
    assert asked_for(put) == "PUT /echo"
    assert arrived(internet) == ["GET /echo?behind"]
    answer(box, put, Verdict.ALLOW)
    assert fine(await running) == "['403', '200', '200', '200']\n"
    assert arrived(internet) == ["GET /echo?behind", "PUT /echo", "GET /echo?last"]


async def test_a_large_body_waits_with_its_client(make_box: MakeBox, internet: Internet) -> None:
    """It is not taken in, whatever its length: the client sleeps in its send, and all of it arrives after the yes."""
    box = await make_box(policy=policy_of(BOTH))
    internet.clear()
    size, piece = 64 << 20, bytes(range(256)) * 4096
    code = f"""
        import http.client, sys
        kinds = {{"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}}
        c = kinds[sys.argv[1]]("web.test", timeout=30)
        c.putrequest("POST", "/upload")
        c.putheader("Content-Length", "{size}")
        c.endheaders()
        piece = bytes(range(256)) * 4096
        for _ in range({size // len(piece)}):
            c.send(piece)
        print(c.getresponse().read().decode())
    """
    gc.collect()
    before = resident()
    running = [asyncio.create_task(python(box, code, scheme, timeout=60)) for scheme in ("http", "https")]
    found = await questions(box, 2)
    await asyncio.sleep(1.0)  # longer than any of it takes to arrive
    assert not any(task.done() for task in running)
    assert resident() - before < SPARE
    assert arrived(internet) == []
    expected = {"bytes": size, "sha256": hashlib.sha256(piece * (size // len(piece))).hexdigest()}
    for question in found:
        answer(box, question, Verdict.ALLOW)
    assert [json.loads(fine(result)) for result in await asyncio.gather(*running)] == [expected, expected]


async def test_a_server_that_ends_the_connection_meanwhile_is_dialled_again(
    make_box: MakeBox, internet: Internet, make_peer: MakePeer
) -> None:
    """A person takes longer than servers keep connections; git fetches and pushes on one."""
    seen: list[bytes] = []

    def serve(sock: socket.socket) -> object:
        data = b""
        while b"\r\n\r\n" not in data or (data.startswith(b"POST") and not data.endswith(b"body")):
            piece = sock.recv(65536)
            if not piece:
                return data
            data += piece
        seen.append(data)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return data  # and the connection is closed

    peer = make_peer(serve)
    rule = f"allow: [{{name: host.test, cidr: {places.HOST4}/32, port: {peer.port}, protocol: http}}]"
    box = await make_box(policy=policy_of(rule))
    code = f"""
        import socket
        s = socket.create_connection(("host.test", {peer.port}), timeout=15)
        host = b" HTTP/1.1\\r\\nHost: host.test:{peer.port}\\r\\n"
        # One after the other, as the first answer must not say that the connection is over.
        s.sendall(b"GET /" + host + b"\\r\\nPOST /" + host + b"Content-Length: 4\\r\\n\\r\\nbody")
        data = b""
        while data.count(b"ok") < 2:
            more = s.recv(65536)
            if not more:
                break
            data += more
        print(data.count(b"HTTP/1.1 200 OK"))
    """
    running = asyncio.create_task(python(box, code))
    [question] = await questions(box)
    assert len(peer.found) == 1, "the first connection is over"
    await asyncio.sleep(0.3)
    assert [data[:4] for data in seen] == [b"GET "]
    answer(box, question, Verdict.ALLOW)
    assert fine(await running) == "2\n"
    assert [data[:4] for data in seen] == [b"GET ", b"POST"]


_GIT = """
    set -e
    export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
    git clone -q https://git.test/hello.git mine
    git -C mine fetch -q
    cat mine/README
    echo changed >mine/README
    git -C mine commit -qam 'From inside'
    git -C mine push -q origin HEAD:refs/heads/"$1" 2>&1 || echo refused
    git ls-remote origin 2>/dev/null || git -C mine ls-remote origin "refs/heads/$1" | wc -l
"""


@pytest.mark.parametrize("verdict", [Verdict.ALLOW, Verdict.DENY])
async def test_git_clones_and_fetches_unasked_and_pushes_when_somebody_says_so(
    make_box: MakeBox, internet: Internet, verdict: Verdict
) -> None:
    needs("git")
    box = await make_box(policy=policy_of("allow: [{name: git.test, intercept: true}]"))
    branch = f"asked-{verdict.name.lower()}"
    running = asyncio.create_task(box.exec(["sh", "-c", _GIT, "git", branch], timeout=60))
    [question] = await questions(box)
    assert asked_for(question) == "POST /hello.git/git-receive-pack"
    answer(box, question, verdict)
    while not running.done():  # a push that is large, or needs a second request, asks again
        for again in box.core.supervision.approvals.waiting():
            answer(box, again, verdict)
        await asyncio.sleep(0.02)
    told = fine(await running).splitlines()
    assert told[0] == "hello from git.test"
    assert told[-1] == ("1" if verdict is Verdict.ALLOW else "0")
    assert ("refused" in told) is (verdict is Verdict.DENY)


async def test_packages_are_installed_unasked(make_box: MakeBox, internet: Internet) -> None:
    """npm asks for advisories by POST, on its way."""
    needs("npm", "node")
    box = await make_box(policy=policy_of("allow: [{name: npm.test, intercept: true}]"))
    internet.clear()
    npm = f"cd /tmp && npm install --audit --no-fund --registry https://npm.test/ {packages.NAME} && ls node_modules"
    assert packages.NAME in fine(await shell(box, npm, timeout=60))
    assert any(each.startswith("POST /-/npm/v1/security/") for each in arrived(internet, "npm.test"))
    assert not refusals(box, Kind.HTTP_REQUEST)
    assert not [each for each in box.core.supervision.recent.all() if each.decider == "approvals"]


async def test_what_the_policy_names_is_asked_of_nobody_and_deny_lets_nothing_else_through(
    make_box: MakeBox, internet: Internet
) -> None:
    rules = "allow: [{name: web.test, requests: [GET, POST /echo]}, 'api.test', {name: git.test, intercept: true}]"
    text = f"network:\n  {rules}\n  resolvers: [203.0.113.53]\nirreversible: deny\n"
    box = await make_box(policy=parse_policy(text, source="test.yaml"))
    internet.clear()
    code = f"{CURL} -o /dev/null -w '%{{http_code}}\\n'"
    lines = [
        f"{code} -d body https://web.test/echo",
        f"{code} -d body https://web.test/upload",
        f"{code} -X PUT -d body https://git.test/x",
        f"{code} -d body http://api.test/repos/x",
        f"{code} http://api.test/repos/x",
        f"{code} -k https://api.test/repos/x 2>/dev/null || echo unseen",
    ]
    assert fine(await shell(box, "\n".join(lines))).split() == ["200", "403", "403", "403", "200", "000", "unseen"]
    assert not box.core.supervision.approvals.waiting()
    assert arrived(internet, "api.test") == ["GET /repos/x"]
    assert arrived(internet) == ["POST /echo"]
    [unseen] = refusals(box, Kind.NET_CONNECT)
    assert unseen.rule == "irreversible"
    assert "intercept: true" in unseen.reason
