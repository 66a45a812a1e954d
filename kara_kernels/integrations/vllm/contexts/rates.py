"""What computing and loading cost, as measured."""

from __future__ import annotations

from dataclasses import dataclass, field

GUESS = 1e-3  # seconds to compute a token, until a step was measured
STEADY = 0.2  # weight of the newest measurement in a mean
FADE = 0.98


@dataclass
class Rates:
    """What was measured, as means that forget."""

    prefill: float = 0.0
    """Seconds per token. 0: not measured yet."""
    load: float = 0.0
    """Seconds per byte, from shared memory to rows that attention can read."""
    read: dict[str, float] = field(default_factory=dict)
    """The same from lower tiers to shared memory."""

    def to_compute(self, tokens: int) -> float:
        """Seconds, or a guess."""
        return tokens * (self.prefill or GUESS)

    def see(self, name: str, value: float) -> None:
        before = getattr(self, name)
        setattr(self, name, value if not before else (1 - STEADY) * before + STEADY * value)

    def see_read(self, tier: str, value: float) -> None:
        self.read[tier] = (1 - STEADY) * self.read.get(tier, value) + STEADY * value

    def fade(self, tier: str) -> None:
        """Costs kept a context from being loaded. They are not measured again unless they become smaller."""
        self.load *= FADE
        if tier in self.read:
            self.read[tier] *= FADE
