"""Unmodified agents of other people's work through the model broker, and what they do is put down to what caused it.

The model is scripted, the agents are real: claude-code (Node.js; Anthropic Messages, streamed) and mini-swe-agent
(Python; Chat Completions, and Responses). See :mod:`tests.e2e.agents`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.actions import Access, Content, Decision, Ending, Endpoint, File, Kind, Origin, Program, Used, Verdict
from corral.log.events import PayloadKept, PayloadLost
from corral.log.places import open_payloads
from corral.sandbox.trees import remove_tree
from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.logs import events, verified
from tests.contain.test_gateway_intercept import memory_of, processes
from tests.e2e.agents import (
    ALL,
    CLAUDE,
    MINI,
    SECRET,
    TASK,
    Agent,
    Run,
    environment_of,
    main_script,
    policy_text,
    running,
)
from tests.models.script import Call, Closes, Echoes, Fails, Part, Script, Slow, Text, Thinking, Turn, Usage, says
from tests.models.server import ModelServer

REFUSED = "192.0.2.1"
USAGE = Usage(input=2000, output=100, cached=500)
COST = (1500 * 3 + 500 * 0.3 + 100 * 15) / 1e6
"""Of one answer, at the policy's prices."""
agents = pytest.mark.parametrize("agent", ALL, ids=lambda agent: agent.name)
each_api = pytest.mark.parametrize("agent", (CLAUDE, MINI), ids=lambda agent: agent.name)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    yield
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    remove_tree(parent, place.name)
    os.close(parent)


def workshop(agent: Agent, place: Path) -> list[Turn]:
    """Files, programs, two things at once, a connection that is refused, and a daemon that goes on by itself."""
    at = place / "workspace"
    daemon = "until [ -e go ]; do sleep 0.1; done; nl one.txt; echo late >late.txt"
    waits = "until [ -e late.txt ]; do sleep 0.05; done"
    turns: list[tuple[Part, ...]] = [
        (Thinking("First a file. 考えます"), Text("I write it."), agent.writes(f"{at}/made.txt", "some text")),
        (
            Text("Two at once."),
            agent.runs("tac made.txt >one.txt"),
            agent.runs("fold made.txt >two.txt; paste two.txt"),
        ),
        (Text("The network."), agent.runs(f"bash -c ': <>/dev/tcp/{REFUSED}/80'; echo tried >net.txt")),
        (Text("A daemon."), agent.runs(f"setsid sh -c '{daemon}' >/dev/null 2>&1 </dev/null & echo begun >four.txt")),
        (agent.runs(f"touch go; timeout 20 sh -c '{waits}'; expand late.txt"),),
        tuple(agent.ends),
    ]
    return [Turn(parts, USAGE) for parts in turns]


WRITTEN = {
    "made.txt": (0, 0),
    "one.txt": (1, 0),
    "two.txt": (1, 1),
    "net.txt": (2, 0),
    "four.txt": (3, 0),
    "go": (4, 0),
}
"""Files, with the turn and the tool call that they are written by."""
EXECUTED = {"tac": (1, 0), "fold": (1, 1), "paste": (1, 1), "setsid": (3, 0), "touch": (4, 0), "expand": (4, 0)}
OF_THE_DAEMON = {"late.txt", "nl"}
"""What it does once the step that has begun it is over."""


