"""Refusals: one line, short, and whatever is in the reason, still an answer of HTTP."""

from __future__ import annotations

import ssl

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.gateway.refusal import MAX_LINE, Alert, answer, forbidden, one_line, tls_alert


def read(data: bytes, method: str = "GET") -> tuple[h11.Response, bytes, bool]:
    """As a client reads it: head, body, and whether the connection stays."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    response, body = client.next_event(), b""
    assert isinstance(response, h11.Response)
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data[0] == b""
    return response, body, client.our_state is not h11.MUST_CLOSE


def test_the_words_of_a_refusal() -> None:
    assert forbidden("no rule names web.test", "ask for api.test", True) == (
        b"HTTP/1.1 403 Forbidden\r\ncontent-type: text/plain\r\ncontent-length: 48\r\ncache-control: no-store\r\n"
        b"x-corral-reason: no rule names web.test\r\nx-corral-advice: ask for api.test\r\n"
        b"connection: keep-alive\r\n\r\n"
        b"corral: no rule names web.test\nask for api.test\n"
    )


def test_a_private_rule_gives_no_reason() -> None:
    response, body, _ = read(forbidden("", ""))
    assert body == b"corral: the policy of this sandbox does not allow it\n"
    assert not any(name == b"x-corral-advice" for name, _ in response.headers)


@given(st.text(), st.text(), st.booleans(), st.integers(400, 599))
def test_no_reason_breaks_the_answer(reason: str, advice: str, keep: bool, status: int) -> None:
    response, body, stays = read(answer(status, reason, advice, keep_alive=keep))
    assert response.status_code == status
    assert stays == keep
    assert len(body) <= 2 * MAX_LINE + 16
    assert all(0x20 <= byte < 0x7F or byte == 0x0A for byte in body)
    assert len([name for name, _ in response.headers if name == b"x-corral-reason"]) == 1
    assert read(answer(status, reason, advice, body=False), "HEAD")[1] == b""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nX-Evil: 1", "a X-Evil: 1"),
        ("a\0b\x1b[2J", "a\\x00b\\x1b[2J"),
        ("\u202egnp", "\\u202egnp"),
        ("a\u2028b", "a b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_a_line_is_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


@given(st.text(max_size=3000))
def test_a_line_is_bounded(text: str) -> None:
    line = one_line(text)
    assert len(line) <= MAX_LINE
    assert line.isascii()
    assert not line or line.isprintable()


@pytest.mark.parametrize(
    ("alert", "words"),
    [
        (Alert.ACCESS_DENIED, "access denied"),
        (Alert.UNRECOGNIZED_NAME, "unrecognized name"),
        (Alert.HANDSHAKE_FAILURE, "handshake failure"),
    ],
)
def test_a_client_understands_the_alert(alert: Alert, words: str) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="web.test")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(tls_alert(alert))
    with pytest.raises(ssl.SSLError) as raised:
        client.do_handshake()
    assert words in str(raised.value).lower().replace("_", " ")
