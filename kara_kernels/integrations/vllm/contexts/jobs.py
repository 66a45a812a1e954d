"""What the connector's half in the scheduler and its half in the workers say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """Work between blocks and grains, which every worker does for its own heads."""

    number: int
    request_id: str
    context: str
    tokens: int
    """That have rows in the packet."""
    blocks: Sequence[int]
    grains: Sequence[int]


@dataclass(frozen=True)
class Store(Job):
    """Encodes a context from blocks into grains."""

    form: str
    scorer: str
    """What orders the rows; empty: they stay in the order of their tokens."""
    sections: int
    """Of the packet, which the scheduler has counted: the grains are for these."""
    computed: int = 0
    """Tokens of the context that the request has not computed, so that their queries were not recorded."""


@dataclass(frozen=True)
class Load(Job):
    """Decodes a packet from grains into blocks."""

    nbytes: int
    """Of the packet, in every worker."""
    form: str
    rows: int


@dataclass(frozen=True)
class Ended:
    """How a job ended, in all workers that have reported it."""

    workers: int
    ok: bool
    seconds: float
    """Of the slowest."""
    error: str = ""

    def and_another(self, other: Ended) -> Ended:
        return Ended(
            self.workers + other.workers, self.ok and other.ok, max(self.seconds, other.seconds),
            self.error or other.error,
        )  # fmt: skip
