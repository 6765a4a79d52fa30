"""Secrets: how they come in, how they go out, and that their echoes do not come back."""

from __future__ import annotations

import base64
import copy
import html
import json
import os
import pickle
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corral.credentials.scrubbing import forms
from corral.credentials.secret import MAX_SECRET, MIN_SECRET, Scrubber, Secret, inject, load
from corral.errors import RequestError
from corral.policy.model import Credential, CredentialKind

TOKEN = 'ghp_"T0ken/+<&>=\u00e9 1'


def secret(kind: CredentialKind, header: str = "", user: str = "", token: str = TOKEN) -> Secret:
    return load(Credential(kind, "env:TOKEN", header, user), {"TOKEN": token})


# ---- in ----


@pytest.mark.parametrize(
    ("kind", "header", "user", "field"),
    [
        (CredentialKind.BEARER, "", "", (b"authorization", b"Bearer " + TOKEN.encode())),
        (CredentialKind.HEADER, "X-Api-Key", "", (b"x-api-key", TOKEN.encode())),
        (CredentialKind.BASIC, "", "me", (b"authorization", b"Basic " + base64.b64encode(f"me:{TOKEN}".encode()))),
        (CredentialKind.BASIC, "", "", (b"authorization", b"Basic " + base64.b64encode(f":{TOKEN}".encode()))),
        (
            CredentialKind.GIT,
            "",
            "",
            (b"authorization", b"Basic " + base64.b64encode(f"x-access-token:{TOKEN}".encode())),
        ),
        (
            CredentialKind.GIT,
            "",
            "oauth2",
            (b"authorization", b"Basic " + base64.b64encode(f"oauth2:{TOKEN}".encode())),
        ),
    ],
)
def test_each_kind_makes_its_field(kind: CredentialKind, header: str, user: str, field: tuple[bytes, bytes]) -> None:
    assert secret(kind, header, user).field() == field


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_file_may_end_in_a_line_break(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"12345678" + ending.encode())
    loaded = load(Credential(CredentialKind.BEARER, f"file:{file}"), {})
    assert loaded.field() == (b"authorization", b"Bearer 12345678")


