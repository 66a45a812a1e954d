"""Preempted requests go on with the rows that windows left of them, instead of computing their text again.

vLLM frees the blocks of a request that it preempts, and finds them again by their hashes. Blocks that windows have
compressed have none. So their rows are stored, exactly, before the step begins that may overwrite them. The request is
admitted with them if that takes less time than to compute its text, and has windows behind them again. Nobody else is
admitted with them, because they are named after the request. They are dropped as soon as it has blocks again.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from vllm.v1.request import Request

from .manager import ContextManager, Place


class Leaving(NamedTuple):
    """What a request leaves in blocks that are free already."""

    place: Place
    blocks: list[int]


class Preempted:
    """Of one engine's requests.

    Args:
        scheduler: a :class:`~.scheduler.WithContexts`.

    Attributes:
        leaving: requests that are preempted in the step that is being built, and have rows to store.
    """

    def __init__(self, manager: ContextManager, scheduler: Any) -> None:
        self._manager, self._scheduler = manager, scheduler
        self.leaving: dict[str, Leaving] = {}
        self._places: dict[str, Place] = {}  # of requests that have no blocks yet

    def place(self, request: Request) -> Place | None:
        """What a waiting request has left, if it goes beyond that."""
        place = self._places.get(request.request_id)
        return place if place is not None and place.tokens < request.num_tokens else None

    def leaves(self, request: Request, blocks: list[int]) -> None:
        """A request is about to be preempted. Steps in flight will have written its rows before the next one begins."""
        name, size = request.request_id, self._manager.block_size
        written = min(request.num_computed_tokens, request.num_tokens - 1)
        tokens = written // size * size
        if tokens < max(1, self._manager.min_tokens):
            return
        rows = self._scheduler.left_of(name, request.num_computed_tokens, tokens)
        if rows is not None:
            own = hashlib.sha256(f"{name} {request.num_preemptions}".encode()).digest()
            self.leaving[name] = Leaving(Place(own, tokens, rows), blocks[: -(-rows // size)])

    def offer(self) -> None:
        """Offers what leaves, before the manager settles what is stored."""
        for name, (place, blocks) in self.leaving.items():
            self._places[name] = place
            self._manager.offer(name, place, blocks, ())

    def gone(self) -> None:
        """Stores of what is offered have begun. What has found no room is given up."""
        for name in self.leaving:
            self._manager.rows.forget(name)
        self.leaving.clear()

    def forget(self, name: str) -> None:
        """A request has blocks again, or has ended."""
        self.leaving.pop(name, None)
        if (place := self._places.pop(name, None)) is not None:
            self._manager.forget(place)
