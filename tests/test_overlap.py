"""Detection of shared memory between views: exact, and fast for all pool layouts of engines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from kara_kernels import PagedCache, overlap
from kara_kernels.overlap import View, dims_of, first_meeting, reaches_twice

Cut = tuple[int, tuple[int, ...], tuple[int, ...], int]  # address, shape, strides in elements, bytes of an element


def view(cut: Cut) -> View:
    base, shape, strides, itemsize = cut
    return View(base, dims_of(shape, strides, itemsize))


def bytes_of(cut: Cut) -> Counter[int]:
    """Every byte that the view reaches, with its count."""
    base, shape, strides, itemsize = cut
    places = (
        base + itemsize * sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in product(*map(range, shape))
    )
    return Counter(place + byte for place in places for byte in range(itemsize))


@st.composite
def cuts(draw: st.DrawFn) -> list[Cut]:
    """Views of one small buffer with strides from one list, so that many views share strides."""
    strides = st.sampled_from(draw(st.lists(st.integers(0, 24), min_size=1, max_size=4)))
    one = st.lists(st.tuples(st.integers(1, 4), strides), min_size=1, max_size=4)
    return [
        (
            draw(st.integers(0, 60)),
            tuple(n for n, _ in dims),
            tuple(s for _, s in dims),
            draw(st.sampled_from([1, 2, 4])),
        )
        for dims in draw(st.lists(one, min_size=1, max_size=6))
    ]


@settings(max_examples=500)
@given(cuts())
@example([(0, (3,), (2,), 4), (9, (3,), (2,), 4)])
@example([(0, (2, 2), (8, 3), 1), (7, (2,), (8,), 2)])  # the second runs over the end of the stride
@example([(19, (4, 4), (9, 8), 1), (34, (3, 2), (9, 8), 1)])  # and here far over it, with strides that do not nest
def test_views_that_meet_are_found_and_no_others(given_: list[Cut]) -> None:
    reached = [bytes_of(cut) for cut in given_]
    twice = [max(found.values()) > 1 for found in reached]
    assert [reaches_twice(view(cut).dims) for cut in given_] == twice
    good = [i for i, bad in enumerate(twice) if not bad]
    meeting = {(i, j) for i, j in combinations(good, 2) if reached[i].keys() & reached[j].keys()}
    met = first_meeting([view(given_[i]) for i in good])
    if met is None:
        assert not meeting
    else:
        low, high = (good[i] for i in met)
        assert tuple(sorted((low, high))) in meeting
        assert given_[low][0] <= given_[high][0]


@settings(max_examples=200)
@given(cuts=cuts(), data=st.data())
def test_a_cache_is_refused_exactly_where_two_elements_share_bytes(cuts: list[Cut], data: st.DataObject) -> None:
    """The same with tensors: layers of one shape in a buffer, with different strides."""
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=4)))
    strides = st.sampled_from([stride for _, _, own, _ in cuts for stride in own])
    own = [tuple(data.draw(strides) for _ in shape) for _ in cuts]
    buffer = torch.zeros(1000, dtype=torch.int16)
    layers = [buffer.as_strided(shape, s, base) for s, (base, *_) in zip(own, cuts, strict=True)]
    total = sum((bytes_of((2 * base, shape, s, 2)) for s, (base, *_) in zip(own, cuts, strict=True)), Counter())
    if max(total.values()) == 1:
        PagedCache(layers)
    else:
        with pytest.raises(ValueError, match=r"k_cache.*: expected (every element at its own|memory of its own)"):
            PagedCache(layers)


# ---- pools as engines cut them ---------------------------------------------------------------------------

B, P, H, D, L = 12, 4, 2, 8, 80

Pools = tuple[torch.Tensor | list[torch.Tensor], torch.Tensor | list[torch.Tensor]]


def pool(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def halves(layers: list[torch.Tensor]) -> Pools:
    """Keys and values adjacent in each block."""
    return [x[:, 0] for x in layers], [x[:, 1] for x in layers]


def by_token(layers: list[torch.Tensor]) -> Pools:
    return [x[..., :D] for x in layers], [x[..., D:] for x in layers]


def of_one(whole: torch.Tensor, layer: int, half: int) -> Pools:
    """Views of one allocation. Arguments: the dimension of layers, and the one of keys and values among the rest."""
    layers = whole.unbind(layer)
    return [x.select(half, 0) for x in layers], [x.select(half, 1) for x in layers]


POOLS: dict[str, Callable[[], Pools]] = {
    "an allocation each": lambda: ([pool(B, P, H, D) for _ in range(L)], [pool(B, P, H, D) for _ in range(L)]),
    "stacked": lambda: (pool(L, B, P, H, D), pool(L, B, P, H, D)),
    "two halves of a stack": lambda: tuple(pool(2, L, B, P, H, D)),  # type: ignore[arg-type]
    "keys and values in turn": lambda: halves([pool(B, 2, P, H, D) for _ in range(L)]),
    "rows of keys and values": lambda: by_token([pool(B, P, H, D + 5) for _ in range(L)]),
    "all layers in a block": lambda: of_one(pool(B, L, 2, P, H, D), 1, 1),
    "all layers in a block, heads first": lambda: of_one(pool(B, L, 2, H, P, D).transpose(3, 4), 1, 1),
    "all layers in a head": lambda: of_one(pool(B, H, L, 2, P, D).permute(0, 2, 3, 4, 1, 5), 1, 1),
    "all layers in a row": lambda: of_one(pool(B, P, H, L, 2, D), 3, 3),
    "all keys, then all values of a block": lambda: of_one(pool(B, 2, L, P, H, D), 2, 1),
    "regions of one allocation": lambda: of_one(pool(L, B, 2, P, H, D), 0, 1),
}


@pytest.mark.parametrize("kind", POOLS)
def test_eighty_layers_are_checked_in_five_milliseconds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair of views is compared, so the time grows with the number of views, not of pairs."""
    compared = []
    share_bytes = overlap._share_bytes
    monkeypatch.setattr(overlap, "_share_bytes", lambda a, b: compared.append((a, b)) or share_bytes(a, b))
    k, v = POOLS[kind]()
    took = []
    for _ in range(10):
        begin = time.thread_time()
        PagedCache(k, v)
        took.append(time.thread_time() - begin)
    assert not compared
    assert min(took) < 5e-3


@pytest.mark.parametrize("kind", [kind for kind in POOLS if kind != "an allocation each"])
def test_a_layer_that_begins_an_element_early_is_found(kind: str) -> None:
    k, v = POOLS[kind]()
    values = list(v)
    values[41] = values[41].as_strided(values[41].shape, values[41].stride(), values[41].storage_offset() - 1)
    with pytest.raises(ValueError, match=r"v_cache\[41\]: expected memory of its own, got elements of [kv]_cache\[4"):
        PagedCache(k, values)
