"""``python -m bench.contexts.optimum``: how close placements come to the optimum, and what a decision costs.

The optimum of 64 contexts x 12 options x 4 tiers is out of reach for dynamic programming. Lagrangian relaxation bounds
it from above: for any price per byte, what all contexts gain in their own best places after paying, plus the price of
the capacity. A placement within 2% of the bound is within 2% of the optimum. Gains are counted from everything being
recomputed, because utilities can be negative.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from kara_kernels.contexts.place import RULES, Placement
from kara_kernels.contexts.utility import Context, Option, Tier, utility

SPEEDS = 20e9, 4e9, 1e9, 0.2e9  # bytes per second: RAM over PCIe, an SSD, a disk, a network
SHARES = (0.02, 0.15), (0.03, 0.2), (0.05, 0.3), (0.1, 0.5)  # capacity relative to all contexts uncompressed
BYTES_PER_TOKEN = 128 * 1024  # Llama-3.1-8B in 16 bit
RATIOS = 0.5, 0.375, 0.25, 0.125


class Instance(NamedTuple):
    tiers: list[Tier]
    contexts: list[Context]
    frequencies: list[float]
    alpha: float


def instance(seed: int, contexts: int = 64, tiers: int = 4, methods: int = 3) -> Instance:
    """A random instance. Even seeds have qualities that fall with the ratio, each method and context at its own pace.
    Odd ones have random bytes and qualities. Prefilling takes a linear and a quadratic part of 2,000..64,000 tokens."""
    draw = random.Random(seed)
    alpha, rows, frequencies = draw.uniform(1, 20), [], []
    for i in range(contexts):
        tokens = int(2000 * 32 ** draw.random())
        options = [option for m in range(methods) for option in _options(draw, f"m{m}", tokens, wild=seed % 2 == 1)]
        floor = 0.0 if draw.random() < 0.7 else draw.uniform(0.3, 0.9)
        rows.append(Context(f"c{i}", tuple(options), tokens / 8000 + 4 * (tokens / 60000) ** 2, 0.05, floor))
        frequencies.append((i + 1) ** -draw.uniform(0.5, 1.2))
    total = sum(max(option.nbytes for option in context.options) for context in rows)
    places = [
        Tier(
            f"t{t}",
            int(total * draw.uniform(*SHARES[t])),
            SPEEDS[t] * draw.uniform(0.5, 2),
            10 ** draw.uniform(-5, -1.5),
        )
        for t in range(tiers)
    ]
    return Instance(places, rows, frequencies, alpha)


def _options(draw: random.Random, method: str, tokens: int, wild: bool) -> list[Option]:
    options, pace = [], draw.uniform(0.02, 0.6)
    for ratio in RATIOS:
        ratio = draw.uniform(0.05, 1) if wild else ratio * draw.uniform(0.9, 1.1)
        quality = draw.random() if wild else max(0.0, 1 - pace * (1 - ratio) ** 3 / (ratio + 0.3))
        nbytes = int(tokens * BYTES_PER_TOKEN * ratio)
        options.append(Option(method, ratio, nbytes, quality, tokens * 1e-7 * draw.random()))
    return options


def all_recomputed(case: Instance) -> float:
    return sum(
        utility(context, None, None, alpha=case.alpha, frequency=frequency)
        for context, frequency in zip(case.contexts, case.frequencies, strict=True)
    )


def placed(case: Instance, rule: str) -> tuple[Placement, float]:
    """The placement from nothing, and what it gains over recomputing everything."""
    placement = Placement(case.tiers, alpha=case.alpha, rule=rule)
    for context, frequency in zip(case.contexts, case.frequencies, strict=True):
        placement.add(context, hits=frequency)
    placement.settle()
    return placement, placement.utility() - all_recomputed(case)


def upper_bound(case: Instance, reached: float, rounds: int = 200) -> float:
    """The least bound found on the gain of any placement, by Polyak's subgradient steps towards ``reached``, a gain
    that a placement has. Every round gives a bound, so more rounds only tighten it."""
    rows = [_gains(context, f, case) for context, f in zip(case.contexts, case.frequencies, strict=True)]
    prices = [0.0] * len(case.tiers)  # of a tier's whole capacity
    least, kept, pace, stalled = float("inf"), prices, 1.0, 0
    for _ in range(rounds):
        bound, slack = sum(prices), [1.0] * len(prices)
        for row in rows:
            net, tier, share = max((gain - share * prices[tier], tier, share) for gain, tier, share in row)
            if net > 0:
                bound += net
                slack[tier] -= share
        if bound < least:
            least, kept, stalled = bound, prices, 0
        elif (stalled := stalled + 1) > 10:
            prices, pace, stalled = kept, pace / 2, 0
            continue
        norm = sum(x * x for x in slack)
        if bound <= reached or norm == 0:
            break
        step = pace * (bound - reached) / norm
        prices = [max(0.0, price - step * x) for price, x in zip(prices, slack, strict=True)]
    return least


def _gains(context: Context, frequency: float, case: Instance) -> list[tuple[float, int, float]]:
    """(gain over recomputing, tier, share of the tier's capacity) of all places that fit, and of none."""
    base = utility(context, None, None, alpha=case.alpha, frequency=frequency)
    return [(0.0, 0, 0.0)] + [
        (utility(context, option, tier, alpha=case.alpha, frequency=frequency) - base, t, option.nbytes / tier.capacity)
        for t, tier in enumerate(case.tiers)
        for option in context.options
        if option.quality >= context.floor and option.nbytes <= tier.capacity
    ]


def shortfalls(seeds: Sequence[int], rules: Sequence[str] = RULES) -> dict[str, list[float]]:
    """Per rule and seed: how much of the upper bound's gain is missing, 0..1."""
    found: dict[str, list[float]] = {rule: [] for rule in rules}
    for seed in seeds:
        case = instance(seed)
        reached = {rule: placed(case, rule)[1] for rule in rules}
        bound = upper_bound(case, max(reached.values()))
        for rule in rules:
            found[rule].append(1 - reached[rule] / bound)
    return found


def timed(contexts: int, changes: int = 1000, seed: int = 2) -> tuple[float, list[float]]:
    """Seconds per context to place them all from nothing, and the seconds of single uses after that, sorted."""
    case = instance(seed, contexts)
    start = time.perf_counter()
    placement, _ = placed(case, "priced")
    per_context = (time.perf_counter() - start) / contexts
    draw, single = random.Random(seed), []
    for i in range(changes):
        key = case.contexts[min(contexts, int(draw.paretovariate(0.6))) - 1].key
        start = time.perf_counter()
        placement.use(key, i + 1.0, recomputed=placement.where(key)[0] is None)
        placement.settle()
        single.append(time.perf_counter() - start)
    return per_context, sorted(single)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.contexts.optimum", description=__doc__.partition("\n")[0])
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1000, 10_000, 100_000], help="sizes to time")
    options = parser.parse_args()
    print("rule      missing of the upper bound: mean, median, 95%, most; instances above 2%")
    for rule, missing in shortfalls(range(options.instances)).items():
        n, ranked = len(missing), sorted(missing)
        figures = sum(missing) / n, ranked[n // 2], ranked[n * 95 // 100], ranked[-1]
        print(f"{rule:9}", *(f"{x:7.2%}" for x in figures), f"{sum(x > 0.02 for x in missing):6}", flush=True)
    for contexts in options.contexts:
        each, single = timed(contexts)
        n = len(single)
        times = each, sum(single) / n, single[n // 2], single[n * 99 // 100], single[-1]
        print(f"{contexts} contexts: ms per context placed, per use and settle: mean, median, 99%, most:", end="")
        print(*(f"{1e3 * x:9.3f}" for x in times), flush=True)


if __name__ == "__main__":
    main()
