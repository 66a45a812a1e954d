"""Orders the rows of a context, when it is stored, by the scorer of its method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..ops import rank_rows
from ..paged import PagedCache, rows_of
from ..scorers import Rows, named


class Judges(NamedTuple):
    """Queries that the engine records, and how they look ahead."""

    of_context: Callable[[str, int, int], Tensor | None]
    """``of_context(request, tokens, computed)``: see :meth:`kara_kernels.engine.QueryRing.of_context`."""
    blank: Tensor
    """``[L, 1, H*G, D]``, as queries are; for a warm-up."""
    ahead: Callable[[int, torch.device], LookAhead] | None
    """See :class:`~kara_kernels.scorers.Rows`."""
    scale: float
    """Of the model's logits."""
    k_scales: Tensor | None = None
    """float32 ``[L, H]``: factors on the keys of an fp8 cache."""
    v_scales: Tensor | None = None
    """Those on its values."""


@torch.inference_mode()
def ranked(cache: PagedCache, table: Tensor, scorer: str, queries: Tensor | None, judges: Judges | None) -> Tensor:
    """int32 ``[L, H, tokens]``: the rows of the blocks in ``table``, best first. One layer of them is copied at a time.

    Args:
        queries: ``[L, N, H*G, D]``; None for scorers that need none.

    Raises:
        ValueError: a scorer that needs queries, without any.
    """
    order = []
    for layer, (k, v) in enumerate(zip(cache.k, cache.v or cache.k, strict=True)):
        scales = (None, None) if judges is None else (judges.k_scales, judges.v_scales)
        keys, values = (
            rows_of(pool, table, 1.0 if of is None else of[layer]) for pool, of in zip((k, v), scales, strict=True)
        )
        heads, tokens, dim = keys.shape[1:]
        if queries is None:
            query = keys.new_empty(1, 0, heads, 1, dim)
        else:
            query = queries[layer : layer + 1].unflatten(2, (heads, -1))
        ahead, scale = (None, dim**-0.5) if judges is None else (judges.ahead, judges.scale)
        order.append(rank_rows(named(scorer)(Rows(query, keys, values, 0, tokens, scale, ahead=ahead))))
    return torch.cat(order)
