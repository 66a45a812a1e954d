"""The oracle itself, on cases small enough to compute by hand. Comments give the reasoning."""

from __future__ import annotations

import math

import oracle
import pytest

LN3 = math.log(3)
INF, NAN = math.inf, math.nan


def test_scores_are_the_mean_attention_received() -> None:
    # Query ln 3 sees logits (ln 3, 0): weights 3 and 1, attention (3/4, 1/4). Query 0 sees (1/2, 1/2).
    # Mean: (5/8, 3/8).
    assert oracle.score_window([[[LN3]], [[0.0]]], [[1.0], [0.0]]) == pytest.approx([5 / 8, 3 / 8])
    # The same two vectors as two query heads of one query.
    assert oracle.score_window([[[LN3], [0.0]]], [[1.0], [0.0]]) == pytest.approx([5 / 8, 3 / 8])


def test_scale_defaults_to_the_inverse_root_of_the_dimension() -> None:
    # D = 4, so the logit is 2 ln 3 / 2 = ln 3 for the first key.
    query, keys = [[[2 * LN3, 0, 0, 0]]], [[1, 5, 5, 5], [0, 7, 7, 7]]
    assert oracle.score_window(query, keys) == pytest.approx([3 / 4, 1 / 4])
    # scale 1/4 halves it again: weights sqrt(3) and 1.
    root = math.sqrt(3)
    assert oracle.score_window(query, keys, scale=0.25) == pytest.approx([root / (root + 1), 1 / (root + 1)])


def test_k_scale_multiplies_the_keys() -> None:
    assert oracle.score_window([[[LN3]]], [[2.0], [0.0]], k_scale=0.5) == pytest.approx([3 / 4, 1 / 4])


def test_causal_queries_see_the_keys_up_to_themselves() -> None:
    # N = W = 2: query 0 sees key 0 alone, (1, 0); query 1 sees both, (3/4, 1/4).
    query, keys = [[[LN3]], [[LN3]]], [[1.0], [0.0]]
    assert oracle.score_window(query, keys, causal=True) == pytest.approx([7 / 8, 1 / 8])
    # N = 1 < W = 2: the only query is the window's last token and sees everything.
    assert oracle.score_window(query[:1], keys, causal=True) == pytest.approx([3 / 4, 1 / 4])


def test_redundancy_costs_keys_that_resemble_the_others() -> None:
    # Two parallel keys and one orthogonal to them: r = (1+1+0)/3, the same, (0+0+1)/3.
    keys = [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]
    assert oracle.mean_cosines(keys) == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    # A zero query gives 1/3 each; softmax(r) has weights e^(1/3), e^(1/3), 1.
    weight = math.exp(1 / 3)
    alike = [weight / (2 * weight + 1), weight / (2 * weight + 1), 1 / (2 * weight + 1)]
    scores = oracle.score_window([[[0.0, 0.0]]], keys, redundancy=0.5)
    assert scores == pytest.approx([1 / 3 - 0.5 * a for a in alike])


def test_a_zero_key_has_cosine_zero_even_with_itself() -> None:
    assert oracle.mean_cosines([[0.0, 0.0], [1.0, 1.0]]) == pytest.approx([0.0, 0.5])


def test_root_mean_square_times_the_length() -> None:
    """Head 0 attends evenly (0.5 of two keys), head 1 to key 1 alone, with `exp(-40)` left over."""
    query = [[[0.0], [40.0]]] * 3
    scores = oracle.score_window(query, [[0.0], [1.0]], scale=1.0, reduction="rms", values=[[3.0, 4.0], [0.0, -2.0]])
    assert scores == pytest.approx([math.sqrt(0.25 / 2) * 5, math.sqrt(1.25 / 2) * 2])


def test_pooling_averages_over_heads_then_layers() -> None:
    scores = [[[1.0, 2.0], [3.0, 6.0]], [[5.0, 0.0], [7.0, 4.0]]]  # [L=2][H=2][W=2]
    assert oracle.pool_scores(scores, "head") == scores
    assert oracle.pool_scores(scores, "layer") == [[[2.0, 4.0]] * 2, [[6.0, 2.0]] * 2]
    assert oracle.pool_scores(scores, "model") == [[[4.0, 3.0]] * 2] * 2


@pytest.mark.parametrize(
    ("scores", "k", "kept"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),  # the best two, ascending by position, not by score
        ([5.0, 5.0, 5.0, 5.0], 2, [0, 1]),  # ties to the lowest index
        ([-0.0, 0.0, -0.0], 1, [0]),  # -0 equals +0, so the lowest index wins
        ([NAN, -INF, NAN, -1.0], 2, [0, 3]),  # NaN ranks as -inf and ties with it
        ([-INF, NAN], 1, [0]),
        ([INF, 1.0, INF], 1, [0]),
        ([0.0, 5e-324, -5e-324], 1, [1]),  # a denormal is not zero
        ([1.0, 2.0], 2, [0, 1]),
    ],
)
def test_select_topk(scores: list[float], k: int, kept: list[int]) -> None:
    assert oracle.select_topk(scores, k) == kept


