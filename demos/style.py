"""Colours and matplotlib settings for the pictures of demos and benches."""

from __future__ import annotations

import math
from collections.abc import Sequence

# The palette of Okabe and Ito, distinguishable with common colour blindness and in greyscale.
INK, GREY, PALE = "#222222", "#767676", "#E4E4E4"
BLUE, ORANGE, SKY = "#0072B2", "#D55E00", "#56B4E9"
GREEN, PURPLE = "#009E73", "#CC79A7"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Where to write a label for each of these heights: at least ``gap`` apart and at most ``top``, in their order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    found, least, most = list(heights), -math.inf, top
    for i in order:
        found[i] = least = max(heights[i], least)
        least += gap
    for i in reversed(order):
        found[i] = most = min(found[i], most)
        most -= gap
    return found
