"""The gateway, whole: names and nothing but names, truth about what is spoken, who it was, and what it is told."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from corral.actions import Kind, Verdict
from corral.gateway.dial import Dial
from corral.policy.load import parse_policy
from tests.contain.conftest import MakeBox
from tests.contain.gateway_boxes import (
    PYTHON,
    ca_in,
    decisions,
    live,
    policy_of,
    python,
    reasons,
    refusals,
    shell,
    waits_for,
)
from tests.internet.world import Internet

WEB = """
    allow:
      - web.test:80
      - {name: web.test, port: 443}
"""

# Says what a TCP client hears: what it reads, or how it fails.
CLIENT = """
    import socket, sys
    host, port, said = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode().decode("unicode_escape").encode("latin-1")
    try:
        s = socket.create_connection((host, port), timeout=8)
    except OSError as error:
        print("connect", type(error).__name__); raise SystemExit
    try:
        s.sendall(said); print("heard", s.recv(4096))
    except OSError as error:
        print("heard", type(error).__name__)
"""


# ---- names ----


async def test_an_allowed_name_is_reached_and_no_other_exists(make_box: MakeBox, internet: Internet) -> None:
    internet.clear()
    box = await make_box(policy=policy_of(WEB))
    assert (await shell(box, "curl -sS -m 8 http://web.test/")).text == "hello from web.test\n"
    for name in ("evil.example", "www.web.test", "test", "localhost.web.test"):
        assert (await shell(box, f"getent hosts {name}")).exit_code == 2
        assert any(str(decision.action.subject).startswith(name) for decision in refusals(box, Kind.NET_RESOLVE))
    assert {found.name for found in internet.records(service="dns")} == {"web.test"}


async def test_addresses_are_stable_and_stand_for_one_name_each(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [web.test, api.test, '*.wild.test']"))
    code = """
        import json, socket
        names = ["web.test", "api.test", "a.wild.test", "b.wild.test"]
        look = lambda: {n: sorted({a[4][0] for a in socket.getaddrinfo(n, 443)}) for n in names}
        print(json.dumps([look(), look()]))
    """
    first, second = json.loads((await python(box, code)).text)
    assert first == second
    addresses = [address for found in first.values() for address in found]
    assert len(set(addresses)) == len(addresses) == 8  # one of each family
    assert internet.arrived() >= 0  # nothing was asked outside:
    assert not {found.name for found in internet.records(service="dns")} & {"a.wild.test", "b.wild.test"}


async def test_an_address_that_is_written_out_is_refused_unless_the_policy_names_it(
    make_box: MakeBox, internet: Internet
) -> None:
    internet.clear()
    box = await make_box(policy=policy_of("allow: [web.test:80, {ip: 203.0.113.81, port: 80}]"))
    assert "connect PermissionError" in (await python(box, CLIENT, "203.0.113.80", "80", "GET / HTTP/1.1\\r\\n")).text
    said = "GET / HTTP/1.1\\r\\nHost: 203.0.113.81\\r\\n\\r\\n"
    assert "200 OK" in (await python(box, CLIENT, "203.0.113.81", "80", said)).text
    assert internet.arrived("203.0.113.80") == 0


async def test_an_address_of_ours_that_stands_for_no_name_leads_nowhere(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [web.test:80]"))
    assert "connect PermissionError" in (await python(box, CLIENT, "198.18.77.77", "80", "x")).text


@pytest.mark.parametrize(
    "name",
    ["loopback", "private", "linklocal", "clouds", "unspecified", "mapped", "nat64", "multicast", "synthetic", "host"],
)
async def test_a_name_that_leads_back_is_not_followed(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A7: DNS rebinding, and its relatives, the metadata of clouds among them. Nothing is dialled: no far end is asked
    whether something arrived, as some of these are real ones of the machine that tests run on."""
    dialled: list[bytes] = []
    monkeypatch.setattr(Dial, "_try", lambda _self, address: dialled.append(address))
    box = await make_box(policy=policy_of(f"allow: ['{name}.test:80']"))
    heard = (await shell(box, f"curl -sS -m 8 -i http://{name}.test/")).text
    assert heard.startswith("HTTP/1.1 403 Forbidden"), heard
    found = [decision.action.subject for decision in refusals(box, Kind.NET_CONNECT)]
    assert found and all(getattr(subject, "protected", False) for subject in found), found
    assert not dialled


