"""How long things take: from nothing to a first result, one more command, the whole command-line program."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import Contender, Row, clock, compare, in_turns
from _peers import peers

from corral import Sandbox, SyncSandbox
from corral.sandbox.options import Options
from corral.sandbox.prepare import prepare

COMMAND = ("true",)


def _bare() -> None:
    subprocess.run(COMMAND, stdin=subprocess.DEVNULL, capture_output=True, check=True)


async def start_figure(workspace: Path, rounds: int) -> list[Row]:
    """Create to the first exec's result, all walls on, in a running process."""
    ours: dict[str, list[float]] = {"closed": []}

    async def corral() -> float:
        started = time.perf_counter()
        box = Sandbox(workspace)
        await box.start()
        try:
            result = await box.exec(COMMAND)
            taken = time.perf_counter() - started
        finally:
            await box.close()
        assert result.exit_code == 0, result.text
        ours["closed"].append(time.perf_counter() - started)
        return taken

    def corral_sync() -> float:
        started = time.perf_counter()
        box = SyncSandbox(workspace).start()
        try:
            result = box.exec(list(COMMAND))
            return time.perf_counter() - started
        finally:
            box.close()
            assert result.exit_code == 0, result.text

    async def sync() -> float:
        return corral_sync()

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="corral-peers-") as name:
        place = Path(name)
        place.chmod(0o755)
        prepared = prepare(Options(workspace=str(workspace)))
        prepared.identity.release()
        contenders: dict[str, Contender] = {"corral": corral, "sync": sync, "fork+exec": clock(_bare)}
        missing = {}
        for peer, run in peers(prepared, place, COMMAND).items():
            if isinstance(run, str):
                missing[peer] = run
            else:
                contenders[peer] = clock(run)
        samples = await in_turns(contenders, rounds)
        bar = 1.0 if os.geteuid() == 0 else 1.2
        if "bwrap" in samples:
            rows.append(compare("start: create to first result", samples["corral"], "bwrap", samples["bwrap"], bar=bar))
            rows.append(compare("start: the same, SyncSandbox", samples["sync"], "bwrap", samples["bwrap"], bar=bar))
            closed = ours["closed"][-rounds:]
            rows.append(compare("start: and closed again", closed, "bwrap", samples["bwrap"]))
        else:
            skipped = f"skipped: {missing['bwrap']}"
            rows.append(Row("start: create to first result", peer="bwrap", bar=bar, note=skipped))
        for peer in ("fork+exec", "crun", "runsc", "sandlock"):
            if peer in samples:
                rows.append(compare("start: create to first result", samples["corral"], peer, samples[peer]))
            else:
                rows.append(Row("start: create to first result", peer=peer, note=f"skipped: {missing[peer]}"))
    return rows


async def exec_figure(workspace: Path, rounds: int) -> list[Row]:
    """One more command in a live sandbox."""
    async with Sandbox(workspace) as box:
        with SyncSandbox(workspace) as sync_box:

            async def corral() -> float:
                started = time.perf_counter()
                result = await box.exec(COMMAND)
                taken = time.perf_counter() - started
                assert result.exit_code == 0, result.text
                return taken

            sync = clock(lambda: sync_box.exec(list(COMMAND)))
            contenders = {"corral": corral, "sync": sync, "subprocess.run": clock(_bare)}
            samples = await in_turns(contenders, rounds, warm_up=5)
    bare = samples["subprocess.run"]
    return [
        compare("exec: in a live sandbox", samples["corral"], "subprocess.run", bare, bar=2.0),
        compare("exec: the same, SyncSandbox", samples["sync"], "subprocess.run", bare, bar=2.0),
    ]


async def command_figure(workspace: Path, rounds: int) -> list[Row]:
    """The whole program: `corral run -- true`."""
    script = Path(sys.executable).parent / "corral"
    start = [str(script)] if script.exists() else ["-c", "from corral.cli import main; main()"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(*words: str) -> None:
        argv = [sys.executable, *words]
        subprocess.run(argv, cwd=workspace, env=environment, stdin=subprocess.DEVNULL, check=True)

    contenders = {
        "corral": clock(lambda: run(*start, "run", "--", *COMMAND)),
        "python3 -S -c pass": clock(lambda: run("-S", "-c", "pass")),
        "python3 -c pass": clock(lambda: run("-c", "pass")),
    }
    samples = await in_turns(contenders, rounds)
    name = "command: corral run -- true"
    return [
        compare(name, samples["corral"], "python3 -S -c pass", samples["python3 -S -c pass"], bar=12.0),
        compare(name, samples["corral"], "python3 -c pass", samples["python3 -c pass"]),
    ]
