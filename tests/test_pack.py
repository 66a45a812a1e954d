"""Queries in four bits: codes and scales against plain Python, and the kernel against the reference, to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st

from kara_kernels.ops.pack import launch_pack, pack_queries
from kara_kernels.packed import PackedQueries
from kara_kernels.reference.pack import unpacked

if not INTERPRETED:
    from ptx import emulating

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def nearest_even(x: float) -> int:
    below = math.floor(x)
    rest = x - below
    return below + (rest > 0.5 or (rest == 0.5 and below % 2 == 1))


def bfloat16(x: float) -> float:
    """``x`` rounded to bfloat16, half to even, by its bits."""
    bits = int(np.float32(x).view(np.uint32))
    upper, lower = bits >> 16, bits & 0xFFFF
    upper += lower > 0x8000 or (lower == 0x8000 and upper & 1 == 1)
    return float(np.uint32(upper << 16).view(np.float32))


def by_hand(row: list[float]) -> tuple[list[int], float]:
    """Bytes and scale of one row, in plain Python; float32 is where the library divides."""
    scale = bfloat16(float(np.float32(max(map(abs, row))) / np.float32(7)))
    codes = [nearest_even(float(np.float32(x) / np.float32(scale))) if scale else 0 for x in row]
    codes = [max(-7, min(7, code)) & 15 for code in codes]
    return [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)], scale


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1e-40, 3.0e38, -3.0e38, 0.5, 7.0])


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4).flatmap(
    lambda half: st.lists(st.lists(numbers, min_size=2 * half, max_size=2 * half), min_size=1, max_size=5)
))  # fmt: skip
def test_codes_and_scales_by_hand(rows: list[list[float]]) -> None:
    for backend in ("torch", "triton") if INTERPRETED else ("torch",):
        packed = pack_queries(torch.tensor(rows)[:, None], backend=backend)
        for row, codes, scale in zip(rows, packed.codes[:, 0].tolist(), packed.scales[:, 0].tolist(), strict=True):
            assert (codes, scale) == by_hand(row)


def test_what_is_packed_is_within_half_a_step() -> None:
    query = torch.randn(3, 5, 4, 64)
    packed = pack_queries(query)
    assert packed.nbytes * 8 == query.numel() * (4 + 16 / 64)
    step = packed.scales.float()[..., None]
    assert ((unpacked(packed) - query).abs() <= step * 0.502).all()  # the largest may lose the scale's rounding too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (3, 2, 24), (70, 3, 64), (5, 9, 128), (2, 1, 576)])
def test_the_kernel_writes_the_bits_of_the_reference(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """In rows of its own, whatever lies around; nothing else is written."""
    room = torch.full((tokens, heads + 1, dim + 2), torch.nan, dtype=dtype)
    query = room[:, :heads, :dim].copy_(torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(0)))
    query[0, 0] = 0
    rows = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(1))[:tokens]
    outs = []
    for kernel in (True, False):
        codes = torch.full((2 * tokens, heads + 1, dim // 2 + 3), 0xAB, dtype=torch.uint8)
        scales = torch.full((2 * tokens, heads + 2), -7.0, dtype=torch.bfloat16)
        out = PackedQueries(codes[:, :heads, : dim // 2], scales[:, :heads])
        if not kernel:
            pack_queries(query, out=out, rows=rows, backend="torch")
        elif INTERPRETED:
            pack_queries(query, out=out, rows=rows, backend="triton")
        else:
            with emulating("together", [room, codes, scales]) as launches:
                launch_pack(out, query, rows)
            assert not [str(problem) for launch in launches for problem in launch.problems]
        outs.append((codes, scales))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


Q, OUT = torch.zeros(3, 2, 4), PackedQueries.empty(5, 2, 4)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"query": [1.0]}, TypeError, "query: expected a tensor, got list"),
    "odd": ({"query": torch.zeros(2, 3)}, ValueError, r"query: expected \[.*even D, got shape \[2, 3\]"),
    "a vector": ({"query": torch.zeros(4)}, ValueError, r"query: expected .* got shape \[4\]"),
    "integers": ({"query": torch.zeros(2, 4).int()}, TypeError, "query: expected dtype torch.float16 or .*int32"),
    "no one stride": ({"query": torch.zeros(4, 3, 2, 4).transpose(0, 1)}, ValueError, "query: expected tokens at one"),
    "rows alone": ({"rows": torch.zeros(3).long()}, ValueError, "rows: expected None without out"),
    "a tuple": ({"out": tuple(OUT)}, TypeError, "out: expected PackedQueries, got tuple"),
    "codes": ({"out": OUT._replace(codes=OUT.codes[..., :1])}, ValueError, r"out.codes: expected shape \[any, 2, 2\]"),
    "scales": ({"out": OUT._replace(scales=OUT.scales[:4])}, ValueError, r"out.scales: expected shape \[5, 2\]"),
    "no room": ({"out": PackedQueries.empty(2, 2, 4)}, ValueError, "out: expected room for 3 tokens, got 2"),
    "int32": ({"out": OUT, "rows": torch.zeros(3).int()}, TypeError, "rows: expected dtype torch.int64"),
    "outside": ({"out": OUT, "rows": torch.tensor([0, 5, 1])}, ValueError, r"rows\[1\]: expected .*0..4, got 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str, backend: str) -> None:
    given_, error, message = BAD[case]
    with pytest.raises(error, match=message):
        pack_queries(**{"query": Q, **given_}, backend=backend)
