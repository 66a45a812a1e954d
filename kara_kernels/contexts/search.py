"""The search for a placement: items enter, tiers over capacity free bytes, room that is left is given away."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .market import Item, Market, Place, Step

ROUNDING = 1e-9  # of a gain: less may be the error of the sum
ROUNDS = 2  # of entering again. Without, one of 1,000 instances of bench.contexts.optimum misses 3% of the optimum


class Mark(NamedTuple):
    """A state of the search that can be returned to."""

    steps: int
    prices: list[float]
    loose: set[int]


class Heap:
    """Items by key, least first, then in order of arrival. An item's new key makes its older ones void."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, int, int, Item]] = []
        self.pops = 0

    def push(self, key: float, item: Item) -> None:
        heapq.heappush(self._rows, (key, item.order, item.version, item))

    def top(self) -> float | None:
        """The least key. Removes void ones on the way."""
        rows = self._rows
        while rows and rows[0][2] != rows[0][3].version:
            heapq.heappop(rows)
            self.pops += 1
        return rows[0][0] if rows else None

    def pop(self) -> Item:
        """The item of the key that :meth:`top` returned."""
        self.pops += 1
        return heapq.heappop(self._rows)[3]

    def tidy(self, live: int) -> None:
        """Removes void keys when they are most of all, which costs O(1) per push on average."""
        if len(self._rows) > 2 * live + 64:
            self._rows = [row for row in self._rows if row[2] == row[3].version]
            heapq.heapify(self._rows)

    def scale(self, factor: float) -> None:
        self._rows = [(key * factor, *rest) for key, *rest in self._rows]  # type: ignore[misc]
        heapq.heapify(self._rows)  # keys may have become 0


