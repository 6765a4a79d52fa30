"""The work area: what of it goes, what never goes, and that whoever is killed at it loses and leaves nothing.

The layers here were made by nobody's run: `tests/contain/test_area.py` has those.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from corral.errors import CorralError, RequestError
from corral.policy.model import Layers, Policy, Resources
from corral.sandbox import account, area, claims, layer, quotas
from corral.sandbox.apply import journal
from corral.sandbox.area import collect, pin
from corral.sandbox.copying import Told
from corral.sandbox.layer import KeptLayer, list_layers, open_layer, opened, reap_partials, store
from corral.sandbox.ownership import SAME_IDS, OwnerMap
from corral.sandbox.trees import remove_tree
from corral.sandbox.view import Changeable

BLOCK = 4096
OLD = "2026-01-01T00:00:00.000+00:00"


@pytest.fixture(autouse=True)
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place = tmp_path / "corral" / "layers"
    place.mkdir(parents=True, mode=0o700)
    (tmp_path / "corral").chmod(0o700)
    yield place
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    remove_tree(parent, "corral")
    os.close(parent)


def make(name: str, like: str = "", created: str = OLD, **fields: object) -> KeptLayer:
    """A layer with three blocks of its own, and those of another one as hard links."""
    identifier = name.ljust(8, "a")
    kept = KeptLayer(
        id=identifier,
        created=created,
        workspace="/srv/project",
        command="true",
        label="true",
        user="root",
        count=1,
        parts=(Changeable("workspace", "/srv/project", ()),),
        scaffold=frozenset(),
        owners=OwnerMap(SAME_IDS, SAME_IDS, SAME_IDS),
        size=3 * BLOCK,
        entries=3,
        stripped=Told(),
        dropped=Told(),
    )
    kept = replace(kept, **fields)  # type: ignore[arg-type]
    with store() as directory:
        partial = f"partial-{os.getpid()}-{identifier}"
        parts = Path(f"/proc/self/fd/{directory}/{partial}/parts/workspace/deep")
        parts.mkdir(parents=True)
        for number in range(3):
            (parts / str(number)).write_bytes(b"x" * BLOCK)
        for other in (like.ljust(8, "a"),) if like else ():
            source = Path(f"/proc/self/fd/{directory}/{other}/parts/workspace/deep")
            for path in source.iterdir():
                os.link(path, parts / f"{path.name}-{other}")
        fd = os.open(partial, os.O_RDONLY, dir_fd=directory)
        layer.write_meta(fd, kept)
        os.close(fd)
        found = [path.lstat() for path in (parts.parents[2], *parts.parents[2].rglob("*"))]
        new = sum(each.st_blocks * 512 for each in found if stat.S_ISDIR(each.st_mode) or each.st_nlink == 1)
        account.add(directory, new, expires=kept.expires)
        os.rename(partial, identifier, src_dir_fd=directory, dst_dir_fd=directory)
    return kept


def du(*places: Path) -> int:
    """Bytes on disk of trees; what has several names counts once."""
    found = [path.lstat() for place in places for path in (place, *place.rglob("*"))]
    return sum({each.st_ino: each.st_blocks * 512 for each in found}.values())


def ids() -> list[str]:
    return [each.id.rstrip("a") for each in list_layers()]


def counted() -> int:
    with store() as directory:
        return account.total(directory)


def test_a_file_with_several_names_counts_once_and_is_free_with_the_last(layers: Path) -> None:
    make("b")
    make("c", like="b")
    with store() as directory:
        assert account.count(directory) == du(layers / "baaaaaaa", layers / "caaaaaaa")
    shown = collect(older_than=0, dry_run=True)
    assert ids() == ["b", "c"]
    done = collect(older_than=0)
    assert [size for _, size in done.removed] == [size for _, size in shown.removed]
    first, second = (size for _, size in done.removed)
    assert second - first == 6 * BLOCK  # the blocks of the first one are free only with the second one
    assert (shown.after, done.after, counted(), ids()) == (0, 0, 0, [])


def test_the_account_follows_without_looking_at_files(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("b")
    total = counted()
    monkeypatch.setattr(account, "_look", lambda root: pytest.fail("it was looked at"))
    make("c", like="b")
    assert counted() == du(layers / "baaaaaaa", layers / "caaaaaaa") > total
    layer.discard("baaaaaaa")
    assert counted() == du(layers / "caaaaaaa")
    layer.discard("caaaaaaa")
    assert counted() == 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"boot": "another", "total": 5, "added": 0, "next": null}', b"\0" * 300]
)
def test_an_account_that_cannot_be_trusted_is_made_anew(layers: Path, content: bytes) -> None:
    make("b")
    (layers / "account").write_bytes(content)
    assert counted() == du(layers / "baaaaaaa")


def test_the_oldest_go_until_the_rest_fits() -> None:
    for number, name in enumerate("bcd"):
        make(name, created=f"2026-01-0{number + 1}T00:00:00.000+00:00")
    one = counted() // 3
    done = collect(keep_bytes=2 * one)
    assert (ids(), len(done.removed), done.after) == (["c", "d"], 1, 2 * one)
    assert collect(keep_bytes=2 * one).removed == []
    # What is held does not make others stay.
    pin("caaaaaaa")
    done = collect(keep_bytes=one)
    assert (ids(), [why for _, why in done.held]) == (["c"], ["it is pinned"])


def test_by_age_only_what_is_older_goes() -> None:
    make("b")
    make("c", created=datetime.now(UTC).isoformat())
    make("d", created="2999-01-01T00:00:00.000+00:00")
    collect(older_than=3600)
    assert ids() == ["c", "d"]
    collect()
    assert ids() == ["c", "d"]


def test_what_is_kept_while_it_is_counted_does_not_wait_and_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    make("b")
    real = account._look
    kept: list[KeptLayer] = []

    def look(root: int) -> list[account._Entry]:
        if not kept:
            kept.append(make("c"))
        return real(root)

    monkeypatch.setattr(account, "_look", look)
    with store() as directory:
        account.count(directory)
        total = account.total(directory)
        assert total >= account.count(directory)  # which finds both


def test_what_goes_while_it_is_counted_goes_later(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be subtracted though it was not counted."""
    make("b")
    make("c")
    real = account._look

    def look(root: int) -> list[account._Entry]:
        if "b" in ids():
            layer.discard("baaaaaaa")
        return real(root)

    monkeypatch.setattr(account, "_look", look)
    with store() as directory:
        account.count(directory)
    assert list(layers.glob("partial-*"))
    reap_partials()
    assert counted() >= du(layers / "caaaaaaa")


