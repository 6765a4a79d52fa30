"""A recorded session is run again with the answers that its models gave: it is the same, or first another somewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.log.events import SessionStarted
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.logs import events, verified
from tests.models.script import Call, Script, Text, Turn, says
from tests.models.server import ModelServer

AGENT = r"""
import json, os, subprocess, sys, urllib.request
messages = [{"role": "user", "content": "make it so"}]
while True:
    body = json.dumps({"model": "scripted", "messages": messages, "stream": "stream" in sys.argv}).encode()
    head = {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, head)
    with urllib.request.urlopen(request) as answer:
        message = json.load(answer)["choices"][0]["message"]
    messages.append(message)
    if not message.get("tool_calls"):
        print(message["content"])
        break
    for call in message["tool_calls"]:
        command = json.loads(call["function"]["arguments"])["command"]
        done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True)
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": done.stdout})
"""
SCRIPT = Script(
    "main",
    [
        Turn((Text("looking"), Call("bash", {"command": "cat state.txt"}))),
        Turn((Call("bash", {"command": "grep -q one state.txt || /usr/bin/id; echo two >state.txt"}),)),
        says("all done"),
    ],
)  # fmt: skip


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer([SCRIPT]) as made:
        yield made


def policy(cli: CommandLine, server: ModelServer, more: str = "") -> Path:
    file = cli.workspace.parent / "policy.yaml"
    file.write_text(
        f"""
model:
  allow: [scripted]
  upstreams:
    - name: here
      url: http://127.0.0.1:{server.port}/v1
      api: openai
      credential: {{type: bearer, from: "env:UPSTREAM_KEY"}}
filesystem: {{snapshot: step}}
log: {{keep: {{response: 1d}}}}
{more}"""
    )
    return file


def first_run(cli: CommandLine, server: ModelServer) -> tuple[Path, Path]:
    (cli.workspace / "agent.py").write_text(AGENT)
    (cli.workspace / "state.txt").write_text("one\n")
    file, log = policy(cli, server), cli.workspace.parent / "records" / "log"
    argv = ["--policy", str(file), "--log", str(log), "--", "/usr/bin/python3", "agent.py"]
    done = cli.run(*argv, env={"UPSTREAM_KEY": server.key})
    assert done.returncode == 0, done
    assert b"all done" in done.stdout
    assert len(server.received) == 3 and not server.violations
    return file, log


def test_the_same_agent_does_the_same_and_no_model_is_asked(cli: CommandLine, server: ModelServer) -> None:
    file, log = first_run(cli, server)
    done = cli("replay", "--log", str(log), "--rerun", "--policy", str(file), "--json")
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert told["same"] and told["divergence"] is None and told["answers"] == 3 and told["notes"] == []
    assert len(server.received) == 3, "the answers were those of the log"
    sessions = events(log, SessionStarted)
    assert [event.label.startswith("re-run of ") for event in sessions] == [False, True]
    verified(log)


def test_where_it_does_something_else_is_told(cli: CommandLine, server: ModelServer) -> None:
    file, log = first_run(cli, server)
    other = policy(cli, server, "process: {deny: [{path: /usr/bin/grep}]}\n")
    done = cli("replay", "--log", str(log), "--rerun", "--policy", str(other), "--json")
    assert done.returncode == 1, done
    told = json.loads(done.stdout)
    assert not told["same"]
    assert "grep" in told["divergence"]["what"] and told["divergence"]["step"] > 1
    assert any("is not the one of session" in note for note in told["notes"])
    assert file == other


def test_a_workspace_that_has_gone_on_is_told(cli: CommandLine, server: ModelServer) -> None:
    file, log = first_run(cli, server)
    (cli.workspace / "state.txt").write_text("something else\n")
    done = cli("replay", "--log", str(log), "--rerun", "--policy", str(file))
    assert done.returncode == 1, done
    assert b"state.txt in " in done.stderr and b"has changed since" in done.stderr
    assert b"/usr/bin/id: allow was not done before" in done.stdout


def test_what_cannot_be_run_again_is_said(cli: CommandLine, server: ModelServer) -> None:
    file, log = first_run(cli, server)
    nothing = cli("replay", "--log", str(log), "--rerun")
    assert nothing.returncode == 125 and b"--policy" in nothing.stderr
    plain = cli.workspace.parent / "records" / "plain"
    assert cli.run("--log", str(plain), "--", "/bin/true").returncode == 0
    unkept = cli("replay", "--log", str(plain), "--rerun", "--policy", str(file))
    assert unkept.returncode == 125 and b"no answer of a model is kept" in unkept.stderr


def test_answers_can_be_taken_from_a_file(cli: CommandLine, server: ModelServer) -> None:
    first_run(cli, server)
    file, answers = policy(cli, server), cli.workspace.parent / "answers.jsonl"
    argv = ["--policy", str(file), "--", "/usr/bin/python3", "agent.py"]
    environment = {"UPSTREAM_KEY": server.key}
    done = cli.run("--record-models", str(answers), *argv, env=environment)
    assert done.returncode == 0 and b"all done" in done.stdout, done
    assert answers.stat().st_mode & 0o777 == 0o600 and server.key not in answers.read_text()
    asked = len(server.received)
    again = cli.run("--replay-models", str(answers), *argv)  # without any key
    assert again.returncode == 0 and b"all done" in again.stdout, again
    assert len(server.received) == asked
    both = cli.run("--record-models", "x", "--replay-models", "y", *argv)
    assert both.returncode == 125 and b"not both" in both.stderr
    without = cli.run("--replay-models", str(answers), "--", "/bin/true")
    assert without.returncode == 125 and b"model.upstreams" in without.stderr
