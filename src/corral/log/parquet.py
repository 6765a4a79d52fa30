"""Records as Apache Parquet, for those who look at many of them: DuckDB, Spark, pandas.

Needs pyarrow, which is large, and so an extra of the package (``pip install 'corral[parquet]'``).

The columns are what an index has of a record (:class:`corral.log.records.Summary`), and ``record``: the entry as it
stands in the log, from whose bytes its hash can be computed. Names and types are stable within one version of the
schema, which stands in the file's metadata as ``corral.schema``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

from corral.errors import CorralError, RequestError
from corral.log.ocsf import VERSION as OCSF_VERSION
from corral.log.records import summary
from corral.log.trajectories import VERSION as TURN_VERSION
from corral.log.trajectories import Turn, turn_row

if TYPE_CHECKING:
    import pyarrow

SCHEMA_VERSION = 2
ROWS = 10_000
"""Rows of one group, at most."""
GROUP_BYTES = 16 << 20
"""Bytes of the entries of one group, after which it is written: that much, and what it becomes, is in memory."""
_TEXTS = (
    *("event", "session", "sandbox", "agent", "agent_version", "policy_hash", "action", "verdict", "rule", "decider"),
    *("exe", "destination", "path", "by", "tool", "source", "model", "conversation", "currency"),
)
_NUMBERS = (
    *("sequence", "class_uid", "step", "exec", "count", "pid"),
    *("unexplained", "opened", "input_tokens", "output_tokens", "cost"),
)

_TURN = (
    *((name, "text") for name in ("session", "sandbox", "agent", "agent_version", "policy", "conversation", "parent")),
    *(("version", "number"), ("turn", "number"), ("record", "number"), ("at", "time"), ("seconds", "real")),
    *((name, "text") for name in ("source", "model", "api", "ending", "finish")),
    *(("status", "number"), ("messages_from", "number")),
    *((name, "text") for name in ("messages", "offered", "request", "text", "thinking", "tools")),
    *(("complete", "truth"), ("prompt_ids", "numbers"), ("ids", "numbers"), ("tokens", "texts"), ("logprobs", "reals")),
    *((name, "number") for name in ("input_tokens", "output_tokens", "cached_tokens", "written_tokens")),
    *(("estimated", "truth"), ("cost", "number"), ("currency", "text"), ("step", "number")),
    *(("actions", "text"), ("actions_left_out", "number"), ("missing", "text")),
)
"""Columns of trajectories."""


class ExportFault(CorralError):
    """Records cannot be written in this form."""


class _Counted:
    """A file that is only written to. A pipe does not know its position, and Parquet's offsets are from its start."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._position = file, 0

    def write(self, data: Any) -> int:
        """All of ``data``, a buffer."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._position += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Whoever opened the file closes it."""


def write_parquet(file: IO[bytes], entries: Iterable[tuple[int, bytes]]) -> int:
    """Writes entries, taken one by one with their numbers, and returns how many they were. ``file`` need not be
    seekable.

    Raises RequestError where pyarrow is missing, ExportFault for an entry that does not fit the schema, ValueError
    for one that is no record, OSError, and what taking an entry raises.
    """
    rows = ((_row(number, entry), len(entry), str(number)) for number, entry in entries)
    return _write(file, schema, rows)


def write_turns(file: IO[bytes], turns: Iterable[Turn]) -> int:
    """Writes the turns of trajectories, as :func:`write_parquet` does entries."""
    rows = ((row := turn_row(turn), sum(map(len, map(str, row.values()))), str(turn.record)) for turn in turns)
    return _write(file, turn_schema, rows)


def _write(
    file: IO[bytes], schema_of: Callable[[], pyarrow.Schema], given: Iterable[tuple[dict[str, Any], int, str]]
) -> int:
    """Writes rows, each with about its size and the name of its record."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise RequestError(
            "writing Parquet needs pyarrow, which is not installed here: pip install 'corral[parquet]'"
        ) from None
    made, count = schema_of(), 0
    with ParquetWriter(_Counted(file), made, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        names: list[str] = []
        size = 0

        def write_group() -> None:
            nonlocal size
            try:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, made))
            except (pyarrow.ArrowException, OverflowError) as error:
                raise ExportFault(f"the records {names[0]} to {names[-1]} do not fit the schema ({error})") from None
            rows.clear()
            names.clear()
            size = 0

        for row, weight, name in given:
            rows.append(row)
            names.append(name)
            size += weight
            count += 1
            if len(rows) >= ROWS or size >= GROUP_BYTES:
                write_group()
        if rows:
            write_group()
    return count


def turn_schema() -> pyarrow.Schema:
    """Of the rows of trajectories. Raises ImportError without pyarrow."""
    import pyarrow

    kinds = {
        "text": pyarrow.string(),
        "number": pyarrow.int64(),
        "time": pyarrow.timestamp("us", tz="UTC"),
        "real": pyarrow.float64(),
        "truth": pyarrow.bool_(),
        "numbers": pyarrow.list_(pyarrow.int64()),
        "texts": pyarrow.list_(pyarrow.string()),
        "reals": pyarrow.list_(pyarrow.float64()),
    }
    fields = [pyarrow.field(name, kinds[kind], nullable=False) for name, kind in _TURN]
    return pyarrow.schema(fields, {"corral.schema": f"trajectory {TURN_VERSION}"})


def schema() -> pyarrow.Schema:
    """Of the rows. Raises ImportError without pyarrow."""
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    fields = [
        ("number", number),
        ("time", pyarrow.timestamp("us", tz="UTC")),
        *((name, text) for name in _TEXTS),
        *((name, number) for name in _NUMBERS),
        ("record", text),
    ]
    metadata = {"corral.schema": str(SCHEMA_VERSION), "corral.ocsf": OCSF_VERSION}
    return pyarrow.schema([pyarrow.field(*each, nullable=False) for each in fields], metadata)


def _row(number: int, entry: bytes) -> dict[str, Any]:
    found = summary(entry)
    return {
        "number": number,
        "time": found.at,
        "record": entry.decode(),
        **{name: getattr(found, name) for name in (*_TEXTS, *_NUMBERS)},
    }
