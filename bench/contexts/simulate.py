"""Serves a trace with a policy, event by event.

Each tier's link and the GPU serve one request at a time, first come, first served. A request whose context is stored
loads it over the tier's link, and then decodes it and computes its question on the GPU. Any other request recomputes
the context on the GPU, and the policy may store it when that has ended. Writes and moves between tiers are counted,
but take no time. A packet that is being read stays readable. Two requests for the same missing context each compute
it.
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kara_kernels.contexts.utility import Context, Option, Tier

from .trace import Trace

EVERY = 8  # requests between two times that a policy settles
ARRIVES, LOADED, COMPUTED = range(3)


class Policy(Protocol):
    moved: int
    """Bytes written so far: packets stored, moved or promoted. A packet that is cut where it lies writes nothing."""

    def lookup(self, context: Context, now: float) -> tuple[int, Option] | None:
        """A request for the context: the tier that it is loaded from, and the option. None: it is recomputed."""

    def stored(self, context: Context, now: float) -> None:
        """The context was recomputed and may be stored."""

    def settle(self) -> None: ...

    def used(self) -> list[int]:
        """Bytes by tier."""


@dataclass(frozen=True, slots=True)
class Served:
    """A request, when its first token is there."""

    request: int
    ttft: float
    tier: int
    """The number of tiers: recomputed."""
    option: Option | None


@dataclass(frozen=True)
class Run:
    served: list[Served]
    """In the order of requests."""
    used: list[list[int]]
    """Bytes by tier, each time the policy had settled."""
    moved: int


def simulate(tiers: Sequence[Tier], contexts: Any, trace: Trace, policy: Policy, every: int = EVERY) -> Run:
    """``contexts[number]`` is the context of a request of the trace."""
    links, gpu, order = [0.0] * len(tiers), 0.0, len(trace.times)
    events = [(time, number, ARRIVES, number) for number, time in enumerate(trace.times)]  # sorted, so already a heap
    found: dict[int, tuple[int, Option]] = {}
    served: dict[int, Served] = {}
    used: list[list[int]] = []
    while events:
        now, _, stage, request = heapq.heappop(events)
        context = contexts[trace.contexts[request]]
        if stage == COMPUTED:
            policy.stored(context, now)
            continue
        place = policy.lookup(context, now) if stage == ARRIVES else found.pop(request)
        if stage == ARRIVES and request % every == every - 1:
            policy.settle()
            used.append(policy.used())
        order += 1
        if stage == ARRIVES and place is not None:
            tier, option = found[request] = place
            links[tier] = max(now, links[tier]) + option.nbytes / tiers[tier].bandwidth + tiers[tier].latency
            heapq.heappush(events, (links[tier], order, LOADED, request))
            continue
        seconds = context.prefill_seconds if place is None else place[1].decode_seconds
        gpu = max(now, gpu) + seconds + context.question_seconds
        where = (len(tiers), None) if place is None else place
        served[request] = Served(request, gpu - trace.times[request], *where)
        if place is None:
            heapq.heappush(events, (gpu, order, COMPUTED, request))
    return Run([served[request] for request in range(len(trace.times))], used, policy.moved)


def summary(run: Run, tiers: Sequence[Tier], first: int) -> dict[str, Any]:
    """What the requests from ``first`` on saw. Seconds and bytes."""
    served = run.served[first:]
    hits = [one.option for one in served if one.option is not None]
    seconds = sorted(one.ttft for one in served)
    names = [*(tier.name for tier in tiers), "recomputed"]
    counts = Counter(names[one.tier] for one in served)
    later = run.used[len(run.used) * first // len(run.served) :]
    chosen = Counter(label(option) for option in hits)
    return {
        "quality": statistics.fmean(1.0 if one.option is None else one.option.quality for one in served),
        "ttft": statistics.fmean(seconds), "median": seconds[len(seconds) // 2],
        "p99": seconds[len(seconds) * 99 // 100],
        "share": {name: counts[name] / len(served) for name in names},
        "hit_bytes": statistics.fmean(option.nbytes for option in hits) if hits else 0.0,
        "used": {tier.name: statistics.fmean(used[t] for used in later) for t, tier in enumerate(tiers)},
        "moved": run.moved / len(run.served),
        "chosen": {name: count / len(hits) for name, count in sorted(chosen.items())},
    }  # fmt: skip


def label(option: Option) -> str:
    """Method and ratio for people, in percent: names of columns have no point."""
    return f"{option.method} {100 * option.ratio:.0f}%"
