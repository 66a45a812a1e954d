"""Counts the round trips to global memory that a program waits for one after another.

Accesses to memory, barriers and branches are issued in order, and wait for their operands. A load from global memory
answers one round trip after it was issued, and a barrier waits for the slowest warp. Everything else takes no time, and
arithmetic holds nothing up, because assemblers move it. Loads that do not depend on each other thus share a round trip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .program import Address, Instruction, Operand, Register

if TYPE_CHECKING:
    from .machine import Warps

WRITES_NOTHING = ("st.", "bar", "bra", "ret", "exit", "cp.", "red.")
IN_ORDER = (*WRITES_NOTHING, "ld.")


def _registers(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Address) and operand.base is not None:
        yield operand.base.name
    elif isinstance(operand, tuple):
        for part in operand:
            yield from _registers(part)


class Clock:
    """The time of every warp of a group, in round trips."""

    def __init__(self, warps: int) -> None:
        self.now = np.zeros(warps, np.int64)
        self.ready: dict[str, np.ndarray] = {}

    def tick(self, warps: Warps, instruction: Instruction) -> None:
        """Call it before the instruction runs, with the mask of the warps that run it."""
        issued = warps.mask.any(1)
        writes = not instruction.opcode.startswith(WRITES_NOTHING)
        operands = (*instruction.operands[writes:], *([instruction.predicate] if instruction.predicate else []))
        ready = np.zeros_like(self.now)
        for name in _registers(operands):
            ready = np.maximum(ready, self.ready.get(name, 0))
        if instruction.opcode.startswith(IN_ORDER):
            self.now = ready = np.where(issued, np.maximum(self.now, ready), self.now)
        if not writes:
            return
        if instruction.opcode.startswith("ld.global"):
            asked = warps.mask
            if instruction.predicate is not None:
                asked = asked & (warps.registers[instruction.predicate.name] != instruction.negated)
            ready = ready + asked.any(1)
        for name in _registers(instruction.operands[0]):
            self.ready[name] = np.where(issued, ready, self.ready.get(name, 0))
