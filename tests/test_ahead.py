"""Looking ahead: keys turned back against queries turned ahead in plain Python, and the kernel against both."""

from __future__ import annotations

import cmath
import math
from typing import Any

import oracle
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import ON_GPU, lent
from torch import Tensor
from worlds import Plan, Sequenced, World

from kara_kernels import LookAhead, compress_window, reference
from kara_kernels.checks import FP8_DTYPES
from kara_kernels.engine import Policy
from kara_kernels.integrations.vllm.windows.rotary import look_ahead_of
from kara_kernels.ops import score_window
from kara_kernels.ops.pack import pack_queries

if not INTERPRETED:
    from ptx import emulating


def pairs(rotary: int, interleaved: bool) -> list[tuple[int, int]]:
    half = rotary // 2
    return [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]


def turned(row: list[float], angles: list[float], interleaved: bool) -> list[float]:
    """A row rotated ahead by ``angles``, as complex numbers."""
    row = list(row)
    for (x, y), angle in zip(pairs(2 * len(angles), interleaved), angles, strict=True):
        z = complex(row[x], row[y]) * cmath.exp(1j * angle)
        row[x], row[y] = z.real, z.imag
    return row


def look(angles: list[float], interleaved: bool) -> LookAhead:
    return LookAhead(torch.tensor(list(map(math.cos, angles))), torch.tensor(list(map(math.sin, angles))), interleaved)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(2, 9), half=st.integers(1, 4), interleaved=st.booleans(), group=st.integers(1, 2),
    count=st.integers(1, 4), window=st.integers(1, 6), reduction=st.sampled_from(["mean", "rms"]),
    redundancy=st.sampled_from([0.0, 0.5]), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_scores_as_queries_further_on(
    dim: int, half: int, interleaved: bool, group: int, count: int, window: int, reduction: str, redundancy: float,
    causal: bool, seed: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    angles = (torch.rand(min(half, dim // 2), generator=draw) * 7 - 3).tolist()
    count = min(count, window) if causal else count
    query = torch.randn(1, count, 2 * group, dim, generator=draw)
    keys, values = torch.randn(2, window, 1, 2, dim, generator=draw)
    scores = reference.score_window(
        query, keys, torch.arange(window, dtype=torch.int32)[None], torch.zeros(1, dtype=torch.int32), window,
        v_cache=values, reduction=reduction, redundancy=redundancy, look_ahead=look(angles, interleaved),
        attention="causal" if causal else "bidirectional",
    )  # fmt: skip
    for h in range(2):
        judges = [[turned(row, angles, interleaved) for row in of_token[h * group : (h + 1) * group]]
                  for of_token in query[0].tolist()]  # fmt: skip
        expected = oracle.score_window(
            judges, keys[:, 0, h].tolist(), values=values[:, 0, h].tolist(), reduction=reduction,
            redundancy=redundancy, causal=causal,
        )  # fmt: skip
        assert scores[0, h].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def turned_back(pool: Tensor, ahead: LookAhead, dtype: torch.dtype) -> Tensor:
    """All keys of a pool turned back in float32 and rounded, in the kernel's order of operations."""
    cos, sin, interleaved = ahead
    keys = pool.float()
    result = keys.clone()
    for (x, y), c, s in zip(pairs(2 * len(cos), interleaved), cos, sin, strict=True):
        result[..., x] = keys[..., x] * c + keys[..., y] * s
        result[..., y] = keys[..., y] * c - keys[..., x] * s
    return result.to(dtype)


MIXED = (Sequenced(start=3, tail=10), Sequenced(start=9, lacking=2), Sequenced(start=0, tail=0))
# Whole, with two products per tile, in slices, streamed; D, rotary dimensions, W, key dtype.
SHAPES = [
    (16, 16, 40, torch.bfloat16), (24, 16, 33, torch.float16), (64, 32, 20, torch.bfloat16),
    (64, 64, 64, torch.float8_e4m3fn), (32, 12, 300, torch.float32), (80, 80, 20, torch.bfloat16),
    (40, 40, 1030, torch.bfloat16), (576, 64, 20, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "fp8", "packed"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("dim", "rotary", "window", "dtype"), SHAPES)
def test_the_kernel_turns_keys_as_it_loads_them(
    dim: int, rotary: int, window: int, dtype: torch.dtype, interleaved: bool, form: str
) -> None:
    """It scores like the reference with a pool whose keys were turned before, and moves the keys as they are."""
    wide = torch.bfloat16 if dtype in FP8_DTYPES else dtype
    layers = 2 if window < 1000 else 1  # the interpreter takes seven seconds for each
    world = World(Plan(MIXED, layers, 2, 3, window, 20, dim, dim, 8, dtype=dtype, query_dtype=wide)).give_values()
    ahead = look([(0.37 * i) % 3 - 1.2 for i in range(rotary // 2)], interleaved)
    query: Any = world.query
    if form == "packed":
        query = pack_queries(torch.stack(world.query), backend="torch")
    elif form == "fp8":
        query = [layer.to(torch.float8_e4m3fn) for layer in world.query]
    rest: dict[str, Any] = {
        "block_tables": world.block_tables, "seq_lens": world.seq_lens, "window": window, "keep": window // 2,
        "window_starts": world.window_starts, "protected_lens": world.protected_lens,
    }  # fmt: skip
    before = [turned_back(pool, ahead, torch.float32 if INTERPRETED else wide) for pool in world.k_caches]
    expected = compress_window(query, before, [v.clone() for v in world.v_caches], **rest, backend="torch")
    unmoved = world.snapshot()
    call = {"look_ahead": ahead, "backend": "triton", **rest}
    if INTERPRETED or ON_GPU:
        result = lent(compress_window)(query, world.k_caches, world.v_caches, **call)
    else:
        with emulating("together", [*query, *world.k_caches, *world.v_caches]) as launches:
            result = compress_window(query, world.k_caches, world.v_caches, **call)
        assert not [str(problem) for launch in launches for problem in launch.problems]
    assert torch.allclose(result.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert result.scores[:, 0].any()
    world.assert_compacted(unmoved, result.keep_indices.tolist())


def table(positions: int, angles: list[float], factor: float = 1.0) -> Tensor:
    """As vLLM keeps it: a row per position, cosines and then sines, times the embedding's factor."""
    at = torch.arange(positions)[:, None] * torch.tensor(angles)
    return torch.cat((at.cos(), at.sin()), -1) * factor


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_angles_of_a_table(factor: float) -> None:
    ahead = LookAhead.of_table(table(40, [1.0, 0.1, 0.01], factor), 30, interleaved=True)
    expected = look([30.0, 3.0, 0.3], True)
    assert torch.allclose(ahead.cos, expected.cos, atol=1e-5)
    assert torch.allclose(ahead.sin, expected.sin, atol=1e-5)
    assert ahead.interleaved


class RotaryEmbedding(torch.nn.Module):
    """What vLLM's class of this name has."""

    def __init__(self, is_neox_style: bool = True) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", table(100, [1.0, 0.1]).to(torch.bfloat16))
        self.is_neox_style = is_neox_style


class MRotaryEmbedding(RotaryEmbedding):
    pass


@pytest.mark.parametrize("neox", [True, False])
def test_angles_of_vllm(neox: bool) -> None:
    rotary, policy = RotaryEmbedding(neox), Policy(window=64, keep=32)
    model = torch.nn.ModuleList([rotary, torch.nn.ModuleList([rotary])])
    found = look_ahead_of(model, policy, torch.device("cpu"))
    assert found is not None
    assert found.interleaved is not neox
    assert torch.allclose(found.cos, look([64.0, 6.4], False).cos, atol=0.01)
    nothing = Policy(window=64, keep=32, look_ahead=0)
    assert look_ahead_of(model, nothing, torch.device("cpu")) is None


@pytest.mark.parametrize(("modules", "got"), [
    ([], "none"), ([MRotaryEmbedding()], "MRotaryEmbedding of 100 positions"),
    ([RotaryEmbedding(), RotaryEmbedding()], "RotaryEmbedding"), ([RotaryEmbedding()], "RotaryEmbedding of 100"),
])  # fmt: skip
def test_other_embeddings_of_vllm_do_not_look_ahead(modules: list[torch.nn.Module], got: str) -> None:
    """Of an unknown kind, more than one, or with too short a table: by default not at all, and not on demand."""
    model, cpu = torch.nn.ModuleList(modules), torch.device("cpu")
    assert look_ahead_of(model, Policy(window=128, keep=32), cpu) is None
    with pytest.raises(ValueError, match=rf"kara: look_ahead: expected 0 .* than 100 positions, got {got}"):
        look_ahead_of(model, Policy(look_ahead=100), cpu)


COS = torch.zeros(2)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (3, TypeError, r"look_ahead: expected LookAhead\(cos, sin, interleaved\), got int"),
    "one tensor": ((COS,), TypeError, "look_ahead: expected LookAhead"),
    "lists": (([1.0], [0.0]), TypeError, "look_ahead.cos: expected a tensor, got list"),
    "float64": ((COS.double(), COS), TypeError, "look_ahead.cos: expected dtype torch.float32, got torch.float64"),
    "a table": ((torch.zeros(3, 2), COS), ValueError, r"look_ahead.cos: expected shape \[any\], got \[3, 2\]"),
    "no angle": ((COS[:0], COS[:0]), ValueError, "look_ahead.cos: expected 1..4 angles for D = 9, got 0"),
    "too many": ((torch.zeros(5), COS), ValueError, "look_ahead.cos: expected 1..4 angles for D = 9, got 5"),
    "fewer sines": ((COS, COS[:1]), ValueError, r"look_ahead.sin: expected shape \[2\], got \[1\]"),
    "strided": ((COS, torch.zeros(4)[::2]), ValueError, "look_ahead.sin: expected stride 1"),
    "no flag": ((COS, COS, "neox"), TypeError, "look_ahead.interleaved: expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_angles_are_refused(case: str, backend: str) -> None:
    ahead, error, message = BAD[case]
    good: dict[str, Any] = {
        "query": torch.zeros(1, 3, 4, 9), "k_cache": torch.zeros(4, 4, 2, 9), "window": 8, "backend": backend,
        "block_tables": torch.arange(4).int()[None], "window_starts": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip
    assert torch.allclose(score_window(**good, look_ahead=(COS, COS)), torch.tensor(1 / 8))
    with pytest.raises(error, match=message):
        score_window(**good, look_ahead=ahead)


@pytest.mark.parametrize(("given", "n", "error", "message"), [
    (torch.zeros(3, 5), 1, ValueError, r"table: expected rows of cosines and sines, got shape \[3, 5\]"),
    (torch.zeros(3), 1, ValueError, r"table: expected shape \[any, any\], got \[3\]"),
    (torch.zeros(3, 4), 3, ValueError, "n: expected .*2, got 3"),
    ([[1.0]], 0, TypeError, "table: expected a tensor, got list"),
])  # fmt: skip
def test_bad_tables_are_refused(given: Any, n: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LookAhead.of_table(given, n)
