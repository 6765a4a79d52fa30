"""`corral run` with databases: what a program inside gets, what a person sees and answers, what is on record, and what
is left when somebody is killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from corral.actions import Content, Decision, Kind, Query, Used
from corral.log.events import PayloadKept
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import wait_until
from tests.contain.logs import events, records, verified
from tests.unit import databases
from tests.unit.data_world import make_postgresql, make_sqlite

PYTHON = "/usr/bin/python3"
CLIENT = """
import json, os, socket, sys, urllib.error, urllib.request
BASE = "http://data.corral.internal"
def post(path, value, **headers):
    headers = {"content-type": "application/json", **headers}
    request = urllib.request.Request(BASE + path, json.dumps(value).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [answer.status, json.loads(answer.read() or b"null")]
    except urllib.error.HTTPError as error:
        return [error.code, json.loads(error.read() or b"null")]
    except OSError as error:
        return [0, type(error).__name__]
def query(sql, parameters=None, source="crm"):
    return post("/v1/query", {"source": source, "sql": sql, "parameters": parameters or {}})
def tool(name, arguments):
    return post("/mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/call",
                         "params": {"name": name, "arguments": arguments}})[1]["result"]
"""
POLICY = """\
version: 1
agent: {{name: support, version: "3"}}
log: {{keep: {{query: 1d}}}}
data:
  allow: [{{source: crm, statements: [select, update]}}]
  sources:
    - name: crm
      dialect: {dialect}
      url: "{url}"
{more}      tables:
        - name: customers
          columns: [id, {{name: name, personal: true}}, {{name: email, use: hash, personal: true}}, balance]
          rows: "tenant = 1"
          statements: [select, update]
"""
UPDATE = "UPDATE customers SET balance = balance + 1 WHERE name IN ('Ada', 'Hidden')"


@pytest.fixture(scope="module")
def postgresql() -> Iterator[databases.Server]:
    with databases.postgresql() as server:
        yield server


@pytest.fixture
def cli(tmp_path: Path, workspace: Path, postgresql: databases.Server) -> Iterator[CommandLine]:
    with adopting_orphans():  # the server is there before
        yield CommandLine(tmp_path, workspace)


class Source:
    """A database, and a policy that lets an agent have some of it."""

    def __init__(self, policy: Path, env: dict[str, str], port: int, path: Path) -> None:
        self.policy, self.env, self.port, self.path = policy, env, port, path

    def balance(self) -> Any:
        """Of Ada, for whoever may see it."""
        sql = "SELECT balance FROM customers WHERE id = 1"
        if self.port:
            with psycopg.connect(databases.admin(self.port, "crm")) as connection:
                return (connection.execute(sql.encode()).fetchone() or (None,))[0]
        connection_ = sqlite3.connect(self.path)
        try:
            return connection_.execute(sql).fetchone()[0]
        finally:
            connection_.close()

    def is_locked(self) -> bool:
        """Whether somebody's change of the row is still open."""
        if self.port:
            with psycopg.connect(databases.admin(self.port, "crm")) as connection:
                rows = connection.execute(b"SELECT id FROM customers WHERE id = 1 FOR UPDATE SKIP LOCKED").fetchall()
            return not rows
        connection_ = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            connection_.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        finally:
            connection_.close()
        return False