@agents
async def test_what_an_agent_does_is_under_the_tool_call_that_caused_it(agent: Agent, tmp_path: Path) -> None:
    script = main_script(workshop(agent, tmp_path))
    async with running(agent, [script], tmp_path) as run:
        done = await run.work()
        assert done.exit_code == 0, done
        assert "All is done." in done.text
    assert not run.server.violations and not run.server.broken
    assert run.server.asked("main") == list(range(6))
    check_accounts(run, script)
    check_contents(run, script)
    calls = of_script(run, script)
    opened = [used.opened for used in calls]
    assert all(opened[:5]) and len(set(opened[:5])) == 5

    def place_of(turn: int, call: int) -> tuple[int, str, bool]:
        return opened[turn], script.call_id(turn, call), False

    seen: dict[str, set[tuple[int, str, bool]]] = {}
    late = set()
    acts = [each for each in run.decisions() if not is_reading(each)]
    for decision in acts:
        name = what(decision)
        if name in OF_THE_DAEMON:
            late.add((name, decision.action.origin.unexplained))
        else:
            seen.setdefault(name, set()).add(cause(decision.action.origin))
    expected = {name: {place_of(*at)} for name, at in (WRITTEN | EXECUTED).items()}
    assert {name: seen.get(name) for name in expected} == expected
    assert seen[f"connect {REFUSED}:80 DENY"] == {place_of(2, 0)}
    assert late == {("nl", True), ("late.txt", True)}
    # Nothing else of what was done for a tool call is unexplained: only what an agent does by itself at its end, and
    # the daemon's shell, which waits.
    strays = [each for each in acts if each.action.origin.unexplained and what(each) not in OF_THE_DAEMON]
    assert {what(each) for each in strays if each.action.kind is Kind.PROCESS_EXEC} <= {"dash", "sleep"}
    assert not any(isinstance(each.action.subject, File) for each in strays)


def check_accounts(run: Run, script: Script) -> None:
    """Each call is accounted for: what it used and cost, what it wants done, who asked."""
    calls = of_script(run, script)
    assert len(calls) == len(script.turns) and len({used.conversation for used in calls}) == 1
    for position, used in enumerate(calls):
        assert used.ending is Ending.ANSWERED and used.status == 200
        assert (used.input_tokens, used.output_tokens, used.cached_tokens) == (2000, 100, 500)
        assert used.cost == round(COST * 1e9) and used.currency == "USD" and not used.estimated
        assert used.name == "scripted-1" and used.source == "far" and used.rule == "model.allow[0]"
        wanted = script.turns[position].calls
        assert [tool.id for tool in used.tools] == [script.call_id(position, n) for n in range(len(wanted))]
        assert [tool.name for tool in used.tools] == [call.name for call in wanted]
        assert [json.loads(tool.arguments) for tool in used.tools] == [dict(call.arguments) for call in wanted]
        assert used.origin.process is not None and used.origin.process.exe


def check_contents(run: Run, script: Script) -> None:
    """What was asked and answered is kept, with what the model thought."""
    assert not events(run.log, PayloadLost)
    payloads, found = open_payloads(run.log), {Content.PROMPT: b"", Content.RESPONSE: b""}
    for event in events(run.log, PayloadKept):
        if event.content in found:
            found[event.content] += payloads.read(event.digest)
    assert TASK.encode() in found[Content.PROMPT] and SECRET.encode() not in b"".join(found.values())
    assert all(script.call_id(position).encode() in found[Content.RESPONSE] for position in range(5))
    if run.agent is CLAUDE:
        assert "考えます".encode() in found[Content.RESPONSE]


async def test_a_sub_agent_is_a_conversation_of_its_own(tmp_path: Path) -> None:
    asked = {"description": "a part", "prompt": "SUBTASK: fold it, please", "subagent_type": "general-purpose"}
    task = Call("Task", asked)
    main = main_script(
        [
            Turn((Text("Others do it."), task, CLAUDE.runs("tac /etc/hostname >mine.txt"))),
            Turn((CLAUDE.runs("paste theirs.txt"),)),
            says("All is done."),
        ]
    )
    theirs = Turn((CLAUDE.runs("fold /etc/hostname >theirs.txt"),))
    sub = Script("sub", (theirs, says("It is folded.")), when="SUBTASK", tools=True)
    async with running(CLAUDE, [main, sub], tmp_path) as run:
        done = await run.work()
        assert done.exit_code == 0 and "All is done." in done.text, done
    mine, its = of_script(run, main), of_script(run, sub)
    (mother,), (child,) = {used.conversation for used in mine}, {used.conversation for used in its}
    assert mother != child and {used.parent for used in its} == {mother} and {used.parent for used in mine} == {""}
    seen: dict[str, set[tuple[int, str, bool]]] = {}
    for decision in run.decisions():
        if not is_reading(decision):
            seen.setdefault(what(decision), set()).add(cause(decision.action.origin))
    assert seen["theirs.txt"] == {(its[0].opened, sub.call_id(0), False)}
    assert seen["fold"] == {(its[0].opened, sub.call_id(0), False)}
    assert seen["tac"] == seen["mine.txt"] == {(mine[0].opened, main.call_id(0, 1), False)}
    assert seen["paste"] == {(mine[1].opened, main.call_id(1), False)}


