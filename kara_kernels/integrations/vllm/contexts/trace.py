"""The trace: a line of JSON for each event of a context. It holds no text and no tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kara_kernels.contexts.directory import Copy

from ..traces import append
from .known import Place
from .manager import ContextManager

logger = logging.getLogger("vllm.kara")  # a child of vLLM's logger: its handlers and levels apply


EVENTS = ("stored", "found", "hit", "moved", "cut", "below_floor", "damaged", "failed", "dropped")


class Event(NamedTuple):
    """A line."""

    time: float
    """Seconds since 1970."""
    event: str
    """One of :data:`EVENTS`."""
    context: str
    """Its name: the hash of its last block, and its length."""
    tokens: int
    tier: str
    """Where it lies now; of a hit, what its rows came from."""
    came_from: str | None
    """The tier that it has left."""
    method: str
    ratio: float
    """Of the stored bytes to those in the cache; of a hit, of the bytes that were loaded."""
    nbytes: int
    """In every worker: those that are stored, in whole grains, or those that a hit loads."""
    predicted_seconds: float | None
    """Of a hit: until its first token, without queues."""
    request_id: str | None


class Trace:
    """Appends events to a file. If that fails, serving goes on.

    Args:
        client: gives the name by which a client knows a request.
    """

    def __init__(self, path: str, client: Callable[[str], str] = str) -> None:
        self._path, self._client, self._failed = path, client, False

    def __call__(self, event: str, copy: Copy, **more: Any) -> None:
        """``more``: fields that say something else than the copy, or that it does not have."""
        name, option = more.pop("request_id", None), copy.option
        line = Event(
            time=round(time.time(), 3), event=event, context=copy.key, tokens=Place.of(copy.key).tokens,
            tier=copy.tier, came_from=None, method=option.method, ratio=option.ratio, nbytes=option.nbytes,
            predicted_seconds=None, request_id=None if name is None else self._client(name),
        )  # fmt: skip
        try:
            append(self._path, line._replace(**more)._asdict())
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.error("Kara's trace misses events: %s", error)
            self._failed = True


def watch(manager: ContextManager, heard: Callable[..., None]) -> None:
    """Tells everything that happens to a manager's contexts, as it tells it to a :class:`Trace`."""
    manager.transfers.heard = manager.keeper.directory.heard = heard
