"""Agents that somebody else has written, as they come from their registries, and a sandbox for each.

They are told nothing: what they find the model by is what Corral sets.
"""

from __future__ import annotations

import asyncio
import json
import os
import textwrap
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from corral.actions import Decision, Used
from corral.log.places import open_log
from corral.policy.load import parse_policy
from corral.policy.model import Policy
from corral.sandbox.box import Sandbox
from corral.sandbox.results import ExecResult
from tests.contain.logs import events, verified
from tests.models.script import Call, Part, Script, Text, Turn
from tests.models.server import ModelServer

BUILD = Path(__file__).resolve().parents[2] / "build"
TASK = "The main task: look after the workshop."
SECRET = "sk-the-real-key-5b1d7c2e90"
PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Agent:
    """One of them."""

    name: str
    program: Path
    api: str
    """As a policy has it."""
    credential: str
    arguments: Sequence[str]
    """All but the task, which is the last."""
    runs: Callable[[str], Call]
    """The tool call for a shell command."""
    writes: Callable[[str, str], Call]
    """The one that writes a text into a file."""
    ends: Sequence[Part]
    """What it has to be answered to be done."""
    environment: Mapping[str, str]

    def needed(self) -> None:
        """Skips where it is not installed; where everything must be there that is a failure."""
        if not os.access(self.program, os.X_OK) or not os.access(self.program.resolve(), os.X_OK):
            reason = f"{self.program} is not there, or not for this user; `make test` installs it"
            if os.environ.get("CI") and os.geteuid() == 0:
                pytest.fail(reason)
            pytest.skip(reason)


def _claude_runs(command: str) -> Call:
    return Call("Bash", {"command": command, "description": "as asked"})


def _mini_runs(command: str) -> Call:
    return Call("bash", {"command": command})


def _mini_writes(path: str, text: str) -> Call:
    return _mini_runs(f"cat >{path} <<'EOT'\n{text}\nEOT")


_MINI_ENVIRONMENT = {
    "MSWEA_CONFIGURED": "true",  # no first-time wizard
    "MSWEA_SILENT_STARTUP": "1",
    "MSWEA_COST_TRACKING": "ignore_errors",  # it does not know what a scripted model costs
    "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "2",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no download at start
}
_MINI_ARGUMENTS = ("--yolo", "--exit-immediately", "--model", "openai/scripted-1")
_MINI_ENDS = (Text("All is done."), _mini_runs("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"))

CLAUDE = Agent(
    "claude-code",
    BUILD / "agents/node_modules/.bin/claude",
    "anthropic",
    "{type: header, header: x-api-key, from: 'env:CORRAL_TEST_KEY'}",
    ("--allowedTools", "Bash,Write,Task", "--model", "scripted-1", "-p"),
    _claude_runs,
    lambda path, text: Call("Write", {"file_path": path, "content": text}),
    (Text("All is done."),),
    {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"},
)
"""Anthropic Messages, streamed."""
MINI = Agent(
    "mini-swe-agent",
    BUILD / "demo-venv/bin/mini",
    "openai",
    "{type: bearer, from: 'env:CORRAL_TEST_KEY'}",
    (*_MINI_ARGUMENTS, "--task"),
    _mini_runs,
    _mini_writes,
    _MINI_ENDS,
    _MINI_ENVIRONMENT,
)
"""Chat Completions."""
MINI_RESPONSES = Agent(
    "mini-swe-agent (Responses)",
    MINI.program,
    "openai",
    MINI.credential,
    (*_MINI_ARGUMENTS, "--model-class", "litellm_response", "--task"),
    _mini_runs,
    _mini_writes,
    _MINI_ENDS,
    _MINI_ENVIRONMENT,
)
"""Responses."""
ALL = (CLAUDE, MINI, MINI_RESPONSES)


def policy_text(agent: Agent, server: ModelServer, workspace: Path, *, allow: str = "*", more: str = "") -> str:
    """The policy for one agent and its model. ``more`` is more of its model section."""
    base = server.url if agent.api == "anthropic" else f"{server.url}/v1"
    extra = textwrap.indent(textwrap.dedent(more).strip(), "  ")
    return (
        f"agent: {{name: {agent.name.split()[0]}}}\n"
        f"filesystem: {{watch: ['{workspace}/**']}}\n"
        "log: {keep: {prompt: 1h, response: 1h}}\n"
        f"environment: {{set: {json.dumps(dict(agent.environment))}}}\n"
        "model:\n"
        f"  allow: ['{allow}']\n"
        "  upstreams:\n"
        f"    - {{name: far, url: '{base}', api: {agent.api}, credential: {agent.credential}}}\n"
        "  prices: [{model: '*', input: 3, output: 15, cached: 0.3, written: 3.75}]\n"
        f"{extra}\n"
    )


def environment_of(agent: Agent) -> dict[str, str]:
    """The caller's: with the agent in the PATH, and keys that are nobody's business inside."""
    path = f"{agent.program.parent}:{os.environ.get('PATH', os.defpath)}"
    mine = {"PATH": path, "CORRAL_TEST_KEY": SECRET, "HOME": os.environ.get("HOME", "/")}
    return mine | dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY"), "sk-the-callers-own")


@dataclass(frozen=True, slots=True)
class Run:
    """One sandbox, with the agent's model, and its log."""

    agent: Agent
    server: ModelServer
    box: Sandbox
    workspace: Path
    log: Path

    async def work(self, task: str = TASK) -> ExecResult:
        """The agent does its task."""
        done = await self.box.exec([self.agent.program.name, *self.agent.arguments, task], timeout=PATIENCE)
        if done.exit_code != 0:
            for each in self.server.received[-1:]:
                print(each.body.decode()[-6000:])  # pytest shows it where the test fails
        return done

    # What follows is for when the sandbox has ended.

    def used(self) -> list[Used]:
        """The accounts of all calls, in order."""
        assert verified(self.log)
        return events(self.log, Used)

    def decisions(self) -> list[Decision]:
        return events(self.log, Decision)


@asynccontextmanager
async def running(agent: Agent, scripts: Sequence[Script], place: Path, **how: str) -> AsyncIterator[Run]:
    """A sandbox for an agent; ends it, and has all signed for that was recorded, when the block does."""
    agent.needed()
    workspace, log_place = place / "workspace", place / "records" / "log"
    workspace.mkdir(mode=0o755)
    with ModelServer(scripts, key=SECRET) as server:
        environment = environment_of(agent)
        policy: Policy = parse_policy(policy_text(agent, server, workspace, **how), source="test.yaml")
        log = open_log(log_place)
        try:
            box = Sandbox(workspace, policy=policy, environment=environment, log=log)
            await box.start()
            try:
                yield Run(agent, server, box, workspace, log_place)
            finally:
                await box.close()
        finally:
            await asyncio.to_thread(log.close)


def main_script(turns: Sequence[Turn]) -> Script:
    """What the agent's own conversation is answered."""
    return Script("main", turns, when=TASK, tools=True)
