"""`make contexts`: traces, queues, policies and comparisons against results by hand and independent oracles."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import curves
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import tables
from bench.contexts import __main__ as command
from bench.contexts import compare, fleet, report, scenario
from bench.contexts.policies import Arc, Cached, Impress, Lfu, Lru, Placed, Recompute
from bench.contexts.simulate import Run, Served, label, simulate, summary
from bench.contexts.trace import Trace, make_trace, zipf
from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext
from kara_kernels.contexts.utility import Context, Option, Tier

WHOLE = Option("whole", 1.0, 100, 1.0, 2.0)
HALF = Option("whole", 0.5, 50, 0.9, 1.0)
FAST, SLOW = Tier("fast", 200, 50.0, 1.0), Tier("slow", 200, 10.0, 2.0)


def context(key: str, *options: Option, prefill: float = 10.0) -> Context:
    return Context(key, options or (WHOLE, HALF), prefill, 1.0)


class Fixed:
    """Each context where it is said to be, and what was stored when."""

    def __init__(self, places: dict[str, tuple[int, Option]]) -> None:
        self.places, self.moved, self.seen = places, 0, list[tuple[str, float]]()

    def lookup(self, context: Context, now: float) -> tuple[int, Option] | None:
        return self.places.get(context.key)

    def stored(self, context: Context, now: float) -> None:
        self.seen.append((context.key, now))

    def settle(self) -> None: ...

    def used(self) -> list[int]:
        return [0, 0]


def serve(policy: Any, times: list[float], keys: str, every: int = 8) -> Run:
    contexts = {number: context(key) for number, key in enumerate(keys)}
    return simulate((FAST, SLOW), contexts, Trace(times, list(range(len(keys)))), policy, every)


# ------------------------------------------------------------------------------------------------------- queues


def test_requests_wait_for_the_link_and_for_the_gpu() -> None:
    at_fast = (0, WHOLE)  # 100 B / 50 B/s + 1 s = 3 s on the link, 2 s + 1 s on the GPU
    run = serve(Fixed({"a": at_fast, "b": at_fast}), [0.0, 1.0], "ab")
    assert [one.ttft for one in run.served] == [6.0, 8.0]  # b: link 3..6, GPU 6..9
    run = serve(Fixed({"a": at_fast, "b": (1, HALF)}), [0.0, 1.0], "ab")
    assert [one.ttft for one in run.served] == [6.0, 9.0]  # another link: 1..8, GPU 8..10
    run = serve(Fixed({"a": (1, WHOLE), "b": (1, WHOLE)}), [0.0, 1.0], "ab")
    assert [one.ttft for one in run.served] == [15.0, 26.0]  # 12 s on the link each: b from 12 to 24
    run = serve(Fixed({"a": at_fast, "b": at_fast}), [0.0, 20.0], "ab")
    assert [one.ttft for one in run.served] == [6.0, 6.0]


def test_recomputing_keeps_the_gpu_from_what_was_loaded() -> None:
    policy = Fixed({"b": (0, WHOLE)})
    run = serve(policy, [0.0, 1.0], "ab")
    assert [(one.ttft, one.tier, one.option) for one in run.served] == [(11.0, 2, None), (13.0, 0, WHOLE)]
    assert policy.seen == [("a", 11.0)]  # b: loaded at 4, GPU free at 11, done at 14


def test_the_gpu_takes_first_what_is_ready_first() -> None:
    # a loads until 3; b, which came later, begins at 2 to be recomputed, and a waits for it until 13.
    run = serve(Fixed({"a": (0, WHOLE)}), [0.0, 2.0], "ab")
    assert [one.ttft for one in run.served] == [16.0, 11.0]


def test_a_context_is_stored_when_it_was_computed_and_not_before() -> None:
    contexts = [context("a")]
    policy = Cached((FAST, SLOW), compare.option_at("whole", 1.0))
    run = simulate((FAST, SLOW), contexts, Trace([0.0, 5.0, 22.5], [0, 0, 0]), policy)
    assert [one.option for one in run.served] == [None, None, WHOLE]  # the second is computed from 11 to 22


def test_what_a_summary_says() -> None:
    run = Run(
        [Served(0, 9.0, 2, None), Served(1, 1.0, 0, WHOLE), Served(2, 3.0, 1, HALF), Served(3, 8.0, 2, None)],
        [[0, 0], [100, 0], [200, 50], [200, 150]], 400,
    )  # fmt: skip
    found = summary(run, (FAST, SLOW), 1)
    assert found["quality"] == pytest.approx((1 + 0.9 + 1) / 3)
    assert (found["ttft"], found["median"], found["p99"]) == (4.0, 3.0, 8.0)
    assert found["share"] == {name: pytest.approx(1 / 3) for name in ("fast", "slow", "recomputed")}
    assert (found["hit_bytes"], found["moved"]) == (75.0, 100.0)
    assert found["used"] == {"fast": pytest.approx(500 / 3), "slow": pytest.approx(200 / 3)}
    assert found["chosen"] == {"whole 100%": 0.5, "whole 50%": 0.5} == dict.fromkeys(map(label, (WHOLE, HALF)), 0.5)


# ------------------------------------------------------------------------------------------------------- trace


def test_arrivals_and_popularity_have_their_moments() -> None:
    trace = make_trace(50, 40_000, rate=4.0, seed=1, drift=0)
    gaps = np.diff([0.0, *trace.times])
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)  # standard error: 0.7 %
    assert gaps.std() / gaps.mean() == pytest.approx(math.sqrt(2), rel=0.04)
    counts = np.sort(np.bincount(trace.contexts, minlength=50))[::-1] / 40_000
    assert counts[0] == pytest.approx(1 / sum(rank**-0.9 for rank in range(1, 51)), rel=0.05)
    assert counts[:2].sum() == pytest.approx(zipf(50)[:2].sum(), rel=0.05)
    assert (
        trace == make_trace(50, 40_000, rate=4.0, seed=1, drift=0) != make_trace(50, 40_000, rate=4.0, seed=2, drift=0)
    )


def test_the_least_popular_becomes_the_most_popular() -> None:
    trace = make_trace(5, 100, rate=1.0, seed=3, drift=20, exponent=60.0)  # practically only the first rank
    hot = trace.contexts[::20]
    assert trace.contexts == [one for one in hot for _ in range(20)]
    assert sorted(hot) == list(range(5))
    steady = make_trace(5, 4000, rate=1.0, seed=3, drift=0)
    ranks = sorted(range(5), key=lambda one: -steady.contexts.count(one))
    assert hot == [ranks[0], *ranks[:0:-1]]


# ------------------------------------------------------------------------------------------------------- policies


def fill(queue: Any, keys: str, nbytes: int = 1) -> list[str]:
    return [fallen for key in keys for fallen, _ in queue.use(key, nbytes, 1.0)]


def test_lru_lets_the_oldest_fall() -> None:
    queue = Lru(3)
    assert fill(queue, "abcab") == []
    assert fill(queue, "d") == ["c"]
    assert queue.use("e", 2, 1.0) == [("a", 1), ("b", 1)]
    assert queue.use("f", 4, 1.0) == [("f", 4)]
    assert (set(queue.rows), queue.used) == ({"d", "e"}, 3)


def test_lfu_lets_the_least_used_fall_even_the_new_one() -> None:
    queue = Lfu(2)
    for key, weight in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        assert queue.use(key, 1, weight) == []
    assert queue.use("c", 1, 1.0) == [("c", 1)]
    assert queue.use("c", 1, 2.5) == [("b", 1)]


def test_arc_learns_from_ghosts() -> None:
    queue = Arc(2)
    assert fill(queue, "abac") == ["b"]  # a was used twice; b and c once, for which the target is 0
    assert (queue.target, "b" in queue.once_ghosts) == (0.0, True)
    assert fill(queue, "b") == ["a"]  # the ghost hit says that once was too small
    assert (queue.target, set(queue.once.rows), set(queue.often.rows)) == (1.0, {"c"}, {"b"})
    assert fill(queue, "a") == ["c"]  # and a ghost of those used often takes it back
    assert (queue.target, list(queue.often.rows)) == (0.0, ["b", "a"])


def test_a_scan_leaves_arc_what_is_used_often() -> None:
    arc, lru = Arc(3), Lru(3)
    assert fill(arc, "aabb" + "cdefghij") == list("cdefghi")
    assert fill(lru, "aabb" + "cdefghij") == list("abcdefg")
    assert ("a" in arc, "b" in arc, "a" in lru) == (True, True, False)


@given(st.lists(st.integers(0, 7), max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_lru_over_tiers_is_one_order_of_uses(uses: list[int], fast: int, slow: int) -> None:
    tiers = (Tier("fast", fast * 100, 1.0), Tier("slow", slow * 100, 1.0))
    policy, order = Cached(tiers, compare.option_at("whole", 1.0)), list[int]()
    for now, number in enumerate(uses):
        depth = order.index(number) if number in order else 99  # contexts used since
        found = policy.lookup(context(str(number)), now)
        assert found == ((0, WHOLE) if depth < fast else (1, WHOLE) if depth < fast + slow else None)
        if found is None:
            policy.stored(context(str(number)), now)
        order = [number, *(other for other in order if other != number)]


def test_bytes_that_caches_move() -> None:
    policy = Cached((FAST, SLOW), compare.option_at("whole", 1.0))  # two contexts each
    for now, key in enumerate("abc"):
        policy.stored(context(key), now)
    assert (policy.moved, policy.used()) == (400, [200, 100])  # three stored, a moved down
    assert policy.lookup(context("c"), 3) == (0, WHOLE)
    assert policy.moved == 400
    assert policy.lookup(context("a"), 4) == (1, WHOLE)  # and up again, while b moves down
    assert (policy.moved, policy.used()) == (600, [200, 100])


def test_what_loads_slowly_can_be_recomputed() -> None:
    tiers = (Tier("fast", 100, 50.0), Tier("slow", 100, 9.0))  # 100 B / 9 B/s + 2 s is more than 10 s
    for faster, expected in ((False, (1, WHOLE)), (True, None)):
        policy = Cached(tiers, compare.option_at("whole", 1.0), if_faster=faster)
        policy.stored(context("a"), 0.0)
        policy.stored(context("b"), 1.0)
        assert policy.lookup(context("a"), 2.0) == expected
        assert policy.lookup(context("b" if faster else "a"), 3.0) == (0, WHOLE)


def test_impress_loads_halves_and_keeps_whole_contexts() -> None:
    policy = Impress((Tier("fast", 50, 1.0), SLOW), compare.option_at("whole", 1.0), compare.option_at("whole", 0.5))
    assert policy.lookup(context("a"), 0.0) is None
    policy.stored(context("a"), 0.0)
    policy.stored(context("b"), 1.0)
    assert (policy.used(), policy.moved) == ([50, 200], 300)
    assert [policy.lookup(context(key), 2.0) for key in "baa"] == [(0, HALF), (1, HALF), (0, HALF)]


def test_placements_move_and_promote() -> None:
    tiers = (Tier("fast", 120, 50.0), Tier("slow", 1000, 10.0))
    for promoting in (False, True):
        policy = Placed(tiers, alpha=1e3, rule="paper", half_life=1e3, promoting=promoting)
        for now, key in enumerate("ab"):
            policy.stored(context(key, WHOLE, prefill=30.0), now)
        assert {policy.placement.where(key) for key in "ab"} == {("fast", WHOLE), ("slow", WHOLE)}
        low = next(key for key in "ab" if policy.placement.where(key)[0] == "slow")
        assert policy.moved == 300  # two stored, one moved down
        for now in range(3, 9):
            policy.lookup(context(low, WHOLE, prefill=30.0), now)
            policy.settle()
        assert policy.placement.where(low)[0] == ("fast" if promoting else "slow")


def test_a_packet_that_is_cut_where_it_lies_writes_nothing() -> None:
    policy = Placed((Tier("fast", 150, 50.0),), alpha=100.0, rule="paper", half_life=10.0)
    for now, key in enumerate("ab"):
        policy.stored(context(key, prefill=30.0), now)
        policy.settle()
    assert [policy.placement.where(key)[1] for key in "ab"] == [HALF, WHOLE]
    assert policy.moved == 200


def test_what_is_promoted_is_a_cut_of_what_was_stored() -> None:
    tiers = (Tier("fast", 60, 50.0), Tier("slow", 1000, 10.0))
    other = Option("other", 0.6, 60, 0.99, 0.0)
    policy = Placed(tiers, alpha=1e3, rule="paper", half_life=1e3, promoting=True)
    one = context("a", WHOLE, HALF, other, prefill=60.0)
    policy.placement.add(one, 0.0, stored=("slow", WHOLE))
    assert policy.lookup(one, 1.0) == (1, WHOLE)
    assert policy.placement.where("a") in {("fast", HALF), ("slow", WHOLE)}  # other cannot be cut from it
    policy.stored(one, 2.0)  # recomputed, so that other can be had again
    policy.settle()
    assert policy.placement.where("a")[1] in (other, WHOLE)


SMALL = curves.profile(4)


def small(number: int) -> scenario.Scenario:
    """Of one of the models, with room for a few contexts only."""
    found = scenario.on_h100(scenario.MODELS[number % 2], SMALL, "likelihood", 8, number)
    tiers = (replace(found.tiers[0], capacity=2 * 10**9), replace(found.tiers[1], capacity=4 * 10**9))
    return replace(found, tiers=tiers)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_every_request_is_served_once_within_capacity(seed: int, every: int) -> None:
    world = small(seed)
    trace = make_trace(8, 60, rate=world.rate, seed=seed, drift=10)
    for entry in compare.entries(world, (1.6,)):
        run = simulate(world.tiers, world.contexts, trace, entry.make(world.tiers), every)
        assert [one.request for one in run.served] == list(range(60)), entry
        for one in run.served:
            asked = world.contexts[trace.contexts[one.request]]
            assert one.option in (None, *asked.options)
            least = asked.prefill_seconds if one.option is None else one.option.decode_seconds
            least += 0 if one.option is None else one.option.nbytes / world.tiers[one.tier].bandwidth
            assert one.ttft >= least + asked.question_seconds - 1e-9
        if entry.policy == compare.UNLIMITED:
            assert {one.tier for one in run.served if one.option is not None} == {0}
            continue
        held = [tier.capacity for tier in world.tiers]
        assert all(used <= room for row in run.used for used, room in zip(row, held, strict=True)), entry
        if entry.policy == "prefill":
            assert run.moved == 0 == sum(map(sum, run.used))


def test_runs_are_determined_by_the_seed() -> None:
    size = command.QUICK
    world = command.scenarios(SMALL, "likelihood", size, 0)[2]
    first = command.serve(world, 0, size, compare.OURS)
    assert first == command.serve(command.scenarios(SMALL, "likelihood", size, 0)[2], 0, size, compare.OURS)
    assert first != command.serve(world, 1, size, compare.OURS)


# ------------------------------------------------------------------------------------------------------- scenarios


def test_costs_of_a_model_by_hand() -> None:
    llama = scenario.MODELS[0]
    assert llama.prefill_seconds(10_000) == pytest.approx((1.606e14 + 2.62144e13) / 4.945e14)
    assert llama.question_seconds(10_000) == pytest.approx((1.606e10 + 1.31072e9) / 3.35e12)
    one = scenario.modelled(llama, SMALL.contexts["context 1"], "likelihood", "k", 4096)
    assert one.options[-1] == Option("whole", 1.0, 4096 * 131_072, 1.0, 4096 * 131_072 / 5e11)
    measured = SMALL.contexts["context 1"].measured[0]
    assert one.options[0].nbytes == round(0.07 * 4096 * 131_072)
    assert one.options[0].quality == pytest.approx(math.exp(-measured.kl))


def test_here_costs_are_the_profile_s() -> None:
    world = scenario.here(SMALL, "likelihood", 6)
    whole = curves.TOKENS * curves.TOKEN_BYTES
    assert [tier.capacity for tier in world.tiers] == [int(0.11 * 6 * whole), int(1.1 * 6 * whole)]
    assert [tier.bandwidth for tier in world.tiers] == [5e9, 2e8]
    assert world.contexts[5].options[-1] == Option("whole", 1.0, whole, 1.0, 0.02)
    assert world.contexts[5].options[:-1] == world.contexts[1].options[:-1]
    assert world.rate == pytest.approx(0.5 / 1.6)  # half of the time


def test_an_option_is_chosen_by_its_ratio() -> None:
    one = context("a", WHOLE, HALF, Option("other", 0.45, 45, 0.5))
    assert compare.option_at("whole", 0.45)(one) == HALF


# ------------------------------------------------------------------------------------------------------- comparing


def row(policy: str, quality: float, ttft: float, **fields: Any) -> dict[str, Any]:
    return {"table": "run", "scenario": "s", "seed": 0, "policy": policy, "quality": quality, "ttft": ttft,
            "hit_bytes": 10.0, **fields}  # fmt: skip


def test_comparison_at_equal_quality() -> None:
    slow = row(compare.FIXED, 0.999, 8.0, setting="knorm/exact 100%")
    fast = row(compare.FIXED + compare.IF_FASTER, 0.95, 3.0, setting="knorm/exact 50%")
    own = row(compare.FIXED, 0.99, 2.5, setting="compactor/int8 25%")
    runs = [row(compare.OURS, 0.97, 1.0, hit_bytes=5.0), row(compare.OURS, 0.991, 2.0), slow, fast, own]
    runs.append(row(compare.UNLIMITED, 0.992, 0.5))
    assert compare.cheapest(runs[:2], 0.97) == runs[0]
    assert compare.cheapest(runs[:2], 0.98) == runs[1]
    assert compare.cheapest(runs[:2], 0.995) is None
    assert compare.of(runs, compare.FIXED) == runs[2:5]
    assert compare.their_fixed(runs) == runs[2:4]
    assert compare.frontier([*runs[:5], row("x", 0.98, 9.0)]) == [slow, runs[1], runs[0]]
    assert report.ratios(runs, compare.their_fixed, 0.97) == (8.0, 16.0, 0.5)
    assert report.ratios(runs, compare.their_fixed, 0.95) == (3.0, 6.0, 0.5)
    assert report.ratios(runs, lambda rows: compare.of(rows, compare.FIXED), 0.97) == (2.5, 5.0, 0.5)
    assert report.ratios(runs, compare.their_fixed, 0.995) is None
    assert report.ratios(runs, lambda rows: compare.of(rows, "LRU"), 0.9) is None


def test_what_the_contexts_of_a_profile_may_lose() -> None:
    def measured(kl: float, ratio: float, rows: int) -> Measured:
        return Measured("a/int8", 4, ratio, 100, 0.0, rows, kl, agreement=1 - kl / 3)

    contexts = {
        key: ProfiledContext(key, key, 200, 1.0, 0.1, (), (measured(*values),))
        for key, *values in (("x", 0.02, 0.1, 100), ("y", 0.04, 0.3, 100), ("z", 0.2, 0.2, 50))
    }
    (found,) = command.losses(Profile("p", {}, (), contexts), "likelihood")
    numbers = [found.pop(name) for name in ("ratio", "rows", "kl")]
    assert numbers == pytest.approx([0.2, 250 / 600, 0.26 / 3])
    assert found == {"table": "loss", "method": "a/int8", "sections": 4, "contexts": 3,
                     "kept": [0, 0, 1, 2, 2]}  # fmt: skip
    (found,) = command.losses(Profile("p", {}, (), contexts), "agreement")
    assert found["kept"] == [0, 1, 2, 2, 3]
    assert "| a/int8 | 0.200 | 42% | 0.08667 | 0 | 1 | 2 | 2 | 3 |" in report._losses([found])


def test_missed_goals_are_told() -> None:
    world = {"scenario": "s", "seed": 0}
    runs = [row(compare.OURS, 0.97, 1.0), row(compare.PAPER, 0.98, 1.7), row("LRU", 1.0, 1.6)]
    runs.append(row(compare.UNLIMITED, 1.0, 0.8))
    assert report.missed(runs, [world]) == [
        f"paper, s, seed 0, quality {level}: {told}" for level in (0.97, 0.95, 0.9)
        for told in ("1.70x, at least 1.8x; 2.12x if RAM held everything", "bytes 1.00, at most 0.33")
    ]  # fmt: skip
    page = report._goals(runs, [world])
    assert page.count("**1.70x** of 2.12x, **1.00**") == 3
    assert "| s | 0 | 1.60x |" in page


# ------------------------------------------------------------------------------------------------------- the fleet


def test_how_long_a_shared_tier_keeps_contexts() -> None:
    rates = np.full(100, 0.5)
    assert fleet.characteristic_time(rates, 40) == pytest.approx(-math.log(0.6) / 0.5)
    assert fleet.characteristic_time(rates, 100) == math.inf
    mixed = np.array([1.0, 0.1, 0.01])
    kept = fleet.characteristic_time(mixed, 1.5)
    assert sum(1 - math.exp(-rate * kept) for rate in mixed) == pytest.approx(1.5)


@pytest.mark.parametrize("policy", command.FLEET)
def test_an_engine_of_a_fleet(policy: str) -> None:
    found = {
        capacity: fleet.engine(replace(command.QUICK.fleet, capacity=capacity), SMALL, "likelihood", policy, 0)
        for capacity in (1e3, 1e11, 1e18)
    }
    for one in found.values():
        assert sum(one["share"].values()) == pytest.approx(1.0)
        assert one["placing"] > 0
    assert found[1e3]["share"]["remote"] == 0 == found[1e3]["read"]
    assert found[1e18]["share"]["recomputed"] == 0 == found[1e18]["written"]
    assert found[1e3]["share"]["recomputed"] > found[1e11]["share"]["recomputed"] > 0
    assert found[1e11]["share"]["remote"] > 0 < found[1e11]["share"]["RAM"]


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    SMALL.save(tmp_path / "profile.json")
    assert command.main(["--quick", "--profile", str(tmp_path / "profile.json"), "--out", str(tmp_path)]) == 0
    head, rows = tables.read(tmp_path / "contexts.csv")
    assert {one["table"] for one in rows} == {"loss", "scenario", "run", "fleet"}
    assert (tmp_path / "contexts.md").read_text() == report.page(head, rows)
    assert (tmp_path / "contexts.png").stat().st_size > 10_000
    runs = [one for one in rows if one["table"] == "run"]
    assert {one["policy"] for one in runs} >= {
        "prefill",
        *report.CACHES,
        "IMPRESS-like",
        *compare.PLACEMENTS,
        compare.UNLIMITED,
    }
    assert len({one["scenario"] for one in runs}) == 4
    assert capsys.readouterr().err.count("missed: ") == len(
        report.missed(runs, [one for one in rows if one["table"] == "scenario"])
    )


def test_a_profile_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--profile", str(tmp_path / "none.json")])
    assert "--profile: " in capsys.readouterr().err


def test_the_committed_page_is_that_of_its_table() -> None:
    path = command.RESULTS / "contexts.csv"
    if not path.is_file():
        pytest.skip("no table is committed: make contexts")
    head, rows = tables.read(path)
    assert (command.RESULTS / "contexts.md").read_text() == report.page(head, rows)


def test_recomputing_stores_nothing() -> None:
    policy = Recompute((FAST, SLOW))
    policy.stored(context("a"), 0.0)
    assert (policy.lookup(context("a"), 1.0), policy.used()) == (None, [0, 0])
