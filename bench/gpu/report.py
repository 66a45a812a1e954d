"""Page, plot and comparison of runs of ``python -m bench.gpu``."""

from __future__ import annotations

from pathlib import Path

from bench import tables
from bench.tables import Row, markdown
from bench.traffic.model import COPY, WAYS

from .measure import SCHEMA

MODEL = Path(__file__).parents[1] / "results" / "model.csv"
Run = tuple[Row, list[Row]]  # the common values, and one row per case
STEPS = ("score", "select", "compact")
FIRST = ("event", "overlapping", *STEPS, "call")
OVERLAPPING = " *Overlapping* is the event with programmatic dependent launch (`KARA_KERNELS_PDL=1`)."
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

    first = [name for name in FIRST if any(name in row["times"] for row in rows)]
    return "\n".join([
        f"# Times of kernels and events\n\n**{head['kind']}.** {machine}.\n",
        "Microseconds: median (a tenth of the samples below - a tenth above). Kernels and events are replayed CUDA "
        "graphs over buffers that exceed L2; the other ways are eager, since they read lengths on the host. *Call* is "
        "what an eager call of `compress_window` takes on the host: checks, allocation and launches."
        f"{OVERLAPPING if 'overlapping' in first else ''}\n",
        "## What is recommended\n\nQueries as the engine shim records them by default: those of every token and head "
        "of window and tail, in four bits, read in place from a ring; of DeepSeek-V3 what fits in 4 GiB.\n",
        markdown(("case", *first), ((r["case"], *(cell(r, name) for name in first)) for r in rows)),
        f"Bytes that must move over time, and its share of a plain copy's {head['copy_bandwidth'] / 1e9:.0f} GB/s:\n",
        markdown(("case", *RATED), ((r["case"], *(achieved(r, name) for name in RATED)) for r in rows)),
        "## The published method and other ways\n\nAll with the queries of every token and head of the window, where "
        "they fit into memory: Kara as published, the predecessor's way to compute the same, R-KV and SnapKV.\n",
        markdown(("case", *EVERY), ((r["case"], *(cell(r, name) for name in EVERY)) for r in rows)),
        *_modelled(run),
    ])  # fmt: skip


def _modelled(run: Run) -> list[str]:
    """Published events of one sequence beside those of the cost model, for the models and the GPU that it knows.

    What it calls recommended has other queries: those that fit for more sequences than any case has.
    """
    head, rows = run
    known = {row["model"]: row["total"] - COPY for row in tables.read(MODEL)[1]
             if row["table"] == "events" and row["fits"] and row["way"] == WAYS[1].name
             and row["gpu"] in head["machine"]["device"]}  # fmt: skip
    found = [(row["name"], known[row["name"]], row["times"]["paper's event"]["median"]) for row in rows
             if (row["window"], row["batch"]) == (256, 1) and row["name"] in known]  # fmt: skip
    if not found:
        return []
    return [
        "## Against the cost model\n\nMicroseconds of the published event of one sequence, W 256, by "
        "[the model](model.md), which counts instructions of today's code and assumes how fast they issue, without the "
        "upload, which is not timed here, and as measured at the commit above:\n",
        markdown(("case", "modelled", "measured", "measured / modelled"),
                 ((name, f"{1e6 * guess:.0f}", f"{1e6 * time:.0f}", f"{time / guess:.2f}")
                  for name, guess, time in found)),
    ]  # fmt: skip


def draw(run: Run, path: Path) -> None:
    """One compression of a batch, in ours and other ways, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    head, rows = run
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.8), layout="constrained")
    ways = {
        "event": ("recommended, queries in 4 bits", "#0b6e99", "o", 60),
        "paper's event": ("as published", "#5fb3d9", "o", 40),
        "predecessor": ("predecessor's way, PyTorch", "#d98c3f", "D", 26),
        "r-kv": ("R-KV, PyTorch", "#999999", "s", 22),
        "snapkv": ("SnapKV, PyTorch", "#bbbbbb", "^", 22),
    }
    for name, (label, colour, marker, size) in ways.items():
        found = [(1e3 * row["times"][name]["median"], y) for y, row in enumerate(rows) if name in row["times"]]
        if found:
            axes.scatter(*zip(*found, strict=True), s=size, color=colour, marker=marker, label=label, zorder=3)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("milliseconds of one compression, all layers and sequences of the batch, median")
    axes.set_title(f"{head['machine']['device']}: {head['kind']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#eeeeee", zorder=0)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.07), ncols=3)
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
