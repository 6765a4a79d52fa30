"""Of a prompt only what is new is kept, and each is still read whole, until one that it builds on is erased."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Content
from corral.log import repeated as module
from corral.log.payload_keys import PayloadError
from corral.log.payloads import MAX_CHAIN, Payload, PayloadMissing, Payloads, Shared
from corral.log.repeated import EXTRA, MAX_KNOWN, Repeated, common_prefix, common_suffix

LATER = 4_000_000_000
SHORT = st.binary(max_size=6) | st.lists(st.sampled_from(b"ab"), max_size=12).map(bytes)


def keep(store: Payloads, known: Repeated, data: bytes, now: float = 1000.0, seconds: float = 86400.0) -> Payload:
    shared, expires = known.plan(data, now, seconds)
    new = data if shared is None else data[shared.prefix : len(data) - shared.suffix]
    kept = store.keep(Content.PROMPT, new, expires=expires, shared=shared)
    known.remember(kept.digest, data, shared, expires)
    return kept


def conversation(turns: int, tools: int = 20_000) -> list[bytes]:
    """Bodies of requests as clients write them: the messages grow, and what is behind them stays."""
    tail = b'],"tools":[' + os.urandom(tools // 2).hex().encode() + b"]}"
    head, found = b'{"model":"m","messages":[' + os.urandom(5000).hex().encode(), []
    for at in range(turns):
        head += b',{"role":"user","content":"%d %s"}' % (at, os.urandom(50).hex().encode())
        found.append(head + tail)
    return found


@settings(max_examples=300)
@given(SHORT, SHORT, SHORT, SHORT)
def test_what_two_have_in_common(prefix: bytes, one: bytes, other: bytes, suffix: bytes) -> None:
    a, b = prefix + one + suffix, prefix + other + suffix
    before = common_prefix(a, b)
    assert before >= len(prefix)
    assert a[:before] == b[:before] and (before == min(len(a), len(b)) or a[before] != b[before])
    most = min(len(a), len(b)) - before
    behind = common_suffix(a, b, most)
    assert 0 <= behind <= most
    assert a[len(a) - behind :] == b[len(b) - behind :]
    assert behind == most or a[len(a) - behind - 1] != b[len(b) - behind - 1]


@pytest.mark.parametrize("size", [4095, 4096, 4097, 8192, 10_000])
def test_what_long_ones_have_in_common(size: int) -> None:
    same = os.urandom(size)
    assert common_prefix(same + b"a", same + b"b") == size
    assert common_prefix(same, same + b"b") == size
    assert common_suffix(b"a" + same, b"b" + same, size + 1) == size
    assert common_suffix(same, b"b" + same, size) == size


def test_each_is_read_whole_and_only_what_is_new_is_kept(tmp_path: Path) -> None:
    store, known = Payloads(tmp_path), Repeated()
    prompts = conversation(2 * MAX_CHAIN + 3)
    kept = [keep(store, known, each) for each in prompts]
    assert [store.read(each.digest) for each in kept] == prompts
    whole = [at for at, each in enumerate(kept) if each.shared is None]
    assert whole == [0, MAX_CHAIN, 2 * MAX_CHAIN]
    sizes = [store.check(each.digest)[1] or 0 for each in kept]
    assert sum(sizes) < 3 * len(prompts[-1]) + 200 * len(prompts)


def test_conversations_that_go_on_at_once_are_told_apart(tmp_path: Path) -> None:
    store, known = Payloads(tmp_path), Repeated()
    several = [conversation(5) for _ in range(MAX_KNOWN)]
    kept = [[] for _ in several]  # type: list[list[Payload]]
    for turn in range(5):
        for each, prompts in zip(kept, several, strict=True):
            each.append(keep(store, known, prompts[turn]))
    for each, prompts in zip(kept, several, strict=True):
        assert [store.read(one.digest) for one in each] == prompts
        assert [one.shared is None for one in each] == [True, False, False, False, False]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([b"x" * 5000, b"y" * 5000, b"z" * 300, b"w"]), max_size=6), max_size=10))
def test_whatever_they_repeat_each_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[bytes]]
) -> None:
    store, known = Payloads(tmp_path_factory.mktemp("store")), Repeated()
    prompts = [b"".join(each) for each in pieces]
    kept = [keep(store, known, each) for each in prompts]
    assert [store.read(each.digest) for each in kept] == prompts


def test_none_outlives_what_it_builds_on_and_none_goes_too_early(tmp_path: Path) -> None:
    store, known, seconds = Payloads(tmp_path), Repeated(), 86400.0
    kept = [
        (now, keep(store, known, each, now=now, seconds=seconds))
        for now, each in zip(range(1000, 1000 + 600 * 30, 600), conversation(30), strict=True)
    ]
    expires = {each.digest: each.expires for _, each in kept}
    for now, each in kept:
        assert now + seconds <= each.expires <= now + seconds + EXTRA
        if each.shared is not None:
            assert expires[each.shared.base] == each.expires
    assert sum(each.shared is None for _, each in kept) > 1
    assert Repeated().plan(b"x", 0, 100)[1] == 110


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    known = Repeated()
    for at in range(100):
        known.remember(f"{at}", os.urandom(30_000), None, LATER)
        assert len(known._known) <= 3
    for at in range(100):
        known.remember(f"{at}", b"", None, LATER)
        assert len(known._known) <= MAX_KNOWN


def test_one_that_is_erased_takes_what_builds_on_it_along(tmp_path: Path) -> None:
    """Its words are in all that follow."""
    store, known = Payloads(tmp_path), Repeated()
    prompts = conversation(4)
    kept = [keep(store, known, each) for each in prompts]
    store.erase(kept[1].digest, lambda: None)
    assert store.read(kept[0].digest) == prompts[0]
    with pytest.raises(PayloadMissing, match="it is not there"):
        store.read(kept[1].digest)
    for each in kept[2:]:
        with pytest.raises(PayloadMissing, match="continues"):
            store.read(each.digest)
        assert store.check(each.digest)[0] == each  # which is what was kept of it


def test_what_it_builds_on_cannot_be_changed(tmp_path: Path) -> None:
    store, known = Payloads(tmp_path), Repeated()
    kept = [keep(store, known, each) for each in conversation(2)]
    assert kept[1].shared is not None
    path = store._path(kept[1].digest)
    line, _, body = path.read_bytes().partition(b"\n")
    about = json.loads(line)
    other = store.keep(Content.PROMPT, b"x" * 100_000, expires=LATER)
    for change in ({"prefix": about["prefix"] - 1}, {"base": other.digest}, {"suffix": 0}):
        path.write_bytes(json.dumps({**about, **change}, sort_keys=True, separators=(",", ":")).encode() + b"\n" + body)
        with pytest.raises(PayloadError, match="its content is another"):
            store.read(kept[1].digest)
    for change in ({"prefix": -1}, {"base": "../../etc/passwd"}, {"suffix": "1"}, {"format": "corral.payload.1"}):
        path.write_bytes(json.dumps({**about, **change}, sort_keys=True, separators=(",", ":")).encode() + b"\n" + body)
        with pytest.raises(PayloadError, match="its file is no payload"):
            store.read(kept[1].digest)


def test_one_that_says_it_shares_more_than_there_is_is_refused(tmp_path: Path) -> None:
    store = Payloads(tmp_path)
    base = store.keep(Content.PROMPT, b"x" * 100, expires=LATER)
    wrong = store.keep(Content.PROMPT, b"", expires=LATER, shared=Shared(base.digest, 60, 60))
    with pytest.raises(PayloadError, match="what it continues is another"):
        store.read(wrong.digest)


def test_chains_without_end_are_refused(tmp_path: Path) -> None:
    store = Payloads(tmp_path)
    last = store.keep(Content.PROMPT, b"x", expires=LATER)
    for _ in range(MAX_CHAIN):
        last = store.keep(Content.PROMPT, b"", expires=LATER, shared=Shared(last.digest, 1, 0))
    started = time.monotonic()
    with pytest.raises(PayloadError, match="build on one another"):
        store.read(last.digest)
    assert time.monotonic() >= started
