"""The data broker from inside: a program of the sandbox asks by name, and there is no other way to the database."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

from corral.actions import Kind, Query, Verdict
from corral.policy.model import Column, ColumnUse, Data, DataRule, Dialect, Policy, Source, TableScope
from corral.sandbox.box import Sandbox
from tests.contain.conftest import MakeBox
from tests.contain.test_hold import answer, held

ASK = """
import json, sys, urllib.error, urllib.request
data = json.dumps({"source": "shop", "sql": sys.argv[1]}).encode()
request = urllib.request.Request("http://data.corral.internal/v1/query", data, {"content-type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=60) as answer:
        print(answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
"""


def _policy(path: Path) -> Policy:
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE goods (id INTEGER PRIMARY KEY, name TEXT, cost INT, shop INT DEFAULT 1);"
        "INSERT INTO goods VALUES (1, 'tea', 7, 1), (2, 'cup', 3, 1), (3, 'elsewhere', 1, 2);"
    )
    connection.close()
    goods = TableScope(
        "goods",
        (Column("id"), Column("name"), Column("cost", ColumnUse.DENY)),
        "shop = 1",
        ("select", "update"),
    )
    source = Source("shop", Dialect.SQLITE, str(path), tables=(goods,))
    return Policy(data=Data(allow=(DataRule("shop", ("select", "update")),), sources=(source,)))


async def _asked(box: Sandbox, sql: str) -> Any:
    result = await box.exec(["/usr/bin/python3", "-c", ASK, sql])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


async def test_queries_and_a_change_that_is_held(make_box: MakeBox, tmp_path: Path) -> None:
    database = tmp_path / "shop.db"
    box = await make_box(policy=_policy(database))
    assert (await _asked(box, "SELECT * FROM goods ORDER BY id"))["rows"] == [[1, "tea"], [2, "cup"]]
    assert (await _asked(box, "SELECT cost FROM goods"))["error"]["type"] == "refused"
    assert (await box.exec(["cat", str(database)])).exit_code != 0

    asking = asyncio.create_task(_asked(box, "UPDATE goods SET name = 'coffee' WHERE id IN (1, 3)"))
    (question,) = await held(box)
    subject = question.action.subject
    assert isinstance(subject, Query) and 'after: [1,"coffee"]' in subject.preview
    answer(box, question, Verdict.ALLOW)
    assert await asking == {"affected": 1}
    assert (await _asked(box, "SELECT name FROM goods WHERE id = 1"))["rows"] == [["coffee"]]

    decided = [one for one in box.core.supervision.recent.all() if one.action.kind is Kind.DATA_QUERY]
    assert [one.action.subject.statement for one in decided if isinstance(one.action.subject, Query)] == [
        *("select", "update", "select"),
    ]
    process = decided[0].action.origin.process
    assert process is not None and "python3" in process.exe
