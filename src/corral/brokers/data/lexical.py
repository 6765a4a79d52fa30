"""A second reading of the text that is made of a query, by other means than the first.

It knows nothing of trees. Names are quoted, texts are markers, and every word that is left is a keyword or a function
of these lists. The fences are not in the text yet: what they are made of is not for an agent to say.
"""

from __future__ import annotations

import re

from corral.brokers.data.faults import QueryRefused

MARKER = re.compile("'\ue000([0-9]{1,4})\ue000'")
"""Stands for a text or a parameter."""

_TOKENS = re.compile(
    r"""
    (?P<blank>\s+)
  | (?P<marker>'\ue000[0-9]{1,4}\ue000')
  | (?P<name>"(?:[^"\ue000]|"")+" | `(?:[^`\ue000]|``)+`)
  | (?P<text>'[ -!#-&(-\[\]-~]{0,24}')
  | (?P<number>[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?(?![A-Za-z_0-9]) | \.[0-9]+(?![A-Za-z_0-9]))
  | (?P<word>[A-Za-z_][A-Za-z_0-9]*)
  | (?P<sign><=>|<>|<=|>=|\|\||//|[-+*/%=<>(),.])
    """,
    re.VERBOSE,
)
_COMMENT = re.compile(r"--|/\*|\*/|#|;|\\")

_KEYWORDS = frozenset(
    """
    ALL AND AS ASC BETWEEN BOTH BY CASE CAST CROSS CURRENT CURRENT_DATE CURRENT_TIMESTAMP DEFAULT DESC DISTINCT DIV ELSE
    END ESCAPE EXCEPT EXISTS FALSE FILTER FIRST FOLLOWING FOR FROM FULL GROUP HAVING ILIKE IN INNER INTERSECT INTERVAL
    IS JOIN LAST LEADING LEFT LIKE LIMIT NOT NULL NULLS OFFSET ON OR ORDER OUTER OVER PARTITION PRECEDING RANGE RIGHT
    ROW ROWS SELECT SEPARATOR THEN TRAILING TRUE UNBOUNDED UNION USING VALUES WHEN WHERE WITH
    YEAR QUARTER MONTH WEEK DAY HOUR MINUTE SECOND DOW DOY EPOCH
    BIGINT BOOLEAN CHAR DATE DATETIME DECIMAL DOUBLE FLOAT INT INTEGER NUMERIC PRECISION REAL SIGNED SMALLINT TEXT TIME
    TIMESTAMP TIMESTAMPTZ TINYINT VARCHAR ZONE
    """.split()
)
_FUNCTIONS = frozenset(
    """
    ABS AVG BOOL_AND BOOL_OR CEIL CEILING CHAR_LENGTH COALESCE CONCAT COUNT DATE_TRUNC DENSE_RANK EXTRACT FIRST_VALUE
    FLOOR GREATEST GROUP_CONCAT IF IFNULL IIF INSTR LAG LAST_VALUE LEAD LEAST LEFT LENGTH LISTAGG LOCATE LOWER MAX MIN
    NULLIF POSITION RANK RIGHT ROUND ROW_NUMBER SIGN SQRT STDDEV STDDEV_POP STDDEV_SAMP STRING_AGG STRPOS SUBSTR
    SUBSTRING SUM TRIM TRY_CAST UPPER VARIANCE VAR_POP VAR_SAMP
    """.split()
)
_TYPES_WITH_SIZE = frozenset("DECIMAL NUMERIC VARCHAR CHAR TEXT FLOAT TIME TIMESTAMP DATETIME TIMESTAMPTZ".split())


def check(text: str) -> None:
    """Raises QueryRefused for anything else."""
    at = 0
    while at < len(text):
        found = _TOKENS.match(text, at)
        if found is None or _COMMENT.match(text, at):
            raise QueryRefused("the query is not understood")
        word = found.group("word")
        at = found.end()
        if word is None:
            continue
        upper, called = word.upper(), text[at : at + 1] == "("
        if called and upper in _FUNCTIONS:
            continue
        if upper not in _KEYWORDS:
            raise QueryRefused(f"this is not supported in a query: {word[:40].lower()}")
        if called and upper not in _CALLED:
            raise QueryRefused(f"this is not supported in a query: {word[:40].lower()}()")


_CALLED = _TYPES_WITH_SIZE | frozenset(
    "AND AS CAST EXISTS FILTER IN NOT ON OR OVER USING VALUES WHEN WHERE DISTINCT".split()
)
"""What an opening parenthesis may follow at once without being a function."""
