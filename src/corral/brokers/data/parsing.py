"""sqlglot's parser, with an end.

Where a text can be read in two ways the parser tries one after the other, and each level of nesting doubles that: less
than 200 characters (``DECIMAL(DECIMAL(...``) would take years. So its steps are counted, and are in proportion to the
words of a text, or it is refused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlglot import Token, TokenType, exp
from sqlglot.dialects.dialect import Dialect as Sqlglot

from corral.brokers.data.grammar import SQLGLOT
from corral.policy.model import Dialect

STEPS = 500
"""Of any text: from a word to the next, or back to one before."""
STEPS_PER_TOKEN = 16
"""Queries take up to 3."""


class Endless(Exception):
    """It takes too many steps. No error of sqlglot's, which it would take for one way that leads nowhere."""


def tokenize(text: str, dialect: Dialect) -> list[Token]:
    """Raises SqlglotError. A parameter is ``:name`` in all dialects."""
    tokens = _sqlglot(dialect).tokenize(text)
    if dialect is Dialect.DUCKDB:  # whose own are $name; what else has a colon there is not for queries here
        tokens = [_dollar(token) if token.token_type is TokenType.COLON else token for token in tokens]
    return tokens


def _dollar(colon: Token) -> Token:
    return Token(TokenType.PARAMETER, "$", colon.line, colon.col, colon.start, colon.end, colon.comments)


def parse(text: str, tokens: list[Token], dialect: Dialect) -> list[exp.Expr]:
    """All statements. Raises SqlglotError, Endless."""
    parser = _parser(dialect)(dialect=_sqlglot(dialect))
    parser.left = STEPS + STEPS_PER_TOKEN * len(tokens)
    return [statement for statement in parser.parse(tokens, text) if statement is not None]


@cache
def _sqlglot(dialect: Dialect) -> Sqlglot:
    return Sqlglot.get_or_raise(SQLGLOT[dialect])


@cache
def _parser(dialect: Dialect) -> Any:
    base: Any = _sqlglot(dialect).parser_class

    class Counting(base):  # type: ignore[misc]
        left = 0

        def _advance(self, times: int = 1) -> None:
            self.left -= 1
            if self.left < 0:
                raise Endless
            super()._advance(times)

    return Counting
