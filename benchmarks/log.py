"""Figures of the log: what it costs to record, to verify, to prove, and in bytes.

    .venv/bin/python benchmarks/log.py             all figures; as root, once more as an ordinary user
    .venv/bin/python benchmarks/log.py --quick     fewer rounds
    .venv/bin/python benchmarks/log.py --only append
    .venv/bin/python benchmarks/log.py --json      for programs

Exits 1 when a bar is missed.
"""

from __future__ import annotations

import sys

from _log import append_figure, query_figure, single_figure, size_figure, verify_figure
from _program import Figure, run

FIGURES = {
    "append": Figure(append_figure),
    "single": Figure(single_figure),
    "verify": Figure(verify_figure),
    "query": Figure(query_figure),
    "size": Figure(size_figure),
}

if __name__ == "__main__":
    sys.exit(run(__file__, "Figures of the log.", FIGURES))
