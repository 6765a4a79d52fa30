"""Records as Apache Parquet, for those who look at many of them: DuckDB, Spark, pandas.

Needs pyarrow, which is large, and so an extra of the package (``pip install 'corral[parquet]'``).

The columns are what an index has of a record (:class:`corral.log.records.Summary`), and ``record``: the entry as it
stands in the log, from whose bytes its hash can be computed. Names and types are stable within one version of the
schema, which stands in the file's metadata as ``corral.schema``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from corral.errors import CorralError, RequestError
from corral.log.ocsf import VERSION as OCSF_VERSION
from corral.log.records import summary

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
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise RequestError(
            "writing Parquet needs pyarrow, which is not installed here: pip install 'corral[parquet]'"
        ) from None
    made, count = schema(), 0
    with ParquetWriter(_Counted(file), made, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        size = 0

        def write_group() -> None:
            nonlocal size
            try:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, made))
            except (pyarrow.ArrowException, OverflowError) as error:
                raise ExportFault(
                    f"the records {rows[0]['number']} to {rows[-1]['number']} do not fit the schema ({error})"
                ) from None
            rows.clear()
            size = 0

        for number, entry in entries:
            rows.append(_row(number, entry))
            size += len(entry)
            count += 1
            if len(rows) >= ROWS or size >= GROUP_BYTES:
                write_group()
        if rows:
            write_group()
    return count


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