@pytest.mark.parametrize(
    ("fraction", "keep", "budget"),
    [
        (0.0, 10, 0),
        (0.3, 10, 3),
        (0.5, 5, 2),  # 2.5 rounds to the even neighbour, as Python's round does
        (0.5, 7, 4),  # 3.5 too
        (1.0, 4, 3),  # one candidate always remains
        (1.0, 1, 0),
    ],
)
def test_chunk_budget(fraction: float, keep: int, budget: int) -> None:
    assert oracle.chunk_budget(fraction, keep) == budget


#           0    1    2    3    4    5    6    7    8    9
EXAMPLE = [9.0, 0.0, 8.0, 0.0, 0.0, 7.0, 1.0, 0.0, 0.0, 6.0]


@pytest.mark.parametrize(
    ("keep", "budget", "max_chunk", "kept"),
    [
        # Candidates 0, 2, 5. Pairs (0,2): one inside, worth 8; (2,5): two inside, worth 7. The first costs 1
        # of 2; the second would make 3, so buying stops. Four are kept; the best other token, 9, fills up.
        (5, 2, 4, [0, 1, 2, 5, 9]),
        # One more of budget and both fit: the chain 0..5 is one long chunk through the shared end point 2.
        (6, 3, 4, [0, 1, 2, 3, 4, 5]),
        # Spans include both end points: (2,5) spans 4 and is no pair if the limit is 3. Tokens 9 and 6 fill.
        (6, 3, 3, [0, 1, 2, 5, 6, 9]),
        # No interiors: plain top-k.
        (5, 0, 4, [0, 2, 5, 6, 9]),
        # A limit below 3 leaves no pair at all: plain top-k again.
        (5, 2, 2, [0, 2, 5, 6, 9]),
    ],
)
def test_expand_chunks_worked_example(keep: int, budget: int, max_chunk: int, kept: list[int]) -> None:
    assert oracle.expand_chunks(EXAMPLE, keep, budget, max_chunk) == kept


def test_buying_stops_at_the_first_pair_that_does_not_fit() -> None:
    # Candidates 0, 4, 6 (worths: (0,4) 9 with three inside, (4,6) 8 with one inside). Budget 2: the better
    # pair does not fit, so the cheaper one behind it is not bought either. Fill takes 8 and 9, not 5.
    scores = [9.0, 0.0, 0.0, 0.0, 9.5, 0.0, 8.0, 0.0, 5.0, 4.0]
    assert oracle.expand_chunks(scores, 5, 2, 8) == [0, 4, 6, 8, 9]


def test_equal_worths_go_to_the_lower_position() -> None:
    # Candidates 0, 2, 4, all 1.0: pairs (0,2) and (2,4) tie, and the budget pays for one.
    scores = [1.0, 0.0, 1.0, 0.5, 1.0, 0.9]
    assert oracle.expand_chunks(scores, 4, 1, 8) == [0, 1, 2, 4]


def test_adjacent_candidates_are_no_pair() -> None:
    # 0 and 1 touch; nothing lies between them, nothing is bought, the best of the rest fills.
    assert oracle.expand_chunks([9.0, 8.0, 1.0, 2.0], 3, 1, 8) == [0, 1, 3]


def test_nan_ends_make_a_pair_worth_minus_infinity() -> None:
    # Candidates (K - A = 3): 3, then the -inf ties by position: 0 and 1. Pairs: (0,1) adjacent; (1,3) has 2
    # inside and worth -inf, which still counts as a worth. The interior, 2, is bought.
    assert oracle.expand_chunks([NAN, -INF, NAN, 1.0, -INF], 4, 1, 3) == [0, 1, 2, 3]


def test_compact_moves_survivors_then_the_tail() -> None:
    # Blocks 5, 2, 7 of two rows: tokens a..f. Window b c d (start 1, W = 3), keep c and d; tail e, f.
    cells = dict(zip([(5, 0), (5, 1), (2, 0), (2, 1), (7, 0), (7, 1)], "abcdef", strict=True))
    after, length = oracle.compact(cells, [5, 2, 7], 2, 1, 6, [1, 2], 3)
    # New order a c d e f; the last row is past the new length and keeps its f.
    assert "".join(after.values()) == "acdeff"
    assert length == 5


def test_compact_leaves_a_sequence_marked_minus_one_alone() -> None:
    cells = {(0, 0): "a", (0, 1): "b"}
    assert oracle.compact(cells, [0], 2, 0, 2, [-1], 2) == (cells, 2)


@pytest.mark.parametrize(
    ("start", "seq_len", "protected", "skipped"),
    [(4, 8, 4, False), (4, 8, 5, True), (4, 7, 0, True), (4, 9, 0, False), (-1, 3, 0, True)],
)
def test_is_skipped(start: int, seq_len: int, protected: int, skipped: bool) -> None:
    assert oracle.is_skipped(start, 4, seq_len, protected) is skipped
