"""What is stored, admitted and dropped: the decisions, in the scheduler's process. No tensor is touched here."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kara_kernels.contexts.directory import Transfer
from kara_kernels.contexts.keeper import Keeper
from kara_kernels.contexts.packet import Header, Step
from kara_kernels.contexts.utility import Context, Option, Tier

from .grains import Grains
from .jobs import Ended, Load, Store

RAM, GPU = "ram", "gpu"
SEEN = 65_536  # block hashes that are remembered, to find what requests share
GUESS = 1e-3  # seconds to compute a token, until a step was measured
STEADY = 0.2  # weight of the newest measurement in a mean
FADE = 0.98  # a cost that keeps contexts from being loaded is not measured again, so it becomes smaller
MOVED = 1.25  # a cost that has changed by this factor is told to the placement
MOVES = {"cut", "evict", "given_up"}  # of the keeper's counts
FORM, QUALITY = "int8", 0.9999  # of contexts without a profile: exp of -0.00002 nats, measured (contexts-frontier.md)


class Place(NamedTuple):
    """The first ``tokens`` tokens of a prompt: whole blocks, named by the hash of the last."""

    block_hash: bytes
    tokens: int

    @property
    def key(self) -> str:
        return self.block_hash.hex()


class Admission(NamedTuple):
    """A request whose context is stored."""

    place: Place
    packet: str
    """Requests with the same one are given the same rows."""
    exact: bool
    """Whether the packet lost nothing."""
    nbytes: int


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

    def see(self, name: str, value: float) -> None:
        before = getattr(self, name)
        setattr(self, name, value if not before else (1 - STEADY) * before + STEADY * value)


@dataclass
class _Running:
    transfer: Transfer
    job: Store | Load
    packet: str
    ended: Ended = field(default_factory=lambda: Ended(0, True, 0.0))


class ContextManager:
    """Decides for one engine.

    Args:
        header: ``header(key, tokens, form)``: what packets of a context say.
        workers: that report the end of each job.
        alpha, half_life: see :class:`~kara_kernels.contexts.place.Placement`.
        floor: the least quality that a context may be stored with.
        min_tokens: shorter contexts are left alone.
    """

    def __init__(
        self, *, grains: Grains, block_size: int, workers: int, header: Callable[[str, int, str], Header],
        alpha: float, floor: float, half_life: float, min_tokens: int, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.grains, self.block_size, self.workers = grains, block_size, workers
        self.floor, self.min_tokens, self._header, self._clock = floor, min_tokens, header, clock
        self.keeper = Keeper([Tier(RAM, grains.count * grains.nbytes, 1e10)], alpha=alpha, half_life=half_life)
        self.rates = Rates()
        self.counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        """What happened, by a name and labels; see :mod:`.stats`."""
        self._known: dict[bytes, Known] = {}  # by the hash of the last block, the least recently used first
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._rows: dict[str, tuple[str, Sequence[int]]] = {}  # key: the request and blocks that have its full rows
        self._held: dict[int, list[int]] = {}  # grains of copies, by their numbers
        self._running: dict[int, _Running] = {}
        self._numbers = 0
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
            if self.rates.prefill and self.seconds(0, step.nbytes) >= self.seconds(known.place.tokens - local):
                self.counts["slower",] += 1
                self.rates.load *= FADE
                continue
            exact = form == "exact" and step.rows == known.place.tokens
            return Admission(known.place, f"{form} {step.sections} {copy.number}", exact, step.nbytes)
        return None

    def is_loading(self, packet: str) -> bool:
        return any(one.packet == packet for one in self._running.values())

    def used(self, place: Place, source: str) -> None:
        """A request was admitted with rows of a packet, out of a tier, or out of the GPU's pool where they were."""
        self.counts["hits", source] += 1
        self.counts["hit_tokens", source] += place.tokens
        self.keeper.use(place.key, self._clock())
        self._renew(place.key)

    def seconds(self, computed: int, nbytes: int = 0) -> float:
        """What computing tokens and loading bytes is expected to take."""
        return computed * self.rates.prefill + nbytes * self.rates.load

    def load(self, request_id: str, admission: Admission, blocks: Sequence[int]) -> Load:
        """Begins a load into ``blocks``."""
        known = self._known[admission.place.block_hash]
        transfer = self.keeper.load(known.place.key)
        assert transfer.source is not None
        step = known.step_of(transfer.source.option)[1]
        job = Load(
            self._number(), request_id, known.place.key, known.place.tokens, tuple(blocks),
            tuple(self._held[transfer.source.number]), step.nbytes,
        )  # fmt: skip
        self._running[job.number] = _Running(transfer, job, admission.packet)
        return job

    def offer(self, request_id: str, place: Place, blocks: Sequence[int]) -> None:
        """The rows of a context have been computed, and stay in ``blocks`` until :meth:`forget_rows`."""
        now, key = self._clock(), place.key
        self._rows[key] = request_id, tuple(blocks)
        if key in self.keeper:
            self.keeper.use(key, now, recomputed=True)
            self._renew(key)
            return
        known = self._known[place.block_hash] = self._describe(place)
        self.keeper.add(known.context, now)
        if len(self._known) > SEEN:
            oldest = next(iter(self._known.values()))
            self._forget(oldest.place)

    def forget_rows(self, request_id: str) -> None:
        """The request's blocks are about to be freed. Stores that run hold them; see :meth:`storing`."""
        for key, (owner, _) in list(self._rows.items()):
            if owner == request_id:
                del self._rows[key]
                self.keeper.forget_rows(key)

    def storing(self, request_id: str) -> list[int]:
        """Jobs that read the request's blocks."""
        jobs = (one.job for one in self._running.values())
        return [job.number for job in jobs if isinstance(job, Store) and job.request_id == request_id]

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self, tokens: int) -> list[Store]:
        """Settles what is planned. Returns the stores that begin with this step, which computes ``tokens``."""
        now, (before, computed) = self._clock(), self._stepped
        done = Counter(self.keeper.counts)
        if computed >= 2 * self.block_size:
            self.rates.see("prefill", (now - before) / computed)
        self._stepped = now, tokens
        transfers = self.keeper.work()
        self._erase()  # before the transfers, which are given the room
        done = self.keeper.counts - done
        if done["cut"]:
            self._trim()
        for move in MOVES & set(done):
            self.counts["moves", move] += done[move]
        return [self._store(transfer) for transfer in transfers]

    def ended(self, number: int, ended: Ended) -> Store | Load | None:
        """A report of a job. Returns the job when all workers have reported it."""
        running = self._running[number]
        running.ended = running.ended.and_another(ended)
        if running.ended.workers < self.workers:
            return None
        del self._running[number]
        job, how = running.job, running.ended
        self.keeper.finish(running.transfer, how.ok)
        kind = type(job).__name__.lower()
        self.counts["jobs", kind, how.error or "ok"] += 1
        self.counts["job_seconds", kind] += how.seconds
        if how.ok and isinstance(job, Load):
            self.rates.see("load", how.seconds / job.nbytes)
        elif isinstance(job, Load):
            self.keeper.lost(job.context)
        return job

    def gauges(self) -> dict[tuple[str, ...], float]:
        """Values of now; see :mod:`.stats`."""
        return {
            ("bytes", RAM): self.keeper.directory.used(RAM),
            ("capacity_bytes", RAM): self.grains.count * self.grains.nbytes,
            ("stored_now",): len(self.keeper.directory),
            ("prefill_token_seconds",): self.rates.prefill,
            ("load_byte_seconds",): self.rates.load,
        }

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def _store(self, transfer: Transfer) -> Store:
        target = transfer.target
        assert target is not None
        assert transfer.source is None  # there is one tier
        request_id, blocks = self._rows[target.key]
        known = self._known[bytes.fromhex(target.key)]
        form, step = known.step_of(target.option)
        grains = self.grains.take(target.option.nbytes)
        assert grains is not None  # options have whole grains, so the directory has counted them
        self._held[target.number] = grains
        self.counts["stored", target.option.method, f"{target.option.ratio:.2f}"] += 1
        job = Store(
            self._number(), request_id, target.key, known.place.tokens, blocks, tuple(grains), form, "", step.sections
        )
        self._running[job.number] = _Running(transfer, job, "")
        return job

    def _describe(self, place: Place) -> Known:
        """A context and what it may be stored as: without a profile, one safe form. Costs are those of now."""
        header = self._header(place.key, place.tokens, FORM)
        step = header.steps[-1]
        nbytes = self.grains.needed(step.nbytes) * self.grains.nbytes
        option = Option(f"none/{FORM}", step.ratio, nbytes, QUALITY, step.nbytes * self.rates.load)
        prefill = place.tokens * (self.rates.prefill or GUESS)
        context = Context(place.key, (option,), prefill, floor=self.floor)
        return Known(place, context, {(option.method, nbytes): (FORM, step)})

    def _renew(self, key: str) -> None:
        """A context was used. The placement hears what it costs now, if that differs much from what it knows."""
        known = self._known.pop(bytes.fromhex(key))
        self._known[known.place.block_hash] = known  # the most recently used
        prefill = known.place.tokens * (self.rates.prefill or GUESS)
        if not 1 / MOVED < prefill / known.context.prefill_seconds < MOVED:
            known.context = self._describe(known.place).context
            self.keeper.change(known.context)

    def _forget(self, place: Place) -> None:
        del self._known[place.block_hash]
        self._rows.pop(place.key, None)
        self.keeper.remove(place.key)

    def _erase(self) -> None:
        for copy in self.keeper.erasable():
            self.grains.give_back(self._held.pop(copy.number))

    def _trim(self) -> None:
        """Gives back the grains of what was cut."""
        for copy in self.keeper.directory.copies():
            kept = self.grains.needed(copy.option.nbytes)
            held = self._held[copy.number]
            self.grains.give_back(held[kept:])
            del held[kept:]

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
