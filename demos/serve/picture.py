"""One picture of the comparison: tokens, requests, and who was served when. Titles state the finding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from .. import DemoError
from ..style import BLUE, GREY, PALE, STYLE

LOOKS = {"vllm": ("vLLM", GREY), "kara": ("vLLM + Kara", BLUE)}
ROWS = 24  # requests shown; more would be too thin to read


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of ``report.collect``."""
    limited, plentiful = result["limited"], result["plentiful"]
    rows = min(ROWS, len(limited["vllm"]["streams"]))
    heights = [2.3, 2.0, 0.6 + 0.15 * rows] + [2.0] * bool(plentiful)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, sum(heights) + 2.2), layout=ConstrainedLayoutEngine(h_pad=0.12), dpi=130)
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        _tokens(figure.add_subplot(grid[0, :]), limited, result["demand_blocks"])
        _running(figure.add_subplot(grid[1, :]), limited)
        end = max(limited[side]["seconds"] for side in LOOKS)
        for column, side in enumerate(LOOKS):
            _served(figure.add_subplot(grid[2, column]), limited[side], side, end, rows)
        if plentiful:
            _blocks(figure.add_subplot(grid[3, :]), plentiful)
        try:
            figure.savefig(path, facecolor="white")
        except OSError as error:
            raise DemoError(f"--picture {path}: {error.strerror or error}") from error


def _lines(axes: Axes, stage: dict[str, Any], key: str, ends: bool = False) -> None:
    """One line per server over time. `ends` also marks where its last token came."""
    most, longest = 0.0, max(stage[side]["seconds"] for side in LOOKS)
    for side, (name, colour) in LOOKS.items():
        timeline, stop = stage[side]["timeline"], stage[side]["seconds"]
        seconds, values = [*timeline["seconds"], stop], [*timeline[key], stage[side]["tokens"] if ends else 0]
        axes.plot(seconds, values, color=colour, linewidth=2, drawstyle="default" if ends else "steps-post")
        most = max(most, *values)
        if ends:
            axes.plot([stop], values[-1:], "o", color=colour, markersize=6, clip_on=False)
            axes.text(  # the curves only rise, so the lower right corner is free
                0.99,
                0.18 if side == "kara" else 0.06,
                f"{name}: {stage[side]['tokens_per_second']:.0f} tokens/s",
                color=colour,
                weight="bold",
                ha="right",
                transform=axes.transAxes,
            )
    axes.set_ylim(0, most * 1.1 or 1)
    axes.set_xlim(0, longest)


def _tokens(axes: Axes, stage: dict[str, Any], demand: int) -> None:
    _lines(axes, stage, "tokens", ends=True)
    axes.set_ylabel("tokens received")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    share = stage["blocks"] / demand
    axes.set_title(f"Room for {share:.0%} of the demand: Kara makes {stage['speedup']:.2f} times the tokens per second")


def _running(axes: Axes, stage: dict[str, Any]) -> None:
    _lines(axes, stage, "running")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("requests running")
    axes.set_xlabel("seconds")
    kara, plain = stage["kara"], stage["vllm"]
    axes.set_title(
        f"{kara['running_mean']:.1f} requests run at once instead of {plain['running_mean']:.1f}; "
        f"{kara['preemptions']:,} preemption{'s' * (kara['preemptions'] != 1)} instead of {plain['preemptions']:,}"
    )


def _served(axes: Axes, run: dict[str, Any], side: str, end: float, rows: int) -> None:
    """One row per request: coloured while it receives tokens, pale while it waits."""
    name, colour = LOOKS[side]
    for row, stream in enumerate(run["streams"][:rows]):
        axes.broken_barh([(0, stream["last"])], (row - 0.35, 0.7), color=PALE, linewidth=0)
        spans = [(first, max(last - first, end / 400)) for first, last in stream["active"]]
        axes.broken_barh(spans, (row - 0.35, 0.7), color=colour, linewidth=0)
    axes.set_xlim(0, end)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylabel("requests" if side == "vllm" else "")
    axes.set_xlabel("seconds (coloured: receives tokens, pale: waits)")
    axes.set_title(f"{name}: longest pause {run['between_tokens_seconds']['max']:.0f} s", color=colour)


def _blocks(axes: Axes, stage: dict[str, Any]) -> None:
    _lines(axes, stage, "blocks")
    for side, (name, colour) in LOOKS.items():
        timeline, peak = stage[side]["timeline"], stage[side]["blocks_peak"]
        moment = timeline["seconds"][timeline["blocks"].index(peak)]
        axes.annotate(
            f"{name}, {peak:,} at peak",
            (moment, peak),
            (-6, 4),
            textcoords="offset points",
            color=colour,
            weight="bold",
            ha="right",
            va="bottom",
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    axes.set_ylabel("blocks in use")
    axes.set_xlabel("seconds")
    axes.set_title(
        f"Room for everything: {stage['speedup']:.2f} times the tokens per second, "
        f"{stage['kara']['blocks_peak']:,} blocks instead of {stage['vllm']['blocks_peak']:,}"
    )
