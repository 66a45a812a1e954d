"""Grids, warps, divergence and barriers.

A block of code runs for all threads of some warps that have reached it, lowest block first, so that divergent threads
reconverge where the code does. Triton numbers blocks so that a GPU reconverges at the same place.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .clock import Clock
from .instructions import TYPES, Step, compile_step
from .memory import Counts, GlobalMemory, Problem, SharedMemory, Threads, sectors, wavefronts
from .program import Instruction, Program, parse

ORDERS = ("together", "forward", "backward", "shuffled")
GONE = 1 << 30  # the block of threads that have returned
WARPS_SIDE_BY_SIDE = 64  # over all concurrent thread blocks; wider arrays save calls, not work
PROBLEMS_KEPT = 16  # of each kind
STEP_LIMIT = (
    20_000_000  # warp instructions in one set of blocks; far above any kernel of the tests, so it detects hangs
)


@dataclass
class Launch:
    """The counts and problems of a launch."""

    name: str
    grid: tuple[int, int, int]
    counts: Counts
    problems: list[Problem] = field(default_factory=list)
    """The first of each kind; `problem_count` is how many there were."""
    problem_count: int = 0


class Kernel:
    """A program that is ready to run."""

    def __init__(self, ptx: str):
        self.program: Program = parse(ptx)
        self.steps: list[list[Step]] = [[compile_step(i) for i in b.instructions] for b in self.program.blocks]
        self.opcodes = [Counter(i.opcode for i in b.instructions) for b in self.program.blocks]
        self.global_unit = self._narrowest("global")
        self.shared_unit = self._narrowest("shared")

    def _narrowest(self, space: str) -> int:
        """Bytes of the program's narrowest access to a space, at most 16. The shadow has one entry per unit."""
        narrowest = 16
        for block in self.program.blocks:
            for instruction in block.instructions:
                found = re.match(rf"(?:ld|st)\.{space}(?:::cta)?(?:\.v\d)?\.[bsuf](\d+)", instruction.opcode)
                if found:
                    vector = re.search(r"\.v(\d)", instruction.opcode)
                    narrowest = min(narrowest, int(found[1]) // 8 * int(vector[1] if vector else 1))
                if instruction.opcode.endswith(".shared.global"):
                    narrowest = min(narrowest, instruction.operands[2].bits)
        return narrowest


def run(
    kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[int | float | np.ndarray], *, warps: int,
    shared: int = 0, order: str = "together", spans: Sequence[tuple[int, int]] = (), timed: bool = False,
) -> Launch:  # fmt: skip
    """Run a kernel.

    ``arguments`` in the order of its parameters; an array stands for its address and may be touched. ``spans`` are more
    addresses that may be, ``shared`` the bytes of shared memory of a block, ``warps`` how many a block has. ``timed``:
    round trips are counted, which takes as long as running.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    own = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arguments if isinstance(a, np.ndarray)]
    memory = GlobalMemory([*own, *spans], kernel.global_unit)
    launch = Launch(kernel.program.name, grid, Counts())
    parameters = _pack(kernel.program, [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments])
    blocks = np.arange(grid[0] * grid[1] * grid[2])
    if order == "backward":
        blocks = blocks[::-1]
    elif order == "shuffled":
        blocks = np.random.default_rng(0).permutation(blocks)
    side_by_side = max(1, WARPS_SIDE_BY_SIDE // warps)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), side_by_side):
            _Blocks(kernel, grid, blocks[first : first + side_by_side], warps, shared, order, memory, parameters,
                    launch, timed).run()  # fmt: skip
    launch.counts.touched_load_sectors = sum(int(touched.sum()) for touched in memory.loaded)
    launch.counts.touched_store_sectors = sum(int(touched.sum()) for touched in memory.stored)
    return launch


def _pack(program: Program, arguments: Sequence[int | float]) -> dict[str, bytes]:
    """Arguments as the bytes of their parameters; Triton's scratch pointers behind them are null."""
    spare = len(program.parameters) - len(arguments)
    if not 0 <= spare <= 2:
        raise ValueError(f"arguments: expected {len(program.parameters)} or up to 2 less, got {len(arguments)}")
    packed = {}
    for (name, kind), value in zip(program.parameters.items(), [*arguments, *[0] * spare], strict=True):
        size = TYPES[kind].itemsize
        if kind in ("f32", "f64"):
            packed[name] = struct.pack("<f" if kind == "f32" else "<d", value)
        else:
            packed[name] = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return packed


class _Blocks:
    """Some concurrent thread blocks."""

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], blocks: np.ndarray, warps: int, shared: int,
                 order: str, memory: GlobalMemory, parameters: dict[str, bytes], launch: Launch,
                 timed: bool):  # fmt: skip
        self.kernel, self.grid, self.blocks, self.warps = kernel, grid, blocks, warps
        self.memory, self.parameters, self.launch = memory, parameters, launch
        self.shared = SharedMemory(len(blocks), shared, kernel.shared_unit)
        self.phase = np.zeros(len(blocks), np.int32)  # barriers passed
        self.issued = np.zeros(len(kernel.steps), np.int64)  # by how many warps each block of code was run
        turns = [np.arange(warps)] if order == "together" else [np.array([warp]) for warp in range(warps)]
        if order == "backward":
            turns.reverse()
        elif order == "shuffled":
            turns = [turns[at] for at in np.random.default_rng(5).permutation(warps)]
        self.groups = [Warps(self, turn, timed) for turn in turns]

    def run(self) -> None:
        while any((group.next < GONE).any() for group in self.groups):
            for group in self.groups:
                group.run_to_barrier()
            self._open_barriers()
        counts = self.launch.counts
        for clock in (group.clock for group in self.groups if group.clock is not None):
            counts.round_trips = max(counts.round_trips or 0, int(clock.now.max()))
        for issued, steps, opcodes in zip(self.issued.tolist(), self.kernel.steps, self.kernel.opcodes, strict=True):
            counts.instructions += issued * len(steps)
            for opcode, times in opcodes.items() if issued else ():
                counts.opcodes[opcode] += issued * times

    def _open_barriers(self) -> None:
        """Called when every live warp has reached a barrier. All warps of a block must be at the same one."""
        waiting = np.zeros((len(self.blocks), self.warps), np.int32)  # block of code behind the barrier, GONE or mixed
        for group in self.groups:
            low, high = group.next.min(1), group.next.max(1)
            waiting[group.block[:, 0], group.warp_of_block[:, 0]] = np.where(low == high, low, -1)
        mixed = (waiting != waiting[:, :1]).any(1) | (waiting[:, 0] < 0)
        for block in np.flatnonzero(mixed):
            self.problem("barrier that not all warps of the block have come to", self.groups[0].at_barrier,
                         0, 0, int(self.blocks[block]), 0)  # fmt: skip
        opened = (waiting < GONE).any(1)
        self.launch.counts.barriers += int(opened.sum())
        self.phase += opened.astype(np.int32)
        latest = np.zeros(len(self.blocks), np.int64)
        for group in self.groups:
            if group.clock is not None:
                np.maximum.at(latest, group.block[:, 0], group.clock.now)
        for group in self.groups:
            if group.clock is not None:
                group.clock.now = np.where(group.waiting.any(1), latest[group.block[:, 0]], group.clock.now)
            group.waiting[:] = False
            group.phase = np.broadcast_to(self.phase[group.block], group.block.shape)

    def problem(self, kind: str, at: Instruction | None, warp: int, lane: int, block: int, address: int) -> None:
        self.launch.problem_count += 1
        if sum(known.kind == kind for known in self.launch.problems) < PROBLEMS_KEPT:
            source, line = (at.source, at.line) if at else ("?", 0)
            self.launch.problems.append(Problem(kind, source, line, warp, lane, block, address))


