"""Writes the classic BPF programs that seccomp(2) takes: tests of the number and of the argument registers."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from corral.supervisor.syscalls import Condition

# struct seccomp_data { int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]; }, little endian
OFFSET_NUMBER, OFFSET_ARCH, _OFFSET_ARGUMENTS = 0, 4, 16

LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP = 0x05  # BPF_JMP | BPF_JA
JUMP_EQ = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_GE = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_FURTHEST = 255  # a conditional jump's offset is one byte


class Program:
    """A classic BPF program, written from its end to its start, as its jumps only go forward.

    A label is the count of instructions from the labelled one to the end. Each method adds instructions before all that
    exist and returns the label of the first of them.
    """

    def __init__(self) -> None:
        self._reversed: list[tuple[int, int, int, int]] = []
        self._results: dict[int, int] = {}

    def encode(self) -> bytes:
        return b"".join(struct.pack("<HBBI", *instruction) for instruction in reversed(self._reversed))

    def _add(self, code: int, operand: int, if_true: int = 0, if_false: int = 0) -> int:
        self._reversed.append((code, if_true, if_false, operand))
        return len(self._reversed)

    def _near(self, label: int, ahead: int) -> int:
        """A label that leads to ``label`` and stays in a conditional jump's reach after ``ahead`` more instructions."""
        if len(self._reversed) + ahead - label <= _FURTHEST:
            return label
        return self._add(_JUMP, len(self._reversed) - label)

    def result(self, value: int) -> int:
        """Ends with ``value``; a result that is still near is used again."""
        label = self._results.get(value)
        if label is None or len(self._reversed) - label > _FURTHEST // 2:
            label = self._results[value] = self._add(_RETURN, value)
        return label

    def then(self, code: int, operand: int, label: int) -> int:
        """An instruction that goes on to ``label``."""
        if label != len(self._reversed):
            self._add(_JUMP, len(self._reversed) - label)
        return self._add(code, operand)

    def test(self, code: int, operand: int, if_true: int, if_false: int) -> int:
        """A conditional jump."""
        if_true = self._near(if_true, 1)  # 1: the next line may add a jump
        if_false = self._near(if_false, 0)
        here = len(self._reversed)
        return self._add(code, operand, here - if_true, here - if_false)

    def any_holds(self, alternatives: Sequence[tuple[Condition, ...]], result: int, otherwise: int) -> int:
        """Ends with ``result`` if all conditions of one of ``alternatives`` hold, else with ``otherwise``."""
        label = self.result(otherwise)
        for when in reversed(alternatives):
            unmatched = label
            label = self.result(result)
            for condition in reversed(when):
                label = self._condition(condition, label, unmatched)
        return label

    def _condition(self, condition: Condition, if_held: int, otherwise: int) -> int:
        listed, unlisted = (otherwise, if_held) if condition.negated else (if_held, otherwise)
        label = unlisted
        for value in reversed(condition.values):
            label = self.test(JUMP_EQ, value, listed, label)
        if condition.mask != 0xFFFFFFFF:
            label = self.then(_AND, condition.mask, label)
        return self.then(LOAD, _OFFSET_ARGUMENTS + 8 * condition.argument + 4 * condition.high, label)

    def search(self, ranges: Sequence[tuple[int, int | str]], blocks: Mapping[str, int]) -> int:
        """A binary search for the range that the number in the accumulator is in."""
        if len(ranges) == 1:
            action = ranges[0][1]
            return blocks[action] if isinstance(action, str) else self.result(action)
        middle = len(ranges) // 2
        upper = self.search(ranges[middle:], blocks)
        lower = self.search(ranges[:middle], blocks)
        return self.test(JUMP_GE, ranges[middle][0], upper, lower)
