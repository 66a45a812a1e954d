"""What must hold of every row of the table, and where it cannot, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.tables import Row


@dataclass(frozen=True)
class Goal:
    name: str
    applies: Callable[[Row], bool]
    holds: Callable[[Row], bool]


def _of(*kernels: str) -> Callable[[Row], bool]:
    return lambda row: row["kernel"] in kernels


GOALS = (
    Goal("no spills", lambda row: True, lambda row: row["spills"] == 0),
    Goal("16-byte loads", _of("score_kernel", "compact_kernel", "gather_kernel", "scatter_kernel", "quantize_kernel"),
         lambda row: row["load_bytes"] >= 16),
    Goal("16-byte stores", _of("compact_kernel", "gather_kernel", "scatter_kernel", "dequantize_kernel"),
         lambda row: row["store_bytes"] >= 16),
    Goal("tensor cores", _of("score_kernel"), lambda row: row["tensor"] > 0),
    Goal("no atomics", lambda row: True, lambda row: row["atomics"] + row["shared_atomics"] == 0),
    Goal("shared memory within the limit", lambda row: True, lambda row: row["shared"] <= row["shared_limit"]),
    Goal("occupancy of 25 %", lambda row: row["kernel"] in ("quantize_kernel", "dequantize_kernel"),
         lambda row: row["occupancy"] >= 0.25),
    Goal("occupancy of 12.5 %", lambda row: row["kernel"] == "score_kernel" and row["target"] in ("sm_80", "sm_90"),
         lambda row: row["occupancy"] >= 0.125),
)  # fmt: skip


@dataclass(frozen=True)
class Excuse:
    """A goal that cannot hold for some rows."""

    goal: str
    matches: Callable[[Row], object]
    reason: str


def _of_old_triton(row: Row, *targets: str) -> bool:
    return row["triton"].startswith("3.6.") and row["target"] in targets and row["kernel"] == "score_kernel"


EXCEPTIONS: tuple[Excuse, ...] = (
    Excuse(
        "no atomics", lambda row: row["target"] == "sm_100" and row["atomics"] == 0 and row["tensor"] > 0,
        "In shared memory only: the compiler's own handing out of tensor memory to tcgen05 instructions, before and "
        "after the kernel's work. No result passes through it.",
    ),
    Excuse(
        "no spills",
        lambda row: _of_old_triton(row, "sm_80") and row["spills"] == 8
        and re.match(r"W (1024|2048|4096), D", row["shape"]),
        "Triton 3.6 only: 8 bytes a thread where key tiles stream. Triton 3.9 makes the same kernels without.",
    ),
    Excuse(
        "no spills",
        lambda row: row["target"] == "gfx950" and row["spills"] <= 16 and row["shape"].endswith("fp8 queries"),
        "Up to 16 registers where fp8 keys stream under fp8 queries, and both are decoded.",
    ),
    Excuse(
        "no spills",
        lambda row: _of_old_triton(row, "sm_100") and row["spills"] == 8 and row["shape"].endswith("fp8 queries"),
        "Triton 3.6 only: 8 bytes a thread where key tiles stream under fp8 queries.",
    ),
    Excuse(
        "no spills",
        lambda row: row["target"].startswith("sm") and row["spills"] <= 16
        and row["shape"] == "W 256, D 192/128, G 4, P 16, bfloat16, recorded",
        "Up to 16 bytes a thread before the loop over queries, where 256 keys of 192 dimensions, padded to 256, are "
        "turned. On sm_90 tiles of 16 rows spilled 88.",
    ),
    Excuse(
        "no spills",
        lambda row: _of_old_triton(row, "sm_100") and row["spills"] <= 40
        and row["shape"] == "W 512, D 128, G 4, P 16, bfloat16, recorded",
        "Triton 3.6 only: 40 bytes a thread where packed queries score 512 keys. Triton 3.9 makes the same kernel "
        "without.",
    ),
    Excuse(
        "no spills",
        lambda row: _of_old_triton(row, "sm_80") and row["spills"] <= 152
        and row["shape"] == "W 256, D 576, latent, G 16, P 64, bfloat16, recorded",
        "Triton 3.6 only: 152 bytes a thread where packed queries meet slices of latent keys. Tiles of 32 rows do "
        "without, but stream the keys twice as often.",
    ),
    Excuse(
        "no spills",
        lambda row: _of_old_triton(row, "sm_120") and row["spills"] == 8
        and re.match(r"W 256, D 128, G (1, P 16, bfloat16|4, P 16, bfloat16, group means)$", row["shape"]),
        "Triton 3.6 only: 8 bytes a thread where a KV head has one query head, or their mean. The assembler keeps to "
        "128 registers.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    goal: str
    rows: int
    missed: list[Row]
    excused: list[tuple[Excuse, int]]


def judge(rows: Sequence[Row], exceptions: Sequence[Excuse] = EXCEPTIONS, every: bool = True) -> list[Verdict]:
    """Each goal over all rows. A reason that excuses nothing is an error, since it would outlive what it explains; but
    not where rows are not those of ``every`` shape and target."""
    verdicts, used = [], set()
    for goal in GOALS:
        asked = [row for row in rows if goal.applies(row)]
        missed = [row for row in asked if not goal.holds(row)]
        excused = []
        for exception in exceptions:
            if exception.goal != goal.name:
                continue
            own = [row for row in missed if exception.matches(row)]
            missed = [row for row in missed if not exception.matches(row)]
            if own:
                used.add(id(exception))
                excused.append((exception, len(own)))
        verdicts.append(Verdict(goal.name, len(asked), missed, excused))
    for exception in exceptions:
        if every and id(exception) not in used:
            raise ValueError(f"exception to {exception.goal!r} that excuses no row: {exception.reason}")
    return verdicts
