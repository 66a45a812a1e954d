"""The remote tier against a store that fails at any command, forgets, and is written by others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from remote_world import GRAIN, ROW, TTL, Clock, FakeStore, Threads, place_of

from kara_kernels.contexts.directory import Copy
from kara_kernels.contexts.utility import Option
from kara_kernels.integrations.vllm.contexts.closed import PAUSE
from kara_kernels.integrations.vllm.contexts.remote import FRESH, REMOTE, SLOWEST, Manifest, RemoteTier, measured
from kara_kernels.integrations.vllm.contexts.store import TIMEOUT

WHOLE, HALF = Option("none/int8", 0.5, 4 * GRAIN, 1.0), Option("none/int8", 0.25, 2 * GRAIN, 0.9)
PLACE = place_of("abcd")


class World:
    """A server's tier, over memory whose rows all differ."""

    def __init__(self, store: FakeStore | None = None, clock: Clock | None = None, model: str = "model") -> None:
        self.clock = clock or Clock()
        self.store = store or FakeStore(self.clock)
        self.threads = Threads()
        self.rows = np.random.default_rng(0).integers(0, 256, (16, ROW), np.uint8)
        self.tier = RemoteTier(
            self.store, model, self.rows, grain=GRAIN, ttl=TTL, clock=self.clock, threads=self.threads
        )
        self.copies = 0

    def another(self, model: str = "model") -> World:
        other = World(self.store, self.clock, model)
        other.rows[:] = 0
        return other

    def copy(self, option: Option = WHOLE, tier: str = REMOTE) -> Copy:
        self.copies += 1
        return Copy(PLACE.key, tier, option, self.copies)

    def done(self) -> list[tuple[int, bool]]:
        self.threads.run_all()
        return [(number, ok) for number, ok, _ in self.tier.ended()]

    def write(self, copy: Copy | None = None) -> bool:
        self.tier.write(1, copy or self.copy(), [3, 1, 2, 7])
        ((_, ok),) = self.done()
        return ok

    def find(self) -> Manifest | None:
        answer = self.tier.look([PLACE])
        self.threads.run_all()
        found = answer.result()
        return found[0][1] if found else None

    def read(self, option: Option = WHOLE) -> bool:
        """Reads what is found into grains 9, 8, and so on."""
        manifest = self.find()
        assert manifest is not None
        copy = self.copy(option)
        self.tier.found(copy, manifest)
        self.tier.read(2, copy, [9, 8, 6, 5][: option.nbytes // GRAIN])
        ((_, ok),) = self.done()
        return ok


def test_what_one_server_writes_another_reads() -> None:
    world = World()
    assert world.write()
    other = world.another()
    assert other.find() == Manifest(other.find().packet, WHOLE.method, WHOLE.nbytes)  # type: ignore[union-attr]
    assert other.read()
    assert np.array_equal(other.rows[[9, 8, 6, 5]], world.rows[[3, 1, 2, 7]])
    assert not np.delete(other.rows, [9, 8, 6, 5], 0).any()
    assert not other.tier.errors


def test_a_prefix_of_a_packet_can_be_read() -> None:
    world = World()
    assert world.write()
    other = world.another()
    assert other.read(HALF)
    assert np.array_equal(other.rows[[9, 8]], world.rows[[3, 1]])
    assert not np.delete(other.rows, [9, 8], 0).any()


def test_servers_of_other_models_find_nothing() -> None:
    world = World()
    assert world.write()
    assert world.another("another model").find() is None


@pytest.mark.parametrize("fault", ["slow", "gone", "refused"])
@pytest.mark.parametrize("at", range(6))
def test_a_packet_that_is_not_whole_is_never_found(fault: str, at: int) -> None:
    """A write is a lookup, four grains and a manifest. It fails at any of them."""
    world = World()
    world.store.faults = [None] * at + [fault]
    assert not world.write()
    assert list(world.tier.errors) == [fault]
    assert world.another().find() is None
    assert not world.tier.has(world.copy())
    assert world.tier.resting == (fault != "refused")
    if fault == "refused":  # a store that is full is not left with what nobody will find
        assert not world.store.values


def test_memory_that_was_taken_back_is_not_written_to_a_manifest() -> None:
    """In the middle of a write its time is over, and others are given its grains."""
    world = World()

    def later(command: str) -> None:
        if command == "write" and world.store.commands.count("write") == 3:
            world.clock.now += 60
            assert list(world.tier.ended()) == [(1, False, 60.0)]
            world.rows[:] = 0

    world.store.before = later
    world.tier.write(1, world.copy(), [3, 1, 2, 7])
    world.threads.run_all()
    world.store.before = lambda command: None
    assert list(world.tier.ended()) == []
    assert world.another().find() is None
    assert not world.store.values  # nor is anything left
    assert list(world.tier.errors) == ["slow"]


def test_memory_that_was_taken_back_is_not_read_into() -> None:
    world = World()
    assert world.write()
    other = world.another()
    manifest = other.find()
    assert manifest is not None
    copy = other.copy()
    other.tier.found(copy, manifest)
    other.store.commands.clear()

    def later(command: str) -> None:
        if len(other.store.commands) == 3:
            other.clock.now += 60
            assert list(other.tier.ended()) == [(2, False, 60.0)]
            other.rows[:] = 0

    other.store.before = later
    other.tier.read(2, copy, [9, 8, 6, 5])
    other.threads.run_all()
    assert not other.rows.any()
    assert list(other.tier.ended()) == []


def test_many_jobs_have_more_time() -> None:
    world = World()
    size = int(4 * SLOWEST)
    world.tier._rows = np.broadcast_to(np.uint8(0), (16, size))  # a row takes four seconds
    for number in (1, 2):
        world.tier.write(number, world.copy(), [3])
    world.clock.now = TIMEOUT + 4.1
    assert [number for number, *_ in world.tier.ended()] == [1]
    world.clock.now = TIMEOUT + 8.1
    assert [number for number, *_ in world.tier.ended()] == [2]


@pytest.mark.parametrize("missing", range(4))
def test_a_packet_that_has_lost_a_grain_is_not_found_again(missing: int) -> None:
    world = World()
    assert world.write()
    manifest = world.find()
    assert manifest is not None
    other = world.another()
    assert other.read()
    assert other.tier.is_fresh(PLACE.key)
    del world.store.values[f"kara:model:{manifest.packet}:{missing}"]
    assert not other.read()
    assert not other.tier.is_fresh(PLACE.key)
    assert other.find() is None
    assert not other.tier.resting  # nothing is wrong with the store
    assert not other.tier.errors
    assert world.write()  # although this server knows that it has written it
    assert other.read()


def test_a_grain_of_another_size_is_as_good_as_none() -> None:
    world = World()
    assert world.write()
    manifest = world.find()
    assert manifest is not None
    world.store.values[f"kara:model:{manifest.packet}:1"] = b"x" * (ROW - 1), 1e9
    other = world.another()
    assert not other.read()
    assert other.find() is None


@pytest.mark.parametrize(
    "value",
    [
        b"", b"\xff\xfe", b"{}", b"[1, 2, 3]", b"null", b'["a", "b"]', b"[" * 5000,
        json.dumps(["0" * 32, "none/int8", 0]).encode(),
        json.dumps(["0" * 32, "none/int8", True]).encode(),
        json.dumps(["0" * 32, "none/int8", 10**30]).encode(),
        json.dumps(["0" * 32, 8, 512]).encode(),
        json.dumps(["../../" + "0" * 26, "none/int8", 512]).encode(),
        json.dumps(["0" * 32, "x" * 2000, 512]).encode(),
    ],
)  # fmt: skip
def test_foreign_values_are_no_manifests(value: bytes) -> None:
    world = World()
    world.store.values[f"kara:model:{PLACE.key}"] = value, 1e9
    assert world.find() is None
    assert not world.tier.errors
    assert world.write()  # it is replaced
    assert world.find() is not None


def test_what_is_there_is_not_written_again_but_lives_longer() -> None:
    world = World()
    assert world.write()
    world.clock.now = TTL - 1
    other = world.another()
    other.store.commands.clear()
    assert other.write(other.copy(tier="ram"))
    assert "write" not in other.store.commands
    world.clock.now = 2 * TTL - 2
    assert other.read()
    world.clock.now = 3 * TTL - 3  # reading is a use
    assert world.find() is not None
    world.clock.now = 4 * TTL
    assert world.find() is None


def test_a_manifest_never_outlives_its_grains() -> None:
    world = World()
    assert world.write()
    manifest = world.find()
    assert manifest is not None
    for now in (TTL - 0.1, TTL + 0.1):
        world.clock.now = now
        assert (world.find() is None) == (now > TTL)
        assert world.store.get([f"kara:model:{manifest.packet}:3"])[0] is not None


def test_another_packet_replaces_one_that_holds_less() -> None:
    world = World()
    world.tier.write(1, world.copy(HALF), [3, 1])
    assert world.done() == [(1, True)]
    assert world.write()
    found = world.find()
    assert found is not None
    assert found.nbytes == WHOLE.nbytes
    world.tier.write(1, world.copy(HALF), [3, 1])
    assert world.done() == [(1, True)]
    assert world.find() == found


def test_what_is_there_needs_no_write() -> None:
    world = World()
    assert not world.tier.has(world.copy())
    assert world.write(world.copy(tier="ram"))
    assert world.tier.has(world.copy())
    assert world.tier.has(world.copy(HALF))
    assert not world.tier.has(world.copy(Option("none/fp8", 0.5, 4 * GRAIN, 1.0)))
    world.clock.now = TTL / 4
    assert not world.tier.has(world.copy())  # it must be asked


def test_what_was_used_long_ago_is_asked_for() -> None:
    world = World()
    world.tier._ttl = 10**6
    assert world.write()
    world.clock.now = FRESH - 1
    assert world.tier.is_fresh(PLACE.key)
    world.clock.now = FRESH
    assert not world.tier.is_fresh(PLACE.key)
    assert not world.tier.has(world.copy())


def test_a_damaged_packet_is_forgotten_by_all_but_not_its_successor() -> None:
    world = World()
    assert world.write()
    other = world.another()
    manifest = other.find()
    assert manifest is not None
    copy = other.copy()
    other.tier.found(copy, manifest)
    other.tier.spoiled(copy)
    other.threads.run_all()
    assert world.find() is None
    assert world.write()
    other.tier.spoiled(copy)  # late: there is another one
    other.threads.run_all()
    assert other.find() is not None


def test_a_damaged_packet_is_not_used_before_it_is_forgotten() -> None:
    world = World()
    assert world.write()
    manifest = world.find()
    assert manifest is not None
    world.tier.spoiled(world.copy())
    (forget,) = world.threads.waiting
    world.threads.waiting.clear()
    assert world.find() is None
    assert world.write()  # although the other one is still there
    found = world.find()
    assert found is not None
    assert found != manifest
    world.threads.waiting.append(forget)
    world.threads.run_all()
    assert world.find() == found


def test_a_packet_that_is_found_damaged_while_it_is_offered_is_not_believed_to_be_there() -> None:
    world = World()
    assert world.write()
    world.tier.write(2, world.copy(tier="ram"), [3, 1, 2, 7])
    world.threads.run_all()
    world.tier.spoiled(world.copy())
    assert world.done() == [(2, True)]
    assert not world.tier.is_fresh(PLACE.key)
    assert not world.tier.has(world.copy())


def test_a_copy_that_is_cut_can_still_be_read() -> None:
    world = World()
    assert world.write()
    manifest = world.find()
    assert manifest is not None
    copy = world.copy(HALF)
    world.tier.found(copy, manifest)
    world.tier.erase(copy, [2, 3])
    world.tier.read(2, copy, [9, 8])
    assert world.done() == [(2, True)]
    world.tier.erase(copy, [0, 1])
    assert not world.tier._copies.keys() & {copy.number}


def test_a_store_that_does_not_answer_is_left_alone_for_a_while() -> None:
    world = World()
    assert world.write()
    world.store.faults = ["gone"]
    assert world.find() is None
    assert world.tier.resting
    world.store.commands.clear()
    assert not world.write()
    assert world.find() is None
    assert not world.store.commands
    world.clock.now = PAUSE + 1
    assert world.find() is not None


def test_a_defect_is_an_error_and_no_crash() -> None:
    world = World()

    def broken(command: str) -> None:
        raise KeyError(command)

    world.store.before = broken
    assert not world.write()
    assert world.find() is None
    assert set(world.tier.errors) == {"failed"}


@pytest.mark.parametrize("faults", [[], ["gone"], ["refused"]])
def test_a_tier_is_measured_and_starts_without_its_store(faults: list[str | None]) -> None:
    world = World()
    world.store.faults = list(faults)
    tier = measured(world.store, world.tier, 0.5)
    assert tier.name == REMOTE
    assert tier.bandwidth > 1e6
    assert list(world.tier.errors) == faults
    assert world.tier.resting == (faults == ["gone"])
    assert not world.store.values


def test_nothing_runs_after_the_end() -> None:
    world = World()
    world.tier.write(1, world.copy(), [3, 1, 2, 7])
    world.threads.shutdown = lambda *a, **k: None  # type: ignore[method-assign]
    world.tier.shutdown()
    world.threads.run_all()
    assert not world.store.commands
