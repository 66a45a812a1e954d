"""Checks that need a pool: queries, keep lists, key scales, and what block tables lead to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import (
    FP8_DTYPES,
    MAX_WINDOW,
    SCORED_DTYPES,
    check_block_tables,
    check_lengths,
    check_number,
    check_tensor,
    check_unit_stride,
    check_window,
    contents_are_checked,
)  # fmt: skip
from .options import Scoring
from .paged import Layers, PagedCache, per_layer


def check_keep_indices(keep_indices: object, cache: PagedCache, sequences: int, window: int, many: bool) -> Tensor:
    """int32 ``[S, H, K]``, or ``[L, S, H, K]`` for many layers, as ``[L, S, H, K]``."""
    layers, heads = len(cache.k), cache.shape[2]
    shape = (layers, sequences, heads, None) if many else (sequences, heads, None)
    keep = check_tensor("keep_indices", keep_indices, shape, (torch.int32,), cache.k[0].device)
    if not 1 <= keep.shape[-1] <= window:
        raise ValueError(f"keep_indices: expected 1..{window} indices per row, got {keep.shape[-1]}")
    keep = keep if many else keep[None]
    if contents_are_checked(keep.device):
        ascending = (keep[..., 1:] > keep[..., :-1]).all(-1) & (keep[..., 0] >= 0) & (keep[..., -1] < window)
        left_alone = (keep == -1).all(-1)
        bad = ~(ascending | left_alone) | (left_alone != left_alone[:1, :, :1])
        if bool(bad.any()):
            row = bad.nonzero()[0].tolist()
            raise ValueError(
                f"keep_indices{row}: expected ascending indices in 0..{window - 1}, or -1 throughout a sequence, "
                f"got {keep[tuple(row)].tolist()[:8]}"
            )
    return keep


def check_query(
    query: Layers | None, cache: PagedCache, sequences: int, query_rows: object = None, window: int = MAX_WINDOW,
    attention: str = "bidirectional",
) -> Layers:  # fmt: skip
    """``L`` tensors ``[S, N, H*G, D]`` of a dtype that can be scored, matching the pool.

    With ``query_rows`` int32 ``[S, N]`` they are ``[1, R, H*G, D]``, as ``per_layer`` hands them over, and the rows
    are checked too. ``attention="causal"`` takes at most ``window`` queries.
    """
    _, _, heads, dim = cache.shape
    if query is None:
        raise TypeError("query: expected a tensor or one per layer, got None (only given scores replace it)")
    if len(query) != len(cache.k):
        raise ValueError(f"query: expected {len(cache.k)} layers as in k_cache, got {len(query)}")
    first = query[0]
    if query_rows is None:
        check_tensor("query", first, (sequences, None, None, dim), SCORED_DTYPES, cache.k[0].device)
        _check_queries("query", first, window, attention)
    else:
        if first.dim() != 4 or first.shape[0] != 1:  # Layers that the caller made
            raise ValueError(f"query: expected layers of [1, R, H*G, D] with query_rows, got shape {list(first.shape)}")
        check_tensor("query", first[0], (None, None, dim), SCORED_DTYPES, cache.k[0].device)
        if first.shape[1] < 1 and sequences:
            raise ValueError(f"query: expected at least one row of queries, got shape {list(first.shape[1:])}")
        rows = check_query_rows(query_rows, first.shape[1], sequences, first.device)
        _check_queries("query_rows", rows, window, attention)
    if first.shape[2] < heads or first.shape[2] % heads:
        raise ValueError(f"query: expected a multiple of {heads} KV heads in dimension H*G, got {first.shape[2]}")
    if cache.k[0].dtype not in SCORED_DTYPES + FP8_DTYPES:
        raise TypeError(
            f"k_cache: expected a dtype that can be scored (float16, bfloat16, float32 or float8), got "
            f"{cache.k[0].dtype}; view fp8 bytes as their float8 dtype, or pass scores="
        )
    return query


def _check_queries(name: str, queries: Tensor, window: int, attention: str) -> None:
    """``N``, the second dimension of ``queries``."""
    count = queries.shape[1]
    if count < 1:
        raise ValueError(f"{name}: expected at least one query per sequence, got shape {list(queries.shape)}")
    if attention == "causal" and count > window:
        raise ValueError(
            f"{name}: expected at most {window} queries with attention='causal' (query i is window token W - N + i), "
            f"got {count}"
        )


def check_query_rows(query_rows: object, rows: int, sequences: int, device: torch.device) -> Tensor:
    """int32 ``[S, N]``, stride 1 along ``N``, of rows in ``0..rows-1`` where contents are checked."""
    chosen = check_tensor("query_rows", query_rows, (sequences, None), (torch.int32,), device)
    check_unit_stride("query_rows", chosen, " along queries")
    if contents_are_checked(device):
        bad = (chosen < 0) | (chosen >= rows)
        if bool(bad.any()):
            s, i = bad.nonzero()[0].tolist()
            raise ValueError(f"query_rows[{s}, {i}]: expected a row of query in 0..{rows - 1}, got {int(chosen[s, i])}")
    return chosen


def key_scales(k_scale: float | Tensor | None, layers: int, heads: int, device: torch.device) -> float | Tensor:
    """``k_scale`` as a float, or as a float view ``[L, H]``; one dimension means layers, or heads of one layer."""
    if k_scale is None:
        return 1.0
    if not isinstance(k_scale, Tensor):
        return check_number("k_scale", k_scale, -3.4e38, 3.4e38)
    if not k_scale.is_floating_point():
        raise TypeError(f"k_scale: expected a floating point tensor, got {k_scale.dtype}")
    if k_scale.device != device:
        raise ValueError(f"k_scale: expected device {device}, got {k_scale.device}")
    shaped = k_scale.reshape(1, 1) if k_scale.numel() == 1 else k_scale
    if shaped.dim() == 1:
        shaped = shaped[:, None] if layers > 1 else shaped[None, :]
    try:
        return shaped.expand(layers, heads)
    except RuntimeError:
        raise ValueError(
            f"k_scale: expected one element, [{layers}] per layer or [{layers}, {heads}] per layer and KV head, "
            f"got shape {list(k_scale.shape)}"
        ) from None


def check_values(cache: PagedCache) -> None:
    """Values whose length can be taken, if there are any."""
    if cache.v is not None and cache.v[0].dtype not in SCORED_DTYPES + FP8_DTYPES:
        raise TypeError(
            f"v_cache: expected float16, bfloat16, float32 or float8 to take lengths of, got {cache.v[0].dtype}"
        )


@dataclass(frozen=True)
class ScoreArguments:
    """Checked arguments of ``score_window``; shapes as there, layers always leading."""

    query: Layers
    query_rows: Tensor | None
    cache: PagedCache
    block_tables: Tensor
    starts: Tensor
    window: int
    scoring: Scoring
    scale: float
    k_scale: float | Tensor
    many: bool


def check_score_window(
    query: Any, k_cache: Any, v_cache: Any, block_tables: object, window_starts: object, window: int,
    query_rows: Tensor | None, scale: object, k_scale: float | Tensor | None, **scoring: Any,
) -> ScoreArguments:  # fmt: skip
    """Arguments of ``score_window``; ``scoring``: attention, reduction, redundancy."""
    queries, cache, many = per_layer(query, k_cache, v_cache, query_rows)
    device, (_, _, heads, dim) = cache.k[0].device, cache.shape
    check_window(window)
    table = check_block_tables(block_tables, device)
    starts = check_lengths("window_starts", window_starts, len(table), device)
    how = Scoring(value_norm=v_cache is not None, **scoring)
    arguments = ScoreArguments(
        query=check_query(queries, cache, len(table), query_rows, window, how.attention), query_rows=query_rows,
        cache=cache, block_tables=table, starts=starts, window=window, scoring=how,
        scale=dim**-0.5 if scale is None else check_number("scale", scale, -3.4e38, 3.4e38),
        k_scale=key_scales(k_scale, len(cache.k), heads, device), many=many,
    )  # fmt: skip
    check_values(cache)
    if contents_are_checked(device):
        everywhere = torch.ones_like(starts, dtype=torch.bool)
        check_contents(cache, table, starts, starts.long() + window, everywhere, written=False)
    return arguments


@dataclass(frozen=True)
class CompactArguments:
    """Checked arguments of ``compact_blocks``; ``keep`` is ``[L, S, H, K]``."""

    cache: PagedCache
    block_tables: Tensor
    starts: Tensor
    seq_lens: Tensor
    keep: Tensor
    window: int


def check_compact_blocks(
    k_cache: Any, v_cache: Any, block_tables: object, window_starts: object, seq_lens: object, keep_indices: object,
    window: int,
) -> CompactArguments:  # fmt: skip
    """Arguments of ``compact_blocks``."""
    _, cache, many = per_layer(None, k_cache, v_cache)
    check_window(window)
    device = cache.k[0].device
    table = check_block_tables(block_tables, device)
    starts = check_lengths("window_starts", window_starts, len(table), device)
    lengths = check_lengths("seq_lens", seq_lens, len(table), device)
    keep = check_keep_indices(keep_indices, cache, len(table), window, many)
    if contents_are_checked(device):
        check_contents(cache, table, starts, lengths, keep[0, :, 0, 0] >= 0, lengths, window)
    return CompactArguments(cache, table, starts, lengths, keep, window)


def check_contents(
    cache: PagedCache, block_tables: Tensor, starts: Tensor, ends: Tensor, active: Tensor,
    seq_lens: Tensor | None = None, window: int = 0, written: bool = True,
) -> None:  # fmt: skip
    """Block ids and lengths that lead to tokens ``starts..ends`` of the ``active`` sequences.

    ``starts``, ``ends``, ``seq_lens`` int32 ``[S]``, ``active`` bool ``[S]``. ``window`` tokens must fit between start
    and end. With ``written`` no two sequences may share a block: only blocks that one sequence owns alone may be
    rewritten. Only called where reading contents is free or asked for.
    """
    blocks, page, _, _ = cache.shape
    capacity = block_tables.shape[1] * page
    for name, values, rows in (("seq_lens", seq_lens, None), ("window_starts + window", ends, active)):
        if values is None:
            continue
        beyond = values > capacity if rows is None else (values > capacity) & rows
        if bool(beyond.any()):
            s = int(beyond.nonzero()[0])
            raise ValueError(
                f"{name}[{s}]: expected at most {capacity} (the block table's capacity), got {int(values[s])}"
            )
    negative = (starts < 0) & active
    if bool(negative.any()):
        s = int(negative.nonzero()[0])
        raise ValueError(f"window_starts[{s}]: expected 0 or more, got {int(starts[s])}")
    late = (starts > ends - window) & active
    if bool(late.any()):
        s = int(late.nonzero()[0])
        raise ValueError(
            f"window_starts[{s}]: expected at most {int(ends[s]) - window}, a window of {window} before the "
            f"sequence's end, got {int(starts[s])}"
        )
    column = torch.arange(block_tables.shape[1], device=block_tables.device)
    used = active[:, None] & (column >= (starts // page)[:, None]) & (column <= ((ends - 1) // page)[:, None])
    bad = used & ((block_tables < 0) | (block_tables >= blocks))
    if bool(bad.any()):
        s, b = bad.nonzero()[0].tolist()
        raise ValueError(
            f"block_tables[{s}, {b}]: expected a block id in 0..{blocks - 1}, got {int(block_tables[s, b])}"
        )
    if written:
        ids, counts = block_tables[used].unique(return_counts=True)
        if bool((counts > 1).any()):
            block = int(ids[counts > 1][0])
            raise ValueError(
                f"block_tables: expected blocks that one sequence owns alone from its window on, "
                f"got block {block} twice"
            )
