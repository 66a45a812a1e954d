"""Cases, correctness, and times of kernels and whole events."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import baselines
from bench.tables import Row
from kara_kernels import CompressedWindow, LookAhead, PackedQueries, PagedCache, compress_window
from kara_kernels.engine import Policy, fit_queries
from kara_kernels.ops import compact_blocks, expand_chunks, score_window
from kara_kernels.options import PAPER, RECOMMENDED, split_options

ROOT = Path(__file__).parents[2]
TAIL, PAGE = Policy().tail, 16
MOST_QUERIES = 8 << 30  # bytes; DeepSeek-V3's 128 query heads need 147 GB at batch 32
L2_FALLBACK = 256 << 20  # bytes, if a device does not report it; larger than any L2 cache
SCHEMA = 2


@dataclass(frozen=True)
class Case:
    name: str
    layers: int
    heads: int
    group: int
    dim: int
    window: int
    batch: int
    values: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}, W {self.window}, batch {self.batch}"

    @property
    def policy(self) -> Policy:
        """What the shim records by default, within its default bound of memory."""
        policy = Policy(window=self.window, keep=self.window // 2)
        shape = self.layers, self.heads * self.group, self.heads, self.dim
        return fit_queries(policy, *shape, self.batch, torch.bfloat16)

    @property
    def recorded(self) -> int:
        """Query rows per KV head and sequence that the shim records by default."""
        return self.policy.query_rows * self.policy.recorded_heads(self.group, 1)


SHAPES = {
    "Llama-3.1-8B": (32, 8, 4, 128), "Qwen3-14B": (40, 8, 5, 128), "SmolLM2": (30, 3, 3, 64),
    "DeepSeek-V3": (61, 1, 128, 576),
}  # fmt: skip
CASES = [
    Case(name, *shape, window, batch, values=name != "DeepSeek-V3")
    for name, shape in SHAPES.items() for window in (256, 512) for batch in (1, 8, 32)
]  # fmt: skip
REHEARSAL = [Case("tiny", 2, 2, 2, 64, 64, 1), Case("tiny", 2, 2, 2, 64, 128, 2)]


class World:
    """Inputs of one compression. Replays do not restore the cache: rows that moved once move again, with equal bytes.

    There are two sets of queries: those that the engine shim records by default, in a ring whose rows are read in
    place, and those of every token and head in 16 bits, unless they exceed ``MOST_QUERIES``.
    """

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)
        blocks = -(-(case.window + TAIL) // PAGE) * case.batch

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        shape = (case.layers, blocks, PAGE, case.heads, case.dim)
        self.case, self.keep = case, case.window // 2
        self.cache = PagedCache(random(*shape), random(*shape) if case.values else None)
        self.tables = torch.randperm(blocks, generator=generator, device=device).int().view(case.batch, -1)
        self.lengths = torch.full((case.batch,), case.window + TAIL, dtype=torch.int32, device=device)
        self.starts = torch.zeros(case.batch, dtype=torch.int32, device=device)
        rows = case.batch * case.policy.query_rows
        heads = case.recorded // case.policy.query_rows * case.heads
        self.ring = PackedQueries(
            torch.randint(256, (case.layers, rows, heads, case.dim // 2), generator=generator, device=device).byte(),
            random(case.layers, rows, heads).abs().to(torch.bfloat16),
        )
        angle = torch.arange(case.dim // 2, device=device).float()
        # Latent keys have their rotary dimensions last, where queries are not turned ahead.
        self.ahead = LookAhead(angle.cos(), angle.sin()) if case.values else None
        self.ring_rows = torch.randperm(rows, generator=generator, device=device).int().view(case.batch, -1)
        every = (case.layers, case.batch, case.window, case.heads * case.group, case.dim)
        self.every = random(*every) if math.prod(every) * dtype.itemsize <= MOST_QUERIES else None

    @property
    def bytes(self) -> int:
        """The minimum bytes that a compression reads."""
        halves = [self.cache.k, *([self.cache.v] if self.cache.v is not None else [])]
        return sum(t.nbytes for half in halves for t in half) + self.ring.nbytes

    def event(self, backend: str, paper: bool = False, scores: torch.Tensor | None = None) -> CompressedWindow:
        query, rows = (self.every, None) if paper else (self.ring, self.ring_rows)
        return compress_window(
            query if scores is None else None, self.cache.k, self.cache.v, self.tables, self.lengths,
            window=self.case.window, keep=self.keep, window_starts=self.starts, scores=scores,
            query_rows=rows if scores is None else None, look_ahead=None if paper else self.ahead, backend=backend,
            **(PAPER if paper else RECOMMENDED),
        )  # fmt: skip

    def overlapping(self, backend: str) -> CompressedWindow:
        """The event with programmatic dependent launch, where the GPU has it."""
        self.cache.events.clear()  # launches that were kept without it
        with mock.patch.dict(os.environ, KARA_KERNELS_PDL="1"):
            done = self.event(backend)
        self.cache.events.clear()
        return done

    def score(self, backend: str, paper: bool = False) -> torch.Tensor:
        query, rows = (self.every, None) if paper else (self.ring, self.ring_rows)
        assert query is not None
        scoring, _ = split_options(PAPER if paper else RECOMMENDED)
        return score_window(
            query, self.cache.k, self.tables, self.starts, self.case.window, query_rows=rows, backend=backend,
            attention=scoring.attention, reduction=scoring.reduction, redundancy=scoring.redundancy,
            v_cache=None if scoring.value_norm is False else self.cache.v, look_ahead=None if paper else self.ahead,
        )  # fmt: skip

    def jobs(self, backend: str) -> dict[str, Callable[[], object]]:
        """The recommended method first, then the published one and others, all with the queries of every token."""
        cache, keep = self.cache, self.keep
        _, selection = split_options(RECOMMENDED)
        scores, budget = self.score(backend), selection.chunk_budget(keep)

        def select() -> torch.Tensor:
            return expand_chunks(scores, keep, budget, selection.max_chunk, backend=backend)

        kept = select()
        jobs: dict[str, Callable[[], object]] = {
            "event": partial(self.event, backend),
            "score": partial(self.score, backend),
            "select": select,
            "compact": partial(compact_blocks, cache.k, cache.v, self.tables, self.starts, self.lengths, kept,
                               self.case.window, backend=backend),
            "overlapping": partial(self.overlapping, backend),
        }  # fmt: skip
        if self.every is None:
            return jobs
        jobs |= {
            "paper's event": partial(self.event, backend, paper=True),
            "paper's score": partial(self.score, backend, paper=True),
        }
        if cache.v is not None:
            given = (list(self.every), list(cache.k), list(cache.v), self.tables, self.starts, self.lengths,
                     self.case.window, keep)  # fmt: skip
            for name, scorer in (("predecessor", baselines.mean_attention), ("r-kv", baselines.rkv),
                                 ("snapkv", baselines.snapkv)):  # fmt: skip
                jobs[name] = partial(baselines.compress, scorer, *given)
        return jobs


EAGER_ROUNDS = 5  # an eager job is run in every fifth round: it has hundreds of launches
GRAPHED = ("event", "overlapping", "score", "select", "compact", "paper's event", "paper's score")


def floor_bytes(case: Case, size: int = 2) -> dict[str, int]:
    """Bytes that must move: queries, keys and weighting values once; survivors and tail read once and written once."""
    lists = case.layers * case.batch * case.heads
    rows = lists * (case.window // 2 + TAIL) * case.dim * (2 if case.values else 1)
    return {
        "score": lists
        * (case.recorded * (case.dim // 2 + 2) + case.dim * size * case.window * (2 if case.values else 1)),
        "paper's score": lists * case.dim * size * case.window * (case.group + 1),
        "compact": 2 * rows * size,
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 10 % and 90 % quantiles."""
    if len(seconds) < 2:
        return dict.fromkeys(("low", "median", "high"), seconds[0])
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"low": tenths[0], "median": statistics.median(seconds), "high": tenths[-1]}


