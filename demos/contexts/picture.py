"""One picture of the comparison: first tokens, where contexts came from, and what was chosen for which document."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .. import DemoError
from ..style import BLUE, GREEN, GREY, ORANGE, PALE, STYLE
from .report import NAMES

COLOURS = {"gpu": GREEN, "ram": BLUE, "disk": ORANGE, "computed": PALE}
WORDS = {"gpu": "the GPU's cache", "ram": "memory", "disk": "disk", "computed": "computed"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of ``report.collect``."""
    sides = result["sides"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 9.5), layout=ConstrainedLayoutEngine(h_pad=0.12), dpi=130)
        grid = figure.add_gridspec(3, len(sides), height_ratios=[2.2, 2.2, 2.4])
        _first_tokens(figure.add_subplot(grid[0, :]), result)
        for column, name in enumerate(sides):
            _sources(figure.add_subplot(grid[1, column]), name, sides[name], legend=column == 0)
        _chosen(figure.add_subplot(grid[2, :]), result)
        try:
            figure.savefig(path, facecolor="white")
        except OSError as error:
            raise DemoError(f"--picture {path}: {error.strerror or error}") from error


def _first_tokens(axes: Axes, result: dict[str, Any]) -> None:
    sides = result["sides"]
    for row, (name, side) in enumerate(sides.items()):
        first, colour = side["first_token_seconds"], BLUE if name == "kara" else GREY
        axes.barh(row, first["mean"], color=colour, height=0.55)
        axes.plot([first["p95"]] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
        axes.text(first["mean"], row, f" {first['mean']:.2f} s", va="center", color="white", ha="right", weight="bold")
        axes.text(
            first["p95"], row, f"  {side['same_answers']:.0%} same answers, {side['right_answers']:.0%} right",
            va="center", color=GREY,
        )  # fmt: skip
    axes.set_yticks(range(len(sides)), [NAMES[name] for name in sides])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(side["first_token_seconds"]["p95"] for side in sides.values()))
    axes.set_xlabel("seconds to the first token: mean, and a line at 95 of 100")
    sooner = result["sooner"]
    axes.set_title(
        f"Computing takes {sooner['computed']:.1f} times as long as Kara, whole contexts take "
        f"{sooner['whole']:.1f} times as long"
    )


def _sources(axes: Axes, name: str, side: dict[str, Any], legend: bool) -> None:
    """Shares so far of where contexts came from, request by request."""
    came = [each["source"] for each in side["timeline"]]
    count = range(1, len(came) + 1)
    shares = [[n / i for i, n in zip(count, accumulate(x == source for x in came), strict=True)] for source in COLOURS]
    axes.stackplot(count, shares, colors=list(COLOURS.values()), labels=[WORDS[source] for source in COLOURS])
    axes.set_xlim(1, max(2, len(came)))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title(NAMES[name], color=BLUE if name == "kara" else GREY)
    axes.set_xlabel("requests")
    if legend:
        axes.set_ylabel("contexts came from")
        axes.legend(loc="lower right", fontsize=8)


def _chosen(axes: Axes, result: dict[str, Any]) -> None:
    """One dot per document: how hard Kara compressed it, and where it lay at the end."""
    documents, chosen = result["documents"], result["sides"]["kara"]["chosen"]
    for tier in ("ram", "disk"):
        dots = [(i, each["ratio"]) for i, each in enumerate(chosen) if each is not None and each["tier"] == tier]
        if dots:
            axes.scatter(
                [x for x, _ in dots],
                [y for _, y in dots],
                color=COLOURS[tier],
                s=48,
                label="in memory" if tier == "ram" else "on disk",
                zorder=3,
            )
    for i, each in enumerate(chosen):
        if each is None:
            axes.text(i, 0.01, "-", color=GREY, ha="center")
        else:
            axes.text(i, each["ratio"] + 0.02, f"{each['quality']:.3f}", color=GREY, ha="center", fontsize=7)
    names = [f"{i + 1}\n{each['asked']}×" for i, each in enumerate(documents)]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(0, 0.1 + max((each["ratio"] for each in chosen if each is not None), default=1))
    axes.set_ylabel("bytes, of the cache's")
    axes.set_xlabel("documents, and how often each was asked about; the numbers are qualities")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
    kept = sum(each is not None for each in chosen)
    axes.set_title(f"What Kara chose: {kept} of {len(documents)} documents stored")
