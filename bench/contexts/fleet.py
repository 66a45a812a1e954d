"""A fleet of engines with a shared remote tier: a model.

- Popularity is Zipf's over all contexts, without drift. Arrivals are those of `trace`, at the same mean rate
  everywhere.
- A context is served by ``homes`` engines, chosen by its hash. All engines: requests go anywhere. One of them is
  simulated event by event, with its own RAM, disk and placement: decisions are local.
- Every context that is recomputed is written to the remote tier too, by one option. The remote tier is LRU over uses
  of all engines. By Che's approximation (Che, Tung and Wang, JSAC 2002) it holds a context with probability ``1 -
  exp(-rate * T)``, where ``rate`` is that of all its uses, and T is such that what is held fills the capacity. The
  simulated engine draws from that.
- For its placement the remote tier is a slowest tier without end that others keep filled: what it moves there is
  there.
- Each engine reads the remote tier over a link of its own. The bandwidth that all need together is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kara_kernels.contexts.profile import Profile
from kara_kernels.contexts.utility import MAX_BYTES, Context, Option, Tier

from .compare import HALF_LIFE, option_at
from .policies import Cached, Placed
from .scenario import H100_TIERS, LONGEST, MODELS, SHORTEST, WHOLE, modelled
from .simulate import simulate, summary
from .trace import SHAPE, Trace, zipf

# Of packets on the remote tier: one method, so that a prefix of them can be read.
METHOD, RATIO = "kara_sampled/int8", 0.25
ALPHA = 25  # times the mean seconds of recomputing
REMOTE = Tier("remote", MAX_BYTES, 1e9, 5e-3)


@dataclass(frozen=True)
class Fleet:
    engines: int = 1_000
    contexts: int = 10_000_000
    homes: int = 1_000
    """Engines that serve a context."""
    capacity: float = 500e12
    """Bytes of the remote tier."""
    rate: float = 1.0
    """Requests a second and engine."""
    requests: int = 12_000
    """At the simulated engine. The first half warms it up."""


def characteristic_time(rates: np.ndarray, count: float) -> float:
    """Seconds that LRU keeps what is not used: T of ``sum(1 - exp(-rates * T)) = count``. Infinite if all fit."""
    if count >= len(rates):
        return float("inf")
    low, high = 0.0, 1.0
    while -np.expm1(-rates * high).sum() < count:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-rates * middle).sum() < count else (low, middle)
    return high


class Shared:
    """One engine's policy with the remote tier behind it, and the seconds that deciding takes.

    Args:
        local: caches over the engine's own tiers, or a placement over these and the remote one.
        written: the option of a context on the remote tier.
        held: the probability that the remote tier holds a context, by key.
    """

    def __init__(
        self, local: Cached | Placed, written: Callable[[Context], Option], held: dict[str, float], seed: int
    ) -> None:
        self.local, self.written, self.held = local, written, held
        self.draw = np.random.default_rng(seed)
        self.moved, self.seconds = 0, 0.0
        self.remote = len(H100_TIERS)

    def lookup(self, context: Context, now: float) -> tuple[int, Option] | None:
        found = self._timed(self.local.lookup, context, now)
        if found is not None and found[0] != self.remote:
            return found
        if self.draw.random() >= self.held[context.key]:
            if found is not None and isinstance(self.local, Placed):
                self.local.placement.correct(context.key, None, None)
            return None
        if found is not None:
            return found
        option = self.written(context)
        self._timed(self._loaded, context, option, now)
        return self.remote, option

    def _loaded(self, context: Context, option: Option, now: float) -> None:
        """From now on the engine knows what the remote tier holds, and may keep it nearer."""
        if isinstance(self.local, Placed):
            self.local.know(context, option, REMOTE.name, now)
        else:
            self.local.stored(context, now)

    def stored(self, context: Context, now: float) -> None:
        self._timed(self.local.stored, context, now)

    def settle(self) -> None:
        self._timed(self.local.settle)

    def used(self) -> list[int]:
        return [*self.local.used(), 0][: self.remote + 1]

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.thread_time()
        done = work(*arguments)
        self.seconds += time.thread_time() - begun
        return done


def engine(fleet: Fleet, profile: Profile, judge: str, policy: str, seed: int) -> dict[str, Any]:
    """What one engine of the fleet sees with ``policy``: ``"placement"``, ``"fixed + LRU"`` or ``"LRU"``."""
    draw = np.random.default_rng([seed, 2])
    share = zipf(fleet.contexts)
    step = fleet.engines // fleet.homes
    mine = np.arange(int(draw.integers(step)), fleet.contexts, step)
    seen = share[mine] * step  # of this engine's requests, were its load the mean one
    rate = fleet.rate * float(seen.sum())
    times = np.cumsum(draw.gamma(SHAPE, 1 / (SHAPE * rate), fleet.requests))
    cumulated = np.cumsum(seen / seen.sum())
    asked = mine[np.searchsorted(cumulated, draw.random(fleet.requests)).clip(max=len(mine) - 1)]
    trace, known = Trace(times.tolist(), asked.tolist()), np.unique(asked)
    lengths = np.exp(draw.uniform(np.log(SHORTEST), np.log(LONGEST), len(known)))
    model, curves = MODELS[0], list(profile.contexts.values())
    contexts = {
        int(rank): modelled(model, curves[int(rank) % len(curves)], judge, str(rank), int(length) // 16 * 16)
        for rank, length in zip(known, lengths, strict=True)
    }
    written = option_at(WHOLE, 1.0) if policy == "LRU" else option_at(METHOD, RATIO)
    size = float(np.mean([written(context).nbytes for context in contexts.values()]))
    uses = fleet.rate * fleet.engines * share
    kept = characteristic_time(uses, fleet.capacity / size)
    held = {str(rank): float(-np.expm1(-uses[rank] * kept)) for rank in known}
    tiers = (*H100_TIERS, REMOTE)
    mean = float(np.mean([context.prefill_seconds for context in contexts.values()]))
    local: Cached | Placed
    if policy == "placement":
        local = Placed(tiers, alpha=ALPHA * mean, rule="priced", half_life=HALF_LIFE / rate, methods=(METHOD,))
    else:
        local = Cached(H100_TIERS, written, if_faster=True)
    return _seen(fleet, policy, Shared(local, written, held, seed), contexts, trace, kept)


def _seen(
    fleet: Fleet, name: str, policy: Shared, contexts: dict[int, Context], trace: Trace, kept: float
) -> dict[str, Any]:
    tiers, first = (*H100_TIERS, REMOTE), fleet.requests // 2
    run = simulate(tiers, contexts, trace, policy)
    seconds = trace.times[-1] - trace.times[first]
    read = sum(one.option.nbytes for one in run.served[first:] if one.option is not None and one.tier == policy.remote)
    new = [contexts[trace.contexts[one.request]] for one in run.served[first:] if one.option is None]
    found = summary(run, tiers, first)
    return {
        "policy": name, "homes": fleet.homes, "engines": fleet.engines, "contexts": fleet.contexts,
        "capacity": fleet.capacity,
        "quality": found["quality"], "ttft": found["ttft"], "p99": found["p99"], "share": found["share"],
        "read": read / seconds, "written": sum(policy.written(context).nbytes for context in new) / seconds,
        "kept": min(kept, 1e12), "placing": policy.seconds / fleet.requests,
    }  # fmt: skip
