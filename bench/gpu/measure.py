"""Cases, correctness, and times of kernels and whole events."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import baselines
from kara_kernels import PagedCache, compress_window
from kara_kernels.ops import compact_blocks, expand_chunks, score_window

ROOT = Path(__file__).parents[2]
TAIL, PAGE = 128, 16
L2_FALLBACK = 256 << 20  # bytes, where a device does not tell: more than any has
SCHEMA = 1


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
    """Inputs of one event. Replays restore nothing: rows that moved once move again, the same bytes either way."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)
        blocks = -(-(case.window + TAIL) // PAGE) * case.batch

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        shape = (case.layers, blocks, PAGE, case.heads, case.dim)
        self.case, self.keep = case, case.window // 2
        self.cache = PagedCache(random(*shape), random(*shape) if case.values else None)
        self.query = random(case.layers, case.batch, case.window, case.heads * case.group, case.dim)
        self.tables = torch.randperm(blocks, generator=generator, device=device).int().view(case.batch, -1)
        self.lengths = torch.full((case.batch,), case.window + TAIL, dtype=torch.int32, device=device)
        self.starts = torch.zeros(case.batch, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        halves = [self.cache.k, *([self.cache.v] if self.cache.v is not None else [])]
        return sum(t.nbytes for half in halves for t in half) + self.query.nbytes

    def jobs(self, backend: str) -> dict[str, Callable[[], object]]:
        case, cache, keep = self.case, self.cache, self.keep
        scores = score_window(self.query, cache.k, self.tables, self.starts, case.window, backend=backend)
        budget = round(0.3 * keep)
        kept = expand_chunks(scores, keep, budget, 8, backend=backend)
        given: dict[str, Any] = {
            "window": case.window, "keep": keep, "window_starts": self.starts, "backend": backend,
        }  # fmt: skip
        jobs: dict[str, Callable[[], object]] = {
            "event": lambda: compress_window(self.query, cache.k, cache.v, self.tables, self.lengths, **given),
            "score": lambda: score_window(self.query, cache.k, self.tables, self.starts, case.window, backend=backend),
            "select": lambda: expand_chunks(scores, keep, budget, 8, backend=backend),
            "compact": lambda: compact_blocks(cache.k, cache.v, self.tables, self.starts, self.lengths, kept,
                                              case.window, backend=backend),
        }  # fmt: skip
        if cache.v is not None:
            values = list(cache.v)
            for name, scorer in (("predecessor", baselines.mean_attention), ("r-kv", baselines.rkv),
                                 ("snapkv", baselines.snapkv)):  # fmt: skip
                jobs[name] = lambda scorer=scorer: baselines.compress(  # type: ignore[misc]
                    scorer, list(self.query), list(cache.k), values, self.tables, self.starts, self.lengths,
                    case.window, keep,
                )  # fmt: skip
        return jobs


def floor_bytes(case: Case, size: int = 2) -> dict[str, int]:
    """What must move: queries and keys once; survivors and tail of each cache read and written once."""
    lists = case.layers * case.batch * case.heads
    rows = lists * (case.window // 2 + TAIL) * case.dim * (2 if case.values else 1)
    return {
        "score": lists * case.dim * size * case.window * (case.group + 1),
        "compact": 2 * rows * size,
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, and the values that a tenth of the samples lie below and above."""
    if len(seconds) < 2:
        return dict.fromkeys(("low", "median", "high"), seconds[0])
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"low": tenths[0], "median": statistics.median(seconds), "high": tenths[-1]}


def suite_is_green() -> str | None:
    """Runs the GPU tests; what is wrong, or None. Nothing run is wrong too."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode or "passed" not in last:
        return f"tests/test_gpu.py: {last}"
    return None


def differs_from_reference(world: World) -> str | None:
    """What of a Triton event is not the PyTorch path's, given the same scores; None where nothing is."""
    cache = world.cache
    given: dict[str, Any] = {"window": world.case.window, "keep": world.keep, "window_starts": world.starts}
    halves = [cache.k, *([cache.v] if cache.v is not None else [])]
    before = [half.stacked.clone() for half in halves if half.stacked is not None]
    kernel = compress_window(world.query, cache.k, cache.v, world.tables, world.lengths, backend="triton", **given)
    moved = [half.stacked.clone() for half in halves if half.stacked is not None]
    for half, old in zip(halves, before, strict=True):
        assert half.stacked is not None
        half.stacked.copy_(old)
    twin = compress_window(world.query, cache.k, cache.v, world.tables, world.lengths, backend="torch",
                           scores=kernel.scores.contiguous(), **given)  # fmt: skip
    if not torch.equal(kernel.keep_indices, twin.keep_indices):
        return "keep lists"
    if not all(torch.equal(a, half.stacked) for a, half in zip(moved, halves, strict=True)):  # type: ignore[arg-type]
        return "moved rows"
    return None


def measure(case: Case, device: str, rounds: int, l2: int) -> dict[str, Any]:
    """Samples of every job. On a GPU each is captured once per world; worlds rotate so that none is in L2 twice."""
    gpu = device != "cpu"
    worlds = [World(case, device, torch.bfloat16 if gpu else torch.float32)]
    while gpu and sum(world.bytes for world in worlds) < 3 * l2:
        worlds.append(World(case, device, torch.bfloat16))
    if gpu and (wrong := differs_from_reference(worlds[0])):
        raise RuntimeError(f"{case.label}: {wrong} differ from the PyTorch path's")
    times: dict[str, dict[str, Any]] = {}
    jobs = [world.jobs("triton" if gpu else "torch") for world in worlds]
    for name in jobs[0]:
        graphed = False
        runs = [job[name] for job in jobs]
        if gpu and name in ("event", "score", "select", "compact"):
            runs, graphed = [_graph(run) for run in runs], True
        samples = [_seconds(runs[i % len(runs)], gpu) for i in range(rounds + len(runs))][len(runs) :]
        times[name] = {**quantiles(samples), "graph": graphed}
    size = 2 if gpu else 4
    return {**asdict(case), "case": case.label, "buffers": len(worlds), "times": times,
            "floor_bytes": floor_bytes(case, size)}  # fmt: skip


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
    """Bytes per second, read and written, of a plain copy of 512 MB (on a CPU 16 MB)."""
    gpu = device != "cpu"
    source = torch.zeros((512 if gpu else 16) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = [_seconds(lambda: target.copy_(source), gpu) for _ in range(rounds + 1)][1:]
    return 2 * source.nbytes / statistics.median(samples)


def machine(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
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
        facts |= {"device": properties.name, "cuda": torch.version.cuda, "hip": torch.version.hip,
                  "driver": driver.strip().splitlines()[0] if driver.strip() else "unknown"}  # fmt: skip
    else:
        facts |= {"device": "CPU"}
    return facts


def _has(tool: str) -> bool:
    import shutil

    return shutil.which(tool) is not None


def l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or L2_FALLBACK
