"""``python -m bench.gpu --packets``: how long contexts take between a GPU's cache and packets in the host's memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import tables
from bench.tables import Row
from demos.screen import Screen
from kara_kernels import PagedCache, PayloadLayout
from kara_kernels.contexts.codec import decode, encode
from kara_kernels.contexts.packet import Header, read_packet
from kara_kernels.integrations.vllm.contexts.jobs import Load, Store
from kara_kernels.integrations.vllm.contexts.worker import ContextWorker
from kara_kernels.payload import FORMS

GRAIN = 256 << 10  # bytes, as in vLLM by default
PARTS = ("store", "encode", "copy out", "load", "copy in", "verify", "decode")
EXPLAINED = (
    "Milliseconds, medians. *Store* and *load* are whole jobs of the thread that serves vLLM, over memory in pieces of "
    "256 KiB. *Encode* includes checksums, and *verify* computes them again. *Copy out* and *copy in* are plain copies "
    "of a packet's bytes to and from pinned memory."
)


def measure(shape: tuple[int, int, int, int], tokens: int, form: str, device: str, rounds: int) -> Row:
    """``shape``: layers, KV heads, head dimension and block size."""
    layers, heads, dim, page = shape
    blocks = tokens // page
    pools = [torch.randn(2 * blocks, page, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(2 * layers)]
    cache = PagedCache(pools[:layers], pools[layers:])
    there, here = torch.randperm(2 * blocks, device=device).int().split(blocks)
    layout = PayloadLayout(**PayloadLayout.shape_of(cache), tokens=tokens, rows=tokens, form=form, places=False)
    step = Header("model", "context", layout).steps[-1]
    region = torch.zeros(-(-step.nbytes // GRAIN), GRAIN, dtype=torch.uint8, pin_memory=device == "cuda")
    worker, grains = ContextWorker(cache, region, "model"), range(len(region))
    of_table = there.tolist(), here.tolist()

    def store() -> None:
        worker.submit(Store(0, "a", "context", tokens, of_table[0], grains, form, "", step.sections))
        _ended(worker)

    def load() -> None:
        worker.submit(Load(1, "b", "context", tokens, of_table[1], grains, step.nbytes, form, tokens))
        _ended(worker)

    def encoded() -> object:
        return encode(cache.k, cache.v, there, tokens, model="model", context="context", form=form, to_cpu=False)

    store()
    load()
    if form == "exact" and any(not torch.equal(pool[there.long()], pool[here.long()]) for pool in pools):
        raise RuntimeError(f"{form}, {tokens} tokens: rows changed on the way")
    data, packed = worker._read(grains, step.nbytes), region.view(-1)[: step.nbytes]
    packet = read_packet(data)
    jobs: dict[str, Callable[[], object]] = {
        "store": store, "encode": encoded, "copy out": lambda: packed.copy_(data, non_blocking=True), "load": load,
        "copy in": lambda: data.copy_(packed, non_blocking=True), "verify": lambda: read_packet(data),
        "decode": lambda: decode(packet, cache.k, cache.v, here),
    }  # fmt: skip
    times = {name: _milliseconds(job, device, rounds) for name, job in jobs.items()}
    worker.shutdown()
    return {"tokens": tokens, "form": form, "bytes": step.nbytes} | times


def _ended(worker: ContextWorker) -> None:
    while not (ended := worker.ended()):
        time.sleep(1e-4)
    if not ended[0][1].ok:
        raise RuntimeError(f"a job failed: {ended[0][1]}")


def _milliseconds(job: Callable[[], object], device: str, rounds: int) -> float:
    samples = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(samples[1:]), 3)


def run(folder: Path, device: str, head: Row, rounds: int) -> None:
    """Writes ``packets.csv`` and ``packets.md``, with progress."""
    shape, lengths = ((32, 8, 128, 16), (4096, 16384)) if device == "cuda" else ((2, 2, 64, 16), (256, 512))
    cases, rows = [(tokens, form) for tokens in lengths for form in FORMS], []
    with Screen().phase({}, "packets", len(cases), "cases") as advance:
        for tokens, form in cases:
            rows.append(measure(shape, tokens, form, device, rounds))
            tables.write(folder / "packets.csv", rows, **head)
            advance(1, f"{form}, {tokens} tokens")
    facts = ", ".join(f"{name} {value}" for name, value in head["machine"].items())
    page = tables.markdown(
        ("tokens", "form", "MB", *PARTS),
        ([f"{row['tokens']:,}", row["form"], f"{row['bytes'] / 1e6:.0f}", *(row[x] for x in PARTS)] for row in rows),
    )
    said = f"**{head['kind']}.** {facts}.\n\nLayers, KV heads, dimension, block: {shape}. {EXPLAINED}"
    (folder / "packets.md").write_text(f"# Times of packets\n\n{said}\n\n{page}", encoding="utf-8")
    print(folder / "packets.md")
