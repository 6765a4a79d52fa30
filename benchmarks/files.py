"""Figures of layers: what it costs to take a snapshot, to go back, to fork, and to apply.

    .venv/bin/python benchmarks/files.py             all figures; as root, once more as an ordinary user
    .venv/bin/python benchmarks/files.py --quick     fewer rounds, smaller trees
    .venv/bin/python benchmarks/files.py --only fork
    .venv/bin/python benchmarks/files.py --json      for programs

Exits 1 when a bar is missed.
"""

from __future__ import annotations

import sys

from _files import apply_figure, fork_figure, overlay_figure, restore_figure, snapshot_figure
from _program import Figure, run

FIGURES = {
    "snapshot": Figure(snapshot_figure),
    "restore": Figure(restore_figure),
    "fork": Figure(fork_figure),
    "apply": Figure(apply_figure),
    "overlay": Figure(overlay_figure),
}

if __name__ == "__main__":
    sys.exit(run(__file__, "Figures of layers.", FIGURES))
