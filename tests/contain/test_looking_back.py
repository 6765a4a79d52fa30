"""A real agent behind the model broker: each thing that it did stands in the log under the answer that asked for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from corral.actions import Content, Decision, Kind, Program, Used
from corral.log.events import PayloadKept
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.logs import events, verified
from tests.contain.test_rerun import AGENT, policy
from tests.models.script import Call, Script, Text, Turn, says
from tests.models.server import ModelServer

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "trajectory.schema.json").read_bytes())
SCRIPT = Script(
    "main",
    [
        Turn((Text("looking \x1b[2J around"), Call("bash", {"command": "/usr/bin/id -u"}))),
        Turn((Call("bash", {"command": "/usr/bin/uname -s"}), Call("bash", {"command": "/usr/bin/nproc"}))),
        says("all done"),
    ],
)


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


def step_of(place: Path, program: str) -> int:
    """The one step in which a program was run."""
    (found,) = {
        event.action.origin.step
        for event in events(place, Decision)
        if event.action.kind is Kind.PROCESS_EXEC
        and isinstance(event.action.subject, Program)
        and event.action.subject.path.endswith(f"/{program}")
    }
    return int(found)


def test_each_action_stands_under_the_answer_that_asked_for_it(cli: CommandLine, tmp_path: Path) -> None:
    with ModelServer([SCRIPT]) as server:
        (cli.workspace / "agent.py").write_text(AGENT)
        file, place = policy(cli, server), tmp_path / "records" / "log"
        file.write_text(file.read_text().replace("keep: {response: 1d}", "keep: {prompt: 1d, response: 1d}"))
        argv = ["--policy", str(file), "--log", str(place), "--", "/usr/bin/python3", "agent.py"]
        done = cli.run(*argv, env={"UPSTREAM_KEY": server.key})
        assert done.returncode == 0 and b"all done" in done.stdout, done
        asked = [each.body for each in server.received]
    verified(place)

    used = [event for event in events(place, Used) if event.kind is Kind.MODEL_CALL]
    kept = events(place, PayloadKept)
    assert [each.call for each in used] == [1, 2, 3]
    assert sorted((each.content.value, each.call) for each in kept) == sorted(
        (content.value, number) for content in (Content.PROMPT, Content.RESPONSE) for number in (1, 2, 3)
    )
    first, second = (each.opened for each in used[:2])
    assert 0 < first < second and used[2].opened == 0
    assert [step_of(place, name) for name in ("id", "uname", "nproc")] == [first, second, second]

    words = ("--log", str(place))
    tree = cli("replay", *words, "--tree").stdout.decode()
    assert len(re.findall(r"^conversation \S+: 3 calls", tree, re.MULTILINE)) == 1, tree
    assert len(re.findall(r"^    bash \S+: [1-9]\d* actions", tree, re.MULTILINE)) == 3, tree
    played = cli("replay", *words, "--details").stdout.decode()
    assert "looking \\x1b[2J around" in played and "\x1b" not in played
    assert f"[step {second}, {used[1].tools[1].id}]" in played
    found = cli("log", "query", *words, "--tool", used[1].tools[1].id, "action=process.exec").stdout
    assert b"/usr/bin/nproc" in found and b"/usr/bin/uname" not in found

    lines = cli("log", "export", *words, "--format", "trajectories").stdout.splitlines()
    turns: list[Any] = [json.loads(line) for line in lines]
    messages: list[Any] = []
    for turn, body in zip(turns, asked, strict=True):
        jsonschema.Draft202012Validator(SCHEMA).validate(turn)
        messages = messages[: turn["prompt"]["messages_from"]] + turn["prompt"]["messages"]
        assert messages == json.loads(body)["messages"]
        assert turn["missing"] == [] and turn["complete"]
    assert [turn["text"] for turn in turns] == ["looking \x1b[2J around", "", "all done"]
    assert [[call["name"] for call in turn["tools"]] for turn in turns] == [["bash"], ["bash", "bash"], []]
    ran = [[step["subject"]["path"] for step in turn["actions"] if step["action"] == "process.exec"] for turn in turns]
    assert [[name.rpartition("/")[2] for name in each if not name.endswith("bash")] for each in ran] == [
        ["id"],
        ["uname", "nproc"],
        [],
    ]
    assert {step["tool"] for step in turns[1]["actions"]} >= {each.id for each in used[1].tools}
