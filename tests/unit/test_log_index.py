"""An index says what the log says, can be made again from it alone, and finds what a reader of everything would."""

from __future__ import annotations

import io
import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import (
    Access,
    Action,
    Decision,
    Ending,
    Endpoint,
    File,
    Kind,
    Origin,
    Process,
    Program,
    Transport,
    Used,
    Verdict,
)
from corral.errors import RequestError
from corral.log import index as index_module
from corral.log import parquet
from corral.log.events import PayloadErased, SessionEnded
from corral.log.export import FORMS
from corral.log.index import IndexFault, LogIndex
from corral.log.note import KeyFile, KeyType
from corral.log.ocsf import Context
from corral.log.parquet import SCHEMA_VERSION, ExportFault, schema, write_parquet
from corral.log.query import Filter, parse_filter
from corral.log.reader import Reader
from corral.log.records import Summary, encode, summary
from corral.log.writer import Log

KEY = KeyFile("log.example/one", KeyType.ED25519, b"k" * 32)
OTHER = KeyFile("log.example/other", KeyType.ED25519, b"o" * 32)
CONTEXT = Context("coder", "1", "policy", "sha256:00", "session-1", "box-1", "0.1.0")
HOSTILE = ("\x1b[2J", "a\nb", "\u202egpj", "\u2028", "|=\\", '"]', "x' OR '1'='1", "%_[*]?", "\0", "\x9b31m", "é" * 3)


