"""What a policy wants kept beside the log: what commands write, and how refused connections began."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from corral.actions import Action, Content, Decision, Kind, Origin, Program, Verdict
from corral.errors import CorralError, SandboxClosed
from corral.log.events import PayloadKept, PayloadLost, SessionStarted
from corral.log.gaps import Gaps
from corral.log.holdings import Holdings
from corral.log.payload_keys import PayloadError
from corral.log.payloads import Payload, Payloads, Shared
from corral.log.places import open_log, open_payloads, payloads_path
from corral.log.signing import read_keys
from corral.log.verify import verify_log
from corral.log.writer import Log, LogUnwritable
from corral.monitor.records import Keeper, Tally
from corral.policy.load import parse_policy
from corral.sandbox import asowner, contents, core, selected, trees
from corral.sandbox.box import Sandbox
from corral.sandbox.recording import Recorder
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import MakeBox
from tests.contain.gateway_boxes import policy_of, python
from tests.contain.logs import Disk, events
from tests.internet.world import Internet
from tests.unit.model_answers import ALL, WORDS
from tests.unit.recorded import used

KEEP = parse_policy("log: {keep: {terminal: 30d, refused_flow: 1h}, keep_bytes: 1MiB}\n", source="test.yaml")


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    opened = open_log(tmp_path / "records" / "log")
    yield opened
    with suppress(LogUnwritable):  # which is what a test wanted
        await asyncio.to_thread(opened.close)


async def ended(box: Sandbox, log: Log) -> None:
    """Ends it, and has all signed for that was recorded."""
    await box.close()
    await asyncio.to_thread(log.seal)


def text_of(place: Path, event: PayloadKept) -> str:
    """What a command wrote, as its asciicast has it."""
    header, *lines = [json.loads(line) for line in open_payloads(place).read(event.digest).splitlines()]
    assert header["version"] == 2
    return "".join(line[2] for line in lines)


def is_whole(place: Path) -> bool:
    look = Holdings(Gaps())
    return verify_log(place, read_keys(place), look=look).valid and not list(look.faults(open_payloads(place)))


def written(tmp_path: Path) -> str:
    policy = tmp_path / "keep.yaml"
    policy.write_text("log: {keep: {terminal: 30d}}\n")
    return str(policy)


def test_what_a_command_writes_is_kept_whole(cli: CommandLine, tmp_path: Path) -> None:
    """Also what it has written last: the sandbox may be gone before that is read."""
    place = tmp_path / "records" / "log"
    script = "echo out; echo err >&2; head -c 300000 /dev/zero | tr '\\0' x; printf end"
    done = cli.run("--log", str(place), "--policy", written(tmp_path), "--", "sh", "-c", script)
    assert done.returncode == 0
    (kept,) = events(place, PayloadKept)
    assert (kept.content, kept.is_whole, kept.origin.exec) == (Content.TERMINAL, True, 1)
    text = text_of(place, kept)
    assert len(text) == len(done.stdout) + len(done.stderr)
    assert sorted(text) == sorted((done.stdout + done.stderr).decode())
    assert text.endswith("end")
    assert is_whole(place)


def test_nothing_is_kept_that_the_policy_does_not_name(cli: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    assert cli.run("--log", str(place), "--", "echo", "out").returncode == 0
    assert not events(place, PayloadKept)
    assert not payloads_path(place).exists()


def test_contents_are_absent_inside(cli: CommandLine, workspace: Path, tmp_path: Path) -> None:
    """I4, where the log lies in the workspace itself."""
    options = ("--log", str(workspace / "log"), "--policy", written(tmp_path), "--discard", "--")
    assert cli.run(*options, "echo", "secret").returncode == 0
    done = cli.run(*options, "sh", "-c", "ls -A log.payloads; cat log.payloads/*/*; rm -rf log.payloads; :")
    assert (done.returncode, done.stdout) == (0, b"")
    assert len(events(workspace / "log", PayloadKept)) == 2  # what `rm` complained of, too
    assert is_whole(workspace / "log")


def test_contents_are_absent_inside_a_tree_that_is_shown_too(cli: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    place.parent.mkdir()
    place.parent.chmod(0o755)
    policy = tmp_path / "shown.yaml"
    policy.write_text(f"log: {{keep: {{terminal: 30d}}}}\nfilesystem: {{read: ['{place.parent}']}}\n")
    for _ in range(2):
        look = f"find {place} {place.parent}/log.payloads -type f | wc -l; cat {place.parent}/log.key"
        done = cli.run("--log", str(place), "--policy", str(policy), "--", "sh", "-c", look)
        assert done.stdout.split() == [b"0"], done
    assert len(events(place, PayloadKept)) == 2


def test_an_operator_lists_reads_and_erases(cli: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    ran = cli.run("--log", str(place), "--policy", written(tmp_path), "--", "printf", r"\033[2Jhello")
    assert ran.returncode == 0
    listed = cli("log", "content", "--log", str(place), "--json")
    (row,) = json.loads(listed.stdout)
    digest = row["digest"]
    assert row["content"] == "terminal"
    shown = cli("log", "content", digest, "--log", str(place))
    assert b'"o","\\u001b[2Jhello"]' in shown.stdout
    assert b"\x1b" not in shown.stdout
    refused = cli("log", "erase", digest, "--why", " ", "--log", str(place))
    assert refused.returncode == 125
    assert b"say why" in refused.stderr
    assert cli("log", "erase", "--expired", "--why", "old", "--log", str(place)).stdout == b""
    erased = cli("log", "erase", digest, "--why", "asked to", "--by", "anna", "--log", str(place))
    assert erased.returncode == 0, erased.stderr
    assert cli("log", "verify", "--log", str(place)).returncode == 0
    assert b"erased by anna: asked to" in cli("log", "show", "--log", str(place)).stdout
    again = cli("log", "content", digest, "--log", str(place))
    assert again.returncode == 125
    assert b"it is not there" in again.stderr


def test_a_replay_shows_what_was_written_among_what_was_done(cli: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    script = "echo first; sleep 0.5; mount -t tmpfs x /mnt 2>/dev/null; sleep 0.5; echo last"
    assert cli.run("--log", str(place), "--policy", written(tmp_path), "--", "sh", "-c", script).returncode == 0
    shown = cli("replay", "--log", str(place)).stdout.decode()
    assert shown.index("wrote: first") < shown.index("kernel.mount") < shown.index("wrote: last")
    kinds = [json.loads(line)["kind"] for line in cli("replay", "--log", str(place), "--json").stdout.splitlines()]
    assert kinds.count("terminal") == 2


def test_content_that_was_swapped_is_found_by_verifying(cli: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    for word in ("one", "two"):
        assert cli.run("--log", str(place), "--policy", written(tmp_path), "--", "echo", word).returncode == 0
    first, second = [path for path in payloads_path(place).rglob("*") if path.is_file()]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    done = cli("log", "verify", "--log", str(place))
    assert done.returncode == 1
    assert done.stdout.count(b"its content is another") == 2
    assert b"payloads" in done.stdout


async def test_what_execs_and_processes_write_is_kept(make_box: MakeBox, log: Log) -> None:
    box = await make_box(policy=KEEP, log=log)
    assert (await box.exec(["sh", "-c", "echo captured; echo twice >&2"])).exit_code == 0
    process = await box.start_process(["echo", "streamed"])
    assert await process.stdout.read() == b"streamed\n"
    await process.wait()
    process = await box.start_process(["sh", "-c", "stty size"], terminal=(30, 100))
    assert await process.stdout.read() == b"30 100\r\n"
    await process.wait()
    await ended(box, log)
    kept = events(log.directory, PayloadKept)
    assert [event.origin.exec for event in kept] == [1, 2, 3]
    texts = [text_of(log.directory, event) for event in kept]
    assert sorted(texts[0].split()) == ["captured", "twice"]
    assert texts[1:] == ["streamed\n", "30 100\r\n"]
    header = json.loads(open_payloads(log.directory).read(kept[2].digest).splitlines()[0])
    assert (header["width"], header["height"]) == (100, 30)
    assert is_whole(log.directory)


async def test_what_is_too_long_is_cut_and_said_to_be(make_box: MakeBox, log: Log) -> None:
    box = await make_box(policy=KEEP, log=log)
    assert (await box.exec(["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"])).exit_code == 0
    await ended(box, log)
    (kept,) = events(log.directory, PayloadKept)
    assert not kept.is_whole
    assert 500_000 < kept.size <= 1 << 20
    assert set(text_of(log.directory, kept)) == {"x"}


async def test_what_the_caller_is_not_given_is_kept_all_the_same(make_box: MakeBox, log: Log) -> None:
    policy = replace(KEEP, resources=replace(KEEP.resources, output=10))
    box = await make_box(policy=policy, log=log)
    assert (await box.exec(["sh", "-c", "head -c 3000 /dev/zero | tr '\\0' x"])).stdout == b"x" * 10
    await ended(box, log)
    (kept,) = events(log.directory, PayloadKept)
    assert (kept.is_whole, text_of(log.directory, kept)) == (True, "x" * 3000)


async def test_what_was_not_read_to_its_end_is_said_to_be_cut(make_box: MakeBox, log: Log) -> None:
    box = await make_box(policy=KEEP, log=log)
    # One that somebody goes on to write to, and one whose output nobody wants.
    assert (await box.exec(["sh", "-c", "echo first; (sleep 600) &"])).exit_code == 0
    process = await box.start_process(["sh", "-c", "echo second; sleep 600"])
    assert await process.stdout.readline() == b"second\n"
    process.release()
    await ended(box, log)
    kept = events(log.directory, PayloadKept)
    assert [(event.origin.exec, event.is_whole) for event in kept] == [(1, False), (2, False)]


async def test_what_was_cancelled_is_kept_too(make_box: MakeBox, log: Log) -> None:
    """As far as it went: it is killed, and may have been read to its end by then."""
    box = await make_box(policy=KEEP, log=log)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(box.exec(["sh", "-c", "echo said; sleep 600"]), 1)
    await ended(box, log)
    (kept,) = events(log.directory, PayloadKept)
    assert text_of(log.directory, kept) == "said\n"


def test_what_a_broken_pipe_has_cost_is_said(cli: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    command = cli.start("run", "--log", str(place), "--policy", written(tmp_path), "--", "yes")
    assert command.stdout is not None
    assert command.stdout.read(2) == b"y\n"
    command.stdout.close()
    command.wait(60)
    (kept,) = events(place, PayloadKept)
    assert not kept.is_whole


async def test_several_who_close_lose_nothing(make_box: MakeBox, log: Log) -> None:
    """Nor does one who does not wait for it."""
    policy = parse_policy("log: {keep: {terminal: 1h, diff: 1h}}\n", source="test.yaml")
    for impatient in (False, True):
        box = await make_box(policy=policy, log=log)
        assert (await box.exec(["sh", "-c", "echo said; yes word | head -n 20000 >words"])).exit_code == 0
        first = asyncio.ensure_future(box.close())
        await asyncio.sleep(0)  # it has begun
        others = [asyncio.ensure_future(box.close()) for _ in range(2)]
        if impatient:
            first.cancel()
            await asyncio.wait([first])
            assert first.cancelled()
        else:
            await first
        await asyncio.gather(*others)
        assert box.core.layer_fd == -1
    log.seal()
    found = [event.content for event in events(log.directory, PayloadKept)]
    assert found == [Content.TERMINAL, Content.DIFF] * 2 or found == [Content.DIFF, Content.TERMINAL] * 2
    assert is_whole(log.directory)


async def test_a_start_that_fails_leaves_nothing_behind(
    make_box: MakeBox, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "START_TIMEOUT", 0.0)
    for _ in range(3):
        with suppress(CorralError):  # the walls may have been quicker
            await (await make_box(policy=KEEP, log=log)).close()
    assert not [each for each in threading.enumerate() if each.name == "corral-contents"]


async def test_whoever_writes_more_than_the_disk_takes_waits(
    make_box: MakeBox, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else in his program does."""
    keep, go_on = Payloads.keep, threading.Event()

    def slow(self: Payloads, content: Content, data: bytes, *, expires: int, shared: Shared | None = None) -> Payload:
        go_on.wait(60)
        return keep(self, content, data, expires=expires, shared=shared)

    monkeypatch.setattr(Payloads, "keep", slow)
    monkeypatch.setattr(contents, "MAX_WAITING", 1000)
    box = await make_box(policy=KEEP, log=log)
    assert (await box.exec(["sh", "-c", "head -c 2000 /dev/zero | tr '\\0' x"])).exit_code == 0
    more = asyncio.ensure_future(box.exec(["echo", "more"]))
    done, _ = await asyncio.wait([more], timeout=1)
    assert not done
    go_on.set()
    assert (await more).text == "more\n"
    await ended(box, log)
    assert len(events(log.directory, PayloadKept)) == 2


