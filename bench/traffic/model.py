"""A model of the cost of one compression (event) on GPUs. Nothing in it was measured on a GPU.

    kernel = max(bytes / memory, matrix operations / tensor cores, exponentials / special functions,
                 instructions / issue, shuffles / crossbar, round trips * LATENCY)
    event  = COPY + launches * LAUNCH + scoring + selection + compaction        of one sequence, all layers
    step   = max(bytes / memory, operations / tensor cores) + layers * KERNELS_PER_LAYER * KERNEL_GAP
    share  = (batch / window) * event / step

A sequence is compressed once per ``window`` decoded tokens, because each window starts where the last one ended. Bytes
and operations are exact functions of the shapes. Instructions, shuffles and round trips to memory that wait for each
other were counted by `make traffic`. The sustained shares of the vendors' peaks are assumptions, listed below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bench import tables
from bench.tables import Row
from kara_kernels.engine import Policy, fit_queries
from kara_kernels.ops._tiles import score_config
from kara_kernels.ops._triton import ARCHITECTURES
from kara_kernels.options import PAPER, RECOMMENDED

# ---- assumptions ----------------------------------------------------------------------------------------------------

BANDWIDTH_SHARE = 0.8  # of peak, for streams of whole rows; typical for copies
MATRIX_SHARE = 0.5  # of peak, for tiles of 16 to 64 rows between softmaxes and for decoding's small batches
ISSUE_SHARE = 0.5  # of one instruction per clock and scheduler
LAUNCH = 5e-6  # seconds per launch if nothing hides it; three launches per event
COPY = 5e-6  # seconds for the upload of an event's lengths and block tables, a few KB from pinned memory
LATENCY = 0.6e-6  # seconds of a round trip to memory under load
KERNELS_PER_LAYER, KERNEL_GAP = 10, 2e-6  # of a decode step under a graph
MEMORY_SHARE = 0.9  # of a GPU's memory, for weights and KV cache: vLLM's default
PROMPT = 1024  # tokens before decoding starts
SEQUENCES = 256  # that may run at once, vLLM's default: their recorded queries have to fit the policy's bound

# ---- GPUs: data sheets (bytes/s, dense bf16 FLOP/s, bytes) and architecture white papers (units, clock) -------------


@dataclass(frozen=True)
class Gpu:
    bandwidth: float
    matrix: float
    memory: float
    units: int  # multiprocessors or compute units
    clock: float  # Hz, boost
    target: int | str  # Triton's name
    special: int = 16  # exponentials per clock and unit
    issue: int = 4  # instructions of warps per clock and unit
    lanes: int = 32
    shuffles: float = 1.0  # instructions of warps per clock and unit: CUDA's table of arithmetic throughput


GPUS = {
    "A100": Gpu(2.039e12, 312e12, 80e9, 108, 1.41e9, 80),  # A100 80GB SXM data sheet
    "H100": Gpu(3.35e12, 989e12, 80e9, 132, 1.83e9, 90),  # H100 SXM data sheet
    "H200": Gpu(4.8e12, 989e12, 141e9, 132, 1.83e9, 90),  # H200 SXM data sheet
    "MI300X": Gpu(
        5.3e12, 1307e12, 192e9, 304, 2.1e9, "gfx942", lanes=64, shuffles=4.0
    ),  # MI300X data sheet, CDNA3 paper; lanes exchange by operand modifiers
}

# ---- models: their public configurations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The part of a model that one GPU of a deployment holds."""

    layers: int
    heads: int  # KV heads
    group: int
    dim: int
    v_dim: int
    dense: float  # bytes of weights that every step reads
    operations: float  # per token, of the weights
    experts: float = 0.0  # bytes of all routed experts
    routed: tuple[int, int] = (0, 1)  # experts of a token, of how many
    gpus: int = 1

    @property
    def token_bytes(self) -> int:
        """Bytes per token of the KV cache, bfloat16."""
        return 2 * self.layers * self.heads * (self.dim + self.v_dim)

    @property
    def weights(self) -> float:
        return self.dense + self.experts

    def read(self, batch: int) -> float:
        """Bytes of weights that a step reads. Of the experts, the expected share needed by any token of the batch."""
        used, of = self.routed
        return self.dense + self.experts * (1 - (1 - used / of) ** batch)


MODELS = {
    "Llama-3.1-8B": Model(32, 8, 4, 128, 128, 16.1e9, 2 * 8.03e9),
    "Qwen3-14B": Model(40, 8, 5, 128, 128, 29.5e9, 2 * 14.8e9),
    "Qwen3-32B, TP 2": Model(64, 4, 8, 128, 128, 32.8e9, 32.8e9, gpus=2),
    # 671 GB in fp8, of which 58 layers x 256 experts x 3 x 7168 x 2048; eight GPUs share weights and heads, each holds
    # the whole latent cache.
    "DeepSeek-V3, TP 8": Model(61, 1, 16, 576, 0, 17e9 / 8, 2 * 37e9 / 8, 654e9 / 8, (8, 256), 8),
}


# ---- counts from compiled code --------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A variant of the event: which scores, and from which queries."""

    name: str
    case: str  # the suffix of its case name in traffic.csv
    every_query: bool
    value_norm: bool


WAYS = (  # the first is the default
    Way("recommended, as recorded", "", False, RECOMMENDED["value_norm"] is not False),
    Way("published, every query", ", as published", True, PAPER["value_norm"] is not False),
)