def test_what_a_log_has_beside_it_and_what_is_no_layer_is_measured(layers: Path) -> None:
    state = layers.parent
    (state / "log").mkdir()
    (state / "log" / "checkpoint").write_bytes(b"x" * BLOCK)
    (state / "log.key").write_bytes(b"x" * BLOCK)
    (state / "log.index").symlink_to("/nowhere")
    assert area.log_files() == area.Taken(3, du(state / "log", state / "log.key", state / "log.index"))
    (layers / "strangea").write_bytes(b"x" * BLOCK)
    place = Path(journal.store())
    (place / "strangea").write_bytes(b"x" * BLOCK)
    (place / "strangeb").mkdir()
    assert (counted(), area.undo_copies()) == (BLOCK, area.Taken(2, du(place / "strangea", place / "strangeb")))
    assert journal.journals() == []
    assert collect(older_than=0, undo=True).before == BLOCK


def test_whoever_is_in_a_hurry_does_not_wait_for_one_who_counts() -> None:
    make("b", expires=1)
    with store() as directory:
        with account._counting(directory, fcntl.LOCK_EX):
            thread = threading.Thread(target=area.collect_expired, args=(directory, time.time(), 1.0))
            thread.start()
            thread.join(10)
            waits = thread.is_alive()
        thread.join()
    assert not waits and ids() == []
    reap_partials()
    assert counted() == 0


