"""For all tests."""

from __future__ import annotations

import signal

# A runner in the background of a shell hands down that Ctrl-C is ignored; tests interrupt themselves with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
