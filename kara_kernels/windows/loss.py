"""What a selection loses: the share of a window's scores that the dropped tokens had.

With ``reduction="mean"`` and ``value_norm=False`` a score is the attention that a token receives, so this is the share
of attention that was dropped. After DBudgetKV (arXiv 2502.16886), which keeps as many tokens as an attention norm
needs. These are a few operations of PyTorch on one number per token and head, without a synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compress import CompressedWindow
from .plan import Plan


def lost_share(scores: Tensor, keep_indices: Tensor) -> Tensor:
    """The share of the scores that dropped tokens had, the mean over layers and heads.

    Args:
        scores: float32 ``[L, S, H, W]`` of a window, as :class:`~kara_kernels.CompressedWindow` has them. Negative ones
            count as zero.
        keep_indices: int32 ``[L, S, H, K]``, window-relative.

    Returns:
        float32 ``[S]``, 0..1; 0 for a skipped sequence. Shapes and contents are not checked.
    """
    scores = scores.clamp(min=0)
    total = scores.sum(-1)
    kept = scores.gather(-1, keep_indices.clamp(min=0).long()).sum(-1)
    return _share(total - kept, total).mean((0, 2)) * (keep_indices[0, :, 0, 0] >= 0)


def needed_tokens(scores: Tensor, max_loss: float) -> Tensor:
    """The fewest tokens whose scores leave at most ``max_loss`` of the window's to the others.

    Every layer and head keeps as many, its best ones, and the loss is the mean over them, as in :func:`lost_share`.

    Args:
        scores: float32 ``[L, S, H, W]``.
        max_loss: 0..1.

    Returns:
        int32 ``[S]``, 1..W. Shapes and contents are not checked.
    """
    scores = scores.clamp(min=0)
    total = scores.sum(-1, keepdim=True)
    left = total - scores.sort(-1, descending=True).values.cumsum(-1)
    lost = _share(left, total).mean((0, 2))  # [S, W], of the best 1, 2, ... tokens
    return (lost[:, :-1] > max_loss).sum(-1, dtype=torch.int32) + 1


def _share(part: Tensor, total: Tensor) -> Tensor:
    """0 of a window without any score, because nothing can be lost there."""
    return (part / total.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)


class Loss(NamedTuple):
    """What one compression lost."""

    request_id: str
    lost: float
    """As :func:`lost_share` has it."""
    needed: int
    """As :func:`needed_tokens` has it, for :meth:`Ledger.observe`; 0 without a guard."""


class Losses:
    """Measures what the compressions of a step lost, and hands the numbers on once they have reached the host.

    Args:
        max_loss: the policy's; None measures nothing for a guard.
        reduce: averages a float32 tensor over tensor-parallel ranks. May work in place and return None.
    """

    def __init__(self, max_loss: float | None, reduce: Callable[[Tensor], Tensor | None] | None = None) -> None:
        self._max_loss, self._reduce = max_loss, reduce
        self._coming: list[tuple[list[str], Tensor, Any]] = []

    def watch(self, plans: Sequence[Plan], result: CompressedWindow) -> None:
        """Measures one call of :func:`kara_kernels.compress_window`. Pass it to :func:`execute`."""
        lost = lost_share(result.scores, result.keep_indices)
        needed = torch.zeros_like(lost)
        if self._max_loss is not None:
            needed = needed_tokens(result.scores, self._max_loss).float()
        found = torch.stack([lost, needed])
        if self._reduce is not None and (reduced := self._reduce(found)) is not None:
            found = reduced
        arrived = None
        if found.is_cuda:
            found = found.to("cpu", non_blocking=True)  # into pinned memory, which PyTorch allocates for it
            arrived = torch.cuda.Event()
            arrived.record()
        self._coming.append(([plan.request_id for plan in plans], found, arrived))

    def arrived(self) -> list[Loss]:
        """Losses that have reached the host since the last call, in the order of their compressions."""
        ready = []
        while self._coming and (self._coming[0][2] is None or self._coming[0][2].query()):
            names, found, _ = self._coming.pop(0)
            for name, lost, needed in zip(names, *found.tolist(), strict=True):
                ready.append(Loss(name, lost, math.ceil(needed)))
        return ready
