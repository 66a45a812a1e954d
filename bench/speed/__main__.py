"""``python -m bench.speed``: time one compression event on this CPU, in turns with other ways to do it."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from bench import baselines, tables
from bench.tables import Row, markdown
from kara_kernels import PagedCache, compress_window
from kara_kernels.engine import Policy
from kara_kernels.ops import score_window

RESULTS = Path(__file__).parents[1] / "results"
TAIL, PAGE = 64, 16
GOAL_EVENT, GOAL_SCORER = 3.0, 1.0
KARA, PREDECESSOR = "kara", "predecessor"
LABELS = {
    KARA: "Kara, every query", "predecessor": "the predecessor's way, every query", "r-kv": "R-KV, 8 queries",
    "snapkv": "SnapKV, 32 queries", "kara scorer": "Kara with redundancy, every query",
    "kara scorer, recorded": "Kara with redundancy, queries as recorded by default",
    "kara scorer, 8": "Kara with redundancy, 8 queries", "r-kv scorer": "R-KV, 8 queries",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    layers: int
    heads: int
    group: int
    dim: int
    window: int
    sequences: int

    @property
    def label(self) -> str:
        return f"{self.layers} x {self.heads} x {self.dim}, W {self.window}, batch {self.sequences}"


SMALL, LARGE = (30, 3, 3, 64), (36, 8, 4, 128)
# Wide windows of the large shape at batch 8 would hold 4 GB of queries and take a minute a round: left out.
CASES = [Case(*SMALL, window, sequences) for sequences in (1, 8) for window in (256, 512, 1024)]
CASES += [Case(*LARGE, window, 1) for window in (256, 512, 1024)] + [Case(*LARGE, 256, 8)]
QUICK = [Case(2, 3, 3, 64, 128, 1)]


def jobs(case: Case) -> dict[str, Callable[[], object]]:
    """Each does one event or one scoring; rows of the pools are moved in place, which changes no time."""
    torch.manual_seed(0)
    blocks = -(-(case.window + TAIL) // PAGE)

    def pools() -> list[torch.Tensor]:
        shape = (blocks * case.sequences, PAGE, case.heads, case.dim)
        return [torch.randn(shape) for _ in range(case.layers)]

    keys, values = pools(), pools()
    cache = PagedCache(keys, values)
    query = torch.randn(case.layers, case.sequences, case.window, case.heads * case.group, case.dim)
    queries = list(query)
    tables = torch.randperm(blocks * case.sequences).int().view(case.sequences, -1)
    starts = torch.zeros(case.sequences, dtype=torch.int32)
    lengths = torch.full((case.sequences,), case.window + TAIL, dtype=torch.int32)
    keep = case.window // 2
    policy = Policy(window=case.window, keep=keep, tail=TAIL)
    recorded = query.unflatten(3, (case.heads, -1)).mean(4)[:, :, : policy.query_rows].contiguous()
    few = query[:, :, -baselines.RKV_QUERIES :].contiguous()

    def theirs(scorer: baselines.Scorer) -> Callable[[], object]:
        return lambda: baselines.compress(scorer, queries, keys, values, tables, starts, lengths, case.window, keep)

    def scoring(given: torch.Tensor) -> Callable[[], object]:
        return lambda: score_window(given, cache.k, tables, starts, case.window, redundancy=1.0, backend="torch")

    return {
        KARA: lambda: compress_window(query, cache.k, cache.v, tables, lengths, window=case.window, keep=keep,
                                      window_starts=starts, backend="torch"),
        PREDECESSOR: theirs(baselines.mean_attention),
        "r-kv": theirs(baselines.rkv),
        "snapkv": theirs(baselines.snapkv),
        "kara scorer": scoring(query),
        "kara scorer, recorded": scoring(recorded),
        "kara scorer, 8": scoring(few),
        "r-kv scorer": lambda: baselines.score(baselines.rkv, queries, keys, tables, starts, case.window),
    }  # fmt: skip


def alternate(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every job in every round, in turns, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, job in work.items():
            began = time.perf_counter()
            job()
            if round_:  # the first round fetches code and memory
                seconds[name].append(time.perf_counter() - began)
    return seconds


def derived(row: Row) -> Row:
    """What the page shows of a measured row, which is a case and the ``seconds`` of its jobs."""
    case = Case(**{field.name: row[field.name] for field in fields(Case)})
    seconds = row["seconds"]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        **row, "case": case.label, "median": median,
        # Ratios of one round, then their median: neighbours in time share the machine's mood.
        "event_ratio": statistics.median(b / a for a, b in zip(seconds[KARA], seconds[PREDECESSOR], strict=True)),
        **{f"{name} ratio": statistics.median(b / a for a, b in zip(seconds[name], seconds["r-kv scorer"], strict=True))
           for name in ("kara scorer", "kara scorer, recorded", "kara scorer, 8")},
    }  # fmt: skip


def page(head: Row, measured: Sequence[Row]) -> str:
    rows = [derived(row) for row in measured]

    def met(key: str, goal: float) -> str:
        return f"{sum(r[key] >= goal for r in rows)} of {len(rows)} cases"

    parts = [
        "# One compression event on a CPU\n",
        f"Made by `make bench` on {head['machine']}, {head['threads']} thread(s), torch {head['torch']}: "
        f"float32, half of a window kept, a tail of {TAIL}, pages of {PAGE}; shapes are layers x KV heads x head "
        "dimension. One process, jobs in turns; medians in milliseconds. The other ways are independent formulations "
        "in `bench/baselines.py`, written from what was published about them.\n",
        "## Goals\n",
        f"- An event at least {GOAL_EVENT:.0f} times faster than the predecessor's way with the same queries: met in "
        f"{met('event_ratio', GOAL_EVENT)}. Both multiply the same matrices, which takes most of the time of either.",
        "- Bidirectional scoring with redundancy not slower than R-KV's scorer with its 8 queries. With every query, "
        f"{case_times(rows)} times as many as R-KV has: met in {met('kara scorer ratio', GOAL_SCORER)}. With "
        f"queries as the engine shim records them by default: {met('kara scorer, recorded ratio', GOAL_SCORER)}. "
        f"With 8 queries too: {met('kara scorer, 8 ratio', GOAL_SCORER)}.\n",
        "kvpress is not among them: its release needs an older transformers than this project's, and its presses want "
        "a model's attention modules around them.\n",
        "![Milliseconds of an event](speed.png)\n",
        "## Whole events\n",
        markdown(
            ("case", *(LABELS[n] for n in (KARA, PREDECESSOR, "r-kv", "snapkv")), "predecessor / Kara"),
            ((r["case"], *(f"{1e3 * r['median'][n]:.1f}" for n in (KARA, PREDECESSOR, "r-kv", "snapkv")),
              f"{r['event_ratio']:.2f}x") for r in rows),
        ),
        "## Scoring alone\n",
        markdown(
            ("case", *(LABELS[n] for n in list(LABELS)[4:]), "R-KV / every query", "R-KV / recorded",
             "R-KV / 8 queries"),
            ((r["case"], *(f"{1e3 * r['median'][n]:.1f}" for n in list(LABELS)[4:]),
              *(f"{r[f'{n} ratio']:.2f}x" for n in list(LABELS)[4:7])) for r in rows),
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def case_times(rows: Sequence[Row]) -> str:
    times = sorted({r["window"] // baselines.RKV_QUERIES for r in rows})
    return str(times[0]) if len(times) == 1 else f"{times[0]} to {times[-1]}"


def draw(head: Row, measured: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, names = [derived(row) for row in measured], (KARA, PREDECESSOR, "r-kv", "snapkv")
    colours = dict(zip(names, ("#0b6e99", "#b8b8b8", "#d98c3f", "#8a6fae"), strict=True))
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(rows) + 1.6), layout="constrained")
    for index, name in enumerate(names):
        places = [place + (index - 1.5) * 0.2 for place in range(len(rows))]
        axes.barh(places, [1e3 * r["median"][name] for r in rows], 0.19, color=colours[name], label=LABELS[name])
    axes.set_yticks(range(len(rows)), [r["case"] for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds of an event on a CPU, {head['threads']} thread(s), median")
    axes.set_title("One compression event in PyTorch (layers x KV heads x D)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for speed.md, speed.csv and speed.png")
    parser.add_argument("--threads", type=int, default=1, help="1: threads that wait for each other spoil the figures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one tiny case")
    options = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    rows = []
    cases = QUICK if options.quick else CASES
    for number, case in enumerate(cases, start=1):
        rows.append({**asdict(case), "seconds": alternate(jobs(case), options.rounds)})
        shown = derived(rows[-1])
        print(f"{number}/{len(cases)}  {case.label}: {1e3 * shown['median'][KARA]:.1f} ms, "
              f"{shown['event_ratio']:.2f}x", file=sys.stderr, flush=True)  # fmt: skip
    head = {"kind": "measured on a CPU", "machine": machine(), "threads": options.threads, "torch": torch.__version__}
    options.out.mkdir(parents=True, exist_ok=True)
    tables.write(options.out / "speed.csv", rows, **head)
    (options.out / "speed.md").write_text(page(head, rows), encoding="utf-8")
    draw(head, rows, options.out / "speed.png")
    print(options.out / "speed.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
