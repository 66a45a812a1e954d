"""The results: figures of each server, the comparison, the table and the JSON file."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rich.table import Table
from rich.text import Text

from kara_kernels import __version__
from kara_kernels.contexts.profile import Profile

from ..machine import doubt
from ..screen import READABLE, Screen
from .documents import Asked, Document

SCHEMA = 1
SOURCES = ("gpu", "ram", "disk")
_HITS = "kara:context_hits_total"
NAMES = {"computed": "computed again", "whole": "whole, LRU", "fixed": "fixed, LRU", "kara": "Kara"}
GOALS = {"computed": 4.0, "whole": 1.6, "fixed": 1.5}
"""How many times sooner Kara's first token is to come, in the mean."""
MOST_BLOCKS = 0.6
"""Of those of a whole context, that one with fewer rows is to take on the GPU."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    document: int
    seconds: float
    """To the first token."""
    text: str
    source: str
    """Of the context's rows: ``gpu``, ``ram``, ``disk`` or ``computed``."""
    right: bool
    """Whether it tells the fact that was asked for."""
    bytes: dict[str, float]
    """Of each tier after the answer."""


@dataclass
class Side:
    """What one server did."""

    answers: list[Answer]
    others: float | None
    """Share of CPU time that went to other programs; None: unknown."""
    chosen: list[dict[str, Any] | None]
    """What was stored of each document at the end."""


def figures(side: Side, reference: Sequence[Answer]) -> Figures:
    """One server as plain numbers. ``reference``: the answers of the one that computes."""
    seconds = [answer.seconds for answer in side.answers]
    sources = Counter(answer.source for answer in side.answers)
    same = [answer.text == other.text for answer, other in zip(side.answers, reference, strict=True)]
    return {
        "first_token_seconds": {
            "mean": statistics.fmean(seconds), "median": statistics.median(seconds), "p95": percentile(seconds, 0.95),
        },
        "sources": {source: sources[source] / len(seconds) for source in (*SOURCES, "computed")},
        "same_answers": statistics.fmean(same),
        "right_answers": statistics.fmean(answer.right for answer in side.answers),
        "bytes": side.answers[-1].bytes,
        "cpu_share_of_others": side.others,
        "chosen": side.chosen,
        "timeline": [{"seconds": answer.seconds, "source": answer.source, **answer.bytes} for answer in side.answers],
    }  # fmt: skip


def source_of(before: dict[str, float], after: dict[str, float]) -> str:
    """Where a request's context came from, by the metrics of its server before and after it."""

    def grew(name: str) -> bool:
        return after.get(name, 0) > before.get(name, 0)

    return next((source for source in SOURCES if grew(f"{_HITS}{{{source}}}")), None) or (
        "gpu" if grew("vllm:prefix_cache_hits_total") else "computed"
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def collect(
    options: argparse.Namespace, model: str, held: Sequence[Document], asks: Sequence[Asked], profile: Profile,
    fixed: str, found: dict[str, Side], phases: dict[str, float],
) -> Figures:  # fmt: skip
    """Everything about the run as plain numbers, strings, lists and dictionaries."""
    reference = found["computed"].answers
    sides = {name: figures(side, reference) for name, side in found.items()}
    mean = {name: side["first_token_seconds"]["mean"] for name, side in sides.items()}
    names = "contexts", "tokens", "requests", "seed", "floor", "alpha", "block_size", "threads"
    uses = Counter(ask.document for ask in asks)
    return {
        "schema": SCHEMA,
        "versions": {
            "kara_kernels": __version__, "torch": metadata.version("torch"), "python": platform.python_version(),
        },
        "machine": {"cores": os.cpu_count()},
        "model": options.model or "SmolLM2-135M-Instruct",
        "settings": {name: getattr(options, name) for name in names},
        "fixed": fixed,
        "documents": [{"name": each.name, "asked": uses[i]} for i, each in enumerate(held)],
        "sides": sides,
        "sooner": {name: mean[name] / mean["kara"] for name in GOALS},
        "goals": GOALS,
        "blocks": blocks_of_fewer_rows(sides["kara"]["chosen"], options.tokens, options.block_size),
        "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
        "picture": None if options.picture is None else str(options.picture),
    }  # fmt: skip


def blocks_of_fewer_rows(
    chosen: Sequence[dict[str, Any] | None], tokens: int, block_size: int
) -> dict[str, float] | None:
    """How many documents were stored with fewer rows, and their share of the blocks that they take with all."""
    rows = [each["rows"] for each in chosen if each is not None and each["rows"] < tokens]
    taken = sum(-(-count // block_size) for count in rows)
    return {"documents": len(rows), "share": taken / (len(rows) * -(-tokens // block_size))} if rows else None


def show(screen: Screen, result: Figures) -> None:
    console = screen.console
    console.print()
    console.print(_table(result))
    console.print()
    for line in findings(result):
        console.print(Text(line), width=min(console.width, READABLE))
    console.print()
    screen.say(f"took {sum(result['phases'].values()) / 60:.0f} minutes")
    if result["picture"]:
        screen.say(f"picture: {result['picture']}")


def _table(result: Figures) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in result["sides"]:
        table.add_column(NAMES[name], justify="right")
    for label, cells in _rows(list(result["sides"].values())):
        table.add_row(label, *cells)
    return table


def _rows(sides: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    def row(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [cell(side) for side in sides]

    return [
        row("first token, mean", lambda side: f"{side['first_token_seconds']['mean']:.2f} s"),
        row("  95 of 100 within", lambda side: f"{side['first_token_seconds']['p95']:.2f} s"),
        row("same answers", lambda side: f"{side['same_answers']:.0%}"),
        row("right answers", lambda side: f"{side['right_answers']:.0%}"),
        *(row(f"from {name}", lambda side, name=name: f"{side['sources'][name]:.0%}") for name in SOURCES),
        row("computed", lambda side: f"{side['sources']['computed']:.0%}"),
        row("memory", lambda side: f"{side['bytes']['ram'] / 2**20:,.0f} MiB"),
        row("disk", lambda side: f"{side['bytes']['disk'] / 2**20:,.0f} MiB"),
    ]


def findings(result: Figures) -> list[str]:
    """The comparison in words. The picture's title says the same."""
    sooner, lines = result["sooner"], []
    kara = result["sides"]["kara"]
    lines.append(
        f"With Kara the first token comes {sooner['computed']:.1f} times sooner than with vLLM's own prefix cache, "
        f"{sooner['whole']:.1f} times sooner than with contexts kept whole, and {sooner['fixed']:.1f} times sooner "
        f"than with {result['fixed']} for all of them."
    )
    lines.append(
        f"{kara['same_answers']:.0%} of the answers are the same as without, and {kara['right_answers']:.0%} are right "
        f"as against {result['sides']['computed']['right_answers']:.0%}."
    )
    if fewer := result["blocks"]:
        lines.append(
            f"Fewer rows are kept of {fewer['documents']} of the documents. While in use these take "
            f"{fewer['share']:.0%} of the blocks that they take as they are."
        )
    missed = [f"{GOALS[name]:g} times than {NAMES[name]}" for name in GOALS if sooner[name] < GOALS[name]]
    missed += [f"{MOST_BLOCKS:.0%} of the blocks"] if fewer and fewer["share"] > MOST_BLOCKS else []
    if missed:
        lines.append(f"Goals missed: {'; '.join(missed)}.")
    shares = [side["cpu_share_of_others"] for side in result["sides"].values()]
    if doubtful := doubt(max((share for share in shares if share is not None), default=None)):
        lines.append(doubtful)
    return lines
