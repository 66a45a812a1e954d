"""Carries out a placement: which transfers may start now, and what the plan must hear of those that failed.

A :class:`~kara_kernels.contexts.place.Placement` counts its moves as done when it returns them. A
:class:`~kara_kernels.contexts.directory.Directory` lets them start only where there is room and nobody reads. A
:class:`Keeper` holds both, and brings what is stored to what is planned as transfers end and room comes free. Pure
Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .directory import Copy, Directory, Transfer
from .place import Placement
from .utility import Context, Tier


class Keeper:
    """Contexts on tiers, planned and real.

    Report contexts, uses and removals, then call :meth:`work`. Erase what :meth:`erasable` lists after that, because
    the transfers may be given its room. Then carry out the transfers, report each with :meth:`finish`, and call
    :meth:`work` again.

    Args:
        tiers: from the fastest to the slowest. A ``reserve`` lets full tiers exchange contexts, and take new ones
            while others are on their way down.
        options: of :class:`~kara_kernels.contexts.place.Placement`.

    Attributes:
        counts: of the directory, and ``given_up``: moves that the plan took back because nothing could make room, or
            rows were gone before.
    """

    def __init__(self, tiers: Sequence[Tier], **options: Any) -> None:
        self.placement = Placement(tiers, **options)
        self.directory = Directory(tiers)
        self._fresh: set[str] = set()  # contexts whose full rows are at hand
        self._due: dict[str, None] = {}  # contexts that may lie elsewhere than planned, in the order of their plans
        self._running = 0

    def __contains__(self, key: object) -> bool:
        return key in self.placement

    @property
    def counts(self) -> Counter[str]:
        return self.directory.counts

    def add(self, context: Context, now: float = 0.0, hits: float = 1.0) -> None:
        """A new context, whose full rows are at hand until :meth:`forget_rows`."""
        self.placement.add(context, now, hits)
        self._fresh.add(context.key)

    def use(self, key: str, now: float = 0.0, recomputed: bool = False) -> None:
        """One more use. ``recomputed``: full rows are at hand again, until :meth:`forget_rows`."""
        self.placement.use(key, now, recomputed)
        if recomputed:
            self._fresh.add(key)

    def forget_rows(self, key: str) -> None:
        """The full rows of a context are no longer at hand: what was to be encoded from them cannot be any more."""
        self._fresh.discard(key)

    def is_due(self, key: str) -> bool:
        """Whether the context may lie elsewhere than planned, and waits for room or for what uses it."""
        return key in self._due

    def change(self, context: Context) -> None:
        """A new profile, floor or cost; see :meth:`Placement.change`."""
        self.placement.change(context)

    def remove(self, key: str) -> None:
        """Forgets a context, known or not."""
        self._fresh.discard(key)
        if key in self.placement:
            self.placement.remove(key)
        self.directory.delete(key)

    def lost(self, key: str) -> None:
        """What is stored of a context cannot be used, for example because it is damaged."""
        self.directory.delete(key)
        if key in self.placement:
            self.placement.correct(key, None, None)

    def get(self, key: str) -> Copy | None:
        """The copy to read, if there is one."""
        return self.directory.get(key)

    def load(self, key: str) -> Transfer:
        """Starts a load to the GPU; see :meth:`Directory.load`. Counts as no use."""
        self._running += 1
        return self.directory.load(key)

    def finish(self, transfer: Transfer, ok: bool = True) -> bool:
        """Ends a transfer. Returns whether its target can be read now; for a load, ``ok``."""
        target = transfer.target if transfer.target is not None and transfer.target.kept else None
        arrived = self.directory.finish(transfer, ok)
        self._running -= 1
        if target is not None:  # else the context was lost or removed meanwhile, and the plan may be a newer one
            if not arrived and target.key in self.placement:
                self._tell(target.key)
            self._due[target.key] = None
        return arrived

    def put_off(self, transfer: Transfer) -> None:
        """Ends a transfer that could not begin. The plan stays as it is, and :meth:`work` tries again."""
        assert transfer.target is not None
        self.directory.finish(transfer, False)
        self._running -= 1
        self._due[transfer.target.key] = None

    def erasable(self) -> list[Copy]:
        """Copies whose bytes nobody needs; see :meth:`Directory.erasable`."""
        return self.directory.erasable()

    def work(self) -> list[Transfer]:
        """Settles the plan, and returns the transfers that may start now. Cuts and evictions are done already."""
        for move in self.placement.settle():
            self._due[move.key] = None
        started: list[Transfer] = []
        while self._pass(started):
            pass
        if self._due and not self._running and not started:
            # Nothing runs that could free room. The plan hears what is real and makes another one next time.
            for key in filter(self.placement.__contains__, self._due):
                self._tell(key)
                self.counts["given_up"] += 1
            self._due.clear()
        self._running += len(started)
        return started

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """See :meth:`Directory.save`."""
        self.directory.save(path, about)

    def restore(
        self, path: Path, found: Mapping[tuple[str, int], int], context_of: Callable[[Copy], Context], now: float = 0.0
    ) -> list[tuple[str, int]]:
        """Takes over what an earlier process saved and what is still there; see :meth:`Directory.restore`.

        Args:
            context_of: the context of a copy, with at least the option that the copy has.
        """
        strays = self.directory.restore(path, found)
        for copy in self.directory.copies():
            self.placement.add(context_of(copy), now, 0.0, (copy.tier, copy.option))
        return strays

    def _pass(self, started: list[Transfer]) -> bool:
        """Tries every context that is due once. Returns whether room may have come free for another one."""
        freed = False
        for key in list(self._due):
            done, transfer = self._try(key)
            if transfer is not None:
                started.append(transfer)
            if done:
                del self._due[key]
                freed = freed or transfer is None
        return freed and bool(self._due)

    def _try(self, key: str) -> tuple[bool, Transfer | None]:
        """One step of a context towards its plan. Returns whether nothing is left to start, and what has started."""
        if self.directory.is_arriving(key):
            return False, None  # what can be read now says nothing about what can be read then
        tier, option = self.placement.where(key) if key in self.placement else (None, None)
        home = self.directory.get(key)
        if tier is None or option is None:
            return home is None or self.directory.evict(key), None
        if home is not None and home.option.cuts_to(option):
            if home.tier != tier:
                transfer = self.directory.move(key, tier, option)
                return transfer is not None, transfer
            return home.option.same_bytes(option) or self.directory.cut(key, option), None
        if key in self._fresh:
            transfer = self.directory.store(key, option, tier)
            return transfer is not None, transfer
        self._tell(key)
        self.counts["given_up"] += 1
        return True, None

    def _tell(self, key: str) -> None:
        """Tells the plan what is real."""
        home = self.directory.get(key)
        self.placement.correct(key, None if home is None else home.tier, None if home is None else home.option)