async def test_the_hosts_own_resolver_is_asked_where_the_policy_names_none(
    make_box: MakeBox, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def getaddrinfo(name: str, *_: object, **__: object) -> list[object]:
        asked.append(name)
        address = "203.0.113.80" if name == "web.test." else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    box = await make_box(policy=parse_policy("network: {allow: ['web.test:80', 'evil.test:80']}", source="test.yaml"))
    assert (await shell(box, "curl -sS -m 8 http://web.test/")).text == "hello from web.test\n"
    assert (await shell(box, "curl -sS -m 8 -i http://evil.test/")).text.startswith("HTTP/1.1 403")
    assert set(asked) == {"web.test.", "evil.test."}


async def test_a_private_network_that_the_policy_names_is_reached_by_that_rule_only(
    make_box: MakeBox, internet: Internet
) -> None:
    box = await make_box(policy=policy_of("allow: [{name: host.test, cidr: 198.51.100.0/30, port: 80}]"))
    heard = (await shell(box, "curl -sS -m 8 -i http://host.test/")).text
    assert "403" not in heard  # nobody listens there, but it was dialled
    assert "cannot be reached" in heard


# ---- what is spoken ----


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("SSH-2.0-OpenSSH_9.2\\r\\n", "network (nothing allows it)"),
        ("\\x05\\x01\\x00", "network (nothing allows it)"),
        ("CONNECT evil.example:443 HTTP/1.1\\r\\nHost: evil.example:443\\r\\n\\r\\n", "network"),
        ('{"id":1,"method":"mining.subscribe","params":[]}\\n', "network (nothing allows it)"),
        ("GET / HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n", "network"),
        ("hello, world\\n" + "x" * 40000, "network (nothing allows it)"),
    ],
)
async def test_on_443_there_is_tls_and_nothing_else(make_box: MakeBox, internet: Internet, said: str, why: str) -> None:
    internet.clear()
    box = await make_box(policy=policy_of("allow: [web.test:443]"))
    heard = (await python(box, CLIENT, "web.test", "443", said)).text
    assert "heard ConnectionResetError" in heard or "heard b''" in heard or "403 Forbidden" in heard
    assert why in reasons(box)
    assert internet.arrived("web.test") == 0


async def test_the_hello_must_name_what_was_decided_on(make_box: MakeBox, internet: Internet) -> None:
    """A8: fronting."""
    internet.clear()
    box = await make_box(policy=policy_of("allow: [web.test:443, api.test:443]"))
    code = """
        import socket, ssl, sys
        context = ssl._create_unverified_context()
        s = socket.create_connection(("web.test", 443), timeout=8)
        try:
            context.wrap_socket(s, server_hostname=sys.argv[1] or None)
            print("connected")
        except OSError as error:
            print(error)
    """
    for name, why in (("api.test", "names api.test, not web.test"), ("", "does not name its server")):
        heard = (await python(box, code, name)).text
        assert "access denied" in heard.lower().replace("_", " "), heard
        assert why in reasons(box)
    assert internet.arrived("web.test") == internet.arrived("api.test") == 0
    assert "connected" in (await python(box, code, "web.test")).text


async def test_the_host_of_every_request_must_be_the_name(make_box: MakeBox, internet: Internet) -> None:
    """A11: the second request on the same connection."""
    internet.clear()
    box = await make_box(policy=policy_of("allow: [web.test:80]"))
    code = """
        import socket
        s = socket.create_connection(("web.test", 80), timeout=8)
        for host in ("web.test", "evil.example"):
            s.sendall(f"GET /echo HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode())
            print(s.recv(9000).split(b"\\r\\n")[0])
    """
    lines = (await python(box, code)).text.splitlines()
    assert "200" in lines[0]
    assert "200" not in lines[1]
    assert b"evil.example" not in b"".join(found.plain or found.head for found in internet.records(address="web.test"))


async def test_a_protocol_where_the_server_speaks_first(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of("allow: [{name: mail.test, port: 25, protocol: tcp}]"))
    heard = (await python(box, CLIENT, "mail.test", "25", "EHLO box\\r\\n")).text
    assert "220 mail.test" in heard


async def test_starttls_is_a_permission_of_its_own(make_box: MakeBox, internet: Internet) -> None:
    """Without it, not even the words that ask for it are sent on; with it, the hello is."""
    code = """
        import socket, time
        s = socket.create_connection(("mail.test", 587), timeout=8)
        for line in (b"EHLO box\\r\\n", b"STARTTLS\\r\\n"):
            s.recv(4096); s.sendall(line)
        s.recv(4096); s.sendall(b"\\x16\\x03\\x01 a hello"); time.sleep(0.3)
    """
    internet.clear()
    rule = "{name: mail.test, port: 587, protocol: tcp}"
    box = await make_box(policy=policy_of(f"allow: [{rule}]"))
    await python(box, code)
    assert internet.arrived("mail.test") == len(b"EHLO box\r\n")
    internet.clear()
    box = await make_box(policy=policy_of(f"allow: [{rule[:-1]}, permit: [starttls]}}]"))
    await python(box, code)
    assert internet.arrived("mail.test") == len(b"EHLO box\r\nSTARTTLS\r\n\x16\x03\x01 a hello")


# ---- refusals that explain ----


