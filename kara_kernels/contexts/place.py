"""Which contexts to compress harder and which to move, so that every tier holds what is worth most. Pure Python.

The problem is a multiple-choice knapsack with several knapsacks: each context takes one (option, tier) or is
recomputed. Bytes of a tier over capacity are freed step by step, by one of three rules:

- ``"paper"``: {a harder option, the next lower tier}, by least loss of utility (EVICPRESS, arXiv 2512.14946,
  Algorithm 1). The fastest tier first.
- ``"per_byte"``: the same steps, by least loss per freed byte (AdaptCache, arXiv 2509.00105).
- ``"priced"``: any reachable option on the same or any lower tier, or recomputation, by least loss per freed byte,
  where bytes elsewhere cost their price. The price of a tier is what its last step lost per byte. All tiers over
  capacity take turns, the one with the cheapest step first. Then room that is left goes to those who gain most per
  byte, and the last contexts that found none are tried against what they would displace.

Prices tell a step on one tier what it displaces on another. They rise like those of an ascending auction towards the
multipliers of the Lagrangian relaxation, at which each context sits in its own best place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..values import check_choice, check_count, check_flag, check_number
from .market import Item, Market, Place
from .search import Search
from .utility import LONGEST, MAX_BYTES, Context, Decay, Option, Tier, check_option, check_tiers

RULES = ("priced", "per_byte", "paper")


class Move(NamedTuple):
    """A change to make. No tier and no option mean that nothing is stored, and the context is recomputed.

    If ``before.cuts_to(after)``, the stored bytes suffice. Otherwise the packet is encoded from full rows.
    """

    key: str
    from_tier: str | None
    to_tier: str | None
    before: Option | None
    after: Option | None


class Placement:
    """Where contexts shall lie, and the moves that lead there.

    Report contexts, uses and removals as they come, then call :meth:`settle` and carry out its moves. The plan counts
    them as done: report one that failed with :meth:`correct`. No tier is planned above ``capacity - reserve``, unless
    pinned contexts alone fill it.

    Args:
        tiers: from the fastest to the slowest. Recomputation is an implicit last one.
        alpha: seconds of delay that one unit of quality is worth.
        rule: one of ``RULES``. Only ``"priced"`` ever moves contexts up.
        half_life: seconds after which a use counts half.
        margin: against thrashing. A stored context moves up only if it gains more than ``1 + margin`` times what it
            displaces loses, or if ``margin`` of the tier's capacity stays free.
        look_back: how many contexts that find no room are passed over per tier before the search for others ends.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        alpha: float,
        rule: str = "priced",
        half_life: float = 3600.0,
        margin: float = 0.25,
        look_back: int = 16,
    ) -> None:
        tiers = check_tiers(tiers)
        check_number("alpha", alpha, 0, LONGEST)
        check_choice("rule", rule, RULES)
        check_number("margin", margin, 0, 1)
        check_count("look_back", look_back, 0, 2**31 - 1)
        self._decay = Decay(half_life)
        self._market = Market(tiers, alpha)
        self._search = Search(self._market, rule, margin, look_back)
        self._tiers = {tier.name: i for i, tier in enumerate(tiers)}
        self._items: dict[str, Item] = {}
        self._entering: dict[str, Item] = {}  # they look for their best place in the next settle()
        self._arrivals = 0

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def add(
        self, context: Context, now: float = 0.0, hits: float = 1.0, stored: tuple[str, Option] | None = None
    ) -> None:
        """A new context, used ``hits`` times at ``now`` (seconds, of any clock).

        Its full rows are at hand until the next :meth:`settle`, which therefore may choose any option. After a restart
        pass ``stored``: the name of the tier and the option that lie there.
        """
        if context.key in self._items:
            raise ValueError(f"context: expected a new key, got {context.key!r}, which is placed already")
        check_number("hits", hits, 0, LONGEST)
        at = None if stored is None else (self._tier(stored[0]), check_option(stored[1]))
        item = Item(context, self._arrivals, hits * self._weight(now), self._market.nowhere)
        self._arrivals += 1
        self._items[context.key] = item
        item.told, item.fresh = at or item.told, at is None
        self._refresh(item)

    def use(self, key: str, now: float = 0.0, recomputed: bool = False) -> None:
        """One more use. If the context was ``recomputed``, its full rows are at hand, as for a new one."""
        item = self._item(key)
        check_flag("recomputed", recomputed)
        weight = self._weight(now)  # first: it may scale the item's
        item.weight += weight
        if recomputed and not item.fresh:
            item.fresh = True
            self._refresh(item)
        else:
            self._search.key(item)
        self._entering[key] = item

    def change(self, context: Context) -> None:
        """A new profile, floor or cost. Stored bytes are known by method and size. If the new profile does not have
        them, or has them below the floor, the context leaves them in the next :meth:`settle`."""
        item = self._item(context.key)
        item.context = context
        self._refresh(item)
        self._entering[context.key] = item

    def remove(self, key: str) -> None:
        item = self._item(key)
        self._search.forget(item)
        del self._items[key]
        self._entering.pop(key, None)

    def pin(self, key: str) -> None:
        """What is stored of the context stays where it is until as many :meth:`unpin`."""
        item = self._item(key)
        item.pins += 1
        if item.pins == 1:
            self._refresh(item)  # it may have been about to leave

    def unpin(self, key: str) -> None:
        item = self._item(key)
        if not item.pins:
            raise ValueError(f"key: expected a pinned context, got {key!r}")
        item.pins -= 1
        if not item.pins:
            self._refresh(item)  # its profile may have changed

    def correct(self, key: str, tier: str | None, option: Option | None) -> None:
        """Says where a context really lies, for example after a failed transfer. No tier: nowhere."""
        item = self._item(key)
        item.told = (self._market.nowhere.tier, None) if tier is None or option is None else (self._tier(tier), option)
        item.fresh = False
        self._refresh(item)

    def resize(self, tier: str, capacity: int) -> None:
        """Changes the capacity of a tier, in bytes, reserve not included."""
        index = self._tier(tier)
        self._market.capacity[index] = check_count("capacity", capacity, 0, MAX_BYTES)
        self._search.loosen(index)

    def where(self, key: str) -> tuple[str | None, Option | None]:
        """The planned tier and option. (None, None): recomputed."""
        item = self._item(key)
        return (None, None) if item.option is None else (self._market.tiers[item.place.tier].name, item.option)

    def used(self, tier: str) -> int:
        """Planned bytes of a tier."""
        return self._market.used[self._tier(tier)]

    def hits(self, key: str, now: float = 0.0) -> float:
        """Uses of a context as they count at ``now``."""
        unit = self._weight(now)
        return self._item(key).weight / unit

    @property
    def pops(self) -> int:
        """Heap operations so far: the work, in a measure that does not depend on the machine."""
        return self._search.pops

    def utility(self, now: float = 0.0) -> float:
        """The sum over all contexts, as planned. A use at ``now`` counts 1, older ones less."""
        unit = self._weight(now)
        return sum(self._market.value(item, *item.place) for item in self._items.values()) / unit

    def utilities(self, now: float = 0.0) -> dict[str, float]:
        """The sum of what is planned on each tier. Contexts that are recomputed are left out."""
        unit, found = self._weight(now), dict.fromkeys(self._tiers, 0.0)
        for item in self._items.values():
            if (name := self._name(item.place.tier)) is not None:
                found[name] += self._market.value(item, *item.place) / unit
        return found

    def settle(self) -> list[Move]:
        """Plans, and returns the moves in an order that frees room before it is needed, where there is one."""
        entering, self._entering = self._entering, {}
        self._search.settle(entering.values())
        changed, self._search.changed = entering | self._search.changed, {}
        moves = [(self._turn(item), self._move(item)) for item in changed.values() if item.now != item.told]
        for item in changed.values():
            self._commit(item)
        self._search.tidy(len(self._items))
        return [move for _, move in sorted(moves, key=lambda pair: pair[0])]

    def _turn(self, item: Item) -> tuple[int, int]:
        """Cuts and drops come first, then moves down, from the lowest tier, then moves up and new packets."""
        (before, held), (after, option) = item.told, item.now
        if option is None or (before == after and held is not None and held.cuts_to(option)):
            return 0, 0
        return (1, -before) if before < after else (2, -before)

    def _move(self, item: Item) -> Move:
        (before, held), (after, option) = item.told, item.now
        return Move(item.context.key, self._name(before), self._name(after), held, option)

    def _name(self, tier: int) -> str | None:
        return self._market.tiers[tier].name if tier < len(self._market.tiers) else None

    def _commit(self, item: Item) -> None:
        """What is told counts as done: from now on only cuts of it can be reached."""
        if item.fresh or item.now != item.told:
            item.told, item.fresh = item.now, False
            self._refresh(item)

    def _refresh(self, item: Item) -> None:
        """Works out what can be reached from what is stored."""
        market, context = self._market, item.context
        tier, held = item.told
        market.put(item, market.nowhere)
        item.base = market.recomputed(context)
        if held is not None and item.pins:
            item.choices, place = [market.choice(context, held)], Place(tier, 0)
        else:
            known = [o for o in context.options if item.fresh or (held is not None and held.cuts_to(o))]
            item.choices, place = market.choices(context, known), market.nowhere
            for pick, choice in enumerate(item.choices):
                if held is not None and choice.option.same_bytes(held):
                    item.told, place = (tier, choice.option), Place(tier, pick)
        market.put(item, place)
        self._search.key(item)
        if place == market.nowhere and (item.fresh or held is not None):
            self._entering[context.key] = item
            if held is not None:
                self._search.loosen(tier)

    def _weight(self, now: float) -> float:
        """The weight of a use. Once in hundreds of half-lives it scales everything, which changes no order."""
        factor = self._decay.rebase(check_number("now", now, -1e15, 1e15))
        if factor != 1:
            for item in self._items.values():
                item.weight *= factor
            self._search.scale(factor)
        return self._decay.weight(now)

    def _item(self, key: str) -> Item:
        if key not in self._items:
            raise ValueError(f"key: expected a context that was added, got {key!r}")
        return self._items[key]

    def _tier(self, name: str) -> int:
        if name not in self._tiers:
            raise ValueError(f"tier: expected one of {', '.join(map(repr, self._tiers))}, got {name!r}")
        return self._tiers[name]
