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
    load: dict[str, float] = field(default_factory=dict)
    """Seconds per row of each form that was loaded, from shared memory to rows that attention can read. Most of a load
    is work on rows, so a form of fewer bytes is not faster."""
    read: dict[str, float] = field(default_factory=dict)
    """Seconds per byte from lower tiers to shared memory."""

    def to_compute(self, tokens: int) -> float:
        """Seconds, or a guess."""
        return tokens * (self.prefill or GUESS)

    def to_load(self, form: str, rows: int) -> float:
        """Seconds. Of a form that was not loaded yet: those of the slowest that was."""
        return rows * self.load.get(form, max(self.load.values(), default=0.0))

    def see_prefill(self, value: float) -> None:
        self.prefill = _mean(self.prefill or value, value)

    def see_load(self, form: str, value: float) -> None:
        self.load[form] = _mean(self.load.get(form, value), value)

    def see_read(self, tier: str, value: float) -> None:
        self.read[tier] = _mean(self.read.get(tier, value), value)

    def fade(self, form: str, tier: str) -> None:
        """Costs kept a context from being loaded. They are not measured again unless they become smaller."""
        self.load[form] = FADE * self.to_load(form, 1)
        if tier in self.read:
            self.read[tier] *= FADE


def _mean(before: float, value: float) -> float:
    return (1 - STEADY) * before + STEADY * value
