"""Score, select, compact: the only orchestration in this library, once with kernels and once with PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._triton import resolve_backend
from ..ops.chunks import launch_keep
from ..ops.compact import launch_compact
from ..ops.pool import PartialRows, launch_pool
from ..ops.score import launch_score, plan_score
from ..reference.chunks import expand_chunks
from ..reference.compact import compact_sequence
from ..reference.score import score_sequence
from .request import Request

PARTIAL_BYTES = 256 << 20
"""Bytes that the partial rows of scoring may take on a GPU; layers beyond it are scored in further launches."""


class Lists(NamedTuple):
    """What either backend returns, lists and scores with extent 1 in dimensions that were pooled."""

    seq_lens: Tensor  # int32 [S]
    keep_indices: Tensor  # int32 [L or 1, S, H or 1, K]
    scores: Tensor  # float32 [L or 1, S, H or 1, W]
    frontiers: Tensor  # int32 [S]


def run(request: Request, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Executes a request. Returns lengths, keep indices ``[L, S, H, K]``, scores ``[L, S, H, W]`` and frontiers, the
    second and third without ``L`` for one layer, pooled ones as expanded views."""
    compress = by_torch
    if resolve_backend(backend, request.seq_lens.device) == "triton" and len(request.seq_lens):
        request.require_kernel_layout()
        compress = by_triton
    lengths, keep_indices, scores, frontiers = compress(request)
    shape = len(request.cache.k), len(request.seq_lens), request.cache.shape[2]
    keep_indices, scores = keep_indices.expand(*shape, -1), scores.expand(*shape, -1)
    if not request.many:
        keep_indices, scores = keep_indices[0], scores[0]
    return lengths, keep_indices, scores, frontiers


# -------------------------------------------------------------------------------------------------------- PyTorch


@torch.no_grad()
def by_torch(r: Request) -> Lists:
    """Sequence by sequence, which bounds the memory for any batch."""
    layers, sequences, heads = len(r.cache.k), len(r.seq_lens), r.cache.shape[2]
    starts, fits = r.windows()
    alive = [(s, start) for s, (start, fit) in enumerate(zip(starts.tolist(), fits.tolist(), strict=True)) if fit]
    scores = r.reduced(_scores(r, alive))
    keep_indices = expand_chunks(scores, r.keep, r.chunk_budget, r.selection.max_chunk)
    keep_indices = torch.where(fits[:, None, None], keep_indices, -1)
    rows = keep_indices.expand(layers, sequences, heads, r.keep)
    for s, start in alive:
        compact_sequence(r.cache, r.block_tables[s], start, int(r.seq_lens[s]), rows[:, s], r.window)
    protected = torch.zeros_like(starts) if r.protected_lens is None else r.protected_lens.clamp(min=0)
    return Lists(
        torch.where(fits, r.seq_lens - (r.window - r.keep), r.seq_lens),
        keep_indices,
        scores,
        torch.where(fits, starts + r.keep, protected),
    )


def _scores(r: Request, alive: list[tuple[int, int]]) -> Tensor:
    """Pooled scores; zero for sequences that are not ``alive`` unless given."""
    if r.scores is not None and r.selection.pool == "head":
        return r.scores
    scores = torch.zeros(*r.lists, r.window, device=r.seq_lens.device)
    if r.scores is not None:
        for s in range(len(r.seq_lens)):
            scores[:, s] = _pooled(r, r.scores[:, s])
    elif r.query is not None:
        for s, start in alive:
            of_sequence = score_sequence(
                r.query, r.cache.k, r.cache.v if r.value_norm else None, r.block_tables, s, start, r.window,
                scale=r.scale, k_scale=r.k_scale, attention=r.scoring.attention, reduction=r.scoring.reduction,
                redundancy=r.scoring.redundancy, query_rows=r.query_rows,
            )  # fmt: skip
            scores[:, s] = _pooled(r, of_sequence)
    return scores


def _pooled(r: Request, scores: Tensor) -> Tensor:
    """Means over the pooled of ``[L, H, W]``, in float64 so that they do not depend on the order of addition."""
    dims = {"head": (), "layer": (1,), "model": (0, 1)}[r.selection.pool]
    return scores.double().mean(dims, keepdim=True).float() if dims else scores


# --------------------------------------------------------------------------------------------------------- Triton


def by_triton(r: Request) -> Lists:
    """The same in three launches whatever ``L`` and ``S``, four where scores are pooled or handed out.

    Scoring leaves partial rows that selection adds up. Where those of all layers pass PARTIAL_BYTES, layers are
    scored in slices, each with a launch that adds up its rows.
    """
    layers, sequences, heads = len(r.cache.k), len(r.seq_lens), r.cache.shape[2]
    fit = r.window_starts, r.seq_lens, r.protected_lens
    scores, partials, summed = r.scores, None, PartialRows()
    if r.query is not None:
        if r.query_rows is not None:
            raise NotImplementedError("query_rows: expected None with backend='triton'")
        config, rows = plan_score(r.query, r.cache.k, r.window, r.scoring.reduction, r.value_norm, r.scoring.redundancy)
        at_once = max(1, PARTIAL_BYTES // (4 * sequences * heads * rows.tiles * r.window))
        partials = r.seq_lens.new_empty(
            min(layers, at_once), sequences, heads, rows.tiles, r.window, dtype=torch.float32
        )
        if at_once < layers:
            scores = partials.new_empty(layers, sequences, heads, r.window)
        else:
            summed = rows
        for first in range(0, layers, at_once):
            some = partials[: layers - first]
            launch_score(
                some, r.query, r.cache, r.block_tables, *fit, r.scale, r.k_scale, r.scoring.attention, rows, config,
            )  # fmt: skip
            if scores is not None:
                launch_pool(scores[first : first + at_once], some, *fit, rows, True)
    return _select_and_move(r, scores, partials, summed)


def _select_and_move(r: Request, scores: Tensor | None, partials: Tensor | None, summed: PartialRows) -> Lists:
    """From ``scores [L, S, H, W]``, or else from the partial rows that add up to them."""
    fit = r.window_starts, r.seq_lens, r.protected_lens
    computed = scores is None
    if scores is not None:
        partials = scores[:, :, :, None]
    assert partials is not None
    if scores is None or r.selection.pool != "head":
        scores = partials.new_empty(*r.lists, r.window)
        if r.selection.pool != "head" or r.reduce_scores is not None:
            launch_pool(scores, partials, *fit, summed, computed)
            computed, summed = False, PartialRows()
    scores = r.reduced(scores)
    if not computed:
        partials = scores[:, :, :, None]
    keep_indices = r.seq_lens.new_empty(*r.lists, r.keep)
    launch_keep(keep_indices, scores, partials, *fit, summed, r.chunk_budget, r.selection.max_chunk, computed)
    new_lens = torch.empty_like(r.seq_lens)
    rows = keep_indices.expand(len(r.cache.k), -1, r.cache.shape[2], -1)
    launch_compact(new_lens, r.cache, r.block_tables, r.window_starts, r.seq_lens, rows, r.window)
    starts, fits = r.windows()
    protected = torch.zeros_like(starts) if r.protected_lens is None else r.protected_lens.clamp(min=0)
    frontiers = torch.where(fits, starts + r.keep, protected)
    return Lists(new_lens, keep_indices, scores, frontiers)
