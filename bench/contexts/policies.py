"""What decides where contexts lie: replacement as in caches, IMPRESS-like, and the library's placement.

Caches: every tier has a queue of its own. A context that is used goes to the fastest tier, what falls from one tier
enters the next, and what falls from the last is gone. Each context lies on one tier.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from kara_kernels.contexts.place import Placement
from kara_kernels.contexts.utility import Context, Decay, Option, Tier, ttft

PAPER_METHODS = ("keydiff/exact", "knorm/exact", "snapkv/exact")
Rows = list[tuple[str, int]]  # keys and bytes


class Lru:
    """One tier. The least recently used fall first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self.rows: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def use(self, key: str, nbytes: int, weight: float) -> Rows:
        """Enters a context or notes a use, and returns what falls. ``weight``: of its uses; old ones count less."""
        self.remove(key)
        if nbytes > self.capacity:
            return [(key, nbytes)]
        self.rows[key] = nbytes
        self.used += nbytes
        fallen = []
        while self.used > self.capacity:
            first = self._first()
            fallen.append((first, self.rows[first]))
            self.remove(first)
        return fallen

    def remove(self, key: str) -> None:
        self.used -= self.rows.pop(key, 0)

    def _first(self) -> str:
        return next(iter(self.rows))


class Lfu(Lru):
    """The least used fall first, decayed as the placement's uses are. The context that enters may be the one."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.weights: dict[str, float] = {}

    def use(self, key: str, nbytes: int, weight: float) -> Rows:
        self.weights[key] = weight
        return super().use(key, nbytes, weight)

    def _first(self) -> str:
        return min(self.rows, key=self.weights.__getitem__)


class Arc:
    """ARC (Megiddo and Modha, FAST 2003), in bytes: contexts used once and more often, with the ghosts of each."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.target = capacity, 0.0  # bytes for those used once
        self.once, self.often, self.once_ghosts, self.often_ghosts = (Lru(2 * capacity) for _ in range(4))

    def __contains__(self, key: str) -> bool:
        return key in self.once or key in self.often

    @property
    def used(self) -> int:
        return self.once.used + self.often.used

    def use(self, key: str, nbytes: int, weight: float) -> Rows:
        if nbytes > self.capacity:
            return [(key, nbytes)]
        before = key in self
        again = before or key in self.once_ghosts or key in self.often_ghosts
        from_often = key in self.often_ghosts
        if key in self.once_ghosts:
            more = max(1.0, self.often_ghosts.used / self.once_ghosts.used) * nbytes
            self.target = min(self.capacity, self.target + more)
        elif from_often:
            more = max(1.0, self.once_ghosts.used / self.often_ghosts.used) * nbytes
            self.target = max(0.0, self.target - more)
        for rows in (self.once, self.often, self.once_ghosts, self.often_ghosts):
            rows.remove(key)
        fallen = self._make_room(nbytes, from_often)
        (self.often if again else self.once).use(key, nbytes, weight)
        self._forget()
        return fallen

    def remove(self, key: str) -> None:
        self.once.remove(key)
        self.often.remove(key)

    def _make_room(self, nbytes: int, from_often: bool) -> Rows:
        fallen = []
        while self.used + nbytes > self.capacity:
            over = self.once.used > self.target or (from_often and self.once.used == self.target)
            live, ghosts = self.often, self.often_ghosts
            if self.once.rows and (over or not self.often.rows):
                live, ghosts = self.once, self.once_ghosts
            key = next(iter(live.rows))
            size = live.rows[key]
            live.remove(key)
            ghosts.use(key, size, 0.0)
            fallen.append((key, size))
        return fallen

    def _forget(self) -> None:
        """Ghosts end where those used once, and all together, would fill the tier once, and twice."""
        while self.once.used + self.once_ghosts.used > self.capacity and self.once_ghosts.rows:
            self.once_ghosts.remove(next(iter(self.once_ghosts.rows)))
        while self.used + self.once_ghosts.used + self.often_ghosts.used > 2 * self.capacity and self.often_ghosts.rows:
            self.often_ghosts.remove(next(iter(self.often_ghosts.rows)))


