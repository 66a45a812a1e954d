"""The optimum of a placement in plain Python, written from the definition: the judge of `kara_kernels.contexts.place`.

A multiple-choice knapsack with one knapsack per tier, by dynamic programming over the bytes used on every tier.
"""

from __future__ import annotations

from collections.abc import Sequence

from kara_kernels.contexts.utility import Context, Tier

Uses = Sequence[tuple[Context, float]]  # contexts with their frequencies


def gains(context: Context, frequency: float, tiers: Sequence[Tier], alpha: float) -> list[tuple[int, int, float]]:
    """(tier, bytes, what it is worth more than recomputing) of every allowed place that gains."""
    rows = []
    for index, tier in enumerate(tiers):
        for option in context.options:
            saved = context.prefill_seconds - option.nbytes / tier.bandwidth - tier.latency - option.decode_seconds
            gain = frequency * (saved - alpha * (1 - option.quality))
            if option.quality >= context.floor and gain > 0 and option.nbytes <= tier.capacity - tier.reserve:
                rows.append((index, option.nbytes, gain))
    return rows


def optimum(uses: Uses, tiers: Sequence[Tier], alpha: float) -> float:
    """The most that all contexts together can be worth more than recomputing them all."""
    best = {(0,) * len(tiers): 0.0}
    for context, frequency in uses:
        grown = dict(best)  # recomputed
        for index, nbytes, gain in gains(context, frequency, tiers, alpha):
            room = tiers[index].capacity - tiers[index].reserve - nbytes
            for used, value in best.items():
                if used[index] <= room:
                    then = (*used[:index], used[index] + nbytes, *used[index + 1 :])
                    if value + gain > grown.get(then, -1.0):
                        grown[then] = value + gain
        best = grown
    return max(best.values())
