"""Transfers of vLLM's contexts, phase by phase."""

from __future__ import annotations

from collections import defaultdict

import pytest
from lower_tier import Disk

from kara_kernels.contexts.directory import Copy, Transfer
from kara_kernels.contexts.keeper import Keeper
from kara_kernels.contexts.utility import Option, Tier
from kara_kernels.integrations.vllm.contexts.grains import Grains
from kara_kernels.integrations.vllm.contexts.jobs import Ended, Load, Store
from kara_kernels.integrations.vllm.contexts.transfers import Transfers

GRAIN = 100
WHOLE, HALF = Option("int8", 0.5, 4 * GRAIN, 1.0), Option("int8", 0.25, 2 * GRAIN, 0.9)
OK, FAILED = Ended(1, True, 0.5), Ended(1, False, 0.5, "damaged")


class World:
    """Four grains to stage and eight to store, and a disk. What is new or comes up may take all of them."""

    def __init__(self) -> None:
        self.region: dict[int, tuple[str, int]] = {}
        self.disk = Disk(self.region, GRAIN)
        ram = Tier("ram", 12 * GRAIN, 1e9, reserve=4 * GRAIN)
        self.keeper = Keeper([ram, Tier("disk", 100 * GRAIN, 1e8)], alpha=1.0)
        self.directory, self.grains = self.keeper.directory, Grains(12, GRAIN)
        self.some = Transfers(self.keeper, self.grains, 1, defaultdict(float), [self.disk], 4)

    def begun(self) -> list[Store | Load]:
        self.some.step()
        jobs: list[Store | Load] = [*self.some.stores, *self.some.loads]
        self.some.stores, self.some.loads = [], []
        return jobs

    def store(self, key: str, tier: str) -> Transfer:
        transfer = self.directory.store(key, WHOLE, tier)
        assert transfer is not None
        self.keeper._running += 1  # as if the keeper had planned it
        self.some.start(transfer, Store(0, "writer", key, 64, (1, 2), (), "int8", "", 1))
        return transfer

    def stored(self, key: str, tier: str) -> Copy:
        """A context that has come to lie on a tier."""
        transfer = self.store(key, tier)
        (job,) = self.begun()
        self.region.update({grain: (key, i) for i, grain in enumerate(job.grains)})
        self.some.reported(job.number, OK)
        if tier == "disk":
            self.disk.end(job.number, True)
            self.some.step()
        assert transfer.target is self.directory.get(key)
        assert transfer.target is not None
        return transfer.target

    def load(self, key: str) -> None:
        self.some.start(self.keeper.load(key), Load(0, "reader", key, 64, (3, 4), (), 350, "int8", 64), f"packet {key}")

    def move(self, key: str, tier: str, option: Option) -> Transfer:
        transfer = self.directory.move(key, tier, option)
        assert transfer is not None
        self.keeper._running += 1
        self.some.start(transfer)
        return transfer

    def clean(self) -> None:
        self.some.erase(self.keeper.erasable())


def test_a_store_to_a_disk_passes_through_staging_grains() -> None:
    world = World()
    world.store("a", "disk")
    (job,) = world.begun()
    assert len(job.grains) == 4
    world.region.update(dict.fromkeys(job.grains, ("a", 0)))
    assert world.some.storing("writer") == [job.number]
    world.some.reported(job.number, OK)
    assert world.some.storing("writer") == []  # its blocks may go, while the bytes are written
    assert world.disk.jobs == {job.number: ("write", 0, list(job.grains))}
    assert world.directory.get("a") is None
    world.disk.end(job.number, True)
    assert world.begun() == []
    assert world.directory.get("a") is not None
    assert world.grains.free == 12


def test_a_store_that_finds_no_staging_grains_is_put_off() -> None:
    world = World()
    world.store("a", "disk")
    second = world.store("b", "disk")
    assert second.done
    assert world.keeper.is_due("b")
    assert world.keeper._running == 1
    assert len(world.begun()) == 1
    assert world.grains.free == 8
    world.clean()


def test_a_load_from_a_disk_reads_and_then_decodes() -> None:
    world = World()
    copy = world.stored("a", "disk")
    world.load("a")
    assert world.begun() == []
    assert world.some.is_loading("packet a")
    ((number, (kind, read, grains)),) = world.disk.jobs.items()
    assert (kind, read) == ("read", copy.number)
    world.disk.end(number, True)
    (job,) = world.begun()
    assert [world.region[grain] for grain in job.grains] == [("a", i) for i in range(4)]
    assert list(job.grains) == grains
    assert world.some.read_costs == [("disk", 0.1 / (4 * GRAIN))]
    world.some.reported(job.number, OK)
    assert not world.some.busy
    assert world.grains.free == 12


