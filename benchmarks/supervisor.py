"""Figures of the supervisor: what a supervised call costs, what a whole build costs, what a crowd gets.

    .venv/bin/python benchmarks/supervisor.py             all figures; as root, once more as an ordinary user
    .venv/bin/python benchmarks/supervisor.py --quick     fewer rounds
    .venv/bin/python benchmarks/supervisor.py --only calls --only crowd
    .venv/bin/python benchmarks/supervisor.py --json      for programs

Calls are compared with the same call outside, and with a supervisor in C that does the least (`minimal.c`). Exits 1
when a bar is missed.
"""

from __future__ import annotations

import sys

from _calls import CALLS, PROGRAMS, calls_figure
from _crowd import crowd_figure
from _program import Figure, run
from _work import supervised_work_figure

FIGURES = {
    "calls": Figure(lambda workspace, quick: calls_figure(workspace, 7 if quick else 40, CALLS)),
    "programs": Figure(lambda workspace, quick: calls_figure(workspace, 5 if quick else 30, PROGRAMS)),
    "work": Figure(lambda workspace, quick: supervised_work_figure(workspace, 3 if quick else 12)),
    "crowd": Figure(crowd_figure),
}

if __name__ == "__main__":
    sys.exit(run(__file__, "Figures of the supervisor of system calls.", FIGURES))
