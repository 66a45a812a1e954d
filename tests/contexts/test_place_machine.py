"""Placements in a state machine whose model carries out the moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kara_kernels.contexts.place import RULES, Placement
from kara_kernels.contexts.utility import Context, Option, Tier, utility

ALPHA = 10.0
OPTIONS = st.lists(
    st.tuples(st.sampled_from("xy"), st.integers(1, 8), st.floats(0, 1)), max_size=4, unique_by=lambda row: row[:2]
)


class Lives(RuleBasedStateMachine):
    """Contexts come, are used, change and go. The model carries out every move and judges it."""

    @initialize(
        capacities=st.lists(st.integers(0, 20), min_size=1, max_size=3),
        rule_=st.sampled_from(RULES[:1] * 2 + RULES[1:]),
    )
    def start(self, capacities: list[int], rule_: str) -> None:
        self.tiers = [Tier(f"t{t}", size, 10.0 / (t + 1), t / 10) for t, size in enumerate(capacities)]
        self.capacity = {tier.name: tier.capacity for tier in self.tiers}
        self.rule, self.now, self.names = rule_, 0.0, 0
        self.placement = Placement(self.tiers, alpha=ALPHA, rule=rule_, half_life=5.0)
        self.contexts: dict[str, Context] = {}
        self.at: dict[str, tuple[str, Option]] = {}
        self.fresh: set[str] = set()
        self.pins: Counter[str] = Counter()

    def key(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.contexts)))

    @rule(options=OPTIONS, prefill=st.floats(0, 30), floor=st.sampled_from([0.0, 0.5]), hits=st.floats(0, 5))
    def add(self, options: list[tuple[str, int, float]], prefill: float, floor: float, hits: float) -> None:
        key, self.names = f"c{self.names}", self.names + 1
        made = Context(key, tuple(Option(m, 1.0, size, q) for m, size, q in options), prefill, floor=floor)
        self.placement.add(made, self.now, hits)
        self.contexts[key] = made
        self.fresh.add(key)

    @precondition(lambda self: self.contexts)
    @rule(data=st.data(), later=st.floats(0, 9), recomputed=st.booleans())
    def use(self, data: st.DataObject, later: float, recomputed: bool) -> None:
        key = self.key(data)
        self.now += later
        self.placement.use(key, self.now, recomputed)
        if recomputed:
            self.fresh.add(key)

    @precondition(lambda self: self.contexts)
    @rule(data=st.data(), floor=st.floats(0, 1), worse=st.floats(0, 1))
    def change(self, data: st.DataObject, floor: float, worse: float) -> None:
        made = self.contexts[self.key(data)]
        options = tuple(replace(option, quality=option.quality * worse) for option in made.options)
        self.contexts[made.key] = replace(made, options=options, floor=floor)
        self.placement.change(self.contexts[made.key])

    @precondition(lambda self: self.contexts)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = self.key(data)
        self.placement.remove(key)
        del self.contexts[key]
        self.at.pop(key, None)
        self.fresh.discard(key)
        self.pins.pop(key, None)

    @precondition(lambda self: self.contexts)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = self.key(data)
        self.placement.pin(key)
        self.pins[key] += 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.pins)))
        self.placement.unpin(key)
        self.pins -= Counter([key])

    @rule(data=st.data(), capacity=st.integers(0, 20))
    def resize(self, data: st.DataObject, capacity: int) -> None:
        name = data.draw(st.sampled_from(self.tiers)).name
        self.placement.resize(name, capacity)
        self.capacity[name] = capacity

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A packet turns out to be lost."""
        key = data.draw(st.sampled_from(sorted(self.at)))
        self.placement.correct(key, None, None)
        del self.at[key]
        self.fresh.discard(key)

    @rule()
    def settle(self) -> None:
        before = dict(self.at)
        for move in self.placement.settle():
            tier, option = self.at.pop(move.key, (None, None))
            assert move.from_tier == tier
            assert (move.before is None) == (option is None)
            assert option is None or (move.before is not None and move.before.same_bytes(option))
            assert not (self.pins[move.key] and tier), "pinned"
            assert (move.to_tier, move.after) != (tier, option)
            if move.to_tier is not None:
                assert move.after in self.contexts[move.key].options
                assert move.after.quality >= self.contexts[move.key].floor
                assert move.key in self.fresh or (option is not None and option.cuts_to(move.after))
                self.at[move.key] = (move.to_tier, move.after)
        self.judge(before)
        self.fresh.clear()

    def judge(self, before: dict[str, tuple[str, Option]]) -> None:
        for tier in self.tiers:
            here = [key for key, (name, _) in self.at.items() if name == tier.name]
            used = sum(self.at[key][1].nbytes for key in here)
            assert used == self.placement.used(tier.name)
            assert used <= self.capacity[tier.name] or all(self.pins[key] for key in here)
        for key in self.contexts:
            where = self.placement.where(key)
            assert where == (None, None) if key not in self.at else where[0] == self.at[key][0]
            if self.rule == "priced" and key not in self.at and (key in self.fresh or key in before):
                self.nothing_better(key, before.get(key))

    def nothing_better(self, key: str, had: tuple[str, Option] | None) -> None:
        """No tier has room for a context that could have been stored, or recomputing is better."""
        made = self.contexts[key]
        for tier in self.tiers:
            room = self.capacity[tier.name] - self.placement.used(tier.name)
            for option in made.options:
                if option.quality >= made.floor and (key in self.fresh or (had and had[1].cuts_to(option))):
                    gain = utility(made, option, tier, alpha=ALPHA) - utility(made, None, None, alpha=ALPHA)
                    assert gain <= 1e-9 or option.nbytes > room or self.weightless(key)

    def weightless(self, key: str) -> bool:
        """A context without uses gains nothing anywhere."""
        return self.placement.hits(key, self.now) == 0


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