def suite_is_green() -> str | None:
    """Runs the GPU tests. Returns what failed, or None. It is a failure if no test ran."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode or "passed" not in last:
        return f"tests/test_gpu.py: {last}"
    return None


def differs_from_reference(world: World) -> str | None:
    """What differs between the Triton and PyTorch paths given the same scores. None if nothing does."""
    for paper in (False, True) if world.every is not None else (False,):
        halves = [world.cache.k, *([world.cache.v] if world.cache.v is not None else [])]
        pools = [half.stacked for half in halves if half.stacked is not None]
        before = [pool.clone() for pool in pools]
        kernel = world.event("triton", paper)
        moved = [pool.clone() for pool in pools]
        for pool, old in zip(pools, before, strict=True):
            pool.copy_(old)
        twin = world.event("torch", paper, scores=kernel.scores.contiguous())
        if not torch.equal(kernel.keep_indices, twin.keep_indices):
            return "keep lists"
        if not all(torch.equal(a, b) for a, b in zip(moved, pools, strict=True)):
            return "moved rows"
    return None


def measure(case: Case, device: str, rounds: int, l2: int) -> Row:
    """Samples of every job, in turns, so that a slow moment of the machine affects all of them. On a GPU each job is
    captured once per world. Worlds rotate so that no data stays in L2 between runs."""
    gpu = device != "cpu"
    worlds = [World(case, device, torch.bfloat16 if gpu else torch.float32)]
    while gpu and sum(world.bytes for world in worlds) < 3 * l2:
        worlds.append(World(case, device, torch.bfloat16))
    if gpu and (wrong := differs_from_reference(worlds[0])):
        raise RuntimeError(f"{case.label}: {wrong} differ from the PyTorch path's")
    jobs = [world.jobs("triton" if gpu else "torch") for world in worlds]
    graphed = {name: gpu and name in GRAPHED for name in jobs[0]}
    runs = {name: [_graph(job[name]) if graphed[name] else job[name] for job in jobs] for name in graphed}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + len(worlds)):  # the first turn of every world loads code and memory
        for name, run in runs.items():
            if gpu and not graphed[name] and max(0, round_ - len(worlds)) % EAGER_ROUNDS:
                continue
            seconds = _seconds(run[round_ % len(run)], gpu)
            if round_ >= len(worlds):
                samples[name].append(seconds)
    if gpu:
        samples["call"], graphed["call"] = _calls(jobs[0]["event"], rounds), False
    times = {name: {**quantiles(samples[name]), "graph": graphed[name]} for name in samples}
    return {**asdict(case), "case": case.label, "recorded": case.recorded, "buffers": len(worlds), "times": times,
            "floor_bytes": floor_bytes(case, 2 if gpu else 4)}  # fmt: skip


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _calls(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds until the host may go on: checks, allocation and launches, with nothing queued before."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return samples


def _seconds(run: Callable[[], object], gpu: bool) -> float:
    if not gpu:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: str, rounds: int) -> float:
    """Bytes per second, read plus written, of a plain copy of 512 MB (16 MB on a CPU)."""
    gpu = device != "cpu"
    source = torch.zeros((512 if gpu else 16) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = [_seconds(lambda: target.copy_(source), gpu) for _ in range(rounds + 1)][1:]
    return 2 * source.nbytes / statistics.median(samples)


def machine(device: str) -> dict[str, Any]:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    facts: dict[str, Any] = {"torch": torch.__version__, "commit": commit or "unknown"}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "none"
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True).stdout if _has("nvidia-smi") else ""  # fmt: skip
        facts |= {"device": properties.name, "cuda": f"CUDA {torch.version.cuda}", "hip": torch.version.hip,
                  "driver": driver.strip().splitlines()[0] if driver.strip() else "unknown"}  # fmt: skip
    else:
        facts |= {"device": "CPU"}
    return facts


def _has(tool: str) -> bool:
    import shutil

    return shutil.which(tool) is not None


def l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or L2_FALLBACK
