"""vLLM's caches are reset: the model's weights may be others from now on, for which rows of the old ones are wrong."""

from __future__ import annotations

from collections import defaultdict

from kara_kernels.contexts.keeper import Keeper

from .known import KnownContexts
from .rows import RowsAtHand
from .transfers import Transfers


class Reset:
    """Call it to forget all contexts, stored and offered. What is under way is dropped when it ends. Returns whether no
    load runs, whose request would go on with old rows."""

    def __init__(
        self, known: KnownContexts, keeper: Keeper, transfers: Transfers, rows: RowsAtHand,
        counts: defaultdict[tuple[str, ...], float],
    ) -> None:  # fmt: skip
        self._known, self._keeper, self._transfers, self._rows, self._counts = known, keeper, transfers, rows, counts

    def __call__(self) -> bool:
        for place in self._known.clear():
            self._keeper.remove(place.key)
        self._rows.clear()
        self._transfers.erase(self._keeper.erasable())  # there may be no step for long
        self._counts["resets",] += 1
        return not self._transfers.loading
