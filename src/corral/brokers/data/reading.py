"""A query's text as a tree: one statement, bounded, parsed in the dialect of its source."""

from __future__ import annotations

import logging

from sqlglot import Token, TokenType, exp
from sqlglot.errors import SqlglotError

from corral.brokers.data.faults import QueryRefused
from corral.brokers.data.grammar import MAX_NESTING, MAX_TEXT, MAX_TOKENS
from corral.brokers.data.parsing import Endless, parse, tokenize
from corral.policy.model import Dialect

logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it quotes queries in its warnings
_FIRST = frozenset(
    (TokenType.SELECT, TokenType.WITH, TokenType.INSERT, TokenType.UPDATE, TokenType.DELETE, TokenType.L_PAREN)
)
"""With what a statement may begin. The parser makes one opaque command of most others."""
_PREFIXES = frozenset((TokenType.NOT, TokenType.DASH, TokenType.PLUS, TokenType.CASE, TokenType.TILDE))
_MAX_PREFIXES = 64
"""NOT, -, CASE, ...: each nests without a parenthesis."""
_MEANING = ("!", "+", "M!", "m!")
"""With what a comment begins that some server takes for code, or for a hint."""


def read(text: str, dialect: Dialect) -> exp.Expr:
    """The statement. Raises QueryRefused."""
    if len(text) > MAX_TEXT:
        raise QueryRefused(f"the query is longer than {MAX_TEXT} characters")
    if any(ord(character) < 32 and character not in "\t\n\r" for character in text) or "\x7f" in text:
        raise QueryRefused("the query holds a control character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise QueryRefused("the query is no Unicode text")
    try:
        tokens = tokenize(text, dialect)
        _check(tokens)
        found = parse(text, tokens, dialect)
    except Endless:
        raise QueryRefused("the query takes too long to be understood") from None
    except SqlglotError:  # its message quotes the query: nothing secret, but not bounded either
        raise QueryRefused("the query cannot be parsed") from None
    except (RecursionError, ValueError, TypeError, AttributeError, KeyError, IndexError):  # faults of the parser
        raise QueryRefused("the query is not understood") from None
    if len(found) != 1:
        raise QueryRefused("a query is exactly one statement")
    return found[0]


def _check(tokens: list[Token]) -> None:
    if len(tokens) > MAX_TOKENS:
        raise QueryRefused(f"the query has more than {MAX_TOKENS} words")
    if not tokens or tokens[0].token_type not in _FIRST:
        raise QueryRefused("a query begins with select, with, insert, update or delete")
    depth = prefixes = 0
    for position, token in enumerate(tokens):
        if any(comment.startswith(_MEANING) for comment in token.comments):
            raise QueryRefused("a comment of the query is one that a server may execute")
        depth += (token.token_type is TokenType.L_PAREN) - (token.token_type is TokenType.R_PAREN)
        prefixes += token.token_type in _PREFIXES
        if depth > MAX_NESTING or prefixes > _MAX_PREFIXES * (1 + position // 200):
            raise QueryRefused("the query is nested too deeply")
        if token.token_type is TokenType.SEMICOLON and position < len(tokens) - 1:
            raise QueryRefused("a query is exactly one statement")
