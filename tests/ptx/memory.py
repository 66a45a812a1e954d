"""Global and shared memory with bounds and a record of last accesses.

Both kinds keep, for every unit of bytes (the narrowest access of the program), the last writer and the last readers as
(warp, phase). A phase is the time between two barriers of a block. Two accesses of a unit, one of them a write, need an
order between them: of two warps of one block, a barrier; of two blocks of one launch there is none.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes, the unit that global memory moves
BANKS = 32  # of four bytes each


@dataclass(frozen=True)
class Problem:
    """A problem and its place."""

    kind: str
    source: str  # "compact.py:45"
    line: int  # of the PTX
    warp: int  # of its block
    lane: int
    block: int  # linear number of the block
    address: int

    def __str__(self) -> str:
        where = f"block {self.block}, warp {self.warp}, lane {self.lane}, address {self.address:#x}"
        return f"{self.kind} at {self.source} (PTX line {self.line}): {where}"


@dataclass
class Counts:
    """Counts of a launch. Requests are per warp, bytes are per thread."""

    instructions: int = 0  # of warps
    opcodes: Counter[str] = field(default_factory=Counter)
    global_loaded: int = 0  # bytes that threads ask for
    global_stored: int = 0
    load_sectors: int = 0  # sectors per request, added up
    store_sectors: int = 0
    touched_load_sectors: int = 0  # each sector of memory once in a launch
    touched_store_sectors: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0  # equal to the least possible number if there are no bank conflicts
    shared_least_wavefronts: int = 0
    matrix_operations: int = 0  # multiply-adds on tensor cores, times two
    barriers: int = 0  # of blocks
    round_trips: int | None = None  # to global memory, one after another, of the slowest warp; None: not counted


@dataclass
class Threads:
    """The threads that make an access, one entry per active thread."""

    warp: np.ndarray  # number over all blocks of the launch
    phase: np.ndarray  # barriers that the thread's block has passed
    lane: np.ndarray
    warps: int  # of a block

    def take(self, chosen: np.ndarray) -> Threads:
        return Threads(self.warp[chosen], self.phase[chosen], self.lane[chosen], self.warps)


Report = Callable[[str, "np.ndarray | bool", Threads, np.ndarray], None]


class Shadow:
    """Last writer and last readers of every unit of some memory. -1 means none."""

    def __init__(self, units: int):
        self.writer = np.full(units, -1, np.int32)
        self.written = np.zeros(units, np.int32)  # phase of the last write
        self.reader = np.full(units, -1, np.int32)
        self.was_read = np.zeros(units, np.int32)  # phase of the last read
        self.readers = np.zeros(units, bool)  # several warps read in that phase
        self.blocks = np.zeros(units, bool)  # several blocks read, ever

    def read(self, units: np.ndarray, by: Threads) -> np.ndarray:
        """Records reads. Returns which of them race with a write."""
        warp, phase, warps = by.warp, by.phase, by.warps
        writer, reader = self.writer[units], self.reader[units]
        race = (writer >= 0) & (writer != warp)
        race &= (writer // warps != warp // warps) | (self.written[units] == phase)
        same_block = reader // warps == warp // warps
        self.blocks[units[(reader >= 0) & ~same_block]] = True
        current = same_block & (self.was_read[units] == phase)
        self.readers[units[~current]] = False
        self.readers[units[current & (reader != warp)]] = True
        self.reader[units], self.was_read[units] = warp, phase
        last = self.reader[units]  # threads of one instruction may read the same unit
        self.readers[units[last != warp]] = True
        self.blocks[units[last // warps != warp // warps]] = True
        return race

    def write(self, units: np.ndarray, by: Threads, unchanged: np.ndarray) -> np.ndarray:
        """Records writes. Returns which of them race. Writing the same value does not race with another write."""
        warp, phase, warps = by.warp, by.phase, by.warps
        writer, reader = self.writer[units], self.reader[units]
        race = (writer >= 0) & (writer != warp) & ~unchanged
        race &= (writer // warps != warp // warps) | (self.written[units] == phase)
        other_block = (reader >= 0) & ((reader // warps != warp // warps) | self.blocks[units])
        other_warp = (self.was_read[units] == phase) & (reader >= 0) & ((reader != warp) | self.readers[units])
        self.writer[units], self.written[units] = warp, phase
        return race | other_block | other_warp


def units_of(addresses: np.ndarray, size: int, unit: int) -> np.ndarray:
    """Numbers of the units that ``size`` bytes at each address cover, ``[n, units]``."""
    return addresses[:, None] // unit + np.arange(max(1, size // unit))


class GlobalMemory:
    """The memory a launch may access: spans of real addresses. The owner must keep the memory alive."""

    def __init__(self, spans: Sequence[tuple[int, int]], unit: int):
        merged: list[list[int]] = []
        for low, high in sorted(span for span in spans if span[0] < span[1]):
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
            else:
                merged.append([low, high])
        self.low, self.high = np.array(merged, np.int64).reshape(-1, 2).T
        self.base = self.low // SECTOR * SECTOR  # so that units and sectors are those of the machine
        sizes = (self.high - self.base).tolist()
        self.regions = [
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
            for base, size in zip(self.base.tolist(), sizes, strict=True)
        ]
        self.unit = unit
        self.shadows = [Shadow(-(-size // unit)) for size in sizes]
        self.loaded = [np.zeros(-(-size // SECTOR), bool) for size in sizes]
        self.stored = [np.zeros(-(-size // SECTOR), bool) for size in sizes]

    def _legal(self, addresses: np.ndarray, size: int, by: Threads, report: Report) -> tuple[np.ndarray, np.ndarray]:
        """(number of the region of each access, which accesses are legal)."""
        region = np.searchsorted(self.low, addresses, "right") - 1
        inside = region >= 0
        inside &= addresses + size <= self.high[region]
        report("access out of bounds", ~inside, by, addresses)
        aligned = addresses % size == 0
        report("misaligned access", ~aligned, by, addresses)
        return region, inside & aligned

    def load(self, addresses: np.ndarray, size: int, by: Threads, report: Report) -> np.ndarray:
        """uint8 ``[n, size]``. Illegal reads return 0xdb."""
        out = np.full((len(addresses), size), 0xDB, np.uint8)
        region, legal = self._legal(addresses, size, by, report)
        for number in np.unique(region[legal]):
            chosen = np.flatnonzero(legal & (region == number))
            at = addresses[chosen] - self.base[number]
            out[chosen] = _bytes(self.regions[number], size)[at // size]
            units = units_of(at, size, self.unit)
            race = self.shadows[number].read(units.ravel(), by.take(np.repeat(chosen, units.shape[1])))
            report(
                "read races with a write of global memory",
                race.reshape(units.shape).any(1), by.take(chosen), addresses[chosen],
            )  # fmt: skip
            self.loaded[number][at // SECTOR] = True
        return out

    def store(self, addresses: np.ndarray, data: np.ndarray, by: Threads, report: Report) -> None:
        """``data`` uint8 ``[n, size]``."""
        size = data.shape[1]
        region, legal = self._legal(addresses, size, by, report)
        for number in np.unique(region[legal]):
            chosen = np.flatnonzero(legal & (region == number))
            at = addresses[chosen] - self.base[number]
            memory = _bytes(self.regions[number], size)
            race = _store(memory, self.shadows[number], at, data[chosen], by.take(chosen), at, self.unit)
            report("write races in global memory", race, by.take(chosen), addresses[chosen])
            self.stored[number][at // SECTOR] = True


class SharedMemory:
    """Shared memory of some concurrent blocks. Block ``b`` owns bytes from ``b * size`` on."""

    def __init__(self, blocks: int, size: int, unit: int):
        self.size, self.unit = max(16, -(-size // 16) * 16), unit
        self.limit = size
        self.bytes = np.full(blocks * self.size, 0xDB, np.uint8)
        self.shadow = Shadow(blocks * self.size // unit)
        self.in_flight = np.zeros(blocks * self.size // unit, bool)  # an asynchronous copy is on its way

    def _legal(self, addresses: np.ndarray, size: int, by: Threads, report: Report) -> np.ndarray:
        inside = (addresses >= 0) & (addresses + size <= self.limit)
        report("shared access out of bounds", ~inside, by, addresses)
        aligned = addresses % size == 0
        report("misaligned shared access", ~aligned, by, addresses)
        return np.flatnonzero(inside & aligned)

    def load(self, addresses: np.ndarray, size: int, blocks: np.ndarray, by: Threads, report: Report) -> np.ndarray:
        """uint8 ``[n, size]`` from ``addresses`` of ``blocks``, numbers within this memory."""
        out = np.full((len(addresses), size), 0xDB, np.uint8)
        chosen = self._legal(addresses, size, by, report)
        at = addresses[chosen] + blocks[chosen] * self.size
        out[chosen] = _bytes(self.bytes, size)[at // size]
        units = units_of(at, size, self.unit)
        race = self.shadow.read(units.ravel(), by.take(np.repeat(chosen, units.shape[1]))).reshape(units.shape)
        by, addresses = by.take(chosen), addresses[chosen]
        report("read of shared memory that nobody wrote", (self.shadow.writer[units] < 0).any(1), by, addresses)
        report("read of an asynchronous copy before its wait", self.in_flight[units].any(1), by, addresses)
        report("read races with a write of shared memory", race.any(1), by, addresses)
        return out

    def store(self, addresses: np.ndarray, data: np.ndarray, blocks: np.ndarray, by: Threads, report: Report) -> None:
        """``data`` uint8 ``[n, size]``."""
        size = data.shape[1]
        chosen = self._legal(addresses, size, by, report)
        at = addresses[chosen] + blocks[chosen] * self.size
        by = by.take(chosen)
        race = _store(_bytes(self.bytes, size), self.shadow, at, data[chosen], by, at, self.unit)
        report("write races in shared memory", race, by, addresses[chosen])

    def begin_copy(self, addresses: np.ndarray, size: int, blocks: np.ndarray, by: Threads, report: Report) -> None:
        """Starts an asynchronous copy. It may write from now on, but its bytes arrive at the wait."""
        chosen = self._legal(addresses, size, by, report)
        units = units_of(addresses[chosen] + blocks[chosen] * self.size, size, self.unit)
        each = by.take(np.repeat(chosen, units.shape[1]))
        race = self.shadow.write(units.ravel(), each, np.zeros(units.size, bool)).reshape(units.shape).any(1)
        report("asynchronous copy races in shared memory", race, by.take(chosen), addresses[chosen])
        self.in_flight[units] = True

    def end_copy(self, addresses: np.ndarray, data: np.ndarray, blocks: np.ndarray, by: Threads) -> None:
        """Ends an asynchronous copy. An illegal one was reported at its start."""
        size = data.shape[1]
        chosen = np.flatnonzero((addresses >= 0) & (addresses + size <= self.limit) & (addresses % size == 0))
        at = addresses[chosen] + blocks[chosen] * self.size
        _bytes(self.bytes, size)[at // size] = data[chosen]
        units = units_of(at, size, self.unit)
        self.in_flight[units] = False
        self.shadow.writer[units] = by.warp[chosen][:, None]
        self.shadow.written[units] = by.phase[chosen][:, None]


def _bytes(memory: np.ndarray, size: int) -> np.ndarray:
    """Rows of ``size`` bytes; a rest at the end that fills no row cannot be addressed by an aligned access."""
    return memory[: len(memory) // size * size].reshape(-1, size)


def _store(memory, shadow: Shadow, at, data, by: Threads, addresses, unit: int) -> np.ndarray:
    """Writes and records. Returns which writes race with earlier accesses or with each other."""
    size = data.shape[1]
    rows = at // size
    unchanged = (memory[rows] == data).all(1)
    memory[rows] = data
    lost = (memory[rows] != data).any(1)  # another thread of this instruction stored something else there
    units = units_of(at, size, unit)
    each = by.take(np.repeat(np.arange(len(at)), units.shape[1]))
    race = shadow.write(units.ravel(), each, np.repeat(unchanged, units.shape[1]))
    return race.reshape(units.shape).any(1) | lost


def sectors(addresses: np.ndarray, size: int, active: np.ndarray) -> int:
    """Sectors that each warp's request touches, added up; ``addresses [warps, 32]``."""
    first = np.sort(np.where(active, addresses // SECTOR, -1), 1)
    return int(((first[:, 1:] != first[:, :-1]) & (first[:, 1:] >= 0)).sum() + (first[:, 0] >= 0).sum())


def wavefronts(addresses: np.ndarray, size: int, active: np.ndarray) -> tuple[int, int]:
    """(passes over the banks that requests take, the minimum for that many different words).

    Wide accesses go in parts: half warps for 8 bytes a thread, quarter warps for 16.
    """
    words = max(1, size // 4)
    parts = addresses.shape[0] * words
    word = (addresses // 4)[..., None] + np.arange(words)
    word = np.where(active[..., None], word, -1).reshape(parts, -1)
    word = np.sort(word, 1)
    distinct = word >= 0
    distinct[:, 1:] &= word[:, 1:] != word[:, :-1]
    where = (np.arange(parts)[:, None] * BANKS + word % BANKS)[distinct]
    passes = np.bincount(where, minlength=parts * BANKS).reshape(parts, BANKS).max(1)
    return int(passes.sum()), int(-(-distinct.sum(1) // BANKS).sum())
