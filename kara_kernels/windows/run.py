"""Score, select, compact: the only orchestration in this library, once with kernels and once with PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._triton import resolve_backend
from ..ops.chunks import launch_keep
from ..ops.compact import launch_compact
from ..ops.pool import PartialRows, launch_pool
from ..ops.score import launch_score, launch_scores, layers_at_once, plan_score
from ..reference.chunks import expanded_positions
from ..reference.compact import compact_sequence
from ..reference.score import score_sequence
from .request import Request


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
    if resolve_backend(backend, request.seq_lens.device) == "triton" and request.seq_lens.shape[0]:
        request.require_kernel_layout()
        compress = by_triton
    lengths, keep_indices, scores, frontiers = compress(request)
    shape = len(request.cache.k), request.seq_lens.shape[0], request.cache.shape[2]
    keep_indices, scores = keep_indices.expand(*shape, -1), scores.expand(*shape, -1)
    if not request.many:
        keep_indices, scores = keep_indices[0], scores[0]
    return lengths, keep_indices, scores, frontiers


# -------------------------------------------------------------------------------------------------------- PyTorch


@torch.no_grad()
def by_torch(r: Request) -> Lists:
    """Sequence by sequence, which bounds the memory for any batch."""
    layers, sequences, heads = len(r.cache.k), r.seq_lens.shape[0], r.cache.shape[2]
    starts, fits = r.windows()
    alive = [(s, start) for s, (start, fit) in enumerate(zip(starts.tolist(), fits.tolist(), strict=True)) if fit]
    scores = r.reduced(_scores(r, alive))
    keep_indices = expanded_positions(scores, r.keep, r.chunk_budget, r.selection.max_chunk)
    keep_indices = torch.where(fits[:, None, None], keep_indices, -1)
    rows = keep_indices.expand(layers, sequences, heads, r.keep)
    for s, start in alive:
        compact_sequence(r.cache, r.block_tables[s], start, int(r.seq_lens[s]), rows[:, s], r.window)
    protected = torch.zeros_like(starts) if r.protected_lens is None else r.protected_lens.clamp(min=0)
    return Lists(
        torch.where(fits, r.seq_lens - (r.window - r.keep), r.seq_lens), keep_indices, scores,
        torch.where(fits, starts + r.keep, protected),
    )  # fmt: skip


def _scores(r: Request, alive: list[tuple[int, int]]) -> Tensor:
    """Pooled scores; zero for sequences that are not ``alive`` unless given."""
    if r.scores is not None and r.selection.pool == "head":
        return r.scores
    scores = torch.zeros(*r.lists, r.window, device=r.seq_lens.device)
    if r.scores is not None:
        for s in range(r.seq_lens.shape[0]):
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

    Scoring leaves partial rows that selection adds up. Where all layers' would be too many, layers are scored some at
    a time, each time with a launch that adds them up.
    """
    layers, sequences, heads = len(r.cache.k), r.seq_lens.shape[0], r.cache.shape[2]
    fit = r.window_starts, r.seq_lens, r.protected_lens
    scores, partials, rows = r.scores, None, PartialRows()
    if r.query is not None:
        scoring = r.scoring
        config, rows = plan_score(
            r.query, r.cache.k, r.window, scoring.reduction, r.value_norm, scoring.redundancy, r.query_rows
        )
        how = r.query, r.cache, r.block_tables, *fit, r.scale, r.k_scale, scoring.attention, rows, config, r.query_rows
        scores = r.seq_lens.new_empty(layers, sequences, heads, r.window, dtype=torch.float32)
        if layers_at_once(sequences, heads, r.window, rows) >= layers:
            partials = scores.new_empty(layers, sequences, heads, rows.tiles, r.window)
            launch_score(partials, *how)
        else:
            launch_scores(scores, *how)
    return _select_and_move(r, scores, partials, rows)


def _select_and_move(r: Request, scores: Tensor | None, partials: Tensor | None, rows: PartialRows) -> Lists:
    """From ``scores [L, S, H, W]``, or from the partial rows that add up to them where there are some."""
    fit = r.window_starts, r.seq_lens, r.protected_lens
    assert scores is not None
    if r.selection.pool != "head" or (partials is not None and r.reduce_scores is not None):
        pooled = scores.new_empty(*r.lists, r.window)
        if partials is None:
            launch_pool(pooled, scores[:, :, :, None], *fit, PartialRows(), False)
        else:
            launch_pool(pooled, partials, *fit, rows, True)
        scores, partials = pooled, None
    scores = r.reduced(scores)
    keep_indices = r.seq_lens.new_empty(*r.lists, r.keep)
    options = r.chunk_budget, r.selection.max_chunk
    if partials is None:
        launch_keep(keep_indices, scores, scores[:, :, :, None], *fit, PartialRows(), *options, False)
    else:
        launch_keep(keep_indices, scores, partials, *fit, rows, *options, True)
    new_lens, frontiers = torch.empty_like(r.seq_lens), torch.empty_like(r.seq_lens)
    lists = keep_indices.expand(len(r.cache.k), -1, r.cache.shape[2], -1)
    launch_compact(
        new_lens, r.cache, r.block_tables, r.window_starts, r.seq_lens, lists, r.window, frontiers, r.protected_lens
    )
    return Lists(new_lens, keep_indices, scores, frontiers)
