"""KL and recall by retention, as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from demos.generate.picture import BLUE, INK, ORANGE, PALE, STYLE

from .methods import DEFAULT, METHODS
from .statistics import Table, by_text, mean, recall_tables

NAMED = {DEFAULT: BLUE, "straight": "#56B4E9", "H2O": ORANGE, "R-KV": "#CC79A7", "SnapKV": "#009E73", "random": INK}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Every method as a line; those that are named stand out."""
    kl = by_text(result["records"], "fidelity", "kl")
    above, exact = recall_tables(result["records"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), layout=ConstrainedLayoutEngine(w_pad=0.12), dpi=130)
        panels = figure.subplots(1, 3)
        _lines(panels[0], kl, "KL to the full cache")
        panels[0].set_yscale("log")
        panels[0].set_ylabel("nats per token")
        _lines(panels[1], above, "Placed facts: cost of the answers")
        panels[1].set_ylabel("nats per answer token, above the full cache")
        _lines(panels[2], exact, "Placed facts: said exactly")
        panels[2].set_ylabel("share of what the full cache says exactly")
        figure.savefig(path, facecolor="white")


def _lines(axes: Axes, table: Table, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("tokens kept of a window")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    families = {method.name: method.family for method in METHODS}
    handles = []
    for name in families:
        points = sorted((r, mean(values)) for (method, r), values in table.items() if method == name)
        if not points or (name not in NAMED and families[name] == "kara"):
            continue
        colour = NAMED.get(name, PALE)
        style = ":" if name == "random" else "-"
        axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=3 if name == DEFAULT else 1.6,
                  zorder=3 if name == DEFAULT else 2 if name in NAMED else 1)  # fmt: skip
        if name in NAMED:
            handles.append(Line2D([], [], color=colour, label=name))
    axes.legend(handles=handles, frameon=False, fontsize=9)
    axes.margins(x=0.03)
