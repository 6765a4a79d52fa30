"""Why a query has no result, in words that say nothing about what is outside its scope."""

from __future__ import annotations

from enum import Enum

from corral.errors import CorralError, RequestError


class QueryRefused(CorralError):
    """The query is not one that may be run: it is not understood, or names what is not in the scope."""


class Fault(Enum):
    """What went wrong in a database, as far as an agent is told."""

    BUSY = "the source is busy"
    CANCELLED = "the query was cancelled"
    CONSTRAINT = "a constraint of the table is violated"
    DIVISION = "division by zero"
    FAILED = "the source could not run this query"
    GROUPING = "a column must be in GROUP BY or in an aggregate function"
    PRIVILEGE = "the source does not let the broker do this"
    RANGE = "a value is out of range"
    SUBQUERY = "a subquery that must give one row gives more"
    SYNTAX = "the source does not understand this query"
    TIME = "the query takes longer than it may"
    TYPE = "a value or operand is of the wrong type"
    UNREACHABLE = "the source cannot be reached"


class SourceFault(CorralError):
    """A database has refused or failed. Its own message stays here: it may name what the agent must not know of."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.value)
        self.fault = fault


class TooMuch(CorralError):
    """A statement would change, or cost, more than it may."""


class NotThere(RequestError):
    """A library that a source needs is not installed."""

    def __init__(self, module: str) -> None:
        super().__init__(f"data sources need {module}, which is not installed: pip install 'corral[data]'")
