"""The arguments of one compression, checked and in one form, whether they came for one layer or for many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_contents, check_query, check_values, key_scales
from ..checks import (
    check_block_tables,
    check_count,
    check_lengths,
    check_number,
    check_tensor,
    check_unit_stride,
    check_window,
    contents_are_checked,
)  # fmt: skip
from ..options import Scoring, Selection, split_options
from ..paged import Layers, PagedCache, per_layer

ReduceScores = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Request:
    """Checked arguments of :func:`kara_kernels.compress_window`; shapes as there, layers always leading."""

    query: Layers | None
    query_rows: Tensor | None
    cache: PagedCache
    block_tables: Tensor
    seq_lens: Tensor
    window: int
    keep: int
    scores: Tensor | None  # [L, S, H, W]
    window_starts: Tensor | None
    protected_lens: Tensor | None
    scoring: Scoring
    selection: Selection
    scale: float
    k_scale: float | Tensor
    reduce_scores: ReduceScores | None
    many: bool

    @property
    def lists(self) -> tuple[int, int, int]:
        """How many keep lists there are, as ``[L, S, H]`` with extent 1 where scores are pooled."""
        layers, heads, pool = len(self.cache.k), self.cache.shape[2], self.selection.pool
        return 1 if pool == "model" else layers, len(self.seq_lens), heads if pool == "head" else 1

    @property
    def chunk_budget(self) -> int:
        return self.selection.chunk_budget(self.keep)

    @property
    def value_norm(self) -> bool:
        """Whether scores are weighed by the length of values."""
        return self.cache.v is not None if self.scoring.value_norm is None else self.scoring.value_norm

    def windows(self) -> tuple[Tensor, Tensor]:
        """``(starts int32 [S], fits bool [S])``."""
        starts = self.seq_lens - self.window if self.window_starts is None else self.window_starts
        # Nothing is added to a start, because one near 2^31 would wrap around and seem to fit.
        fits = (starts >= 0) & (self.seq_lens >= self.window) & (starts <= self.seq_lens - self.window)
        return starts, fits if self.protected_lens is None else fits & (starts >= self.protected_lens)

    def reduced(self, scores: Tensor) -> Tensor:
        """The caller's hook between pooling and selection; it may work in place and return None."""
        if self.reduce_scores is None:
            return scores
        given = scores if self.many else scores[0]
        reduced = self.reduce_scores(given)
        reduced = given if reduced is None else reduced
        check_tensor("reduce_scores(...)", reduced, given.shape, (torch.float32,), given.device)
        check_unit_stride("reduce_scores(...)", reduced)
        return reduced if self.many else reduced[None]

    def require_kernel_layout(self) -> None:
        """Refuses strides that kernels cannot read."""
        self.cache.require_kernel_layout()
        if self.query is not None:
            self.query.require_kernel_layout("query")
        if self.scores is not None:
            check_unit_stride("scores", self.scores)


def check_request(
    query: Tensor | Sequence[Tensor] | None, k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor] | None, block_tables: Tensor, seq_lens: Tensor, *, window: int, keep: int,
    scores: Tensor | None, window_starts: Tensor | None, protected_lens: Tensor | None, query_rows: Tensor | None,
    scale: float | None, k_scale: float | Tensor | None, reduce_scores: ReduceScores | None,
    options: Mapping[str, Any],
) -> Request:  # fmt: skip
    """Every argument of :func:`kara_kernels.compress_window` but the backend, before anything is written."""
    scoring, selection = split_options(options)
    queries, cache, many = per_layer(query, k_cache, v_cache, query_rows)
    device, (_, _, heads, dim) = cache.k[0].device, cache.shape
    check_count("keep", keep, 1, check_window(window))
    table = check_block_tables(block_tables, device)
    check_lengths("seq_lens", seq_lens, table.shape[0], device)
    for name, lengths in (("window_starts", window_starts), ("protected_lens", protected_lens)):
        if lengths is not None:
            check_lengths(name, lengths, table.shape[0], device)
    scale = dim**-0.5 if scale is None else check_number("scale", scale, -3.4e38, 3.4e38)
    if reduce_scores is not None and not callable(reduce_scores):
        raise TypeError(f"reduce_scores: expected a callable, got {type(reduce_scores).__name__}")
    if scores is None:
        queries = check_query(queries, cache, table.shape[0], query_rows, window, scoring.attention)
    else:
        queries = query_rows = None
        shape = (len(cache.k), table.shape[0], heads, window) if many else (table.shape[0], heads, window)
        check_tensor("scores", scores, shape, (torch.float32,), device)
        scores = scores if many else scores[None]
    request = Request(
        query=queries, query_rows=query_rows, cache=cache, block_tables=table, seq_lens=seq_lens, window=window,
        keep=keep, scores=scores, window_starts=window_starts, protected_lens=protected_lens, scoring=scoring,
        selection=selection, scale=scale, k_scale=key_scales(k_scale, len(cache.k), heads, device),
        reduce_scores=reduce_scores, many=many,
    )  # fmt: skip
    if queries is not None and request.value_norm:
        if cache.v is None:
            raise ValueError("value_norm: expected False without a v_cache, got True")
        check_values(cache)
    if contents_are_checked(device):
        starts, fits = request.windows()
        # A default start below zero is a sequence shorter than its window: skipped. A given one is a mistake.
        named = fits if window_starts is None else fits | (window_starts < 0)
        check_contents(cache, table, starts, torch.where(fits, seq_lens, starts), named, seq_lens)
    return request
