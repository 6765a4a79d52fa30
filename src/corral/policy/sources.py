"""What a policy file says of data beside its rules: the databases, and what of them there is for the agent."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from corral.policy.document import quoted
from corral.policy.fields import MAX_ENTRIES, Duration, Filled, Label
from corral.policy.flow_rules import SecretSource
from corral.policy.model import GIB, KIB, Column, ColumnUse, DataLimits, Dialect, Source, TableScope
from corral.policy.notation import Entry, Short, choices, distinct, word_of
from corral.policy.places import DatabaseUrl
from corral.policy.units import SIZE, Size

MAX_SOURCES = 64
MAX_CONDITION = 4000
"""Characters of the condition of a table's rows."""
STATEMENTS = ("delete", "insert", "select", "update")
"""What can be done with a table."""
_DEFAULT = DataLimits()
_NO_ROLE = frozenset({"none", "default"})
_SERVERS = frozenset({Dialect.MYSQL, Dialect.POSTGRESQL})
_SPECIAL = frozenset("\"'`[].;\\/*?()")
_ROLE = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}")


def _identifier(text: str, what: str) -> str:
    if not text or len(text) > 128 or not text.isprintable() or text != text.strip() or not _SPECIAL.isdisjoint(text):
        raise ValueError(f"{quoted(text)} is not the name of a {what} (without quotes, no patterns)")
    return text


def _column(text: str) -> str:
    return _identifier(text, "column")


def _table(text: str) -> str:
    parts = text.split(".")
    if len(parts) > 3:
        raise ValueError(f"{quoted(text)} is not the name of a table (TABLE, SCHEMA.TABLE, or DATABASE.SCHEMA.TABLE)")
    for part in parts:
        _identifier(part, "table")
    return text


def _condition(text: str) -> str:
    """SQL that the data broker will read; nothing of it is echoed."""
    condition = text.strip(" \n")  # a folded text ends in a line end
    if not condition:
        raise ValueError("is empty (leave it out to mean all rows)")
    if len(condition) > MAX_CONDITION or not condition.isprintable():
        raise ValueError(f"is not one line of up to {MAX_CONDITION} printable characters (begin a long one with `>-`)")
    return condition


def _statement(text: str) -> str:
    word = text.lower()
    if word not in STATEMENTS:
        raise ValueError(f"{quoted(text)} cannot be done with a table (known: {', '.join(STATEMENTS)})")
    return word


def _role(text: str) -> str:
    if not _ROLE.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not the name of a role")
    if text.lower() in _NO_ROLE:  # SET ROLE takes these words, in quotes too, to mean the one who has logged in
        raise ValueError(f"{quoted(text)} means no role at all (leave it out, or name one)")
    return text


class ColumnFile(Short):
    """One column of a table."""

    name: Annotated[str, AfterValidator(_column)]
    """As the source has it."""
    use: Annotated[ColumnUse, choices(ColumnUse), word_of(ColumnUse, "what can be seen of a column")] = ColumnUse.SHOW
    """What is seen of it: `show`, `mask`, `hash`, or `deny`."""
    personal: bool = False
    """It is about persons; records say so."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "A column's name: it is shown.",
        "examples": ["id"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        return {"name": text}

    def value(self) -> Column:
        return Column(self.name, self.use, self.personal)


class TableFile(Entry):
    """One table or view, and what of it there is for the agent. What is not named does not exist."""

    name: Annotated[str, AfterValidator(_table)]
    """As the source has it, with its schema or without."""
    columns: Annotated[
        tuple[ColumnFile, ...],
        Field(max_length=MAX_ENTRIES, json_schema_extra={"minItems": 1}),
        distinct("columns", lambda column: column.name.casefold()),
    ]
    """Its columns, in the order in which `*` means them."""
    rows: Annotated[str, AfterValidator(_condition), WithJsonSchema({"type": "string", "minLength": 1})] | None = None
    """A condition in the source's SQL that holds of every row that is seen or changed. Left out: all rows."""
    statements: Annotated[tuple[Annotated[str, AfterValidator(_statement)], ...], Field(max_length=64), *Filled] = (
        "select",
    )
    """What may be done: `select`, `insert`, `update`, `delete`."""

    @model_validator(mode="after")
    def _has_something(self) -> TableFile:
        if all(column.use is ColumnUse.DENY for column in self.columns):
            raise ValueError("has no column that can be seen (name some, or leave the table out)")
        return self

    def value(self) -> TableScope:
        columns = tuple(column.value() for column in self.columns)
        return TableScope(self.name, columns, self.rows or "", tuple(sorted(set(self.statements))))


