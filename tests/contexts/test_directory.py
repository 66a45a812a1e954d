"""The directory: single steps by hand, and a state machine whose model is plain dicts."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kara_kernels.contexts.directory import Copy, Directory, Transfer, read_snapshot, write_snapshot
from kara_kernels.contexts.utility import Option, Tier

FULL, HALF, OTHER = Option("m", 1.0, 8, 1.0), Option("m", 0.5, 4, 0.9), Option("n", 0.5, 4, 0.9)
RAM, DISK = Tier("ram", 20, 10.0, reserve=8), Tier("disk", 40, 1.0)


def stored(directory: Directory, key: str, option: Option = FULL, tier: str = "ram") -> Copy:
    transfer = directory.store(key, option, tier)
    assert transfer is not None
    assert directory.finish(transfer)
    copy = directory.get(key)
    assert copy is not None
    return copy


def test_a_packet_can_be_read_when_it_is_complete() -> None:
    directory = Directory([RAM, DISK])
    transfer = directory.store("a", FULL, "ram")
    assert transfer is not None
    assert directory.get("a") is None
    assert directory.used("ram") == 8  # reserved
    assert directory.store("a", HALF, "ram") is None  # one is being written
    assert directory.finish(transfer)
    assert directory.get("a") is transfer.target
    assert len(directory) == 1


def test_a_failed_store_leaves_nothing_and_a_failed_move_leaves_the_source() -> None:
    directory = Directory([RAM, DISK])
    transfer = directory.store("a", FULL, "ram")
    assert transfer is not None
    assert not directory.finish(transfer, ok=False)
    assert directory.get("a") is None
    assert directory.used("ram") == 0
    assert directory.erasable() == [transfer.target]
    copy = stored(directory, "a")
    move = directory.move("a", "disk")
    assert move is not None
    assert not directory.finish(move, ok=False)
    assert directory.get("a") is copy
    assert directory.used("disk") == 0


def test_a_move_copies_then_frees() -> None:
    directory = Directory([RAM, DISK])
    old = stored(directory, "a")
    move = directory.move("a", "disk", HALF)
    assert move is not None
    assert directory.get("a") is old
    assert (directory.used("ram"), directory.used("disk")) == (8, 4)
    assert directory.erasable() == []
    assert directory.finish(move)
    assert (directory.used("ram"), directory.used("disk")) == (0, 4)
    assert directory.erasable() == [old]
    assert directory.erasable() == []


def test_a_load_keeps_its_bytes_while_the_context_moves_on() -> None:
    directory = Directory([RAM, DISK])
    old = stored(directory, "a", tier="disk")
    load, move = directory.load("a"), directory.move("a", "ram")
    assert move is not None
    assert directory.finish(move)
    assert directory.used("disk") == 8  # still read
    assert directory.erasable() == []
    assert directory.finish(load)
    assert directory.used("disk") == 0
    assert directory.erasable() == [old]


def test_what_is_read_is_neither_cut_nor_evicted_nor_moved_down() -> None:
    directory, heard = Directory([RAM, DISK]), []
    directory.heard = lambda event, copy: heard.append((event, copy.key, copy.option))
    stored(directory, "a")
    pin = directory.pin("a")
    assert not directory.evict("a")
    assert not directory.cut("a", HALF)
    assert directory.move("a", "disk") is None
    directory.unpin(pin)
    assert directory.cut("a", HALF)
    assert directory.used("ram") == 4
    assert directory.evict("a")
    assert directory.used("ram") == 0
    assert heard == [("cut", "a", HALF), ("dropped", "a", HALF)]


def test_deletion_hides_at_once_and_frees_later() -> None:
    directory = Directory([RAM, DISK])
    old = stored(directory, "a")
    load, move = directory.load("a"), directory.store("a", HALF, "disk")
    assert move is not None
    directory.delete("a")
    directory.delete("a")
    assert directory.get("a") is None
    assert (directory.used("ram"), directory.used("disk")) == (8, 4)
    new = stored(directory, "a", HALF)  # a new life beside the rest of the old one
    assert not directory.finish(move)
    assert directory.finish(load)
    assert directory.get("a") is new
    assert directory.erasable() == [move.target, old]
    assert (directory.used("ram"), directory.used("disk")) == (4, 0)


@pytest.mark.parametrize("is_new", [False, True])
def test_a_tier_full_of_pinned_contexts_still_takes_a_promotion_or_a_new_packet(is_new: bool) -> None:
    directory = Directory([RAM, DISK])
    stored(directory, "a")
    stored(directory, "b", HALF)
    for key in "ab":
        directory.pin(key)
    stored(directory, "c", tier="disk")
    move = directory.store("d", FULL, "ram") if is_new else directory.move("c", "ram")
    assert move is not None
    assert directory.finish(move)
    assert directory.used("ram") == 20
    assert directory.store("e", HALF, "ram") is None


def test_a_reserve_takes_nothing_that_moves_down() -> None:
    directory = Directory([Tier("ram", 20, 10.0), Tier("disk", 20, 1.0, reserve=13)])
    stored(directory, "a")
    assert directory.move("a", "disk") is None
    assert directory.move("a", "disk", HALF) is not None


def test_bad_requests_are_refused_and_change_nothing() -> None:
    directory = Directory([RAM, DISK])
    pin = stored(directory, "a", HALF)
    load = directory.load("a")
    directory.finish(load)
    for call, message in (
        (lambda: directory.load("x"), "key: expected a stored context, got 'x'"),
        (lambda: directory.store("b", FULL, "tape"), "tier: expected one of 'ram', 'disk', got 'tape'"),
        (lambda: directory.move("a", "ram"), "tier: expected another tier"),
        (lambda: directory.cut("a", FULL), "option: expected one that"),
        (lambda: directory.cut("a", OTHER), "option: expected one that"),
        (lambda: directory.move("a", "disk", FULL), "option: expected one that"),
        (lambda: directory.finish(load), "transfer: expected one under way"),
        (lambda: directory.unpin(pin), "copy: expected a pinned one"),
        (lambda: directory.restore(Path("x"), {}), "directory: expected a new one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="option: expected an Option, got int"):
        directory.store("b", 3, "ram")  # type: ignore[arg-type]
    assert (directory.used("ram"), directory.used("disk"), len(directory)) == (4, 0, 1)


def test_a_restart_takes_over_what_is_still_there(tmp_path: Path) -> None:
    directory = Directory([RAM, DISK])
    stored(directory, "a", tier="ram")
    kept, short = stored(directory, "b", tier="disk"), stored(directory, "c", tier="disk")
    running = directory.store("d", HALF, "disk")
    assert running is not None
    assert running.target is not None
    directory.save(tmp_path / "directory.json")
    again = Directory([RAM, DISK])
    found = {("disk", kept.number): 8, ("disk", short.number): 7, ("disk", running.target.number): 4, ("disk", 90): 1}
    strays = again.restore(tmp_path / "directory.json", found)
    assert strays == [("disk", short.number), ("disk", running.target.number), ("disk", 90)]
    assert [copy.key for copy in again.copies()] == ["b"]
    assert again.copies()[0].option == FULL
    assert again.used("disk") == 8
    assert again.counts["lost"] == 2
    assert stored(again, "e", tier="disk").number == 91  # beyond every number that was ever seen
    assert [path.name for path in tmp_path.iterdir()] == ["directory.json"]


def test_a_snapshot_says_more_to_those_who_read_it_without_the_engine(tmp_path: Path) -> None:
    directory, path = Directory([DISK]), tmp_path / "d.json"
    copy = stored(directory, "a", tier="disk")
    directory.save(path, {"grain": 4096})
    assert read_snapshot(path).about == {"grain": 4096}
    write_snapshot(path, read_snapshot(path))
    assert read_snapshot(path).about == {"grain": 4096}
    read = json.loads(path.read_text())
    del read["about"]  # as older servers wrote it
    path.write_text(json.dumps(read))
    assert read_snapshot(path).about == {}
    again = Directory([DISK])
    assert again.restore(path, {("disk", copy.number): 8}) == []
    assert again.copies()[0].key == "a"


def test_a_snapshot_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.with_name("d.json.part").write_text("what a crash left, readable by others")
    before = os.umask(0)
    try:
        Directory([DISK]).save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_restart_fills_no_tier_beyond_its_capacity(tmp_path: Path) -> None:
    directory = Directory([DISK])
    copies = [stored(directory, key, tier="disk") for key in "abc"]
    directory.save(tmp_path / "d.json")
    again = Directory([Tier("disk", 17, 1.0)])
    assert again.restore(tmp_path / "d.json", {("disk", copy.number): 8 for copy in copies}) == [("disk", 2)]
    assert again.used("disk") == 16


@pytest.mark.parametrize("damage", ["cut", "format", "type", "twice", "number", "about"])
def test_a_damaged_snapshot_is_refused(tmp_path: Path, damage: str) -> None:
    directory, path = Directory([DISK]), tmp_path / "d.json"
    stored(directory, "a", tier="disk")
    directory.save(path)
    read = json.loads(path.read_text())
    if damage == "format":
        read["format"] = 2
    elif damage == "type":
        read["copies"][0]["option"]["nbytes"] = "8"
    elif damage == "twice":
        read["copies"] *= 2
    elif damage == "number":
        read["next"] = 0
    elif damage == "about":
        read["about"] = "a grain"
    path.write_text(path.read_text()[:-5] if damage == "cut" else json.dumps(read))
    again = Directory([DISK])
    with pytest.raises(ValueError, match="path: expected"):
        again.restore(path, {("disk", 0): 8})
    assert len(again) == again.used("disk") == 0


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, path = Directory([DISK]), tmp_path / "d.json"
    stored(directory, "a", tier="disk")
    directory.save(path)
    before = path.read_bytes()
    stored(directory, "b", tier="disk")

    def fail(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        directory.save(path)
    assert path.read_bytes() == before


KEYS, TIERS = st.sampled_from("abcd"), st.sampled_from(["ram", "ssd", "disk"])
SIZES = st.integers(1, 6)


def packet(size: int) -> Option:
    return Option("m", size / 8, size, 1.0)


class Traffic(RuleBasedStateMachine):
    """Stores, loads, moves, pins and deletions that overlap as they like. The model keeps bytes by copy number."""

    @initialize(capacity=st.tuples(*[st.integers(4, 16)] * 3), reserve=st.integers(0, 4))
    def start(self, capacity: tuple[int, int, int], reserve: int) -> None:
        names = ("ram", "ssd", "disk")
        self.reserve = {name: 0 if name == "disk" else reserve for name in names}
        self.capacity = dict(zip(names, capacity, strict=True))
        self.rank = {name: i for i, name in enumerate(names)}
        self.tiers = [Tier(n, self.capacity[n], 1.0, reserve=self.reserve[n]) for n in names]
        self.directory = Directory(self.tiers)
        self.bytes: dict[int, tuple[str, int]] = {}  # what lies on the tiers: number -> (tier, bytes)
        self.home: dict[str, int] = {}
        self.writing: dict[str, int] = {}
        self.readers: Counter[int] = Counter()
        self.running: list[tuple[Transfer, str]] = []
        self.pins: list[Copy] = []
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[str, tuple[int, str, int]] | None = None

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def stored(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.home)))

    def room(self, tier: str, down: bool = False) -> int:
        used = sum(size for name, size in self.bytes.values() if name == tier)
        return self.capacity[tier] - used - (self.reserve[tier] if down else 0)

    def begin(self, transfer: Transfer | None, key: str, tier: str, size: int, granted: bool) -> None:
        assert (transfer is not None) == granted
        if transfer is not None:
            assert transfer.target is not None
            assert (transfer.target.key, transfer.target.tier, transfer.target.option.nbytes) == (key, tier, size)
            assert transfer.target.number not in self.bytes
            self.bytes[transfer.target.number] = (tier, size)
            self.writing[key] = transfer.target.number
            self.running.append((transfer, key))

    @rule(key=KEYS, tier=TIERS, size=SIZES)
    def store(self, key: str, tier: str, size: int) -> None:
        granted = key not in self.writing and size <= self.room(tier)
        self.begin(self.directory.store(key, packet(size), tier), key, tier, size, granted)

    @precondition(lambda self: self.home)
    @rule(data=st.data(), tier=TIERS, less=st.integers(0, 3))
    def move(self, data: st.DataObject, tier: str, less: int) -> None:
        key = self.stored(data)
        number = self.home[key]
        here, held = self.bytes[number]
        if here == tier:
            with pytest.raises(ValueError, match="tier: expected another"):
                self.directory.move(key, tier)
            return
        size, up = max(1, held - less), self.rank[tier] < self.rank[here]
        granted = key not in self.writing and (up or not self.readers[number]) and size <= self.room(tier, not up)
        transfer = self.directory.move(key, tier, packet(size))
        self.begin(transfer, key, tier, size, granted)
        if transfer is not None:
            assert transfer.source is not None
            assert transfer.source.number == number
            self.readers[number] += 1

    @precondition(lambda self: self.home)
    @rule(data=st.data(), less=st.integers(0, 3))
    def cut(self, data: st.DataObject, less: int) -> None:
        key = self.stored(data)
        tier, held = self.bytes[self.home[key]]
        granted = not self.readers[self.home[key]] and key not in self.writing
        assert self.directory.cut(key, packet(max(1, held - less))) == granted
        if granted:
            self.bytes[self.home[key]] = (tier, max(1, held - less))

    @precondition(lambda self: self.home)
    @rule(data=st.data(), pin=st.booleans())
    def read(self, data: st.DataObject, pin: bool) -> None:
        key = self.stored(data)
        self.readers[self.home[key]] += 1
        if pin:
            self.pins.append(self.directory.pin(key))
            assert self.pins[-1].number == self.home[key]
        else:
            self.running.append((self.directory.load(key), key))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        copy = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.directory.unpin(copy)
        self.readers[copy.number] -= 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def finish(self, data: st.DataObject, ok: bool) -> None:
        transfer, key = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        arrived = self.directory.finish(transfer, ok)
        if transfer.source is not None:
            self.readers[transfer.source.number] -= 1
        if transfer.target is None:
            assert arrived == ok
            return
        number = transfer.target.number
        wanted = self.writing.get(key) == number
        assert arrived == (ok and wanted)
        if wanted:
            del self.writing[key]
        if arrived:
            self.home[key] = number

    @precondition(lambda self: self.home)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        key = self.stored(data)
        granted = not self.readers[self.home[key]] and key not in self.writing
        assert self.directory.evict(key) == granted
        if granted:
            del self.home[key]

    @precondition(lambda self: self.home or self.writing)
    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.directory.delete(key)
        self.home.pop(key, None)
        self.writing.pop(key, None)

    @precondition(lambda self: self.home)
    @rule()
    def save(self) -> None:
        self.directory.save(Path(self.folder.name) / "directory.json")
        self.saved = {key: (number, *self.bytes[number]) for key, number in self.home.items()}

    @precondition(lambda self: self.saved is not None)
    @rule()
    def crash(self) -> None:
        """The process ends. RAM is lost, the other tiers keep their bytes, half-written copies included."""
        assert self.saved is not None
        found = {(tier, number): size for number, (tier, size) in self.bytes.items() if tier != "ram"}
        self.directory = Directory(self.tiers)
        strays = self.directory.restore(Path(self.folder.name) / "directory.json", found)
        alive = {k: (n, t, size) for k, (n, t, size) in self.saved.items() if found.get((t, n)) == size}
        assert sorted(strays) == sorted(set(found) - {(tier, number) for number, tier, _ in alive.values()})
        self.home = {key: number for key, (number, *_) in alive.items()}
        self.bytes = {number: (tier, size) for number, tier, size in alive.values()}
        self.writing, self.running, self.pins = {}, [], []
        self.readers.clear()

    @invariant()
    def judge(self) -> None:
        if not hasattr(self, "directory"):
            return
        live = {*self.home.values(), *self.writing.values(), *(n for n, count in self.readers.items() if count)}
        live |= {transfer.target.number for transfer, _ in self.running if transfer.target is not None}
        gone = [copy.number for copy in self.directory.erasable()]
        assert sorted(gone) == sorted(set(self.bytes) - live)  # each once, none too early, none forgotten
        for number in gone:
            del self.bytes[number]
        for tier in self.capacity:
            used = sum(size for name, size in self.bytes.values() if name == tier)
            assert used == self.directory.used(tier) <= self.capacity[tier]
        for key in "abcd":
            copy = self.directory.get(key)
            assert (copy and copy.number) == self.home.get(key)
            assert copy is None or self.bytes[copy.number] == (copy.tier, copy.option.nbytes)
        assert len(self.directory) == len(self.home)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
