"""The order of a context's rows: the reference against plain Python, and the kernel against the reference, exactly."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from on_gpu import ON_GPU, lent

from kara_kernels import ops, reference
from kara_kernels.ops import rank
from kara_kernels.reference.rank import MOST_ROWS

needs_kernels = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs the interpreter or a GPU")
rank_rows = lent(ops.rank_rows)

TINY, HUGE = 2.0**-149, 2.0**128 - 2.0**104  # the smallest and the largest numbers of float32
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, TINY, -TINY, HUGE, -HUGE, 1.0, 1.0, 0.5]
BITS = [struct.unpack("<i", struct.pack("<f", x))[0] for x in SPECIAL]
numbers = st.sampled_from(SPECIAL) | st.floats(width=32)


def by_hand(row: list[float], sinks: int, newest: int) -> list[int]:
    """Takes the best of what is left, again and again."""
    count = len(row)
    first = [i for i in range(count) if i < sinks]
    then = [i for i in range(count) if i >= sinks and i >= count - newest]
    left = [i for i in range(count) if i not in first and i not in then]
    order = first + then
    while left:
        best = left[0]
        for i in left[1:]:
            worth, most = (-math.inf if math.isnan(x) else x for x in (row[i], row[best]))
            if worth > most:
                best = i
        left.remove(best)
        order.append(best)
    return order


rows = st.integers(1, 30).flatmap(
    lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=3)
)


@settings(max_examples=150)
@example(scores=[[math.nan, -math.inf, math.nan, -math.inf]], sinks=0, newest=0)
@example(scores=[[-0.0, 0.0, -0.0, 0.0, -TINY, TINY]], sinks=0, newest=0)
@example(scores=[[math.inf] * 6], sinks=2, newest=2)  # no score is above a sink or a newest row
@given(scores=rows, sinks=st.integers(0, 33), newest=st.integers(0, 33))
def test_the_order_by_hand(scores: list[list[float]], sinks: int, newest: int) -> None:
    order = reference.rank_rows(torch.tensor(scores), sinks=sinks, newest=newest)
    assert order.dtype == torch.int32
    assert order.tolist() == [by_hand(row, sinks, newest) for row in scores]


def test_defaults_protect_four_sinks_and_the_newest_32() -> None:
    scores = torch.arange(50.0)
    assert ops.rank_rows(scores).tolist() == [0, 1, 2, 3, *range(18, 50), *range(17, 3, -1)]


@pytest.mark.parametrize(("sinks", "newest"), [(4, 6), (9, 9), (0, 10), (10, 0), (MOST_ROWS, MOST_ROWS)])
def test_rows_that_are_all_protected_keep_their_order(
    sinks: int, newest: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "TILE", 4)
    assert ops.rank_rows(torch.randn(2, 10), sinks=sinks, newest=newest, backend=backend).tolist() == [[*range(10)]] * 2


def test_the_first_of_the_order_are_the_best() -> None:
    """Any number of rows can be kept by taking the first, and without protection they are those of the top-k."""
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    order = reference.rank_rows(scores, sinks=0, newest=0)
    for keep in (1, 37, 400):
        assert torch.equal(order[:, :keep].sort(-1).values, reference.select_topk(scores, keep))


# ---------------------------------------------------------------------------------------------------- the kernel


@needs_kernels
@settings(max_examples=10)
@given(width=st.integers(1, 30), protected=st.tuples(st.integers(0, 20), st.integers(0, 20)), data=st.data())
def test_the_kernel_agrees(width: int, protected: tuple[int, int], data: st.DataObject) -> None:
    """Tiles of four, so that many runs merge. Scores and order lie in memory whose other bytes stay as they are."""
    of_score = st.sampled_from(BITS) | st.integers(-(2**31), 2**31 - 1)
    bits = data.draw(st.lists(of_score, min_size=2 * width, max_size=2 * width))
    room = torch.full((4, width + 5), 0x7FC12345, dtype=torch.int32)  # NaN
    room[1:3, 2 : width + 2] = torch.tensor(bits, dtype=torch.int32).view(2, width)
    before = room.clone()
    orders = torch.full((4, width), -77, dtype=torch.int32)
    scores = room.view(torch.float32)[1:3, 2 : width + 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "TILE", 4)
        lent(launched)(orders, scores, *protected, backend="triton")
    assert torch.equal(orders[1:3], reference.rank_rows(scores, sinks=protected[0], newest=protected[1]))
    assert (orders[[0, 3]] == -77).all()
    assert torch.equal(room, before)


def launched(orders: torch.Tensor, scores: torch.Tensor, sinks: int, newest: int, *, backend: str) -> None:
    rank.launch_rank(orders[1:3], scores, sinks, newest)


@needs_kernels
@pytest.mark.parametrize("width", [1, 1024, 1025, 3000, *([131072, 131073] if ON_GPU else [])])
def test_tiles_of_full_size_agree(width: int) -> None:
    scores = torch.randn(1, width, generator=torch.Generator().manual_seed(width)).round(decimals=1)  # many ties
    assert torch.equal(rank_rows(scores, backend="triton"), reference.rank_rows(scores))


@needs_kernels
def test_a_row_has_the_same_order_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if scratch memory holds only some of the rows at a time."""
    monkeypatch.setattr(rank, "TILE", 8)
    scores = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    protected = {"sinks": 2, "newest": 5}
    together = rank_rows(scores, **protected, backend="triton")
    assert torch.equal(together, reference.rank_rows(scores, **protected))
    monkeypatch.setattr(rank, "SCRATCH_BYTES", 2 * 16 * 30)
    assert torch.equal(rank_rows(scores, **protected, backend="triton"), together)
    assert torch.equal(rank_rows(scores[1, 2], **protected, backend="triton"), together[1, 2])


