"""Channels of K by the queries' and the keys' squares: by hand, kernel against reference, and dropped on the way to a
payload."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import ON_GPU, lent

from kara_kernels import reference
from kara_kernels.ops import rank_channels
from kara_kernels.ops.channels import launch_channels
from kara_kernels.reference.channels import channel_scores, check_channels

if not INTERPRETED:
    from ptx import ORDERS, emulating

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def world(
    seed: int, layers: int, heads: int, group: int, dim: int, page: int, tokens: int, queries: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Queries, keys and block table. Rows after the context and blocks of others are NaN."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // page)
    wide = dtype if dtype.itemsize > 1 else torch.bfloat16
    query = [torch.randn(queries, heads * group, dim, generator=generator).to(wide) for _ in range(layers)]
    table = torch.randperm(blocks + 2, generator=generator)[:blocks].int()
    keys = []
    for _ in range(layers):
        room = torch.full((blocks + 2, page, heads, dim + 3), math.nan).to(dtype)
        pool = room[..., :dim]
        for token in range(tokens):
            pool[int(table[token // page]), token % page] = torch.randn(heads, dim, generator=generator).to(dtype)
        keys.append(pool)
    return query, keys, table


def by_hand(query: torch.Tensor, keys: torch.Tensor, table: list[int], tokens: int) -> list[list[float]]:
    """``[H][D]`` in Python's floats."""
    page, heads, dim = keys.shape[1:]
    rows, asked = keys.double().tolist(), query.double().tolist()
    group = query.shape[1] // heads
    found = []
    for head in range(heads):
        line = []
        for d in range(dim):
            q = [step[head * group + g][d] ** 2 for step in asked for g in range(group)]
            k = [rows[table[t // page]][t % page][head][d] ** 2 for t in range(tokens)]
            line.append(math.fsum(q) / len(q) * math.fsum(k) / len(k))
        found.append(line)
    return found


worlds = st.builds(
    world, st.integers(0, 99), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 5, 24, 72]),
    st.sampled_from([1, 4, 16]), st.integers(1, 150), st.integers(1, 40), st.sampled_from(DTYPES),
)  # fmt: skip


@settings(max_examples=30)
@given(worlds, st.integers(0, 15))
def test_the_reference_by_hand(drawn: Any, short: int) -> None:
    query, keys, table = drawn
    tokens = max(1, len(table) * keys[0].shape[1] - short)
    tokens = min(tokens, int((~keys[0][table.long()].flatten(0, 1)[:, 0, 0].isnan()).sum()))
    scores = channel_scores(check_channels(query, keys, table, tokens, 1))
    for layer in range(len(keys)):
        exact = np.array(by_hand(query[layer], keys[layer], table.tolist(), tokens))
        # Each sum of n squares loses at most n roundings of 2^-24.
        bound = (tokens + query[0].shape[0] * query[0].shape[1] + 4) * 2.0**-24
        assert (np.abs(scores[layer].double().numpy() - exact) <= exact * bound).all()


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="needs the interpreter or a GPU")
@settings(max_examples=20)
@given(worlds)
def test_the_kernel_agrees_with_the_reference(drawn: Any) -> None:
    query, keys, table = drawn
    tokens = int((~keys[0][table.long()].flatten(0, 1)[:, 0, 0].isnan()).sum())
    a = check_channels(query, keys, table, tokens, 1)
    scores, exact = torch.full((len(keys), *keys[0].shape[2:]), math.nan), channel_scores(a)

    def go(room: torch.Tensor, q: Any, k: Any, t: torch.Tensor, backend: str) -> None:
        launch_channels(room, check_channels(q, k, t, tokens, 1))

    lent(go)(scores, query, keys, table, backend="triton") if ON_GPU else launch_channels(scores, a)
    bound = (tokens + query[0].shape[0] * query[0].shape[1] + 4) * 2.0**-23
    assert ((scores - exact).abs() <= exact * bound).all()


@pytest.mark.skipif(INTERPRETED, reason="runs compiled kernels: TRITON_INTERPRET=0")
@pytest.mark.parametrize(("shape", "dtype"), [
    ((2, 2, 3, 64, 16, 150, 32), torch.bfloat16), ((1, 1, 16, 576, 64, 100, 4), torch.bfloat16),
    ((1, 2, 1, 80, 16, 70, 5), torch.float8_e4m3fn), ((1, 1, 1, 24, 1, 40, 3), torch.float32),
])  # fmt: skip
def test_the_emulated_kernel_agrees_without_a_problem(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, keys, table = world(0, *shape, dtype)  # type: ignore[arg-type]
    a = check_channels(query, keys, table, shape[5], 1)
    seen = []
    for order in ORDERS:
        scores = torch.full((len(keys), *keys[0].shape[2:]), math.nan)
        with emulating(order, [*query, *keys, scores]) as launches:
            launch_channels(scores, a)
        assert not [str(problem) for launch in launches for problem in launch.problems]
        seen.append(scores)
    exact = channel_scores(a)
    assert ((seen[0] - exact).abs() <= exact * 2.0**-20).all()
    assert all(torch.equal(seen[0], scores) for scores in seen)


def test_the_best_channels_ascend_and_ties_go_to_the_lowest(backend: str) -> None:
    keys = torch.zeros(2, 4, 1, 6)
    keys[..., :] = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 0.0])
    query = torch.ones(3, 2, 6)
    query[..., 0] = 4  # 16 * 1 > 9
    table = torch.tensor([1, 0]).int()
    assert rank_channels(query, keys, table, 8, 4, backend=backend).tolist() == [[0, 1, 2, 3]]
    assert rank_channels([query], [keys], table, 5, 3, backend=backend).tolist() == [[[0, 1, 3]]]
    assert rank_channels(query, keys, table, 8, 6, backend=backend).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert reference.rank_channels(query, keys, table, 8, 4).tolist() == [[0, 1, 2, 3]]


Q, K, T = torch.ones(3, 4, 8), torch.ones(4, 16, 2, 8), torch.tensor([2, 0]).int()
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "queries of other heads": ((Q[:, :3], K, T, 20, 4), ValueError,
                               r"query: expected \[N, H\*G, 8\].* of 2 KV heads, got \[3, 3, 8\]"),
    "no queries": ((Q[:0], K, T, 20, 4), ValueError, r"query: expected \[N"),
    "one layer of two": (([Q], [K, K.clone()], T, 20, 4), ValueError, "query: expected one tensor"),
    "queries of integers": ((Q.int(), K, T, 20, 4), TypeError, "query: expected dtype"),
    "keys of integers": ((Q, K.int(), T, 20, 4), TypeError, "k_cache: expected float16"),
    "another dim": ((Q[..., :4], K, T, 20, 4), ValueError, r"query: expected shape \[any, any, 8\]"),
    "tokens": ((Q, K, T, 33, 4), ValueError, "tokens: expected 1..32, got 33"),
    "keep": ((Q, K, T, 20, 9), ValueError, "keep: expected 1..8, got 9"),
    "a block of nobody": ((Q, K, torch.tensor([2, 4]).int(), 20, 4), ValueError,
                          r"block_table\[1\]: expected a block id in 0..3, got 4"),
    "int64": ((Q, K, T.long(), 20, 4), TypeError, "block_table: expected dtype torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    arguments, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        rank_channels(*arguments)
