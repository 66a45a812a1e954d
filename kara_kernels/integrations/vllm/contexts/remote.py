"""The remote tier: packets in a store that several servers share.

A packet is as many values as it has grains, each with the parts of all workers, under names that no other packet has.
A manifest, named by the context, says which packet it is. It is written last, so a packet is whole when it is found.
The store drops what nobody uses; grains outlive the manifest that leads to them.

What an operation needs of shared memory is lent to it until its deadline. Then it has failed, whatever its thread still
waits for, and touches that memory no more.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from kara_kernels.contexts.directory import Copy
from kara_kernels.contexts.utility import Option, Tier
from kara_kernels.values import check_count

from .closed import PAUSE
from .known import Place
from .manager import SEEN
from .store import TIMEOUT, StoreError, ValueStore

REMOTE = "remote"
THREADS = 4  # for packets, and two for lookups
SLOWEST = 50e6  # bytes per second: a store that is slower has failed
FRESH = 300.0  # seconds for which it is believed that the store still has what was used there
LONGER = 60  # seconds that grains outlive a manifest
CAPACITY = 2**60  # bytes: the store has a limit of its own
LONGEST = 1024  # bytes of a manifest
SIZE = 1 << 20  # bytes that are read to measure a store

logger = logging.getLogger("vllm.kara")  # a child of vLLM's logger: its handlers and levels apply


class Manifest(NamedTuple):
    """What the store has of a context."""

    packet: str
    """Names the grains. No two packets share it."""
    method: str
    nbytes: int
    """Whole grains, of each worker, as in :class:`~kara_kernels.contexts.utility.Option`."""

    @classmethod
    def read(cls, data: bytes | None, most: int) -> Manifest | None:
        """None: it is missing, or none of a packet of at most ``most`` bytes."""
        with suppress(ValueError, TypeError):
            packet, method, nbytes = json.loads(data if data and len(data) < LONGEST else b"")
            if re.fullmatch("[0-9a-f]{32}", packet) and isinstance(method, str):
                return cls(packet, method, check_count("nbytes", nbytes, 1, most))
        return None

    def to_bytes(self) -> bytes:
        return json.dumps(self).encode()

    def holds(self, option: Option) -> bool:
        """Whether ``option`` is this packet, or a prefix of it."""
        return self.method == option.method and self.nbytes >= option.nbytes


class _Job:
    """A read or a write. ``lent``: whether it may touch shared memory."""

    def __init__(self, number: int, copy: Copy, begun: float, deadline: float, nbytes: int) -> None:
        self.number, self.copy, self.begun, self.deadline, self.nbytes = number, copy, begun, deadline, nbytes
        self.lent, self.lock = True, threading.Lock()
        self.manifest: Manifest | None = None  # of the packet that is there, when it has succeeded

    def end(self) -> bool:
        """Takes back the memory. False: it has ended, or is just writing there."""
        if not self.lock.acquire(blocking=False):
            return False
        lent, self.lent = self.lent, False
        self.lock.release()
        return lent


class RemoteTier:
    """Grains of copies as values; see :class:`~.transfers.LowerTier`. Only threads of its own wait for the store.

    Args:
        model: names what makes rows differ, and what makes packets differ in shape.
        rows: uint8 ``[grains, bytes]``, the shared memory.
        grain: bytes of a row that one worker uses, by which packets are counted.
        ttl: seconds that a value lives after its last use.
        threads: for tests.

    Attributes:
        errors: what failed, until somebody takes it: as in :class:`~.store.StoreError`, or ``"failed"``.
    """

    name = REMOTE

    def __init__(
        self, store: ValueStore, model: str, rows: np.ndarray, *, grain: int, ttl: float,
        clock: Callable[[], float] = time.monotonic, threads: Executor | None = None,
    ) -> None:  # fmt: skip
        self._store, self._prefix, self._rows, self._clock = store, f"kara:{model}", rows, clock
        self._grain, self._ttl = grain, math.ceil(ttl)
        self._threads = threads or ThreadPoolExecutor(THREADS, thread_name_prefix="kara-remote")
        self._looking = threads or ThreadPoolExecutor(2, thread_name_prefix="kara-lookup")
        self.errors: deque[str] = deque()
        self._rests_until = -math.inf
        self._copies: dict[int, Manifest] = {}  # by the number of the copy
        self._there: OrderedDict[str, tuple[Manifest, float]] = OrderedDict()  # by context, and when it was used
        self._spoiled: OrderedDict[str, None] = OrderedDict()  # packets that are not used again
        self._jobs: dict[int, _Job] = {}
        self._over: deque[_Job] = deque()
        self._owed = 0  # bytes of all jobs

    # ------------------------------------------------------------------------------------- in the scheduler's thread

    @property
    def resting(self) -> bool:
        return self._clock() < self._rests_until

    def rest(self, what: str, why: str) -> None:
        """Leaves the store alone for a while."""
        self.errors.append(what)
        if not self.resting:
            logger.error("Kara's remote tier is left alone for %d seconds: %s", PAUSE, why)
        self._rests_until = max(self._rests_until, self._clock() + PAUSE)

    def leave(self) -> None:
        """Leaves the store alone for good. What was under way fails, and what was not complete is deleted."""
        if self._rests_until < math.inf:
            logger.warning("Kara's remote tier is left until this server restarts, because vLLM's caches were reset")
        self._rests_until = math.inf
        self._over.extend(job for job in self._jobs.values() if job.end())

    def failed(self, error: StoreError, writing: bool) -> None:
        """Leaves the store alone, unless it only refused to be written, and can still be read: a full one, for
        example. The manager gives it nothing for a while."""
        if writing and error.what == "refused":
            self.errors.append(error.what)
            logger.error("Kara's remote tier cannot be written: %s", error)
        else:
            self.rest(error.what, str(error))

    def write(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        self._begin(job, copy, self._write, copy.option, grains)

    def read(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        self._begin(job, copy, self._read, self._copies[copy.number], grains)

    def ended(self) -> Iterable[tuple[int, bool, float]]:
        now = self._clock()
        for job in self._jobs.values():
            if now > job.deadline and job.end():
                self._over.append(job)
                self.rest("slow", f"{job.nbytes} bytes took more than {job.deadline - job.begun:.1f} seconds")
        while self._over:
            job = self._over.popleft()
            del self._jobs[job.number]
            self._owed -= job.nbytes
            if job.manifest is None:
                self._there.pop(job.copy.key, None)
            else:
                self._note(job.copy, job.manifest)
            yield job.number, job.manifest is not None, now - job.begun

    def erase(self, copy: Copy, grains: Sequence[int]) -> None:
        """The store itself drops what nobody uses."""
        if 0 in grains:
            self._copies.pop(copy.number, None)

    def has(self, copy: Copy) -> bool:
        if not self.is_fresh(copy.key) or not self._there[copy.key][0].holds(copy.option):
            return False
        self._copies[copy.number] = self._there[copy.key][0]
        return True

    def spoiled(self, copy: Copy) -> None:
        """Nobody shall find this packet again."""
        there, _ = self._there.pop(copy.key, (None, 0.0))
        for manifest in {self._copies.get(copy.number), there}:
            if manifest is not None:
                self._spoiled[manifest.packet] = None
                self._threads.submit(self._guarded, self._forget, copy.key, manifest)
        while len(self._spoiled) > SEEN:
            self._spoiled.popitem(last=False)

    def is_fresh(self, key: str) -> bool:
        """Whether the store has a context, and heard of its use not long ago."""
        return self._clock() - self._there.get(key, (None, -math.inf))[1] < min(FRESH, self._ttl / 4)

    def found(self, copy: Copy, manifest: Manifest) -> None:
        """A copy that another server has written."""
        self._copies[copy.number] = manifest

    def look(self, places: Sequence[Place]) -> Future[Sequence[tuple[Place, Manifest]] | None]:
        """What the store has of contexts, in the order in which they are given. None: it did not say."""
        return self._looking.submit(self._guarded, self._look, places)

    def shutdown(self) -> None:
        self._rests_until = math.inf
        for job in self._jobs.values():
            with job.lock:
                job.lent = False
        self._store.close()
        for threads in (self._threads, self._looking):
            threads.shutdown(wait=True, cancel_futures=True)
        self._rows = np.empty((0, 0), np.uint8)  # the shared memory can be unmapped only when nothing refers to it

    def _begin(self, number: int, copy: Copy, body: Callable[..., Any], what: Any, grains: Sequence[int]) -> None:
        now, nbytes = self._clock(), len(grains) * self._rows.shape[1]
        self._owed += nbytes
        job = self._jobs[number] = _Job(number, copy, now, now + TIMEOUT + self._owed / SLOWEST, nbytes)
        self._threads.submit(self._run, job, body, what, tuple(grains))

    def _note(self, copy: Copy, manifest: Manifest) -> None:
        """A packet was written, or used."""
        if copy.tier == REMOTE:
            self._copies[copy.number] = manifest
        if manifest.packet in self._spoiled:  # while it was under way
            return
        self._there[copy.key] = manifest, self._clock()
        self._there.move_to_end(copy.key)
        while len(self._there) > SEEN:
            self._there.popitem(last=False)

    # ---------------------------------------------------------------------------------------------------- in threads

    def _guarded(self, body: Callable[..., Any], *args: Any) -> Any:
        """None if the store is left alone, or does not answer."""
        if self.resting:
            return None
        try:
            return body(*args)
        except StoreError as error:
            self.failed(error, writing=body == self._write)
        except Exception:
            self.errors.append("failed")
            logger.exception("Kara's remote tier failed")
        return None

    def _run(self, job: _Job, body: Callable[..., Any], *args: Any) -> None:
        manifest = self._guarded(body, job, *args) if job.lent else None
        with job.lock:
            if job.lent:
                job.lent, job.manifest = False, manifest
                self._over.append(job)

    def _read(self, job: _Job, manifest: Manifest, grains: Sequence[int]) -> Manifest | None:
        names = self._grains(manifest)[: len(grains)]  # fewer, if the copy is a prefix of the packet
        for name, grain in zip(names, grains, strict=True):
            (data,) = self._store.get([name])
            if data is None or len(data) != self._rows.shape[1]:
                self._forget(job.copy.key, manifest)
                return None
            with job.lock:
                if not job.lent:
                    return None
                self._rows[grain] = np.frombuffer(data, np.uint8)
        self._refresh(job.copy.key, manifest)
        return manifest

    def _write(self, job: _Job, option: Option, grains: Sequence[int]) -> Manifest | None:
        manifest = self._find(job.copy.key)
        if manifest is not None and manifest.holds(option) and self._refresh(job.copy.key, manifest):
            return manifest
        manifest = Manifest(uuid.uuid4().hex, option.method, option.nbytes)
        names = self._grains(manifest)
        try:
            for name, grain in zip(names, grains, strict=True):
                if job.lent:
                    self._store.write(name, self._rows[grain].data, self._ttl + LONGER)
            if job.lent:  # else others may have written into the memory meanwhile
                self._store.write(self._name(job.copy.key), manifest.to_bytes(), self._ttl)
                return manifest
        except StoreError as error:
            if error.what != "refused":
                raise
            self._store.delete(names)  # it is full, for example
            raise
        self._store.delete(names)
        return None

    def _look(self, places: Sequence[Place]) -> Sequence[tuple[Place, Manifest]]:
        found = self._store.get([self._name(place.key) for place in places])
        read = zip(places, map(self._manifest, found), strict=True)
        return [(place, manifest) for place, manifest in read if manifest is not None]

    def _forget(self, key: str, manifest: Manifest) -> None:
        self._store.drop(self._name(key), manifest.to_bytes())

    def _refresh(self, key: str, manifest: Manifest) -> bool:
        """A packet is used. Returns whether it is there."""
        grains = self._grains(manifest)
        return self._store.refresh(grains, self._ttl + LONGER) and self._store.refresh([self._name(key)], self._ttl)

    def _find(self, key: str) -> Manifest | None:
        return self._manifest(self._store.get([self._name(key)])[0])

    def _manifest(self, data: bytes | None) -> Manifest | None:
        manifest = Manifest.read(data, len(self._rows) * self._grain)
        return None if manifest is None or manifest.packet in self._spoiled else manifest

    def _name(self, key: str) -> str:
        return f"{self._prefix}:{key}"

    def _grains(self, manifest: Manifest) -> list[str]:
        return [f"{self._prefix}:{manifest.packet}:{i}" for i in range(-(-manifest.nbytes // self._grain))]


def measured(store: ValueStore, tier: RemoteTier, share: float, size: int = SIZE) -> Tier:
    """The tier as the placement knows it: bytes per second of those that one worker uses. Loads are measured again.

    Args:
        share: of a grain's bytes that one worker uses.
        size: bytes that are read.
    """
    times, name = [], f"kara:speed:{uuid.uuid4().hex}"
    try:
        store.write(name, bytes(size), LONGER)
        for read in (lambda: store.get([f"{name}:0"]), lambda: store.get([name])):
            begun = time.perf_counter()
            read()
            times.append(time.perf_counter() - begun)
        store.delete([name])
    except StoreError as error:
        tier.failed(error, writing=True)
        times = [1e-3, 1e-3 + size / 1e9]
    latency, seconds = times
    return Tier(REMOTE, CAPACITY, size / max(seconds - latency, 1e-6) * share, latency)
