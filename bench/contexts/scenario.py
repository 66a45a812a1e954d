"""Where contexts are served: their options, the tiers, what computing takes and how much is asked for.

Quality curves are a real profile's. On this machine sizes and times are the profile's too. On an H100 they are a
model's: the profile says which share of a context's bytes an option has, and what it costs in quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kara_kernels.contexts.profile import Profile, ProfiledContext
from kara_kernels.contexts.utility import Context, Option, Tier

PEAK, EFFICIENCY, READS = 989e12, 0.5, 3.35e12  # H100 SXM: dense bfloat16 FLOP/s, the share reached; HBM bytes/s
DECODES = 500e9  # bytes of packets decoded a second on an H100: an assumption
QUESTION = 100  # tokens
SHORTEST, LONGEST = (
    4096,
    20480,
)  # tokens of a context, log-uniform between, as LongBench's (arXiv 2308.14508) mostly are
BUSY = 0.5  # of the GPU's time if everything were recomputed: this sets the rate of requests
RAM_SHARE, DISK_SHARE = 0.11, 1.1  # of all contexts uncompressed: as 80 and 800 GB are of 555 contexts of Llama-3.1-8B
WHOLE = "whole"


@dataclass(frozen=True)
class Model:
    """A dense transformer on an H100."""

    name: str
    parameters: float
    layers: int
    hidden: int
    token_bytes: int
    """Of the KV cache, 16 bit."""

    def prefill_seconds(self, tokens: int) -> float:
        """Two operations a parameter and token, and causal attention: half of 4 * layers * hidden * tokens ** 2."""
        operations = 2 * self.parameters * tokens + 4 * self.layers * self.hidden * tokens**2 / 2
        return operations / (EFFICIENCY * PEAK)

    def question_seconds(self, tokens: int) -> float:
        """Of a question behind ``tokens``: its operations, or reading weights and context once, whichever is longer."""
        operations = 2 * self.parameters * QUESTION + 4 * self.layers * self.hidden * QUESTION * tokens
        return max(operations / (EFFICIENCY * PEAK), (2 * self.parameters + tokens * self.token_bytes) / READS)


MODELS = (
    Model("Llama-3.1-8B", 8.03e9, 32, 4096, 131_072),
    Model("Qwen2.5-14B", 14.8e9, 48, 5120, 196_608),
)
H100_TIERS = (Tier("RAM", 80 * 10**9, 20e9, 1e-4), Tier("SSD", 800 * 10**9, 2e9, 1e-3))
HERE = "SmolLM2-135M, here"


@dataclass(frozen=True)
class Scenario:
    name: str
    tiers: tuple[Tier, ...]
    """From the fastest to the slowest."""
    contexts: Sequence[Context]
    """Option ``whole`` of each is the uncompressed context."""
    model: bool
    """Sizes and times are a model's, not measured."""

    @property
    def rate(self) -> float:
        """Requests a second that keep the GPU busy for ``BUSY`` of the time if all contexts are recomputed."""
        seconds = [context.prefill_seconds + context.question_seconds for context in self.contexts]
        return BUSY * len(seconds) / sum(seconds)


def on_h100(model: Model, profile: Profile, judge: str, count: int, seed: int) -> Scenario:
    """``count`` contexts: curves of the profile in turn, lengths drawn with the seed."""
    lengths = np.exp(np.random.default_rng([seed, 1]).uniform(np.log(SHORTEST), np.log(LONGEST), count))
    curves = list(profile.contexts.values())
    contexts = [
        modelled(model, curves[number % len(curves)], judge, f"{number}", int(length) // 16 * 16)
        for number, length in enumerate(lengths)
    ]
    return Scenario(f"{model.name} on an H100", H100_TIERS, contexts, True)


def modelled(model: Model, curve: ProfiledContext, judge: str, key: str, tokens: int) -> Context:
    whole = tokens * model.token_bytes
    options = [
        Option(m.method, m.ratio, round(m.ratio * whole), m.quality(judge), m.ratio * whole / DECODES)
        for m in curve.measured
    ]
    options.append(Option(WHOLE, 1.0, whole, 1.0, whole / DECODES))
    return Context(key, tuple(options), model.prefill_seconds(tokens), model.question_seconds(tokens))


def here(profile: Profile, judge: str, count: int) -> Scenario:
    """The profile's sizes, times and tiers. Capacities: ``RAM_SHARE`` and ``DISK_SHARE`` of all whole contexts."""
    curves, contexts = list(profile.contexts.values()), []
    for number in range(count):
        curve = curves[number % len(curves)]
        most = max(curve.measured, key=lambda m: m.ratio)  # rows in the cache's dtype: no decoding but copies
        whole = Option(WHOLE, 1.0, round(most.nbytes / most.ratio), 1.0, most.decode_seconds)
        context = curve.context(judge)
        contexts.append(replace(context, key=f"{number}", options=(*context.options, whole)))
    total = sum(option.nbytes for context in contexts for option in context.options if option.method == WHOLE)
    fast, slow = profile.tiers[0], profile.tiers[-1]
    tiers = (replace(fast, name="RAM", capacity=int(RAM_SHARE * total)),
             replace(slow, name="disk", capacity=int(DISK_SHARE * total)))  # fmt: skip
    return Scenario(HERE, tiers, contexts, False)
