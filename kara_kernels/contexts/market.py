"""What a context is worth in each place, at given prices of bytes.

A place is a tier and an option that fits in it, or recomputation: bytes 0, price 0. An option that another one beats
in bytes and in worth can be left out on every tier, because loading time and price both grow with bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .utility import Context, Option, Tier, ttft


class Choice(NamedTuple):
    nbytes: int
    worth: float  # the utility of one use, in seconds, if loading took no time
    option: Option


class Place(NamedTuple):
    tier: int  # from the fastest; the number of tiers means recomputed
    pick: int  # of the item's choices; -1 means recomputed


class Step(NamedTuple):
    key: float  # steps with the least key are taken first
    place: Place


class Item:
    """A context in the market. ``choices`` are the options that can be reached, from the most bytes to the fewest."""

    __slots__ = ("base", "choices", "context", "fresh", "order", "pins", "place", "told", "version", "weight")

    def __init__(self, context: Context, order: int, weight: float, nowhere: Place) -> None:
        self.context, self.order, self.weight, self.place = context, order, weight, nowhere
        self.base = 0.0
        self.choices: list[Choice] = []
        self.told: tuple[int, Option | None] = (nowhere.tier, None)  # where the caller last heard that it shall be
        self.fresh = False  # full rows are at hand, so every option can be reached
        self.pins = 0
        self.version = 0  # of its keys in heaps: older ones are void

    @property
    def nbytes(self) -> int:
        return self.choices[self.place.pick].nbytes if self.place.pick >= 0 else 0

    @property
    def option(self) -> Option | None:
        return self.choices[self.place.pick].option if self.place.pick >= 0 else None

    @property
    def now(self) -> tuple[int, Option | None]:
        return self.place.tier, self.option

    @property
    def movable(self) -> bool:
        return not self.pins or self.told[1] is None

    @property
    def settled(self) -> bool:
        """Whether a packet lies where the item is or was, so that a move up costs a transfer."""
        return self.told[1] is not None and not self.fresh


class Market:
    """Tiers with capacities, bytes in use and prices.

    ``prices[t]`` is the utility that a byte of tier ``t`` is worth to others. The last one, of recomputing, stays 0.
    """

    def __init__(self, tiers: Sequence[Tier], alpha: float) -> None:
        self.tiers, self.alpha = tuple(tiers), alpha
        self.nowhere = Place(len(self.tiers), -1)
        self.capacity = [tier.capacity - tier.reserve for tier in self.tiers]
        self.used = [0] * (len(self.tiers) + 1)
        self.prices = [0.0] * (len(self.tiers) + 1)
        self._seconds = [(1 / tier.bandwidth, tier.latency) for tier in self.tiers]

    def choice(self, context: Context, option: Option) -> Choice:
        seconds = option.decode_seconds + context.question_seconds
        return Choice(option.nbytes, self.alpha * option.quality - seconds, option)

    def choices(self, context: Context, options: Iterable[Option]) -> list[Choice]:
        """The options at or above the floor that no other beats, most bytes first."""
        rows = [self.choice(context, option) for option in options if option.quality >= context.floor]
        kept: list[Choice] = []
        for row in sorted(rows, key=lambda row: (row.nbytes, -row.worth)):
            if not kept or row.worth > kept[-1].worth:
                kept.append(row)
        return kept[::-1]

    def recomputed(self, context: Context) -> float:
        return self.alpha - ttft(context)

    def value(self, item: Item, tier: int, pick: int) -> float:
        """Utility in a place, weighted by use."""
        if pick < 0:
            return item.weight * item.base
        choice, (per_byte, latency) = item.choices[pick], self._seconds[tier]
        return item.weight * (choice.worth - choice.nbytes * per_byte - latency)

    def _values(self, item: Item, tier: int) -> list[float]:
        """:meth:`value` of all choices on a tier."""
        weight, (per_byte, latency) = item.weight, self._seconds[tier]
        return [weight * (worth - nbytes * per_byte - latency) for nbytes, worth, _ in item.choices]

    def best(self, item: Item, margin: float = 0.0, known: bool = False) -> Place:
        """The place with the most utility after paying for its bytes. Free bytes cost nothing, and those of others
        cost ``margin`` more on tiers where the item is not. If prices are ``known``, free bytes cost the same."""
        found, place = self.value(item, *item.place) - self.prices[item.place.tier] * item.nbytes, item.place
        if (base := item.weight * item.base) > found:
            found, place = base, self.nowhere
        for tier, capacity in enumerate(self.capacity):
            price = self.prices[tier] * (1 + margin * (tier != item.place.tier))
            free = 0 if known or tier == item.place.tier else self.free(tier)
            for pick, value in enumerate(self._values(item, tier)):
                nbytes = item.choices[pick].nbytes
                if nbytes <= capacity and (net := value - price * nbytes * (nbytes > free)) > found:
                    found, place = net, Place(tier, pick)
        return place

    def cheapest(self, item: Item) -> Step:
        """The step down, or to fewer bytes, that loses least utility per freed byte, bytes elsewhere being paid for."""
        (tier, pick), size = item.place, item.nbytes
        here = self.value(item, tier, pick)
        key, place = (here - item.weight * item.base) / size, self.nowhere
        for other in range(pick + 1, len(item.choices)):
            loss = (here - self.value(item, tier, other)) / (size - item.choices[other].nbytes)
            if loss < key:
                key, place = loss, Place(tier, other)
        for lower in range(tier + 1, len(self.tiers)):
            price, capacity = self.prices[lower], self.capacity[lower]
            for other, value in enumerate(self._values(item, lower)):
                nbytes = item.choices[other].nbytes
                if nbytes <= capacity and (loss := (here - value + price * nbytes) / size) < key:
                    key, place = loss, Place(lower, other)
        return Step(key, place)

    def shelter(self, item: Item) -> Place:
        """The best place below the item's that has room and is better than none."""
        found, place = item.weight * item.base, self.nowhere
        for tier in range(item.place.tier + 1, len(self.tiers)):
            for pick, value in enumerate(self._values(item, tier)):
                if value > found and item.choices[pick].nbytes <= self.free(tier):
                    found, place = value, Place(tier, pick)
        return place

    def listed(self, item: Item, per_byte: bool) -> Step:
        """The paper's steps: a harder option on the same tier, or the same one on the next lower tier."""
        (tier, pick), size = item.place, item.nbytes
        here, lower = self.value(item, tier, pick), tier + 1
        while lower < len(self.tiers) and size > self.capacity[lower]:
            lower += 1
        places = [Place(lower, pick) if lower < len(self.tiers) else self.nowhere]
        places += [Place(tier, other) for other in range(pick + 1, len(item.choices))]
        steps = []
        for place in places:
            freed = size - (item.choices[place.pick].nbytes if place.tier == tier else 0)
            steps.append(Step((here - self.value(item, *place)) / (freed if per_byte else 1), place))
        return min(steps, key=lambda step: step.key)

    def bid(self, item: Item, tier: int) -> float:
        """The highest price at which the item would take bytes of the tier to gain utility. 0 if it would not."""
        now, bid = self.value(item, *item.place), 0.0
        if tier == item.place.tier:  # more bytes than it has there
            for pick in range(item.place.pick):
                more = item.choices[pick].nbytes - item.nbytes
                bid = max(bid, (self.value(item, tier, pick) - now) / more)
            return bid
        paid = self.prices[item.place.tier] * item.nbytes
        for pick, value in enumerate(self._values(item, tier)):
            nbytes = item.choices[pick].nbytes
            if value > now and nbytes <= self.capacity[tier]:
                bid = max(bid, (value - now + paid) / nbytes)
        return bid

    def fit(self, item: Item, tier: int, room: int, price: float) -> Place | None:
        """The gaining place on the tier that is best at a price, among those of at most ``room`` bytes."""
        now, found, place = self.value(item, *item.place), 0.0, None
        for pick, value in enumerate(self._values(item, tier)):
            nbytes = item.choices[pick].nbytes
            if value > now and nbytes <= room and (place is None or value - now - price * nbytes > found):
                found, place = value - now - price * nbytes, Place(tier, pick)
        return place

    def put(self, item: Item, place: Place) -> float:
        """Moves the item and returns the change of utility."""
        before = self.value(item, *item.place)
        self.used[item.place.tier] -= item.nbytes
        item.place = place
        self.used[place.tier] += item.nbytes
        return self.value(item, *place) - before

    def free(self, tier: int) -> int:
        return self.capacity[tier] - self.used[tier]
