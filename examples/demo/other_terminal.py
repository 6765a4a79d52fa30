"""The person at another terminal, who is asked and says no: `corral pending --watch`, then `corral deny`."""

import json
import subprocess
import threading
from pathlib import Path

REASON = "no tunnels, whatever the task"
MAX_ANSWERS = 20


class Person(threading.Thread):
    """Denies whatever is held of processes that carry the marker. Use as a context manager."""

    def __init__(self, program: Path, marker: str) -> None:
        super().__init__(daemon=True)
        self._program, self._marker = str(program), marker
        self._watch: subprocess.Popen[str] | None = None
        # Written by this thread alone, read by others after the end.
        self.denied: list[str] = []
        self.complaints: list[str] = []

    def __enter__(self) -> "Person":
        command = [self._program, "pending", "--watch", "--json"]
        self._watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            ended = self._watch.poll()
            self._watch.terminate()
            self.join()
            _, said = self._watch.communicate()
            if ended is not None:
                self.complaints.append(f"`corral pending --watch` ended with {ended}: {said.strip()}")

    def run(self) -> None:
        assert self._watch is not None and self._watch.stdout is not None
        for line in self._watch.stdout:
            held = json.loads(line)
            if self._marker in " ".join(held["argv"]) and len(self.denied) < MAX_ANSWERS:
                command = [self._program, "deny", held["id"], "--reason", REASON]
                done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
                (self.complaints if done.returncode else self.denied).append((done.stderr or done.stdout).strip())
