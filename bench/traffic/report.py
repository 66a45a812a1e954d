"""traffic.md: goals, then bytes compared with the floor and with other code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.tables import markdown

from . import payload
from .measure import EXCUSES, OTHERS, goals, missed

INTRODUCTION = """# What an event moves and computes

Made by `make traffic`, without a GPU: the code that Triton compiles for sm_80 runs instruction by instruction in the
emulator of `tests/ptx`, for one layer of one sequence, and every access is counted. Nothing here is a time.

First what is recommended, from queries as the engine shim records them by default: those of every token and head of
window and tail, in four bits, read in place from a ring, looking ahead. *As published*: mean attention without value
norms, from the queries of the window in 16 bits. Some cases have fewer queries, to save emulator time.

- **floor**: what cannot be left out. Scoring: queries and keys once (values too where their lengths weigh), partial
  rows once. Selection: partial rows, scores, keep lists. Compaction: rows that change place, read and written once.
- **compulsory**: every 32-byte sector that a launch touches, once: what DRAM sees while L2 holds a window.
- **requested**: what threads ask for. Scoring asks for keys once per 512 query rows; once per 64 where heads are too
  wide to stay on chip; and, where a window does not fit in one pass, twice per 128 query rows. Caches answer that.
- **sectors**: 32-byte sectors of all requests, added up, beside requested bytes / 32. Below 1 where lanes of a warp ask
  for the same address.
- **matrix operations** beside 2 N G W D: 1 where a window fits in one pass, 2 where key tiles stream twice.
- **others**: the least that PyTorch formulations move: each operand of each operation once, each result once.
"""

PAYLOADS = """256 tokens of one layer, written to a payload and read back. The floor is each row of the pool once, each
array of the payload once, and lists and block table once. All lanes of a row load its place and block, which caches
answer: that is what is requested beyond the floor.
"""


def page(rows: Sequence[dict[str, Any]], payloads: Sequence[dict[str, Any]]) -> str:
    parts = [INTRODUCTION, "## Goals\n"]
    names = list(goals(rows[0])) if rows else []
    limits = {name: {goals(row)[name][1] for row in rows} for name in names}
    header = ("case", *(f"{name} (at most {' or '.join(map(str, sorted(limits[name])))})" for name in names))
    lines = []
    for row in rows:
        said = {name: " **missed**" if name in missed(row) else " (excused)"
                for name, (ratio, limit) in goals(row).items() if ratio > limit}  # fmt: skip
        lines.append((row["case"], *(f"{ratio:.3f}{said.get(name, '')}" for name, (ratio, _) in goals(row).items())))
    parts.append(markdown(header, lines))
    shown = {row["case"] for row in rows}
    parts += [f"- {case}, {name}, excused: {reason}\n" for (case, name), reason in EXCUSES.items() if case in shown]
    for step in ("scoring", "selection", "compaction"):
        parts.append(f"## {step.capitalize()}\n")
        parts.append(markdown(
            ("case", "floor, bytes", "compulsory", "requested", "sectors", "instructions of warps", "bank conflicts",
             "others"),
            (_line(row, step) for row in rows),
        ))  # fmt: skip
    return "\n".join([*parts, _payloads(payloads)])


def _payloads(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        for step, counts in row["steps"].items():
            ratio, limit = payload.goals(row)[f"{step}, compulsory"]
            lines.append((
                row["case"], step, f"{counts['floor']:,}", f"{ratio:.3f}{' **missed**' if ratio > limit else ''}",
                f"{counts['requested_ratio']:.2f}x", f"{counts['sector_ratio']:.2f}x", f"{counts['instructions']:,}",
                f"{counts['bank_ratio']:.2f}x",
            ))  # fmt: skip
    header = ("case", "step", "floor, bytes", "compulsory (at most 1.05)", "requested", "sectors",
              "instructions of warps", "bank conflicts")  # fmt: skip
    return f"## Payloads of contexts\n\n{PAYLOADS}\n{markdown(header, lines)}"


def _line(row: dict[str, Any], step: str) -> tuple[object, ...]:
    counts = row["steps"][step]
    return (
        row["case"], f"{counts['floor']:,}", f"{counts['compulsory_ratio']:.2f}x", f"{counts['requested_ratio']:.2f}x",
        f"{counts['sector_ratio']:.2f}x", f"{counts['instructions']:,}", f"{counts['bank_ratio']:.2f}x",
        f"{row['others'][step] / counts['floor']:.1f}x ({OTHERS[step]})",
    )  # fmt: skip
