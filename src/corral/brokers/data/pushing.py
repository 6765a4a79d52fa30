"""Conditions that may be evaluated on every row of a table: those that fail for none of them."""

from __future__ import annotations

from sqlglot import exp


def conjuncts(condition: exp.Expr) -> list[exp.Expr]:
    """What must all hold for it to hold."""
    found, stack = [], [condition]
    while stack:
        node = stack.pop()
        if type(node) is exp.And:
            stack += [node.this, node.expression]
        elif type(node) is exp.Paren:
            stack.append(node.this)
        else:
            found.append(node)
    return found


def compared(node: exp.Expr) -> exp.Expr | None:
    """The column of a condition that compares it with values, and nothing else."""
    if type(node) in (exp.EQ, exp.GT, exp.GTE, exp.LT, exp.LTE):
        others = [node.args["expression"]]
    elif type(node) is exp.In and not node.args.get("query"):
        others = node.expressions
    elif type(node) is exp.Between:
        others = [node.args["low"], node.args["high"]]
    else:
        return None
    plain = all(type(other) in (exp.Literal, exp.Placeholder) for other in others)
    column = node.this
    return column if plain and type(column) is exp.Column and type(column.this) is exp.Identifier else None