def decision(number: int, text: str = "") -> Decision:
    process = Process(100 + number % 3, 1, 1, f"/usr/bin/prog{number % 4}{text}")
    origin = Origin("box-1", f"session-{number % 5}", number % 7, number % 2, process)
    kind, subject = (
        (Kind.PROCESS_EXEC, Program(f"/bin/p{number % 3}{text}", ("p", text))),
        (Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", 443, f"h{number % 2}.test")),
        (Kind.FILE_OPEN, File(f"/work/f{number % 6}{text}", Access.READ)),
    )[number % 3]
    verdict = (Verdict.ALLOW, Verdict.DENY, Verdict.ALLOW, Verdict.KILL)[number % 4]
    rule = f"{kind.value}.rule{text}"
    return Decision(Action(kind, subject, origin), verdict, rule, text, "", "policy", number, 1000.0 + number)


def entry(number: int, text: str = "") -> bytes:
    event = decision(number, text)
    context = replace(CONTEXT, session=event.action.origin.session)
    return encode(event, context, sequence=number + 1, at=event.at, monotonic_ns=number)


def call(number: int, text: str = "", kind: Kind = Kind.MODEL_CALL) -> bytes:
    origin = Origin("box-1", "session-1", 5, 1, None, f"call_1{text}", number % 2 == 0)
    used = Used(
        origin, kind, f"up{text}", f"model-1{text}", "model.allow[0]", 1000.0 + number, 0.5, Ending.ANSWERED, 0.1, 200,
        text, 100, 20, 7, 3, 1_500_000, f"EUR{text}", 0, 10, 20, (), 6, f"c0ffee{text}", text, (), f"tool_use{text}",
    )  # fmt: skip
    return encode(used, CONTEXT, sequence=number + 1, at=1000.0 + number, monotonic_ns=number)


ENTRIES = [
    *(entry(number) for number in range(60)),
    *(entry(60 + at, text) for at, text in enumerate(HOSTILE)),
    *(call(80 + at, text) for at, text in enumerate(("", *HOSTILE))),
    encode(PayloadErased("ab", "anna (uid 7)", "x"), CONTEXT, sequence=98, at=1999.0, monotonic_ns=1),
    encode(SessionEnded("closed"), CONTEXT, sequence=99, at=2000.0, monotonic_ns=1),
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    place = tmp_path_factory.mktemp("log") / "log"
    with Log(place, KEY) as log:
        for each in ENTRIES:
            log.submit(each)
    return Reader(place)


@pytest.fixture(scope="module")
def made(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LogIndex]:
    with LogIndex(tmp_path_factory.mktemp("index") / "index") as index:
        assert index.update(reader) == len(ENTRIES)
        yield index


def test_it_says_what_the_log_says(made: LogIndex) -> None:
    expected = [summary(each) for each in ENTRIES]
    found = list(made.rows())
    assert [number for number, _ in found] == list(range(len(ENTRIES)))
    for (_, own), whole in zip(found, expected, strict=True):
        texts: dict[str, Any] = {name: value for name, value in asdict(whole).items() if isinstance(value, str)}
        assert own == replace(whole, **{name: text.replace("\0", "\ufffd") for name, text in texts.items()})


def test_thrown_away_and_made_again_it_is_the_same(made: LogIndex, reader: Reader, tmp_path: Path) -> None:
    before = list(made.rows())
    with LogIndex(tmp_path / "another") as another:
        another.update(reader)
        assert list(another.rows()) == before
    assert made.rebuild(reader) == len(ENTRIES)
    assert list(made.rows()) == before
    assert made.update(reader) == 0


def test_it_takes_up_what_came_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_BATCH", 7)
    with LogIndex(tmp_path / "index") as index:
        for size in (3, 20, 20, 60):
            with Log(tmp_path / "log", KEY) as log:
                at = log.seal().size
                for each in ENTRIES[at:size]:
                    log.submit(each)
            index.update(Reader(tmp_path / "log"))
            assert [number for number, _ in index.rows()] == list(range(size))


def test_interrupted_it_goes_on_after_the_last_batch(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_BATCH", 7)
    with LogIndex(tmp_path / "index") as index:
        real = summary
        count = 0

        def failing(each: bytes) -> object:
            nonlocal count
            count += 1
            if count == 17:
                raise KeyboardInterrupt
            return real(each)

        monkeypatch.setattr("corral.log.index.summary", failing)
        with pytest.raises(KeyboardInterrupt):
            index.update(reader)
        assert len(list(index.rows())) == 14
        monkeypatch.setattr("corral.log.index.summary", real)
        assert index.update(reader) == len(ENTRIES) - 14


def test_the_index_of_another_log_or_of_a_longer_one_is_refused(reader: Reader, tmp_path: Path) -> None:
    with LogIndex(tmp_path / "index") as index:
        index.update(reader)
        with Log(tmp_path / "other", OTHER) as log:
            log.append(ENTRIES[0])
        with pytest.raises(IndexFault, match="another log"):
            index.update(Reader(tmp_path / "other"))
        with Log(tmp_path / "same", KEY) as log:
            log.append(ENTRIES[0])
        with pytest.raises(IndexFault, match="cut off, or replaced"):
            index.update(Reader(tmp_path / "same"))
        assert index.rebuild(Reader(tmp_path / "same")) == 1


def test_an_index_of_another_version_is_refused_and_made_again(reader: Reader, tmp_path: Path) -> None:
    """Its tables may be others, too."""
    with closing(sqlite3.connect(tmp_path / "index")) as old, old:
        old.execute("CREATE TABLE records (number INTEGER PRIMARY KEY, event TEXT)")
        old.execute("CREATE TABLE state (version INTEGER, log TEXT, next INTEGER)")
        old.execute("INSERT INTO state VALUES (1, 'x', 1)")
    with LogIndex(tmp_path / "index") as index:
        with pytest.raises(IndexFault, match="another version"):
            index.update(reader)
        assert index.rebuild(reader) == len(ENTRIES)
        assert list(index.find(parse_filter(["by=anna*"]))) == [len(ENTRIES) - 2]


def test_what_is_no_database_is_an_error_without_passwords(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database" * 100)
    for where in (
        tmp_path / "file",
        tmp_path / "no" / "directory",
        "nothing://me:secret@host/x",
        "postgresql://me:secret@h/x",
    ):
        with pytest.raises(IndexFault) as error:
            LogIndex(where)
        assert "secret" not in str(error.value)


def test_an_entry_that_is_no_record_is_named(tmp_path: Path) -> None:
    with Log(tmp_path / "log", KEY) as log:
        log.append(b"hello")
    with LogIndex(tmp_path / "index") as index, pytest.raises(IndexFault, match="entry 0"):
        index.update(Reader(tmp_path / "log"))


# ---- looking for something ----

KNOWN = (
    "deny",
    "allow",
    "session-1",
    "coder",
    "net.*",
    "*",
    "?*",
    "/usr/bin/prog1",
    "/work/f?",
    "h1.test:443",
    "*rule",
    "call_1",
    "c0ffee",
    "model-?",
    "up",
)
VALUES = st.sampled_from(["", *KNOWN, *HOSTILE, *(f"*{text}*" for text in HOSTILE)]).filter(
    lambda text: "\0" not in text
)
MOMENTS = st.builds("1970-01-01T00:{:02d}:{:02d}+00:00".format, st.integers(15, 20), st.integers(0, 59))
WORDS = st.lists(
    st.builds("{}={}".format, st.sampled_from(sorted(Filter.TEXTS)), VALUES)
    | st.builds("{}={}".format, st.sampled_from(sorted(Filter.NUMBERS)), st.integers(0, 120))
    | st.builds("{}={}".format, st.sampled_from(["first", "last", "limit"]), st.integers(0, 80))
    | st.builds("{}={}".format, st.sampled_from(["since", "until"]), MOMENTS),
    max_size=4,
)


@settings(max_examples=300)
@given(WORDS)
def test_it_finds_what_a_reader_of_everything_would(made: LogIndex, words: list[str]) -> None:
    wanted = parse_filter(words)
    expected = [number for number, found in made.rows() if wanted.matches(number, found)]
    assert list(made.find(wanted)) == expected[: wanted.limit]


@pytest.mark.parametrize(
    "word",
    ["", "verdict", "nothing=x", "step=x", "step=-1", "limit=", "since=yesterday", "x" * 5000, "pid=" + "9" * 40],
)
def test_words_that_say_nothing_known_are_refused(word: str) -> None:
    with pytest.raises(RequestError):
        parse_filter([word])


def test_too_many_words_are_refused() -> None:
    with pytest.raises(RequestError, match="more than"):
        parse_filter(["step=1"] * 1000)


def test_times_before_now() -> None:
    wanted = parse_filter(["since=2h", "until=30m"], now=10_000.0)
    assert (wanted.since, wanted.until) == (2_800_000_000, 8_200_000_000)


def test_some_entries_are_read_by_their_numbers_while_the_log_grows(tmp_path: Path) -> None:
    """In order, again, backwards; those in tiles that are full by now, and those that are not there."""
    with Log(tmp_path / "log", KEY) as log:
        log.append(ENTRIES[0])
        reader = Reader(tmp_path / "log")
        for size in (200, 300, 1000):
            log.seal()
            for number in range(len(list(reader.entries())), size):
                log.append(b"%d" % number) if number == size - 1 else log.submit(b"%d" % number)
            for numbers in ([1, 150, 199], [299, 5, 5, 256, 999, 10**9], [*range(size)]):
                expected = [(each, b"%d" % each) for each in numbers if 0 < each < size]
                assert [each for each in reader.some(numbers) if each[0]] == expected


# ---- other forms ----


@pytest.mark.parametrize("form", FORMS)
def test_each_record_is_one_line_that_draws_nothing(reader: Reader, form: str) -> None:
    lines = list(FORMS[form](reader.entries()))
    assert len(lines) == len(ENTRIES)
    for line in lines:
        assert line.isprintable()


@settings(max_examples=100)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=50))
def test_hostile_texts_draw_nothing_in_any_form(text: str) -> None:
    for form in FORMS.values():
        (line,) = form([(1, entry(1, text))])
        assert line.isprintable()


def test_json_forms_are_the_records(reader: Reader) -> None:
    records = [json.loads(each) for each in ENTRIES]
    assert [json.loads(line) for line in FORMS["ocsf"](reader.entries())] == records
    numbered = [json.loads(line) for line in FORMS["jsonl"](reader.entries())]
    assert [row["record"] for row in numbered] == records
    assert [row["number"] for row in numbered] == list(range(len(records)))
    for line, record in zip(FORMS["otlp"](reader.entries()), records, strict=True):
        (resource,) = json.loads(line)["resourceLogs"]
        (log_record,) = resource["scopeLogs"][0]["logRecords"]
        assert json.loads(log_record["body"]["stringValue"]) == record


def test_common_event_format() -> None:
    (line,) = FORMS["cef"]([(7, entry(61, "a|b=c\\d\ne"))])
    head = line.split("|")
    assert head[:4] == ["CEF:0", "Corral", "Corral", "0.1.0"]
    assert (head[4], head[5], head[6]) == ("net.connect", "net.connect deny", "6")
    assert " externalId=7 " in line
    assert r"reason=net.connect.rulea|b\=c\\d\\ne " in line


def test_syslog() -> None:
    (line,) = FORMS["syslog"]([(7, entry(61, 'a"b]c\\'))])
    assert line.startswith('<108>1 1970-01-01T00:17:41.000000Z - corral 101 net.connect [corral@32473 number="7" ')
    assert r'rule="net.connect.rulea\"b\]c\\"' in line


def attributes(line: str) -> dict[str, object]:
    (resource,) = json.loads(line)["resourceLogs"]
    found = resource["scopeLogs"][0]["logRecords"][0]["attributes"]
    assert len(found) == len({each["key"] for each in found})
    return {each["key"]: next(iter(each["value"].values())) for each in found}


def test_calls_of_models_have_the_names_of_opentelemetry() -> None:
    found = attributes(next(FORMS["otlp"]([(7, call(81))])))
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "up",
        "gen_ai.request.model": "model-1",
        "gen_ai.response.finish_reasons": {"values": [{"stringValue": "tool_use"}]},
        "gen_ai.usage.input_tokens": "100",
        "gen_ai.usage.output_tokens": "20",
        "gen_ai.usage.cache_read.input_tokens": "7",
        "gen_ai.usage.cache_creation.input_tokens": "3",
        "gen_ai.conversation.id": "c0ffee",
        "gen_ai.tool.call.id": "call_1",
        "corral.cost": "1500000",
        "corral.opened": "6",
    }
    assert expected.items() <= found.items()
    assert "corral.unexplained" not in found
    assert attributes(next(FORMS["otlp"]([(8, call(82))])))["corral.unexplained"] == "1"
    other = attributes(next(FORMS["otlp"]([(7, call(81, kind=Kind.DATA_QUERY))])))
    assert (other["gen_ai.data_source.id"], other["corral.operation"]) == ("up", "model-1")
    assert "gen_ai.request.model" not in other


def test_calls_of_models_in_the_forms_of_security_tools() -> None:
    (line,) = FORMS["cef"]([(7, call(82))])
    assert "cs5Label=tool cs5=call_1 cs6Label=conversation cs6=c0ffee request=up model-1" in line
    assert "cn1Label=inputTokens cn1=100 cn2Label=outputTokens cn2=20 cn3Label=unexplained cn3=1" in line
    (line,) = FORMS["syslog"]([(7, call(82))])
    assert 'tool="call_1" unexplained="yes" source="up" model="model-1" conversation="c0ffee" opened="6"' in line
    assert 'inputTokens="100" outputTokens="20" cost="1500000e-9 EUR"' in line


# ---- Parquet ----


def exported(entries: Iterable[tuple[int, bytes]]) -> pyarrow.parquet.ParquetFile:
    """What a reader makes of it, written through something that is no file on a disk."""
    written = io.BytesIO()
    written.seek = written.tell = None  # type: ignore[assignment]
    count = write_parquet(written, entries)
    found = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(written.getvalue()))
    assert found.metadata.num_rows == count
    return found


