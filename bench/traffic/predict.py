"""``python -m bench.traffic.predict``: the cost model's tables and picture, from the counts in traffic.csv."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import tables
from bench.tables import Row, markdown
from kara_kernels.engine import Policy

from . import model as m

RESULTS = Path(__file__).parents[1] / "results"
KIND = "a model: nothing here was measured on a GPU"
BATCHES, CONTEXTS, GENERATED = (1, 32, 256), (8192, 32768), (8192, 32768)
TABLES = ("events", "shares", "serving")
GOAL = 0.01  # of decode time, at batches of 32 and more
PEERS = """## What others report

Their own figures for their own work, as published, not measured here and not comparable in shape. They say which order
of magnitude is usual.

| who | what | figure |
|---|---|---|
| GrowPage, A100, Qwen3-8B | one event: scoring, top-k, compaction | 8.54 + 8.72 + 19.05 ms |
| FlashInfer | top-k of 256, 512, 1,024 | 4.3, 5.5, 8.6 us |
| row regrouping in Triton, H100 | rows moved | 2.18 TB/s, given as 90.8 % of peak |
| TensorRT-LLM's framework | an event every 2,048 tokens | 1.61 times the throughput |
"""


def predict(counts: Path, policy: Policy) -> dict[str, Any]:
    shares, serving, events = [], [], []
    for name, model in m.MODELS.items():
        counted = {way: m.measured(model, counts, way) for way in m.WAYS}
        for gpu_name, gpu in m.GPUS.items():
            where = {"model": name, "gpu": gpu_name}
            if m.room(model, gpu) <= 0:
                events.append({**where, "fits": False})
                continue
            costs = {
                way: m.event(model, gpu, policy, counted[way], m.queries(policy, way, model), way) for way in m.WAYS
            }
            for way, cost in costs.items():
                events.append({**where, "fits": True, "way": way.name, "total": cost.total,
                               "scoring": cost.scoring, **asdict(cost)})  # fmt: skip
                shares += [{**where, "way": way.name, **share} for share in _shares(model, gpu, policy, cost)]
            for generated in GENERATED:
                plain, kara = (m.throughput(model, gpu, p, costs[m.WAYS[0]], generated) for p in (None, policy))
                if plain and kara:
                    serving.append({**where, "generated": generated, "batch": plain[0], "batch_kara": kara[0],
                                    "tokens": plain[1], "tokens_kara": kara[1]})  # fmt: skip
    return {"kind": KIND, "window": policy.window, "keep": policy.keep, "events": events, "shares": shares,
            "serving": serving}  # fmt: skip


def _shares(model: m.Model, gpu: m.Gpu, policy: Policy, cost: m.Event) -> list[Row]:
    return [
        {
            "batch": batch, "context": context, "share": m.share(model, gpu, policy, cost, batch, context),
            "fits": batch * context * model.token_bytes <= m.room(model, gpu),
        }
        for batch in BATCHES for context in CONTEXTS
    ]  # fmt: skip


def missed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for s in result["shares"] if s["batch"] >= 32 and s["share"] >= GOAL]


def page(result: dict[str, Any]) -> str:
    asked = [s for s in result["shares"] if s["batch"] >= 32]
    worst = max(asked, key=lambda s: s["share"])
    goal = (
        f"Goal: below {GOAL:.0%} of decode time at batches of 32 and more: {len(asked) - len(missed(result))} of "
        f"{len(asked)} cells. The dearest is {worst['model']} on {worst['gpu']}, batch {worst['batch']}, "
        f"{worst['context']} rows: {worst['share']:.2%}."
    )
    assert m.__doc__ is not None
    parts = [
        f"# What an event should cost: a model\n\n**This is {KIND}.** W {result['window']}, K {result['keep']}, "
        "bfloat16, the policy's defaults; made by `make traffic`.\n\n" + "\n".join(m.__doc__.splitlines()[2:]),
        "*Recommended, as recorded*: root mean square and value norms, from the queries of every token and head of "
        "window and tail in four bits, or from what loses least of what fits the policy's bound of memory for "
        f"{m.SEQUENCES} sequences. *Published, every query*: mean attention, from the window's queries in 16 bits. "
        "Throughput is with the first.\n",
        f"Assumptions: {m.BANDWIDTH_SHARE:.0%} of peak bandwidth, {m.MATRIX_SHARE:.0%} of peak matrix rate, "
        f"{m.ISSUE_SHARE:.0%} of peak issue, {m.LAUNCH * 1e6:.0f} us a launch, {m.COPY * 1e6:.0f} us for the upload of "
        f"lengths and tables, {m.LATENCY * 1e6:.1f} us a round trip to memory, {m.KERNELS_PER_LAYER} kernels a layer "
        f"with {m.KERNEL_GAP * 1e6:.0f} us between them, {m.MEMORY_SHARE:.0%} of memory for weights and cache. "
        "Constants of GPUs and models and their sources: `bench/traffic/model.py`. Left out: all-reduces, and that an "
        "event may run beside a step.\n",
        goal + "\n",
        f"![Predicted throughput, {KIND}](model.png)\n",
        "## Predicted microseconds of an event, one sequence, all layers\n",
    ]
    parts.append(markdown(
        ("model", "GPU", "way", "event, us", "scoring", "selection", "compaction"),
        ((e["model"], e["gpu"], e["way"],
          *(f"{1e6 * e[key]:.0f}" for key in ("total", "scoring", "selection", "compaction"))) if e["fits"]
         else (e["model"], e["gpu"], "the weights do not fit", "", "", "", "") for e in result["events"]),
    ))  # fmt: skip
    limits = next(list(e["limits"]) for e in result["events"] if e["fits"])
    parts.append(
        "## What limits scoring\n\nMicroseconds that each limit alone would take, at its sustained share. The largest "
        "is the prediction. How far it is from *matrix* is what a perfect kernel would gain.\n"
    )
    parts.append(markdown(
        ("model", "GPU", "way", *limits),
        ((e["model"], e["gpu"], e["way"], *(f"{1e6 * e['limits'][name]:.0f}" for name in limits))
         for e in result["events"] if e["fits"]),
    ))  # fmt: skip
    parts.append(PEERS)
    parts.append("## Predicted share of decode time\n\nStarred: the full cache would not fit in this memory.\n")
    columns = [(batch, context) for batch in BATCHES for context in CONTEXTS]
    header = ("model", "GPU", "way", *(f"batch {b}, {c // 1024}k" for b, c in columns))
    lines: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    for s in result["shares"]:
        key = (s["model"], s["gpu"], s["way"])
        lines.setdefault(key, {})[s["batch"], s["context"]] = f"{s['share']:.2%}" + "*" * (not s["fits"])
    parts.append(markdown(header, ((*key, *(cells[column] for column in columns)) for key, cells in lines.items())))
    parts.append("## Predicted serving throughput when memory decides the batch (at most 512)\n")
    parts.append(markdown(
        ("model", "GPU", "decoded tokens", "sequences", "with Kara", "tokens/s", "with Kara", "ratio"),
        ((s["model"], s["gpu"], s["generated"], s["batch"], s["batch_kara"], f"{s['tokens']:,.0f}",
          f"{s['tokens_kara']:,.0f}", f"{s['tokens_kara'] / s['tokens']:.2f}x") for s in result["serving"]),
    ))  # fmt: skip
    return "\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [s for s in result["serving"] if s["generated"] == GENERATED[-1]]
    names = [f"{s['model']}\n{s['gpu']}" for s in rows]
    figure, axes = plt.subplots(figsize=(10, 0.42 * len(rows) + 1.6), layout="constrained")
    places = range(len(rows))
    axes.barh([p + 0.2 for p in places], [s["tokens_kara"] for s in rows], 0.38, color="#0b6e99", label="with Kara")
    axes.barh([p - 0.2 for p in places], [s["tokens"] for s in rows], 0.38, color="#b8b8b8", label="full cache")
    for place, s in zip(places, rows, strict=True):
        axes.text(s["tokens_kara"], place + 0.2, f" {s['tokens_kara'] / s['tokens']:.2f}x", va="center", fontsize=8)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second of the deployment, predicted")
    axes.set_title(f"Serving {GENERATED[-1]:,} decoded tokens each, batch as memory allows\n{KIND}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.02)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic.predict", description=__doc__)
    parser.add_argument("--counts", type=Path, default=RESULTS / "traffic.csv", help="counts of `make traffic`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for model.md, model.csv and model.png")
    options = parser.parse_args(arguments)
    if not options.counts.is_file():
        parser.error(f"--counts: expected a file that `make traffic` wrote, got {options.counts}")
    try:
        result = predict(options.counts, Policy())
    except ValueError as error:
        parser.error(f"--counts {options.counts}: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    tables.write(options.out / "model.csv", [{"table": name, **row} for name in TABLES for row in result[name]],
                 kind=KIND, window=result["window"], keep=result["keep"])  # fmt: skip
    (options.out / "model.md").write_text(page(result), encoding="utf-8")
    draw(result, options.out / "model.png")
    print(options.out / "model.md")
    for cell in missed(result):
        print(f"missed: {cell}", file=sys.stderr)
    return int(bool(missed(result)))


if __name__ == "__main__":
    sys.exit(main())
