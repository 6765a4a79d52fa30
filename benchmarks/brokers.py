"""Figures of the brokers: what first tokens of models, streams, and queries of data cost that go through one.

    .venv/bin/python benchmarks/brokers.py             all figures; as root, once more as an ordinary user
    .venv/bin/python benchmarks/brokers.py --quick     fewer rounds
    .venv/bin/python benchmarks/brokers.py --only first --only paced
    .venv/bin/python benchmarks/brokers.py --json      for programs

Compared with the same without a broker, and with LiteLLM's proxy where it is installed (`make build/litellm.stamp`).

Everything stays on loopback. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import sys

from _data_broker import data_postgresql_figure, data_sqlite_figure
from _model_broker import crowd_figure, fast_figure, first_figure, paced_figure
from _program import Figure, run

FIGURES = {
    "first": Figure(first_figure),
    "paced": Figure(paced_figure),
    "fast": Figure(fast_figure),
    "crowd": Figure(crowd_figure),
    "data": Figure(data_postgresql_figure),
    "data-sqlite": Figure(data_sqlite_figure),
}

if __name__ == "__main__":
    sys.exit(run(__file__, "Figures of the brokers.", FIGURES))
