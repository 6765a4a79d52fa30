"""What an execve(2) says, copied from its caller's memory, and what the first line of a script says."""

from __future__ import annotations

import errno as errors
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

from corral.supervisor import memory
from corral.supervisor.call import Call

MAX_ARGUMENTS = 1024
"""Arguments of one program that are looked at."""
MAX_ARGUMENT_BYTES = 64 << 10
"""Bytes of them."""
MAX_LINE = 256
"""Bytes of a script's first line that the kernel looks at (BINPRM_BUF_SIZE)."""
_POINTER = 8
_LIKELY_LENGTH = 256
_GATHERED = 256
_BLANKS = b" \t"
_NO_ARGUMENTS = (b"",)  # Linux 5.18 and later: nobody starts without a name


@dataclass(frozen=True, slots=True)
class Invocation:
    """``path`` and arguments as the caller gave them; ``truncated`` where there are more of the latter."""

    directory: int
    path: bytes
    argv: tuple[bytes, ...]
    truncated: bool
    flags: int = 0

    @property
    def texts(self) -> tuple[str, ...]:
        """The arguments for records and rules."""
        return tuple(text.decode("utf-8", "replace") for text in self.argv)


def copy(call: Call, directory: int, path: bytes, arguments: int, flags: int) -> Invocation:
    """Reads the arguments, which lie at an address. Raises OSError: EFAULT; EPERM where they cannot be read."""
    return Invocation(directory, path, *_arguments(call, arguments), flags)


def _arguments(call: Call, address: int) -> tuple[tuple[bytes, ...], bool]:
    if address == 0:
        return _NO_ARGUMENTS, False
    found: list[bytes] = []
    left = MAX_ARGUMENT_BYTES
    while len(found) < MAX_ARGUMENTS:
        pointers, ended = _pointers(call, address + _POINTER * len(found), min(_GATHERED, MAX_ARGUMENTS - len(found)))
        for text in _texts(call, pointers, left):
            if text is None or len(text) + 1 > left:
                return tuple(found), True
            left -= len(text) + 1
            found.append(text)
        if ended:
            return tuple(found) or _NO_ARGUMENTS, False
    return tuple(found), True


def _pointers(call: Call, address: int, limit: int) -> tuple[list[int], bool]:
    """Up to ``limit`` of them, no further than to the end of a page, and whether these are the last."""
    length = min(limit * _POINTER, max(_POINTER, (memory.PAGE - address % memory.PAGE) // _POINTER * _POINTER))
    values = struct.unpack(f"<{length // _POINTER}Q", call.read(address, length))
    if 0 in values:
        return list(values[: values.index(0)]), True
    return list(values), False


def _texts(call: Call, pointers: list[int], left: int) -> list[bytes | None]:
    """What they point to; None for one that is longer than ``left`` bytes."""
    if not pointers:
        return []
    # Most arguments are short, and one call reads them all: each place lies in one page, so it is there or not.
    places = [(pointer, min(_LIKELY_LENGTH, memory.PAGE - pointer % memory.PAGE)) for pointer in pointers]
    data = memory.gather(call.tid, places)
    found: list[bytes | None] = []
    at = 0
    for pointer, length in places:
        text, end, _ = data[at : at + length].partition(b"\0")
        at += length
        if not end:
            try:
                text = call.read_text(pointer, left)
            except OSError as error:
                if error.errno != errors.ENAMETOOLONG:
                    raise
                return [*found, None]
        found.append(text)
        left -= len(text) + 1
        if left <= 0:
            break
    return found


class Script(NamedTuple):
    """What a script's first line names."""

    interpreter: bytes
    argument: bytes | None


def read_script(start: bytes) -> Script | None:
    """The program that runs a file that begins so (execve(2), "Interpreter scripts"), or None where it is no script.

    As fs/binfmt_script.c reads it. Where the kernel would refuse the line, whatever is found here does not matter.
    """
    if not start.startswith(b"#!"):
        return None
    line = start[2:MAX_LINE].split(b"\n", 1)[0].strip(_BLANKS).split(b"\0", 1)[0]
    for at, character in enumerate(line):
        if character in _BLANKS:
            return Script(line[:at], line[at:].strip(_BLANKS))
    return Script(line, None)


def as_name(path: bytes, directory: int, at_fdcwd: int) -> bytes:
    """What the kernel calls a file that was given from a directory's descriptor (execveat(2), "fdpath")."""
    if path.startswith(b"/") or directory == at_fdcwd:
        return path
    return os.fsencode(f"/dev/fd/{directory}") + (b"/" + path if path else b"")
