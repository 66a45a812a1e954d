"""KL and recall by retention, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from demos.style import BLUE, GREEN, INK, ORANGE, PALE, PURPLE, SKY, STYLE

from .methods import DEFAULT, METHODS
from .statistics import Table, by_text, mean, ranks, recall_tables

OURS = {DEFAULT: BLUE, "straight": SKY}
OF_PEERS = (ORANGE, GREEN, PURPLE)  # colours of the best, second and third peer
CHANCE = {"random": INK}
LABELS = {"straight": "straight, as published"}


def best_peers(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The peers named in the picture, best first, with their mean ranks over its panels and all retentions."""
    above, exact = recall_tables(records)
    tables = [(by_text(records, "fidelity", "kl"), 1), (above, 1), (exact, -1)]
    found = ranks(tables, [method.name for method in METHODS if method.family == "peer"])
    return dict(list(found.items())[: len(OF_PEERS)])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws every method as a line. Kara, the best peers and random selection are highlighted."""
    named = {**OURS, **dict(zip(best_peers(result["records"]), OF_PEERS, strict=False)), **CHANCE}
    kl = by_text(result["records"], "fidelity", "kl")
    above, exact = recall_tables(result["records"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), layout=ConstrainedLayoutEngine(w_pad=0.12), dpi=130)
        panels = figure.subplots(1, 3)
        _lines(panels[0], named, kl, "KL to the full cache")
        panels[0].set_yscale("log")
        panels[0].set_ylabel("nats per token")
        _lines(panels[1], named, above, "Placed facts: cost of the answers")
        panels[1].set_ylabel("nats per answer token, above the full cache")
        _lines(panels[2], named, exact, "Placed facts: said exactly")
        panels[2].set_ylabel("share of what the full cache says exactly")
        figure.savefig(path, facecolor="white")


def _lines(axes: Axes, named: Mapping[str, str], table: Table, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("tokens kept of a window")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    families = {method.name: method.family for method in METHODS}
    for name in families:
        points = sorted((r, mean(values)) for (method, r), values in table.items() if method == name)
        if not points or (name not in named and families[name] == "kara"):
            continue
        colour = named.get(name, PALE)
        style = ":" if name in CHANCE else "-"
        axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=3 if name == DEFAULT else 1.6,
                  zorder=3 if name == DEFAULT else 2 if name in named else 1)  # fmt: skip
    drawn = [name for name in named if any(method == name for method, _ in table)]
    handles = [
        Line2D([], [], color=named[name], linestyle=":" if name in CHANCE else "-", label=LABELS.get(name, name))
        for name in drawn
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9)
    axes.margins(x=0.03)
