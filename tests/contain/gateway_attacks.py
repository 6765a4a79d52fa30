"""What the attacks on the gateway share: what a client hears, what was refused, and that nothing else arrived."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from typing import Any

import pytest

from corral.actions import Decision, Endpoint, Kind, Request
from corral.sandbox.box import Sandbox
from tests.contain.gateway_boxes import PYTHON, refusals
from tests.internet.records import Arrival
from tests.internet.world import Internet

WEB = "allow: [web.test:80, {name: web.test, port: 443}]"
"""What most attackers have: a single name."""
EVIL, EVIL6 = "203.0.113.66", "2001:db8:2::66"
"""Takes everything, on every port."""
RESOLVER, RESOLVER6 = "203.0.113.99", "2001:db8:2::99"
"""A name server that a program has written into it; nobody is there."""

NOTHING_ALLOWS = "network (nothing allows it)"

# `say` is what a TCP client sends and what it hears; `failure` an error's name.
PRELUDE = r"""
import ctypes, errno, json, os, socket, ssl, struct, sys, threading, time
def failure(error):
    return errno.errorcode.get(error.errno, type(error).__name__) if error.errno else type(error).__name__
def heard(s, patience=6):
    s.settimeout(patience)
    data = b""
    try:
        while len(data) < 4096:
            more = s.recv(4096)
            if not more:
                return (data or b"EOF").decode("latin-1")
            data += more
    except OSError as error:
        return data.decode("latin-1") or failure(error)
    return data.decode("latin-1")
def say(host, port, *pieces, pause=0.0, patience=6):
    try:
        s = socket.create_connection((host, port), timeout=patience)
    except OSError as error:
        return "connect " + failure(error)
    with s:
        try:
            for piece in pieces:
                s.sendall(piece)
                time.sleep(pause)
            return heard(s, patience)
        except OSError as error:
            return failure(error)
def tell(answer):
    print(json.dumps(answer), flush=True)
def query(name, kind=16, number=7):
    labels = b"".join(bytes((len(part),)) + part for part in name.split(b".")) + b"\0"
    return struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!HH", kind, 1)
def rcode(answer):
    return answer[3] & 15 if len(answer) > 11 else -1
"""


def tool(name: str) -> str:
    """Where a program is, or a test skipped."""
    found = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        pytest.skip(f"no {name} on this machine; `make test` as root installs one")
    return found


async def attack(box: Sandbox, code: str, *arguments: object, timeout: float = 40.0, **how: Any) -> Any:
    """Runs Python with :data:`PRELUDE` inside, which gets ``ARGS``; returns what it told."""
    program = f"{PRELUDE}\nARGS = json.loads(sys.argv[1])\n{code}"
    result = await box.exec([PYTHON, "-c", program, json.dumps(arguments)], timeout=timeout, **how)
    assert result.exit_code == 0 and not result.timed_out, result.stderr.decode()
    return json.loads(result.stdout)


def nothing_arrived(
    internet: Internet, *, names: Collection[str] = (), addresses: Collection[str] = ()
) -> list[Arrival]:
    """Not a byte, packet or connection anywhere but queries for ``names`` and what went to ``addresses``, which is
    given back."""
    found = internet.records()
    allowed = [
        arrival
        for arrival in found
        if (arrival.service == "dns" and arrival.name in names) or arrival.address in addresses
    ]
    assert [arrival for arrival in found if arrival not in allowed] == []
    return [arrival for arrival in allowed if arrival.service != "dns"]


def refused(box: Sandbox, kind: Kind, target: str, rule: str = "") -> Decision:
    """The first refusal whose subject is ``target``, by its text, and whose rule begins with ``rule``."""
    found = [decision for decision in refusals(box, kind) if str(decision.action.subject).startswith(target)]
    assert found, (kind, target, [str(decision.action) for decision in refusals(box, kind)])
    by_rule = [decision for decision in found if decision.rule.startswith(rule)]
    assert by_rule, (rule, [(decision.rule, decision.reason) for decision in found])
    assert all(decision.reason for decision in by_rule)
    return by_rule[0]


def spoken(box: Sandbox, name: str, protocol: str, rule: str = NOTHING_ALLOWS) -> Decision:
    """The refusal of what was spoken with a destination."""
    for decision in refusals(box, Kind.NET_CONNECT):
        subject = decision.action.subject
        if isinstance(subject, Endpoint) and (subject.name or subject.address) == name and subject.protocol == protocol:
            assert decision.rule.startswith(rule), decision
            return decision
    raise AssertionError((name, protocol, [decision.action for decision in refusals(box, Kind.NET_CONNECT)]))


def requests_refused(box: Sandbox) -> list[tuple[str, str, str]]:
    """Method, rule and reason of each refused request."""
    return [
        (decision.action.subject.method, decision.rule, decision.reason)
        for decision in refusals(box, Kind.HTTP_REQUEST)
        if isinstance(decision.action.subject, Request)
    ]


def statuses(heard: str) -> list[int]:
    """The status codes in what a client of HTTP/1 heard."""
    return [int(code) for code in re.findall(r"HTTP/1\.[01] (\d{3})", heard)]