def test_a_load_that_cannot_be_read_is_reported_by_the_workers() -> None:
    world = World()
    world.stored("a", "disk")
    world.load("a")
    world.disk.end(next(iter(world.disk.jobs)), False)
    (job,) = world.begun()
    assert job.grains == ()
    assert world.some.reported(job.number, FAILED) is not None
    assert not world.some.busy
    assert world.grains.free == 12
    assert world.some.counts["jobs", "read", "failed"] == 1


def test_loads_wait_for_staging_grains() -> None:
    world = World()
    for key in "ab":
        world.stored(key, "disk")
    for key in "ab":
        world.load(key)
    assert len(world.disk.jobs) == 1
    world.disk.end(next(iter(world.disk.jobs)), True)
    (first,) = world.begun()
    assert not world.disk.jobs
    world.some.reported(first.number, OK)
    assert world.begun() == []
    ((number, _),) = world.disk.jobs.items()
    world.disk.end(number, True)
    (second,) = world.begun()
    assert second.context == "b"


def test_what_passes_through_waits_while_its_grains_hold_what_is_new() -> None:
    world = World()
    world.stored("a", "disk")
    copies = [world.stored(key, "ram") for key in "bcd"]
    assert world.grains.free == 0
    world.load("a")
    assert not world.disk.jobs
    assert world.store("e", "disk").done
    world.clean()
    move = world.move("b", "disk", WHOLE)
    world.disk.end(next(iter(world.disk.jobs)), True)
    world.some.step()
    world.clean()
    assert move.source is copies[0]
    assert world.grains.free == 4
    world.some.step()
    assert [kind for kind, *_ in world.disk.jobs.values()] == ["read"]


def test_what_is_new_is_put_off_and_what_comes_up_waits_while_others_pass_through() -> None:
    world = World()
    world.stored("a", "disk")
    for key in "bc":
        world.stored(key, "ram")
    world.store("d", "disk")
    assert world.store("e", "ram").done
    world.clean()
    world.move("a", "ram", WHOLE)
    assert not world.disk.jobs
    (job,) = world.begun()
    world.region.update({grain: ("d", i) for i, grain in enumerate(job.grains)})
    world.some.reported(job.number, OK)
    world.disk.end(job.number, True)
    world.some.step()
    assert [kind for kind, *_ in world.disk.jobs.values()] == ["read"]
    assert world.grains.free == 0


def test_what_was_cut_gives_back_its_last_grains() -> None:
    world = World()
    in_memory, on_disk = world.stored("a", "ram"), world.stored("b", "disk")
    for key in "ab":
        assert world.directory.cut(key, HALF)
    world.some.trim()
    assert world.grains.free == 10
    assert world.disk.copies[on_disk.number] == {0: ("b", 0), 1: ("b", 1)}
    assert [world.region[grain] for grain in world.some._held[in_memory.number]] == [("a", 0), ("a", 1)]


@pytest.mark.parametrize("ok", [True, False])
def test_a_move_down_writes_what_is_left_of_a_packet(ok: bool) -> None:
    world = World()
    world.stored("a", "ram")
    transfer = world.move("a", "disk", HALF)
    ((number, _),) = world.disk.jobs.items()
    world.disk.end(number, ok)
    assert world.begun() == []
    world.clean()
    home = world.directory.get("a")
    assert home is not None
    assert home.tier == ("disk" if ok else "ram")
    assert world.grains.free == (12 if ok else 8)
    assert transfer.target is not None
    assert world.disk.copies.get(transfer.target.number, {}) == ({0: ("a", 0), 1: ("a", 1)} if ok else {})
    assert world.some.unwritable == (set() if ok else {"disk"})


def test_a_move_up_reads_into_grains_of_its_own() -> None:
    world = World()
    copy = world.stored("a", "disk")
    world.move("a", "ram", WHOLE)
    ((number, (kind, _, grains)),) = world.disk.jobs.items()
    assert kind == "read"
    world.disk.end(number, True)
    world.some.step()
    world.clean()
    assert [world.region[grain] for grain in grains] == [("a", i) for i in range(4)]
    assert world.disk.copies[copy.number] == {}
    assert world.grains.free == 8