class Warps:
    """Warps that run together: the same warps of every block. Arrays are ``[warps, 32]``."""

    def __init__(self, machine: _Blocks, turn: np.ndarray, timed: bool):
        self.machine, self.counts, self.parameters = machine, machine.launch.counts, machine.parameters
        block, warp = (
            index.reshape(-1, 1) for index in np.meshgrid(np.arange(len(machine.blocks)), turn, indexing="ij")
        )
        shape = (len(block), 32)
        self.block = np.broadcast_to(block, shape)  # within the machine
        self.warp_of_block = np.broadcast_to(warp, shape)
        self.warp = np.broadcast_to(machine.blocks[block] * machine.warps + warp, shape).astype(np.int32)
        self.lane = np.broadcast_to(np.arange(32, dtype=np.int32), shape)
        self.phase = np.zeros(shape, np.int32)
        self.next = np.zeros(shape, np.int32)  # block of code
        self.waiting = np.zeros(shape, bool)
        self.at_barrier: Instruction | None = None
        self.clock = Clock(len(block)) if timed else None
        self.mask, self.full = np.ones(shape, bool), True
        self.committed = np.zeros(shape, np.int64)  # groups of asynchronous copies
        self.copies: list[_Copy] = []
        x, y, _ = machine.grid
        linear = machine.blocks[self.block]
        special = {
            "%tid.x": self.warp_of_block * 32 + self.lane,
            "%ctaid.x": linear % x, "%ctaid.y": linear // x % y, "%ctaid.z": linear // (x * y),
            **{f"%nctaid.{axis}": np.full(shape, size) for axis, size in zip("xyz", machine.grid, strict=True)},
        }  # fmt: skip
        undefined = {kind: np.full(shape, 0xDB, np.uint8).repeat(TYPES[kind].itemsize, 1).view(TYPES[kind])
                     for kind in ("b16", "b32", "b64")}  # fmt: skip
        undefined["pred"] = np.zeros(shape, bool)
        self.registers = {name: undefined[kind] for name, kind in machine.kernel.program.registers.items()}
        self.registers |= {name: value.astype(np.uint32) for name, value in special.items()}

    # -------------------------------------------------------------------------------------------- control

    def run_to_barrier(self) -> None:
        steps, issued = self.machine.kernel.steps, self.machine.issued
        while True:
            ready = ~self.waiting & (self.next < GONE)
            if not ready.any():
                return
            block = int(self.next[ready].min())
            self.mask = ready & (self.next == block)
            self.full = bool(self.mask.all())
            issued[block] += int(self.mask.any(1).sum())
            if issued[block] > STEP_LIMIT:
                raise RuntimeError(f"{self.machine.kernel.program.name}: runs forever around block {block}")
            self.next = np.where(self.mask, np.int32(block + 1), self.next)
            instructions = self.machine.kernel.program.blocks[block].instructions
            for step, instruction in zip(steps[block], instructions, strict=True):
                if self.clock is not None:
                    self.clock.tick(self, instruction)
                step(self)

    def jump(self, label: str) -> None:
        self.next[self.mask] = self.machine.kernel.program.labels[label]

    def leave(self) -> None:
        self.next[self.mask] = GONE

    def wait_at_barrier(self, instruction: Instruction) -> None:
        self.converged(instruction)
        self.at_barrier = instruction
        self.waiting |= self.mask

    def converged(self, instruction: Instruction) -> None:
        """Instructions of whole warps need all lanes."""
        if not self.full:
            parted = self.mask.any(1) & ~self.mask.all(1)
            by = self._threads(self.lane == 0)
            kind = f"{instruction.opcode} that not all lanes have come to"
            self._report(instruction, kind, parted, by, np.zeros(len(parted), np.int64))

    def _threads(self, mask: np.ndarray) -> Threads:
        return Threads(self.warp[mask], self.phase[mask], self.lane[mask], self.machine.warps)

    def _report(
        self, instruction: Instruction, kind: str, wrong: np.ndarray, by: Threads, addresses: np.ndarray
    ) -> None:
        for at in np.flatnonzero(wrong):
            block, warp = divmod(int(by.warp[at]), by.warps)
            self.machine.problem(kind, instruction, warp, int(by.lane[at]), block, int(addresses[at]))

    # --------------------------------------------------------------------------------------------- memory

    def load(
        self, space: str, addresses: np.ndarray, size: int, instruction: Instruction, mask: np.ndarray | None = None
    ) -> np.ndarray:
        """uint8 ``[active threads, size]``."""
        mask = self.mask if mask is None else mask
        by, at, report = self._threads(mask), addresses[mask], partial(self._report, instruction)
        if space == "shared":
            self._count_shared(addresses, size, mask)
            return self.machine.shared.load(at, size, self.block[mask], by, report)
        self.counts.global_loaded += len(at) * size
        self.counts.load_sectors += sectors(addresses, size, mask)
        return self.machine.memory.load(at, size, by, report)

    def store(self, space: str, addresses: np.ndarray, data: np.ndarray, instruction: Instruction) -> None:
        """``data`` uint8 ``[active threads, size]``."""
        by, at, report = self._threads(self.mask), addresses[self.mask], partial(self._report, instruction)
        size = data.shape[1]
        if space == "shared":
            self._count_shared(addresses, size, self.mask)
            self.machine.shared.store(at, data, self.block[self.mask], by, report)
        else:
            self.counts.global_stored += len(at) * size
            self.counts.store_sectors += sectors(addresses, size, self.mask)
            self.machine.memory.store(at, data, by, report)

    def _count_shared(self, addresses: np.ndarray, size: int, mask: np.ndarray) -> None:
        passes, least = wavefronts(addresses, size, mask)
        self.counts.shared_requests += int(mask.any(1).sum())
        self.counts.shared_wavefronts += passes
        self.counts.shared_least_wavefronts += least

    # --------------------------------------------------------------------------------- asynchronous copies

    def copy_async(
        self, target: np.ndarray, source: np.ndarray, size: int, reads: np.ndarray, instruction: Instruction
    ) -> None:
        """Reads the bytes now and writes them at the wait, the latest possible time."""
        fetched = np.zeros((*self.mask.shape, size), np.uint8)
        reads = reads & self.mask
        fetched[reads] = self.load("global", source, size, instruction, reads)
        self._count_shared(target, size, self.mask)
        at, block = target[self.mask], self.block[self.mask]
        report = partial(self._report, instruction)
        self.machine.shared.begin_copy(at, size, block, self._threads(self.mask), report)
        self.copies.append(_Copy(np.flatnonzero(self.mask), self.committed[self.mask], at, fetched[self.mask]))

    def commit_copies(self) -> None:
        self.committed += self.mask

    def wait_for_copies(self, allowed: int | None) -> None:
        """Waits until at most ``allowed`` of a thread's last groups are pending. None includes uncommitted ones."""
        pending = []
        for copy in self.copies:
            done = self.mask.ravel()[copy.threads]
            if allowed is not None:
                done &= copy.group < self.committed.ravel()[copy.threads] - allowed
            of = np.unravel_index(copy.threads[done], self.mask.shape)
            by = Threads(self.warp[of], self.phase[of], self.lane[of], self.machine.warps)
            self.machine.shared.end_copy(copy.addresses[done], copy.data[done], self.block[of], by)
            if not done.all():
                left = ~done
                pending.append(_Copy(copy.threads[left], copy.group[left], copy.addresses[left], copy.data[left]))
        self.copies = pending


@dataclass
class _Copy:
    """Pending asynchronous copies, one entry per thread."""

    threads: np.ndarray  # flat index in Warps
    group: np.ndarray  # number of the thread's group that the copy belongs to
    addresses: np.ndarray  # in shared memory
    data: np.ndarray