REFUSED = {
    "empty": "",
    "short": "x" * (MIN_SECRET - 1),
    "long": "x" * (MAX_SECRET + 1),
    "second line": "12345678\nX-Evil: 1",
    "carriage return": "1234\r5678",
    "two line breaks": "12345678\n\n",
    "tab": "1234\t5678",
    "escape": "1234\x1b5678",
    "delete": "1234\x7f5678",
    "space first": " 12345678",
    "space last": "12345678 ",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_header_can_carry_is_refused_without_being_told(text: str) -> None:
    with pytest.raises(RequestError) as raised:
        load(Credential(CredentialKind.BEARER, "env:TOKEN"), {"TOKEN": text})
    assert "env:TOKEN" in str(raised.value)
    assert not text or text not in str(raised.value)
    assert "1234" not in str(raised.value)


@pytest.mark.parametrize(
    "header", ["", "host", "Content-Length", "transfer_encoding", "Connection", "a b", "a:", "a\r\nb"]
)
def test_a_header_that_cannot_carry_a_secret_is_refused(header: str) -> None:
    with pytest.raises(RequestError):
        secret(CredentialKind.HEADER, header)


@pytest.mark.parametrize("user", ["a:b", "a\nb"])
def test_a_user_that_basic_cannot_carry_is_refused(user: str) -> None:
    with pytest.raises(RequestError):
        secret(CredentialKind.BASIC, user=user)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for source in ("env:NONE", "env:", "file:relative", f"file:{tmp_path}", f"file:{pipe}", "file:/a\0b", "token", ""):
        began = time.monotonic()
        with pytest.raises(RequestError):
            load(Credential(CredentialKind.BEARER, source), {})
        assert time.monotonic() - began < 1


def test_no_representation_shows_it() -> None:
    loaded = secret(CredentialKind.BASIC, user="me")
    shown = f"{loaded!r} {loaded} {loaded.scrubber()!r} {[loaded]}"
    assert TOKEN not in shown
    assert base64.b64encode(f"me:{TOKEN}".encode()).decode() not in shown
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leave(loaded)


# ---- out ----


def test_whatever_the_client_sent_under_that_name_is_replaced() -> None:
    fields = [(b"X_Api_Key", b"1"), (b"Accept", b"*/*"), (b"x-api-key", b"2"), (b"X-API-KEY", b"3")]
    assert inject(fields, secret(CredentialKind.HEADER, "x-api-key")) == [
        (b"Accept", b"*/*"),
        (b"x-api-key", TOKEN.encode()),
    ]


# ---- not back ----

ENCODINGS = {
    "plain": TOKEN.encode(),
    "percent": quote(TOKEN, safe="").encode(),
    "percent in small letters": re.sub("%..", lambda found: found[0].lower(), quote(TOKEN, safe="")).encode(),
    "percent but slashes": quote(TOKEN).encode(),
    "form": quote(TOKEN, safe="").replace("%20", "+").encode(),
    "percent all": "".join(f"%{byte:02X}" for byte in TOKEN.encode()).encode(),
    "JSON": json.dumps(TOKEN)[1:-1].encode(),
    "JSON of UTF-8": json.dumps(TOKEN, ensure_ascii=False)[1:-1].encode(),
    "JSON of PHP": json.dumps(TOKEN)[1:-1].replace("/", "\\/").encode(),
    "HTML": html.escape(TOKEN).encode(),
    "hexadecimal": TOKEN.encode().hex().encode(),
    "UTF-16": TOKEN.encode("utf-16-le"),
}  # fmt: skip


@pytest.mark.parametrize("echo", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_echoes_in_every_form_are_masked_at_their_length(echo: bytes) -> None:
    scrubber = secret(CredentialKind.BEARER).scrubber()
    assert scrubber.feed(b"<<" + echo + b">>") + scrubber.end() == b"<<" + b"*" * len(echo) + b">>"


@pytest.mark.parametrize("before", range(7))
@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_at_every_alignment(before: int, after: int, encode: object) -> None:
    assert callable(encode)
    raw = TOKEN.encode()
    encoded = encode(b"\xff" * before + raw + b"\xff" * after)
    scrubber = secret(CredentialKind.BEARER).scrubber()
    told = scrubber.feed(encoded) + scrubber.end()
    assert len(told) == len(encoded)
    # Characters at the edges carry bits of what is around too; of the secret, less than a byte stays at each.
    assert told.count(b"*") >= len(raw) * 8 // 6 - 2
    for width in range(6, len(raw)):
        for at in range(len(raw) - width + 1):
            assert raw[at : at + width] not in base64.b64decode(told.replace(b"*", b"A"), altchars=b"-_")


def test_the_whole_value_of_basic_is_masked() -> None:
    loaded = secret(CredentialKind.GIT)
    _, value = loaded.field()
    assert loaded.scrubbed(b'"' + value + b'"') == b'"Basic ' + b"*" * (len(value) - 6) + b'"'


ALPHABET = st.binary(max_size=8) | st.sampled_from([b"abab", b"ab", b"abc", b"aba", b"b", b"YWJ"])


@settings(max_examples=500)
@given(
    patterns=st.lists(st.sampled_from([b"ab", b"abab", b"ababc", b"babab", b"aaa", b"ba"]), min_size=1, max_size=4),
    pieces=st.lists(st.text("abc", max_size=9).map(str.encode), max_size=10),
)
@example(patterns=[b"abab", b"babab"], pieces=[b"abab", b"ab"])
@example(patterns=[b"ababc", b"ba"], pieces=[b"aba", b"b", b"c"])
def test_where_a_stream_is_split_makes_no_difference(patterns: list[bytes], pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    expected = bytearray(whole)
    for pattern in patterns:
        for at in range(len(whole)):
            if whole.startswith(pattern, at):
                expected[at : at + len(pattern)] = b"*" * len(pattern)
    scrubber = Scrubber(patterns)
    assert b"".join(map(scrubber.feed, pieces)) + scrubber.end() == expected
    assert Scrubber(patterns).mask(whole) == expected


def test_nothing_is_held_back_but_what_may_become_an_echo() -> None:
    scrubber = Scrubber([b"secret-token"])
    assert scrubber.feed(b"data: one\n\n") == b"data: one\n\n"
    assert scrubber.feed(b"data: secre") == b"data: "
    assert scrubber.feed(b"cy") == b"secrecy"


@given(st.binary(min_size=MIN_SECRET, max_size=64))
def test_no_form_is_so_short_that_it_is_found_by_chance(raw: bytes) -> None:
    assert min(map(len, forms(raw))) >= MIN_SECRET - 1


@pytest.mark.parametrize("token", ["a" * 64, "".join(map(str, range(1200)))[:MAX_SECRET]])
def test_a_server_cannot_make_the_search_slow(token: str) -> None:
    scrubber = secret(CredentialKind.BEARER, token=token).scrubber()
    raw = token.encode()
    began = time.process_time()
    for data in (raw * (65536 // len(raw)), raw[:-1] * (65536 // len(raw)), raw[:1] * 65536, raw[:8] * 8192):
        scrubber.feed(data)
    assert time.process_time() - began < 1