async def test_two_sub_agents_at_once_are_told_apart(tmp_path: Path) -> None:
    """They work at the same time, in the same process, with commands that are alike."""

    def asked(name: str) -> Call:
        prompt = f"SUBTASK {name}: look after it, please"
        return Call("Task", {"description": name, "prompt": prompt, "subagent_type": "general-purpose"})

    def theirs(name: str, program: str) -> Script:
        first = CLAUDE.runs(f"sleep 1; {program} /etc/hostname >{name}1.txt; sleep 1")
        second = CLAUDE.runs(f"{program} {name}1.txt >{name}2.txt")
        return Script(name, (Turn((first,)), Turn((second,)), says("It is done.")), f"SUBTASK {name}", tools=True)

    main = main_script([Turn((Text("Two."), asked("left"), asked("right"))), says("All is done.")])
    left, right = theirs("left", "fold"), theirs("right", "nl")
    async with running(CLAUDE, [main, left, right], tmp_path) as run:
        done = await run.work()
        assert done.exit_code == 0 and "All is done." in done.text, done
    assert not run.server.violations
    (mother,) = {used.conversation for used in of_script(run, main)}
    expected: dict[str, set[tuple[int, str, bool]]] = {}
    conversations = {mother}
    for script, program in ((left, "fold"), (right, "nl")):
        calls = of_script(run, script)
        assert len(calls) == 3 and {used.parent for used in calls} == {mother}
        conversations |= {used.conversation for used in calls}
        causes = [(calls[turn].opened, script.call_id(turn), False) for turn in range(2)]
        expected |= {f"{script.name}{turn + 1}.txt": {causes[turn]} for turn in range(2)}
        expected[program] = set(causes)
    assert len(conversations) == 3
    seen: dict[str, set[tuple[int, str, bool]]] = {}
    for decision in run.decisions():
        if not is_reading(decision):
            seen.setdefault(what(decision), set()).add(cause(decision.action.origin))
    assert {name: seen.get(name) for name in expected} == expected


# ---- secrets ----


