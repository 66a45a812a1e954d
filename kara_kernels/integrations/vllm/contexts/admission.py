"""What requests are admitted with, and how long that is expected to take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from kara_kernels.contexts.directory import Copy
from kara_kernels.contexts.keeper import Keeper

from .catalogue import Catalogue, Way
from .known import KnownContexts, Place
from .rates import Rates
from .requests import Forced
from .transfers import RAM, Transfers


class Admission(NamedTuple):
    """A request whose context is stored."""

    place: Place
    way: Way
    copy: int
    tier: str

    @property
    def packet(self) -> str:
        """Requests with the same one are given the same rows."""
        return f"{self.way.method} {self.way.step.sections} {self.copy}"

    @property
    def exact(self) -> bool:
        """Whether the packet lost nothing."""
        return self.way.form == "exact" and not self.dropped

    @property
    def dropped(self) -> int:
        """Tokens of the context that have no rows."""
        return self.place.tokens - self.way.step.rows

    @property
    def nbytes(self) -> int:
        return self.way.step.nbytes


class Admissions:
    """Of the contexts that one engine knows."""

    def __init__(
        self, known: KnownContexts, keeper: Keeper, transfers: Transfers, catalogue: Catalogue, rates: Rates,
        counts: defaultdict[tuple[str, ...], float], block_size: int,
    ) -> None:  # fmt: skip
        self._known, self._keeper, self._transfers, self._catalogue = known, keeper, transfers, catalogue
        self._rates, self._counts, self._block_size = rates, counts, block_size

    def find(
        self, hashes: Sequence[bytes], prompt_tokens: int, local: int, forced: Forced | None = None,
        conversations: bool = False,
    ) -> Admission | None:  # fmt: skip
        """The longest stored context that a prompt begins with, if it is longer than the ``local`` tokens in the
        engine's own cache, and loading it takes less time than computing the rest of it. Or, ``forced``, one that has
        a certain compression, whatever it takes. ``conversations``: one of these, too."""
        local = 0 if forced is not None else local
        for blocks in range((prompt_tokens - 1) // self._block_size, local // self._block_size, -1):
            place = self._known.place(hashes[blocks - 1])
            if place is None or (place.rows is not None and not conversations):
                continue
            copy = self._keeper.get(place.key)
            if copy is None or self._transfers.is_resting(copy.tier):
                continue
            if forced is not None:
                if copy.option.method == forced.method:
                    way = self._known.way(place, copy.option)
                    way = self._catalogue.cut(place.key, place.tokens, way, forced.ratio)
                    return Admission(place, way, copy.number, copy.tier)
                continue
            if (admission := self._sooner(place, copy, local)) is not None:
                return admission
        return None

    def resume(self, place: Place, local: int) -> Admission | None:
        """What a preempted request left, if it is stored, and loading it takes less time than computing the text behind
        the ``local`` tokens again."""
        copy = self._keeper.get(place.key)
        if copy is None or self._transfers.is_resting(copy.tier):
            return None
        return self._sooner(place, copy, local)

    def seconds(self, computed: int, way: Way | None = None, tier: str = RAM) -> float:
        """What computing tokens, and loading a packet from a tier, is expected to take."""
        computing = computed * self._rates.prefill
        if way is None:
            return computing
        reading = way.step.nbytes * self._rates.read.get(tier, 0.0)
        return computing + reading + self._rates.to_load(way.form, way.step.rows)

    def _sooner(self, place: Place, copy: Copy, local: int) -> Admission | None:
        """An admission, if loading takes less time than computing."""
        way = self._known.way(place, copy.option)
        if self._rates.prefill and self.seconds(0, way, copy.tier) >= self.seconds(place.tokens - local):
            self._counts["slower",] += 1
            self._rates.fade(way.form, copy.tier)
            return None
        return Admission(place, way, copy.number, copy.tier)
