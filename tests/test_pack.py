"""Queries in four bits: codes and scales against plain Python, and the kernel against the reference, to the bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from on_gpu import ON_GPU, lent
from worlds import Plan, Sequenced, World

from bench.codegen.__main__ import OLDEST
from bench.packages import package_of
from kara_kernels import compress_window
from kara_kernels.ops import score_window
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


def five_bits(x: float) -> float:
    """``x`` rounded to five significant bits, half to even; what is not a normal number of float32 is 0."""
    exponent = math.frexp(x)[1] - 5
    rounded = math.ldexp(nearest_even(math.ldexp(x, -exponent)), exponent)
    return rounded if rounded >= 2.0**-126 else 0.0


def by_hand(row: list[float]) -> tuple[list[int], float]:
    """Bytes and scale of one row, in plain Python; float32 is where the library divides."""
    scale = five_bits(float(np.float32(max(map(abs, row))) / np.float32(7)))
    codes = [nearest_even(float(np.float32(x) / np.float32(scale))) if scale else 0 for x in row]
    codes = [max(-7, min(7, code)) & 15 for code in codes]
    return [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)], scale


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1e-40, 3.0e38, -3.0e38, 0.5, 7.0])


@settings(max_examples=60, deadline=None)
@example(rows=[[1e-38, 0.0], [1e-40, -1e-40]])  # scales below the smallest normal number
@example(rows=[[7.21875, -7.21875]])  # the scale is rounded down as far as it can be
@given(rows=st.integers(1, 4).flatmap(
    lambda half: st.lists(st.lists(numbers, min_size=2 * half, max_size=2 * half), min_size=1, max_size=5)
))  # fmt: skip
def test_codes_and_scales_by_hand(rows: list[list[float]]) -> None:
    for backend in ("torch", "triton") if INTERPRETED or ON_GPU else ("torch",):
        packed = lent(pack_queries)(torch.tensor(rows)[:, None], backend=backend)
        for row, codes, scale in zip(rows, packed.codes[:, 0].tolist(), packed.scales[:, 0].tolist(), strict=True):
            assert (codes, scale) == by_hand(row)


def test_what_is_packed_is_within_half_a_step() -> None:
    query = torch.randn(3, 5, 4, 64)
    packed = pack_queries(query)
    assert packed.nbytes * 8 == query.numel() * (4 + 16 / 64)
    step = packed.scales.float()[..., None]
    assert (
        (unpacked(packed) - query).abs() <= step * 0.5 + query.abs() * 2**-5
    ).all()  # the largest may lose the scale's rounding too


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
        elif INTERPRETED or ON_GPU:
            lent(pack_queries)(query, out=out, rows=rows, backend="triton")
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


MIXED = (Sequenced(start=3, tail=10), Sequenced(start=9, lacking=2), Sequenced(start=0, tail=0))
# Whole, with two products per tile, in slices, streamed; D, W, key dtype.
SHAPES = [(16, 40, torch.bfloat16), (24, 33, torch.float16), (576, 20, torch.bfloat16), (32, 300, torch.float32),
          (64, 64, torch.float8_e4m3fn), (40, 1030, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("form", ["stacked", "listed", "by row"])
@pytest.mark.parametrize(("dim", "window", "dtype"), SHAPES)
def test_packed_queries_score_as_what_they_stand_for(form: str, dim: int, window: int, dtype: torch.dtype) -> None:
    """The reference scores the unpacked queries; the kernel agrees with it, and the rest of the call is the same."""
    wide = dtype if dtype.itemsize > 1 else torch.bfloat16
    layers = 2 if window < 1000 else 1  # the interpreter takes ten seconds for each
    plan = Plan(MIXED, layers, 2, 3, window, 20, dim, dim, 8, dtype=dtype, query_dtype=wide)
    results = []
    for backend in ("torch", "unpacked", "triton"):
        world = World(plan).give_values()
        packed = pack_queries(torch.stack(world.query), backend="torch")
        query: Any = unpacked(packed) if backend == "unpacked" else packed
        given = {"window": window, "keep": window // 2, "window_starts": world.window_starts,
                 "protected_lens": world.protected_lens, "redundancy": 0.5}  # fmt: skip
        if form == "listed":
            query = list(query) if backend == "unpacked" else list(map(PackedQueries, *packed))
        elif form == "by row":
            order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
            rows = torch.empty(60, dtype=torch.int32)
            rows[order] = torch.arange(60, dtype=torch.int32)
            given["query_rows"] = rows.view(3, 20)
            query = (
                query.flatten(1, 2)[:, order]
                if backend == "unpacked"
                else PackedQueries(*(part.flatten(1, 2)[:, order] for part in packed))
            )
        arguments = query, world.k_caches, world.v_caches, world.block_tables, world.seq_lens
        which = "triton" if backend == "triton" else "torch"
        if which == "triton" and not INTERPRETED and not ON_GPU:
            reached = [*packed, *world.k_caches, *world.v_caches]
            parts = {"stacked": [], "by row": [query], "listed": query}[form]
            reached += [tensor for part in parts for tensor in part]
            with emulating("together", reached) as launches:
                results.append(compress_window(*arguments, **given, backend=which))
            assert not [str(problem) for launch in launches for problem in launch.problems]
        else:
            results.append(lent(compress_window)(*arguments, **given, backend=which))
    reference, exact, kernel = results
    assert torch.equal(reference.scores, exact.scores)
    assert torch.equal(reference.keep_indices, exact.keep_indices)
    assert torch.allclose(kernel.scores, reference.scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(kernel.keep_indices == -1, reference.keep_indices == -1)
    assert torch.equal(kernel.seq_lens, reference.seq_lens)
    assert reference.scores[:, 0].any()


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="runs the emulator")
@pytest.mark.parametrize("case", [
    "test_pack.py::test_packed_queries_score_as_what_they_stand_for[24-33-dtype1-stacked]",
    "test_ahead.py::test_the_kernel_turns_keys_as_it_loads_them[80-80-20-dtype5-interleaved-packed]",
    "test_channels.py::test_the_emulated_kernel_agrees_without_a_problem[shape2-dtype2]",
])  # fmt: skip
def test_the_oldest_triton_compiles_and_agrees(case: str) -> None:
    """Triton 3.6 multiplied sixteen dimensions wrongly that came in joined halves, and refused keys in fp8."""
    environment = {**os.environ, "PYTHONPATH": str(package_of("triton", OLDEST))}
    command = [sys.executable, "-m", "pytest", "-q", f"{Path(__file__).parent / case}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout[-3000:]


ONE = PackedQueries.empty(1, 3, 4, 8)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scales of another shape": (
        {"query": ONE._replace(scales=ONE.scales[:, :2])}, ValueError, r"query.scales: expected shape \[1, 3, 4, 1\]"),
    "scales of float32": (
        {"query": ONE._replace(scales=ONE.scales.float())}, TypeError, "query.scales: expected dtype torch.bfloat16"),
    "no codes": ({"query": ONE._replace(codes=ONE.codes.int())}, TypeError, "query: expected dtype torch.uint8"),
    "another head dimension": ({"query": PackedQueries.empty(1, 3, 4, 6)}, ValueError, r"query: expected shape .* 4\]"),
    "codes alone": ({"query": ONE.codes}, TypeError, "query: expected dtype torch.float16"),
    "for many layers": ({"query": [ONE, ONE]}, TypeError, "query: expected a tensor like k_cache, got list"),
    "an odd head dimension": (
        {"query": PackedQueries.empty(1, 3, 4, 6), "k_cache": torch.zeros(4, 4, 2, 7)}, ValueError,
        "query: expected no packed queries for an odd head dimension, got D = 7"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_packed_queries_that_do_not_fit_are_refused(case: str, backend: str) -> None:
    changed, error, message = WRONG[case]
    good = {"query": ONE, "k_cache": torch.zeros(4, 4, 2, 8), "block_tables": torch.arange(4).int()[None],
            "window_starts": torch.zeros(1, dtype=torch.int32), "window": 8, "backend": backend}  # fmt: skip
    ONE.codes.zero_()
    ONE.scales.zero_()
    assert torch.allclose(score_window(**good), torch.tensor(1 / 8))
    with pytest.raises(error, match=message):
        score_window(**good | changed)
