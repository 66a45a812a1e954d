"""Requests for contexts: times with bursts, and a popularity that is Zipf's and drifts. Models, with a seed.

- Arrivals: gaps are Gamma(shape, 1 / (shape * rate)): mean ``1 / rate``, coefficient of variation ``shape ** -0.5``.
  Shape 0.5 is 1.41 (Poisson: 1). BurstGPT (arXiv 2401.17644) fits Gamma to the arrivals of Azure's LLM service.
- Popularity: the context of rank r, from 0, is asked for with a probability proportional to ``(r + 1) ** -exponent``.
- Drift: after every ``drift`` requests the least popular context becomes the most popular, and all others lose a
  rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPE, EXPONENT, DRIFT = 0.5, 0.9, 50


@dataclass(frozen=True)
class Trace:
    times: list[float]
    """Seconds, ascending."""
    contexts: list[int]
    """The number of the context that each request is about."""


def zipf(count: int, exponent: float = EXPONENT) -> np.ndarray:
    """Probabilities by rank, float64 ``[count]``."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def make_trace(
    count: int, requests: int, *, rate: float, seed: int, drift: int = DRIFT, exponent: float = EXPONENT
) -> Trace:
    """``requests`` for ``count`` contexts, ``rate`` a second on average. ``drift`` 0: none."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(count)
    times = np.cumsum(draw.gamma(SHAPE, 1 / (SHAPE * rate), requests))
    ranks = np.searchsorted(np.cumsum(zipf(count, exponent)), draw.random(requests)).clip(max=count - 1)
    turns = np.arange(requests) // drift if drift else 0
    return Trace(times.tolist(), order[(ranks - turns) % count].tolist())
