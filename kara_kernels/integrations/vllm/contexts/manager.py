"""What is stored, admitted and dropped: the decisions, in the scheduler's process. No tensor is touched here."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from kara_kernels.contexts.directory import Copy, Transfer, read_snapshot
from kara_kernels.contexts.keeper import Keeper
from kara_kernels.contexts.utility import Context, Tier

from .admission import Admission, Admissions
from .catalogue import Catalogue
from .closed import ClosedTiers
from .gauges import Gauges
from .grains import Grains
from .jobs import Ended, Load, Store
from .known import Known, KnownContexts, Place, SeenPrompts
from .rates import Rates
from .reset import Reset
from .rows import FullRows, RowsAtHand
from .settings import needs_queries
from .transfers import RAM, LowerTier, Transfers

GPU = "gpu"
SEEN = 65_536  # block hashes that are remembered, to find what requests share
MOVES = {"cut", "evict", "given_up"}  # of the keeper's counts


class ContextManager:
    """Decides for one engine.

    Args:
        catalogue: says what contexts may be stored as.
        workers: that report the end of each job.
        alpha, half_life: see :class:`~kara_kernels.contexts.place.Placement`.
        floor: the least quality that a context may be stored with.
        min_tokens: shorter contexts are left alone.
        lower: tiers below shared memory, from the fastest to the slowest. A quarter of the grains is then set aside
            for what passes through, or comes while others are written.
    """

    def __init__(
        self, *, grains: Grains, block_size: int, workers: int, catalogue: Catalogue,
        alpha: float, floor: float, half_life: float, min_tokens: int,
        lower: Sequence[tuple[Tier, LowerTier]] = (), clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.grains, self.block_size = grains, block_size
        self.catalogue, self.min_tokens, self._clock = catalogue, min_tokens, clock
        self.rates = Rates()
        self.counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        """What happened, by a name and labels; see :mod:`.stats`."""
        staging = grains.count // 4 if lower else 0
        ram = Tier(RAM, grains.count * grains.nbytes, 1e10, reserve=staging * grains.nbytes)
        self._tiers = [ram, *(tier for tier, _ in lower)]
        self.keeper = Keeper(self._tiers, alpha=alpha, half_life=half_life)
        self.transfers = Transfers(self.keeper, grains, workers, self.counts, [place for _, place in lower], staging)
        most = staging or grains.count  # grains of a packet: it must be able to pass through
        self._known = KnownContexts(catalogue, grains, most, floor, self.rates)
        self._seen = SeenPrompts(SEEN)
        self.admissions = Admissions(
            self._known, self.keeper, self.transfers, catalogue, self.rates, self.counts, block_size
        )  # fmt: skip
        self.rows = RowsAtHand(self.keeper, self.transfers.storing)
        self.closed = ClosedTiers(self.keeper, self._tiers, self.counts)
        self.reset = Reset(self._known, self.keeper, self.transfers, self.rows, self.counts)
        self._stepped: tuple[float, int] = (clock(), 0)
        self.gauges = Gauges(self.keeper, self._tiers, self.rates, catalogue, clock)

    # -------------------------------------------------------------------------------------------------- requests

    def place(self, hashes: Sequence[bytes], prompt_tokens: int, asked: int | None) -> Place | None:
        """Which part of a prompt is its context: what the request ``asked`` for, or what an earlier one had too. The
        last token of a prompt is never part of it, because it must be computed."""
        hashes = hashes[: (prompt_tokens - 1) // self.block_size]
        if asked is not None:
            blocks = min(asked // self.block_size, len(hashes))
        else:
            blocks = self._seen.shared(hashes)
        if blocks * self.block_size < max(1, self.min_tokens):
            return None
        return Place(hashes[blocks - 1], blocks * self.block_size)

    def adopt(self, place: Place, tier: str, method: str, nbytes: int, ids: Sequence[int]) -> Copy | None:
        """Takes over a packet that another server has written to a tier, or as much of it as would be written here.
        ``ids``: tokens of a request. None: the context is stored here, or is being stored, or the packet is not good
        enough."""
        known, option = self._known.fitting(place, method, nbytes, ids)
        stored = self.keeper.get(place.key) is not None
        arriving = None if option is None or stored else self.keeper.directory.store(place.key, option, tier)
        if arriving is None or (copy := arriving.target) is None:
            return None
        self.keeper.directory.finish(arriving)
        self.transfers.adopt(copy)
        self.closed.fit(tier)
        if place.key in self.keeper:
            self.keeper.placement.correct(place.key, tier, copy.option)
        else:
            self.keeper.placement.add(known.context, self._clock(), 0.0, (tier, copy.option))
            self._remember(known)
        return copy

    def used(self, place: Place, source: str, ids: Sequence[int]) -> None:
        """A request with the tokens ``ids`` was admitted with rows of a packet, out of a tier, or out of the GPU's pool
        where they were."""
        self.counts["hits", source] += 1
        self.counts["hit_tokens", source] += place.tokens
        self.keeper.use(place.key, self._clock())
        self._renew(place, ids)

    def load(self, request_id: str, admission: Admission, blocks: Sequence[int]) -> None:
        """Begins a load into ``blocks``."""
        place, (_, step) = admission.place, admission.way
        job = Load(
            0, request_id, place.key, place.tokens, tuple(blocks), (), step.nbytes, admission.way.form, step.rows
        )  # fmt: skip
        self.transfers.start(self.keeper.load(place.key), job, admission.packet)

    def offer(
        self, request_id: str, place: Place, blocks: Sequence[int], ids: Sequence[int], unjudged: int | None = None
    ) -> None:
        """The rows of a context have been computed, and stay in ``blocks`` until ``rows`` forget them. ``ids``: tokens
        of the request. ``unjudged``: see :class:`FullRows`. A conversation gives way to whole rows, and to one that is
        stored."""
        now, key, other = self._clock(), place.key, self._known.place(place.block_hash)
        if place.rows is not None and other is not None and (other.rows is None or self.keeper.get(other.key)):
            return
        self.rows[key] = FullRows(request_id, tuple(blocks), unjudged)
        if key in self.keeper:
            self.keeper.use(key, now, recomputed=self.rows[key].may_replace(self.keeper.get(key)))
            self._renew(place, ids)
            return
        known = self._known.look_up(place, ids)
        if not known.context.options:
            self.counts["refused",] += 1
            return
        self.keeper.add(known.context, now)
        self._remember(known)

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self, tokens: int) -> tuple[list[Store], list[Load]]:
        """Settles what is planned. Returns the jobs that begin with this step, which computes ``tokens``."""
        now, (before, computed) = self._clock(), self._stepped
        done = Counter(self.keeper.counts)
        if computed >= 2 * self.block_size:
            self.rates.see_prefill((now - before) / computed)
        self._stepped = now, tokens
        for context in self._known.heard():
            self._change(context)
        self.transfers.step()
        for tier, cost in self.transfers.read_costs:
            self.rates.see_read(tier, cost)
        self.transfers.read_costs.clear()
        self.closed.settle(self.transfers.unwritable, now)
        begun = self.keeper.work()
        self.transfers.erase(self.keeper.erasable())  # before what has begun, which is given the room
        done = self.keeper.counts - done
        if done["cut"]:
            self.transfers.trim()
        for move in MOVES & set(done):
            self.counts["moves", move] += done[move]
        for transfer in begun:
            self._start(transfer)
        jobs = self.transfers.stores, self.transfers.loads
        self.transfers.stores, self.transfers.loads = [], []
        return jobs

    def ended(self, number: int, ended: Ended) -> Store | Load | None:
        """A worker's report of a job. Returns the job when all workers have reported it."""
        reported = self.transfers.reported(number, ended)
        if reported is None:
            return None
        job, how = reported
        if how.ok and isinstance(job, Load):
            self.rates.see_load(job.form, how.seconds / job.rows)
        elif isinstance(job, Load):
            self.keeper.lost(job.context)
        return job

    def restore(self, path: Path, is_whole: Callable[[int, int], bool]) -> None:
        """Takes over what an earlier process has saved with :meth:`Keeper.save`, and what can still be read.

        Args:
            is_whole: ``is_whole(number, grains)``: whether a copy lies on its lower tier with all its grains.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is damaged.
        """
        found, known = {}, {}
        for copy in read_snapshot(path).copies:
            place = Place.of(copy.key)
            left = self._known.left(place, copy.option)
            if left is None or copy.tier == RAM or not is_whole(copy.number, self.grains.needed(copy.option.nbytes)):
                continue
            known[copy.key] = left
            found[copy.tier, copy.number] = copy.option.nbytes
        self.keeper.restore(path, found, lambda copy: known[copy.key].context, self._clock())
        for copy in self.keeper.directory.copies():
            self._known.add(known[copy.key])
            self.transfers.adopt(copy)

    def _start(self, transfer: Transfer) -> None:
        target = transfer.target
        assert target is not None
        if transfer.source is not None:
            self.transfers.start(transfer)
            return
        (name, blocks, unjudged), place = self.rows[target.key], Place.of(target.key)
        way = self._known.way(place, target.option)
        if needs_queries(way.method) and unjudged is None:
            self.counts["refused",] += 1
            self.keeper.forget_rows(target.key)
            self.keeper.finish(transfer, False)
            return
        what = way.form, way.scorer, way.step.sections, unjudged or 0
        job = Store(0, name, target.key, place.most_rows, blocks, (), *what)
        if self.transfers.start(transfer, job):
            self.counts["stored", target.option.method, f"{target.option.ratio:.2f}"] += 1

    def _renew(self, place: Place, ids: Sequence[int]) -> None:
        if (context := self._known.used(place, ids)) is not None:
            self._change(context)

    def _change(self, context: Context) -> None:
        """The placement hears of another profile or other costs."""
        copy = self.keeper.get(context.key)
        if copy is not None and any(x.same_bytes(copy.option) and x.quality < context.floor for x in context.options):
            self.counts["below_floor",] += 1
            self.transfers.heard("below_floor", copy)
        self.keeper.change(context)

    def _remember(self, known: Known) -> None:
        """A new context is known. One that ends with the same block has to go, and perhaps the oldest."""
        other = self._known.place(known.place.block_hash)
        if other is not None and other != known.place:
            self.forget(other)
        self._known.add(known)
        if len(self._known) > SEEN:
            self.forget(self._known.oldest.place)

    def forget(self, place: Place) -> None:
        """Forgets a context, known or not."""
        if self._known.place(place.block_hash) == place:
            self._known.remove(place)
        self.rows.pop(place.key, None)
        self.keeper.remove(place.key)
