"""Who is coming: each connection once, early ones too, and no more than there is room for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from corral.actions import Action, Attempt, Decision, Endpoint, Kind, Origin, Transport, Verdict
from corral.gateway import attempts as module
from corral.gateway.attempts import Attempts

HERE, THERE = b"\xc6\x12\1\1", b"\xc6\x12\1\2"
HERE6, THERE6 = b"\xfd" + bytes(14) + b"\1", b"\xfd" + bytes(14) + b"\2"
ANY, ANY6 = bytes(4), bytes(16)


def attempt(port: int, transport: Transport = Transport.TCP, *, address: bytes = HERE, to: bytes = THERE) -> Attempt:
    action = Action(Kind.NET_CONNECT, Endpoint(transport, name="web.test", port=80), Origin("box", "session"))
    decision = Decision(action, Verdict.ALLOW, "network.allow[0]", "", "", "policy", 1, 0.0)
    return Attempt(transport, (address, port), (to, 80), decision)


def test_each_connection_is_taken_once_and_by_all_four_numbers() -> None:
    attempts = Attempts(lambda callback: callback())
    noted = attempt(1)
    attempts.note(noted)
    assert attempts.take((HERE, 2), (THERE, 80)) is None
    assert attempts.take((HERE, 1), (THERE, 81)) is None
    assert attempts.take((THERE, 1), (THERE, 80)) is None
    assert attempts.take((HERE, 1), (THERE, 80)) is noted
    assert attempts.take((HERE, 1), (THERE, 80)) is None


def test_senders_stay_known_by_where_they_are() -> None:
    attempts = Attempts(lambda callback: callback())
    noted = attempt(7, Transport.UDP)
    attempts.note(noted)
    assert attempts.sender((HERE, 7)) is attempts.sender((HERE, 7)) is noted
    for other in ((HERE, 8), (THERE, 7), (HERE6, 7)):
        assert attempts.sender(other) is None
    assert attempts.take((HERE, 7), (THERE, 80)) is None


def test_one_port_of_two_families_or_addresses_is_two_senders() -> None:
    attempts = Attempts(lambda callback: callback())
    four = attempt(7, Transport.UDP)
    six = attempt(7, Transport.UDP, address=HERE6, to=THERE6)
    other = attempt(7, Transport.UDP, address=THERE)
    for each in (four, six, other):
        attempts.note(each)
    assert attempts.sender((HERE, 7)) is four
    assert attempts.sender((HERE6, 7)) is six
    assert attempts.sender((THERE, 7)) is other


def test_a_sender_without_an_address_is_known_by_family_and_port() -> None:
    attempts = Attempts(lambda callback: callback())
    four = attempt(7, Transport.UDP, address=ANY)
    six = attempt(7, Transport.UDP, address=ANY6, to=THERE6)
    both = attempt(8, Transport.UDP, address=ANY6)  # "::" of a socket of both families, which sends to IPv4
    for each in (four, six, both):
        attempts.note(each)
    assert attempts.sender((HERE, 7)) is attempts.sender((THERE, 7)) is four
    assert attempts.sender((HERE6, 7)) is six
    assert attempts.sender((HERE, 8)) is both
    assert attempts.sender((HERE6, 8)) is attempts.sender((HERE, 9)) is None


def test_a_port_that_is_taken_again_is_its_new_owner_s() -> None:
    attempts = Attempts(lambda callback: callback())
    bound, unbound = attempt(7, Transport.UDP), attempt(7, Transport.UDP, address=ANY)
    for latest in (bound, unbound, bound):
        attempts.note(latest)
        assert attempts.sender((HERE, 7)) is latest


def test_both_are_bounded_and_the_oldest_go() -> None:
    attempts = Attempts(lambda callback: callback())
    for port in range(module.MAX_CONNECTIONS + 1):
        attempts.note(attempt(port))
    assert attempts.take((HERE, 0), (THERE, 80)) is None
    assert attempts.take((HERE, 1), (THERE, 80)) is not None
    for port in range(module.MAX_SENDERS + 1):
        attempts.note(attempt(port, Transport.UDP))
    assert attempts.sender((HERE, 0)) is None
    assert attempts.sender((HERE, module.MAX_SENDERS)) is not None


def test_a_connection_with_another_port_is_the_oldest_that_went_there(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(lambda callback: callback())
    first, second = attempt(1), attempt(2)
    attempts.note(first)
    attempts.note(second)
    assert attempts.take_translated((THERE, 81)) is None
    assert attempts.take_translated((THERE, 80)) is first
    assert attempts.take((HERE, 1), (THERE, 80)) is None
    monkeypatch.setattr(module, "FRESH", -1.0)
    assert attempts.take_translated((THERE, 80)) is None
    assert attempts.take((HERE, 2), (THERE, 80)) is second


def test_settling_is_the_supervisors() -> None:
    posted: list[Callable[[], None]] = []
    attempts = Attempts(posted.append)
    attempts.settle(lambda: None)
    assert len(posted) == 1
