"""What a selection loses, against plain Python, and the guard that acts on it."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from shim import Decoding, small

from kara_kernels.engine import Held, Ledger, Policy, lost_share, needed_tokens

SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(2, 6))


def lost_of(scores: list[float], kept: list[int]) -> Fraction:
    """Of one head, exactly. Scores are whole numbers."""
    positive = [Fraction(max(0.0, score)) for score in scores]
    dropped = sum(score for place, score in enumerate(positive) if place not in kept)
    return dropped / sum(positive) if sum(positive) else Fraction(0)


def mean(parts: list[Fraction]) -> Fraction:
    return sum(parts, Fraction(0)) / len(parts)


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_the_share_that_dropped_tokens_had(shape: tuple[int, ...], data: st.DataObject) -> None:
    seed, keep = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(1, shape[-1]))
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 9, shape, generator=draw).float()
    kept = torch.rand(shape, generator=draw).argsort(-1)[..., :keep].sort(-1).values.int()
    lost = lost_share(scores, kept)
    assert lost.dtype == torch.float32
    for s in range(shape[1]):
        lists = zip(scores[:, s].flatten(0, 1).tolist(), kept[:, s].flatten(0, 1).tolist(), strict=True)
        assert lost[s].item() == pytest.approx(float(mean([lost_of(*both) for both in lists])), abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), percent=st.integers(0, 100))
def test_the_fewest_tokens_that_lose_no_more(shape: tuple[int, ...], seed: int, percent: int) -> None:
    scores = torch.randint(-2, 9, shape, generator=torch.Generator().manual_seed(seed)).float()
    needed = needed_tokens(scores, percent / 100)
    assert needed.dtype == torch.int32

    def lost_by_best(s: int, count: int) -> Fraction:
        heads = scores[:, s].flatten(0, 1).tolist()
        return mean([lost_of(sorted(head, reverse=True), list(range(count))) for head in heads])

    for s, count in enumerate(needed.tolist()):
        limit, rounding = Fraction(percent, 100), Fraction(1, 10**6)
        assert lost_by_best(s, count) <= limit + rounding
        assert count == 1 or lost_by_best(s, count - 1) > limit - rounding


def test_a_skipped_sequence_and_one_without_scores_lose_nothing() -> None:
    scores = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]], [[-1.0, 0.0]]]])
    kept = torch.tensor([[[[-1]], [[0]], [[1]]]], dtype=torch.int32)
    assert lost_share(scores, kept).tolist() == [0.0, 0.0, 0.0]
    assert needed_tokens(scores, 0.0).tolist() == [2, 1, 1]


def guarded(**settings: int) -> Policy:
    return small(window=12, keep=6, tail=2, max_loss=0.2, **settings)


@pytest.mark.parametrize(
    ("settings", "needed", "kept"),
    [
        ({}, 7, 7),
        ({}, 9, 9),
        ({}, 1, 3),  # half of keep
        ({"min_keep": 2}, 1, 2),
        ({"max_keep": 6}, 6, 6),
    ],
)
def test_the_guard_sets_keep_of_the_next_window(settings: dict[str, int], needed: int, kept: int) -> None:
    ledger = Ledger(guarded(**settings), 1)
    sequence, other = Decoding(ledger, "a"), Decoding(ledger, "b")
    assert sequence.until_planned().keep == other.until_planned().keep == 6
    ledger.observe("a", needed)
    ledger.observe("nobody", 1)
    assert sequence.until_planned().keep == kept
    assert other.until_planned().keep == 6
    assert sequence.until_planned().keep == kept  # until it is told otherwise
    assert ledger.dropped("a") == 6 + 2 * (12 - kept)


def test_who_needs_more_than_may_be_kept_is_no_longer_compressed() -> None:
    ledger = Ledger(guarded(), 1)
    sequence = Decoding(ledger)
    sequence.until_planned()
    ledger.observe("a", 10)
    ledger.observe("a", 10)
    assert not any(sequence.step() for _ in range(60))
    assert not ledger.is_due("a", sequence.logical)
    assert not ledger.relieve([sequence.held()], 1)
    assert ledger.skipped["loss"] == 1
    assert ledger.dropped("a") == 6
    ledger.forget("a")
    again = Decoding(ledger)  # after a preemption
    assert again.until_planned().keep == 6


def test_without_a_limit_or_with_settings_of_ones_own_nobody_is_guarded() -> None:
    for ledger, own in ((Ledger(small(window=12, keep=6), 1), {}), (Ledger(guarded(), 1), {"keep": 5})):
        sequence = Decoding(ledger, **own)
        before = sequence.until_planned().keep
        ledger.observe("a", 12)
        assert sequence.until_planned().keep == before


def test_pressure_does_not_overrule_the_guard() -> None:
    ledger = Ledger(guarded(pressure_keep=1), 1)
    sequence = Decoding(ledger, decoded=12)
    [plan] = ledger.relieve([sequence.held()], 100)
    assert plan.keep == 6


def test_a_peak_allows_for_the_most_that_is_kept() -> None:
    assert Ledger(guarded(), 1).peak(5, 200) - Ledger(small(window=12, keep=6, tail=2), 1).peak(5, 200) == 3 * 16


def test_a_shadow_plans_like_a_real_one_and_drops_nothing() -> None:
    """Without survivors between them, windows lie one behind the other. They hold the same tokens."""
    real, shadow = (Ledger(small(), 4, shadow=shadow) for shadow in (False, True))
    a, b = Decoding(real), Decoding(shadow)
    for event in range(5):
        plan, like = a.until_planned(), b.until_planned()
        assert like.logical_len == plan.logical_len
        assert like.window_start == plan.window_start + 4 * event
        assert (like.window, like.keep, like.last_query, like.num_queries) == (
            plan.window, plan.keep, plan.last_query, plan.num_queries,
        )  # fmt: skip
        assert shadow.dropped("a") == 0
        assert shadow.windows("a") == event + 1
    assert shadow.relieve([b.held()], 3) == []
    assert shadow.peak(5, 100) == 100
    assert shadow.chunk("a", 5, 10) > 1000


def test_settings_change_while_sequences_run() -> None:
    ledger = Ledger(small(), 1)
    usual, own = Decoding(ledger, "a"), Decoding(ledger, "b", keep=2)
    assert [x.until_planned().keep for x in (usual, own)] == [4, 2]
    ledger.update(small(keep=7, max_sequences=1))
    assert [x.until_planned().keep for x in (usual, own)] == [7, 2]
    assert Decoding(ledger, "c").until_planned().keep == 7
    held = [Held(x.name, x.logical + 40, range(200), 0) for x in (usual, own)]
    assert len(ledger.plan(held)) == 1


def test_new_settings_begin_without_what_the_guard_found_under_the_old_ones() -> None:
    ledger = Ledger(guarded(), 1)
    higher, stopped = Decoding(ledger, "a"), Decoding(ledger, "b")
    for sequence, needed in ((higher, 9), (stopped, 10)):
        sequence.until_planned()
        ledger.observe(sequence.name, needed)
    ledger.update(guarded(max_keep=7))
    assert [sequence.until_planned().keep for sequence in (higher, stopped)] == [6, 6]


@pytest.mark.parametrize("policy", [small(window=16), Policy(window=8, keep=7, tail=4, min_freed_blocks=2)])
def test_settings_that_cannot_be_while_it_runs_are_refused(policy: Policy) -> None:
    ledger = Ledger(small(), 4)
    with pytest.raises(ValueError, match=r"query_rows|min_freed_blocks"):
        ledger.update(policy)
    assert ledger.policy == small()
