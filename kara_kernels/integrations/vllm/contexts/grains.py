"""Shared memory in pieces of one size. A packet takes any of them, so nothing fragments."""

from __future__ import annotations

from collections.abc import Sequence


class Grains:
    """Which grains of a region are free. Pure Python, in the scheduler's process.

    Args:
        count: grains of the region.
        nbytes: bytes of one, of each worker.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.nbytes = count, nbytes
        self._free = list(range(count - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, nbytes: int) -> int:
        """Grains that a packet of ``nbytes`` takes."""
        return -(-nbytes // self.nbytes)

    def take(self, nbytes: int) -> list[int] | None:
        """Grains for ``nbytes``, in the order in which they are filled. None: not enough are free."""
        count = self.needed(nbytes)
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give_back(self, grains: Sequence[int]) -> None:
        """Raises ValueError for a grain that is not taken."""
        if not self._taken.issuperset(grains):
            raise ValueError(f"grains: expected taken ones, got {sorted(set(grains) - self._taken)}")
        self._taken.difference_update(grains)
        self._free.extend(reversed(grains))