@dataclass(frozen=True)
class Measured:
    """From traffic.csv, by case: warp instructions per logit, and bytes relative to the floor; shuffles per logit, and
    round trips of compaction."""

    per_logit: float
    compulsory: float
    shuffles: float = 0.0
    trips: int = 0

    @classmethod
    def of(cls, rows: list[Row], case: str) -> Measured:
        found = [row for row in rows if row["case"] == case]
        if len(found) != 1:
            raise ValueError(f"expected counts of {case!r}, got {', '.join(row['case'] for row in rows)}")
        [row] = found
        scoring = row["steps"]["scoring"]
        logits = row["matrix_operations"] / row["matrix_ratio"] / 2 / row["dim"]
        trips = row["steps"]["compaction"]["round_trips"]
        return cls(scoring["instructions"] / logits, scoring["compulsory_ratio"], scoring["shuffles"] / logits, trips)


def measured(model: Model, path: Path, way: Way) -> Measured:
    _, rows = tables.read(path)
    return Measured.of(rows, ("Llama-3.1-8B" if model.v_dim else "DeepSeek-V3, latent") + way.case)


# ---- the model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Seconds of one sequence's compression."""

    limits: dict[str, float]
    """What scoring would take if nothing else limited it."""
    selection: float
    compaction: float

    @property
    def scoring(self) -> float:
        return max(self.limits.values())

    @property
    def total(self) -> float:
        return COPY + 3 * LAUNCH + self.scoring + self.selection + self.compaction


def queries(policy: Policy, way: Way, model: Model) -> int:
    """Query rows per KV head: those of the window, or those that the shim records for ``SEQUENCES`` sequences."""
    if way.every_query:
        return policy.window * model.group
    shape = model.layers, model.heads * model.group, model.heads, model.dim
    recorded = fit_queries(policy, *shape, SEQUENCES, torch.bfloat16)
    return recorded.query_rows * recorded.recorded_heads(model.group, 1)


def event(model: Model, gpu: Gpu, policy: Policy, counted: Measured, rows: int, way: Way = WAYS[0]) -> Event:
    """The cost of one event: ``rows`` query rows per KV head score one window, weighted by values if there are any."""
    memory, window, heads = gpu.bandwidth * BANDWIDTH_SHARE, policy.window, model.layers * model.heads
    pairs = "halves" if model.v_dim and not way.every_query else ""  # what looking ahead turns; not latent keys
    config = score_config(window, model.dim, torch.bfloat16, ARCHITECTURES[gpu.target], pairs, not way.every_query)
    passes = 1 if config.whole else 2
    values = model.v_dim if way.value_norm else 0
    query_bytes = 2 * model.dim if way.every_query else model.dim // 2 + 2
    tiles = -(-rows // config.rows) + bool(values)
    partials = heads * tiles * window * 4
    logits = heads * rows * window * passes
    read = heads * (rows * query_bytes + 2 * window * (model.dim + values)) + partials
    clocks = gpu.units * gpu.clock
    # Programs of a row tile run in parallel. If there are fewer than units, units stay idle.
    busy = min(1.0, heads * tiles / gpu.units)
    # Instructions were counted on sm_80 for the target's own number of passes. Warps of 64 lanes need half as many.
    of_warps = heads * rows * window * 32 / gpu.lanes
    limits = {
        "memory": read * counted.compulsory / memory,
        "matrix": 2 * logits * model.dim / (gpu.matrix * MATRIX_SHARE * busy),
        "exponentials": logits / (gpu.special * clocks * busy),
        "instructions": counted.per_logit * of_warps / (gpu.issue * clocks * ISSUE_SHARE * busy),
        "shuffles": counted.shuffles * of_warps / (gpu.shuffles * clocks * busy),
    }
    selection = (partials + heads * 4 * (window + policy.keep)) / memory
    moved = heads * (policy.keep + policy.tail) * (model.dim + model.v_dim) * 2
    return Event(limits, selection, max(2 * moved / memory, counted.trips * LATENCY))


def step(model: Model, gpu: Gpu, batch: float, context: float) -> float:
    """Seconds per decode step of ``batch`` sequences with ``context`` rows each."""
    bytes_ = model.read(round(batch)) + batch * context * model.token_bytes
    attention = 4 * model.layers * model.heads * model.group * model.dim * context
    operations = batch * (model.operations + attention)
    overhead = model.layers * KERNELS_PER_LAYER * KERNEL_GAP
    return max(bytes_ / (gpu.bandwidth * BANDWIDTH_SHARE), operations / (gpu.matrix * MATRIX_SHARE)) + overhead


def room(model: Model, gpu: Gpu) -> float:
    """Bytes left for the KV cache. Negative if the weights do not fit."""
    return gpu.memory * MEMORY_SHARE - model.weights


def share(model: Model, gpu: Gpu, policy: Policy, cost: Event, batch: int, context: int) -> float:
    """The amortised share of decode time."""
    return batch / policy.window * cost.total / step(model, gpu, batch, context)


def rows_held(policy: Policy | None, generated: int) -> float:
    """Physical rows of a sequence, averaged over its life of ``generated`` decoded tokens."""
    if policy is None:
        return PROMPT + generated / 2
    waiting = policy.window / 2 + policy.tail  # not yet compressed, on average
    return PROMPT + waiting + max(0.0, generated / 2 - waiting) * policy.keep / policy.window


def throughput(
    model: Model, gpu: Gpu, policy: Policy | None, cost: Event | None, generated: int, most: int = 512
) -> tuple[int, float] | None:
    """(concurrent sequences, tokens per second of the deployment) if memory is the limit. None if nothing fits."""
    held = rows_held(policy, generated)
    batch = min(most, int(room(model, gpu) // (held * model.token_bytes)))
    if batch < 1:
        return None
    seconds = step(model, gpu, batch, held)
    if policy is not None and cost is not None:
        seconds += batch / policy.window * cost.total
    return batch, batch / seconds
