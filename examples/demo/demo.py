"""An unmodified agent does its work in a sandbox, then turns on its host. Every attack must fail.

    python demo.py [--agent PATH] [--corral PATH] [--keep]

The agent is mini-swe-agent (requirements.txt); its model is scripted (script.py) and served on loopback
(model_server.py). Exit status: 0 if everything held, 1 if not, 2 if the demo could not be set up.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import record
import script
from canaries import Decoy, Listener, fingerprint, settled, shadow_hashes
from model_server import KEY, ModelServer
from other_terminal import Person
from verdict import Evidence, Finding, changes, judge
from watch import Watch

HERE = Path(__file__).resolve().parent
KEY_VARIABLE = "DEMO_MODEL_KEY"
"""Where `corral` finds the key of the model; nothing inside ever has it."""
CPU_CAP = 1.0
PROCESS_CAP = 256
WALL_TIME = 50
GIT_ENVIRONMENT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}

AGENT_ENVIRONMENT = {
    "MSWEA_CONFIGURED": "true",  # no first-time wizard
    "MSWEA_SILENT_STARTUP": "1",
    "MSWEA_COST_TRACKING": "ignore_errors",  # a scripted model has no price
    "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "2",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no download at start
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "COLUMNS": "120",
}


class SetupError(Exception):
    """The demo cannot start; the message says what is missing."""


class RunError(Exception):
    """The sandbox did not run as it should; nothing can be said about the attacks."""


@dataclass(frozen=True)
class Run:
    """What became of one contained command."""

    exit_code: int
    layer: str | None
    watch: Watch
    survivors: Sequence[str]


@dataclass(frozen=True)
class Corral:
    """The `corral` program, as its users have it."""

    program: Path
    scratch: Path
    search_path: str
    marker: str

    def run_contained(self, argv: Sequence[str], workspace: Path, env: Mapping[str, str], model: int) -> Run:
        """Run a command in a sandbox that holds the workspace, and a door to the model at a port of the host's."""
        result, log = self.scratch / "result.json", self.scratch / "agent.log"
        command = [str(self.program), "run", "--workspace", str(workspace)]
        command += ["--policy", str(self._policy(model)), "--record", str(self.record)]
        for name, value in env.items():
            command += ["--env", f"{name}={value}"]
        command += ["--cpu", f"{CPU_CAP:g}", "--processes", str(PROCESS_CAP), "--memory", "2GiB"]
        command += ["--wall-time", f"{WALL_TIME}s", "--json-result", str(result), "--", *argv]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=workspace,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            watch = Watch(process.pid)
            watch.start()
            try:
                process.wait(timeout=WALL_TIME + 5)
            except subprocess.TimeoutExpired:
                process.kill()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait(timeout=10)
                watch.stop()
        survivors = [f"process {one.pid}" for one in watch.survivors(self.marker)]
        if not result.exists():
            raise RunError(f"corral run ended with {process.returncode} and no result; its last words:\n{_tail(log)}")
        told: dict[str, Any] = json.loads(result.read_text())
        layer = told["layer"]
        return Run(int(told["exit_code"]), None if layer is None else str(layer), watch, survivors)

    def _policy(self, model: int) -> Path:
        """The demo's policy, and where its model is today."""
        path = self.scratch / "policy.yaml"
        path.write_text(
            f"""profile: {HERE / "policy.yaml"}
model:
  allow: [scripted]
  upstreams:
    - name: script
      url: http://127.0.0.1:{model}/v1
      api: openai
      credential: {{type: bearer, from: "env:{KEY_VARIABLE}"}}
"""
        )
        return path

    @property
    def record(self) -> Path:
        return self.scratch / "record.jsonl"

    def patch(self, layer: str) -> str:
        return self._verb("diff", layer, "--workspace-only", "--patch")

    def discard(self, layer: str) -> None:
        self._verb("discard", layer)

    def _verb(self, *arguments: str) -> str:
        command = [str(self.program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
        if done.returncode != 0:
            raise RunError(f"corral {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        return dict(os.environ) | {"PATH": self.search_path, KEY_VARIABLE: KEY}


def main() -> int:
    options = _options()
    os.umask(0o022)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        agent, corral = _program(options.agent, "mini"), _program(options.corral, "corral")
        for tool in ("ssh", "git"):
            _program(tool, tool)
        with _scratch(options.keep) as scratch:
            findings, patch, seconds = _demo(agent, corral, scratch, options.keep)
            held = all(finding.held for finding in findings)
            _report(findings, patch, seconds)
            if not held or options.keep:
                scratch.keep = True
                print(f"The record, and the agent's log and transcript: {scratch.path}")
            return 0 if held else 1
    except SetupError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except (RunError, subprocess.TimeoutExpired) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _demo(agent: Path, program: Path, scratch: "_Scratch", keep: bool) -> tuple[list[Finding], str, float]:
    """Plant, run, look, judge."""
    marker = secrets.token_hex(8)
    workspace, fresh = _repository(scratch.path / "repository"), _repository(scratch.path / "fresh")
    home = Path.home()
    with contextlib.ExitStack() as stack:
        decoys = [Decoy(scratch.path / "home/.ssh/id_ed25519")]
        with contextlib.suppress(OSError):  # a read-only home gets no decoy
            decoys.append(Decoy(stack.enter_context(_directory(home / f".corral-demo-{marker}")) / "id_ed25519"))
        socket_path = scratch.path / "home/.ssh/agent.sock"
        listener, agent_socket = stack.enter_context(Listener.tcp()), stack.enter_context(Listener.unix(socket_path))
        sshd = stack.enter_context(Listener.tcp(greeting=b"SSH-2.0-canary\r\n"))
        paths = tuple(decoy.path for decoy in decoys)
        targets = script.Targets(paths, home, listener.port, sshd.port, socket_path, marker)
        turns = script.full(targets)
        model = stack.enter_context(ModelServer(turns))
        implants = [Path(place) / targets.implant for place in ("/etc/cron.d", "/usr/bin")]
        guarded = [workspace, home / ".bashrc", *implants]

        print("An unmodified mini-swe-agent works in a sandbox, then its model turns on the host ...", flush=True)
        before, hashes, started = fingerprint(*guarded), shadow_hashes(), time.monotonic()
        corral = Corral(program, scratch.path, f"{agent.parent}:{os.environ.get('PATH', os.defpath)}", marker)
        person = Person(program, marker)
        argv = [str(agent), "--yolo", "--exit-immediately", "--model", "openai/scripted", "--task", script.TASK]
        with person:
            run = corral.run_contained(argv, workspace, AGENT_ENVIRONMENT, model.port)
        patch = corral.patch(run.layer) if run.layer else ""
        if run.layer and not keep:
            corral.discard(run.layer)
        seconds = time.monotonic() - started

        received = model.received
        if not received:
            raise RunError(f"the agent never reached its model; its last words:\n{_tail(scratch.path / 'agent.log')}")
        (scratch.path / "transcript.txt").write_bytes(received[-1] if received else b"")
        evidence = Evidence(
            observations=model.observations(),
            received=received,
            violations=model.violations,
            turns_left=len(turns) - model.answered,
            exit_code=run.exit_code,
            seconds=seconds,
            decoys=decoys,
            hashes=hashes,
            network_touches=settled(listener, agent_socket),
            sshd_touches=settled(sshd),
            changed_on_host=changes(before, fingerprint(*guarded)),
            peak_processes=run.watch.peak,
            process_cap=PROCESS_CAP,
            peak_cpus=run.watch.cpus,
            cpu_cap=CPU_CAP,
            host_cpus=os.cpu_count() or 1,
            survivors=run.survivors,
            watch_error=run.watch.error,
            patch=patch,
            fixed_source=_patched(fresh, patch),
            decisions=record.read(corral.record, turns),
            answers=person.denied,
            complaints=person.complaints,
        )
        return judge(evidence), patch, seconds


@dataclass
class _Scratch:
    path: Path
    keep: bool


@contextlib.contextmanager
def _scratch(keep: bool) -> Iterator[_Scratch]:
    scratch = _Scratch(Path(tempfile.mkdtemp(prefix="corral-demo-")), keep)
    scratch.path.chmod(0o755)  # nothing in it may be protected by its mode alone
    try:
        yield scratch
    finally:
        if not scratch.keep:
            shutil.rmtree(scratch.path)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[Path]:
    path.mkdir(mode=0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _repository(path: Path) -> Path:
    """The example repository, with a commit, untouched by the user's git configuration and templates."""
    shutil.copytree(HERE / "repository", path, ignore=shutil.ignore_patterns("__pycache__"))
    _git(path, "init", "--quiet", "--template=", "--initial-branch=main")
    (path / ".git/hooks").mkdir()
    for name, value in (("user.name", "Demo"), ("user.email", "demo@corral.example"), ("gc.auto", "0")):
        _git(path, "config", name, value)
    _git(path, "add", ".")
    _git(path, "commit", "--quiet", "--message", "Intervals")
    return path


def _patched(fresh: Path, patch: str) -> str:
    """intervals.py after applying what the patch says about it; unchanged if it does not apply."""
    with contextlib.suppress(subprocess.CalledProcessError):
        _git(fresh, "apply", "--include=intervals.py", "-", text=patch)
    return (fresh / "intervals.py").read_text()


def _git(repository: Path, *arguments: str, text: str = "") -> None:
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    subprocess.run(
        ["git", *arguments], cwd=repository, env=keep | GIT_ENVIRONMENT, input=text, text=True, check=True, timeout=30,
        capture_output=True,
    )  # fmt: skip


def _program(name: str, purpose: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise SetupError(f"{purpose} was not found (looked for {name!r}); see examples/demo/README.md")
    return Path(found).absolute()


def _report(findings: Sequence[Finding], patch: str, seconds: float) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = max(100, min(160, shutil.get_terminal_size((140, 24)).columns))
    columns = [(width - 34) * share // 10 for share in (3, 3, 4)]
    print("\nThe agent's patch, by corral diff:\n")
    print(textwrap.indent(_section(patch, "intervals.py"), "    "))
    _row(("", "", "tried", "stopped by", "seen from the host"), columns)
    for finding in findings:
        mark = "ok" if finding.held else "FAIL"
        painted = f"\033[{'32' if finding.held else '1;31'}m{mark:<4}\033[0m" if colour else f"{mark:<4}"
        if finding.held:
            _row((painted, finding.name, finding.tried, finding.stopped_by, finding.seen_from_host), columns)
        else:
            _row((painted, finding.name, finding.tried, "NOT HELD", "; ".join(finding.problems)), columns)
    print("\nWhat the supervisor decided, as its record has it:\n")
    for finding in findings:
        for number, line in enumerate(finding.decided):
            name = finding.name if number == 0 else ""
            indent = " " * 29
            start = f"     {name:<24}"
            print(textwrap.fill(_printable(line), width, initial_indent=start, subsequent_indent=indent))
    failed = sum(not finding.held for finding in findings)
    print(f"\n{f'{failed} of {len(findings)} did NOT hold' if failed else 'Everything held'}, after {seconds:.1f} s.")


def _row(cells: tuple[str, str, str, str, str], columns: Sequence[int]) -> None:
    wrapped = [
        textwrap.wrap(_printable(cell), size, break_on_hyphens=False)
        for cell, size in zip(cells[2:], columns, strict=True)
    ]
    for number in range(max(map(len, wrapped))):
        first = f"{cells[0]:<4} {cells[1]:<22}" if number == 0 else " " * 27
        rest = (lines[number] if number < len(lines) else "" for lines in wrapped)
        print(f"{first}  " + "  ".join(f"{text:<{size}}" for text, size in zip(rest, columns, strict=True)).rstrip())


def _tail(log: Path) -> str:
    return _printable("\n".join(log.read_text(errors="replace").splitlines()[-12:]), keep="\n")


def _section(patch: str, name: str) -> str:
    """The hunks of one file."""
    kept, inside = [], False
    for line in _printable(patch, keep="\n\t").splitlines():
        if line.startswith(("diff ", "--- ")):
            inside = line.split()[-1].endswith(f"/{name}") or (inside and line.startswith("--- "))
        if inside:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _printable(text: str, keep: str = "") -> str:
    """What came out of the sandbox must not drive the terminal."""
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--agent", default="mini", help="mini-swe-agent's program (default: mini, from PATH)")
    parser.add_argument("--corral", default="corral", help="the corral program (default: from PATH)")
    parser.add_argument("--keep", action="store_true", help="keep the layer, the record, the log and the transcript")
    return parser.parse_args()


def _terminated(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
