"""Values of now, for operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kara_kernels.contexts.keeper import Keeper
from kara_kernels.contexts.utility import Tier

from .catalogue import Catalogue
from .rates import Rates

LOOK = 10.0  # seconds from one sum of all utilities to the next


class Gauges:
    """Call it for the values by name and labels; see :mod:`.stats`."""

    def __init__(
        self, keeper: Keeper, tiers: Sequence[Tier], rates: Rates, catalogue: Catalogue, clock: Callable[[], float]
    ) -> None:
        self._keeper, self._tiers, self._rates, self._catalogue, self._clock = keeper, tiers, rates, catalogue, clock
        self._utilities: tuple[float, dict[str, float]] = (-math.inf, {})

    def __call__(self) -> dict[tuple[str, ...], float]:
        now = self._clock()
        if now >= self._utilities[0] + LOOK:
            self._utilities = now, self._keeper.placement.utilities(now)
        return {
            **{("bytes", tier.name): self._keeper.directory.used(tier.name) for tier in self._tiers},
            **{("capacity_bytes", tier.name): tier.capacity - tier.reserve for tier in self._tiers},
            **{("utility", tier): value for tier, value in self._utilities[1].items()},
            ("stored_now",): len(self._keeper.directory),
            ("prefill_token_seconds",): self._rates.prefill,
            **{("load_row_seconds", form): value for form, value in self._rates.load.items()},
            ("profile_contexts",): self._catalogue.profiled,
            ("profile_age_seconds",): self._catalogue.age,
            ("profile_failures",): self._catalogue.refused,
        }
