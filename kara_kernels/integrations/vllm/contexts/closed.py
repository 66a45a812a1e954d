"""Tiers that could not be written. They are given nothing for a while: the plan would only try it again at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from kara_kernels.contexts.keeper import Keeper
from kara_kernels.contexts.utility import Tier

PAUSE = 30.0  # seconds


class ClosedTiers:
    """Which of a keeper's tiers are closed, and until when. What lies there stays, and can be read."""

    def __init__(self, keeper: Keeper, tiers: Sequence[Tier], counts: defaultdict[tuple[str, ...], float]) -> None:
        self._keeper, self._tiers, self._counts = keeper, {tier.name: tier for tier in tiers}, counts
        self.until: dict[str, float] = {}

    def __contains__(self, tier: object) -> bool:
        return tier in self.until

    def settle(self, unwritable: set[str], now: float) -> None:
        """Closes the tiers that are given, takes them out of the set, and opens those that were closed long enough."""
        for name in [name for name, until in self.until.items() if now >= until]:
            del self.until[name]
            tier = self._tiers[name]
            self._keeper.placement.resize(name, tier.capacity - tier.reserve)
        while unwritable:
            name = unwritable.pop()
            self._counts["closed", name] += name not in self.until  # several failures are heard of one after the other
            self.until[name] = max(now + PAUSE, self.until.get(name, 0.0))
            self.fit(name)

    def close(self, name: str) -> None:
        """Closes a tier for good. Nothing shall lie there."""
        self.until[name] = math.inf
        self.fit(name)

    def fit(self, name: str) -> None:
        """A closed tier has room for what it has, and no more."""
        if name in self.until:
            used = 0 if self.until[name] == math.inf else self._keeper.directory.used(name)
            self._keeper.placement.resize(name, used)
