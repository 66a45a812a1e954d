"""Keys and values of layers that slide, beside a cache that compresses the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class SlidingLayers:
    """The newest ``window - 1`` tokens of each layer, padding included, as transformers' own caches hold them. What a
    forward pass adds counts when it is committed.

    Args:
        windows: tokens that a query sees, itself included, by the layer's index.
    """

    def __init__(self, windows: Mapping[int, int]) -> None:
        self.windows = dict(windows)
        self.reset()

    def reset(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._added: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values ``[S, H, q, D]``, and returns them behind those that their first query may see."""
        held = self._held.get(layer)
        keys, values = new if held is None else (torch.cat(both, 2) for both in zip(held, new, strict=True))
        first = max(0, keys.shape[2] - self.windows[layer] + 1)
        self._added[layer] = keys[:, :, first:], values[:, :, first:]
        return keys, values

    def commit(self) -> None:
        self._held |= self._added
        self._added = {}

    def mask_sizes(self, layer: int, tokens: int, new: int) -> tuple[int, int]:
        """How many columns a mask has after ``tokens`` with ``new`` ones, and the token of the first."""
        held = min(tokens, self.windows[layer] - 1)
        return held + new, tokens - held