def test_the_reference_ranks_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from kara_kernels.reference import select

    scores = torch.randn(5, 60)
    together = reference.rank_rows(scores)
    monkeypatch.setattr(select, "SLICE_ELEMENTS", 120)
    assert torch.equal(reference.rank_rows(scores), together)


def test_an_empty_batch_has_an_empty_order(backend: str) -> None:
    assert ops.rank_rows(torch.zeros(0, 3, 7), backend=backend).shape == (0, 3, 7)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"scores": [1.0]}, TypeError, "scores: expected a tensor, got list"),
    "float16": ({"scores": torch.zeros(2, 3).half()}, TypeError, "scores: expected dtype torch.float32"),
    "a number": ({"scores": torch.tensor(1.0)}, ValueError, r"scores: expected \[..., W\]"),
    "no rows": ({"scores": torch.zeros(2, 0)}, ValueError, r"scores: expected .* got shape \[2, 0\]"),
    "too many": ({"scores": torch.zeros(1).expand(MOST_ROWS + 1)}, ValueError, f"W in 1..{MOST_ROWS}, got shape"),
    "negative": ({"sinks": -1}, ValueError, r"sinks: expected 0..\d+, got -1"),
    "a float": ({"newest": 2.0}, TypeError, "newest: expected an int, got float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str, backend: str) -> None:
    given_, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ops.rank_rows(**{"scores": torch.zeros(2, 3), **given_}, backend=backend)
    if backend == "torch":
        with pytest.raises(error, match=message):
            reference.rank_rows(**{"scores": torch.zeros(2, 3), **given_})


@needs_kernels
def test_rows_the_kernel_cannot_reach_are_refused_not_copied() -> None:
    scores = torch.randn(4, 3).t()
    with pytest.raises(ValueError, match="scores: expected rows at one stride"):
        rank_rows(scores, backend="triton")
    assert torch.equal(ops.rank_rows(scores, backend="torch"), reference.rank_rows(scores.contiguous()))
