"""What every program of figures does with its arguments: measure, once more as an ordinary user, print."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from _common import Row, row_from_json, say, table, who
from _proportional import ASKED, answering

import corral

ORDINARY_USER = os.environ.get("TEST_USER", "corral-test")


@dataclass(frozen=True, slots=True)
class Figure:
    """How to get one group of rows: from an empty workspace and whether few rounds will do."""

    measure: Callable[[Path, bool], Awaitable[list[Row]]]


async def measure(figures: Mapping[str, Figure], names: list[str], quick: bool) -> list[Row]:
    """All rows of the named figures, as the user who runs this."""
    rows: list[Row] = []
    for name in names:
        say(f"{who()}: {name}")
        with tempfile.TemporaryDirectory(prefix=f"corral-bench-{name}-") as directory:
            workspace = Path(directory) / "workspace"
            workspace.mkdir(mode=0o755)
            rows += await figures[name].measure(workspace, quick)
    return rows


def measure_as(user: str, script: Path, arguments: list[str]) -> list[Row]:
    """The same figures as another user, who may not be able to look where this checkout lies: he gets a copy."""
    account = pwd.getpwnam(user)
    here, package, environment = script.parent, Path(corral.__file__).parent, Path(sys.prefix)
    with tempfile.TemporaryDirectory(prefix="corral-as-user.") as name:
        place = Path(name)
        place.chmod(0o755)
        shutil.copytree(here, place / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(environment, place / "venv", symlinks=True)
        (place / "home").mkdir()
        env = {"HOME": str(place / "home"), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        if not package.is_relative_to(environment):  # a source tree, by PYTHONPATH
            shutil.copytree(package, place / "src" / "corral")
            env["PYTHONPATH"] = str(place / "src")
        subprocess.run(["chown", "-R", f"{user}:", *map(str, place.iterdir())], check=True)
        python = place / "venv" / "bin" / Path(sys.executable).name
        with answering() as asked:
            done = subprocess.run(
                [str(python), str(place / "benchmarks" / script.name), "--json", *arguments],
                cwd=place,
                env=env | {ASKED: str(asked)},
                user=account.pw_uid,
                group=account.pw_gid,
                extra_groups=[],
                pass_fds=[asked],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                check=False,
            )
    if not done.stdout:
        raise RuntimeError(f"the run as {user} failed with exit code {done.returncode}")
    return [row_from_json(row) for row in json.loads(done.stdout)["ordinary user"]]


def run(script: str, description: str, figures: Mapping[str, Figure]) -> int:
    """Measures and prints; the exit code says whether every bar was met. ``script`` is the caller's own file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", action="append", choices=figures, help="one group of figures; may be repeated")
    parser.add_argument("--no-user", action="store_true", help="as root: not once more as an ordinary user")
    given = parser.parse_args()
    names = given.only or list(figures)
    failed = False
    results = {who(): asyncio.run(measure(figures, names, given.quick))}
    if os.geteuid() == 0 and not given.no_user:
        passed = [word for name in names for word in ("--only", name)] + (["--quick"] if given.quick else [])
        try:
            results["ordinary user"] = measure_as(ORDINARY_USER, Path(script), passed)
        except KeyError:
            say(f"there is no user {ORDINARY_USER}; run `tests/as_user.sh {ORDINARY_USER}` once, or set TEST_USER")
            failed = True  # half of the bars were not looked at
        except RuntimeError as error:
            say(f"{error}; what root measured is still shown")
            failed = True
    if given.json:
        print(json.dumps({name: [row.as_json() for row in rows] for name, rows in results.items()}, indent=1))
    else:
        machine = f"{os.cpu_count()} processors, Linux {platform.release()}, Python {platform.python_version()}"
        for name, rows in results.items():
            print(table(f"\n{name} ({machine})", rows))
    return 1 if failed or any(row.met is False for rows in results.values() for row in rows) else 0
