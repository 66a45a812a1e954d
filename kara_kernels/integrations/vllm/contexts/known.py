"""The contexts that are stored or were offered, and what each may be stored as."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kara_kernels.contexts.utility import Context, Option

from .catalogue import Catalogue, Way
from .grains import Grains
from .rates import Rates
from .settings import CONVERSATION

MOVED = 1.25  # a cost that has changed by this factor is told to the placement
RENEWED = 16  # contexts of a step that hear of another profile


class Place(NamedTuple):
    """The first ``tokens`` tokens of a prompt: whole blocks, named by the hash of the last."""

    block_hash: bytes
    tokens: int
    rows: int | None = None
    """Those that windows left of a conversation. None: each token has one."""

    @property
    def most_rows(self) -> int:
        """Of a packet that is not cut."""
        return self.tokens if self.rows is None else self.rows

    @property
    def key(self) -> str:
        """A name that says all of it, and that no other context has."""
        return f"{self.block_hash.hex()}.{self.tokens}" + ("" if self.rows is None else f".{self.rows}")

    @classmethod
    def of(cls, key: str) -> Place:
        block_hash, tokens, *rows = key.split(".", 2)  # raises ValueError for what is no key, as all of this
        return cls(bytes.fromhex(block_hash), int(tokens), int(rows[0]) if rows else None)


@dataclass
class Known:
    """A context that is stored, or was offered."""

    place: Place
    context: Context
    """As the placement knows it."""
    profiled: str = ""
    """Its key in the profile, if it has one."""
    version: int = 0
    """Of the profile in which its tokens were looked up last. 0: of none since the start."""


class SeenPrompts:
    """The block hashes of earlier prompts, as many as ``most``."""

    def __init__(self, most: int) -> None:
        self._most, self._seen = most, OrderedDict[bytes, None]()

    def shared(self, hashes: Sequence[bytes]) -> int:
        """Blocks that an earlier prompt began with, too. The prompt counts as seen."""
        blocks = next((n for n in range(len(hashes), 0, -1) if hashes[n - 1] in self._seen), 0)
        for each in hashes:
            self._seen[each] = None
            self._seen.move_to_end(each)
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)
        return blocks


class KnownContexts:
    """By the hash of the last block, the least recently used first. A conversation and a context of whole rows that end
    with the same block are never known at once.

    Args:
        most: grains that a packet may take.
        floor: the least quality that a context may be stored with.
    """

    def __init__(self, catalogue: Catalogue, grains: Grains, most: int, floor: float, rates: Rates) -> None:
        self.catalogue, self._grains, self._most, self._floor, self._rates = catalogue, grains, most, floor, rates
        self._known: dict[bytes, Known] = {}
        self._old: list[bytes] = []  # contexts that have not heard of the newest profile

    def __len__(self) -> int:
        return len(self._known)

    def place(self, block_hash: bytes) -> Place | None:
        """What is known that ends with a block."""
        known = self._known.get(block_hash)
        return None if known is None else known.place

    @property
    def oldest(self) -> Known:
        return next(iter(self._known.values()))

    def add(self, known: Known) -> None:
        self._known[known.place.block_hash] = known

    def remove(self, place: Place) -> None:
        del self._known[place.block_hash]

    def clear(self) -> list[Place]:
        """Forgets all, and returns them."""
        places = [known.place for known in self._known.values()]
        self._known.clear()
        return places

    def look_up(self, place: Place, ids: Sequence[int]) -> Known:
        """A context of a request with the tokens ``ids``, as the newest profile has it."""
        return self._describe(place, self.catalogue.find(ids, place.tokens), self.catalogue.version)

    def left(self, place: Place, option: Option) -> Known | None:
        """A context as an earlier process left it. Its tokens are not known before it is used. None: the plugin has no
        such packets."""
        is_of_conversation = option.method == CONVERSATION
        if is_of_conversation == (place.rows is None) or self._way(place, option) is None:
            return None
        return self._describe(place, held=option)

    def fitting(self, place: Place, method: str, nbytes: int, ids: Sequence[int]) -> tuple[Known, Option | None]:
        """A context of which another server has a packet, and the most of it that would be stored here."""
        known = self._known.get(place.block_hash)
        if known is None or known.place != place:
            known = self.look_up(place, ids)
        good = [option for option in known.context.options if option.quality >= self._floor]
        fit = [option for option in good if option.method == method and option.nbytes <= nbytes]
        return known, max(fit, key=lambda option: option.nbytes, default=None)

    def way(self, place: Place, option: Option) -> Way:
        """How an option of a known context is encoded."""
        way = self._way(place, option)
        assert way is not None  # no others are stored
        return way

    def _way(self, place: Place, option: Option) -> Way | None:
        return self.catalogue.way(place.key, place.most_rows, option)

    def used(self, place: Place, ids: Sequence[int]) -> Context | None:
        """A context was used. Returns it if the placement should hear what it costs now, or what a profile says."""
        known = self._known.pop(place.block_hash)
        self._known[place.block_hash] = known  # the most recently used
        prefill = self._rates.to_compute(place.tokens)
        if known.version != self.catalogue.version:
            return self._replaced(self.look_up(place, ids))
        if not 1 / MOVED < prefill / known.context.prefill_seconds < MOVED:
            return self._replaced(self._describe(place, known.profiled, known.version))
        return None

    def heard(self) -> Iterator[Context]:
        """Contexts of which a new profile says something else, some in each step."""
        if self.catalogue.changed():
            self._old = list(self._known)
        for _ in range(min(RENEWED, len(self._old))):
            known = self._known.get(self._old.pop())
            if known is not None and known.profiled:
                yield self._replaced(self._describe(known.place, known.profiled, known.version))

    def _replaced(self, known: Known) -> Context:
        self._known[known.place.block_hash] = known
        return known.context

    def _describe(self, place: Place, profiled: str = "", version: int = 0, held: Option | None = None) -> Known:
        """What a context may be stored as, also as what an earlier process ``held``. Costs are those of now."""
        if place.rows is None:
            options = self.catalogue.options(place.key, place.tokens, profiled, self._rates.to_load)
        else:
            options = [self.catalogue.as_it_is(place.key, place.rows, self._rates.to_load)]
        options = [option for option in options if self._grains.needed(option.nbytes) <= self._most]
        if held is not None and not any(held.same_bytes(option) for option in options):
            options.append(held)
        prefill = self._rates.to_compute(place.tokens)
        return Known(place, Context(place.key, tuple(options), prefill, floor=self._floor), profiled, version)