def test_parquet_says_what_the_log_says(reader: Reader) -> None:
    found = exported(reader.entries())
    assert found.schema_arrow.metadata[b"corral.schema"] == b"2"
    rows = found.read().to_pylist()
    assert [row.pop("record").encode() for row in rows] == ENTRIES
    for number, (row, entry) in enumerate(zip(rows, ENTRIES, strict=True)):
        expected = asdict(summary(entry))
        expected["time"] = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=expected.pop("at"))
        assert row == {"number": number, **expected}


def test_the_columns_of_parquet_are_stable() -> None:
    """Others read them by name and type: whoever changes one raises SCHEMA_VERSION."""
    assert SCHEMA_VERSION == 2
    texts = "event session sandbox agent agent_version policy_hash action verdict rule decider exe destination path by"
    texts += " tool source model conversation currency"
    numbers = "sequence class_uid step exec count pid unexplained opened input_tokens output_tokens cost"
    assert [(each.name, str(each.type), each.nullable) for each in schema()] == [
        ("number", "int64", False),
        ("time", "timestamp[us, tz=UTC]", False),
        *((name, "string", False) for name in texts.split()),
        *((name, "int64", False) for name in numbers.split()),
        ("record", "string", False),
    ]
    assert {each.name for each in schema()} == {each.name for each in fields(Summary)} - {"at"} | {
        "number",
        "time",
        "record",
    }
    assert exported([]).schema_arrow.equals(schema(), check_metadata=False)


def test_parquet_is_written_in_groups_as_entries_come(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory does not grow with the log: of entries that are few, and of those that are long."""
    monkeypatch.setattr(parquet, "ROWS", 20)
    assert exported(reader.entries()).num_row_groups == -(-len(ENTRIES) // 20)
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    taken = 0
    written = io.BytesIO()

    def given() -> Iterator[tuple[int, bytes]]:
        nonlocal taken
        last = 0
        for number, entry in reader.entries():
            assert number < 2 or len(written.getvalue()) > last, "what was taken is not written before the next"
            last = len(written.getvalue())
            taken += 1
            yield number, entry

    assert write_parquet(written, given()) == taken == len(ENTRIES)


def test_without_pyarrow_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"pip install 'corral\[parquet\]'"):
        write_parquet(io.BytesIO(), [])


def test_what_does_not_fit_the_columns_is_named() -> None:
    values = json.loads(ENTRIES[0])
    values["unmapped"]["corral"]["fields"]["count"] = 2**70
    with pytest.raises(ExportFault, match="records 7 to 7"):
        write_parquet(io.BytesIO(), [(7, json.dumps(values).encode())])
