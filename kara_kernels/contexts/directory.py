"""What lies where: stored copies of contexts, transfers under way, and the bytes that both hold.

A :class:`Directory` copies nothing. It says which transfers may start, hears how they ended, and lists the copies whose
bytes can be erased. Every copy has a number of its own, so bytes of an old copy are never taken for those of a new one.
A copy that somebody reads keeps its bytes, even after its context was moved or deleted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..values import check_choice, check_count, check_flag
from .utility import MAX_BYTES, Option, Tier, check_name, check_option, check_tiers

FORMAT = 1


@dataclass(eq=False, slots=True)
class Copy:
    """Bytes of a context on a tier. Name them by ``number``, which no two copies share, restarts included."""

    key: str
    tier: str
    option: Option
    number: int
    readers: int = 0  # loads, pins, and moves from it
    kept: bool = True  # False: erased when nobody reads it any more


@dataclass(eq=False, slots=True)
class Transfer:
    """Work for the caller: ``source`` to ``target``. No source: encode from the GPU. No target: load to the GPU."""

    source: Copy | None
    target: Copy | None
    done: bool = False


@dataclass(eq=False, slots=True)
class _Entry:
    home: Copy | None = None  # can be read
    arriving: Copy | None = None  # the next home, being written


class Directory:
    """Copies of contexts on tiers.

    All methods with a key raise ValueError if the context is not stored, unless they say otherwise. Methods that may
    meet a lack of room or a copy in use return None or False, and then nothing has changed.

    Args:
        tiers: from the fastest to the slowest. Their ``reserve`` is left to packets that are new or come up from below,
            so that these find room before others have left.

    Attributes:
        counts: how many transfers and copies went which way, by name.
        heard: called with ``"cut"`` or ``"dropped"`` and a copy to which that has happened.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = {tier.name: tier for tier in check_tiers(tiers)}
        self._rank = {name: i for i, name in enumerate(self._tiers)}
        self._used = dict.fromkeys(self._tiers, 0)
        self._entries: dict[str, _Entry] = {}
        self._erasable: list[Copy] = []
        self._number = 0
        self.counts: Counter[str] = Counter()
        self.heard: Callable[[str, Copy], None] = lambda event, copy: None

    def __len__(self) -> int:
        return sum(entry.home is not None for entry in self._entries.values())

    def is_arriving(self, key: str) -> bool:
        """Whether a packet of the context is being written."""
        entry = self._entries.get(key)
        return entry is not None and entry.arriving is not None

    def get(self, key: str) -> Copy | None:
        """The copy to read, or None if nothing of the context can be read now."""
        entry = self._entries.get(key)
        return None if entry is None else entry.home

    def used(self, tier: str) -> int:
        """Bytes of a tier: stored, reserved for transfers under way, or still read."""
        check_choice("tier", tier, tuple(self._tiers))
        return self._used[tier]

    def store(self, key: str, option: Option, tier: str) -> Transfer | None:
        """Starts writing a packet from full rows. A copy stored earlier can be read until the new one is complete.
        None: no room, or something is being written already."""
        check_name("key", key)
        check_choice("tier", tier, tuple(self._tiers))
        if self.is_arriving(key) or not self._has_room(tier, check_option(option).nbytes):
            return None
        return self._begin(None, key, tier, option)

    def move(self, key: str, tier: str, option: Option | None = None) -> Transfer | None:
        """Starts copying to another tier, the whole packet or its prefix ``option``. The old copy can be read until
        then. None: no room, something is being written already, or the copy is read and the move leads downwards."""
        check_choice("tier", tier, tuple(self._tiers))
        entry, home = self._stored(key)
        if tier == home.tier:
            raise ValueError(f"tier: expected another tier than that of the copy, got {tier!r}")
        option = check_prefix(home, home.option if option is None else option)
        down = self._rank[tier] > self._rank[home.tier]
        if entry.arriving is not None or (home.readers and down) or not self._has_room(tier, option.nbytes, down):
            return None
        home.readers += 1
        return self._begin(home, key, tier, option)

    def cut(self, key: str, option: Option) -> bool:
        """Shortens a packet where it lies. The caller truncates its bytes. False: the copy is read, or on its way."""
        entry, home = self._stored(key)
        check_prefix(home, option)
        if home.readers or entry.arriving is not None:
            return False
        self._used[home.tier] -= home.option.nbytes - option.nbytes
        home.option = option
        self.counts["cut"] += 1
        self.heard("cut", home)
        return True

    def load(self, key: str) -> Transfer:
        """Starts a load to the GPU. Several may run at a time."""
        home = self._stored(key)[1]
        home.readers += 1
        self.counts["load"] += 1
        return Transfer(home, None)

    def pin(self, key: str) -> Copy:
        """Keeps the copy that can be read now until :meth:`unpin`, for a load to come."""
        home = self._stored(key)[1]
        home.readers += 1
        return home

    def unpin(self, copy: Copy) -> None:
        """Ends one :meth:`pin` of the copy, which need not be the home of its context any more."""
        if not copy.readers:
            raise ValueError(f"copy: expected a pinned one, got {copy}")
        copy.readers -= 1
        self._let_go(copy)

    def evict(self, key: str) -> bool:
        """Drops a context. False: its copy is read, or something is being written."""
        entry, home = self._stored(key)
        if home.readers or entry.arriving is not None:
            return False
        self._forget(key, entry)
        self.counts["evict"] += 1
        return True

    def delete(self, key: str) -> None:
        """Forgets a context at once, known or not. Bytes in use are freed when their readers and writers end."""
        entry = self._entries.get(key)
        if entry is not None:
            self._forget(key, entry)
            self.counts["delete"] += 1

    def finish(self, transfer: Transfer, ok: bool = True) -> bool:
        """Ends a transfer. If it failed, what was stored stays as it was. Returns whether the target can be read now,
        which it cannot if the context was deleted meanwhile. For a load, returns ``ok``."""
        if transfer.done:
            raise ValueError("transfer: expected one under way, got one that has ended")
        check_flag("ok", ok)
        transfer.done = True
        self.counts["done" if ok else "failed"] += 1
        source, target = transfer.source, transfer.target
        if target is not None:
            ok = self._arrive(target, ok)
        if source is not None:  # last: while it has a reader, nothing else frees it
            source.readers -= 1
            self._let_go(source)
        return ok

    def erasable(self) -> list[Copy]:
        """Copies whose bytes nobody needs, each listed once. Their room counts as free already, so erase them before
        you start a transfer."""
        copies, self._erasable = self._erasable, []
        return copies

    def copies(self) -> list[Copy]:
        """The copies that can be read, in the order in which their contexts first came."""
        return [entry.home for entry in self._entries.values() if entry.home is not None]

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Writes the readable copies to a JSON file, which replaces an older one in one step.

        ``about``: what else the file says, for those who read it without the engine.
        """
        write_snapshot(path, Snapshot(self._number, self.copies(), about or {}))

    def restore(self, path: Path, found: Mapping[tuple[str, int], int]) -> list[tuple[str, int]]:
        """Takes over what :meth:`save` wrote and what is still there, into an empty directory.

        Args:
            path: raises FileNotFoundError if it is missing, and ValueError if it is damaged.
            found: the bytes of every copy that lies on a tier, by tier and number. Contents are not checked.

        Returns:
            Those in ``found`` that no context has: not in the file, of another size, or beyond the tier's capacity.
        """
        if self._entries or self._number:
            raise ValueError(f"directory: expected a new one, got one that has counted to {self._number}")
        number, copies, _ = read_snapshot(path)
        self._number = max([number, *(index + 1 for _, index in found)])
        strays = dict(found)
        for copy in copies:
            at, size = (copy.tier, copy.number), copy.option.nbytes
            if copy.tier in self._tiers and found.get(at) == size and self._has_room(copy.tier, size):
                self._entries[copy.key] = _Entry(copy)
                self._used[copy.tier] += size
                del strays[at]
            else:
                self.counts["lost"] += 1
        return sorted(strays)

    def _stored(self, key: str) -> tuple[_Entry, Copy]:
        entry = self._entries.get(key)
        if entry is None or entry.home is None:
            raise ValueError(f"key: expected a stored context, got {key!r}")
        return entry, entry.home

    def _has_room(self, tier: str, nbytes: int, down: bool = False) -> bool:
        place = self._tiers[tier]
        return self._used[tier] + nbytes <= place.capacity - (place.reserve if down else 0)

    def _begin(self, source: Copy | None, key: str, tier: str, option: Option) -> Transfer:
        target = Copy(key, tier, option, self._number)
        self._number += 1
        self._used[tier] += option.nbytes
        entry = self._entries.setdefault(key, _Entry())
        entry.arriving = target
        self.counts["store" if source is None else "move"] += 1
        return Transfer(source, target)

    def _arrive(self, target: Copy, ok: bool) -> bool:
        """Makes a complete target the home, unless its context was deleted. Returns whether it did."""
        entry = self._entries[target.key] if target.kept else None
        if entry is not None:
            entry.arriving = None
            if ok:
                old, entry.home = entry.home, target
                if old is not None:
                    self._drop(old)
                return True
            if entry.home is None:
                del self._entries[target.key]
        target.kept = False
        self._free(target)
        return False

    def _forget(self, key: str, entry: _Entry) -> None:
        del self._entries[key]
        if entry.arriving is not None:
            entry.arriving.kept = False  # freed when its transfer ends
        if entry.home is not None:
            self.heard("dropped", entry.home)
            self._drop(entry.home)

    def _drop(self, copy: Copy) -> None:
        copy.kept = False
        self._let_go(copy)

    def _let_go(self, copy: Copy) -> None:
        if not copy.kept and not copy.readers:
            self._free(copy)

    def _free(self, copy: Copy) -> None:
        self._used[copy.tier] -= copy.option.nbytes
        self._erasable.append(copy)


def check_prefix(copy: Copy, option: Option) -> Option:
    """Checks that an option is what a copy holds, or a prefix of it."""
    if not copy.option.cuts_to(check_option(option)):
        raise ValueError(f"option: expected one that {copy.option} cuts to, got {option}")
    return option


class Snapshot(NamedTuple):
    """What :meth:`Directory.save` writes."""

    next: int
    """Of the numbers of copies, the first that no copy ever had."""
    copies: list[Copy]
    about: Mapping[str, Any]
    """Empty in files of older servers."""


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    rows = [
        {"key": copy.key, "tier": copy.tier, "number": copy.number, "option": asdict(copy.option)}
        for copy in snapshot.copies
    ]
    about = {"about": dict(snapshot.about)} if snapshot.about else {}
    write_whole(path, json.dumps({"format": FORMAT, "next": snapshot.next, **about, "copies": rows}))


def read_snapshot(path: Path) -> Snapshot:
    """What :meth:`Directory.save` wrote. Raises FileNotFoundError, and ValueError if it is damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["format"] != FORMAT:
            raise ValueError(f"format {read['format']}")
        about = read.get("about", {})
        if not isinstance(about, Mapping):
            raise TypeError(f"about: expected an object, got {type(about).__name__}")
        number = check_count("next", read["next"], 0, MAX_BYTES)
        copies = [
            Copy(
                check_name("key", row["key"]),
                check_name("tier", row["tier"]),
                Option(**row["option"]),
                check_count("number", row["number"], 0, number - 1),
            )
            for row in read["copies"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"path: expected a snapshot of format {FORMAT}, got {str(path)!r} ({error})") from error
    if len({copy.key for copy in copies}) < len(copies) or len({copy.number for copy in copies}) < len(copies):
        raise ValueError(f"path: expected keys and numbers to differ, got {str(path)!r}")
    return Snapshot(number, copies, about)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file so that a crash at any time leaves the old contents or the new ones. Only its owner
    may read it."""
    half = path.with_name(path.name + ".part")
    half.unlink(missing_ok=True)  # of a crash, perhaps with another mode
    with open(half, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the new name may be lost
    finally:
        os.close(folder)
