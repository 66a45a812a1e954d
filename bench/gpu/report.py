"""Page, plot and comparison of runs of ``python -m bench.gpu``."""

from __future__ import annotations

from pathlib import Path

from bench import tables
from bench.tables import Row, markdown

from .measure import SCHEMA

Run = tuple[Row, list[Row]]  # the common values, and one row per case
STEPS = ("score", "select", "compact")
FIRST = ("event", *STEPS, "call")
RATED = ("score", "compact", "paper's score")
EVERY = ("paper's event", "paper's score", "predecessor", "r-kv", "snapkv")  # with the queries of every token and head


def page(run: Run) -> str:
    head, rows = run
    machine = ", ".join(f"{key} {value}" for key, value in head["machine"].items())

    def cell(row: Row, name: str) -> str:
        time = row["times"].get(name)
        if time is None:
            return ""
        return f"{1e6 * time['median']:.1f} ({1e6 * time['low']:.1f}-{1e6 * time['high']:.1f})"

    def achieved(row: Row, name: str) -> str:
        if name not in row["times"]:
            return ""
        rate = row["floor_bytes"][name] / row["times"][name]["median"]
        return f"{rate / 1e9:.0f} GB/s, {rate / head['copy_bandwidth']:.0%}"

    return "\n".join([
        f"# Times of kernels and events\n\n**{head['kind']}.** {machine}.\n",
        "Microseconds: median (a tenth of the samples below - a tenth above). Kernels and events are replayed CUDA "
        "graphs over buffers that exceed L2; the other ways are eager, since they read lengths on the host. *Call* is "
        "what an eager call of `compress_window` takes on the host: checks, allocation and launches.\n",
        "## What is recommended\n\nQueries as the engine shim records them by default: those of every token and head "
        "of window and tail, in four bits, read in place from a ring; of DeepSeek-V3 what fits in 4 GiB.\n",
        markdown(("case", *FIRST), ((r["case"], *(cell(r, name) for name in FIRST)) for r in rows)),
        f"Bytes that must move over time, and its share of a plain copy's {head['copy_bandwidth'] / 1e9:.0f} GB/s:\n",
        markdown(("case", *RATED), ((r["case"], *(achieved(r, name) for name in RATED)) for r in rows)),
        "## The published method and other ways\n\nAll with the queries of every token and head of the window, where "
        "they fit into memory: Kara as published, the predecessor's way to compute the same, R-KV and SnapKV.\n",
        markdown(("case", *EVERY), ((r["case"], *(cell(r, name) for name in EVERY)) for r in rows)),
    ])  # fmt: skip


def draw(run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    head, rows = run
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.8), layout="constrained")
    colours = ("#0b6e99", "#d98c3f", "#5b8f4d")
    left = [0.0] * len(rows)
    for step, colour in zip(STEPS, colours, strict=True):
        widths = [1e6 * r["times"][step]["median"] for r in rows]
        axes.barh(range(len(rows)), widths, 0.55, left=left, color=colour, label=step)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([1e6 * r["times"]["event"]["median"] for r in rows], range(len(rows)), "k|", ms=14, label="whole event")
    axes.set_yticks(range(len(rows)), [r["case"] for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds, median")
    axes.set_title(f"{head['machine']['device']}\n{head['kind']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def read(path: Path) -> Run:
    """Reads a run. Raises ValueError if the file does not have this schema."""
    head, rows = tables.read(path)
    if head.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a run of schema {SCHEMA}, got {head.get('schema')!r}")
    return head, rows


def compare(before: Run, after: Run) -> str:
    """Ratios after / before. A star marks sample ranges that do not overlap."""
    old = {row["case"]: row["times"] for row in before[1]}
    lines = []
    for row in after[1]:
        for name, new in row["times"].items():
            known = old.get(row["case"], {}).get(name)
            if known:
                apart = new["low"] > known["high"] or new["high"] < known["low"]
                ratio = new["median"] / known["median"]
                lines.append((row["case"], name, f"{1e6 * known['median']:.1f}", f"{1e6 * new['median']:.1f}",
                              f"{ratio:.3f}{' *' if apart else ''}"))  # fmt: skip
    warning = ""
    for key in ("device", "kind"):
        values = [head["machine"]["device"] if key == "device" else head["kind"] for head, _ in (before, after)]
        if values[0] != values[1]:
            warning += f"Different {key}: {values[0]} and {values[1]}.\n"
    return warning + markdown(("case", "what", "before, us", "after, us", "after / before"), lines)
