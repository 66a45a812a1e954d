"""Servers that share a store: what one has stored another finds, whatever fails meanwhile."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from remote_world import BLOCK, GRAIN, TTL, Clock, FakeStore, Server, hashes, place_of

from kara_kernels.contexts.utility import Option
from kara_kernels.integrations.vllm.contexts.closed import PAUSE
from kara_kernels.integrations.vllm.contexts.jobs import Load
from kara_kernels.integrations.vllm.contexts.remote import REMOTE, Manifest


class World:
    def __init__(self, grains: int = 64) -> None:
        self.clock = Clock()
        self.store = FakeStore(self.clock)
        self.a, self.b = (Server(name, self.store, self.clock, grains) for name in "ab")

    def shared(self, text: str) -> None:
        """A context that the first server has stored, and offered."""
        self.a.store(text)
        self.a.rest()

    def manifest(self, text: str) -> Manifest | None:
        (data,) = self.store.get([f"kara:model:{place_of(text).key}"])
        return Manifest.read(data, 10**9)

    def damage(self, text: str) -> None:
        manifest = self.manifest(text)
        assert manifest is not None
        name = f"kara:model:{manifest.packet}:0"
        value, until = self.store.values[name]
        self.store.values[name] = bytes([value[0] ^ 1]) + value[1:], until


def test_what_one_server_stored_another_admits() -> None:
    world = World()
    world.shared("abcd")
    assert world.a.tier_of("abcd") == "ram"
    world.b.look("abcd")
    assert world.b.tier_of("abcd") == REMOTE
    assert world.b.load("abcd") == "a"
    assert world.b.manager.counts["lookups", "found"] == 1
    assert world.b.manager.counts["jobs", "read", "ok"] == 1
    assert not world.b.manager.transfers.busy


def test_the_context_that_is_asked_for_is_looked_up_and_no_other() -> None:
    world = World()
    world.shared("ab")
    world.b.look("abcd", asked="abc")
    assert world.b.manager.counts["lookups", "none"] == 1
    world.b.look("abcd", asked="ab")
    assert world.b.tier_of("ab") == REMOTE


def test_the_longest_context_is_found_in_one_round_trip() -> None:
    world = World()
    for text in ("ab", "abcd"):
        world.shared(text)
    world.store.commands.clear()
    world.b.look("abcdefgh")
    assert world.store.commands == ["get"]
    assert world.b.tier_of("abcd") == REMOTE
    assert world.b.tier_of("ab") is None


def test_what_is_stored_here_is_not_looked_up() -> None:
    world = World()
    world.shared("abcd")
    world.store.commands.clear()
    world.a.look("abcd", asked="abcd")
    world.a.look("abcd")
    assert not world.store.commands
    world.a.look("abcde")  # there might be more
    assert world.store.commands == ["get"]


def test_a_request_waits_for_the_answer_but_not_long() -> None:
    world = World()
    world.shared("abcd")
    prompt = hashes("abcd?")
    world.b.sharing.arrived("x", prompt, 5 * BLOCK, (), None)
    assert world.b.sharing.is_looking("x", 0)
    assert not world.b.sharing.is_looking("x", 4 * BLOCK)  # the engine's own cache has as much
    world.clock.now = 0.9
    assert world.b.sharing.is_looking("x", 0)
    assert not world.b.tier.resting
    world.clock.now = 1.0
    for _ in range(3):
        assert not world.b.sharing.is_looking("x", 0)
    assert world.b.manager.counts["lookups", "late"] == 1
    assert world.b.tier.resting  # and nobody else waits
    world.b.sharing.arrived("y", prompt, 5 * BLOCK, (), None)
    assert not world.b.sharing.is_looking("y", 0)
    world.b.rest()
    assert world.b.manager.counts["store_errors", "slow"] == 1
    assert world.b.manager.counts["closed", REMOTE] == 1


def test_a_late_answer_is_of_use_to_others() -> None:
    world = World()
    world.shared("abcd")
    world.b.sharing.arrived("x", hashes("abcd?"), 5 * BLOCK, (), None)
    _, body, args = world.b.threads.waiting[0]
    world.b.threads.waiting[0][0].set_result(world.b.tier._look(args[1]))
    assert body is not None
    world.clock.now = 2.0
    assert not world.b.sharing.is_looking("x", 0)
    assert world.b.tier_of("abcd") == REMOTE


def test_a_store_that_is_gone_is_a_miss_and_a_counter() -> None:
    world = World()
    world.shared("abcd")
    world.store.faults = ["gone"]
    world.b.look("abcd")
    assert world.b.tier_of("abcd") is None
    assert world.b.manager.counts["lookups", "failed"] == 1
    world.b.step()
    assert world.b.manager.counts["store_errors", "gone"] == 1
    world.clock.now = PAUSE + 1
    world.b.look("abcd")
    assert world.b.tier_of("abcd") == REMOTE


def test_after_a_reset_a_server_leaves_the_store_as_it_is() -> None:
    """It neither looks up, nor reads, nor writes, whatever is stored and used, and however long it lives."""
    world = World()
    world.shared("abcd")
    world.b.look("abcd")
    assert world.b.reset()
    there = dict(world.store.values)
    world.store.commands.clear()
    for _ in range(3):
        world.b.look("abcd")
        assert world.b.tier_of("abcd") is None
        world.b.store("abcd")
        world.b.store("efgh")
        world.b.rest()
        assert [world.b.tier_of(text) for text in ("abcd", "efgh")] == ["ram", "ram"]
        assert world.b.load("abcd") == "b"
        world.b.sharing.used(place_of("efgh").key)
        assert world.b.sharing.busy
        world.b.rest()
        assert not world.b.sharing.busy
        world.clock.now += PAUSE + 1
        assert world.b.reset()
    assert not world.store.commands
    assert world.store.values == there
    assert not any(n for (name, *_), n in world.b.manager.counts.items() if name in ("closed", "store_errors"))
    assert world.a.load("abcd") == "a"
    assert world.a.manager.counts["jobs", "write", "ok"] == 1


def test_a_reset_drops_what_was_on_its_way_to_the_store_and_from_there() -> None:
    world = World()
    world.shared("abcd")
    names = set(world.store.values)
    world.b.store("efgh")
    world.b.sharing.arrived("x", hashes("abcd?"), 5 * BLOCK, (), None)
    world.b.step()
    assert world.b.manager.transfers.offers == 1
    (lookup, *_), *others = sorted(world.b.threads.waiting, key=lambda waiting: waiting[2][0] != world.b.tier._look)
    world.b.threads.waiting = others
    found = [(place_of("abcd"), world.manifest("abcd"))]
    body, written = world.store.write, []

    def write(name: str, value: bytes, seconds: int) -> None:
        if not written:
            lookup.set_result(found)
            assert world.b.reset()
        written.append(name)
        body(name, value, seconds)

    world.store.write = write  # type: ignore[assignment, method-assign]
    world.b.rest()
    assert len(written) == 1
    assert set(world.store.values) == names
    assert not world.b.sharing.is_looking("x", 0)
    assert not any(key[0] == "lookups" for key in world.b.manager.counts)
    assert world.b.tier_of("abcd") is None
    assert not world.b.manager.transfers.busy
    assert world.b.manager.grains.free == world.b.manager.grains.count


def test_a_load_from_the_store_fails_at_a_reset() -> None:
    world = World()
    world.shared("abcd")
    world.b.look("abcd")
    admission = world.b.manager.admissions.find(hashes("abcd?"), 5 * BLOCK, 0)
    assert admission is not None
    world.b.manager.load("reader", admission, range(4))
    world.b.step()
    world.store.commands.clear()
    assert not world.b.reset()
    _, (load,) = world.b.step()
    assert not load.grains
    assert world.b.decode(load, "a") is None
    world.b.rest()
    assert not world.store.commands
    assert not world.b.manager.transfers.busy
    assert world.b.manager.keeper.placement._market.capacity[-1] == 0
    assert world.b.reset()


def test_nothing_is_read_from_a_store_that_is_left_alone() -> None:
    world = World()
    world.shared("abcd")
    world.b.look("abcd")
    world.b.tier.rest("gone", "on purpose")
    assert world.b.manager.admissions.find(hashes("abcd?"), 5 * BLOCK, 0) is None
    world.clock.now = PAUSE + 1
    assert world.b.manager.admissions.find(hashes("abcd?"), 5 * BLOCK, 0) is not None


@pytest.mark.parametrize("fault", ["refused", "gone"])
def test_what_could_not_be_offered_is_offered_when_it_is_used(fault: str) -> None:
    world = World()
    world.store.faults = [None, fault]
    world.shared("abcd")
    assert world.manifest("abcd") is None
    assert world.a.manager.counts["jobs", "write", "failed"] == 1
    assert world.a.manager.counts["store_errors", fault] == 1
    world.store.commands.clear()
    world.a.sharing.used(place_of("abcd").key)
    world.a.rest()
    assert not world.store.commands  # the tier is closed
    world.clock.now = PAUSE + 1
    world.a.step()
    world.a.sharing.used(place_of("abcd").key)
    world.a.rest()
    assert world.manifest("abcd") is not None


def test_what_is_found_in_a_full_store_is_used() -> None:
    world = World()
    world.shared("abcd")
    world.store.faults = [None, "refused"]
    world.b.store("xyz")
    world.b.rest()
    assert REMOTE in world.b.manager.closed
    world.b.look("abcd")
    for _ in range(3):
        world.b.manager.used(place_of("abcd"), REMOTE, ())
        world.b.step()
        assert world.b.tier_of("abcd") == REMOTE or world.b.manager.transfers.busy
    assert world.b.load("abcd") == "a"


def test_a_store_that_lost_everything_gets_what_is_used() -> None:
    """After a restart it is empty. What servers have in memory comes back when they hear of its use again."""
    world = World()
    world.shared("abcd")
    world.store.values.clear()
    world.a.sharing.used(place_of("abcd").key)
    world.a.rest()
    assert world.manifest("abcd") is None  # it was used just now
    world.clock.now = TTL / 4
    world.a.sharing.used(place_of("abcd").key)
    world.a.rest()
    assert world.manifest("abcd") is not None


def test_uses_keep_a_context_in_the_store() -> None:
    world = World()
    world.shared("abcd")
    packet = world.manifest("abcd")
    for turn in range(1, 30):
        world.clock.now = turn * TTL / 5
        world.a.sharing.used(place_of("abcd").key)
        world.a.rest()
        assert world.manifest("abcd") == packet


def test_an_engine_without_requests_goes_on_until_all_is_offered() -> None:
    world = World()
    world.a.manager.offer("writer", place_of("abcd"), range(4), ())
    (job,), _ = world.a.step()
    assert world.a.manager.transfers.busy
    world.a.encode(job)
    assert not world.a.manager.transfers.busy
    assert world.a.sharing.busy
    world.a.step()
    assert world.a.manager.transfers.busy
    world.a.rest()
    assert not world.a.manager.transfers.busy
    assert not world.a.sharing.busy
    world.b.sharing.arrived("x", hashes("abcd?"), 5 * BLOCK, (), None)
    assert world.b.sharing.busy  # the request may be aborted, and its lookup ends all the same
    world.b.rest()
    assert not world.b.sharing.busy


def test_a_context_that_leaves_memory_is_there_already() -> None:
    world = World()
    world.shared("abcd")
    packet = world.manifest("abcd")
    world.store.commands.clear()
    world.a.manager.keeper.placement.resize("ram", 0)
    world.a.rest()
    assert world.a.tier_of("abcd") == REMOTE
    assert not world.store.commands
    assert world.a.manager.counts["jobs", "write", "ok"] == 1  # when it came
    assert world.a.manager.grains.free == world.a.manager.grains.count
    assert world.a.load("abcd") == "a"
    assert world.manifest("abcd") == packet


def test_conversations_are_not_shared() -> None:
    """Another server does not know how many rows there are."""
    world = World()
    whole = place_of("abcd")
    world.a.manager.offer("writer", whole._replace(rows=40), range(3), ())
    (job,), _ = world.a.step()
    world.a.encode(job)
    world.a.sharing.used(job.context)
    world.a.rest()
    assert not world.a.sharing.busy
    assert not world.store.values
    world.b.look("abcd")
    assert world.b.tier_of("abcd") is None


def test_whole_rows_that_another_server_has_win() -> None:
    world = World()
    world.shared("abcd")
    world.b.manager.offer("writer", place_of("abcd")._replace(rows=40), range(3), ())
    (job,), _ = world.b.step()
    world.b.encode(job)
    world.b.look("abcd")
    assert world.b.tier_of("abcd") == REMOTE
    assert world.b.manager.keeper.get(job.context) is None
    assert world.b.load("abcd") == "a"


def test_what_finds_no_room_in_memory_goes_to_the_store() -> None:
    """Room for a few packets in memory, and for all in the store."""
    world = World(grains=4 * 9)
    texts = [letter * 4 for letter in "abcdefgh"]
    for text in texts:
        world.shared(text)
        world.a.manager.used(place_of(text), "ram", ())
        world.a.rest()
    tiers = [world.a.tier_of(text) for text in texts]
    assert tiers.count("ram") > 0
    assert tiers.count(REMOTE) > 2
    for text in texts:
        assert world.manifest(text) is not None
        assert world.a.load(text) == "a"
        world.a.rest()


def test_a_packet_that_would_not_be_written_here_is_not_read() -> None:
    world = World()
    world.shared("abcd")
    manifest = world.manifest("abcd")
    assert manifest is not None
    name = f"kara:model:{place_of('abcd').key}"
    for other in (manifest._replace(method="none/int2"), manifest._replace(nbytes=manifest.nbytes - 512)):
        world.store.values[name] = other.to_bytes(), 1e9
        world.b.look("abcd")
        assert world.b.tier_of("abcd") is None
    assert world.b.manager.counts["lookups", "unfit"] == 2


@pytest.mark.parametrize(
    ("qualities", "expected"),
    [({9: 0.99, 8: 0.98, 6: 0.95}, 9), ({8: 0.98, 6: 0.95}, 8), ({8: 0.8, 6: 0.95}, 6), ({8: 0.8, 6: 0.7}, None)],
)
def test_as_much_of_a_packet_is_read_as_would_be_stored_here(qualities: dict[int, float], expected: int | None) -> None:
    """Qualities by grains, as a profile of this server has them. What is below the floor of 0.9 is not read."""
    world = World()
    world.shared("abcdef")  # nine grains
    options = [Option("none/int8", 0.5, count * GRAIN, quality) for count, quality in qualities.items()]
    world.b.manager.catalogue.options = lambda *_: options  # type: ignore[method-assign]
    world.b.look("abcdef")
    copy = world.b.manager.keeper.get(place_of("abcdef").key)
    assert (copy and copy.option.nbytes) == (expected and expected * GRAIN)
    if expected is None:
        assert world.b.manager.counts["lookups", "unfit"] == 1
    else:
        assert world.b.load("abcdef") == "a"


@pytest.mark.parametrize("promoted", [False, True])
def test_a_damaged_packet_is_found_by_nobody_else(promoted: bool) -> None:
    world = World()
    world.shared("abcd")
    world.damage("abcd")
    world.b.look("abcd")
    if promoted:  # the damage is copied into memory
        for _ in range(9):
            world.b.manager.used(place_of("abcd"), REMOTE, ())
            world.b.rest()
        assert world.b.tier_of("abcd") == "ram"
    assert world.b.load("abcd") is None
    world.b.rest()
    assert world.b.tier_of("abcd") is None
    assert world.manifest("abcd") is None
    world.b.store("abcd")
    world.b.rest()
    assert world.b.load("abcd") == "b"
    c = Server("c", world.store, world.clock)
    c.look("abcd")
    assert c.load("abcd") == "b"


def test_a_context_that_was_offered_before_is_admitted_when_it_is_found() -> None:
    """The placement knows it, but nothing of it is stored."""
    world = World()
    world.shared("abcd")
    world.b.manager.offer("x", place_of("abcd"), range(4), ())
    (job,), _ = world.b.step()
    world.b.encode(job, ok=False)
    world.b.manager.rows.forget("x")
    world.b.rest()
    assert world.b.tier_of("abcd") is None
    world.b.look("abcd")
    assert world.b.tier_of("abcd") == REMOTE
    assert world.b.load("abcd") == "a"
    for _ in range(9):
        world.b.manager.used(place_of("abcd"), REMOTE, ())
        world.b.rest()
    assert world.b.tier_of("abcd") == "ram"  # and it knows where it lies


class Days(RuleBasedStateMachine):
    """Three servers with little memory, perhaps a disk, and one store, which fails, forgets and is slow in the middle
    of anything. What is loaded is always one server's packet of that context."""

    @initialize(grains=st.integers(20, 60), disk=st.sampled_from([0, 0, 20, 40]))
    def start(self, grains: int, disk: int) -> None:
        self.clock = Clock()
        self.store = FakeStore(self.clock)
        self.store.before = self.meanwhile
        self.servers = [Server(name, self.store, self.clock, grains, disk) for name in "abc"]
        self.loads: list[tuple[Server, Load]] = []
        self.meanwhiles: list[tuple[Server, float]] = []
        self.names = 0

    def meanwhile(self, command: str) -> None:
        """The scheduler's thread goes on while another one waits for the store."""
        if self.meanwhiles:
            server, seconds = self.meanwhiles.pop()
            self.clock.now += seconds
            self.step_of(server)

    def step_of(self, server: Server) -> None:
        stores, loads = server.step()
        for job in stores:
            server.encode(job)
        self.loads += [(server, job) for job in loads]

    @rule(data=st.data(), text=st.text("ab", min_size=2, max_size=6), asked=st.booleans())
    def request(self, data: st.DataObject, text: str, asked: bool) -> None:
        server = data.draw(st.sampled_from(self.servers))
        place, tokens, name = place_of(text), BLOCK * (len(text) + 1), f"r{self.names}"
        self.names += 1
        server.sharing.arrived(name, hashes(text + "?"), tokens, (), place if asked else None)
        if data.draw(st.booleans()):
            server.threads.run_all()
        if server.sharing.is_looking(name, 0):
            return  # it is aborted
        admission = server.manager.admissions.find(hashes(text + "?"), tokens, 0)
        if admission is None:
            server.manager.offer(name, place, range(len(text)), ())
            self.step_of(server)
            server.manager.rows.forget(name)
        elif not server.manager.transfers.is_loading(admission.packet):
            server.manager.load(name, admission, range(admission.place.tokens // BLOCK))
            server.manager.used(admission.place, admission.tier, ())
            server.sharing.used(admission.place.key)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.step_of(data.draw(st.sampled_from(self.servers)))

    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        server = data.draw(st.sampled_from(self.servers))
        if server.threads.waiting:
            server.threads.run(data.draw(st.integers(0, len(server.threads.waiting) - 1)))

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        server, job = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        writer = server.decode(job, "abc")
        assert (writer is not None) == bool(job.grains)  # what could not be read has none

    @rule(data=st.data(), seconds=st.sampled_from([0.0, 2.0]))
    def interrupt(self, data: st.DataObject, seconds: float) -> None:
        self.meanwhiles.append((data.draw(st.sampled_from(self.servers)), seconds))

    @rule(faults=st.lists(st.sampled_from([None, "slow", "gone", "refused"]), max_size=4))
    def fail(self, faults: list[str | None]) -> None:
        self.store.faults = faults

    @rule(seconds=st.sampled_from([0.5, 2.0, PAUSE + 1, TTL / 3]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """As a store does that has too little memory."""
        if self.store.values:
            names = list(self.store.values)  # as they came: they are random, and so would be their order
            del self.store.values[names[data.draw(st.integers(0, len(names) - 1))]]

    def teardown(self) -> None:
        if not hasattr(self, "servers"):
            return
        self.store.faults, self.meanwhiles = [], []
        for server in self.servers:
            for _ in range(60):
                self.clock.now += 1
                server.threads.run_all()
                self.step_of(server)
                for owner, job in self.loads:
                    owner.decode(job, "abc")
                self.loads.clear()
            assert not server.manager.transfers.busy
            assert not server.sharing.busy
            assert not server.tier._jobs
            assert server.tier._owed == 0
            assert server.manager.transfers.offers == 0
            assert server.manager.transfers._staged == 0
            assert not server.manager.counts["store_errors", "failed"]
            copies = server.manager.keeper.directory.copies()
            assert all(copy.readers == 0 for copy in copies)
            held = sum(len(server.manager.transfers._held[copy.number]) for copy in copies if copy.tier == "ram")
            assert server.manager.grains.count - server.manager.grains.free == held
            assert set(server.tier._copies) == {copy.number for copy in copies if copy.tier == REMOTE}


TestDays = Days.TestCase
TestDays.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
