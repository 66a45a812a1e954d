"""Exact top-k of a row of scores, in position order. See Select in ``docs/method.md``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_scores, slices
from ..values import check_count

SLICE_ELEMENTS = 1 << 20  # scores per slice; a dozen int64 temporaries of this size take 100 MB


def select_topk(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best positions of each row, ascending.

    ``scores`` is float32 ``[..., W]``, ``1 <= k <= W``. Returns int32 ``[..., k]``. Exact for any bit pattern: higher
    score first, ties to the lower position, NaN ranks as -inf, -0.0 equals +0.0. Raises TypeError or ValueError for a
    wrong dtype or ``k``.
    """
    check_scores(scores)
    check_count("k", k, 1, scores.shape[-1])
    return best_positions(scores, k)


def best_positions(scores: Tensor, k: int) -> Tensor:
    """:func:`select_topk` without checks."""
    return by_rows(lambda rows: positions_of_best(unique_rank(order_keys(rows)), k), scores, k)


def by_rows(select: Callable[[Tensor], Tensor], scores: Tensor, k: int) -> Tensor:
    """Applies ``select`` to ``scores [..., W]`` some rows at a time, which bounds the extra memory for any batch."""
    rows = scores.reshape(-1, scores.shape[-1])
    indices = torch.empty(len(rows), k, dtype=torch.int32, device=scores.device)
    for some in slices(len(rows), max(1, SLICE_ELEMENTS // rows.shape[1])):
        indices[some] = select(rows[some])
    return indices.view(*scores.shape[:-1], k)


def order_keys(scores: Tensor) -> Tensor:
    """int32 keys that order like the scores, with NaN as -inf and a single zero."""
    clean = torch.where(scores.isnan(), -torch.inf, scores)
    clean = torch.where(clean == 0, 0.0, clean)
    bits = clean.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def unique_rank(keys: Tensor) -> Tensor:
    """int64 ``[..., W]``, distinct within a row: ordered by key, and of equal keys the lower position ranks higher."""
    width = keys.shape[-1]
    return (keys.long() << 32) | torch.arange(width - 1, -1, -1, device=keys.device)


def positions_of_best(rank: Tensor, k: int) -> Tensor:
    """Ascending int32 positions of the ``k`` largest of each row of :func:`unique_rank`."""
    best = rank.topk(k, dim=-1, sorted=False).indices
    return best.sort(dim=-1).values.int()
