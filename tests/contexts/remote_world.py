"""Servers that share a store, to test with. Nothing happens in the store until it is told to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch

from kara_kernels import PayloadLayout
from kara_kernels.contexts.directory import Copy
from kara_kernels.contexts.packet import Header
from kara_kernels.contexts.utility import Tier
from kara_kernels.integrations.vllm.contexts.catalogue import Catalogue
from kara_kernels.integrations.vllm.contexts.grains import Grains
from kara_kernels.integrations.vllm.contexts.jobs import Ended, Load, Store
from kara_kernels.integrations.vllm.contexts.manager import ContextManager, Place
from kara_kernels.integrations.vllm.contexts.remote import CAPACITY, REMOTE, RemoteTier
from kara_kernels.integrations.vllm.contexts.sharing import Sharing
from kara_kernels.integrations.vllm.contexts.store import StoreError

BLOCK, GRAIN, ROW, TTL = 16, 512, 520, 1000  # a row has more bytes than a worker uses


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeStore:
    """Values with a time to live.

    Attributes:
        faults: of the commands to come, in their order; what is left over succeeds.
        before: called before each command.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.values: dict[str, tuple[bytes, float]] = {}
        self.faults: list[str | None] = []
        self.before: Callable[[str], None] = lambda command: None
        self.commands: list[str] = []
        self._clock = clock

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        self._begin("get")
        return [self._value(name) for name in names]

    def write(self, name: str, value: bytes | memoryview, seconds: int) -> None:
        self._begin("write")
        self.values[name] = bytes(value), self._clock() + seconds

    def refresh(self, names: Sequence[str], seconds: int) -> bool:
        self._begin("refresh")
        there = [name for name in names if self._value(name) is not None]
        for name in there:
            self.values[name] = self.values[name][0], self._clock() + seconds
        return len(there) == len(names)

    def delete(self, names: Sequence[str]) -> None:
        self._begin("delete")
        for name in names:
            self.values.pop(name, None)

    def drop(self, name: str, value: bytes) -> None:
        self._begin("drop")
        if self._value(name) == value:
            del self.values[name]

    def close(self) -> None: ...

    def _begin(self, command: str) -> None:
        self.commands.append(command)
        self.before(command)
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise StoreError(fault, f"{fault} on purpose")

    def _value(self, name: str) -> bytes | None:
        value, until = self.values.get(name, (None, -math.inf))
        return value if self._clock() < until else None


