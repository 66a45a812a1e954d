"""Executes plans. This is the only part of the shim that touches the cache.

Every worker executes the same plans before its step zeroes, copies or writes a block. Freed blocks may already belong
to another sequence in that step. On one stream, its writes come later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..paged import PackedCache, PagedCache
from .compress import CompressedWindow, compress_window
from .plan import Plan
from .policy import KARA, Policy
from .queries import QueryRing, upload
from .scored import blank_scores, scores_of

Watch = Callable[[Sequence[Plan], CompressedWindow], None]


def execute(
    plans: Sequence[Plan], cache: PagedCache | PackedCache, ring: QueryRing, policy: Policy, *,
    scale: float | None = None, k_scale: float | Tensor | None = None, v_scale: float | Tensor | None = None,
    reduce_scores: Callable[[Tensor], Tensor] | None = None, look_ahead: LookAhead | None = None,
    scores: Tensor | None = None, dry_run: bool = False, watch: Watch | None = None, backend: str = "auto",
) -> list[Tensor]:  # fmt: skip
    """Compresses every planned window in all layers, in place.

    Args:
        plans: plans of one step, from :meth:`kara_kernels.engine.Ledger.plan`. Execute them before ``ring`` releases
            any of their sequences.
        cache: the engine's pools, all layers.
        ring: the recorded queries.
        policy: the policy that the plans were made with. Each plan has its own ``window`` and ``keep``.
        scale, k_scale, reduce_scores, look_ahead, backend: see :func:`kara_kernels.compress_window`.
            ``look_ahead`` is ``policy.positions_ahead`` positions of the model's rotary embedding.
        v_scale: factor on the values of an fp8 cache, in the forms of ``k_scale``. Other scorers than Kara's see it.
            Kara's value norms are those of stored values.
        scores: float32 ``[L, S, H, W]``, in the order of ``plans``, to select by instead of computing scores. All plans
            then have one ``window``. None lets the policy's ``scorer`` compute them.
        dry_run: score and select only, as for a :class:`~kara_kernels.engine.Ledger` in ``shadow``.
        watch: called with the plans of each call of :func:`kara_kernels.compress_window`, and its result. It must not
            wait for a GPU.

    Returns:
        The keep list of each plan, int32 ``[L, H, K]``, window-relative and ascending, on the cache's device.
        There is no synchronisation with a GPU.

    Not checked on a GPU: that the planned blocks belong to their sequences.
    """
    options = _options(policy, scale, k_scale, reduce_scores, look_ahead, backend)
    call = _Call(ring, options | {"dry_run": dry_run}, watch)
    packed = isinstance(cache, PackedCache)
    kept: dict[int, Tensor] = {}
    for places in _groups(plans, packed, scores is not None or policy.scorer != KARA):
        group = [plans[s] for s in places]
        of_group = None
        if scores is not None:
            of_group = torch.stack([scores[:, s] for s in places], 1)
        elif policy.scorer != KARA:
            of_group = scores_of(group, cache, ring, policy.scorer, scale, (k_scale, v_scale))
        tables = [plan.touched for plan in group]
        if isinstance(cache, PackedCache):
            blocks = upload(tables[0], torch.int64, cache.pools[0].device)
            plain = cache.load(blocks)
            keep = call.compress(group, [range(len(tables[0]))], plain, of_group)
            if not dry_run:
                cache.store(blocks, plain)
        else:
            keep = call.compress(group, tables, cache, of_group)
        kept.update(zip(places, keep.unbind(1), strict=True))
    return [kept[s] for s in range(len(plans))]


def warm_up(
    cache: PagedCache | PackedCache, ring: QueryRing, policy: Policy, *, scale: float | None = None,
    k_scale: float | Tensor | None = None, v_scale: float | Tensor | None = None,
    reduce_scores: Callable[[Tensor], Tensor] | None = None, look_ahead: LookAhead | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Compiles the kernels that :func:`execute` launches with these options, and the ring's, so that the first request
    does not wait. Call it before the first step.

    It compresses one empty sequence, which is skipped, so the cache does not change. ``reduce_scores`` is called too.
    """
    ring.warm_up()
    scored = None
    if isinstance(cache, PackedCache):
        cache = cache.load(torch.zeros(1, dtype=torch.int64, device=cache.pools[0].device))
    count = policy.window if policy.attention == "causal" else policy.query_rows
    call = _Call(ring, _options(policy, scale, k_scale, reduce_scores, look_ahead, backend))
    for window in sorted({policy.window, policy.least_window}):
        if policy.scorer != KARA:
            scored = blank_scores(window, cache, ring, policy, scale, (k_scale, v_scale))
        nobody = Plan("", 0, 0, 0, 0, window, 1, (0,), 0, 0, last_query=0, num_queries=0)
        call.launch([nobody], [range(count)], [(0,)], cache, scored)