def test_what_a_process_of_the_same_number_has_left_goes_unless_it_is_held(
    layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("baaaaaaa", "caaaaaaa"):
        (layers / f"partial-{os.getpid()}-{name}" / "parts").mkdir(parents=True)
    reap_partials()
    assert len(list(layers.glob("partial-*"))) == 2  # they may be locked in a moment
    monkeypatch.setattr(layer, "_FRESH", -1)
    with store() as directory, layer.locked(directory, f"partial-{os.getpid()}-baaaaaaa", fcntl.LOCK_EX):
        reap_partials()
        assert [path.name[-8:] for path in layers.glob("partial-*")] == ["baaaaaaa"]


# ---- what never goes ----


@contextmanager
def another(what: Callable[[], object]) -> Iterator[int]:
    """A process that has done something, and is killed in the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        what()
        os.write(writer, b"x")
        while True:
            signal.pause()
    try:
        assert os.read(reader, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def claimed(session: str, reserved: int | None = None) -> Callable[[], None]:
    def claim() -> None:
        with store() as directory:
            claims.claim(directory, session, reserved)

    return claim


def refused() -> str:
    done = collect(older_than=0, keep_bytes=0)
    assert done.removed == []
    ((_, why),) = done.held
    return why


def test_what_a_live_session_has_kept_stays(layers: Path) -> None:
    make("b", session="sessiona")
    with another(claimed("sessiona")):
        assert "sessiona is alive" in refused()
        assert (layers / "session-sessiona").exists()
    collect(older_than=0)
    assert (ids(), list(layers.glob("session-*"))) == ([], [])


def test_a_session_that_is_restored_goes_on(layers: Path) -> None:
    make("b", session="sessiona")
    claimed("sessiona", 5)()
    claims.hand_over("sessiona", "sessionb")
    claims.release("sessiona")
    assert "is alive" in refused()
    with store() as directory:
        assert claims.reserved(directory) == 0  # what it had set aside is for nothing now
    claims.release("sessionb")
    assert collect(older_than=0).removed


def test_what_is_read_stays_and_what_is_begun_on_meanwhile_is_whole_or_not_there() -> None:
    kept = make("b")
    with opened(kept.id):
        assert refused() == "something lies on it, or reads it"
    collect(older_than=0)
    with pytest.raises(RequestError, match="there is no layer"):
        with opened(kept.id):
            pass


def test_what_was_applied_half_stays(layers: Path) -> None:
    kept = make("b")
    step = journal.Step("file", None, None)
    applied = journal.Journal("appliedb", kept.id, "/srv/project", OLD, journal.Phase.SWAPPING, (step,))
    with journal.locked(applied.id, make=True):
        journal.begin(applied.id)
        journal.write(applied)
    assert "applying it (appliedb) was cut short" in refused()
    (Path(journal.store()) / applied.id / journal.JOURNAL).write_text("{")
    assert "nobody can tell" in refused()
    journal.finish(applied.id)
    assert collect(older_than=0).removed


def test_what_a_log_names_stays_until_its_policy_lets_it_go(tmp_path: Path) -> None:
    log = tmp_path / "records"
    log.mkdir()
    (log / "checkpoint").touch()
    for when in (0, int(time.time()) + 1000):
        make("b", log=str(log), expires=when)
        assert f"the log {log} names it" in refused()
        (log / "checkpoint").unlink()
        assert collect(older_than=0).removed
        (log / "checkpoint").touch()
    make("b", log=str(log), expires=int(time.time()) - 1)
    assert collect().removed
    # It may be there where nobody can look.
    make("b", log="/" + "x" * 300)
    assert "names it" in refused()
    layer.discard("baaaaaaa")


def test_what_is_pinned_stays_until_it_is_not(layers: Path) -> None:
    kept = make("b")
    pin(kept.id)
    pin(kept.id)
    assert refused() == "it is pinned"
    with pytest.raises(RequestError, match="corral unpin"):
        layer.discard(kept.id)
    assert open_layer(kept.id) == kept
    pin(kept.id, on=False)
    layer.discard(kept.id)
    with pytest.raises(RequestError):
        pin(kept.id)


def test_what_is_damaged_is_told_and_stays(layers: Path) -> None:
    for name, content in (("b", "{"), ("c", None)):
        make(name)
        path = layers / name.ljust(8, "a") / "meta.json"
        path.write_text(content or path.read_text().replace(OLD, "yesterday"))
    done = collect(older_than=0)
    assert (done.removed, done.damaged) == ([], ["baaaaaaa", "caaaaaaa"])
    layer.discard("baaaaaaa")


# ---- by itself ----


def test_what_has_been_kept_long_enough_goes_without_a_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    make("b")
    make("c", expires=int(time.time()) + 1000)
    with store() as directory:
        with monkeypatch.context() as patch:
            patch.setattr(area, "_all", lambda layers: pytest.fail("they were looked at"))
            area.collect_expired(directory, time.time())
        area.collect_expired(directory, time.time() + 2000)
        assert ids() == ["b"]
        assert not account.is_due(directory, time.time() + 9e9)


def test_what_is_held_then_is_tried_again_later() -> None:
    make("b", expires=1)
    pin("baaaaaaa")
    with store() as directory:
        area.collect_expired(directory, time.time())
        assert ids() == ["b"]
        assert not account.is_due(directory, time.time() + 60)
        assert account.is_due(directory, time.time() + 700)


def test_it_takes_no_longer_than_it_may_and_the_rest_goes_later(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("b", expires=1)
    total = counted()
    with store() as directory:
        area.collect_expired(directory, time.time(), -1)
    assert ids() == []
    assert 0 < counted() < total
    reap_partials(time.monotonic() - 1)
    assert list(layers.glob("partial-*"))
    reap_partials()
    assert (list(layers.glob("partial-*")), counted()) == ([], 0)


# ---- quotas ----


def bounded(total: int, disk: int) -> Policy:
    return Policy(layers=Layers(total_bytes=total), resources=Resources(disk=disk))


def test_what_the_ends_of_live_sessions_need_is_set_aside() -> None:
    make("b")
    policy = bounded(counted() + 2500, 1000)
    for session in ("sessiona", "sessionb"):
        quotas.reserve(session, policy)
    with pytest.raises(CorralError, match=r"layers\.total_bytes"):
        quotas.reserve("sessionc", policy)
    with store() as directory:
        # The end of one is never refused; a snapshot gets what is left.
        assert quotas.admit(directory, "sessiona", "sessiona", policy) is None
        quota = quotas.admit(directory, "sessiona", "snapshot", policy)
        assert quota is not None and quota.bytes == 500
    claims.release("sessionb")
    quotas.reserve("sessionc", policy)
    for session in ("sessiona", "sessionc"):
        claims.release(session)


def test_what_may_go_goes_before_anything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes."""
    monkeypatch.setattr(quotas, "AT_ONCE", -1)
    make("b", expires=1)
    quotas.reserve("sessiona", bounded(BLOCK, BLOCK))
    claims.release("sessiona")
    assert ids() == []


def test_of_two_that_take_the_same_room_one_is_refused() -> None:
    policy = bounded(counted() + 5000, 1000)
    kept = make("b", disk=3000)
    with store() as directory:
        base = account.total(directory)
        policy = bounded(base + 5000, 1000)
        quotas.enter(directory, kept, "sessiona", policy)
        with pytest.raises(CorralError, match=r"layers\.total_bytes"):
            quotas.enter(directory, kept, "sessiona", policy)
        assert account.total(directory) == base + 3000


# ---- at once, and killed ----

CALLS = ("os.", "open", "fcntl.", "shutil.")


def killed_at(number: int, what: Callable[[], object]) -> bool:
    """Runs something in a child that is killed at its so-manyth call to the system. Whether it did not get that far."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(CALLS):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            what()
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def assert_whole(identifier: str) -> None:
    """Where a layer can be opened, all of it is there."""
    with opened(identifier) as directory:
        assert len(list(Path(f"/proc/self/fd/{directory}/parts/workspace/deep").iterdir())) >= 3


def test_whatever_it_is_killed_at_nothing_that_is_held_is_lost_and_nothing_half_is_left(layers: Path) -> None:
    """Also what removes the rest of it, and puts the account right, is killed."""
    draw = random.Random(20261127)
    number, seen = 1, set()
    ended = False
    while not ended:
        for each in ("b", "c", "d"):
            if not (layers / each.ljust(8, "a")).exists():
                make(each, like="" if each == "b" else "b", session="sessiona" if each == "d" else "")
        pin("baaaaaaa")
        ended = killed_at(number, lambda: collect(older_than=0))
        for _ in range(draw.choice((0, 0, 1))):
            killed_at(draw.randrange(1, 60), lambda: collect(older_than=0))
        for kept in list_layers():
            assert_whole(kept.id)
        seen.add(tuple(ids()))
        assert "b" in ids()
        assert counted() >= du(*(each for each in layers.iterdir() if each.is_dir()))
        collect(older_than=0)
        assert ids() == ["b"]
        assert sorted(each.name for each in layers.iterdir()) == ["account", "baaaaaaa"]
        assert counted() == du(layers / "baaaaaaa")
        number += draw.choice((1, 2, 3))
    assert seen == {("b", "c", "d"), ("b", "d"), ("b",)}


def test_several_at_once_and_those_who_begin_on_what_goes(layers: Path) -> None:
    """Each removes what the others have not; whoever begins on a layer meanwhile has all of it, or is told."""
    draw = random.Random(5)
    for _ in range(20):
        for each in ("b", "c", "d"):
            make(each, like="" if each == "b" else "b")
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                try:
                    collect(older_than=0)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            children.append(child)
        for _ in range(30):
            with suppress(RequestError):
                assert_whole(f"{draw.choice('bcd')}aaaaaaa")
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        collect(older_than=0)
        assert (ids(), counted()) == ([], 0)


def test_a_child_that_lives_on_holds_nothing(layers: Path) -> None:
    make("b", session="sessiona")
    claimed("sessiona")()
    with another(lambda: None):
        assert "is alive" in refused()
        claims.release("sessiona")
        assert collect(older_than=0).removed
        with store() as directory:
            fd = os.open(".", os.O_RDONLY, dir_fd=directory)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(fd)


def test_a_child_takes_nothing_away() -> None:
    make("b", session="sessiona")
    claimed("sessiona")()
    with another(lambda: claims.release("sessiona")):
        assert "is alive" in refused()
    claims.release("sessiona")


def test_a_claim_that_is_taken_for_a_dead_ones_is_made_again(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its locking."""
    make("b", session="sessiona")
    real, sweeps = fcntl.flock, [layers / "session-sessiona"]

    def flock(fd: int, how: int) -> None:
        if sweeps:
            sweeps.pop().unlink()
        real(fd, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with store() as directory:
            claims.claim(directory, "sessiona")
    assert not sweeps and "is alive" in refused()
    claims.release("sessiona")


# ---- what can be undone ----


def test_copies_for_undoing_go_only_when_somebody_says_so_and_whole(layers: Path) -> None:
    def apply() -> None:
        for identifier in ("appliedb", "appliedc"):
            done = journal.Journal(identifier, "baaaaaaa", "/srv/project", OLD, journal.Phase.DONE, ())
            if not (Path(journal.store()) / identifier).exists():
                with journal.locked(identifier, make=True):
                    journal.write(done)
                copies = Path(journal.store()) / identifier / journal.BEFORE
                copies.mkdir()
                (copies / "0").write_bytes(b"x" * BLOCK)

    apply()
    collect(older_than=0)
    assert len(journal.journals()) == 2
    with pytest.raises(RequestError, match="--older-than"):
        collect(undo=True)
    assert len(collect(undo=True, older_than=0, dry_run=True).undos) == len(journal.journals()) == 2
    number = 1
    while not killed_at(number, lambda: collect(undo=True, older_than=0)):
        for each in journal.journals():
            assert (Path(journal.store()) / each.id / journal.BEFORE / "0").read_bytes() == b"x" * BLOCK
        apply()
        number += 3
    assert os.listdir(journal.store()) == []