class Recompute:
    """Stores nothing."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.moved, self._none = 0, [0] * len(tiers)

    def lookup(self, context: Context, now: float) -> None:
        return None

    def stored(self, context: Context, now: float) -> None: ...

    def settle(self) -> None: ...

    def used(self) -> list[int]:
        return self._none


class Cached:
    """Every context stored by one option, replaced as in a cache.

    Args:
        choose: the option of a context.
        queue: what replaces, of each tier.
        half_life: seconds after which a use counts half.
        if_faster: recompute what takes longer to load. Published baselines always load.
    """

    def __init__(
        self, tiers: Sequence[Tier], choose: Callable[[Context], Option], queue: Callable[[int], Lru | Arc] = Lru,
        half_life: float = 1e9, if_faster: bool = False,
    ) -> None:  # fmt: skip
        self.tiers, self.choose, self.if_faster = tiers, choose, if_faster
        self.queues = [queue(tier.capacity) for tier in tiers]
        self.moved = 0
        self._decay, self._weights = Decay(half_life), dict[str, float]()

    def lookup(self, context: Context, now: float) -> tuple[int, Option] | None:
        option = self.choose(context)
        for number, queue in enumerate(self.queues):
            if context.key in queue:
                if self.if_faster and ttft(context, option, self.tiers[number]) >= ttft(context):
                    return None
                self.stored(context, now)
                return number, option
        return None

    def stored(self, context: Context, now: float) -> None:
        """A use: the context goes to the fastest tier."""
        self._weights[context.key] = self._weights.get(context.key, 0.0) + self._decay.weight(now)
        before = next((number for number, queue in enumerate(self.queues) if context.key in queue), None)
        for queue in self.queues[1:]:
            queue.remove(context.key)
        entering = [(context.key, self.choose(context).nbytes)]
        for number, queue in enumerate(self.queues):
            fallen = [row for key, nbytes in entering for row in queue.use(key, nbytes, self._weights[key])]
            stay = [(key, nbytes) for key, nbytes in entering if key in queue]
            self.moved += sum(nbytes for key, nbytes in stay if (key, number) != (context.key, before))
            entering = fallen

    def settle(self) -> None: ...

    def used(self) -> list[int]:
        return [queue.used for queue in self.queues]


class Impress:
    """After IMPRESS (FAST 2025), simplified: contexts lie whole on the slowest tier, their important half is loaded,
    and the fastest tier keeps copies of halves. LRU on both. ``half`` is an option of the profile. IMPRESS itself finds
    what is important from few heads, and orders chunks by it."""

    def __init__(
        self, tiers: Sequence[Tier], whole: Callable[[Context], Option], half: Callable[[Context], Option]
    ) -> None:
        self.whole, self.half, self.slow = whole, half, len(tiers) - 1
        self.fast_rows, self.slow_rows = Lru(tiers[0].capacity), Lru(tiers[-1].capacity)
        self.moved = 0

    def lookup(self, context: Context, now: float) -> tuple[int, Option] | None:
        for tier, rows in ((0, self.fast_rows), (self.slow, self.slow_rows)):
            if context.key in rows:
                self.stored(context, now)
                return tier, self.half(context)
        return None

    def stored(self, context: Context, now: float) -> None:
        for rows, option in ((self.fast_rows, self.half(context)), (self.slow_rows, self.whole(context))):
            self.moved += option.nbytes * (context.key not in rows)
            rows.use(context.key, option.nbytes, 0.0)

    def settle(self) -> None: ...

    def used(self) -> list[int]:
        return [self.fast_rows.used, *[0] * (self.slow - 1), self.slow_rows.used]


class Placed:
    """The library's placement. It settles when a context is stored, and between requests as the simulator says.

    Args:
        methods: only these.
        promoting: what makes Algorithm 1 stronger than published, so that it is not beaten for what it leaves open: a
            context that is used on a lower tier enters anew with what is stored of it, and what takes longer to load
            than to recompute is recomputed.
    """

    def __init__(
        self, tiers: Sequence[Tier], *, alpha: float, rule: str, half_life: float,
        methods: Sequence[str] | None = None, promoting: bool = False,
    ) -> None:  # fmt: skip
        self.tiers, self.methods, self.promoting, self.moved = tiers, methods, promoting, 0
        self.placement = Placement(tiers, alpha=alpha, rule=rule, half_life=half_life)
        self._numbers = {tier.name: number for number, tier in enumerate(tiers)}
        self._decay, self._weights = Decay(half_life), dict[str, float]()

    def lookup(self, context: Context, now: float) -> tuple[int, Option] | None:
        tier, option = self.placement.where(context.key) if context.key in self.placement else (None, None)
        if tier is None or option is None:
            return None
        number = self._numbers[tier]
        if self.promoting and ttft(context, option, self.tiers[number]) >= ttft(context):
            return None
        self._use(context, now)
        self.placement.use(context.key, now)
        if self.promoting and number > 0:
            self.placement.remove(context.key)
            hits = self._weights[context.key] / self._decay.weight(now)
            self.placement.add(self._known(context, option), now, hits)
            self.settle()
        return number, option

    def stored(self, context: Context, now: float) -> None:
        self._use(context, now)
        if context.key in self.placement:
            self.placement.change(self._known(context))
            self.placement.use(context.key, now, recomputed=True)
        else:
            self.placement.add(self._known(context), now)
        self.settle()  # as soon as a cache would have it

    def know(self, context: Context, option: Option, tier: str, now: float) -> None:
        """Somebody else stored the context on a tier."""
        known = self._known(context, option)
        if context.key in self.placement:
            self.placement.remove(context.key)
        self.placement.add(known, now, stored=(tier, option))

    def settle(self) -> None:
        for move in self.placement.settle():
            held = move.before is not None and move.after is not None and move.before.cuts_to(move.after)
            if move.after is not None and not (held and move.from_tier == move.to_tier):
                self.moved += move.after.nbytes

    def used(self) -> list[int]:
        return [self.placement.used(tier.name) for tier in self.tiers]

    def _use(self, context: Context, now: float) -> None:
        self._weights[context.key] = self._weights.get(context.key, 0.0) + self._decay.weight(now)

    def _known(self, context: Context, held: Option | None = None) -> Context:
        """The context with the options that can be stored. ``held``: only what it can be cut to."""
        options = [
            option for option in context.options
            if (self.methods is None or option.method in self.methods) and (held is None or held.cuts_to(option))
        ]  # fmt: skip
        return replace(context, options=tuple(options))
