"""Scores windows by a published method, or by one that the user installed, for comparison with Kara on a real server.

A method sees what it would see in the model: all rows that the sequence still holds up to the last recorded query, and
the queries of window and tail, as the ring recorded them. It is PyTorch, one layer at a time, and does not wait for a
GPU unless the method does. Methods of keys alone get no queries, and no ring is allocated for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import row_scales
from ..checks import check_tensor
from ..paged import PackedCache, PagedCache, rows_of
from ..scorers import Rows, registered
from .plan import Plan
from .policy import Policy
from .queries import QueryRing, upload

Scales = tuple[float | Tensor | None, float | Tensor | None]
"""``k_scale`` and ``v_scale`` of :func:`kara_kernels.engine.execute`."""


@torch.no_grad()
def scores_of(
    plans: Sequence[Plan], cache: PagedCache | PackedCache, ring: QueryRing, scorer: str, scale: float | None,
    scales: Scales,
) -> Tensor:  # fmt: skip
    """float32 ``[L, S, H, W]`` of plans with one ``window``.

    Raises:
        TypeError, ValueError: a scorer that returns something else, or refuses the rows.
    """
    return torch.stack([_scores(plan, cache, ring, scorer, scale, scales) for plan in plans], 1)


def _scores(
    plan: Plan, cache: PagedCache | PackedCache, ring: QueryRing, scorer: str, scale: float | None, scales: Scales
) -> Tensor:  # fmt: skip
    device = (cache.pools if isinstance(cache, PackedCache) else cache.k)[0].device
    table = upload(plan.blocks, torch.int64, device)
    if isinstance(cache, PackedCache):
        cache, table = cache.load(table), torch.arange(len(table), device=device)
    dropped = plan.logical_len - plan.physical_len
    total = plan.last_query + 1 - dropped if plan.num_queries else plan.physical_len
    queries = ring.copied(plan.request_id, plan.last_query, plan.num_queries)
    return _by_layer(cache, table, queries, total, plan.window_start, plan.window, scorer, scale, dropped, scales)


def blank_scores(
    window: int, cache: PagedCache, ring: QueryRing, policy: Policy, scale: float | None, scales: Scales
) -> Tensor:  # fmt: skip
    """Scores ``[L, 1, H, W]`` of nobody's window, so that a scorer which fails does so before the first request."""
    total = window + policy.tail
    count = min(total, policy.query_rows)
    table = torch.zeros(-(-total // cache.shape[1]), dtype=torch.int64, device=cache.k[0].device)
    queries = ring.blank.expand(-1, count, -1, -1)
    return _by_layer(cache, table, queries, total, 0, window, policy.scorer, scale, 0, scales)[:, None]


def _by_layer(
    cache: PagedCache, table: Tensor, queries: Tensor, total: int, start: int, window: int, name: str,
    scale: float | None, dropped: int, scales: Scales,
) -> Tensor:  # fmt: skip
    """``[L, H, W]``. Random scores differ from layer to layer and from window to window, but not between runs."""
    scorer, layers = registered(name).scorer, len(cache.k)
    _, _, heads, dim = cache.shape
    scale = dim**-0.5 if scale is None else scale
    factors = [
        row_scales(of, given, layers, heads, cache.k[0].device)
        for of, given in zip(("k_scale", "v_scale"), scales, strict=True)
    ]
    found = []
    for layer, (k, v) in enumerate(zip(cache.k, cache.v or cache.k, strict=True)):
        keys, values = (
            rows_of(pool, table, of[layer] if isinstance(of, Tensor) else of)[:, :, :total]
            for pool, of in zip((k, v), factors, strict=True)
        )
        query = queries[layer : layer + 1].unflatten(2, (heads, -1))
        rows = Rows(query, keys, values, start, window, scale, seed=layers * (start + dropped) + layer)
        scores = check_tensor(f"scorer {name!r}", scorer(rows), (1, heads, window), (torch.float32,), keys.device)
        found.append(scores[0])
    return torch.stack(found)