async def test_a_command_that_still_runs_at_the_end_is_kept_as_cut(make_box: MakeBox, log: Log) -> None:
    box = await make_box(policy=KEEP, log=log)
    process = await box.start_process(["sh", "-c", "echo begun; sleep 600"])
    assert await process.stdout.readline() == b"begun\n"
    running = asyncio.ensure_future(box.exec(["sh", "-c", "echo captured; sleep 600"]))
    assert (await box.exec(["true"])).exit_code == 0  # says nothing, and leaves nothing
    while len((await box.exec(["pgrep", "sleep"])).text.split()) < 2:
        await asyncio.sleep(0.05)
    await ended(box, log)
    with suppress(SandboxClosed):
        await running
    kept = {text_of(log.directory, event).strip() for event in events(log.directory, PayloadKept)}
    assert {"begun", "captured"} <= kept
    assert is_whole(log.directory)


async def test_a_store_that_cannot_be_written_ends_the_sandbox(
    make_box: MakeBox, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a log that cannot be written does (I3)."""

    def fails(*_: object, **__: object) -> Payload:
        raise PayloadError("the disk is full")

    monkeypatch.setattr(Payloads, "keep", fails)
    box = await make_box(policy=KEEP, log=log)
    await box.exec(["echo", "something"])
    assert "cannot be kept (the disk is full)" in await asyncio.wait_for(box.wait_ended(), 60)
    with pytest.raises(SandboxClosed):
        await box.exec(["true"])
    with pytest.raises(PayloadError, match="the disk is full"):
        await box.close()
    log.seal()
    assert [event.why for event in events(log.directory, PayloadLost)] == ["the disk is full"]


async def test_a_close_waits_until_it_is_recorded_for_good(
    make_box: MakeBox, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    box = await make_box(policy=KEEP, log=log)
    assert (await box.exec(["echo", "said"])).exit_code == 0
    disk.works.clear()
    closing = asyncio.ensure_future(box.close())
    done, _ = await asyncio.wait([closing], timeout=1)
    disk.works.set()
    assert not done
    await closing


def test_a_run_whose_last_words_could_not_be_kept_says_so(cli: CommandLine, tmp_path: Path, workspace: Path) -> None:
    """The sandbox has ended by then; its changes are there all the same."""
    place = tmp_path / "records" / "log"
    place.parent.mkdir()
    payloads_path(place).write_text("no directory")
    options = ("--log", str(place), "--policy", written(tmp_path), "--")
    done = cli.run(*options, "true")
    assert done.returncode == 125
    assert b"cannot make it: File exists" in done.stderr
    payloads_path(place).unlink()
    # Every directory that a payload could lie in is a file.
    payloads_path(place).mkdir()
    for number in range(256):
        (payloads_path(place) / f"{number:02x}").write_text("")
    done = cli.run(*options, "sh", "-c", "echo said; echo new >new.txt")
    assert (done.returncode, done.stdout) == (125, b"said\n")
    assert b"cannot be kept" in done.stderr
    (lost,) = events(place, PayloadLost)
    assert (lost.content, lost.count) == (Content.TERMINAL, 1)
    assert b"new.txt" in cli("diff").stdout


def test_a_store_with_a_bad_key_begins_nothing(cli: CommandLine, tmp_path: Path) -> None:
    place = tmp_path / "records" / "log"
    assert cli.run("--log", str(place), "--", "true").returncode == 0
    (tmp_path / "records" / "log.payloads.key").write_bytes(os.urandom(7))
    (tmp_path / "records" / "log.payloads.key").chmod(0o600)
    done = cli.run("--log", str(place), "--policy", written(tmp_path), "--", "touch", "ran")
    assert done.returncode == 125
    assert b"it is no key" in done.stderr
    assert len(events(place, SessionStarted)) == 1


@pytest.mark.parametrize("drop", [True, False])
def test_what_was_changed_is_kept_as_a_patch(cli: CommandLine, tmp_path: Path, drop: bool) -> None:
    """Also where the changes themselves are dropped."""
    place = tmp_path / "records" / "log"
    policy = tmp_path / "keep.yaml"
    policy.write_text("log: {keep: {diff: 30d}}\n")
    script = "echo new >new.txt; echo more >>file.txt"
    options = ("--log", str(place), "--policy", str(policy), *(["--discard"] if drop else []), "--")
    assert cli.run(*options, "sh", "-c", script).returncode == 0
    (kept,) = events(place, PayloadKept)
    assert (kept.content, kept.is_whole) == (Content.DIFF, True)
    patch = open_payloads(place).read(kept.digest).decode()
    assert "+++ b/new.txt" in patch and "+new" in patch
    assert "--- a/file.txt" in patch and "+more" in patch
    assert cli.run(*options, "true").returncode == 0
    assert len(events(place, PayloadKept)) == 1  # nothing was changed
    assert is_whole(place)


async def test_a_patch_that_is_too_long_is_cut(make_box: MakeBox, log: Log) -> None:
    box = await make_box(policy=parse_policy("log: {keep: {diff: 1h}, keep_bytes: 10KiB}\n", source="x"), log=log)
    assert (await box.exec(["sh", "-c", "yes word | head -n 20000 >words"])).exit_code == 0
    await ended(box, log)
    (kept,) = events(log.directory, PayloadKept)
    assert (kept.size, kept.is_whole) == (10 << 10, False)


# ---- files that were changed ----


def of_files(*globs: str, more: str = "") -> str:
    return json.dumps({"log": {"keep": {"file": "30d"}, "files": list(globs)}})[:-2] + f"{more}}}}}"


def kept_files(place: Path) -> list[tuple[str, bytes]]:
    """Path and content of each, in the order of the records."""
    store = open_payloads(place)
    found = events(place, PayloadKept)
    assert {event.content for event in found} <= {Content.FILE}
    return [(event.about, store.read(event.digest)) for event in found]


@pytest.mark.parametrize("drop", [True, False])
def test_files_that_were_changed_are_kept_whole(cli: CommandLine, tmp_path: Path, workspace: Path, drop: bool) -> None:
    """In any part of the layer, also one that vanishes; and nothing that is as it was, is gone, or is not named."""
    for name in ("same.txt", "gone.txt", "touched.txt", "rewritten.txt", "run.txt", "over.txt"):
        (workspace / name).write_text(f"{name} of before\n")
        (workspace / name).chmod(0o666)
    workspace.chmod(0o777)
    place, policy = tmp_path / "records" / "log", tmp_path / "keep.yaml"
    policy.write_text(of_files(f"{workspace}/**/*.txt", "/tmp/kept/*", "/home/agent/.profile"))
    script = """set -e
        mkdir -p sub/deep /tmp/kept
        printf 'new\\0\\377' >sub/deep/new.txt
        echo more >>over.txt; rm gone.txt; touch touched.txt; cp rewritten.txt x; cat x >rewritten.txt
        echo unmatched >new.bin; echo temporary >/tmp/kept/a; echo unmatched >/tmp/b
        echo alias >~/.profile; chmod 777 run.txt; : >empty.txt; rm -f x
    """
    options = ("--log", str(place), "--policy", str(policy), *(["--discard"] if drop else []), "--")
    done = cli.run(*options, "sh", "-c", script)
    assert done.returncode == 0, done
    assert kept_files(place) == sorted(
        [
            (f"{workspace}/sub/deep/new.txt", b"new\0\xff"),
            (f"{workspace}/over.txt", b"over.txt of before\nmore\n"),
            (f"{workspace}/run.txt", b"run.txt of before\n"),
            (f"{workspace}/empty.txt", b""),
            ("/tmp/kept/a", b"temporary\n"),
            ("/home/agent/.profile", b"alias\n"),
        ]
    )
    assert all(event.is_whole and event.origin.session for event in events(place, PayloadKept))
    assert is_whole(place)
    assert cli.run(*options, "true").returncode == 0
    assert len(events(place, PayloadKept)) == 6  # of the second session nothing
    (row, *_) = json.loads(cli("log", "content", "--log", str(place), "--json").stdout)
    assert row["content"] == "file"
    session = events(place, PayloadKept)[0].origin.session
    shown = cli("replay", session, "--log", str(place)).stdout.decode()
    assert f"bytes are kept of the file {workspace}/sub/deep/new.txt" in shown
    page = tmp_path / "page.html"
    assert cli("replay", session, "--log", str(place), "--html", str(page)).returncode == 0
    assert "file /home/agent/.profile" in page.read_text()
    assert b"/home/agent/.profile" in cli("log", "export", "--log", str(place)).stdout


async def test_nothing_but_regular_files_is_kept_and_no_link_is_followed(
    make_box: MakeBox, log: Log, workspace: Path, tmp_path: Path
) -> None:
    """What lies behind a link may be the host's."""
    secret = tmp_path / "secret"
    secret.write_text("of the host\n")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("of the host\n")
    policy = parse_policy(of_files(f"{workspace}/**"), source="x")
    box = await make_box(policy=policy, log=log)
    script = f"""
        mkdir made; ln -s {secret} link; ln -s {tmp_path}/secrets directory; ln -s /etc/passwd made/link
        mkfifo fifo made/fifo; mknod device c 1 3 2>/dev/null; mknod hole c 0 0 2>/dev/null
        rm -f device hole  # where they could be made they are of another walls' test
        echo first >made/one; ln made/one made/two; echo elf >made/special; chmod 6755 made/special
        python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock")'; :
    """
    assert (await box.exec(["sh", "-c", script])).exit_code == 0
    await ended(box, log)
    assert kept_files(log.directory) == [
        (f"{workspace}/made/one", b"first\n"),
        (f"{workspace}/made/special", b"elf\n"),
        (f"{workspace}/made/two", b"first\n"),
    ]
    assert is_whole(log.directory)


async def test_files_that_were_locked_away_are_kept(make_box: MakeBox, log: Log, workspace: Path) -> None:
    """An ordinary user may not open them, nor list what is around them, without being their owner inside."""
    box = await make_box(policy=parse_policy(of_files(f"{workspace}/**"), source="x"), log=log)
    script = """set -e
        mkdir -p b/inner; echo closed >a; echo hidden >b/inner/file; echo open >c; ln -s c d
        chmod 0 a b/inner b
    """
    assert (await box.exec(["sh", "-c", script])).exit_code == 0
    await ended(box, log)
    assert kept_files(log.directory) == [
        (f"{workspace}/a", b"closed\n"),
        (f"{workspace}/b/inner/file", b"hidden\n"),
        (f"{workspace}/c", b"open\n"),
    ]


async def test_a_file_that_is_too_long_is_cut(make_box: MakeBox, log: Log, workspace: Path) -> None:
    """Also one that is nothing but a hole."""
    policy = parse_policy(of_files(f"{workspace}/*", more=', "keep_bytes": "10KiB"'), source="x")
    box = await make_box(policy=policy, log=log)
    script = "set -e; truncate -s 1900M sparse; head -c 10240 /dev/zero | tr '\\0' x >exact"
    assert (await box.exec(["sh", "-c", f"{script}; (cat exact; echo) >longer"])).exit_code == 0
    await ended(box, log)
    found = [(event.about, event.size, event.is_whole) for event in events(log.directory, PayloadKept)]
    assert found == [
        (f"{workspace}/exact", 10240, True),
        (f"{workspace}/longer", 10240, False),
        (f"{workspace}/sparse", 10240, False),
    ]
    assert dict(kept_files(log.directory))[f"{workspace}/sparse"] == bytes(10240)


async def test_more_files_than_are_kept_are_counted(
    make_box: MakeBox, log: Log, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones each time. And memory holds no more of them at once than waits for the disk."""
    monkeypatch.setattr(selected, "MAX_FILES", 5)
    monkeypatch.setattr(selected, "MAX_BYTES", 30)
    monkeypatch.setattr(contents, "MAX_WAITING", 1)
    for _ in range(2):
        box = await make_box(policy=parse_policy(of_files(f"{workspace}/new*"), source="x"), log=log)
        script = "for n in 9 8 7 6 5 4 3 2 1; do echo $n >new$n; done; echo too much, as it is over the bound >new0"
        assert (await box.exec(["sh", "-c", script])).exit_code == 0
        await box.close()
    await asyncio.to_thread(log.seal)
    expected = [(f"{workspace}/new{number}", b"%d\n" % number) for number in range(1, 6)]
    assert kept_files(log.directory) == expected * 2
    lost = events(log.directory, PayloadLost)
    assert [(event.content, event.count) for event in lost] == [(Content.FILE, 5)] * 2
    assert "files are kept" in lost[0].why


async def test_a_file_that_is_called_anything_is_kept_and_harmless(
    make_box: MakeBox, log: Log, workspace: Path, cli: CommandLine
) -> None:
    box = await make_box(policy=parse_policy(of_files(f"{workspace}/**"), source="x"), log=log)
    names = [b"new\nline", b"\x1b[2Jescape", b"bad\xff", "\u202etxt.exe".encode()]
    make = "import sys, os\nfor n in sys.argv[1:]: open(os.fsencode(n), 'wb').write(b'\\x1b[2J' + os.fsencode(n))"
    assert (await box.exec(["python3", "-c", make, *map(os.fsdecode, names)])).exit_code == 0
    await ended(box, log)
    place = log.directory
    found = dict(kept_files(place))
    assert sorted(found.values()) == sorted(b"\x1b[2J" + name for name in names)
    assert set(found) == {f"{workspace}/{name.decode(errors='replace')}" for name in names}
    assert is_whole(place)
    session = events(place, PayloadKept)[0].origin.session
    for words in (("replay", session, "--details"), ("log", "show"), ("log", "export")):
        out = cli(*words, "--log", str(place)).stdout
        assert b"bad" in out and b"\x1b" not in out
        assert b"\xe2\x80\xae" not in out or words[-1] == "export"  # which is for programs
    (digest,) = [event.digest for event in events(place, PayloadKept) if "new" in event.about]
    assert cli("log", "content", digest, "--log", str(place)).stdout == b"\x1b[2Jnew\nline"


async def test_a_file_that_cannot_be_read_ends_the_run_as_other_contents_do(
    make_box: MakeBox, log: Log, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are kept all the same."""
    opened = trees.open_components

    def broken(root: int, components: Sequence[str], flags: int) -> int:
        if components[-1] == "b":
            raise OSError(errno.EIO, "Input/output error")
        return opened(root, components, flags)

    monkeypatch.setattr(selected, "open_components", broken)
    box = await make_box(policy=parse_policy(of_files(f"{workspace}/*"), source="x"), log=log)
    assert (await box.exec(["sh", "-c", "echo 1 >a; echo 2 >b; echo 3 >c"])).exit_code == 0
    with pytest.raises(PayloadError, match=r"/b.*cannot be read: Input/output error"):
        await box.close()
    await asyncio.to_thread(log.seal)
    assert kept_files(log.directory) == [(f"{workspace}/a", b"1\n"), (f"{workspace}/c", b"3\n")]
    (lost,) = events(log.directory, PayloadLost)
    assert (lost.content, lost.count) == (Content.FILE, 1)


@pytest.mark.user
async def test_locked_files_without_a_helper_are_lost_and_that_is_said(
    make_box: MakeBox, log: Log, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> asowner.Helper:
        raise CorralError("none can be made")

    monkeypatch.setattr(asowner, "begin", none)
    box = await make_box(policy=parse_policy(of_files(f"{workspace}/*"), source="x"), log=log)
    assert (await box.exec(["sh", "-c", "echo 1 >a; echo 2 >b; echo 3 >c; chmod 0 b"])).exit_code == 0
    with pytest.raises(PayloadError, match="none can be made"):
        await box.close()
    await asyncio.to_thread(log.seal)
    assert kept_files(log.directory) == [(f"{workspace}/a", b"1\n")]
    assert [event.count for event in events(log.directory, PayloadLost)] == [1, 1]


def test_what_an_earlier_run_has_changed_is_not_kept_again(cli: CommandLine, tmp_path: Path, workspace: Path) -> None:
    assert cli.run("--", "sh", "-c", "echo 1 >first; echo 1 >both; echo 1 >~/home").returncode == 0
    (layer,) = json.loads(cli("layers", "--json").stdout)["layers"]
    place, policy = tmp_path / "records" / "log", tmp_path / "keep.yaml"
    policy.write_text(of_files(f"{workspace}/**", "/home/agent/*"))
    options = ("--on", layer["id"], "--log", str(place), "--policy", str(policy), "--")
    done = cli.run(*options, "sh", "-c", "echo 2 >>both; echo 2 >second; cat ~/home")
    assert (done.returncode, done.stdout) == (0, b"1\n"), done
    assert kept_files(place) == [(f"{workspace}/both", b"1\n2\n"), (f"{workspace}/second", b"2\n")]


def test_no_file_is_kept_where_only_globs_or_only_a_time_are_given(
    cli: CommandLine, tmp_path: Path, workspace: Path
) -> None:
    place, policy = tmp_path / "records" / "log", tmp_path / "keep.yaml"
    for text in ("{keep: {file: 30d}}", f"{{keep: {{diff: 1d}}, files: ['{workspace}/**']}}"):
        policy.write_text(f"log: {text}\n")
        options = ("--log", str(place), "--policy", str(policy), "--")
        assert cli.run(*options, "sh", "-c", "echo x >new").returncode == 0
    assert [event.content for event in events(place, PayloadKept)] == [Content.DIFF]


def test_secrets_of_the_caller_are_in_no_file_that_is_kept(cli: CommandLine, tmp_path: Path, workspace: Path) -> None:
    """Neither what the caller's environment holds, nor what the policy sets and no program has written down."""
    place, policy = tmp_path / "records" / "log", tmp_path / "keep.yaml"
    canary = "canary-5f1c0de"
    policy.write_text(of_files("/**")[:-1] + f', "environment": {{"set": {{"TOKEN": "{canary}-set"}}}}}}')
    options = ("--log", str(place), "--policy", str(policy), "--discard", "--")
    done = cli.run(*options, "sh", "-c", "echo x >new; echo y >/tmp/new; env >~/seen", env={"SECRET": f"{canary}-own"})
    assert done.returncode == 0, done
    found = dict(kept_files(place))
    assert set(found) == {f"{workspace}/new", "/tmp/new", "/home/agent/seen"}
    assert f"{canary}-set".encode() in found.pop("/home/agent/seen")  # which a program has written down
    assert f"{canary}-own".encode() not in b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert canary.encode() not in b"".join(found.values())


SPEAK = """
    import socket
    with socket.create_connection(("web.test", 443), timeout=8) as s:
        s.sendall(b"SSH-2.0-tunnel\\r\\n")
        try:
            print(s.recv(100))
        except OSError:
            pass
"""


async def test_how_a_refused_connection_began_is_kept(make_box: MakeBox, internet: Internet, log: Log) -> None:
    rules = "allow: [{name: web.test, port: 443, protocol: tls}]"
    policy = policy_of(rules)
    box = await make_box(policy=policy.__class__(network=policy.network, log=KEEP.log), log=log)
    await python(box, SPEAK)
    await ended(box, log)
    kept = [event for event in events(log.directory, PayloadKept) if event.content is Content.REFUSED_FLOW]
    assert [event.about for event in kept] == ["web.test port 443"]
    assert open_payloads(log.directory).read(kept[0].digest) == b"SSH-2.0-tunnel\r\n"
    assert kept[0].origin.process is not None
    assert is_whole(log.directory)


async def test_a_flood_of_refused_connections_is_counted(
    make_box: MakeBox, internet: Internet, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MAX_REFUSED", 2)
    policy = policy_of("allow: [{name: web.test, port: 443, protocol: tls}]")
    box = await make_box(policy=policy.__class__(network=policy.network, log=KEEP.log), log=log)
    for _ in range(5):
        await python(box, SPEAK)
    await ended(box, log)
    kept = [event for event in events(log.directory, PayloadKept) if event.content is Content.REFUSED_FLOW]
    assert len(kept) == 2
    assert [(event.content, event.count) for event in events(log.directory, PayloadLost)] == [(Content.REFUSED_FLOW, 3)]


# ---- calls of brokers ----

CALLS = parse_policy("log: {keep: {prompt: 30d, response: 30d, query: 1d}, keep_bytes: 1MiB}\n", source="x")


async def test_what_brokers_say_of_calls_is_kept_and_looked_back_at(
    make_box: MakeBox, log: Log, cli: CommandLine, tmp_path: Path
) -> None:
    """Said by a broker of the test's, from a thread of its own, while commands run."""
    box = await make_box(policy=CALLS, log=log)
    assert box._core is not None
    recorder = box._core._chronicle
    assert isinstance(recorder, Recorder) and recorder.contents is not None
    keeper: Keeper = recorder.contents
    tally: Tally = recorder.session
    origin = Origin(box.id, box.id, 1, 1)
    given = ALL["messages stream"]
    first = [{"role": "user", "content": "x" * 20_000}]
    prompts = [json.dumps({"model": "m", "messages": first + [{"role": "user", "content": "go"}] * n}) for n in (1, 2)]

    def broker() -> None:
        for number, prompt in enumerate(prompts, 1):
            keeper.keep(origin, Content.PROMPT, prompt.encode(), True, "model-1", number)
            keeper.keep(origin, Content.RESPONSE, given.body, True, "model-1", number)
            tally.used(
                used(origin=origin, started=time.time(), call=number, opened=number + 100, tools=given.answer.tools)
            )
            acting = replace(origin, step=number + 100, tool="call_2" if number == 1 else "", unexplained=number == 2)
            action = Action(Kind.PROCESS_EXEC, Program("/bin/true", ("true",)), acting)
            recorder.session.write(Decision(action, Verdict.ALLOW, "process", "", "", "policy", number, time.time()))

    assert (await box.exec(["true"])).exit_code == 0
    await asyncio.to_thread(broker)
    assert (await box.exec(["true"])).exit_code == 0
    await ended(box, log)
    place = log.directory
    assert is_whole(place)
    kept = events(place, PayloadKept)
    assert [(each.content, each.call) for each in kept] == [
        (content, number) for number in (1, 2) for content in (Content.PROMPT, Content.RESPONSE)
    ]
    store = open_payloads(place)
    assert [store.read(each.digest).decode() for each in kept if each.content is Content.PROMPT] == prompts
    assert kept[2].size < 100 < kept[0].size

    words = ("--log", str(place))
    tree = cli("replay", *words, "--tree").stdout.decode()
    assert "conversation c0ffee: 2 calls, 200 tokens in, 40 out, 0.003 EUR" in tree
    assert "read call_2: 1 actions" in tree and "unexplained: 1 actions" in tree
    played = cli("replay", *words, "--details").stdout.decode()
    assert WORDS in played and "First I look." in played and "[step 101, call_2]" in played
    for option in (("--unexplained",), ("--tool", "call_2")):
        (line,) = cli("log", "query", *words, *option).stdout.splitlines()
        assert b"process.exec /bin/true" in line
    (line,) = cli("log", "export", *words, "--unexplained").stdout.splitlines()
    assert json.loads(line)["record"]["unmapped"]["corral"]["fields"]["origin"]["unexplained"] is True
    lines = cli("log", "export", *words, "--format", "trajectories").stdout.splitlines()
    one, two = [json.loads(line) for line in lines]
    assert (one["text"], one["complete"], one["missing"]) == (WORDS, True, [])
    assert [each["tool"] for each in one["actions"]] == ["call_2"] and two["actions"] == []
    assert (two["prompt"]["messages_from"], len(two["prompt"]["messages"])) == (2, 1)
    table = tmp_path / "turns.parquet"
    assert cli("log", "export", *words, "--format", "trajectories-parquet", "-o", str(table)).returncode == 0
    assert table.read_bytes()[-4:] == b"PAR1"
    page = tmp_path / "page.html"
    assert cli("replay", *words, "--html", str(page)).returncode == 0
    assert "Conversation c0ffee" in page.read_text()
    assert b"model-1 of upstream-1" in cli("log", "review", *words).stdout


async def test_nothing_of_calls_is_kept_unless_the_policy_says_so(make_box: MakeBox, log: Log) -> None:
    box = await make_box(policy=KEEP, log=log)
    assert box._core is not None
    recorder = box._core._chronicle
    assert isinstance(recorder, Recorder) and recorder.contents is not None
    assert recorder.contents.keeps(Content.PROMPT) == 0
    recorder.contents.keep(Origin("b", "s"), Content.PROMPT, b"secret", True, "m")
    await ended(box, log)
    assert not [event for event in events(log.directory, PayloadKept) if event.content is Content.PROMPT]
