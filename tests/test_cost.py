"""Limits on time and memory of the PyTorch path. Run alone, because other load on the machine would be measured too."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kara_kernels import PagedCache, compress_window

ROOT = Path(__file__).parents[1]


def smollm2() -> dict[str, int]:
    """The demo's model as `transformers` builds it; its weights do not matter for the time of a step."""
    return {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }


def alternate(rounds: int, *jobs: Callable[[], object]) -> list[float]:
    """Seconds of each job in its fastest round. Jobs take turns, so that a slow machine affects all of them."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds):
        for job, times in zip(jobs, seconds, strict=True):
            began = time.perf_counter()
            job()
            times.append(time.perf_counter() - began)
    return [min(times) for times in seconds]


def test_an_event_costs_at_most_two_decode_steps() -> None:
    """All 30 layers, 9 query heads, 3 KV heads, D 64, W 256, K 128, float32, one sequence; steps of batch 1.

    A compression is limited by computation and a step by memory, so another program on the same core can double the
    time of one and not affect the other. Disturbance only adds time, so the best of several rounds counts.
    """
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**smollm2())).eval()
    cache = transformers.DynamicCache()
    layers, heads, dim, page, window = 30, 3, 64, 16, 256
    pools = [[torch.randn(heads, 40, page, dim).permute(1, 2, 0, 3) for _ in range(layers)] for _ in range(2)]
    paged = PagedCache(*pools)
    query = torch.randn(layers, 1, window, 9, dim)
    table = torch.arange(40, dtype=torch.int32)[None]
    lengths = torch.tensor([64 + window + 64], dtype=torch.int32)
    starts = torch.tensor([64], dtype=torch.int32)
    token = torch.tensor([[7]])

    def step() -> None:
        model(token, past_key_values=cache)

    def event() -> None:
        compress_window(query, paged.k, paged.v, table, lengths, window=window, keep=128, window_starts=starts)

    with torch.inference_mode():
        model(torch.randint(1000, (1, 384)), past_key_values=cache)
        alternate(2, step, event)
        of_step, of_event = alternate(15, step, event)
        for _ in range(8):
            if of_event <= of_step:
                break
            time.sleep(5)
            of_step, of_event = map(min, (of_step, of_event), alternate(10, step, event))
    print(f"\ndecode step {of_step * 1e3:.1f} ms, event {of_event * 1e3:.1f} ms, {of_event / of_step:.2f} steps")
    assert of_event <= 2 * of_step


@dataclass
class Large:
    """A call whose obvious implementation would exceed the memory limit by far."""

    sequences: int = 1
    queries: int = 8
    group: int = 1
    dim: int = 128
    window: int = 256
    tail: int = 0
    layers: int = 1
    pool: str = "head"


LARGE = {
    "wide window, many queries": Large(queries=300, group=8, window=4096),
    "long tail": Large(tail=100_000),
    "many rows": Large(sequences=300, queries=1, dim=2, layers=36),
    "many pooled rows": Large(sequences=500, queries=1, dim=4, layers=36, pool="model"),
    "many sequences": Large(sequences=300, dim=64, window=128, tail=64),
}

CHILD = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
from test_cost import large_call
call = large_call({name!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = call()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
owned = sum(t.untyped_storage().nbytes() for t in result)
print((after - before) * 1024 - owned)
"""


def large_call(name: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The call, with all its inputs made and touched."""
    large, heads, page = LARGE[name], 8, 64
    blocks = -(-(large.window + large.tail) // page)

    def pool() -> list[torch.Tensor]:
        return [torch.ones(blocks * large.sequences, page, heads, large.dim) for _ in range(large.layers)]

    paged = PagedCache(pool(), pool())
    query = torch.ones(large.layers, large.sequences, large.queries, heads * large.group, large.dim)
    table = torch.arange(blocks * large.sequences, dtype=torch.int32).view(large.sequences, blocks)
    lengths = torch.full((large.sequences,), large.window + large.tail, dtype=torch.int32)
    starts = torch.zeros(large.sequences, dtype=torch.int32)
    torch.ones(512, 512) @ torch.ones(512, 512)  # the matrix library's own buffers

    def call() -> tuple[torch.Tensor, ...]:
        return compress_window(
            query, paged.k, paged.v, table, lengths,
            window=large.window, keep=large.window // 2, window_starts=starts, pool=large.pool,
        )  # fmt: skip

    return call


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("name", LARGE)
def test_extra_memory_stays_below_256_megabytes(name: str) -> None:
    """Peak resident memory of a new process, minus the results."""
    child = CHILD.format(tests=str(Path(__file__).parent), name=name)
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True, check=True)
    extra = int(done.stdout)
    print(f"\n{name}: {extra / 2**20:.0f} MB")
    assert extra <= 256 << 20
