"""What the walls cost those who work inside: a C build, a test suite, and nothing but open and stat."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from _common import Contender, Row, compare, in_turns, say

from corral import Sandbox
from corral.policy.profiles import PROFILES

BAR = 1.03

_SOURCE = """
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include "shared.h"

struct node_N { struct node_N *left, *right; char key[32]; double weight; };

static struct node_N *insert_N(struct node_N *node, const char *key, double weight)
{
    if (!node) {
        node = calloc(1, sizeof *node);
        snprintf(node->key, sizeof node->key, "%s", key);
        node->weight = weight;
        return node;
    }
    int order = strcmp(key, node->key);
    if (order < 0) node->left = insert_N(node->left, key, weight);
    else if (order > 0) node->right = insert_N(node->right, key, weight);
    else node->weight += weight;
    return node;
}

static double sum_N(const struct node_N *node)
{
    return node ? node->weight + sum_N(node->left) + sum_N(node->right) : 0;
}

double part_N(const char *text)
{
    struct node_N *root = NULL;
    char word[32];
    size_t length = 0;
    for (const char *at = text; ; at++) {
        if (isalnum((unsigned char)*at) && length + 1 < sizeof word) { word[length++] = (char)tolower(*at); continue; }
        if (length) { word[length] = 0; root = insert_N(root, word, sqrt((double)length)); length = 0; }
        if (!*at) break;
    }
    return sum_N(root);
}
"""

_MAKEFILE = """
OUT ?= out
OBJECTS := $(patsubst %.c,$(OUT)/%.o,$(wildcard *.c))
$(OUT)/program: $(OBJECTS)
\t$(CC) -o $@ $^ -lm
$(OUT)/%.o: %.c shared.h | $(OUT)
\t$(CC) -O2 -c -o $@ $<
$(OUT):
\tmkdir -p $@
"""

_TESTS = """
import json, os, subprocess, sys
import pytest

@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({str(n): n * n for n in range(200)}))
    return path

@pytest.mark.parametrize("number", range(12))
def test_squares(table, number):
    assert json.loads(table.read_text())[str(number)] == number ** 2

def test_tree(tmp_path):
    for n in range(40):
        (tmp_path / f"d{n % 5}").mkdir(exist_ok=True)
        (tmp_path / f"d{n % 5}" / f"f{n}").write_text("x" * n)
    assert sum(len(files) for _, _, files in os.walk(tmp_path)) == 40

def test_program():
    assert subprocess.run(["true"]).returncode == 0
"""

_WALKER = r"""
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static long files;

