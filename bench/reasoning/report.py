"""What was measured, as a page and a picture: solved problems, paired with the full cache's, and what serving took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.quality.statistics import Interval, difference
from bench.tables import Row, markdown
from demos.style import BLUE, GREY, INK, ORANGE, STYLE, spread

from .problems import FAMILIES
from .run import AGAIN, FULL, Cell

OURS, CHANCE = "kara", ("random", "newest")
LOSSES = {0.5: 0.02, 0.3: 0.03}  # most share of problems lost at a retention
BETTER = (0.3, 0.2)  # retentions at which no other method may be as good
DRAFTED = " *Accepted*: drafts by n-grams that were right."

Answers = dict[Cell, dict[str, Row]]  # by problem


def answers_of(rows: Sequence[Row]) -> Answers:
    found: Answers = {}
    for row in rows:
        if row["kind"] == "answer":
            found.setdefault(Cell(row["method"], row["retention"]), {})[row["problem"]] = row
    return found


def solved(answers: Mapping[str, Row]) -> dict[str, float]:
    return {name: float(row["solved"]) for name, row in answers.items()}


def mcnemar(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The exact two-sided p-value for problems that only one of both solves."""
    both = set(ours) & set(theirs)
    won = sum(ours[name] > theirs[name] for name in both)
    lost = sum(ours[name] < theirs[name] for name in both)
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n)


def page(head: Row, rows: Sequence[Row], picture: str) -> str:
    answers = answers_of(rows)
    usages = {Cell(row["method"], row["retention"]): row for row in rows if row["kind"] == "cell"}
    full = answers.get(Cell(FULL, 1.0), {})
    facts = ", ".join(f"{name} {value}" for name, value in head.items() if name != "code")
    columns = ["method", "problems", "solved", "difference in points", "McNemar p", "finished", "first difference",
               "equal", "KL", "held", "tokens/s", "most blocks"]  # fmt: skip
    ordered = _ordered(answers)
    table = [_line(cell, of, full, usages.get(cell)) for cell, of in ordered]
    if "drafts" in head:
        columns.append("accepted")
        table = [[*line, _accepted(usages.get(cell))] for line, (cell, _) in zip(table, ordered, strict=True)]
    lines = [
        "# Does it keep the reasoning?\n",
        f"Written by `make reasoning`: {facts}. Problems with known answers, drawn from the seed, in five families "
        "of equal number. Greedy decoding, the same limit of tokens for all. The model is shown one short problem with "
        "its working.\n",
        f"![solved problems by what a cache holds]({picture})\n",
        "## Methods\n",
        "*Difference*: solved problems less those of the full cache, in points, with a 95 % interval from a bootstrap "
        "over problems. *First difference*: leading tokens as with the full cache, the median; *equal*: replies that "
        "are equal to the end. *KL*: from the full cache's distribution up to the first token that differs, in nats, a "
        "lower bound from the five likeliest tokens. *Held*: rows by tokens when a request ends, prompt included. "
        "*Tokens/s*: of the whole server; other methods than Kara are plain PyTorch, so theirs say nothing about the "
        "method." + (DRAFTED if "drafts" in head else "") + "\n",
        markdown(columns, table),
        "## By family\n",
        "Solved problems.\n",
        _families(answers),
        "## Goals\n",
        *_goals(answers),
    ]
    return "\n".join(lines) + "\n"


def _ordered(answers: Answers) -> list[tuple[Cell, dict[str, Row]]]:
    first = {FULL: 0, AGAIN: 1, OURS: 2}
    return sorted(answers.items(), key=lambda item: (-item[0].retention, first.get(item[0].method, 3), item[0].method))


def _line(cell: Cell, answers: Mapping[str, Row], full: Mapping[str, Row], usage: Row | None) -> list[str]:
    mine, theirs = solved(answers), solved(full)
    line = [cell.label, str(len(mine)), f"{statistics.fmean(mine.values()):.1%}"]
    if cell.method == FULL or not set(mine) & set(theirs):
        line += ["", ""]
    else:
        line += [points(difference(mine, theirs)), f"{mcnemar(mine, theirs):.3f}"]
    line.append(f"{statistics.fmean(float(row['finished']) for row in answers.values()):.0%}")
    near = [row for row in answers.values() if row.get("same") is not None]
    if near:
        kl = [row["kl"] for row in near if row.get("kl") is not None]
        line += [
            f"{statistics.median(row['same'] for row in near):.0f}",
            f"{statistics.fmean(float(row['equal']) for row in near):.0%}",
        ]
        line.append(f"{statistics.fmean(kl):.4f}" if kl else "")
    else:
        line += ["", "", ""]
    if usage is None:
        return [*line, "", "", ""]
    held = f"{usage['held'] / usage['ended']:.0%}" if usage["ended"] else ""
    return [
        *line,
        held,
        f"{usage['tokens'] / usage['seconds']:.1f}" if usage["seconds"] else "",
        f"{usage['peak']:.0%}",
    ]


