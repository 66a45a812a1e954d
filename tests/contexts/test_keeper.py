"""Plans and what is stored: by hand, and in a state machine whose model carries out the transfers."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kara_kernels.contexts.directory import Copy, Transfer
from kara_kernels.contexts.keeper import Keeper
from kara_kernels.contexts.utility import Context, Option, Tier

RAM, DISK = Tier("ram", 10, 100.0), Tier("disk", 30, 10.0, 0.01)


def context(key: str, *sizes: int, prefill: float = 50.0) -> Context:
    """Options of one method, whose quality grows a little with their bytes."""
    return Context(key, tuple(Option("m", n / 10, n, 0.9 + n / 200) for n in sizes), prefill)


def keeper(*tiers: Tier, alpha: float = 10.0) -> Keeper:
    return Keeper(tiers or (RAM, DISK), alpha=alpha)


def carry_out(some: Keeper) -> None:
    """All transfers, without failures, until nothing is left to do."""
    for _ in range(100):
        started = some.work()
        some.erasable()
        if not started:
            return
        for transfer in started:
            some.finish(transfer)
    raise AssertionError("never at rest")


def test_a_new_context_is_encoded_from_its_rows() -> None:
    some = keeper()
    some.add(context("a", 8, 4))
    (transfer,) = some.work()
    assert transfer.source is None
    assert transfer.target is not None
    assert (transfer.target.tier, transfer.target.option.nbytes) == ("ram", 8)
    assert some.get("a") is None
    assert some.work() == []  # once
    assert some.finish(transfer)
    home = some.get("a")
    assert home is not None
    assert (home.tier, home.option) == some.placement.where("a") == ("ram", context("a", 8, 4).options[0])


def test_without_rows_nothing_is_encoded_and_the_plan_hears_of_it() -> None:
    some = keeper()
    some.add(context("a", 8, 4))
    some.forget_rows("a")
    assert some.work() == []
    assert some.placement.where("a") == (None, None)
    assert some.counts["given_up"] == 1
    some.use("a", 1.0, recomputed=True)
    assert len(some.work()) == 1


def test_a_failed_store_leaves_the_plan_without_it() -> None:
    some = keeper()
    some.add(context("a", 8))
    (transfer,) = some.work()
    assert not some.finish(transfer, ok=False)
    assert some.get("a") is None
    assert some.work() == []  # the rows are at hand, but what failed would fail again
    assert some.placement.where("a") == (None, None)


def test_what_arrives_after_its_plan_was_dropped_goes_at_once() -> None:
    some = keeper()
    some.add(context("a", 8))
    (transfer,) = some.work()
    some.change(Context("a", (), 50.0))  # no option is good enough any more
    assert some.work() == []
    assert some.finish(transfer)
    some.work()
    assert some.get("a") is None
    assert [copy.number for copy in some.erasable()] == [0]


def test_what_was_lost_is_forgotten_until_it_is_computed_again() -> None:
    some = keeper()
    some.add(context("a", 8))
    carry_out(some)
    some.forget_rows("a")
    some.lost("a")
    assert some.get("a") is None
    assert some.work() == []
    some.use("a", 1.0, recomputed=True)
    carry_out(some)
    assert some.get("a") is not None


@pytest.mark.parametrize("room", [10, 20])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("ok", [False, True])
def test_a_move_of_what_was_lost_says_nothing_about_what_replaces_it(room: int, begun: bool, ok: bool) -> None:
    """A request finds a packet damaged that is on its way up, and computes its rows again. The new packet may find no
    room before the move has ended."""
    some = keeper(Tier("ram", room, 100.0), DISK)
    for key, size in ("a", 8), ("b", room):
        some.add(context(key, size), hits=size)
        carry_out(some)
        some.forget_rows(key)
    some.remove("b")
    some.use("a", 1.0)
    (move,) = some.work()
    some.lost("a")
    some.use("a", 2.0, recomputed=True)
    stores = some.work() if begun else []
    assert len(stores) == (begun and room == 20)
    assert not some.finish(move, ok)
    stores += some.work()
    (store,) = stores
    assert some.finish(store)
    assert some.work() == []
    home = some.get("a")
    assert home is not None
    assert (home.tier, home.option) == some.placement.where("a")


def test_room_is_made_before_it_is_needed() -> None:
    some = keeper(Tier("ram", 10, 100.0))
    some.add(context("a", 10, 5), hits=1.0)
    carry_out(some)
    some.forget_rows("a")
    some.add(context("b", 10, 5), hits=1.0)
    carry_out(some)
    sizes = [home.option.nbytes for home in map(some.get, "ab") if home is not None]
    assert sizes == [5, 5]
    assert some.counts["cut"] == 1
    assert some.directory.used("ram") == 10


def test_a_packet_that_is_cut_while_it_is_written_is_cut_when_it_has_arrived() -> None:
    """It is told from one that was lost: its rows are gone, and nothing of it can be read yet."""
    some = keeper(Tier("ram", 10, 100.0))
    some.add(context("a", 10, 5))
    (first,) = some.work()
    some.forget_rows("a")
    some.add(context("b", 5))
    assert some.work() == []
    assert some.placement.where("a") == ("ram", context("a", 10, 5).options[1])
    some.finish(first)
    carry_out(some)
    assert [home and home.option.nbytes for home in map(some.get, "ab")] == [5, 5]
    assert some.counts["evict"] == some.counts["given_up"] == 0


def test_a_reserve_takes_what_is_new_while_room_is_made() -> None:
    """Full rows are soon gone, and to write another context to a disk takes a while."""
    some = keeper(Tier("ram", 15, 100.0, reserve=5), DISK)
    for key in "ab":
        some.add(context(key, 5))
        carry_out(some)
        some.forget_rows(key)
    some.add(context("c", 5), hits=2.0)
    began = {transfer.target.key: transfer.target.tier for transfer in some.work() if transfer.target is not None}
    assert sorted(began.values()) == ["disk", "ram"]
    assert began["c"] == "ram"


def waiting() -> tuple[Keeper, Transfer]:
    """A keeper that would cut "a" to make room for "b", and the load of "a" that it waits for."""
    some = keeper(Tier("ram", 10, 100.0))
    some.add(context("a", 10, 5))
    carry_out(some)
    load = some.load("a")
    some.add(context("b", 5))
    assert some.work() == []
    return some, load


def test_a_cut_waits_for_the_reader() -> None:
    some, load = waiting()
    some.finish(load)
    assert [transfer.target.key for transfer in some.work() if transfer.target is not None] == ["b"]


def test_room_that_comes_free_late_in_a_round_is_used() -> None:
    some, load = waiting()
    some._due = dict(reversed(some._due.items()))  # the store before the cut that it waits for
    some.finish(load)
    assert len(some.work()) == 1
    assert some.counts["given_up"] == 0


def test_full_tiers_without_a_reserve_give_up_an_exchange() -> None:
    some = keeper(Tier("ram", 5, 100.0), Tier("disk", 5, 1.0))
    for key, hits in (("a", 2.0), ("b", 1.0)):
        some.add(context(key, 5), hits=hits)
        carry_out(some)
        some.forget_rows(key)
    assert [home.tier for home in map(some.get, "ab") if home is not None] == ["ram", "disk"]
    for _ in range(9):
        some.use("b", 0.0)
    assert some.work() == []
    assert some.counts["given_up"] == 2
    assert some.placement.where("a")[0] == "ram"  # the plan knows that it did not happen


def test_a_reserve_lets_full_tiers_exchange() -> None:
    some = keeper(Tier("ram", 10, 100.0, reserve=5), Tier("disk", 5, 1.0))
    for key, hits in (("a", 2.0), ("b", 1.0)):
        some.add(context(key, 5), hits=hits)
        carry_out(some)
        some.forget_rows(key)
    for _ in range(9):
        some.use("b", 0.0)
    carry_out(some)
    homes = {key: home.tier for key in "ab" if (home := some.get(key)) is not None}
    assert homes == {"a": "disk", "b": "ram"}
    assert some.counts["given_up"] == 0


def test_removing_forgets_a_transfer_under_way() -> None:
    some = keeper()
    some.add(context("a", 8))
    (transfer,) = some.work()
    some.remove("a")
    some.remove("never known")
    assert not some.finish(transfer)
    assert some.work() == []
    assert "a" not in some
    assert some.directory.used("ram") == 0


def test_a_restart_takes_over_what_is_still_there(tmp_path: Path) -> None:
    some, known = keeper(), {key: context(key, 12) for key in "ab"}
    for one in known.values():
        some.add(one)
        carry_out(some)
    copies = {copy.key: copy for copy in some.directory.copies()}
    assert {copy.tier for copy in copies.values()} == {"disk"}
    some.save(tmp_path / "stored.json")
    again = keeper()
    found = {("disk", copies["a"].number): 12, ("disk", 99): 7}
    assert again.restore(tmp_path / "stored.json", found, lambda copy: known[copy.key]) == [("disk", 99)]
    assert again.placement.where("a") == ("disk", known["a"].options[0])
    assert "b" not in again
    assert again.work() == []


class Lives(RuleBasedStateMachine):
    """Contexts come, are used, read and go; transfers end in any order, and some fail."""

    @initialize(
        sizes=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 4)), min_size=1, max_size=3),
        rule_=st.sampled_from(["priced", "priced", "per_byte", "paper"]),
    )
    def start(self, sizes: list[tuple[int, int]], rule_: str) -> None:
        tiers = [Tier(f"t{t}", n, 10.0 / (t + 1), t / 10, min(n, r)) for t, (n, r) in enumerate(sizes)]
        self.capacity = {tier.name: tier.capacity for tier in tiers}
        self.keeper = Keeper(tiers, alpha=10.0, rule=rule_, half_life=5.0)
        self.contexts: dict[str, Context] = {}
        self.fresh: set[str] = set()
        self.running: list[Transfer] = []
        self.bytes: dict[int, tuple[str, str, Option]] = {}  # whole copies: number -> (key, tier, option)
        self.now = 0.0

    def some(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.contexts)))

    @rule(
        rows=st.lists(
            st.tuples(st.sampled_from("xy"), st.integers(1, 8), st.floats(0, 1)), max_size=4, unique_by=lambda r: r[:2]
        ),
        prefill=st.floats(0, 30), hits=st.floats(0, 5),
    )  # fmt: skip
    def add(self, rows: list[tuple[str, int, float]], prefill: float, hits: float) -> None:
        key = f"c{len(self.contexts)}-{self.now}-{self.keeper.placement._arrivals}"
        self.contexts[key] = Context(key, tuple(Option(m, 1.0, n, q) for m, n, q in rows), prefill)
        self.keeper.add(self.contexts[key], self.now, hits)
        self.fresh.add(key)

    @precondition(lambda self: self.contexts)
    @rule(data=st.data(), later=st.floats(0, 9), recomputed=st.booleans())
    def use(self, data: st.DataObject, later: float, recomputed: bool) -> None:
        key, self.now = self.some(data), self.now + later
        self.keeper.use(key, self.now, recomputed)
        self.fresh |= {key} if recomputed else set()

    @precondition(lambda self: self.fresh)
    @rule(data=st.data())
    def forget_rows(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.fresh)))
        self.keeper.forget_rows(key)
        self.fresh.discard(key)

    @precondition(lambda self: self.contexts)
    @rule(data=st.data(), lost=st.booleans())
    def remove(self, data: st.DataObject, lost: bool) -> None:
        key = self.some(data)
        if lost:
            return self.keeper.lost(key)
        self.keeper.remove(key)
        del self.contexts[key]
        self.fresh.discard(key)

    @precondition(lambda self: any(map(self.keeper.get, self.contexts)))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key in sorted(self.contexts) if self.keeper.get(key)]))
        self.running.append(self.keeper.load(key))

    @rule()
    def work(self) -> None:
        started = self.keeper.work()
        self.erase()
        for transfer in started:
            target = transfer.target
            assert target is not None
            assert target.option in self.contexts[target.key].options
            if transfer.source is None:
                assert target.key in self.fresh  # nothing is encoded from rows that are gone
            else:
                held = self.bytes[transfer.source.number]
                assert held[0] == target.key
                assert held[2].cuts_to(target.option)
            self.running.append(transfer)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def finish(self, data: st.DataObject, ok: bool) -> None:
        self.end(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))), ok)

    @precondition(lambda self: any(transfer.source is None for transfer in self.running))
    @rule(data=st.data())
    def put_off(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from([transfer for transfer in self.running if transfer.source is None]))
        self.running.remove(transfer)
        self.keeper.put_off(transfer)

    def end(self, transfer: Transfer, ok: bool) -> None:
        target = transfer.target
        if target is not None and ok:
            self.bytes[target.number] = (target.key, target.tier, target.option)
        self.keeper.finish(transfer, ok)

    def erase(self) -> None:
        for copy in self.keeper.erasable():
            self.bytes.pop(copy.number, None)

    @rule()
    def come_to_rest(self) -> None:
        """When all transfers succeed, what is stored becomes what is planned, in a few rounds."""
        for _ in range(60):
            self.work()
            if not self.running:
                break
            while self.running:
                self.end(self.running.pop(), True)
        else:
            raise AssertionError("never at rest")
        for key in self.contexts:
            home = self.keeper.get(key)
            tier, option = self.keeper.placement.where(key)
            assert (home is None) == (tier is None), key
            assert home is None or (home.tier == tier and option is not None and home.option.same_bytes(option))

    @invariant()
    def judge(self) -> None:
        if not hasattr(self, "keeper"):
            return
        for tier, capacity in self.capacity.items():
            assert self.keeper.directory.used(tier) <= capacity
        for copy in self.keeper.directory.copies():
            assert isinstance(copy, Copy)
            assert self.bytes[copy.number][:2] == (copy.key, copy.tier)
            assert self.bytes[copy.number][2].cuts_to(copy.option)
            assert copy.key in self.contexts


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