static void walk(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (fd < 0)
        return;
    DIR *directory = fdopendir(fd);
    for (struct dirent *entry; (entry = readdir(directory));) {
        struct stat status;
        char byte;
        if (entry->d_name[0] == '.' || fstatat(fd, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        if (S_ISDIR(status.st_mode)) {
            walk(fd, entry->d_name);
        } else if (S_ISREG(status.st_mode)) {
            int file = openat(fd, entry->d_name, O_RDONLY);
            if (file >= 0) {
                fstat(file, &status);
                files += read(file, &byte, 1) >= 0;
                close(file);
            }
        }
    }
    closedir(directory);
}

int main(int argc, char **argv)
{
    for (int pass = 0; pass < atoi(argv[1]); pass++)
        for (int i = 2; i < argc; i++)
            walk(AT_FDCWD, argv[i]);
    return files < 1000;
}
"""

_PYTHON_WALKER = """
import os, sys
for tree in sys.argv[1:] * 2:
    for directory, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(directory, name)
            os.stat(path)
            with open(path, 'rb') as file:
                file.read(1)
"""


def fill(workspace: Path, compiler: str) -> None:
    """Writes what is worked on: `build/`, `suite/`, `files/` and `walker`."""
    build, suite, files = workspace / "build", workspace / "suite", workspace / "files"
    for directory in (build, suite, files):
        directory.mkdir()
    calls = "".join(f"double part_{n}(const char *);\n" for n in range(40))
    (build / "shared.h").write_text(calls)
    for number in range(40):
        (build / f"part{number}.c").write_text(_SOURCE.replace("_N", f"_{number}"))
    total = " + ".join(f"part_{n}(argv[0])" for n in range(40))
    main = f"int main(int argc, char **argv) {{ return argc > 1 && {total} < 0; }}"
    (build / "main.c").write_text(f'#include "shared.h"\n{main}\n')
    (build / "Makefile").write_text(_MAKEFILE)
    for number in range(25):
        (suite / f"test_part{number}.py").write_text(_TESTS)
    for number in range(3000):
        directory = files / f"d{number % 60}" / f"e{number % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_text("content\n")
    source = workspace / "walker.c"
    source.write_text(_WALKER)
    subprocess.run([compiler, "-O2", "-o", workspace / "walker", source], check=True)


class Work:
    """One kind of work, done inside and outside.

    What a sandbox changes lies in memory. So that this is no advantage, new files lie in memory outside too.
    """

    def __init__(self, box: Sandbox, workspace: Path, environment: Mapping[str, str], scratch: str) -> None:
        self.box, self.workspace, self.environment, self.scratch = box, workspace, environment, scratch
        self.cpu: dict[str, list[float]] = {"inside": [], "outside": []}
        self._count = 0

    def _argv(self, words: Sequence[str], scratch: str) -> list[str]:
        self._count += 1
        return [word.replace("{scratch}", f"{scratch}/{self._count}") for word in words]

    def contenders(self, words: Sequence[str], directory: str) -> dict[str, Contender]:
        """Both sides of the comparison; ``{scratch}`` in a word becomes a new place for output."""
        place = self.workspace / directory

        async def inside() -> float:
            argv = self._argv(words, "/tmp")
            started = time.perf_counter()
            result = await self.box.exec(argv, directory=str(place), env=self.environment)
            taken = time.perf_counter() - started
            assert result.exit_code == 0, result.text
            self.cpu["inside"].append(result.usage.user_seconds + result.usage.system_seconds)
            return taken

        async def outside() -> float:
            argv = self._argv(words, self.scratch)
            environment = {**self.environment, "TMPDIR": self.scratch}
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            done = subprocess.run(
                argv, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
            taken = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert done.returncode == 0, done.stdout + done.stderr
            self.cpu["outside"].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            return taken

        return {"inside": inside, "outside": outside}


async def _measure(
    figure: str,
    box: Sandbox,
    workspace: Path,
    words: Sequence[str],
    directory: str,
    rounds: int,
    bar: float = BAR,
) -> Row:
    environment = {"PATH": box.core.prepared.environment["PATH"], "LANG": "C.UTF-8", "HOME": "/nonexistent"}
    say(f"  {figure}")
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="corral-bench-", dir=in_memory) as scratch:
        work = Work(box, workspace, environment, scratch)
        samples = await in_turns(work.contenders(words, directory), rounds, warm_up=1)
    cpu = {side: statistics.median(seconds[1:]) for side, seconds in work.cpu.items()}
    note = f"processor time: {cpu['inside'] * 1e3:.0f} ms inside, {cpu['outside'] * 1e3:.0f} ms outside"
    note += f", ratio {cpu['inside'] / cpu['outside']:.3f}"
    return compare(figure, samples["inside"], "outside", samples["outside"], bar=bar, note=note)


class _Place:
    """What there is to work on, and with what."""

    def __init__(self, workspace: Path) -> None:
        """Raises FileNotFoundError where there is no C compiler or no make."""
        compiler, make = shutil.which("cc") or shutil.which("gcc"), shutil.which("make")
        if compiler is None or make is None:
            raise FileNotFoundError("no C compiler or no make")
        fill(workspace, compiler)
        # The virtual environment is one of the tools that PATH names, and so it is shown inside.
        programs = str(Path(sys.executable).parent)
        self.caller = {"PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        self.build = [make, "-s", "-j2", "OUT={scratch}"]
        self.suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]


async def work_figure(workspace: Path, rounds: int) -> list[Row]:
    """The three kinds of work."""
    try:
        place = _Place(workspace)
    except FileNotFoundError as error:
        return [Row("work: C build", bar=BAR, note=f"skipped: {error}")]
    trees = [tree for tree in (str(workspace / "files"), "/usr/include") if os.path.isdir(tree)]
    walker, python = str(workspace / "walker"), [sys.executable, "-S", "-c", _PYTHON_WALKER]
    async with Sandbox(workspace, environment=place.caller) as box:
        rows = [
            await _measure("work: C build, make -j2", box, workspace, place.build, "build", rounds),
            await _measure("work: pytest, 350 tests", box, workspace, place.suite, "suite", rounds),
            await _measure("work: open, stat, read 1 byte; C", box, workspace, [walker, "8", *trees], ".", rounds * 2),
            await _measure("work: the same; Python", box, workspace, [*python, *trees], ".", rounds),
        ]
        for tree in trees:
            figure = f"work: the same; C, {Path(tree).name} only"
            row = await _measure(figure, box, workspace, [walker, "8", tree], ".", rounds)
            rows.append(replace(row, bar=None))
    return rows


async def supervised_work_figure(workspace: Path, rounds: int) -> list[Row]:
    """The build and the test suite with the profile that is meant for them."""
    bar, profile = 1.05, "coding-agent"
    try:
        place = _Place(workspace)
    except FileNotFoundError as error:
        return [Row(f"{profile}: C build", bar=bar, note=f"skipped: {error}")]
    async with Sandbox(workspace, policy=PROFILES[profile], environment=place.caller) as box:
        return [
            await _measure(f"{profile}: C build, make -j2", box, workspace, place.build, "build", rounds, bar),
            await _measure(f"{profile}: pytest, 350 tests", box, workspace, place.suite, "suite", rounds, bar),
        ]