_SIZES = WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": SIZE}], "examples": ["1MiB"]})


class DataLimitsFile(Entry):
    """Upper bounds of the queries of one source."""

    rows: Annotated[int, Field(ge=1, le=10_000_000)] = _DEFAULT.rows
    """Of one result, and of what one statement may change."""
    bytes: Annotated[int, BeforeValidator(Size(KIB, GIB)), _SIZES] = _DEFAULT.bytes
    """Of one result."""
    time: Duration = _DEFAULT.time
    """Of one query."""
    cost: Annotated[float, Field(ge=1, le=1e18, allow_inf_nan=False)] | None = _DEFAULT.cost
    """What the source's own EXPLAIN estimates, in its units; PostgreSQL and MySQL. Left out: no bound."""
    queries_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = _DEFAULT.queries_per_minute
    """Queries within a minute."""
    concurrent: Annotated[int, Field(ge=1, le=1024)] = _DEFAULT.concurrent
    """Queries at one time."""

    def value(self) -> DataLimits:
        return DataLimits(**{name: getattr(self, name) for name in type(self).model_fields})


class SourceFile(Entry):
    """A database that may be queried."""

    name: Label
    """What rules, queries and records call it."""
    dialect: Annotated[Dialect, choices(Dialect), word_of(Dialect, "a kind of database that is known")]
    """What it is: `postgresql`, `mysql` (also MariaDB), `sqlite` or `duckdb`."""
    url: DatabaseUrl
    """`postgresql://USER@HOST:PORT/DATABASE`, the same with `mysql`, or the path of a file."""
    password: SecretSource | None = None
    """Where the password is outside: `env:NAME`, or `file:` and a path."""
    role: Annotated[str, AfterValidator(_role)] | None = None
    """PostgreSQL: the role that is taken before anything is done."""
    tables: Annotated[
        tuple[TableFile, ...],
        Field(max_length=MAX_ENTRIES),
        distinct("tables", lambda table: table.name.casefold()),
    ] = ()
    """What of it there is for the agent."""
    limits: DataLimitsFile = Field(default_factory=DataLimitsFile)
    """Upper bounds of its queries."""
    hold_writes: bool = True
    """What is changed waits in its transaction until a person has seen the rows and said yes."""

    @model_validator(mode="after")
    def _fits(self) -> SourceFile:
        if self.password is not None and self.dialect not in _SERVERS:
            raise ValueError(f"`password` is of servers, and `{self.dialect.value}` is a file")
        if self.role is not None and self.dialect is not Dialect.POSTGRESQL:
            raise ValueError(f"`role` belongs to `dialect: postgresql`, and there are none in `{self.dialect.value}`")
        if self.limits.cost is not None and self.dialect not in _SERVERS:
            raise ValueError(f"`limits.cost` cannot be held: `{self.dialect.value}` estimates no cost (leave it out)")
        return self

    def value(self) -> Source:
        return Source(
            self.name,
            self.dialect,
            self.url,
            self.password or "",
            self.role or "",
            tuple(table.value() for table in self.tables),
            self.limits.value(),
            self.hold_writes,
        )


Sources = Annotated[
    tuple[SourceFile, ...],
    Field(max_length=MAX_SOURCES),
    distinct("sources", lambda source: source.name),
]
