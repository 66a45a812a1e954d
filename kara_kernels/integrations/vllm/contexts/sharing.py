"""What servers share through a remote tier: what others have stored is found, and what is stored here is offered.

A request whose context is not known here waits until the store has been asked for it, but not long. Packets that
arrive in memory are written to the store, too, so that others find them, and nothing is left to write when they must
leave the memory. Pure Python, in the scheduler's process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from .manager import ContextManager, Place
from .remote import REMOTE, Manifest, RemoteTier

MOST = 4096  # contexts that one lookup asks for
OFFERS = 2  # that are under way at a time


@dataclass
class Lookup:
    """What a request waits for."""

    answer: Future[Sequence[tuple[Place, Manifest]] | None]
    tokens: int
    """The most that it can find."""
    ids: Sequence[int]
    """Of the request."""
    until: float
    late: bool = False


class Sharing:
    """Lookups and offers of one engine.

    Args:
        wait: seconds that a request waits for a lookup at most.
    """

    def __init__(
        self, manager: ContextManager, tier: RemoteTier, *, wait: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.manager, self.tier, self._wait, self._clock = manager, tier, wait, clock
        self._lookups: dict[str, Lookup] = {}  # by request
        self._due: dict[str, None] = {}  # contexts to be offered
        manager.transfers.arrived = self.used

    @property
    def busy(self) -> bool:
        return bool(self._lookups or self._due)

    def arrived(
        self, name: str, hashes: Sequence[bytes], prompt_tokens: int, ids: Sequence[int], asked: Place | None
    ) -> None:
        """A request with the tokens ``ids`` has come. What it may begin with is looked up: the context that it
        ``asked`` for, or any that is longer than those that are stored here."""
        if self.tier.resting:
            return
        if asked is None:
            places = self._longer(hashes, prompt_tokens)[-MOST:]
        else:
            places = [] if self.manager.keeper.get(asked.key) is not None else [asked]
        if places:
            until = self._clock() + self._wait
            self._lookups[name] = Lookup(self.tier.look(places), places[0].tokens, ids, until)

    def is_looking(self, name: str, local: int) -> bool:
        """Whether a request with ``local`` tokens in the engine's own cache should wait. Ends its lookup if it can."""
        lookup = self._lookups.get(name)
        if lookup is None or local >= lookup.tokens or self._end(name):
            return False
        if not lookup.late and self._clock() >= lookup.until:
            lookup.late = True  # what it finds is of use to others
            self.manager.counts["lookups", "late"] += 1
            self.tier.rest("slow", f"a lookup took more than {self._wait} seconds")
        return not lookup.late

    def used(self, key: str) -> None:
        """A context has arrived in memory, or was used. Unless the store heard of that not long ago, it does. But
        nobody could look for a conversation: no other server knows how many rows there are."""
        if not self.tier.is_fresh(key) and Place.of(key).rows is None:
            self._due[key] = None

    def step(self) -> None:
        """Ends lookups that nobody waits for, and begins offers. While the store cannot be written, contexts are not
        offered before they are used again."""
        transfers = self.manager.transfers
        for name in list(self._lookups):
            self._end(name)
        while self.tier.errors:
            self.manager.counts["store_errors", self.tier.errors.popleft()] += 1
            transfers.unwritable.add(REMOTE)
        if REMOTE in transfers.unwritable or REMOTE in self.manager.closed:
            self._due.clear()
        while self._due and transfers.offers < OFFERS:
            key = next(iter(self._due))
            del self._due[key]
            transfers.offer(key, REMOTE)

    def reset(self) -> None:
        """This server's weights are no longer those that the store's name stands for. So it shares nothing until it
        restarts. What lies in the store stays there, for servers that still have them."""
        self._lookups.clear()
        self.manager.closed.close(REMOTE)
        self.tier.leave()

    def _longer(self, hashes: Sequence[bytes], prompt_tokens: int) -> list[Place]:
        """What a prompt may begin with, if that is longer than what is stored of it. The longest first."""
        found, size = [], self.manager.block_size
        for blocks in range((prompt_tokens - 1) // size, 0, -1):
            place = Place(hashes[blocks - 1], blocks * size)
            if place.tokens < self.manager.min_tokens or self.manager.keeper.get(place.key) is not None:
                break
            found.append(place)
        return found

    def _end(self, name: str) -> bool:
        """Takes the answer of a lookup. Returns whether there is one."""
        lookup = self._lookups[name]
        if not lookup.answer.done():
            return False
        del self._lookups[name]
        answer = lookup.answer.result()
        outcome = "failed" if answer is None else "none"
        for place, manifest in answer or ():
            outcome = "found" if self._adopt(place, manifest, lookup.ids) else "unfit"
            if outcome == "found":
                break
        if not lookup.late:
            self.manager.counts["lookups", outcome] += 1
        return True

    def _adopt(self, place: Place, manifest: Manifest, ids: Sequence[int]) -> bool:
        """Whether a context can be admitted now."""
        copy = self.manager.adopt(place, REMOTE, manifest.method, manifest.nbytes, ids)
        if copy is not None:
            self.tier.found(copy, manifest)
        return self.manager.keeper.get(place.key) is not None
