"""``python -m bench.contexts.optimum``: how close placements come to the optimum, and what a decision costs.

The optimum of 64 contexts x 12 options x 4 tiers is out of reach for dynamic programming. Lagrangian relaxation bounds
it from above: for any price per byte, what all contexts gain in their own best places after paying, plus the price of
the capacity. A placement within 2% of the bound is within 2% of the optimum. The few others are compared with the
optimum itself, which an integer program finds. Gains are counted from everything being recomputed, because utilities
can be negative.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import tables
from bench.store import concluded, digest_of_folders, make_folder, measure_all
from bench.tables import Row
from kara_kernels.contexts.place import RULES, Placement
from kara_kernels.contexts.utility import Context, Option, Tier, utility

RESULTS = Path(__file__).parents[1] / "results"
GOAL = 0.02  # of the optimum
MORE = 1000  # changes that are timed
PART = 50  # instances between two times that results are kept
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


def optimum(case: Instance) -> float:
    """The most that any placement gains, by SciPy's integer programs (HiGHS), at most 0.01% too high."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]

    rows = [_gains(context, f, case) for context, f in zip(case.contexts, case.frequencies, strict=True)]
    places = [(number, *place) for number, row in enumerate(rows) for place in row if place[0] > 0]
    once, held = np.zeros((len(rows), len(places))), np.zeros((len(case.tiers), len(places)))
    for column, (number, _, tier, share) in enumerate(places):
        once[number, column], held[tier, column] = 1, share
    found = milp(
        [-gain for _, gain, _, _ in places], integrality=np.ones(len(places)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, ub=1), LinearConstraint(held, ub=1)], options={"mip_rel_gap": 1e-4},
    )  # fmt: skip
    return -float(found.mip_dual_bound)


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


def compared(seeds: Sequence[int]) -> list[Row]:
    """A row per instance. ``exact``: what is missing of the optimum, where more than the goal is missing of the
    bound."""
    rows: list[Row] = []
    for seed, *missing in zip(seeds, *shortfalls(seeds).values(), strict=True):
        row = {"table": "instance", "seed": seed, **dict(zip(RULES, missing, strict=True))}
        if row["priced"] > GOAL:
            row["exact"] = 1 - placed(instance(seed), "priced")[1] / optimum(instance(seed))
        rows.append(row)
    return rows


def timed(contexts: int, changes: int = MORE, seed: int = 2) -> list[Row]:
    """Milliseconds per context to place them all from nothing, and of single uses after that."""
    case = instance(seed, contexts)
    start = time.perf_counter()
    placement, _ = placed(case, "priced")
    per_context = (time.perf_counter() - start) / contexts
    draw, single, collecting = random.Random(seed), [], []
    gc.callbacks.append(lambda phase, _: collecting.append((phase, time.perf_counter())))
    for i in range(changes):
        key = case.contexts[min(contexts, int(draw.paretovariate(0.6))) - 1].key
        start = time.perf_counter()
        placement.use(key, i + 1.0, recomputed=placement.where(key)[0] is None)
        placement.settle()
        single.append(1e3 * (time.perf_counter() - start))
    gc.callbacks.pop()
    pauses = [end - start for (phase, start), (_, end) in pairwise(collecting) if phase == "start"]
    return [{"table": "time", "contexts": contexts, "placed": 1e3 * per_context, **spread(single),
             "pause": 1e3 * max(pauses, default=0.0)}]  # fmt: skip


def spread(values: Sequence[float]) -> Row:
    ranked = sorted(values)
    shares = {"median": 50, "p95": 95, "p99": 99}
    found = {name: ranked[len(ranked) * share // 100] for name, share in shares.items()}
    return {"mean": statistics.fmean(ranked), **found, "most": ranked[-1]}


def page(head: Row, rows: Sequence[Row]) -> str:
    cases = [row for row in rows if row["table"] == "instance"]
    times = [row for row in rows if row["table"] == "time"]
    return PAGE.format(
        **head, instances=f"{len(cases):,}", goal=f"{GOAL:.0%}", more=f"{MORE:,}",
        gaps=tables.markdown(
            ("rule", "mean", "median", "95 %", "most", f"above {GOAL:.0%}"), [_gap(rule, cases) for rule in RULES]
        ),
        exact=", ".join(f"{row['exact']:.2%}" for row in cases if "exact" in row) or "none",
        times=tables.markdown(
            ("contexts", "placed, ms each", "a change, ms: mean", "median", "99 %", "most", "longest collection"),
            [(f"{row['contexts']:,}", *(f"{row[x]:.3f}" for x in ("placed", "mean", "median", "p99", "most", "pause")))
             for row in times],
        ),
    )  # fmt: skip


def _gap(rule: str, cases: Sequence[Row]) -> tuple[str, ...]:
    missing = [row[rule] for row in cases]
    found = spread(missing)
    return rule, *(f"{found[x]:.2%}" for x in ("mean", "median", "p95", "most")), str(sum(x > GOAL for x in missing))


PAGE = """# How close placements come to the optimum, and what deciding costs

Written by `python -m bench.contexts.optimum`. {instances} random instances of 64 contexts, 12 options and 4 tiers:
`bench/contexts/optimum.py`.

## Missing of the optimum's gain

Relative to an upper bound of the optimum, so less is missing in truth. Goal: {goal}.

{gaps}
*priced* in the instances above {goal}, relative to the optimum itself (HiGHS): {exact}.

## Time

Pure Python on one core of this machine ({machine}): placing all contexts from nothing, then {more} uses, each followed
by a settlement. Goal: 5 ms, amortised. Python's garbage collector interrupts some changes. The last column is its
longest pause.

{times}"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.contexts.optimum", description=__doc__.partition("\n")[0])
    parser.add_argument("--instances", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1000, 10_000, 100_000], help="sizes to time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for contexts-optimum.md and .csv")
    options = parser.parse_args(arguments)
    for name, least in (("instances", options.instances), ("contexts", min(options.contexts, default=1))):
        if least < 1:
            parser.error(f"--{name}: expected 1 or more, got {least}")
    return concluded("optimum", partial(_run, options))


def _run(options: argparse.Namespace) -> None:
    make_folder(options.out)
    work: dict[str, Callable[[], list[Row]]] = {}
    for first in range(0, options.instances, PART):
        seeds = range(first, min(first + PART, options.instances))
        work[f"instances from {first}"] = partial(compared, seeds)
    for contexts in options.contexts:
        work[f"{contexts:,} contexts"] = partial(timed, contexts)
    code = digest_of_folders("kara_kernels/contexts", "bench/contexts/optimum.py")
    rows = [row for some in measure_all("optimum", work, options.instances, code) for row in some]
    head = {"machine": platform.processor() or platform.machine()}
    tables.write(options.out / "contexts-optimum.csv", rows, **head)
    (options.out / "contexts-optimum.md").write_text(page(head, rows), encoding="utf-8")
    print(options.out / "contexts-optimum.md")


if __name__ == "__main__":
    raise SystemExit(main())
