"""Checks the arguments of operations on windows, and brings those for one and many layers into a common form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ahead import LookAhead, check_look_ahead
from .checks import (
    FP8_DTYPES,
    SCORED_DTYPES,
    check_block_tables,
    check_lengths,
    check_tensor,
    check_unit_stride,
    check_window,
    contents_are_checked,
    refuse,
)  # fmt: skip
from .options import Scoring
from .paged import Layers, PagedCache, per_layer
from .values import check_number


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A pool, and the position of each sequence's window in it."""

    cache: PagedCache
    block_tables: Tensor  # int32 [S, max_blocks]
    window: int
    many: bool  # whether results have a leading L
    window_starts: Tensor | None = None  # int32 [S]; None: the newest W tokens
    seq_lens: Tensor | None = None  # int32 [S]; None: every window fits
    protected_lens: Tensor | None = None  # int32 [S]


@dataclass(frozen=True, kw_only=True)
class ScoreArguments(Windows):
    """Windows, and the queries and options that score them."""

    query: Layers | None  # None if scores are given
    query_rows: Tensor | None
    scoring: Scoring
    scale: float
    k_scale: float | Tensor  # a tensor is [L, H]
    look_ahead: LookAhead | None = None

    @property
    def value_norm(self) -> bool:
        """Whether scores are multiplied by value norms."""
        return self.cache.v is not None if self.scoring.value_norm is None else self.scoring.value_norm

    def require_kernel_layout(self) -> None:
        """Raises an error for strides that kernels cannot read."""
        self.cache.require_kernel_layout()
        if self.query is not None:
            self.query.require_kernel_layout("query")
            if self.query.scales is not None:
                self.query.scales.require_kernel_layout("query.scales")


@dataclass(frozen=True, kw_only=True)
class CompactArguments(Windows):
    """Windows, and the tokens kept of them."""

    window_starts: Tensor
    seq_lens: Tensor
    keep_indices: Tensor  # int32 [L, S, H, K]


def check_windows(
    query: Any, k_cache: Any, v_cache: Any, block_tables: object, window: int, query_rows: Tensor | None = None,
    **lengths: Any,
) -> tuple[Layers | None, dict[str, Any]]:  # fmt: skip
    """The query by layer, and the fields of :class:`Windows`. ``lengths`` are the given length tensors."""
    queries, cache, many = per_layer(query, k_cache, v_cache, query_rows)
    device = cache.k[0].device
    check_window(window)
    table = check_block_tables(block_tables, device)
    for name, value in lengths.items():
        check_lengths(name, value, table.shape[0], device)
    return queries, {"cache": cache, "block_tables": table, "window": window, "many": many, **lengths}


