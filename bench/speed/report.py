"""speed.md and its picture, from the seconds of every job in every round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import baselines
from bench.tables import Row, markdown

GOAL_EVENT, GOAL_BATCH, GOAL_SCORER = 1.6, 2.5, 1.0
EVENTS = {
    "kara": "Kara as recommended, queries as recorded", "paper": "Kara as published, every query",
    "predecessor": "the predecessor's way, every query", "r-kv": "R-KV, 8 queries", "snapkv": "SnapKV, 32 queries",
}  # fmt: skip
SCORERS = {
    "kara scorer": "Kara as recommended, queries as recorded", "redundancy, recorded": "redundancy, as recorded",
    "redundancy, every": "redundancy, every query", "redundancy, 8": "redundancy, 8 queries",
    "r-kv scorer": "R-KV, 8 queries",
}  # fmt: skip
LABELS = EVENTS | SCORERS
COLOURS = ("#0b6e99", "#6fb2cf", "#b8b8b8", "#d98c3f", "#8a6fae")


def milliseconds(row: Row, job: str) -> float:
    return 1e3 * statistics.median(row["seconds"][job])


def ratio(row: Row, theirs: str, ours: str) -> float:
    """The median over rounds of the ratio within a round, because jobs of one round see the same load."""
    pairs = zip(row["seconds"][theirs], row["seconds"][ours], strict=True)
    return statistics.median(a / b for a, b in pairs)


def page(head: Row, rows: Sequence[Row]) -> str:
    def met(theirs: str, ours: str, goal: float, batch: float | None = None) -> str:
        goals = [goal if batch is None or row["sequences"] == 1 else batch for row in rows]
        held = sum(ratio(row, theirs, ours) >= least for row, least in zip(rows, goals, strict=True))
        return f"met in {held} of {len(rows)} cases"

    def times(jobs: Sequence[str], *ratios: tuple[str, str]) -> str:
        header = ("case", *(LABELS[job] for job in jobs), *(f"{theirs} / {ours}" for theirs, ours in ratios))
        return markdown(header, (
            (row["case"], *(f"{milliseconds(row, job):.1f}" for job in jobs),
             *(f"{ratio(row, *pair):.2f}x" for pair in ratios)) for row in rows
        ))  # fmt: skip

    redundancy = [job for job in SCORERS if job.startswith("redundancy")]
    return "\n".join([
        "# One compression event on a CPU\n",
        f"Made by `make bench` on {head['machine']}, {head['threads']} thread(s), torch {head['torch']}: float32, half "
        f"of a window kept, a tail of {head['tail']}, pages of {head['page']}; shapes are layers x KV heads x head "
        "dimension. One process, jobs in turns; medians in milliseconds, ratios of neighbours. The other ways are "
        "independent formulations in `bench/baselines.py`, written from what was published about them.\n",
        "*As recommended*: root mean square, value norms, chunks, as the library's defaults have it. *As recorded*: "
        "the queries of every token and head of window and tail, in four bits, which is what the engine shim keeps.\n",
        "## Goals\n",
        f"- An event at least {GOAL_EVENT:g} times as fast as the predecessor's way, {GOAL_BATCH:g} times in a batch. "
        f"As recommended, from queries as recorded: {met('predecessor', 'kara', GOAL_EVENT, GOAL_BATCH)}. As "
        f"published, from the same queries as the predecessor's: "
        f"{met('predecessor', 'paper', GOAL_EVENT, GOAL_BATCH)}; there both multiply the same matrices, which takes "
        "most of the time of either. [What was tried](tried.md#the-cpu-path) to come closer.",
        "- Scoring not slower than R-KV's scorer with its 8 queries. As recommended: "
        f"{met('r-kv scorer', 'kara scorer', GOAL_SCORER)}. With redundancy, which R-KV has too, and queries as "
        f"recorded: {met('r-kv scorer', 'redundancy, recorded', GOAL_SCORER)}; with every query, {_times(rows)} times "
        f"as many as R-KV has: {met('r-kv scorer', 'redundancy, every', GOAL_SCORER)}; with 8 queries too: "
        f"{met('r-kv scorer', 'redundancy, 8', GOAL_SCORER)}.\n",
        "kvpress is not among them: its release needs an older transformers than this project's, and its presses want "
        "a model's attention modules around them.\n",
        "![Milliseconds of an event](speed.png)\n",
        "## Whole events\n",
        times(list(EVENTS), ("predecessor", "kara"), ("predecessor", "paper")),
        "## Scoring alone\n",
        times(list(SCORERS), ("r-kv scorer", "kara scorer"), *(("r-kv scorer", job) for job in redundancy)),
    ])  # fmt: skip


def _times(rows: Sequence[Row]) -> str:
    times = sorted({row["window"] // baselines.RKV_QUERIES for row in rows})
    return str(times[0]) if len(times) == 1 else f"{times[0]} to {times[-1]}"


def draw(head: Row, rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.85 * len(rows) + 1.8), layout="constrained")
    for index, (job, colour) in enumerate(zip(EVENTS, COLOURS, strict=True)):
        places = [place + (index - 2) * 0.17 for place in range(len(rows))]
        axes.barh(places, [milliseconds(row, job) for row in rows], 0.16, color=colour, label=LABELS[job])
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds of an event on a CPU, {head['threads']} thread(s), median")
    axes.set_title("One compression event in PyTorch (layers x KV heads x D)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2)
    figure.savefig(path, dpi=140)
    plt.close(figure)
