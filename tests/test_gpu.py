"""Tests that need a GPU: the kernels run there as designed. Skipped without one. Run with TRITON_INTERPRET=0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from kara_kernels import CompressedWindow, PagedCache, compress_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(INTERPRETED, reason="compiled kernels: run with TRITON_INTERPRET=0"),
]

LAYERS, SEQUENCES, HEADS, GROUP, WINDOW, PAGE = 4, 3, 2, 4, 256, 16


class Engine:
    """Pools, tables and queries of a small engine on the GPU. Small integers make products exact."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> None:
        blocks = 32 * SEQUENCES

        def pools() -> list[torch.Tensor]:
            return [torch.randint(-2, 3, (blocks, PAGE, HEADS, dim), device="cuda").to(dtype) for _ in range(LAYERS)]

        self.cache = PagedCache(pools(), pools())
        self.query = torch.randint(-2, 3, (LAYERS, SEQUENCES, WINDOW, HEADS * GROUP, dim), device="cuda").to(dtype)
        self.tables = torch.randperm(blocks, device="cuda").int().view(SEQUENCES, -1)
        self.lengths = torch.tensor([WINDOW + 150, WINDOW, WINDOW - 1], dtype=torch.int32, device="cuda")
        self.starts = torch.tensor([100, 0, 0], dtype=torch.int32, device="cuda")

    def compress(self, **options: Any) -> CompressedWindow:
        return compress_window(
            self.query, self.cache.k, self.cache.v, self.tables, self.lengths,
            window=WINDOW, keep=100, window_starts=self.starts, **options,
        )  # fmt: skip

    def contents(self) -> list[torch.Tensor]:
        assert self.cache.v is not None
        return [tensor.clone() for tensor in (*self.cache.k, *self.cache.v)]

    def restore(self, contents: list[torch.Tensor]) -> None:
        assert self.cache.v is not None
        for tensor, before in zip((*self.cache.k, *self.cache.v), contents, strict=True):
            tensor.copy_(before)


@pytest.fixture
def strict() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pool", ["head", "layer", "model"])
def test_gpu_and_reference_agree(dtype: torch.dtype, pool: str) -> None:
    engine = Engine(dtype)
    before = engine.contents()
    gpu = engine.compress(pool=pool)
    moved = engine.contents()
    engine.restore(before)
    twin = engine.compress(pool=pool, scores=gpu.scores.contiguous(), backend="torch")
    assert torch.equal(gpu.keep_indices, twin.keep_indices)
    assert torch.equal(gpu.seq_lens, twin.seq_lens)
    assert all(torch.equal(a, b) for a, b in zip(moved, engine.contents(), strict=True))
    engine.restore(before)
    assert torch.allclose(gpu.scores, engine.compress(pool=pool, backend="torch").scores, atol=1e-6)


def test_the_same_bits_every_time() -> None:
    engine = Engine()
    before = engine.contents()
    first = engine.compress(redundancy=1.0)
    for _ in range(20):
        engine.restore(before)
        assert all(torch.equal(a, b) for a, b in zip(first, engine.compress(redundancy=1.0), strict=True))


def test_no_synchronisation(strict: None) -> None:
    engine = Engine()
    torch.cuda.set_sync_debug_mode("default")
    engine.compress()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    engine.compress()


@pytest.mark.parametrize("pool", ["head", "model"])
def test_a_cuda_graph_replays_it(pool: str) -> None:
    engine = Engine()
    before = engine.contents()
    expected = engine.compress(pool=pool)  # also compiles and uploads the address tables
    moved = engine.contents()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = engine.compress(pool=pool)
    engine.restore(before)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moved, engine.contents(), strict=True))


def test_nothing_compiles_after_a_warm_up_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call has lengths of zero, so it skips every sequence and compiles every kernel."""
    from triton.compiler.compiler import CompiledKernel

    engine = Engine()
    lengths, starts = engine.lengths.clone(), engine.starts.clone()
    engine.lengths.zero_()
    engine.starts.zero_()
    engine.compress()
    torch.cuda.synchronize()
    monkeypatch.setattr(CompiledKernel, "__init__", lambda *arguments: pytest.fail("compiled after the warm-up"))
    engine.lengths.copy_(lengths)
    engine.starts.copy_(starts)
    engine.compress()
    engine.query = engine.query[:, :, :200].contiguous()
    engine.compress()


def test_torch_compile_makes_one_graph_of_it() -> None:
    engine = Engine()
    cache = [torch.stack(list(half)) for half in (engine.cache.k, engine.cache.v or ())]
    twin = [half.clone() for half in cache]

    def step(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> CompressedWindow:
        return compress_window(
            query * 1, k, v, engine.tables, engine.lengths, window=WINDOW, keep=100, window_starts=engine.starts
        )

    expected = step(engine.query, *cache)
    result = torch.compile(step, fullgraph=True)(engine.query, *twin)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cache, twin, strict=True))


def test_the_operator_is_what_it_says() -> None:
    engine = Engine()
    k, v = (torch.stack(list(half)) for half in (engine.cache.k, engine.cache.v or ()))
    torch.library.opcheck(
        torch.ops.kara_kernels.compress_window.default, (engine.query, k, v, engine.tables, engine.lengths),
        {"window": WINDOW, "keep": 100, "scores": None, "window_starts": engine.starts, "protected_lens": None,
         "chunk_fraction": 0.3, "max_chunk": 8, "attention": "bidirectional", "reduction": "mean", "value_norm": False,
         "pool": "head", "redundancy": 0.0, "scale": None, "k_scale": None, "k_scales": None, "backend": "auto"},
    )  # fmt: skip