def check_scoring(
    query: Layers | None, where: dict[str, Any], query_rows: Tensor | None, scale: object,
    k_scale: float | Tensor | None, look_ahead: object, scoring: Scoring, scores: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of :class:`ScoreArguments` that are not in ``where``. With ``scores`` no query is needed."""
    cache: PagedCache = where["cache"]
    _, _, heads, dim = cache.shape
    if scores is None:
        check_query(query, cache, where["block_tables"].shape[0], query_rows, where["window"], scoring.attention)
        if scoring.value_norm is not False:
            _check_values(cache, bool(scoring.value_norm))
    else:
        query = query_rows = None
    return {
        "query": query, "query_rows": query_rows, "scoring": scoring,
        "scale": dim**-0.5 if scale is None else check_number("scale", scale, -3.4e38, 3.4e38),
        "k_scale": row_scales("k_scale", k_scale, len(cache.k), heads, cache.k[0].device),
        "look_ahead": check_look_ahead(look_ahead, dim, cache.k[0].device),
    }  # fmt: skip


def _check_values(cache: PagedCache, needed: bool) -> None:
    """Checks that value norms can be computed, if there are values or they are ``needed``."""
    if cache.v is None and needed:
        raise ValueError("value_norm: expected False without a v_cache, got True")
    if cache.v is not None and cache.v[0].dtype not in SCORED_DTYPES + FP8_DTYPES:
        expected = "float16, bfloat16, float32 or float8 (or value_norm=False)"
        raise TypeError(f"v_cache: expected {expected}, got {cache.v[0].dtype}")


def check_score_window(
    query: Any, k_cache: Any, v_cache: Any, block_tables: object, window_starts: object, window: int,
    query_rows: Tensor | None, scale: object, k_scale: float | Tensor | None, look_ahead: object, **scoring: Any,
) -> ScoreArguments:  # fmt: skip
    """Checks the arguments of ``score_window``. ``scoring`` has attention, reduction and redundancy."""
    queries, where = check_windows(
        query, k_cache, v_cache, block_tables, window, query_rows, window_starts=window_starts
    )
    how = Scoring(value_norm=v_cache is not None, **scoring)
    given = ScoreArguments(**where, **check_scoring(queries, where, query_rows, scale, k_scale, look_ahead, how))
    starts = where["window_starts"]
    if contents_are_checked(starts.device):
        everywhere = torch.ones_like(starts, dtype=torch.bool)
        check_contents(given, starts, starts.long() + window, everywhere, written=False)
    return given


def check_compact_blocks(
    k_cache: Any, v_cache: Any, block_tables: object, window_starts: object, seq_lens: object, keep_indices: object,
    window: int,
) -> CompactArguments:  # fmt: skip
    """Checks the arguments of ``compact_blocks``."""
    _, where = check_windows(
        None, k_cache, v_cache, block_tables, window, window_starts=window_starts, seq_lens=seq_lens
    )
    keep = check_keep_indices(keep_indices, where["cache"], where["block_tables"].shape[0], window, where["many"])
    given = CompactArguments(**where, keep_indices=keep)
    if contents_are_checked(keep.device):
        check_contents(given, given.window_starts, given.seq_lens, keep[0, :, 0, 0] >= 0)
    return given


def check_keep_indices(keep_indices: object, cache: PagedCache, sequences: int, window: int, many: bool) -> Tensor:
    """Checks int32 ``[S, H, K]``, or ``[L, S, H, K]`` for many layers. Returns ``[L, S, H, K]``."""
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
        expected = f"ascending indices in 0..{window - 1}, or -1 throughout a sequence"
        refuse(bad, "keep_indices", expected, keep[..., :8])
    return keep


def check_query(
    query: Layers | None, cache: PagedCache, sequences: int, query_rows: object, window: int, attention: str
) -> None:
    """Checks for ``L`` tensors ``[S, N, H*G, D]`` of a dtype that can be scored, matching the pool.

    With ``query_rows`` int32 ``[S, N]`` they are ``[1, R, H*G, D]``, as ``per_layer`` returns them, and the rows are
    checked too. ``attention="causal"`` takes at most ``window`` queries.
    """
    _, _, heads, dim = cache.shape
    if query is None:
        raise TypeError("query: expected a tensor or one per layer, got None (only given scores replace it)")
    if len(query) != len(cache.k):
        raise ValueError(f"query: expected {len(cache.k)} layers as in k_cache, got {len(query)}")
    first, device, name = query[0], cache.k[0].device, "query"
    dtypes: tuple[torch.dtype, ...] = SCORED_DTYPES + FP8_DTYPES
    if query.scales is not None:
        if dim % 2:
            raise ValueError(f"query: expected no packed queries for an odd head dimension, got D = {dim}")
        check_tensor("query.scales", query.scales[0], (*first.shape[:-1], 1), (torch.bfloat16,), device)
        dim, dtypes = dim // 2, (torch.uint8,)
    if query_rows is None:
        judges = check_tensor("query", first, (sequences, None, None, dim), dtypes, device)
    else:
        if first.dim() != 4 or first.shape[0] != 1:  # the caller's own Layers
            raise ValueError(f"query: expected layers of [1, R, H*G, D] with query_rows, got shape {list(first.shape)}")
        check_tensor("query", first[0], (None, None, dim), dtypes, device)
        if first.shape[1] < 1 and sequences:
            raise ValueError(f"query: expected at least one row of queries, got shape {list(first.shape[1:])}")
        judges, name = check_query_rows(query_rows, first.shape[1], sequences, device), "query_rows"
    count = judges.shape[1]
    if count < 1:
        raise ValueError(f"{name}: expected at least one query per sequence, got shape {list(judges.shape)}")
    if attention == "causal" and count > window:
        raise ValueError(
            f"{name}: expected at most {window} queries with attention='causal' (query i is window token W - N + i), "
            f"got {count}"
        )
    if first.shape[2] < heads or first.shape[2] % heads:
        raise ValueError(f"query: expected a multiple of {heads} KV heads in dimension H*G, got {first.shape[2]}")
    if cache.k[0].dtype not in SCORED_DTYPES + FP8_DTYPES:
        raise TypeError(
            f"k_cache: expected a dtype that can be scored (float16, bfloat16, float32 or float8), got "
            f"{cache.k[0].dtype}; view fp8 bytes as their float8 dtype, or pass scores="
        )


def check_query_rows(query_rows: object, rows: int, sequences: int, device: torch.device) -> Tensor:
    """Checks int32 ``[S, N]`` with stride 1 along ``N``. Rows must be in ``0..rows-1`` if contents are checked."""
    chosen = check_tensor("query_rows", query_rows, (sequences, None), (torch.int32,), device)
    check_unit_stride("query_rows", chosen, " along queries")
    if contents_are_checked(device):
        refuse((chosen < 0) | (chosen >= rows), "query_rows", f"a row of query in 0..{rows - 1}", chosen)
    return chosen


def row_scales(
    name: str, given: float | Tensor | None, layers: int, heads: int, device: torch.device
) -> float | Tensor:
    """``k_scale`` or ``v_scale`` as a float or a float view ``[L, H]``. A 1-D tensor is per layer, or per head of a
    single one."""
    if given is None:
        return 1.0
    if not isinstance(given, Tensor):
        return check_number(name, given, -3.4e38, 3.4e38)
    if not given.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {given.dtype}")
    if given.device != device:
        raise ValueError(f"{name}: expected device {device}, got {given.device}")
    shaped = given.reshape(1, 1) if given.numel() == 1 else given
    if shaped.dim() == 1:
        shaped = shaped[:, None] if layers > 1 else shaped[None, :]
    try:
        return shaped.expand(layers, heads)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected one element, [{layers}] per layer or [{layers}, {heads}] per layer and KV head, "
            f"got shape {list(given.shape)}"
        ) from None


def check_contents(w: Windows, starts: Tensor, ends: Tensor, active: Tensor, *, written: bool = True) -> None:
    """Checks the block ids and lengths needed to reach tokens ``starts..ends`` of the ``active`` sequences.

    ``starts``, ``ends`` int ``[S]``, ``active`` bool ``[S]``. A window must fit between start and end. With ``written``
    no two sequences may share a block, because only blocks that one sequence owns alone may be rewritten. Call it only
    if reading contents is free or was requested.
    """
    (blocks, page, _, _), columns, window = w.cache.shape, w.block_tables.shape[1], w.window
    within = f"at most {columns * page} (the block table's capacity)"
    if w.seq_lens is not None:
        refuse(w.seq_lens > columns * page, "seq_lens", within, w.seq_lens)
    refuse((ends > columns * page) & active, "window_starts + window", within, ends)
    refuse((starts < 0) & active, "window_starts", "0 or more", starts)
    refuse(
        (starts > ends - window) & active, "window_starts",
        lambda s: f"at most {int(ends[s]) - window}, a window of {window} before the sequence's end", starts,
    )  # fmt: skip
    column = torch.arange(columns, device=w.block_tables.device)
    used = active[:, None] & (column >= (starts // page)[:, None]) & (column <= ((ends - 1) // page)[:, None])
    bad = used & ((w.block_tables < 0) | (w.block_tables >= blocks))
    refuse(bad, "block_tables", f"a block id in 0..{blocks - 1}", w.block_tables)
    if written:
        ids, counts = w.block_tables[used].unique(return_counts=True)
        if bool((counts > 1).any()):
            block = int(ids[counts > 1][0])
            raise ValueError(
                f"block_tables: expected blocks that one sequence owns alone from its window on, got block {block} "
                f"twice"
            )
