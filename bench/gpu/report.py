"""Page, plot and comparison of runs of ``python -m bench.gpu``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.codegen.report import table

from .measure import SCHEMA

STEPS, OTHERS = ("score", "select", "compact"), ("predecessor", "r-kv", "snapkv")


def page(result: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value)
    rows = result["rows"]

    def cell(row: dict[str, Any], name: str) -> str:
        time = row["times"].get(name)
        if time is None:
            return ""
        return f"{1e6 * time['median']:.1f} ({1e6 * time['low']:.1f}-{1e6 * time['high']:.1f})"

    def achieved(row: dict[str, Any], name: str) -> str:
        rate = row["floor_bytes"][name] / row["times"][name]["median"]
        return f"{rate / 1e9:.0f} GB/s, {rate / result['copy_bandwidth']:.0%}"

    return "\n".join([
        f"# Times of kernels and events\n\n**{result['kind']}.** {machine}.\n",
        "Microseconds: median (a tenth of the samples below - a tenth above). Kernels and events are replayed CUDA "
        "graphs over buffers that exceed L2; the other ways are eager, since they read lengths on the host.\n",
        table(("case", "event", *STEPS, *OTHERS),
              ((r["case"], *(cell(r, name) for name in ("event", *STEPS, *OTHERS))) for r in rows)),
        f"Bytes that must move over time, and its share of a plain copy's {result['copy_bandwidth'] / 1e9:.0f} GB/s:\n",
        table(("case", "score", "compact"), ((r["case"], achieved(r, "score"), achieved(r, "compact")) for r in rows)),
    ])  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
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
    axes.set_title(f"{result['machine']['device']}\n{result['kind']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is not a run of this schema."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    found = result.get("schema") if isinstance(result, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected a run of schema {SCHEMA}, got {found!r}")
    return result


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Ratios after / before; a star where the ranges of the samples do not meet."""
    old = {row["case"]: row["times"] for row in before["rows"]}
    lines = []
    for row in after["rows"]:
        for name, new in row["times"].items():
            known = old.get(row["case"], {}).get(name)
            if known:
                apart = new["low"] > known["high"] or new["high"] < known["low"]
                ratio = new["median"] / known["median"]
                lines.append((row["case"], name, f"{1e6 * known['median']:.1f}", f"{1e6 * new['median']:.1f}",
                              f"{ratio:.3f}{' *' if apart else ''}"))  # fmt: skip
    warning = ""
    for key in ("device", "kind"):
        values = [r["machine"]["device"] if key == "device" else r["kind"] for r in (before, after)]
        if values[0] != values[1]:
            warning += f"Different {key}: {values[0]} and {values[1]}.\n"
    return warning + table(("case", "what", "before, us", "after, us", "after / before"), lines)