def _accepted(usage: Row | None) -> str:
    return f"{usage['accepted'] / usage['drafted']:.0%}" if usage and usage["drafted"] else ""


def points(of: Interval) -> str:
    return f"{100 * of.value:+.1f} ({100 * of.low:+.1f} to {100 * of.high:+.1f})"


def _families(answers: Answers) -> str:
    shown = [(cell, of) for cell, of in _ordered(answers) if cell.method in (FULL, OURS)]
    lines = []
    for name in FAMILIES:
        line = [name]
        for _, of in shown:
            mine = [row["solved"] for row in of.values() if row["problem"].rpartition("-")[0] == name]
            line.append(f"{sum(mine)} of {len(mine)}")
        lines.append(line)
    return markdown(("family", *(cell.label for cell, _ in shown)), lines)


def _goals(answers: Answers) -> list[str]:
    full, lines = solved(answers.get(Cell(FULL, 1.0), {})), []
    for retention, most in LOSSES.items():
        ours = solved(answers.get(Cell(OURS, retention), {}))
        goal = f"at {retention:.0%}, the interval's lower end above {-100 * most:.0f} points"
        if not set(ours) & set(full):
            lines.append([goal, "not measured", ""])
            continue
        found = difference(ours, full)
        lines.append([goal, points(found), "met" if found.low > -most else "**missed**"])
    for retention in BETTER:
        ours = solved(answers.get(Cell(OURS, retention), {}))
        for cell, of in _ordered(answers):
            theirs = solved(of)
            if cell.retention != retention or cell.method == OURS or not set(ours) & set(theirs):
                continue
            found = difference(ours, theirs)
            goal = f"at {retention:.0%}, better than {cell.method}"
            lines.append([goal, points(found), "met" if found.low > 0 else "**missed**"])
    return [markdown(("goal", "difference in points", ""), lines)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Solved problems of every method by its retention."""
    answers = answers_of(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        methods = sorted({cell.method for cell in answers} - {FULL, AGAIN, OURS})
        ends: list[tuple[float, float, str, str]] = []
        for method in [*methods, OURS]:
            cells = sorted((cell for cell in answers if cell.method == method), key=lambda cell: cell.retention)
            if not cells:
                continue
            x = [cell.retention for cell in cells]
            y = [statistics.fmean(solved(answers[cell]).values()) for cell in cells]
            colour = BLUE if method == OURS else INK if method in CHANCE else GREY
            axes.plot(x, y, color=colour, linewidth=2.4 if method == OURS else 1.0, marker="o", markersize=4,
                      linestyle=":" if method in CHANCE else "-", zorder=3 if method == OURS else 2)  # fmt: skip
            ends.append((y[-1], x[-1], method, colour))
        for height, (_, x_end, name, colour) in zip(spread([y for y, *_ in ends], 0.05, 1.0), ends, strict=True):
            axes.annotate(name, (x_end, height), xytext=(8, 0), textcoords="offset points", va="center", color=colour)
        of_full = [
            statistics.fmean(solved(of).values()) for cell, of in answers.items() if cell.method in (FULL, AGAIN)
        ]
        if of_full:
            axes.axhspan(min(of_full) - 0.002, max(of_full) + 0.002, color=ORANGE, alpha=0.5, linewidth=0)
            axes.annotate("full cache", (0, max(of_full)), xycoords=("axes fraction", "data"), xytext=(4, 3),
                          textcoords="offset points", color=ORANGE)  # fmt: skip
        axes.set_title("Solved problems by what is kept of a window")
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, max([x for _, x, *_ in ends], default=0.5) + 0.2)
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.set_xlabel("kept of every window")
        figure.savefig(path, dpi=150)
