"""What a stored context is worth: the utility of EVICPRESS (arXiv 2512.14946), with recomputation as one more place.

    utility = (alpha * quality - ttft) * frequency

``quality`` lies in 0..1, and 1 is the uncompressed context. ``ttft`` is the time to the first token in seconds.
``alpha`` is the delay in seconds that one unit of quality is worth. ``frequency`` counts uses, and old uses count less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..values import check_count, check_number

MAX_BYTES = 2**63 - 1
LONGEST = 1e9  # seconds
REBASE = 512  # half-lives: weights stay below 2**512, far from the 2**1024 where floats end


@dataclass(frozen=True, slots=True)
class Tier:
    """A place for packets.

    Args:
        name: unique among the tiers of one engine.
        capacity: bytes.
        bandwidth: bytes per second from this tier to the GPU.
        latency: seconds before the first byte arrives.
        reserve: bytes of ``capacity`` that no plan fills, 0..capacity. Packets that are new or come up from below may
            use them until others have left. Without it, two full tiers could never exchange anything.
    """

    name: str
    capacity: int
    bandwidth: float
    latency: float = 0.0
    reserve: int = 0

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_count("capacity", self.capacity, 0, MAX_BYTES)
        check_number("bandwidth", self.bandwidth, 1e-9, 1e18)
        check_number("latency", self.latency, 0, LONGEST)
        check_count("reserve", self.reserve, 0, self.capacity)


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a context, as profiled.

    Options of one ``method`` are prefixes of each other: cutting the larger packet gives the smaller one. A format
    that cannot be cut needs a method name for each of its ratios.

    Args:
        method: the format of the packet.
        ratio: stored bytes relative to the uncompressed context, above 0. For people: nothing is computed from it.
        nbytes: the size of the packet, at least 1.
        quality: of answers given from the packet, 0..1.
        decode_seconds: from the packet on the GPU to a cache that can be attended to.
    """

    method: str
    ratio: float
    nbytes: int
    quality: float
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        check_name("method", self.method)
        check_number("ratio", self.ratio, 1e-9, 1e9)
        check_count("nbytes", self.nbytes, 1, MAX_BYTES)
        check_number("quality", self.quality, 0, 1)
        check_number("decode_seconds", self.decode_seconds, 0, LONGEST)

    def cuts_to(self, other: Option) -> bool:
        """Whether a prefix of this packet is ``other``. A packet is a prefix of itself."""
        return self.method == other.method and self.nbytes >= other.nbytes

    def same_bytes(self, other: Option) -> bool:
        """Whether both describe the same packet, perhaps with qualities from different profiles."""
        return self.method == other.method and self.nbytes == other.nbytes


@dataclass(frozen=True, slots=True)
class Context:
    """A context and all the ways to store it.

    Args:
        key: names the context. Use the hash of its last full block.
        options: no two of one method have the same size.
        prefill_seconds: what computing the context takes.
        question_seconds: what computing a question behind it takes.
        floor: the least quality this context may be stored with, 0..1.
    """

    key: str
    options: tuple[Option, ...]
    prefill_seconds: float
    question_seconds: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_name("key", self.key)
        if not isinstance(self.options, tuple) or not all(isinstance(option, Option) for option in self.options):
            raise TypeError(f"options: expected a tuple of Option, got {self.options!r}")
        for one, other in pairwise(sorted((option.method, option.nbytes) for option in self.options)):
            if one == other:
                raise ValueError(f"options: expected one of method {one[0]!r} with {one[1]} bytes, got two")
        check_number("prefill_seconds", self.prefill_seconds, 0, LONGEST)
        check_number("question_seconds", self.question_seconds, 0, LONGEST)
        check_number("floor", self.floor, 0, 1)


def ttft(context: Context, option: Option | None = None, tier: Tier | None = None) -> float:
    """Seconds to the first token. Without ``option`` and ``tier`` the context is recomputed."""
    if option is None or tier is None:
        return context.prefill_seconds + context.question_seconds
    loading = option.nbytes / tier.bandwidth + tier.latency
    return loading + option.decode_seconds + context.question_seconds


def utility(
    context: Context, option: Option | None, tier: Tier | None, *, alpha: float, frequency: float = 1.0
) -> float:
    """``(alpha * quality - ttft) * frequency``. A recomputed context has quality 1. May be negative."""
    quality = 1.0 if option is None else option.quality
    return (alpha * quality - ttft(context, option, tier)) * frequency


class Decay:
    """Weights of uses that halve with age, without touching what is stored.

    Forward decay (Cormode et al., ICDE 2009): a use at time ``now`` weighs ``2 ** ((now - start) / half_life)`` for
    ever. All sums age by the same factor, so their order changes with uses only, never because time passes.

    Args:
        half_life: seconds after which a use counts half.
        start: the time whose uses weigh 1, in seconds.
    """

    def __init__(self, half_life: float, start: float = 0.0) -> None:
        self.half_life = check_number("half_life", half_life, 1e-9, LONGEST)
        self.start = check_number("start", start, -math.inf, math.inf)

    def weight(self, now: float) -> float:
        """The weight of one use at ``now``. Divide a sum of weights by it to get decayed hits at ``now``."""
        return math.exp2((now - self.start) / self.half_life)

    def rebase(self, now: float) -> float:
        """Moves ``start`` when weights at ``now`` become large. Multiply all stored weights by the result, which is 1
        almost always and otherwise a power of two, so that no order changes."""
        if now - self.start <= REBASE * self.half_life:
            return 1.0
        halvings = math.floor((now - self.start) / self.half_life)
        self.start += halvings * self.half_life
        return math.ldexp(1.0, -halvings)


def check_name(name: str, value: object) -> str:
    """Checks for a str that is not empty."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: expected a name, got ''")
    return value


def check_option(value: object) -> Option:
    if not isinstance(value, Option):
        raise TypeError(f"option: expected an Option, got {type(value).__name__}")
    return value


def check_tiers(tiers: Sequence[Tier]) -> tuple[Tier, ...]:
    """Checks for one or more tiers with names of their own."""
    if not tiers or len({tier.name for tier in tiers}) < len(tiers):
        raise ValueError(f"tiers: expected one or more with different names, got {[tier.name for tier in tiers]}")
    return tuple(tiers)
