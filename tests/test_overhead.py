"""Host overhead of a call of compress_window: checks, allocation and launch, for 36 layers.

The whole call is timed and shown. The limit of 60 us applies to the library's part, the call without its three
launches. Triton's own handling of a launch takes about 18 us in Python, which callers cannot change. The launcher does
nothing here, so the driver's time to enqueue a kernel is not included. Run alone, with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import timeit

import pytest
import torch
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("times compiled launches: TRITON_INTERPRET=0", allow_module_level=True)

from pytest_benchmark.fixture import BenchmarkFixture

from bench.compile_only import compiling_for
from kara_kernels import PagedCache, compress_window

LAYERS, SEQUENCES, HEADS, GROUP, DIM, WINDOW, PAGE = 36, 4, 8, 4, 128, 256, 16
GOAL = 60e-6  # seconds


def test_host_overhead_of_a_call(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = SEQUENCES * (WINDOW // PAGE)
    pools = [[torch.zeros(blocks, PAGE, HEADS, DIM, dtype=torch.bfloat16) for _ in range(LAYERS)] for _ in range(2)]
    cache = PagedCache(*pools)
    query = torch.zeros(LAYERS, SEQUENCES, WINDOW, HEADS * GROUP, DIM, dtype=torch.bfloat16)
    tables = torch.arange(blocks, dtype=torch.int32).view(SEQUENCES, -1)
    lengths = torch.full((SEQUENCES,), WINDOW, dtype=torch.int32)
    # Contents are checked on the CPU but not on a GPU, and this test times GPU calls.
    monkeypatch.setattr("kara_kernels.windows.request.contents_are_checked", lambda device: False)

    def call() -> None:
        compress_window(query, cache.k, cache.v, tables, lengths, window=WINDOW, keep=WINDOW // 2, backend="triton")

    with compiling_for("sm_90"):
        call()  # compiles
        benchmark.pedantic(call, rounds=200, iterations=5, warmup_rounds=20)
        for launch in ("launch_score", "launch_keep", "launch_compact"):
            monkeypatch.setattr(f"kara_kernels.windows.run.{launch}", lambda *arguments: None)
        own = min(timeit.repeat(call, number=20, repeat=200)) / 20
    whole = benchmark.stats.stats
    told = f"own {1e6 * own:.1f} us; whole call {1e6 * whole.min:.1f} us at least, {1e6 * whole.median:.1f} us median"
    print("\n" + told)
    # Other load only adds time, so the fastest round is the cost.
    assert own < GOAL, told
