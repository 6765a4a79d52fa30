"""Prints the review of a period: as text, and as one HTML file that needs nothing else and runs no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from corral.log.digest import Digest
from corral.log.html import page, text
from corral.log.items import shown_line
from corral.log.narration import money

_MARGIN = "  "


@dataclass(frozen=True, slots=True)
class _Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    empty: str
    """What to say where there are no rows."""


def report_text(digest: Digest) -> Iterator[str]:
    """Printable lines, without their ends."""
    yield _title(digest)
    yield from (shown_line(line) for line in _head(digest))
    for table in _tables(digest):
        yield ""
        yield shown_line(table.title)
        if not table.rows:
            yield f"{_MARGIN}{table.empty}"
            continue
        rows = [table.columns, *table.rows]
        widths = [min(40, max(len(row[index]) for row in rows)) for index in range(len(table.columns))]
        for row in rows:
            cells = (shown_line(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
            yield f"{_MARGIN}{'  '.join(cells)}".rstrip()


def report_html(digest: Digest) -> Iterator[str]:
    """The pieces of the page."""
    return page(_title(digest), _body(digest))


def _body(digest: Digest) -> Iterator[str]:
    yield "<main>\n"
    for line in _head(digest):
        yield f"<p>{text(line)}</p>\n"
    for table in _tables(digest):
        yield f"<section>\n<h2>{text(table.title)}</h2>\n"
        yield _html_table(table.columns, table.rows) if table.rows else f'<p class="note">{text(table.empty)}</p>\n'
        yield "</section>\n"
    yield "</main>\n"


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


# ---- what it says, for both ----


def _title(digest: Digest) -> str:
    return f"Review of {_time(digest.since)} to {_time(digest.until)}"


def _head(digest: Digest) -> Iterator[str]:
    yield f"{digest.records} records in this period, compared with {digest.before} before it. Times are UTC."
    yield from digest.notes


def _tables(digest: Digest) -> Iterator[_Table]:
    yield _Table(
        "Agents",
        ("agent", "sessions", "actions", "allowed", "denied", "killed", "new ones not listed below"),
        tuple(
            (a.agent, str(a.sessions), str(a.actions), str(a.allowed), str(a.denied), str(a.killed), str(a.more))
            for a in digest.agents
        ),
        "nothing was recorded",
    )
    yield _Table(
        "New destinations",
        ("agent", "destination", "times", "first", "record"),
        tuple(
            (each.agent, each.what, str(each.count), _time(each.at), f"#{each.number}")
            for agent in digest.agents
            for each in agent.new_destinations
        ),
        "none",
    )
    yield _Table(
        "New models, sources and services",
        ("agent", "what", "times", "first", "record"),
        tuple(
            (each.agent, each.what, str(each.count), _time(each.at), f"#{each.number}")
            for agent in digest.agents
            for each in agent.new_sources
        ),
        "none",
    )
    yield _Table(
        "Calls of models, data and services",
        ("agent", "calls", "tokens in", "tokens out", "cost", "unexplained actions"),
        tuple(
            (
                *(each.agent, str(each.spend.calls), str(each.spend.input_tokens), str(each.spend.output_tokens)),
                ", ".join(money(amount, currency) for currency, amount in each.spend.costs) or "-",
                str(each.unexplained),
            )
            for each in digest.agents
            if each.spend.calls or each.unexplained
        ),
        "none",
    )
    yield _Table(
        "New binaries",
        ("agent", "binary", "times", "first", "record"),
        tuple(
            (each.agent, each.what, str(each.count), _time(each.at), f"#{each.number}")
            for agent in digest.agents
            for each in agent.new_binaries
        ),
        "none",
    )
    yield _Table(
        "Most frequent denials",
        ("times", "agent", "rule", "action"),
        tuple((str(each.count), each.agent, each.rule, each.what) for each in digest.denials),
        "nothing was denied",
    )
    counts = ", ".join(f"{miss.value}: {count}" for miss, count in digest.misses if count)
    yield _Table(
        f"Near misses{f' ({counts})' if counts else ''}",
        ("why", "agent", "action", "rule", "by", "session", "time", "record"),
        tuple(
            (m.why.value, m.agent, m.what, m.rule, m.by, m.session, _time(m.at), f"#{m.number}")
            for m in digest.near_misses
        ),
        "none",
    )
    yield _Table(
        f"Questions to persons{f' ({digest.answer_count})' if digest.answer_count else ''}",
        ("how it ended", "by", "agent", "action", "waited", "session", "time", "record"),
        tuple(
            (a.outcome, a.by, a.agent, a.what, f"{a.waited:.1f} s", a.session, _time(a.at), f"#{a.number}")
            for a in digest.answers
        ),
        "nobody was asked",
    )
    yield _Table(
        f"Changes of policy{f' ({digest.policy_change_count})' if digest.policy_change_count else ''}",
        ("agent", "by", "what", "before", "since", "session", "time", "record"),
        tuple(
            (c.agent, c.by, "; ".join(c.changes), _hash(c.old), _hash(c.new), c.session, _time(c.at), f"#{c.number}")
            for c in digest.policy_changes
        ),
        "none",
    )
    yield _Table(
        "Sessions unlike the rest",
        ("agent", "session", "what", "here", "usual", "score"),
        tuple(
            (each.agent, each.session, each.measure, f"{each.value:g}", f"{each.usual:g}", f"{each.score:+.1f}")
            for each in digest.outliers
        ),
        "none; this compares counts, one at a time, and proves nothing",
    )
    count = f" ({digest.trouble_count})" if digest.trouble_count else ""
    yield _Table(
        f"The log's own health{count}",
        ("time", "record", "what"),
        tuple((_time(each.at), f"#{each.number}", each.what) for each in digest.troubles),
        "no recovery, no gap; `corral log verify` says whether it is whole",
    )


def _hash(policy: str) -> str:
    """What tells policies apart for a reader; the record has all of it."""
    return policy.removeprefix("sha256:")[:16] or "-"


def _time(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{at:.0f} s"
