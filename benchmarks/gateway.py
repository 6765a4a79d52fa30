"""Figures of the egress gateway: what a connection, a query, a stream, and a crowd cost that leave through it.

    .venv/bin/python benchmarks/gateway.py             all figures; as root, once more as an ordinary user
    .venv/bin/python benchmarks/gateway.py --quick     fewer rounds
    .venv/bin/python benchmarks/gateway.py --only connect --only crowd
    .venv/bin/python benchmarks/gateway.py --json      for programs

Compared with the same on loopback outside, and with tinyproxy and mitmproxy where they are installed. Everything stays
on loopback. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import sys

from _gateway import connect_figure, crowd_figure, idle_figure, intercepted_figure, start_figure, stream_figure
from _program import Figure, run

FIGURES = {
    "start": Figure(lambda workspace, quick: start_figure(workspace, 20 if quick else 100)),
    "connect": Figure(lambda workspace, quick: connect_figure(workspace, 10 if quick else 40)),
    "stream": Figure(stream_figure),
    "intercepted": Figure(intercepted_figure),
    "crowd": Figure(crowd_figure),
    "idle": Figure(idle_figure),
}

if __name__ == "__main__":
    sys.exit(run(__file__, "Figures of the egress gateway.", FIGURES))
