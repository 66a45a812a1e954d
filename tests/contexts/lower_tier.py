"""A lower tier to test with. It does nothing until it is told to."""

from __future__ import annotations

from collections.abc import Sequence

from kara_kernels.contexts.directory import Copy


class Disk:
    """What lies in the region and here are (context, place in its packet)."""

    name, resting = "disk", False

    def __init__(self, region: dict[int, tuple[str, int]], nbytes: int) -> None:
        self.region, self.nbytes = region, nbytes
        self.copies: dict[int, dict[int, tuple[str, int]]] = {}
        self.jobs: dict[int, tuple[str, int, list[int]]] = {}
        self.over: list[tuple[int, bool, float]] = []

    def has(self, copy: Copy) -> bool:
        return False

    def write(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        self.jobs[job] = "write", copy.number, list(grains)

    def read(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        self.jobs[job] = "read", copy.number, list(grains)

    def end(self, job: int, ok: bool) -> None:
        kind, copy, grains = self.jobs.pop(job)
        if kind == "write":
            some = grains if ok else grains[: len(grains) // 2]
            self.copies.setdefault(copy, {}).update({i: self.region[grain] for i, grain in enumerate(some)})
        elif ok:
            for i, grain in enumerate(grains):
                self.region[grain] = self.copies[copy][i]
        self.over.append((job, ok, 0.1))

    def ended(self) -> list[tuple[int, bool, float]]:
        over, self.over = self.over, []
        return over

    def erase(self, copy: Copy, grains: Sequence[int]) -> None:
        assert all(other != copy.number for _, other, _ in self.jobs.values())
        for grain in grains:
            self.copies.get(copy.number, {}).pop(grain, None)

    def spoiled(self, copy: Copy) -> None: ...