def _options(
    policy: Policy, scale: Any, k_scale: Any, reduce_scores: Any, look_ahead: LookAhead | None, backend: str
) -> dict[str, Any]:  # fmt: skip
    """Options of :func:`compress_window` that do not depend on the plans."""
    return {
        "scale": scale, "k_scale": k_scale, "reduce_scores": reduce_scores, "look_ahead": look_ahead,
        "backend": backend, **policy.selection,
    }  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """State shared by the calls of a step."""

    ring: QueryRing
    options: dict[str, Any]
    watch: Watch | None = None

    def compress(
        self, plans: Sequence[Plan], tables: Sequence[Sequence[int]], cache: PagedCache, scores: Tensor | None
    ) -> Tensor:
        """Keep lists ``[L, S, H, K]``. ``tables`` have each plan's blocks in ``cache`` from the first written one."""
        rows: Sequence[Sequence[int]] = [()] * len(plans)
        if scores is None:
            rows = [self.ring.rows_of(plan.request_id, plan.last_query, plan.num_queries) for plan in plans]
        return self.launch(plans, rows, tables, cache, scores)

    def launch(
        self, plans: Sequence[Plan], rows: Sequence[Sequence[int]], tables: Sequence[Sequence[int]],
        cache: PagedCache, scores: Tensor | None,
    ) -> Tensor:  # fmt: skip
        count, width = len(plans), max(map(len, tables))
        # Blocks before the first written one are omitted. Lengths and starts are relative to it.
        before = [plan.first_written * cache.shape[1] for plan in plans]
        numbers = [
            [plan.physical_len - rows for plan, rows in zip(plans, before, strict=True)],
            [plan.window_start - rows for plan, rows in zip(plans, before, strict=True)],
            [row for of_plan in rows for row in of_plan],
            [block for table in tables for block in (*table, *[table[0]] * (width - len(table)))],
        ]
        # One upload for any batch size.
        given = upload(list(chain.from_iterable(numbers)), torch.int32, cache.k[0].device)
        lengths, starts, places, table = given.split([len(part) for part in numbers])
        query, chosen = (self.ring.queries, places.view(count, -1)) if scores is None else (None, None)
        done = compress_window(
            query, cache.k, cache.v, table.view(count, width), lengths, window=plans[0].window, keep=plans[0].keep,
            window_starts=starts, query_rows=chosen, scores=scores, **self.options,
        )  # fmt: skip
        if self.watch is not None:
            self.watch(plans, done)
        return done.keep_indices


def _groups(plans: Sequence[Plan], packed: bool, scored: bool) -> list[list[int]]:
    """Indices of plans that one call compresses. A packed cache takes one plan per call. Other caches take all plans
    with the same window, keep and number of queries, which is usually all of them."""
    if packed:
        return [[s] for s in range(len(plans))]
    groups: dict[tuple[int, int, int], list[int]] = {}
    for s, plan in enumerate(plans):
        groups.setdefault((plan.window, plan.keep, 0 if scored else plan.num_queries), []).append(s)
    return list(groups.values())