async def test_a_refused_request_is_told_why(make_box: MakeBox, internet: Internet) -> None:
    rules = """
        allow:
          - {name: web.test, port: 80, requests: ["GET /status/**"], }
        deny:
          - {name: web.test, requests: ["DELETE /**"], reason: Nothing is deleted., advice: Mark it instead.}
    """
    box = await make_box(policy=policy_of(rules))
    heard = (await shell(box, "curl -sS -m 8 -i -X DELETE http://web.test/status/200")).text
    assert heard.startswith("HTTP/1.1 403 Forbidden")
    assert "x-corral-reason: Nothing is deleted." in heard
    assert "Mark it instead." in heard
    told = await box.exec(["cat", "/run/corral/denials.jsonl"])
    assert "Nothing is deleted." in told.text
    heard = (await shell(box, "curl -sS -m 8 -i http://web.test/echo")).text
    assert "403" in heard.splitlines()[0]


async def test_a_private_rule_says_nothing(make_box: MakeBox, internet: Internet) -> None:
    rules = """
        allow: [web.test:80]
        deny: [{name: web.test, requests: ["GET /secret/**"], reason: The audit is on., private: true}]
    """
    box = await make_box(policy=policy_of(rules))
    heard = (await shell(box, "curl -sS -m 8 -i http://web.test/secret/x; cat /run/corral/denials.jsonl")).text
    assert "403" in heard
    assert "audit" not in heard


# ---- who it was, and the account of it ----


async def test_each_connection_and_query_names_its_process(make_box: MakeBox, internet: Internet) -> None:
    box = await make_box(policy=policy_of(WEB))
    result = await shell(box, "curl -sS -m 8 http://web.test/ >/dev/null & wait")
    assert result.exit_code == 0
    for kind in (Kind.NET_RESOLVE, Kind.NET_CONNECT, Kind.HTTP_REQUEST):
        found = [decision for decision in decisions(box, kind) if decision.verdict is Verdict.ALLOW]
        assert found
        for decision in found:
            process = decision.action.origin.process
            assert process is not None and process.exe.endswith("/curl"), decision
            assert decision.action.origin.exec == 1


async def test_a_flow_is_seen_while_it_lives_and_accounted_for_when_it_is_over(
    make_box: MakeBox, internet: Internet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corral.gateway.egress import Egress

    accounts = []
    monkeypatch.setattr(Egress, "account", lambda self, flow: accounts.append(flow))
    box = await make_box(policy=policy_of("allow: [tls12.test:443, {name: sink.example, port: 9001, protocol: tcp}]"))
    code = """
        import socket, sys
        s = socket.create_connection(("sink.example", 9001)); s.sendall(b"x" * 5000); print("up", flush=True)
        sys.stdin.readline()
    """
    running = asyncio.create_task(box.exec([PYTHON, "-c", "import time;" + _inline(code) + ";time.sleep(1)"]))
    waits = asyncio.create_task(asyncio.to_thread(waits_for, lambda: any(f.bytes_up == 5000 for f in live(box))))
    await waits
    [flow] = [flow for flow in live(box) if flow.bytes_up]
    assert (flow.endpoint.name, flow.endpoint.port, flow.endpoint.protocol) == ("sink.example", 9001, "tcp")
    assert flow.rule == "network.allow[1]"
    await running
    await asyncio.to_thread(waits_for, lambda: not live(box))
    [done] = [flow for flow in accounts if flow.bytes_up]
    assert done.close
    assert done.packets_up >= 1
    trusted = ca_in(Path(box.core.prepared.directory), internet.ca_file)
    await shell(box, f"curl -sS -m 8 --cacert {trusted} --tls-max 1.2 https://tls12.test/ >/dev/null")
    await asyncio.to_thread(waits_for, lambda: any(flow.tls_name for flow in accounts))
    [tls] = [flow for flow in accounts if flow.tls_name]
    assert tls.tls_name == "tls12.test"
    assert tls.ja4.startswith("t12d")
    assert tls.certificate == internet.fingerprint("tls12")


def _inline(code: str) -> str:
    """The program but its last line, in one."""
    import textwrap

    lines = [line for line in textwrap.dedent(code).strip().splitlines() if "stdin" not in line]
    return ";".join(lines)


# ---- ask ----


ASK = """
    allow: [web.test:80]
    ask: [{name: api.test, port: 80}]
"""


async def test_what_is_asked_for_waits_at_connect_and_is_asked_once(make_box: MakeBox, internet: Internet) -> None:
    """Nothing is on the wire while it is held, nobody is asked again by the gateway, and DNS is no question."""
    internet.clear()
    box = await make_box(policy=policy_of(ASK))
    running = asyncio.create_task(shell(box, "curl -sS -m 15 http://api.test/"))
    for _ in range(400):
        if box.core.supervision.approvals.held:
            break
        await asyncio.sleep(0.02)
    assert box.core.supervision.approvals.held == 1
    await asyncio.sleep(0.3)
    assert internet.arrived("api.test") == 0
    queue = box.core.supervision.approvals
    for waiting in list(queue.waiting()):
        queue.answer(waiting.number, Verdict.ALLOW, by="test")
    result = await running
    assert result.text == "hello from api.test\n", result
    answered = [d for d in decisions(box, Kind.NET_CONNECT, Kind.HTTP_REQUEST) if d.held]
    assert len(answered) == 1
    assert all(d.decider == "approvals" for d in decisions(box, Kind.HTTP_REQUEST))
