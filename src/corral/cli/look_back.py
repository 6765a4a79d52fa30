"""`corral replay`, `corral log sessions`, `show`, `query`, `export`, `review`: prints what :mod:`corral.log` says."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO

from corral.cli.foreground import complain, printable
from corral.cli.log import directory_of
from corral.errors import RequestError
from corral.log.places import index_path, open_payloads
from corral.log.query import Filter, parse_filter, parse_time
from corral.log.reader import Reader
from corral.log.records import Record, Summary, decode, summary

if TYPE_CHECKING:
    from corral.log.conversations import Tree

_POLL = 0.5
_PARQUET = "parquet"
_TRAJECTORIES = "trajectories"
_TRAJECTORIES_PARQUET = "trajectories-parquet"
MAX_SESSIONS = 100_000


# ---- sessions ----


def _summaries(reader: Reader) -> Iterator[tuple[int, Summary]]:
    for number, entry in reader.entries():
        try:
            yield number, summary(entry)
        except (ValueError, RecursionError):
            continue  # which `corral log verify` tells of


@dataclass(slots=True)
class SessionRow:
    """One session of a log."""

    session: str
    agent: str
    started: float
    """Seconds since the epoch, as `ended`."""
    first: int
    """The number of its first record."""
    ended: float | None = None
    records: int = 0
    refused: int = 0


def sessions(log: str | None, *, as_json: bool) -> None:
    """Lists the sessions of a log, oldest first."""
    rows: dict[str, SessionRow] = {}
    for number, found in _summaries(Reader(directory_of(log))):
        if not found.session or (found.session not in rows and len(rows) >= MAX_SESSIONS):
            continue
        agent = f"{found.agent} {found.agent_version}"
        row = rows.setdefault(found.session, SessionRow(found.session, agent, found.at / 1e6, number))
        row.records += 1
        if found.event == "decision" and found.verdict in ("deny", "kill"):
            row.refused += found.count
        if found.event == "session.ended":
            row.ended = found.at / 1e6
    if as_json:
        print(json.dumps([asdict(row) for row in rows.values()]))
        return
    for row in rows.values():
        state = "ended " if row.ended is not None else "no end"
        words = f"{row.session}  {_moment(row.started)}  {state}  {row.agent}  {row.records} records"
        print(printable(f"{words}, {row.refused} refused" if row.refused else words))


def _session(reader: Reader, wanted: str | None) -> str:
    """The one session that begins so; the last one where none is named. Raises RequestError."""
    names: dict[str, None] = {}
    for _, found in _summaries(reader):
        if found.session:
            names[found.session] = None
    if wanted is None:
        if not names:
            raise RequestError("the log has no session")
        return list(names)[-1]
    matching = [name for name in names if name == wanted] or [name for name in names if name.startswith(wanted)]
    if len(matching) != 1:
        what = "several sessions begin" if matching else "no session begins"
        raise RequestError(f"{what} with {printable(wanted)}; `corral log sessions` lists them")
    return matching[0]


# ---- replay ----


def replay(
    session: str | None,
    log: str | None,
    *,
    speed: float,
    step: bool,
    place: str,
    details: bool,
    html: str | None,
    policy: str | None,
    as_json: bool,
    tree: bool = False,
    is_rerun: bool = False,
    variables: Sequence[str] = (),
) -> int:
    """Plays a session, prints its conversations, writes it as a page, says what another policy would have decided, or
    runs it again. Returns the exit code."""
    from corral.log.calls import WithCalls
    from corral.log.conversations import tree_lines, tree_of
    from corral.log.terminal import WithTerminal
    from corral.log.timeline import Timeline

    reader = Reader(directory_of(log))
    name = _session(reader, session)
    if is_rerun:
        if policy is None:
            raise RequestError("--rerun runs the agent again: name the policy that it is to run under (--policy FILE)")
        from corral.cli.rerun import rerun

        return rerun(reader, name, policy, variables, as_json=as_json)
    if policy is not None:
        return _what_if(reader, name, policy, as_json=as_json)
    said = tree_of(reader, name)
    if tree:
        _print_tree(said, tree_lines(said), as_json=as_json)
        return 0
    line, payloads = Timeline(reader, name), open_payloads(reader.directory)
    items = WithTerminal(WithCalls(line, payloads, said), payloads)
    if items.unread:
        complain(f"{items.unread} of this session's contents cannot be read here, or were erased")
    if not items.is_whole:
        complain("its commands wrote in too many pieces; not all are shown")
    if as_json:
        for item in items:
            print(json.dumps(asdict(item), default=_word))
        return 0
    if html is not None:
        from corral.log.html import write_html

        first = line.first_record().context
        about = [("session", name), ("agent", f"{first.agent} {first.agent_version}"), ("policy", first.policy_hash)]
        with _new_file(html) as file:
            count = write_html(file, items, f"Session {name}", about=about, tree=said)
        print(printable(f"{html}: {count} records"))
        return 0
    from corral.log.replay import replay as play

    return play(items, sys.stdin, sys.stdout, speed=speed, step=step, place=place, details=details)


def _print_tree(tree: Tree, lines: Iterator[str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(tree), "names": None, "steps": {str(step): at for step, at in tree.steps.items()}}))
        return
    for line in lines:
        print(printable(line))


def _word(value: object) -> object:
    return getattr(value, "value", None) if hasattr(value, "value") else str(value)


def _what_if(reader: Reader, session: str, path: str, *, as_json: bool) -> int:
    from corral.actions import Action, Opinion
    from corral.cli.policy import judge
    from corral.log.timeline import session_records
    from corral.log.whatif import Counts, compare
    from corral.policy.load import load_policy
    from corral.policy.part import PolicyPart

    def judged(part: PolicyPart, action: Action) -> Opinion:
        return judge(part, action).opinion

    counts = Counts()
    for difference in compare(session_records(reader, session), load_policy(path), counts, judge=judged):
        if as_json:
            would = difference.would_be
            row = {
                "number": difference.number,
                "action": str(difference.action),
                "was": {"verdict": difference.was.verdict.name.lower(), "rule": difference.was.rule},
                "would_be": {"verdict": would.verdict.name.lower(), "rule": would.rule} if would else None,
                "why": difference.why or None,
                "count": difference.count,
            }
            print(json.dumps(row))
        else:
            print(difference)
    if not as_json:
        print(
            f"{counts.judged} actions judged: {counts.same} the same, {counts.harder} harder, {counts.milder} milder;"
            f" {counts.cannot} cannot be judged"
        )
    return 1 if counts.harder or counts.milder or counts.cannot else 0


# ---- show ----


def show(log: str | None, *, session: str | None, start: int, follow: bool, details: bool, as_json: bool) -> None:
    """Prints records as they stand in the log; with ``follow`` goes on as they come."""
    reader = Reader(directory_of(log))
    name = None if session is None else _session(reader, session)
    at = start
    while True:
        for number, entry in reader.entries(at):
            at = number + 1
            if name is None or _is_of(entry, name):
                _print_record(number, entry, details=details, as_json=as_json)
        if not follow:
            return
        sys.stdout.flush()
        time.sleep(_POLL)


def _is_of(entry: bytes, session: str) -> bool:
    try:
        return summary(entry).session == session
    except (ValueError, RecursionError):
        return False


def _print_record(number: int, entry: bytes, *, details: bool, as_json: bool) -> None:
    from corral.log.narration import item_of

    if as_json:
        # ASCII: a record may hold characters that turn the direction of a terminal's text.
        print(json.dumps({"number": number, "record": json.loads(entry)}))
        return
    try:
        record = decode(entry)
    except (ValueError, RecursionError) as error:
        print(printable(f"#{number} is no record: {error}"))
        return
    item = item_of(number, record, 0.0)
    verdict = item.verdict.name.lower() if item.verdict is not None else ""
    head = f"{_moment(record.at / 1e6)} #{number:<7} {record.context.session:<10} {verdict:<6}"
    print(printable(f"{head} {item.line}"))
    for detail in item.details if details else ():
        for line in detail.text.split("\n"):
            print(printable(f"    {detail.name}: {line}"))


# ---- query and export ----


def query(log: str | None, words: Sequence[str], *, index: str | None, rebuild: bool, details: bool) -> None:
    """Prints the records that are looked for."""
    with _found(log, words, index=index, rebuild=rebuild) as entries:
        for number, entry in entries:
            _print_record(number, entry, details=details, as_json=False)


def export(
    log: str | None, words: Sequence[str], *, index: str | None, rebuild: bool, form: str, output: str | None
) -> None:
    """Writes the records that are looked for in another form, to stdout or a new file. Raises RequestError."""
    from corral.log.export import FORMS
    from corral.log.parquet import write_parquet

    known = (*FORMS, _PARQUET, _TRAJECTORIES, _TRAJECTORIES_PARQUET)
    if form not in known:
        raise RequestError(f"{printable(form)} is no form; known: {', '.join(known)}")
    if form in (_PARQUET, _TRAJECTORIES_PARQUET) and output is None and sys.stdout.isatty():
        raise RequestError("Parquet is not for a terminal: name a file with --output")
    with _found(log, words, index=index, rebuild=rebuild) as entries, _sink(output) as file:
        if form == _PARQUET:
            write_parquet(file, entries)
            return
        if form in (_TRAJECTORIES, _TRAJECTORIES_PARQUET):
            as_parquet = form == _TRAJECTORIES_PARQUET
            _write_trajectories(file, directory_of(log), entries, index=index, as_parquet=as_parquet)
            return
        for line in FORMS[form](entries):
            file.write(f"{line}\n".encode())


def _write_trajectories(
    file: IO[bytes], directory: Path, entries: Iterator[tuple[int, bytes]], *, index: str | None, as_parquet: bool
) -> None:
    """Those of all sessions that one of the entries is of."""
    from corral.log.index import LogIndex
    from corral.log.parquet import write_turns
    from corral.log.timeline import read_record
    from corral.log.trajectories import trajectories, turn_line

    sessions = dict.fromkeys(found.session for found in (summary(entry) for _, entry in entries) if found.session)
    reader = Reader(directory)
    with LogIndex(index or index_path(directory)) as made:

        def records_of(name: str) -> Iterator[tuple[int, Record]]:
            for number, entry in reader.some(made.find(Filter(texts=(("session", (name,)),)))):
                if (record := read_record(entry)) is not None:
                    yield number, record

        turns = trajectories(sessions, records_of, open_payloads(directory))
        if as_parquet:
            write_turns(file, turns)
            return
        for turn in turns:
            file.write(f"{turn_line(turn)}\n".encode())


@contextmanager
def _found(
    log: str | None, words: Sequence[str], *, index: str | None, rebuild: bool
) -> Iterator[Iterator[tuple[int, bytes]]]:
    from corral.log.index import LogIndex

    directory = directory_of(log)
    reader = Reader(directory)
    wanted = parse_filter(words)
    with LogIndex(index or index_path(directory)) as made:
        if rebuild:
            made.rebuild(reader)
        else:
            made.update(reader)
        yield reader.some(made.find(wanted))


@contextmanager
def _sink(path: str | None) -> Iterator[IO[bytes]]:
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with open(path, "wb", opener=_open_own) as file:
            yield file
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


# ---- review ----


def review(log: str | None, *, since: str, until: str | None, html: str | None) -> None:
    """Prints a digest of a period, or writes it as a page."""
    from corral.log.report import report_html, report_text
    from corral.log.review import review as digest_of

    now = time.time()
    begin, end = parse_time(since, now), parse_time(until, now) if until else now
    digest = digest_of(_records(Reader(directory_of(log))), begin, end)
    if html is None:
        for line in report_text(digest):
            print(line)
        return
    with _new_file(html) as file:
        for piece in report_html(digest):
            file.write(piece)
    print(printable(html))


def _records(reader: Reader) -> Iterator[tuple[int, Record]]:
    for number, entry in reader.entries():
        try:
            yield number, decode(entry)
        except (ValueError, RecursionError):
            continue


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return "at no time"


@contextmanager
def _new_file(path: str) -> Iterator[TextIO]:
    try:
        with open(path, "w", encoding="utf-8", opener=_open_own) as file:
            yield file
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


def _open_own(path: str, flags: int) -> int:
    """Only its owner can read what is made here."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