class Search:
    """Heaps over the items of a market. ``rule``, ``margin`` and ``look_back`` are those of ``Placement``."""

    def __init__(self, market: Market, rule: str, margin: float, look_back: int) -> None:
        self.market, self.rule, self.margin, self.look_back = market, rule, margin, look_back
        self.steps = [Heap() for _ in market.tiers]  # items on a tier, by their cheapest step away
        self.bids = [Heap() for _ in market.tiers]  # items that would come to a tier or grow there, by what they bid
        self.changed: dict[str, Item] = {}  # since the caller last cleared it
        self._loose: set[int] = set()  # tiers with new room
        self._journal: list[tuple[Item, Place]] = []  # what this settle() moved, and from where
        self._total = 0.0  # the utility that it gained
        self._patience = 0  # attempts left, so that rounding errors cannot make two items displace each other for ever

    def settle(self, entering: Iterable[Item]) -> None:
        """Lets items look for their best place, frees bytes until no tier is over capacity, then gives room away."""
        items = [item for item in entering if item.movable]
        self._patience = self.look_back + len(items)
        self._journal, self._total = [], 0.0
        resting = [item for item in items if item.settled and item.place != self.market.nowhere]
        free = [item for item in items if not item.settled or item.place == self.market.nowhere]
        for item in free:
            self.put(item, self.market.best(item))
        self._shrink()
        if self.rule != "priced":
            return
        for item in resting:
            if (place := self.market.best(item, self.margin)) != item.place:
                self._attempt(item, place)
        self._give_away()
        if len(free) > 1:
            self._enter_again(free)

    def _enter_again(self, items: Sequence[Item]) -> None:
        """Items that entered together did not know the prices that they would make. Now they do, and try again."""
        for _ in range(ROUNDS):
            start, before = self._mark(), self._total
            for item in items:
                self.put(item, self.market.best(item, known=True))
            self._shrink()
            self._patience = self.look_back + len(items)
            self._give_away()
            if self._total <= before:
                return self._undo(start)

    def _shrink(self) -> None:
        while (tier := self._fullest()) is not None:
            self._step(tier)

    def _give_away(self) -> None:
        while self._loose:
            if not self._admit(tier := min(self._loose)):
                self._loose.discard(tier)

    def _mark(self) -> Mark:
        return Mark(len(self._journal), list(self.market.prices), set(self._loose))

    def _undo(self, mark: Mark) -> None:
        while len(self._journal) > mark.steps:
            item, place = self._journal.pop()
            self._total += self.market.put(item, place)
            self.key(item)
        self.market.prices[:], self._loose = mark.prices, mark.loose

    def loosen(self, tier: int) -> None:
        """Says that a tier may have new room."""
        self._loose.add(tier)

    def put(self, item: Item, place: Place) -> float:
        """Moves an item and returns the change of utility."""
        self._journal.append((item, item.place))
        if item.place != self.market.nowhere:
            self._loose.add(item.place.tier)
        change = self.market.put(item, place)
        self._total += change
        self.changed[item.context.key] = item
        self.key(item)
        return change

    def forget(self, item: Item) -> None:
        self.put(item, self.market.nowhere)
        self.changed.pop(item.context.key, None)
        item.version += 1  # voids its keys

    def key(self, item: Item) -> None:
        """Enters an item in the heaps anew."""
        item.version += 1
        if not item.movable:
            return
        if item.place != self.market.nowhere:
            self.steps[item.place.tier].push(self._cheapest(item).key, item)
        if self.rule == "priced":
            for tier, heap in enumerate(self.bids):
                if (bid := self.market.bid(item, tier)) > 0:
                    heap.push(-bid, item)

    @property
    def pops(self) -> int:
        return sum(heap.pops for heap in (*self.steps, *self.bids))

    def tidy(self, live: int) -> None:
        for heap in (*self.steps, *self.bids):
            heap.tidy(live)

    def scale(self, factor: float) -> None:
        self.market.prices[:] = [price * factor for price in self.market.prices]
        for heap in (*self.steps, *self.bids):
            heap.scale(factor)

    def _cheapest(self, item: Item) -> Step:
        if self.rule == "priced":
            return self.market.cheapest(item)
        return self.market.listed(item, self.rule == "per_byte")

    def _fullest(self) -> int | None:
        """The tier over capacity whose turn it is, if something on it can move."""
        over = [(heap.top(), t) for t, heap in enumerate(self.steps) if self.market.free(t) < 0]
        able = [(key, t) for key, t in over if key is not None]
        if not able:
            return None
        return min(able)[1] if self.rule == "priced" else able[0][1]

    def _step(self, tier: int) -> float:
        """Takes the cheapest step of a tier and returns the change of utility. Keys age when prices elsewhere change,
        so the least is computed anew until it still is the least."""
        heap = self.steps[tier]
        while True:
            item = heap.pop()
            step, least = self._cheapest(item), heap.top()
            if least is None or step.key <= least:
                break
            heap.push(step.key, item)
        if self.rule == "priced":
            self.market.prices[tier] = max(0.0, step.key)
        place = step.place
        if place == self.market.nowhere and self.rule == "priced":
            place = self.market.shelter(item)  # a price may be older than the room that its tier has now
        return self.put(item, place)

    def _admit(self, tier: int) -> bool:
        """Gives free room of a tier to the highest bids that fit, and tries others against what they displace."""
        heap, aside, admitted = self.bids[tier], dict[int, Item](), False
        while len(aside) < self.look_back and heap.top() is not None:
            item = heap.pop()
            bid, least = self.market.bid(item, tier), heap.top() or 0.0
            if bid <= 0 or item.order in aside:
                continue
            if (place := self.market.fit(item, tier, self._room(item, tier), -least)) is not None:
                self.put(item, place)
                admitted = True
            elif self._displace(item, tier):
                admitted = True
            else:
                aside[item.order] = item
        for item in aside.values():
            self.key(item)
        return admitted

    def _room(self, item: Item, tier: int) -> int:
        room = self.market.free(tier) + (item.nbytes if item.place.tier == tier else 0)
        if item.settled and item.place != self.market.nowhere and item.told[0] != tier:
            room -= int(self.margin * self.market.capacity[tier])
        return room

    def _displace(self, item: Item, tier: int) -> bool:
        place = self.market.fit(item, tier, self.market.capacity[tier], self.market.prices[tier])
        return place is not None and self._attempt(item, place)

    def _attempt(self, item: Item, place: Place) -> bool:
        """Puts an item where room may be missing and frees the room. Undoes it all if that loses more than it gains."""
        if self._patience <= 0:
            return False
        self._patience -= 1
        start = self._mark()
        factor = 1 + (self.margin if item.settled else 0.0)
        net = gain = self.put(item, place)
        while net > 0 and (tier := self._fullest()) is not None:
            net += factor * self._step(tier)
        if net > ROUNDING * gain:
            return True
        self._undo(start)
        return False
