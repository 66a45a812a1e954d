"""What is stored, admitted and dropped: the decisions, in the scheduler's process. No tensor is touched here."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kara_kernels.contexts.directory import Transfer, read_snapshot
from kara_kernels.contexts.keeper import Keeper
from kara_kernels.contexts.packet import Header, Step
from kara_kernels.contexts.utility import Context, Option, Tier

from .grains import Grains
from .jobs import Ended, Load, Store
from .transfers import RAM, LowerTier, Transfers

GPU = "gpu"
SEEN = 65_536  # block hashes that are remembered, to find what requests share
GUESS = 1e-3  # seconds to compute a token, until a step was measured
STEADY = 0.2  # weight of the newest measurement in a mean
FADE = 0.98
PAUSE = 30.0  # seconds without a tier that could not be written
MOVED = 1.25  # a cost that has changed by this factor is told to the placement
MOVES = {"cut", "evict", "given_up"}  # of the keeper's counts
FORM, QUALITY = "int8", 0.9999  # of contexts without a profile. It loses 0.00002 nats (contexts-frontier.md)


class Place(NamedTuple):
    """The first ``tokens`` tokens of a prompt: whole blocks, named by the hash of the last."""

    block_hash: bytes
    tokens: int

    @property
    def key(self) -> str:
        """A name that says both, and that no other context has."""
        return f"{self.block_hash.hex()}.{self.tokens}"

    @classmethod
    def of(cls, key: str) -> Place:
        block_hash, _, tokens = key.partition(".")
        return cls(bytes.fromhex(block_hash), int(tokens))  # raises ValueError for what is no key


class Admission(NamedTuple):
    """A request whose context is stored."""

    place: Place
    packet: str
    """Requests with the same one are given the same rows."""
    exact: bool
    """Whether the packet lost nothing."""
    nbytes: int
    tier: str


@dataclass
class Known:
    """A context that is stored, or was offered."""

    place: Place
    context: Context
    """As the placement knows it."""
    steps: dict[tuple[str, int], tuple[str, Step]]
    """Form and step of the packet, by method and bytes of the option."""

    def step_of(self, option: Option) -> tuple[str, Step]:
        return self.steps[option.method, option.nbytes]


@dataclass
class Rates:
    """What was measured, as means that forget."""

    prefill: float = 0.0
    """Seconds per token. 0: not measured yet."""
    load: float = 0.0
    """Seconds per byte, from shared memory to rows that attention can read."""
    read: dict[str, float] = field(default_factory=dict)
    """The same from lower tiers to shared memory."""

    def see(self, name: str, value: float) -> None:
        before = getattr(self, name)
        setattr(self, name, value if not before else (1 - STEADY) * before + STEADY * value)

    def see_read(self, tier: str, value: float) -> None:
        self.read[tier] = (1 - STEADY) * self.read.get(tier, value) + STEADY * value

    def fade(self, tier: str) -> None:
        """Costs kept a context from being loaded. They are not measured again unless they become smaller."""
        self.load *= FADE
        if tier in self.read:
            self.read[tier] *= FADE


class ContextManager:
    """Decides for one engine.

    Args:
        header: ``header(key, tokens, form)``: what packets of a context say.
        workers: that report the end of each job.
        alpha, half_life: see :class:`~kara_kernels.contexts.place.Placement`.
        floor: the least quality that a context may be stored with.
        min_tokens: shorter contexts are left alone.
        lower: tiers below shared memory, from the fastest to the slowest. A quarter of the grains is then set aside
            for what passes through.
    """

    def __init__(
        self, *, grains: Grains, block_size: int, workers: int, header: Callable[[str, int, str], Header],
        alpha: float, floor: float, half_life: float, min_tokens: int,
        lower: Sequence[tuple[Tier, LowerTier]] = (), clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.grains, self.block_size = grains, block_size
        self.floor, self.min_tokens, self._header, self._clock = floor, min_tokens, header, clock
        self.rates = Rates()
        self.counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        """What happened, by a name and labels; see :mod:`.stats`."""
        staging = grains.count // 4 if lower else 0
        ram = Tier(RAM, (grains.count - staging) * grains.nbytes, 1e10)
        self._tiers = [ram, *(tier for tier, _ in lower)]
        self.keeper = Keeper(self._tiers, alpha=alpha, half_life=half_life)
        self.transfers = Transfers(self.keeper, grains, workers, self.counts, [place for _, place in lower], staging)
        self._most = staging or grains.count  # grains of a packet: it must be able to pass through
        self._known: dict[bytes, Known] = {}  # by the hash of the last block, the least recently used first
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._rows: dict[str, tuple[str, Sequence[int]]] = {}  # key: the request and blocks that have its full rows
        self._closed: dict[str, float] = {}  # tiers that get nothing, and until when
        self._stepped: tuple[float, int] = (clock(), 0)

    # -------------------------------------------------------------------------------------------------- requests

    def place(self, hashes: Sequence[bytes], prompt_tokens: int, asked: int | None) -> Place | None:
        """Which part of a prompt is its context: what the request ``asked`` for, or what an earlier one had too. The
        last token of a prompt is never part of it, because it must be computed."""
        hashes = hashes[: (prompt_tokens - 1) // self.block_size]
        if asked is not None:
            blocks = min(asked // self.block_size, len(hashes))
        else:
            blocks = next((n for n in range(len(hashes), 0, -1) if hashes[n - 1] in self._seen), 0)
            for each in hashes:
                self._seen[each] = None
                self._seen.move_to_end(each)
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)
        if blocks * self.block_size < max(1, self.min_tokens):
            return None
        return Place(hashes[blocks - 1], blocks * self.block_size)

    def admit(self, hashes: Sequence[bytes], prompt_tokens: int, local: int) -> Admission | None:
        """The longest stored context that a prompt begins with, if it is longer than the ``local`` tokens in the
        engine's own cache, and loading it takes less time than computing the rest of it."""
        for blocks in range((prompt_tokens - 1) // self.block_size, local // self.block_size, -1):
            known = self._known.get(hashes[blocks - 1])
            copy = None if known is None else self.keeper.get(known.place.key)
            if known is None or copy is None:
                continue
            form, step = known.step_of(copy.option)
            loading = self.seconds(0, step.nbytes, copy.tier)
            if self.rates.prefill and loading >= self.seconds(known.place.tokens - local):
                self.counts["slower",] += 1
                self.rates.fade(copy.tier)
                continue
            exact = form == "exact" and step.rows == known.place.tokens
            return Admission(known.place, f"{form} {step.sections} {copy.number}", exact, step.nbytes, copy.tier)
        return None

    def used(self, place: Place, source: str) -> None:
        """A request was admitted with rows of a packet, out of a tier, or out of the GPU's pool where they were."""
        self.counts["hits", source] += 1
        self.counts["hit_tokens", source] += place.tokens
        self.keeper.use(place.key, self._clock())
        self._renew(place.key)

    def seconds(self, computed: int, nbytes: int = 0, tier: str = RAM) -> float:
        """What computing tokens and loading bytes from a tier is expected to take."""
        return computed * self.rates.prefill + nbytes * (self.rates.load + self.rates.read.get(tier, 0.0))

    def load(self, request_id: str, admission: Admission, blocks: Sequence[int]) -> None:
        """Begins a load into ``blocks``."""
        place = admission.place
        job = Load(0, request_id, place.key, place.tokens, tuple(blocks), (), admission.nbytes)
        self.transfers.start(self.keeper.load(place.key), job, admission.packet)

    def offer(self, request_id: str, place: Place, blocks: Sequence[int]) -> None:
        """The rows of a context have been computed, and stay in ``blocks`` until :meth:`forget_rows`."""
        now, key = self._clock(), place.key
        self._rows[key] = request_id, tuple(blocks)
        if key in self.keeper:
            self.keeper.use(key, now, recomputed=True)
            self._renew(key)
            return
        known = self._describe(place)
        if not known.context.options:
            self.counts["too_large",] += 1
            return
        self._known[place.block_hash] = known
        self.keeper.add(known.context, now)
        if len(self._known) > SEEN:
            oldest = next(iter(self._known.values()))
            self._forget(oldest.place)

    def forget_rows(self, request_id: str) -> None:
        """The request's blocks are about to be freed. Stores that run hold them; see
        :meth:`.transfers.Transfers.storing`."""
        for key, (owner, _) in list(self._rows.items()):
            if owner == request_id:
                del self._rows[key]
                self.keeper.forget_rows(key)

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self, tokens: int) -> tuple[list[Store], list[Load]]:
        """Settles what is planned. Returns the jobs that begin with this step, which computes ``tokens``."""
        now, (before, computed) = self._clock(), self._stepped
        done = Counter(self.keeper.counts)
        if computed >= 2 * self.block_size:
            self.rates.see("prefill", (now - before) / computed)
        self._stepped = now, tokens
        self.transfers.step()
        for tier, cost in self.transfers.read_costs:
            self.rates.see_read(tier, cost)
        self.transfers.read_costs.clear()
        self._close_and_open(now)
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
            self.rates.see("load", how.seconds / job.nbytes)
        elif isinstance(job, Load):
            self.keeper.lost(job.context)
        return job

    def gauges(self) -> dict[tuple[str, ...], float]:
        """Values of now; see :mod:`.stats`."""
        return {
            **{("bytes", tier.name): self.keeper.directory.used(tier.name) for tier in self._tiers},
            **{("capacity_bytes", tier.name): tier.capacity for tier in self._tiers},
            ("stored_now",): len(self.keeper.directory),
            ("prefill_token_seconds",): self.rates.prefill,
            ("load_byte_seconds",): self.rates.load,
        }

    def _close_and_open(self, now: float) -> None:
        """A tier that could not be written is given nothing for a while: the plan would only try it again at once."""
        for tier in self._tiers:
            if tier.name in self.transfers.unwritable:
                self.keeper.placement.resize(tier.name, self.keeper.directory.used(tier.name))
                self._closed[tier.name] = now + PAUSE
                self.counts["closed", tier.name] += 1
            elif now >= self._closed.get(tier.name, math.inf):
                self.keeper.placement.resize(tier.name, tier.capacity - tier.reserve)
                del self._closed[tier.name]
        self.transfers.unwritable.clear()

    def restore(self, path: Path, is_whole: Callable[[int, int], bool]) -> None:
        """Takes over what an earlier process has saved with :meth:`Keeper.save`, and what can still be read.

        Args:
            is_whole: ``is_whole(number, grains)``: whether a copy lies on its lower tier with all its grains.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is damaged.
        """
        found, known = {}, {}
        for copy in read_snapshot(path)[1]:
            this = known[copy.key] = self._describe(Place.of(copy.key))
            readable = copy.tier != RAM and any(copy.option.same_bytes(x) for x in this.context.options)
            if readable and is_whole(copy.number, self.grains.needed(copy.option.nbytes)):
                found[copy.tier, copy.number] = copy.option.nbytes
        self.keeper.restore(path, found, lambda copy: known[copy.key].context, self._clock())
        for copy in self.keeper.directory.copies():
            self._known[known[copy.key].place.block_hash] = known[copy.key]
            self.transfers.adopt(copy)

    def _start(self, transfer: Transfer) -> None:
        target = transfer.target
        assert target is not None
        if transfer.source is not None:
            self.transfers.start(transfer)
            return
        request_id, blocks = self._rows[target.key]
        known = self._known[Place.of(target.key).block_hash]
        form, step = known.step_of(target.option)
        self.counts["stored", target.option.method, f"{target.option.ratio:.2f}"] += 1
        job = Store(0, request_id, target.key, known.place.tokens, blocks, (), form, "", step.sections)
        self.transfers.start(transfer, job)

    def _describe(self, place: Place) -> Known:
        """A context and what it may be stored as: without a profile, one safe form. Costs are those of now."""
        header = self._header(place.key, place.tokens, FORM)
        step = header.steps[-1]
        nbytes = self.grains.needed(step.nbytes) * self.grains.nbytes
        option = Option(f"none/{FORM}", step.ratio, nbytes, QUALITY, step.nbytes * self.rates.load)
        prefill = place.tokens * (self.rates.prefill or GUESS)
        options = (option,) if self.grains.needed(nbytes) <= self._most else ()
        context = Context(place.key, options, prefill, floor=self.floor)
        return Known(place, context, {(option.method, nbytes): (FORM, step)})

    def _renew(self, key: str) -> None:
        """A context was used. The placement hears what it costs now, if that differs much from what it knows."""
        known = self._known.pop(Place.of(key).block_hash)
        self._known[known.place.block_hash] = known  # the most recently used
        prefill = known.place.tokens * (self.rates.prefill or GUESS)
        if not 1 / MOVED < prefill / known.context.prefill_seconds < MOVED:
            known.context = self._describe(known.place).context
            self.keeper.change(known.context)

    def _forget(self, place: Place) -> None:
        del self._known[place.block_hash]
        self._rows.pop(place.key, None)
        self.keeper.remove(place.key)
