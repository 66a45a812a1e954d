"""Transfers between GPU, shared memory and lower tiers, step by step. The bytes of all of them pass through grains.

A transfer has at most two phases. ``encode`` (GPU to grains) or ``read`` (lower tier to grains) brings bytes into
memory, ``write`` (to a lower tier) or ``decode`` (to the GPU) takes them out. A packet that lies in memory, or is to
lie there, needs only one. Bytes that only pass through lie in staging grains, of which a share is set aside, so that
full memory never keeps a packet on a lower tier. No plan fills these, but packets that are new or come up may lie in
them until others have left. Pure Python, in the scheduler's process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kara_kernels.contexts.directory import Copy, Transfer
from kara_kernels.contexts.keeper import Keeper

from .grains import Grains
from .jobs import Ended, Load, Store

RAM = "ram"


class LowerTier(Protocol):
    """A tier below shared memory. Copies are named by their numbers, and consist of grains."""

    name: str

    @property
    def resting(self) -> bool:
        """Whether nothing should be read now, because it would fail."""

    def has(self, copy: Copy) -> bool:
        """Whether the bytes of a new copy are there already, so that nothing needs to be written."""

    def write(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        """Begins to write grains, which stay as they are until the job has ended."""

    def read(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        """Begins to read the first grains of a copy."""

    def ended(self) -> Iterable[tuple[int, bool, float]]:
        """Jobs that ended since the last call: number, whether they succeeded, seconds."""

    def erase(self, copy: Copy, grains: Sequence[int]) -> None:
        """Forgets grains of a copy, by their places in it. Nobody reads or writes them."""

    def spoiled(self, copy: Copy) -> None:
        """What was read of a context was damaged. Its copy is forgotten next."""


@dataclass
class Running:
    """A transfer under way."""

    transfer: Transfer
    job: Store | Load | None
    """What the workers do for it; its grains are not known before it begins."""
    packet: str = ""
    phases: list[str] = field(default_factory=list)
    """Those to come. The first one is under way."""
    grains: list[int] = field(default_factory=list)
    staged: bool = False
    offered: str = ""
    """The tier that is written, if the packet does not move there."""
    ended: Ended = field(default_factory=lambda: Ended(0, True, 0.0))


class Transfers:
    """Carries out what a keeper has begun.

    Args:
        staging: grains for bytes that pass through: the reserve of shared memory.
        workers: that report the end of each job.
        counts: of what happens, by name and labels.

    Attributes:
        stores, loads: jobs for the workers, until somebody takes them.
        read_costs: seconds per byte of what was read last, by tier, until somebody takes them.
        unwritable: tiers that failed to write, until somebody takes them.
        arrived: called with each context that has come to lie in memory.
        heard: called with what happens to copies, as a :class:`.trace.Trace` is.
        offers: writes of :meth:`offer` that are under way.
    """

    def __init__(
        self, keeper: Keeper, grains: Grains, workers: int, counts: defaultdict[tuple[str, ...], float],
        lower: Sequence[LowerTier] = (), staging: int = 0,
    ) -> None:  # fmt: skip
        self.keeper, self.grains, self.workers, self.counts, self.staging = keeper, grains, workers, counts, staging
        self.stores: list[Store] = []
        self.loads: list[Load] = []
        self.read_costs: list[tuple[str, float]] = []
        self.unwritable: set[str] = set()
        self.arrived: Callable[[str], None] = lambda key: None
        self.heard: Callable[..., None] = lambda event, copy, **more: None
        self.offers = 0
        self._lower = {tier.name: tier for tier in lower}
        self._held: dict[int, list[int]] = {}  # of each copy: its grains, or on a lower tier their places in it
        self._running: dict[int, Running] = {}
        self._waiting: list[int] = []  # for grains
        self._staged = self._numbers = 0

    @property
    def busy(self) -> bool:
        return bool(self._running)

    @property
    def loading(self) -> bool:
        """Whether rows are on their way to requests."""
        return any(isinstance(running.job, Load) for running in self._running.values())

    def storing(self, request_id: str) -> list[int]:
        """Jobs that read the request's blocks."""
        found = self._running.items()
        return [n for n, x in found if x.phases[:1] == ["encode"] and x.job and x.job.request_id == request_id]

    def is_loading(self, packet: str) -> bool:
        return any(running.packet == packet for running in self._running.values())

    def start(self, transfer: Transfer, job: Store | Load | None = None, packet: str = "") -> bool:
        """Begins a transfer. Those that find no grains wait, but for a store, whose rows may be gone by then: it is put
        off. Returns whether it was not."""
        source, target = transfer.source, transfer.target
        if target is not None and target.tier != RAM and self._lower[target.tier].has(target):
            self._lay(target)
            self._finish(transfer)
            return True
        phases = []
        if source is None or source.tier != RAM:
            phases.append("encode" if source is None else "read")
        if target is None or target.tier != RAM:
            phases.append("decode" if target is None else "write")
        self._numbers += 1
        number = self._numbers
        if job is not None:
            job = replace(job, number=number)
        self._running[number] = Running(transfer, job, packet, phases)
        if self._take(self._running[number]):
            self._begin(number)
        elif source is None:
            del self._running[number]
            self.keeper.put_off(transfer)
            return False
        else:
            self._waiting.append(number)
        return True

    def offer(self, key: str, tier: str) -> None:
        """Writes a packet to a lower tier, too, if it lies in memory. Until then it stays there."""
        copy = self.keeper.get(key)
        if copy is None or copy.tier != RAM:
            return
        self._numbers += 1
        self.offers += 1
        grains = self._held[copy.number]
        self._running[self._numbers] = Running(self.keeper.load(key), None, "", ["write"], grains, offered=tier)
        self._begin(self._numbers)

    def is_resting(self, tier: str) -> bool:
        return tier in self._lower and self._lower[tier].resting

    def step(self) -> None:
        """Hears of lower tiers, and begins what has waited for grains."""
        for tier in self._lower.values():
            for number, ok, seconds in tier.ended():
                running = self._running[number]
                phase = running.phases[0]
                self.counts["jobs", phase, "ok" if ok else "failed"] += 1
                self.counts["job_seconds", phase] += seconds
                if not ok and phase == "write":
                    self.unwritable.add(tier.name)
                if ok and phase == "read":
                    self.read_costs.append((tier.name, seconds / (len(running.grains) * self.grains.nbytes)))
                self._next(number) if ok else self._fail(number)
        waiting, self._waiting = self._waiting, []
        for number in waiting:
            if self._take(self._running[number]):
                self._begin(number)
            else:
                self._waiting.append(number)

    def reported(self, number: int, ended: Ended) -> tuple[Store | Load, Ended] | None:
        """A worker's report of a job. Returns the job and how it ended, when all workers have reported it."""
        running = self._running[number]
        running.ended = running.ended.and_another(ended)
        if running.ended.workers < self.workers:
            return None
        job, how = running.job, running.ended
        assert job is not None
        kind = type(job).__name__.lower()
        self.counts["jobs", kind, how.error or "ok"] += 1
        self.counts["job_seconds", kind] += how.seconds
        if how.error == "damaged" and job.grains:
            self._spoiled(job.context)
        if (copy := running.transfer.source) is not None and not how.ok:
            self.heard(how.error or "failed", copy, request_id=job.request_id)
        self._next(number) if how.ok else self._fail(number)
        return job, how

    def adopt(self, copy: Copy) -> None:
        """A copy that another server, or an earlier one, has left on a lower tier."""
        self._lay(copy)
        self.heard("found", copy)

    def _lay(self, copy: Copy) -> None:
        """A copy that is on a lower tier already."""
        self._held[copy.number] = list(range(self.grains.needed(copy.option.nbytes)))

    def erase(self, copies: Iterable[Copy]) -> None:
        """Bytes of copies that nobody needs."""
        for copy in copies:
            self._drop(copy, self._held.pop(copy.number, []))

    def trim(self) -> None:
        """Bytes of what was cut."""
        for copy in self.keeper.directory.copies():
            held, kept = self._held[copy.number], self.grains.needed(copy.option.nbytes)
            if len(held) > kept:
                self._drop(copy, held[kept:])
                del held[kept:]

    def _drop(self, copy: Copy, held: Sequence[int]) -> None:
        if copy.tier == RAM:
            self.grains.give_back(held)
        else:
            self._lower[copy.tier].erase(copy, held)

    def _take(self, running: Running) -> bool:
        """Finds the grains that the bytes of a transfer pass through. False: too few are free."""
        source, target = running.transfer.source, running.transfer.target
        copy = target or source
        assert copy is not None
        count = self.grains.needed(copy.option.nbytes)
        if source is not None and source.tier == RAM:
            running.grains = self._held[source.number][:count]
        else:
            running.staged = target is None or target.tier != RAM
            if running.staged and self._staged + count > self.staging:
                return False
            taken = self.grains.take(count * self.grains.nbytes)
            if taken is None:  # packets in memory and bytes that pass through share the reserve
                return False
            running.grains = taken
            self._staged += count if running.staged else 0
        if target is not None:
            self._held[target.number] = running.grains if target.tier == RAM else list(range(count))
        return True

    def _begin(self, number: int) -> None:
        """Begins the first phase that is left, or ends the transfer."""
        running = self._running[number]
        source, target = running.transfer.source, running.transfer.target
        if not running.phases:
            self._end(number, True)
        elif running.phases[0] == "read":
            assert source is not None
            self._lower[source.tier].read(number, source, running.grains)
        elif running.phases[0] == "write":
            copy = target or source
            assert copy is not None
            self._lower[running.offered or copy.tier].write(number, copy, running.grains)
        else:
            assert running.job is not None
            running.job = replace(running.job, grains=tuple(running.grains))
            self._send(running.job)

    def _send(self, job: Store | Load) -> None:
        self.stores.append(job) if isinstance(job, Store) else self.loads.append(job)

    def _next(self, number: int) -> None:
        self._running[number].phases.pop(0)
        self._begin(number)

    def _spoiled(self, key: str) -> None:
        """A packet was damaged, wherever it came from."""
        if (copy := self.keeper.get(key)) is not None:
            for tier in self._lower.values():
                tier.spoiled(copy)

    def _fail(self, number: int) -> None:
        running = self._running[number]
        if isinstance(running.job, Load) and running.phases[0] == "read":
            running.phases = ["decode"]
            self._send(running.job)  # without grains: the workers report the failure, as that of any load
        else:
            self._end(number, False)

    def _end(self, number: int, ok: bool) -> None:
        running = self._running.pop(number)
        if running.staged:
            self.grains.give_back(running.grains)
            self._staged -= len(running.grains)
        self.offers -= bool(running.offered)
        target = running.transfer.target
        if self._finish(running.transfer, ok, running.job) and target is not None and target.tier == RAM:
            self.arrived(target.key)

    def _finish(self, transfer: Transfer, ok: bool = True, job: Store | Load | None = None) -> bool:
        """Ends a transfer. Returns whether its target can be read now."""
        arrived = self.keeper.finish(transfer, ok)
        source, target = transfer.source, transfer.target
        if arrived and target is not None and source is None:
            self.heard("stored", target, request_id=job and job.request_id)
        elif arrived and target is not None and source is not None:
            self.heard("moved", target, came_from=source.tier)
        return arrived