class Threads(Executor):
    """Calls what was submitted when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, body: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert not kwargs
        future: Future[Any] = Future()
        self.waiting.append((future, body, args))
        return future

    def run(self, index: int = 0) -> None:
        future, body, args = self.waiting.pop(index)
        future.set_result(body(*args))  # a body that raises ends the test

    def run_all(self) -> None:
        while self.waiting:
            self.run()


def hashes(text: str) -> list[bytes]:
    """Of a prompt whose letters are blocks: each covers everything before it."""
    return [hashlib.sha256(text[: i + 1].encode()).digest() for i in range(len(text))]


def place_of(text: str) -> Place:
    """The context that is the whole text."""
    return Place(hashes(text)[-1], BLOCK * len(text))


def header(key: str, tokens: int, method: str) -> Header:
    layout = PayloadLayout(
        layers=1, heads=1, dim=16, v_dim=16, dtype=torch.bfloat16, tokens=tokens, rows=tokens,
        form=method.partition("/")[2], places=False,
    )  # fmt: skip
    return Header("a model", key, layout)


def grain_of(key: str, place: int, writer: str) -> np.ndarray:
    """What one server's packet of a context has in a grain."""
    seed = hashlib.sha256(f"{key} {place} {writer}".encode()).digest()
    return np.frombuffer(seed * (ROW // 32 + 1), np.uint8)[:ROW]


class Shelf:
    """A disk between memory and the store, which has done at once what it is told."""

    name, resting = "disk", False

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.copies: dict[tuple[int, int], np.ndarray] = {}
        self.over: list[tuple[int, bool, float]] = []

    def has(self, copy: Copy) -> bool:
        return False

    def write(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        self.copies.update({(copy.number, i): self.rows[grain].copy() for i, grain in enumerate(grains)})
        self.over.append((job, True, 0.1))

    def read(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        for i, grain in enumerate(grains):
            self.rows[grain] = self.copies[copy.number, i]
        self.over.append((job, True, 0.1))

    def ended(self) -> list[tuple[int, bool, float]]:
        over, self.over = self.over, []
        return over

    def erase(self, copy: Copy, grains: Sequence[int]) -> None:
        for i in grains:
            self.copies.pop((copy.number, i), None)

    def spoiled(self, copy: Copy) -> None: ...


class Server:
    """Decisions of one server, and workers that write the server's name into packets."""

    def __init__(self, name: str, store: FakeStore, clock: Clock, grains: int = 64, disk: int = 0) -> None:
        """``disk``: grains of a disk in between."""
        self.name, self.clock, self.threads = name, clock, Threads()
        self.rows = np.zeros((grains, ROW), np.uint8)
        self.tier = RemoteTier(store, "model", self.rows, grain=GRAIN, ttl=TTL, clock=clock, threads=self.threads)
        region = Grains(grains, GRAIN)
        lower: list[tuple[Tier, Any]] = [(Tier("disk", disk * GRAIN, 1e9), Shelf(self.rows))] if disk else []
        lower.append((Tier(REMOTE, CAPACITY, 1e9), self.tier))
        self.manager = ContextManager(
            grains=region, block_size=BLOCK, workers=1, catalogue=Catalogue(header, region, windows=True, left=True),
            clock=clock, alpha=100.0, floor=0.9, half_life=100.0, min_tokens=2 * BLOCK, lower=lower,
        )  # fmt: skip
        self.manager.rates.prefill = 1e-2
        self.sharing = Sharing(self.manager, self.tier, wait=1.0, clock=clock)

    def step(self) -> tuple[list[Store], list[Load]]:
        jobs = self.manager.step(0)
        self.sharing.step()
        return jobs

    def reset(self) -> bool:
        """vLLM's caches are reset."""
        no_load_runs = self.manager.reset()
        self.sharing.reset()
        return no_load_runs

    def encode(self, job: Store, ok: bool = True) -> None:
        for i, grain in enumerate(job.grains):
            self.rows[grain] = grain_of(job.context, i, self.name)
        self.manager.ended(job.number, Ended(1, ok, 0.1, "" if ok else "failed"))

    def decode(self, job: Load, writers: Sequence[str]) -> str | None:
        """Ends a load. Returns who has written what was loaded; None: the load failed."""
        for writer in writers:
            expected = [grain_of(job.context, i, writer) for i in range(self.manager.grains.needed(job.nbytes))]
            found = [self.rows[grain] for grain in job.grains]
            if len(found) == len(expected) and all(map(np.array_equal, found, expected)):
                self.manager.ended(job.number, Ended(1, True, 0.1))
                return writer
        self.manager.ended(job.number, Ended(1, False, 0.1, "damaged"))  # checksums and names say so
        return None

    def store(self, text: str) -> None:
        """Computes a context, and stores it in memory."""
        self.manager.offer("writer", place_of(text), range(len(text)), ())
        stores, _ = self.step()
        for job in stores:
            self.encode(job)
        self.manager.rows.forget("writer")

    def rest(self) -> None:
        """Steps until nothing is left to do but loads."""
        for _ in range(6):
            self.step()
            self.threads.run_all()

    def look(self, text: str, asked: str | None = None) -> None:
        """A request comes, and its lookup is answered."""
        prompt = text + "?"
        self.sharing.arrived("reader", hashes(prompt), BLOCK * len(prompt), (), place_of(asked) if asked else None)
        self.threads.run_all()
        assert not self.sharing.is_looking("reader", 0)

    def load(self, text: str, writers: Sequence[str] = ("a", "b")) -> str | None:
        """Admits a request and loads its context. Returns who has written it."""
        prompt = text + "?"
        admission = self.manager.admissions.find(hashes(prompt), BLOCK * len(prompt), 0)
        assert admission is not None
        self.manager.load("reader", admission, range(admission.place.tokens // BLOCK))
        for _ in range(4):
            self.threads.run_all()
            _, loads = self.step()
            for job in loads:
                return self.decode(job, writers)
        raise AssertionError("the load never ended")

    def tier_of(self, text: str) -> str | None:
        copy = self.manager.keeper.get(place_of(text).key)
        return None if copy is None else copy.tier
