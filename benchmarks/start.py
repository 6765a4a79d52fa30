"""Figures of one sandbox's life: start, exec, cost at rest, cost for the work inside, end.

    .venv/bin/python benchmarks/start.py             all figures; as root, once more as an ordinary user
    .venv/bin/python benchmarks/start.py --quick     fewer rounds
    .venv/bin/python benchmarks/start.py --only exec --only kill
    .venv/bin/python benchmarks/start.py --json      for programs

What each is compared with, and by which means, is told in `_common.py` and `_peers.py`. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import sys

from _latency import command_figure, exec_figure, start_figure
from _program import Figure, run
from _scale import kill_figure, many_figure
from _work import work_figure

FIGURES = {
    "start": Figure(lambda workspace, quick: start_figure(workspace, 15 if quick else 100)),
    "exec": Figure(lambda workspace, quick: exec_figure(workspace, 50 if quick else 300)),
    "command": Figure(lambda workspace, quick: command_figure(workspace, 10 if quick else 40)),
    "many": Figure(many_figure),
    "kill": Figure(lambda workspace, quick: kill_figure(workspace, 2 if quick else 7)),
    "work": Figure(lambda workspace, quick: work_figure(workspace, 3 if quick else 12)),
}

if __name__ == "__main__":
    sys.exit(run(__file__, "Figures of one sandbox's life, next to its peers.", FIGURES))
