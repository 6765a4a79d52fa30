"""What was acknowledged survives SIGKILL at any moment, under its number, and nothing else has that number."""

from __future__ import annotations

import random
from pathlib import Path

from corral.log.writer import Log
from tests.unit.log_child import start
from tests.unit.logs import KEY, checkpoint, contents, faults


def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Two at a time, one of which is killed; with files of the journal that are begun and removed all the time."""
    directory = tmp_path / "log"
    choice = random.Random(5)
    promised: dict[int, bytes] = {}
    checkpoints: list[bytes] = []
    for turn in range(20):
        children = [start("append", directory, f"{turn}{name}", 1 << 30, 600) for name in "ab"]
        for child in children:
            assert child.stdout is not None
            wanted = choice.randrange(1, 60)
            lines = [child.stdout.readline() for _ in range(wanted)]
            child.kill()
            rest, _ = child.communicate()
            # The last line may be cut off: then it was not told.
            for line in b"".join((*lines, rest)).split(b"\n")[:-1]:
                if line != b"open":
                    number, content = line.split(b" ", 1)
                    assert int(number) not in promised, "no number is given twice"
                    promised[int(number)] = content
            checkpoints.append(checkpoint(directory))
    with Log(directory, KEY, checkpoint_every=3600) as log:
        log.append(b"last")
    found = contents(directory)
    assert {number: found[number] for number in promised} == promised
    assert len(set(found)) == len(found), "no entry is there twice"
    assert len(promised) > 500
    assert faults(directory, *checkpoints) == []
