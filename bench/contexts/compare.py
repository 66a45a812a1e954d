"""The policies of the bench, and the comparison of their rows at equal quality."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from bench.tables import Row
from kara_kernels.contexts.utility import MAX_BYTES, Context, Option, Tier

from .policies import PAPER_METHODS, Arc, Cached, Impress, Lfu, Lru, Placed, Recompute
from .scenario import WHOLE, Scenario
from .simulate import Policy

# Times the mean seconds of recomputing a context.
ALPHAS = (0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 4, 6.3, 10, 16, 25, 40, 63, 100, 160, 250, 400, 1000, 6400)
LEVELS = (0.999, 0.99, 0.97, 0.95, 0.9)  # of mean quality
HALF_LIFE = 500  # requests
OURS, PAPER, UNLIMITED = "placement, priced", "Algorithm 1, its methods", "a RAM that holds everything"
PROMOTING = ", promoting"
PLACEMENTS: dict[str, tuple[str, Sequence[str] | None, bool]] = {
    OURS: ("priced", None, False), "placement, per_byte": ("per_byte", None, False),
    "Algorithm 1, all methods": ("paper", None, False), PAPER: ("paper", PAPER_METHODS, False),
    PAPER + PROMOTING: ("paper", PAPER_METHODS, True),
    "priced, its methods": ("priced", PAPER_METHODS, False),
}  # fmt: skip
QUEUES: dict[str, Callable[[int], Lru | Arc]] = {"LRU": Lru, "ARC": Arc, "LFU": Lfu}
FIXED, IF_FASTER = "fixed + LRU", ", if faster"


@dataclass(frozen=True)
class Entry:
    """A policy and its setting."""

    policy: str
    setting: str
    make: Callable[[Sequence[Tier]], Policy]
    alpha: float | None = None
    """As a multiple of the mean seconds of recomputing a context."""


def option_at(method: str, ratio: float) -> Callable[[Context], Option]:
    """The option of a method that is nearest to a ratio."""

    @cache
    def choose(context: Context) -> Option:
        options = [option for option in context.options if option.method == method]
        return min(options, key=lambda option: abs(option.ratio - ratio))

    return choose


def entries(scenario: Scenario, alphas: Iterable[float] = ALPHAS) -> list[Entry]:
    """All policies with all their settings."""
    whole, half_life = option_at(WHOLE, 1.0), HALF_LIFE / scenario.rate
    found = [Entry("prefill", "", Recompute)]

    def cached(name: str, setting: str, choose: Callable[[Context], Option], queue: Callable[[int], Lru | Arc]) -> None:
        found.append(Entry(name, setting, lambda tiers: Cached(tiers, choose, queue, half_life)))
        found.append(Entry(name + IF_FASTER, setting, lambda tiers: Cached(tiers, choose, queue, half_life, True)))

    for name, queue in QUEUES.items():
        cached(name, "", whole, queue)
    for method, ratio in sorted({(o.method, round(o.ratio, 2)) for o in scenario.contexts[0].options}):
        if method != WHOLE:
            cached(FIXED, f"{method} {100 * ratio:.0f}%", option_at(method, ratio), Lru)
    if any(option.method == "snapkv/exact" for option in scenario.contexts[0].options):
        half = option_at("snapkv/exact", 0.5)
        found.append(Entry("IMPRESS-like", "", lambda tiers: Impress(tiers, whole, half)))
    mean = statistics.fmean(context.prefill_seconds for context in scenario.contexts)
    for name, (rule, methods, promoting) in PLACEMENTS.items():
        found += [placed(name, rule, methods, promoting, alpha, mean, half_life) for alpha in alphas]
    return found + [unlimited(alpha, mean, half_life) for alpha in alphas]


def placed(
    name: str, rule: str, methods: Sequence[str] | None, promoting: bool, alpha: float, mean: float, half_life: float
) -> Entry:
    def make(tiers: Sequence[Tier]) -> Policy:
        return Placed(tiers, alpha=alpha * mean, rule=rule, half_life=half_life, methods=methods, promoting=promoting)

    return Entry(name, f"alpha {alpha:g}", make, alpha)


def unlimited(alpha: float, mean: float, half_life: float) -> Entry:
    """Each context in its own best option, on the fastest tier: what no policy with the same options can beat by more
    than the order of its queues."""

    def make(tiers: Sequence[Tier]) -> Policy:
        endless = [replace(tier, capacity=MAX_BYTES) for tier in tiers]
        return Placed(endless, alpha=alpha * mean, rule="priced", half_life=half_life)

    return Entry(UNLIMITED, f"alpha {alpha:g}", make, alpha)


def cheapest(rows: Iterable[Row], quality: float) -> Row | None:
    """The row with the least mean time to the first token of those with at least this mean quality."""
    good = [row for row in rows if row["quality"] >= quality]
    return min(good, key=lambda row: row["ttft"]) if good else None


def frontier(rows: Iterable[Row]) -> list[Row]:
    """Rows that no other beats in both quality and time, best quality first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row["quality"], row["ttft"])):
        if not best or row["ttft"] < best[-1]["ttft"]:
            best.append(row)
    return best


def of(rows: Iterable[Row], *policies: str) -> list[Row]:
    """Rows of some policies, as published and as strengthened here."""
    return [row for row in rows if row["policy"].removesuffix(IF_FASTER).removesuffix(PROMOTING) in policies]


def their_fixed(rows: Iterable[Row]) -> list[Row]:
    """The fixed options of the published methods."""
    return [row for row in of(rows, FIXED) if row["setting"].rpartition(" ")[0] in PAPER_METHODS]
