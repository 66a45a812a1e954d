"""Token2Chunk: spend part of the budget on short gaps between good tokens, as ``docs/method.md`` says."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_chunks, check_scores
from .select import by_rows, order_keys, positions_of_best, unique_rank


def expand_chunks(scores: Tensor, keep: int, chunk_budget: int, max_chunk: int) -> Tensor:
    """``keep`` positions of each row, ascending, of which up to ``chunk_budget`` complete chunks.

    ``scores`` float32 ``[..., W]``; returns int32 ``[..., keep]``, always exactly ``keep`` different positions.

    1. Candidates: the best ``keep - chunk_budget`` tokens, as :func:`select_topk` ranks them.
    2. Two neighbouring candidates with a gap between them and at most ``max_chunk`` tokens from end to end are a
       possible chunk, worth the lower of their two scores.
    3. Chunks are bought best first (ties: the lower position) until one does not fit the budget; a bought chunk
       keeps the whole gap.
    4. The best tokens not yet kept fill up to ``keep``.

    Method: Kara's Token2Chunk (arXiv 2607.01237); worth, buying order and the exact count are this library's choice.
    Raises TypeError / ValueError for a wrong dtype, ``keep`` outside 1..W, ``chunk_budget`` outside 0..keep-1 or
    ``max_chunk`` below 1.
    """
    check_scores(scores)
    check_chunks(scores.shape[-1], keep, chunk_budget, max_chunk)
    return expanded_positions(scores, keep, chunk_budget, max_chunk)


def expanded_positions(scores: Tensor, keep: int, chunk_budget: int, max_chunk: int) -> Tensor:
    """:func:`expand_chunks` unchecked."""
    return by_rows(lambda rows: _expand_rows(rows, keep, chunk_budget, max_chunk), scores, keep)


def _expand_rows(scores: Tensor, keep: int, chunk_budget: int, max_chunk: int) -> Tensor:
    keys = order_keys(scores)
    rank = unique_rank(keys)
    if chunk_budget == 0:
        return positions_of_best(rank, keep)
    candidates = positions_of_best(rank, keep - chunk_budget).long()
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, candidates, True)
    kept |= _bought_interiors(keys, candidates, chunk_budget, max_chunk)
    # Kept tokens outrank all others and are at most `keep`, so filling up is one more exact top-k.
    return positions_of_best(torch.where(kept, torch.iinfo(torch.int64).max, rank), keep)


def _bought_interiors(keys: Tensor, candidates: Tensor, budget: int, max_chunk: int) -> Tensor:
    """bool ``[..., W]``: the tokens inside the chunks that the budget buys."""
    left, right = candidates[..., :-1], candidates[..., 1:]
    gap = right - left - 1
    possible = (gap >= 1) & (gap + 2 <= max_chunk)
    at_candidates = keys.gather(-1, candidates)
    worth = torch.minimum(at_candidates[..., :-1], at_candidates[..., 1:])
    # Impossible pairs rank last and weigh nothing. Pairs ascend by position, so their place is their tie-break.
    rank = torch.where(possible, unique_rank(worth), torch.iinfo(torch.int64).min)
    order = rank.argsort(dim=-1, descending=True)
    weight = torch.where(possible, gap, 0)
    # Gaps are positive, so the running sum never comes back under the budget: buying stops at the first misfit.
    fits = weight.gather(-1, order).cumsum(-1) <= budget
    bought = torch.zeros_like(possible).scatter_(-1, order, fits) & possible
    # +1 after the left end and -1 at the right end; the running sum is positive inside bought chunks.
    edges = torch.zeros_like(keys)
    edges.scatter_add_(-1, left + 1, bought.to(edges.dtype))
    edges.scatter_add_(-1, right, -bought.to(edges.dtype))
    return edges.cumsum(-1) > 0