@each_api
async def test_i8_the_key_is_never_inside_and_arrives(agent: Agent, tmp_path: Path) -> None:
    """Also where the upstream tells it back."""
    script = main_script(
        [
            Turn((agent.runs("env >env.txt; cat /proc/*/environ /proc/*/cmdline >>env.txt 2>/dev/null; true"),)),
            Turn((agent.runs("true"),), trouble=Slow(before=4)),
            Turn(tuple(agent.ends)),
        ]
    )
    echo = Script("echo", (says("x", trouble=Echoes()),), when="What did you receive?")
    async with running(agent, [script, echo], tmp_path) as run:
        working = asyncio.create_task(run.work())
        await asyncio.to_thread(run.server.wait_for, 2)
        while run.server.asked("main") != [0, 1]:
            await asyncio.sleep(0.05)
        echoed = await run.box.exec([*CURL, *question(agent)], timeout=30)
        assert "host" in echoed.text.lower(), echoed
        assert SECRET not in echoed.text
        environment = (await run.box.read_file(str(run.workspace / "env.txt"))).decode()
        if os.geteuid() == 0:
            checked = processes()
            assert len(checked) >= 3
            found = [pid for pid in checked for piece in memory_of(pid) if SECRET.encode() in piece]
            assert not found
            assert any(SECRET.encode() in piece for piece in memory_of(os.getpid()))  # the method works
        done = await working
        assert done.exit_code == 0, done
        assert SECRET not in done.text + done.stderr.decode()
        seen = await run.box.exec(["sh", "-c", f"grep -rlF {SECRET[:12]}* /tmp /home . /run; env"], timeout=30)
        assert SECRET[:12] not in seen.text
        assert SECRET not in repr((run.box.core.prepared.outlet, run.box.core.prepared.plan))
    assert SECRET not in environment and "sk-the-callers-own" not in environment
    assert "kept-by-corral" in environment
    for received in run.server.received:
        assert SECRET in (received.header("authorization") or "") + (received.header("x-api-key") or "")
        assert b"kept-by-corral" not in received.raw
        assert b"sk-the-callers-own" not in received.raw
    for path in (each for each in run.log.parent.rglob("*") if each.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in repr(run.used()) + repr(run.decisions())


CURL = ("curl", "-sS", "-i", "-m", "20", "-H", "content-type: application/json")


def question(agent: Agent) -> list[str]:
    """What curl needs to ask the agent's kind of model."""
    body = {"model": "scripted-1", "max_tokens": 9, "messages": [{"role": "user", "content": "What did you receive?"}]}
    path = "messages" if agent.api == "anthropic" else "chat/completions"
    return ["-d", json.dumps(body), f"http://model.corral.internal/v1/{path}"]


# ---- what goes wrong ----


@each_api
async def test_a_budget_that_is_used_up_ends_the_work_and_says_why(agent: Agent, tmp_path: Path) -> None:
    script = main_script(workshop(agent, tmp_path))
    async with running(agent, [script], tmp_path, more="session: {requests: 2}") as run:
        done = await run.work()
        assert "may ask models 2 times, and has done so" in done.text + done.stderr.decode(), done
        assert "All is done." not in done.text
        if agent is CLAUDE:
            assert done.exit_code != 0
        assert (await run.box.read_file(str(run.workspace / "one.txt"))).startswith(b"some text")
    assert run.server.asked("main") == [0, 1]
    refused = [used for used in run.used() if used.ending is Ending.REFUSED]
    assert refused and {used.status for used in refused} == {403}
    assert {used.rule for used in refused} == {"model.session.requests"} and all(used.reason for used in refused)
    assert not any(used.cost for used in refused)


@each_api
async def test_an_upstream_that_dies_in_the_midst_is_told_of(agent: Agent, tmp_path: Path) -> None:
    turns = workshop(agent, tmp_path)
    turns[1] = Turn(turns[1].parts, USAGE, first=(Closes(4),))
    script = main_script(turns)
    async with running(agent, [script], tmp_path) as run:
        done = await run.work()
        assert done.exit_code == 0 and "All is done." in done.text, done  # as without a broker between: it asks again
    assert run.server.asked("main") == [0, 1, 1, 2, 3, 4, 5]
    (failed,) = [used for used in run.used() if used.ending is not Ending.ANSWERED]
    assert failed.ending is Ending.FAILED and failed.source == "far" and failed.status in (200, 502)
    assert "broke off" in failed.reason and failed.estimated and failed.input_tokens and not failed.opened


@each_api
async def test_an_upstream_that_is_busy_is_asked_again(agent: Agent, tmp_path: Path) -> None:
    busy = Fails(429, "slow down, please", (("Retry-After", "1"),))
    turns = [Turn((agent.runs("tac /etc/hostname >one.txt"),), USAGE, first=(busy,)), Turn(tuple(agent.ends), USAGE)]
    script = main_script(turns)
    async with running(agent, [script], tmp_path) as run:
        done = await run.work()
        assert done.exit_code == 0 and "All is done." in done.text, done
    assert run.server.asked("main") == [0, 0, 1]
    assert [used.ending for used in of_script(run, script)] == [Ending.ANSWERED] * 2


@each_api
async def test_a_model_that_is_not_allowed_is_refused_with_its_reason(agent: Agent, tmp_path: Path) -> None:
    script = main_script(workshop(agent, tmp_path))
    async with running(agent, [script], tmp_path, allow="other-*") as run:
        done = await run.work()
        assert "may not be asked here" in done.text + done.stderr.decode(), done
        asked = await run.box.exec([*CURL, *question(agent)], timeout=30)
    assert "403" in asked.text.splitlines()[0] and "may not be asked here" in asked.text
    assert not run.server.received
    refused = [each for each in run.decisions() if each.action.kind is Kind.MODEL_CALL]
    assert refused and {each.verdict for each in refused} == {Verdict.DENY}
    assert {used.ending for used in run.used()} == {Ending.REFUSED}
    assert all(used.status == 403 and "scripted-1" in used.reason for used in run.used())


# ---- looking back ----


def test_a_run_is_shown_with_what_its_model_said(tmp_path: Path) -> None:
    """By the command line, as a person would."""
    CLAUDE.needed()
    workspace, place = tmp_path / "workspace", tmp_path / "log"
    workspace.mkdir(mode=0o755)
    script = main_script(workshop(CLAUDE, tmp_path))
    with adopting_orphans(), ModelServer([script], key=SECRET) as server:
        (tmp_path / "corral").mkdir()
        cli = CommandLine(tmp_path / "corral", workspace)
        policy = tmp_path / "policy.yaml"
        policy.write_text(policy_text(CLAUDE, server, workspace))
        words = ("--log", str(place), "--policy", str(policy), "--", "claude", *CLAUDE.arguments, TASK)
        done = cli.run(*words, env=environment_of(CLAUDE), timeout=120)
        assert done.returncode == 0 and b"All is done." in done.stdout, done
        assert verified(place)
        usage = json.loads(cli("usage", "--json").stdout)
        of_log = json.loads(cli("usage", "--json", "--log", str(place)).stdout)
        text = cli("replay", "--details", "--log", str(place)).stdout.decode()
        tree = cli("replay", "--tree", "--log", str(place)).stdout.decode()
    for told in (usage["total"], of_log["total"]):
        assert (told["requests"], told["input_tokens"], told["output_tokens"]) == (6, 12000, 600)
        assert told["cost"] == {"USD": f"{6 * COST:.9f}"}
    assert SECRET not in text
    for expected in ("考えます", "I write it.", "Two at once.", script.call_id(1, 1), "tac made.txt", "claude-code"):
        assert expected in text, text
    assert f"net.connect {REFUSED}:80" in text
    for expected in ("Write", "Bash", script.call_id(1, 0), script.call_id(1, 1), "unexplained"):
        assert expected in tree, tree


@each_api
def test_a_run_can_be_run_again_with_the_same_answers(agent: Agent, tmp_path: Path) -> None:
    """Without a model: whatever the agent does then is compared with what it did."""
    agent.needed()
    workspace, policy = tmp_path / "workspace", tmp_path / "policy.yaml"
    (tmp_path / "corral").mkdir()
    workspace.mkdir(mode=0o755)
    with adopting_orphans():
        cli = CommandLine(tmp_path / "corral", workspace)
        log = ("--log", str(tmp_path / "log"), "--policy", str(policy))
        with ModelServer([main_script(workshop(agent, tmp_path))], key=SECRET) as server:
            policy.write_text(policy_text(agent, server, workspace))
            words = (agent.program.name, *agent.arguments, TASK)
            done = cli.run(*log, "--", *words, env=environment_of(agent), timeout=120)
            assert done.returncode == 0, done
        again = cli("replay", "--rerun", *log, env=environment_of(agent), timeout=120)
    said = again.stdout.decode()
    assert "6 answers of models given again" in said, again
    if agent is CLAUDE:  # which gives its files names by chance
        assert "it first became another at step" in said and "shell-snapshots" in said
    else:
        assert again.returncode == 0 and "step by step" in said


# ---- reading records ----


def of_script(run: Run, script: Script) -> list[Used]:
    """The accounts of one conversation's calls, in the order of its turns; those without an answer are left out."""
    mine = [used for used in run.used() if any(script.call_id(0).rsplit("_", 2)[0] in tool.id for tool in used.tools)]
    conversations = {used.conversation for used in mine}
    return [used for used in run.used() if used.conversation in conversations and used.ending is Ending.ANSWERED]


def is_reading(decision: Decision) -> bool:
    return isinstance(decision.action.subject, File) and decision.action.subject.access is Access.READ


def cause(origin: Origin) -> tuple[int, str, bool]:
    return origin.step, origin.tool, origin.unexplained


def what(decision: Decision) -> str:
    """The file in the workspace, the program, or the destination."""
    match decision.action.subject:
        case File() as file if decision.action.kind is Kind.FILE_RENAME:
            return Path(file.other).name
        case File() as file:
            return Path(file.path).name
        case Program() as program:
            return Path(program.path).name
        case Endpoint() as endpoint:
            return f"connect {endpoint} {decision.verdict.name}"
        case _:
            return decision.action.name
