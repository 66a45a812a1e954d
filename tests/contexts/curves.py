"""A profile without a model: contexts whose losses are like measured ones, drawn with a seed."""

from __future__ import annotations

import random

from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext
from kara_kernels.contexts.utility import Tier

TOKENS, TOKEN_BYTES = 768, 23_040
INT8 = (
    (0.07, 0.09),
    (0.13, 0.04),
    (0.19, 0.013),
    (0.25, 0.008),
    (0.28, 0.006),
    (0.31, 0.004),
    (0.38, 0.002),
    (0.5, 3e-5),
)
EXACT = ((0.25, 0.2), (0.5, 0.09), (0.75, 0.03), (1.0, 1e-6))
METHODS = {"kara_sampled/int8": (INT8, 1.0), "snapkv/int8": (INT8, 1.3), "keydiff/exact": (EXACT, 1.1),
           "knorm/exact": (EXACT, 1.7), "snapkv/exact": (EXACT, 1.0)}  # fmt: skip


def profile(count: int = 12, seed: int = 0) -> Profile:
    draw = random.Random(seed)
    contexts = {}
    for number in range(count):
        measured = []
        for method, (steps, factor) in METHODS.items():
            worse = factor * draw.lognormvariate(0, 0.6)
            for index, (ratio, kl) in enumerate(steps):
                nbytes = round(ratio * TOKENS * TOKEN_BYTES)
                measured.append(Measured(method, index + 1, ratio, nbytes, 0.02 * ratio, 768, kl * worse, 0.9))
        key = f"context {number}"
        contexts[key] = ProfiledContext(key, key, TOKENS, 1.5, 0.1, ("Why?",), tuple(measured))
    tiers = (Tier("ram", 10**10, 5e9, 1e-5), Tier("disk", 10**11, 2e8, 1e-3))
    return Profile("synthetic", {"model": "none"}, tiers, contexts)