@pytest.fixture(params=["sqlite", "postgresql"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    policy, path = tmp_path / "policy.yaml", tmp_path / "crm.db"
    port, env, url, more = 0, {}, str(path), ""
    if request.param == "postgresql":
        port = request.getfixturevalue("postgresql").port
        make_postgresql(port, "crm", oracle=False)
        env = {"CRM_PASSWORD": databases.PASSWORD}
        url, more = f"postgresql://agent@127.0.0.1:{port}/crm", "      role: scoped\n      password: env:CRM_PASSWORD\n"
    else:
        make_sqlite(path, oracle=False)
    policy.write_text(POLICY.format(dialect=request.param, url=url, more=more))
    return Source(policy, env, port, path)


def _live(cli: CommandLine, source: Source, code: str) -> subprocess.Popen[bytes]:
    log = cli.state / "records"
    words = ("run", "--policy", str(source.policy), "--log", str(log), "--", PYTHON, "-c", CLIENT + code)
    return cli.start(*words, env=source.env)


def _held(cli: CommandLine) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = json.loads(cli("pending", "--json").stdout)
        return bool(found)

    assert wait_until(look, 20)
    (one,) = found
    return one


def _ended(process: subprocess.Popen[bytes]) -> tuple[int, list[Any], str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, [json.loads(line) for line in out.decode().splitlines()], err.decode()


LOOK_AROUND = """
found = [query("SELECT * FROM customers ORDER BY id"), query("SELECT secret FROM customers"),
         query("SELECT - :p AS a, 'x\\n salary FROM payroll --' AS b FROM customers", {"p": -0.0}),
         query("SELECT salary FROM payroll"), query("SELECT 1", source="other"),
         tool("query", {"source": "crm", "sql": "SELECT count(*) AS n FROM customers WHERE id > :n",
                        "parameters": {"n": 2}})]
print(json.dumps(found))
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5); print('"connected"')
except OSError as error:
    print('"no way"')
try:
    print(json.dumps(len(open(sys.argv[2], "rb").read())))
except OSError:
    print('"no file"')
seen = dict(os.environ)
for number in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        try: seen[number + name] = open("/proc/%s/%s" % (number, name)).read()
        except OSError: pass
for top in ("/etc", "/tmp", "/run", "/var/tmp", os.environ.get("HOME", "/root"), os.getcwd()):
    for where, _, files in os.walk(top):
        for file in files[:200]:
            try:
                with open(os.path.join(where, file), "rb") as opened:
                    seen[os.path.join(where, file)] = opened.read(1 << 16).decode("latin-1") if \
                        os.path.isfile(os.path.join(where, file)) else ""
            except OSError: pass
print(json.dumps([name for name, text in seen.items() if "canary-" + "6b1f0d5e" in text]))
"""


def test_the_scope_is_all_there_is(cli: CommandLine, source: Source) -> None:
    process = cli.start(
        *("run", "--policy", str(source.policy), "--log", str(cli.state / "records"), "--"),
        *(PYTHON, "-c", CLIENT + LOOK_AROUND, str(source.port or 1), str(source.path)),
        env=source.env,
    )
    status, (found, connected, file, canaries), err = _ended(process)
    assert status == 0, err
    rows, denied, forged, payroll, other, called = found
    assert rows[0] == 200 and rows[1]["columns"] == ["id", "name", "email", "balance"]
    assert [row[0] for row in rows[1]["rows"]] == [1, 2, 3, 6] and len(rows[1]["rows"][0][2]) == 32
    assert denied[0] == 400 and denied[1]["error"]["type"] == "refused"
    assert forged[0] == 200 and forged[1]["columns"] == ["a", "b"]
    assert payroll[0] == 400 and other[0] == 404
    assert called["isError"] is False and json.loads(called["content"][0]["text"])["rows"] == [[2]]
    assert connected == "no way" and file == "no file" and canaries == []
    assert "987654" not in json.dumps(found) and "s3cret" not in json.dumps(found)


def test_what_was_asked_is_on_record(cli: CommandLine, source: Source) -> None:
    process = _live(cli, source, "print(json.dumps([query('SELECT name FROM customers WHERE id = :n', {'n': 1})]))")
    status, ((asked,),), err = _ended(process)
    assert status == 0 and asked[1]["rows"] == [["Ada"]], err
    place = cli.state / "records"
    assert verified(place) > 0
    (decided,) = [each for each in events(place, Decision) if each.action.kind is Kind.DATA_QUERY]
    subject = decided.action.subject
    assert isinstance(subject, Query)
    assert (subject.source, subject.statement, subject.tables) == ("crm", "select", ("customers",))
    (used,) = events(place, Used)
    assert (used.source, used.rows, used.status, used.personal) == ("crm", 1, 200, ("crm.customers.name",))
    assert used.origin.step == decided.action.origin.step >= 1
    contexts = [each.context for each in records(place) if isinstance(each.event, Used)]
    assert [(each.agent, each.agent_version) for each in contexts] == [("support", "3")]
    usage = json.loads(cli("usage", "--json", "--log", str(place)).stdout)
    metered = json.loads(cli("usage", "--json").stdout)
    for total in (usage["total"], metered["total"]):
        assert (total["requests"], total["rows"], total["bytes_up"] > 0, total["bytes_down"] > 0) == (1, 1, True, True)
    everything = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert b"canary-6b1f0d5e" not in everything
    assert [each.content for each in events(place, PayloadKept)] == [Content.QUERY]
    replayed = cli("replay", "--log", str(place)).stdout
    assert b"crm" in replayed and b"canary-6b1f0d5e" not in replayed


@pytest.mark.parametrize("answer", ["approve", "deny"])
def test_a_change_is_what_a_person_says(cli: CommandLine, source: Source, answer: str) -> None:
    process = _live(cli, source, f"print(json.dumps(query({UPDATE!r})))")
    one = _held(cli)
    assert one["preview"].startswith("1 row: update\n")
    assert 'before: [1,"Ada"' in one["preview"] and 'after: [1,"Ada"' in one["preview"]
    text = cli("pending").stdout.decode()
    assert "1 row: update" in text and "Hidden" not in one["preview"].partition("run:")[0]
    assert source.balance() == 120 and source.is_locked()
    assert cli(answer, str(one["id"])).returncode == 0
    status, (asked,), err = _ended(process)
    assert status == 0, err
    assert asked[0] == (200 if answer == "approve" else 403)
    assert source.balance() == (121 if answer == "approve" else 120) and not source.is_locked()
    (decided,) = [one for one in events(cli.state / "records", Decision) if one.action.kind is Kind.DATA_QUERY]
    assert decided.allowed is (answer == "approve") and decided.answered_by
    assert b"after: " not in b"".join(path.read_bytes() for path in cli.state.rglob("*") if path.is_file())


@pytest.mark.parametrize("who", ["controller", "client"])
def test_a_change_that_nobody_waits_for_is_undone(cli: CommandLine, source: Source, who: str) -> None:
    code = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", {CLIENT + f"query({UPDATE!r})"!r}])
sys.stdin.readline(); child.kill(); child.wait(); print('"killed"', flush=True); sys.stdin.readline()
"""
    process = _live(cli, source, code)
    _held(cli)
    assert source.is_locked()
    if who == "controller":
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
    else:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b'"killed"\n'
        assert wait_until(lambda: json.loads(cli("pending", "--json").stdout) == [], 20)
    assert wait_until(lambda: not source.is_locked(), 20)
    assert source.balance() == 120
    if who == "client":
        out, err = process.communicate(b"\n", timeout=20)
        assert process.returncode == 0, (out, err)
        (used,) = events(cli.state / "records", Used)
        assert used.ending.value == "abandoned"


# ---- what cannot be: said before anything runs, and nothing is left ----


def _refused(cli: CommandLine, policy: Path, **env: str) -> str:
    done = cli.run("--policy", str(policy), "--", "touch", "ran", env=env)
    assert (done.returncode, done.stdout) == (125, b""), done
    assert b"Traceback" not in done.stderr and not (cli.workspace / "ran").exists()
    assert not list(cli.state.glob("corral/layers/*"))
    return done.stderr.decode()


def test_a_password_that_is_not_there(cli: CommandLine, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    more = "      password: env:NO_SUCH_PASSWORD\n"
    policy.write_text(POLICY.format(dialect="mysql", url="mysql://a@127.0.0.1:1/crm", more=more))
    assert "env:NO_SUCH_PASSWORD" in _refused(cli, policy)


def test_a_document_that_is_not_there(cli: CommandLine, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\napi:\n  allow: [{service: t, operations: [a]}]\n  services:\n"
        "    - {name: t, document: /nowhere/t.yaml, url: 'http://127.0.0.1:1', operations: [a]}\n"
    )
    assert "/nowhere/t.yaml" in _refused(cli, policy)


@pytest.mark.parametrize(("dialect", "module"), [("sqlite", "sqlglot"), ("duckdb", "duckdb")])
def test_a_library_that_is_not_there(cli: CommandLine, tmp_path: Path, dialect: str, module: str) -> None:
    """Its name, and how to get it. The library is hidden, not removed."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        f"util.find_spec = lambda name, package=None: None if name == {module!r} else find(name, package)\n"
    )
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(dialect=dialect, url=tmp_path / "crm.db", more=""))
    there = f"{tmp_path / 'hidden'}:{cli.env.get('PYTHONPATH', '')}".rstrip(":")
    said = _refused(cli, policy, PYTHONPATH=there)
    assert module in said and "corral[data]" in said
