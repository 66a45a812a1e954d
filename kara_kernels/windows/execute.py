"""Executing plans: the only part of the shim that touches the cache.

Every worker executes the same plans before its step zeroes, copies or writes a block: freed blocks may already belong
to another sequence of that step, and on one stream whoever writes to them comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..paged import PagedCache
from .compress import compress_window
from .plan import Plan
from .policy import Policy
from .queries import QueryRing, upload


class PackedCache:
    """Pools whose blocks hold rows at arbitrary element offsets, such as bfloat16 packed for matrix instructions.

    Compressing one reads the touched blocks into plain ones, compresses those and writes them back: more traffic than
    moving rows in place, for layouts that no strides describe.

    Args:
        pools: ``L`` tensors ``[B, E]``, one row of ``E`` elements per block, stride 1 along ``E``, of one dtype and
            device.
        k_offsets: int64 ``[P, H, D]``: where in a block's row element ``d`` of the key of token ``t``, head ``h`` lies.
        v_offsets: the same for values, ``[P, H, Dv]``.

    Raises:
        TypeError, ValueError: offsets that leave the block or name an element twice.
    """

    def __init__(self, pools: Sequence[Tensor], k_offsets: Tensor, v_offsets: Tensor) -> None:
        self.pools = list(pools)
        if not self.pools:
            raise ValueError("pools: expected at least one layer, got none")
        first = self.pools[0]
        for layer, pool in enumerate(self.pools):
            if pool.dim() != 2:
                raise ValueError(f"pools[{layer}]: expected shape [B, E], got {list(pool.shape)}")
            if pool.stride(1) != 1:
                raise ValueError(f"pools[{layer}]: expected stride 1 in the last dimension, got {pool.stride(1)}")
            for what in ("shape", "dtype", "device"):
                if getattr(pool, what) != getattr(first, what):
                    raise ValueError(
                        f"pools[{layer}]: expected {what} {getattr(first, what)} as in pools[0], "
                        f"got {getattr(pool, what)}"
                    )
        for name, offsets in (("k_offsets", k_offsets), ("v_offsets", v_offsets)):
            if offsets.dtype != torch.int64:
                raise TypeError(f"{name}: expected dtype torch.int64, got {offsets.dtype}")
            if offsets.dim() != 3 or 0 in offsets.shape or offsets.shape[:2] != k_offsets.shape[:2]:
                raise ValueError(f"{name}: expected shape [P, H, D], P and H of both, got {list(offsets.shape)}")
        flat = torch.cat([k_offsets.flatten(), v_offsets.flatten()])
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= first.shape[1]:
            raise ValueError(f"offsets: expected 0..{first.shape[1] - 1}, got {low}..{high}")
        if len(flat.unique()) != len(flat):
            raise ValueError("offsets: expected every element at an offset of its own, got one twice")
        self._offsets = flat.to(first.device)
        self._shapes = k_offsets.shape, v_offsets.shape

    def load(self, blocks: Tensor) -> PagedCache:
        """The blocks ``[n]`` of all layers as a plain cache of ``n`` blocks."""
        # One tensor for all layers: a list of them would cost an upload of their addresses.
        rows = torch.stack([pool[blocks[:, None], self._offsets] for pool in self.pools])
        k, v = (x.unflatten(2, s).contiguous() for x, s in zip(rows.split(self._sizes, 2), self._shapes, strict=True))
        return PagedCache(k, v)

    def store(self, blocks: Tensor, cache: PagedCache) -> None:
        """Writes the plain blocks back."""
        assert cache.v is not None
        for pool, k, v in zip(self.pools, cache.k, cache.v, strict=True):
            pool[blocks[:, None], self._offsets] = torch.cat([k.flatten(1), v.flatten(1)], 1)

    @property
    def _sizes(self) -> list[int]:
        return [shape.numel() for shape in self._shapes]


def execute(
    plans: Sequence[Plan],
    cache: PagedCache | PackedCache,
    ring: QueryRing,
    policy: Policy,
    *,
    scale: float | None = None,
    k_scale: float | Tensor | None = None,
    reduce_scores: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Compresses every planned window in all layers, in place.

    Args:
        plans: of one step, from :meth:`kara_kernels.engine.Ledger.plan`; executed before ``ring`` releases any of them.
        cache: the engine's pools, all layers.
        ring: the recorded queries.
        policy: the one the plans were made with.
        scale, k_scale, reduce_scores, backend: see :func:`kara_kernels.compress_window`.

    Returns:
        Per plan the keep list, int32 ``[L, H, K]``, window-relative and ascending, on the cache's device. No
        synchronisation with a GPU.

    Not checked on a GPU: that the planned blocks belong to their sequences.
    """
    kept: dict[str, Tensor] = {}
    options = _options(policy, scale, k_scale, reduce_scores, backend)
    for group in _by_num_queries(plans):
        if isinstance(cache, PagedCache):
            keep = _compress(group, ring.select(group), cache, options)
            kept.update((plan.request_id, keep[:, s]) for s, plan in enumerate(group))
            continue
        for plan in group:
            blocks = upload(plan.touched, torch.int64, cache.pools[0].device)
            plain = cache.load(blocks)
            before = plan.first_written * plain.shape[1]
            moved = plan._replace(
                blocks=tuple(range(len(plan.touched))),
                physical_len=plan.physical_len - before,
                window_start=plan.window_start - before,
            )
            kept[plan.request_id] = _compress([moved], ring.select([plan]), plain, options)[:, 0]
            cache.store(blocks, plain)
    return [kept[plan.request_id] for plan in plans]


def warm_up(
    cache: PagedCache | PackedCache,
    ring: QueryRing,
    policy: Policy,
    *,
    scale: float | None = None,
    k_scale: float | Tensor | None = None,
    reduce_scores: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """Compiles what :func:`execute` with the same options launches, before the first request pays for it.

    One sequence without rows, which is skipped: nothing is read or written. ``reduce_scores`` is called.
    """
    if isinstance(cache, PackedCache):
        cache = cache.load(torch.zeros(1, dtype=torch.int64, device=cache.pools[0].device))
    nobody = Plan("", 0, 0, 0, window_start=0, blocks=(0,), first_written=0, kept_blocks=0, last_query=0, num_queries=0)
    _compress([nobody], ring.idle, cache, _options(policy, scale, k_scale, reduce_scores, backend))


def _options(policy: Policy, scale: Any, k_scale: Any, reduce_scores: Any, backend: str) -> dict[str, Any]:
    """What :func:`compress_window` is told, whatever the plans."""
    return {
        "window": policy.window,
        "keep": policy.keep,
        "scale": scale,
        "k_scale": k_scale,
        "reduce_scores": reduce_scores,
        "backend": backend,
        **policy.selection,
    }


def _compress(plans: Sequence[Plan], query: Tensor, cache: PagedCache, options: dict[str, Any]) -> Tensor:
    width = max(len(plan.blocks) for plan in plans)
    rows = [
        [plan.physical_len, plan.window_start, *plan.blocks, *[plan.blocks[0]] * (width - len(plan.blocks))]
        for plan in plans
    ]
    # One upload for lengths, starts and tables.
    given = upload(rows, torch.int32, cache.k[0].device)
    lengths, starts = given[:, :2].t().contiguous()
    return compress_window(query, cache.k, cache.v, given[:, 2:], lengths, window_starts=starts, **options).keep_indices


def _by_num_queries(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Plans in groups that one call can compress: nearly always one group."""
    groups: dict[int, list[Plan]] = {}
    for plan in plans:
        groups.setdefault(plan.num_queries, []).append(plan)
    return list(groups.values())
