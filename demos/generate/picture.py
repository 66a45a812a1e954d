"""One picture of the run: blocks in use, distance from the full cache, kept tokens. Titles state the finding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from .. import DemoError
from ..style import BLUE, GREY, INK, ORANGE, PALE, SKY, STYLE, spread

CHUNK = 3  # runs of at least this many kept tokens are drawn and counted as a chunk
ROWS = 10  # windows shown; more would be too thin to read


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of ``report.collect``."""
    windows = result["kara"]["windows"][:ROWS]
    strip = 0.9 + 0.42 * max(1, len(windows))
    with matplotlib.rc_context(STYLE):
        # Without pyplot there is no display to open and no global state to clean up.
        figure = Figure(figsize=(10, 5.8 + strip), layout=ConstrainedLayoutEngine(h_pad=0.12), dpi=130)
        blocks, kl, kept = figure.subplots(3, 1, height_ratios=[2.5, 2.5, strip])
        kl.sharex(blocks)
        _blocks(blocks, result)
        _closeness(kl, result)
        _survivors(kept, result, windows)
        try:
            figure.savefig(path, facecolor="white")
        except OSError as error:
            raise DemoError(f"--picture {path}: {error.strerror or error}") from error


def _name(axes: Axes, text: str, x: float, y: float, colour: str) -> None:
    """Label a line at its right end, which makes a legend unnecessary."""
    axes.annotate(
        text,
        (x, y),
        (6, 0),
        textcoords="offset points",
        color=colour,
        weight="bold",
        va="center",
        annotation_clip=False,
    )


def _names(axes: Axes, x: float, named: list[tuple[float, str, str]], gap: float) -> None:
    """Labels lines that end at these heights."""
    heights = spread([height for height, _, _ in named], gap, axes.get_ylim()[1])
    for height, (_, name, colour) in zip(heights, named, strict=True):
        _name(axes, name, x, height, colour)


def _blocks(axes: Axes, result: dict[str, Any]) -> None:
    full, kara = result["full"], result["kara"]
    count = full["tokens"]
    tokens, named = range(1, count + 1), []
    for run, colour, name in ((full, GREY, "full cache"), (kara, BLUE, "Kara")):
        axes.plot(tokens, run["blocks"], color=colour, linewidth=2, drawstyle="steps-post")
        named.append((run["blocks"][-1], f"{name}\n{run['blocks_end']}", colour))
    axes.fill_between(tokens, kara["blocks"], full["blocks"], step="post", color=BLUE, alpha=0.08, lw=0)
    top = max(full["blocks"]) * 1.08
    axes.set_ylim(0, top)
    _names(axes, count, named, 0.2 * top)
    axes.set_xlim(1, max(count, 2))
    axes.set_ylabel("blocks in use")
    instead = "" if kara["blocks_end"] == full["blocks_end"] else f" instead of {full['blocks_end']}"
    axes.set_title(f"{kara['blocks_end']} cache blocks{instead} after {count:,} decoded tokens")


def _closeness(axes: Axes, result: dict[str, Any]) -> None:
    mine, other = result["closeness"]["kara"], result["closeness"]["random"]
    count = mine["tokens"]
    span = max(1, min(64, count // 16))
    tokens, top, names = range(1, count + 1), 0.0, []
    for column, colour, name in ((other, ORANGE, "random tokens"), (mine, BLUE, "Kara")):
        if column is not None:
            smooth = _smooth(column["kl_per_token"], span)
            top = max(top, *smooth)
            axes.plot(tokens, column["kl_per_token"], ".", markersize=3.5, markeredgewidth=0, color=colour, alpha=0.3)
            axes.plot(tokens, smooth, color=colour, linewidth=2)
            names.append((smooth[-1], name, colour))
    top = top * 1.8 or 1.0  # scale the axis to the lines; single tokens lie far above them
    for index, window in enumerate(result["kara"]["windows"]):
        axes.axvline(window["decoded_tokens"], color=GREY, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        if index == 0:
            axes.annotate(
                "first compression",
                (window["decoded_tokens"], 1),
                (-4, -4),
                color=GREY,
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=9,
                ha="right",
                va="top",
            )
    axes.set_ylim(0, top)
    _names(axes, count, names, 0.09 * top)
    axes.set_ylabel("KL to full cache, nats")
    axes.set_xlabel(f"decoded tokens (lines: mean of the last {span}, points: single tokens)")
    title = "Nothing was compressed, so nothing changed"
    if mine["kl_compressed"] is not None:
        title = f"Predictions stay {mine['kl_compressed']:.2g} nats from the full cache's"
        if other is not None:
            title += f"; with as many random tokens {other['kl_compressed']:.2g}"
    axes.set_title(title)


def _smooth(values: list[float], span: int) -> list[float]:
    """Trailing mean, so that no point depends on later values."""
    parts = (values[max(0, end - span) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def _survivors(axes: Axes, result: dict[str, Any], windows: list[dict[str, Any]]) -> None:
    axes.spines[:].set_visible(False)
    if not windows:
        axes.set_axis_off()
        axes.set_title("No window was full, so every token is still there")
        return
    width, keep = result["settings"]["window"], result["settings"]["keep"]
    chunked = 0
    for row, window in enumerate(windows):
        runs = _runs(window["kept_one_head"]["positions"])
        chunks = [run for run in runs if run[1] >= CHUNK]
        chunked += sum(count for _, count in chunks)
        band = (row - 0.42, 0.52)
        axes.broken_barh([(0, width)], band, color=PALE, linewidth=0)
        axes.broken_barh(chunks, band, color=BLUE, linewidth=0)
        axes.broken_barh([run for run in runs if run[1] < CHUNK], band, color=SKY, linewidth=0)
        axes.imshow(
            [window["kept_share"]],
            extent=(0, width, row + 0.32, row + 0.14),
            cmap="Greys",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
        )
    axes.set_xlim(0, width)
    axes.set_ylim(len(windows) - 0.5, -0.5)
    first = [window["first_token"] for window in windows]
    axes.set_yticks(range(len(windows)), [f"{a + 1:,}\N{EN DASH}{a + width:,}" for a in first])
    axes.tick_params(length=0)
    axes.set_ylabel("window (decoded tokens)")
    axes.set_xlabel("position in the window")
    share = chunked / (keep * len(windows))
    axes.set_title(
        f"{keep} of {width} tokens survive in each window, {share:.0%} of them {CHUNK} or more in a row", pad=26
    )
    head = windows[0]["kept_one_head"]
    axes.legend(
        [Patch(color=colour) for colour in (BLUE, SKY, PALE, INK)],
        [
            f"kept, {CHUNK}+ in a row",
            "kept, 1 or 2",
            f"dropped (layer {head['layer'] + 1}, KV head {head['head'] + 1})",
            "thin strip: share of all heads that kept the token",
        ],
        loc="lower left",
        bbox_to_anchor=(-0.008, 0.99),
        ncols=4,
        frameon=False,
        handlelength=1,
        handleheight=0.8,
        columnspacing=1.6,
        fontsize=9,
    )


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """Ascending positions as (first, count) of runs without gaps."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and sum(runs[-1]) == position:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs
