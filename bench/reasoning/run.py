"""A server for every method and retention, the same problems for each.

What was measured is written at once, and a later run goes on from there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench import tables
from bench.store import Store, digest, digest_of_folders
from bench.tables import Row
from demos import DemoError
from demos.screen import Screen
from demos.serve.server import MODEL, Server, Settings, serving

from .ask import Reply, ask_all, closeness
from .problems import Problem, problems

FULL, AGAIN = "full", "full again"
WRITE_EVERY = 5  # replies
POLL_SECONDS = 1.0
SAMPLES = {
    "held": "kara:request_retention_sum", "ended": "kara:request_retention_count",
    "drafted": "vllm:spec_decode_num_draft_tokens_total", "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}  # fmt: skip
"""What a server's metrics say about a cell."""


class Cell(NamedTuple):
    """A method at a retention. The full cache has retention 1, and is asked twice in different orders."""

    method: str
    retention: float

    @property
    def label(self) -> str:
        return self.method if self.retention == 1 else f"{self.method}, {self.retention:.0%}"


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    model: str
    """A directory or a name."""
    cells: list[Cell]
    count: int
    seed: int
    limit: int
    """Most tokens of a reply."""
    window: int
    tail: int
    at_once: int
    dtype: str
    block_size: int
    cpu: bool
    threads: int | None = None
    server: str | None = None
    """A running server instead, and its one cell is in ``cells``."""
    drafts: int = 0
    """Tokens that n-grams propose for each step."""
    untimed: bool = False
    """Leave out times, because other work runs on this machine."""

    def kara(self, cell: Cell) -> dict[str, Any] | None:
        """The plugin's settings; None for the full cache."""
        if cell.method in (FULL, AGAIN):
            return None
        return {"window": self.window, "keep": round(cell.retention * self.window), "tail": self.tail,
                "scorer": cell.method}  # fmt: skip

    def settings(self, cell: Cell) -> Settings:
        longest = 2048 if self.limit <= 1024 else 2 * self.limit
        return Settings(
            model=self.model, blocks=self.at_once * -(-longest // self.block_size), block_size=self.block_size,
            max_model_len=longest, max_requests=self.at_once, dtype=self.dtype, eager=self.cpu, cpu=self.cpu,
            threads=self.threads, kara=self.kara(cell), drafts=self.drafts,
        )  # fmt: skip

    def facts(self) -> Row:
        """What all rows of a file share. Rows of other facts are never mixed with these."""
        return {
            "model": Path(self.model).name, "seed": self.seed, "limit": self.limit, "window": self.window,
            "tail": self.tail, "dtype": self.dtype, "code": digest_of_folders("bench/reasoning/problems.py")[:12],
            **({"drafts": self.drafts} if self.drafts else {}),
        }  # fmt: skip


@dataclass
class Usage:
    """What serving one cell cost, added up over runs."""

    seconds: float = 0.0
    tokens: float = 0.0
    """In these seconds."""
    held: float = 0.0
    """Sum over ended requests of the share of their tokens that they held."""
    ended: float = 0.0
    peak: float = 0.0
    """Most of the blocks that were in use at once."""
    drafted: float = 0.0
    accepted: float = 0.0
    """Tokens that n-grams proposed, and how many of them were right."""

    def row(self, cell: Cell) -> Row:
        return {"kind": "cell", "method": cell.method, "retention": cell.retention, **self.__dict__}


@dataclass
class Run:
    plan: Plan
    path: Path
    """The table. Rows that it has are not measured again."""
    store: Store
    screen: Screen
    logs: Path
    answers: dict[tuple[str, float, str], Row] = field(default_factory=dict)
    usages: dict[Cell, Usage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.problems = problems(self.plan.count, self.plan.seed)
        if self.path.exists():
            head, rows = tables.read(self.path)
            if head != self.plan.facts():
                raise DemoError(f"{self.path}: expected rows of {self.plan.facts()}, got {head}; choose another --out")
            for row in rows:
                if row["kind"] == "answer":
                    self.answers[row["method"], row["retention"], row["problem"]] = row
                else:
                    cell = Cell(row["method"], row["retention"])
                    self.usages[cell] = Usage(**{name: row.get(name, 0.0) for name in Usage.__dataclass_fields__})
                    if self.plan.untimed:
                        self.usages[cell].seconds = self.usages[cell].tokens = 0.0

    def records(self) -> list[Row]:
        return [*self.answers.values(), *(usage.row(cell) for cell, usage in self.usages.items())]

    def write(self) -> None:
        tables.write(self.path, self.records(), **self.plan.facts())

    def measure(self) -> None:
        """All cells in order, with progress."""
        todo = {cell: self._missing(cell) for cell in self.plan.cells}
        full = Cell(FULL, 1.0)
        if self.plan.server is None and (lost := self._unknown(todo)):
            todo = {full: [*todo.get(full, []), *lost], **{cell: few for cell, few in todo.items() if cell != full}}
        phases: dict[str, float] = {}
        with self.screen.phase(phases, "reasoning", sum(map(len, todo.values())), "replies") as advance:
            for cell, few in todo.items():
                if few:
                    self._measure(cell, few, lambda cell=cell: advance(1, cell.label))

    def _missing(self, cell: Cell) -> list[Problem]:
        wanted = self.problems[::-1] if cell.method == AGAIN else self.problems
        return [problem for problem in wanted if (*cell, problem.name) not in self.answers]

    def _unknown(self, todo: dict[Cell, list[Problem]]) -> list[Problem]:
        """Problems whose reply from the full cache was told to another machine, and is needed to compare with."""
        asked = set(todo.get(Cell(FULL, 1.0), []))
        needed = {problem for few in todo.values() for problem in few} - asked
        return [problem for problem in self.problems if problem in needed and self._full_reply(problem) is None]

    def _measure(self, cell: Cell, few: Sequence[Problem], advance: Any) -> None:
        usage, fresh = self.usages.setdefault(cell, Usage()), 0

        def told(problem: Problem, reply: Reply) -> None:
            nonlocal fresh
            self._keep(cell, problem, reply)
            usage.tokens += 0 if self.plan.untimed else len(reply.tokens)
            fresh += 1
            advance()
            if fresh % WRITE_EVERY == 0:
                self.write()

        try:
            with self._server(cell) as (url, name, server), _watched(server, usage, not self.plan.untimed):
                ask_all(url, name, few, self.plan.limit, self.plan.at_once, told)
        finally:
            self.write()

    @contextmanager
    def _server(self, cell: Cell) -> Iterator[tuple[str, str, Server]]:
        if self.plan.server is not None:
            yield self.plan.server, self.plan.model, Server(self.plan.server, 0, 0.0)
            return
        self.logs.mkdir(parents=True, exist_ok=True)
        with serving(self.plan.settings(cell), self.logs / f"{cell.label.replace(', ', '-')}.log") as server:
            yield server.url, MODEL, server

    def _keep(self, cell: Cell, problem: Problem, reply: Reply) -> None:
        row: Row = {
            "kind": "answer", "method": cell.method, "retention": cell.retention, "problem": problem.name,
            "solved": problem.solved_by(reply.text), "finished": reply.finished, "tokens": len(reply.tokens),
        }  # fmt: skip
        if cell.method == FULL:
            self.store.put(self._key(problem), reply)
        elif (full := self._full_reply(problem)) is not None:
            near = closeness(full, reply)
            row |= {"same": near.same, "equal": full.tokens == reply.tokens, "kl": near.kl}
        self.answers[(*cell, problem.name)] = row

    def _full_reply(self, problem: Problem) -> Reply | None:
        held = self.store.get(self._key(problem))
        return None if held is None else Reply(*held)

    def _key(self, problem: Problem) -> str:
        return digest("reasoning", self.plan.facts(), self.plan.model, problem.messages)


@contextmanager
def _watched(server: Server, usage: Usage, timed: bool) -> Iterator[None]:
    """Adds to ``usage`` what the server's metrics say about the block, and how long it took if ``timed``."""
    ended = threading.Event()
    peaks = [usage.peak]

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            peaks.append(server.metrics().get("vllm:kv_cache_usage_perc", 0.0))

    watcher = threading.Thread(target=poll, daemon=True)
    before, began = server.metrics(), time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        usage.seconds += (time.perf_counter() - began) * timed
        ended.set()
        watcher.join()
        after = server.metrics()
        for name, sample in SAMPLES.items():
            setattr(usage, name, getattr(usage, name) + after.get(sample, 0.0) - before.get(sample, 0.0))
        usage.peak = max(peaks)
