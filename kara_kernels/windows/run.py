"""Orchestrates scoring, selection and compaction, once with kernels and once with PyTorch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._triton import Launch, overlaps, resolve_backend
from ..ops.chunks import launch_keep
from ..ops.compact import launch_compact
from ..ops.pool import PartialRows, launch_pool
from ..ops.score import launch_score, launch_scores, layers_at_once, plan_score
from ..reference.chunks import expanded_positions
from ..reference.compact import compact_sequence
from ..reference.score import score_sequence
from .repeat import Event, Results, keep_event
from .request import Request


class Lists(NamedTuple):
    """The result of either backend. Lists and scores have extent 1 in pooled dimensions."""

    seq_lens: Tensor  # int32 [S]
    keep_indices: Tensor  # int32 [L or 1, S, H or 1, K]
    scores: Tensor  # float32 [L or 1, S, H or 1, W]
    frontiers: Tensor  # int32 [S]


def run(request: Request, backend: str, kind: Hashable = None) -> Results:
    """Executes a request. Returns lengths, keep indices ``[L, S, H, K]``, scores ``[L, S, H, W]`` and frontiers.

    Keep indices and scores have no ``L`` for one layer. Pooled ones are expanded views. With a ``kind``, the pool keeps
    the launches if they can be repeated.
    """
    if resolve_backend(backend, request.seq_lens.device) == "triton" and request.seq_lens.shape[0]:
        request.require_kernel_layout()
        lists, launches = by_triton(request)
        if kind is not None and launches is not None:
            keep_event(request.cache, kind, Event(launches))
    else:
        lists = by_torch(request)
    lengths, keep_indices, scores, frontiers = lists
    shape = len(request.cache.k), request.seq_lens.shape[0], request.cache.shape[2]
    keep_indices, scores = keep_indices.expand(*shape, -1), scores.expand(*shape, -1)
    if not request.many:
        keep_indices, scores = keep_indices[0], scores[0]
    return lengths, keep_indices, scores, frontiers


# -------------------------------------------------------------------------------------------------------- PyTorch


@torch.no_grad()
def by_torch(r: Request) -> Lists:
    """Processes one sequence at a time, which bounds the memory for any batch."""
    layers, sequences, heads = len(r.cache.k), r.seq_lens.shape[0], r.cache.shape[2]
    starts, fits = r.windows()
    alive = [(s, start) for s, (start, fit) in enumerate(zip(starts.tolist(), fits.tolist(), strict=True)) if fit]
    scores = r.reduced(_scores(r, alive))
    keep_indices = expanded_positions(scores, r.keep, r.chunk_budget, r.selection.max_chunk)
    keep_indices = torch.where(fits[:, None, None], keep_indices, -1)
    new_lens, frontiers = r.lengths(starts, fits)
    if not r.dry_run:
        rows = keep_indices.expand(layers, sequences, heads, r.keep)
        for s, start in alive:
            compact_sequence(r, s, start, int(r.seq_lens[s]), rows[:, s])
    return Lists(new_lens, keep_indices, scores, frontiers)


def _scores(r: Request, alive: list[tuple[int, int]]) -> Tensor:
    """Pooled scores. Zero for sequences that are not ``alive``, unless scores were given."""
    if r.scores is not None and r.selection.pool == "head":
        return r.scores
    scores = torch.zeros(*r.lists, r.window, device=r.seq_lens.device)
    if r.scores is not None:
        for s in range(r.seq_lens.shape[0]):
            scores[:, s] = _pooled(r, r.scores[:, s])
    elif r.query is not None:
        for s, start in alive:
            scores[:, s] = _pooled(r, score_sequence(r, s, start))
    return scores


def _pooled(r: Request, scores: Tensor) -> Tensor:
    """Means over the pooled dimensions of ``[L, H, W]``, in float64 so that the order of addition does not matter."""
    dims = {"head": (), "layer": (1,), "model": (0, 1)}[r.selection.pool]
    return scores.double().mean(dims, keepdim=True).float() if dims else scores


# --------------------------------------------------------------------------------------------------------- Triton


def by_triton(r: Request) -> tuple[Lists, list[Launch] | None]:
    """The same in three launches whatever ``L`` and ``S`` are, or four if scores are pooled or reduced.

    Scoring writes partial rows, which selection sums. If those of all layers would take too much memory, some layers
    are scored at a time, each time followed by a launch that sums their rows. The launches are returned if they are
    all that another call of the same kind needs.
    """
    if r.scores is not None:
        return _select_and_move(r, r.scores[:, :, :, None], None)[0], None
    layers, sequences, heads = len(r.cache.k), r.seq_lens.shape[0], r.cache.shape[2]
    config, rows = plan_score(r)
    if layers_at_once(sequences, heads, r.window, rows) >= layers:
        partials = r.seq_lens.new_empty(layers, sequences, heads, rows.tiles, r.window, dtype=torch.float32)
        scoring = launch_score(partials, r, config, rows, leads=overlaps(partials.device))
        lists, others = _select_and_move(r, partials, rows)
        return lists, None if r.dry_run or not lists.scores.is_contiguous() else [scoring, *others]
    scores = r.seq_lens.new_empty(layers, sequences, heads, r.window, dtype=torch.float32)
    launch_scores(scores, r, config, rows)
    return _select_and_move(r, scores[:, :, :, None], None)[0], None


def _select_and_move(r: Request, partials: Tensor, rows: PartialRows | None) -> tuple[Lists, list[Launch]]:
    """Selects by ``partials [L, S, H, tiles, W]`` and moves rows. Without ``rows`` the partials are the scores.

    Returns its launches, too. Only a launch right after another one of the event overlaps with it.
    """
    launches, follows = [], overlaps(partials.device)
    if r.selection.pool != "head" or (rows is not None and r.reduce_scores is not None):
        pooled = partials.new_empty(*r.lists, r.window)
        launches.append(launch_pool(pooled, partials, r, rows))
        partials, rows = pooled[:, :, :, None], None
    if rows is None:
        scores = r.reduced(partials[:, :, :, 0])
        partials = scores[:, :, :, None]
    else:
        scores = partials.new_empty(*r.lists, r.window)
    keep_indices = r.seq_lens.new_empty(*r.lists, r.keep)
    chunks = r.chunk_budget, r.selection.max_chunk
    launches.append(launch_keep(keep_indices, scores, partials, r, rows, *chunks, follows and rows is not None))
    if r.dry_run:
        new_lens, frontiers = r.lengths(*r.windows())
    else:
        new_lens, frontiers = torch.empty_like(r.seq_lens), torch.empty_like(r.seq_lens)
        everywhere = keep_indices.expand(len(r.cache.k), -1, r.cache.shape[2], -1)
        launches.append(launch_compact(new_lens, frontiers, r, everywhere, follows))
    return Lists(new_lens, keep_indices, scores, frontiers), launches
