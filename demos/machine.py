"""What the machine has left: CPU time used by other programs, and free memory. None where unknown."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

BUSY = 0.05  # above this CPU share of other programs, timings are doubtful
# Counters of a line "cpu0 ..." of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal. Guest time is
# already included in user. Stolen time went to other machines, so it counts as other programs' time.
COUNTERS, IDLE = 8, (3, 4)


class Seconds(NamedTuple):
    """CPU time since a fixed moment in the past."""

    own: float
    busy: float  # of all programs
    there: float  # including idle time


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def cpu_seconds(own: Callable[[], float] = own_seconds, stat: Path = Path("/proc/stat")) -> Seconds | None:
    """CPU time so far on the processors that this process may use. `own()` returns our own."""
    try:
        usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
        found = [[int(count) for count in line[1 : 1 + COUNTERS]] for line in lines if line and line[0] in usable]
        each = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # not Linux, or a sandbox with a different /proc
        return None
    total = sum(map(sum, found))
    idle = sum(counts[index] for counts in found for index in IDLE)
    return Seconds(own(), (total - idle) / each, total / each)


def share_of_others(before: Seconds | None, after: Seconds | None) -> float | None:
    """Share of CPU time between two readings that went to other programs, 0 to 1."""
    if before is None or after is None or after.there <= before.there:
        return None
    return max(0.0, after.busy - before.busy - (after.own - before.own)) / (after.there - before.there)


def doubt(others: float | None) -> str | None:
    """A warning to print with timings. None if other programs did not interfere, or if that is unknown."""
    if others is None or others <= BUSY:
        return None
    return f"Other programs used {others:.0%} of the CPU time during the run, so the timings are doubtful."


def available_bytes(device: Any = "cpu") -> int | None:
    """Memory that a program can still allocate, on the host or on a GPU, without evicting others."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    known = [bytes_left for bytes_left in (_of_machine(), _of_container()) if bytes_left is not None]
    return min(known, default=None)


def _of_machine(info: Path = Path("/proc/meminfo")) -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = info.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    return None


def _of_container(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the cgroup v2 limit leaves. Its page cache counts as free, because it can be dropped."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" is not a number
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    return None


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit, step in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << step:
            return f"{count / (1 << step):.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
