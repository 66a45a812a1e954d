"""Token2Chunk: spends part of the budget on short gaps between good tokens. See Token2Chunk in ``docs/method.md``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_chunks, check_scores
from .select import by_rows, order_keys, positions_of_best, unique_rank


def expand_chunks(scores: Tensor, keep: int, chunk_budget: int, max_chunk: int) -> Tensor:
    """Select ``keep`` positions of each row, ascending. Up to ``chunk_budget`` of them complete chunks.

    ``scores`` is float32 ``[..., W]``. Returns int32 ``[..., keep]``, always exactly ``keep`` distinct positions.

    1. The best ``keep - chunk_budget`` tokens are candidates, ranked as in :func:`select_topk`.
    2. Two neighbouring candidates with a gap between them are a possible chunk if they span at most ``max_chunk``
       tokens, both ends included. It is worth the lower of their two scores.
    3. Chunks are bought best first (ties: the lower position) until one does not fit the budget. A bought chunk
       keeps the whole gap.
    4. The best tokens not yet kept fill up to ``keep``.

    Method: Kara's Token2Chunk (arXiv 2607.01237). Worth, buying order and the exact count are this library's choices.
    Raises TypeError or ValueError for a wrong dtype, ``keep`` outside 1..W, ``chunk_budget`` outside 0..keep-1 or
    ``max_chunk`` below 1.
    """
    check_scores(scores)
    check_chunks(scores.shape[-1], keep, chunk_budget, max_chunk)
    return expanded_positions(scores, keep, chunk_budget, max_chunk)


def expanded_positions(scores: Tensor, keep: int, chunk_budget: int, max_chunk: int) -> Tensor:
    """:func:`expand_chunks` without checks."""
    return by_rows(lambda rows: _expand_rows(rows, keep, chunk_budget, max_chunk), scores, keep)


def _expand_rows(scores: Tensor, keep: int, chunk_budget: int, max_chunk: int) -> Tensor:
    keys = order_keys(scores)
    rank = unique_rank(keys)
    if chunk_budget == 0:
        return positions_of_best(rank, keep)
    candidates = positions_of_best(rank, keep - chunk_budget).long()
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, candidates, True)
    kept |= _bought_interiors(keys, candidates, chunk_budget, max_chunk)
    # At most `keep` tokens are kept and they outrank all others, so filling up is one more exact top-k.
    return positions_of_best(torch.where(kept, torch.iinfo(torch.int64).max, rank), keep)


def _bought_interiors(keys: Tensor, candidates: Tensor, budget: int, max_chunk: int) -> Tensor:
    """bool ``[..., W]``: the tokens inside the chunks that the budget buys."""
    left, right = candidates[..., :-1], candidates[..., 1:]
    gap = right - left - 1
    possible = (gap >= 1) & (gap + 2 <= max_chunk)
    at_candidates = keys.gather(-1, candidates)
    worth = torch.minimum(at_candidates[..., :-1], at_candidates[..., 1:])
    # Impossible pairs rank last and have weight 0. Pairs are in position order, so their index breaks ties.
    rank = torch.where(possible, unique_rank(worth), torch.iinfo(torch.int64).min)
    order = rank.argsort(dim=-1, descending=True)
    weight = torch.where(possible, gap, 0)
    # Gaps are positive, so the running sum never falls. Buying therefore stops at the first pair that does not fit.
    fits = weight.gather(-1, order).cumsum(-1) <= budget
    bought = torch.zeros_like(possible).scatter_(-1, order, fits) & possible
    # +1 after the left end and -1 at the right end, so the running sum is positive inside bought chunks.
    edges = torch.zeros_like(keys)
    edges.scatter_add_(-1, left + 1, bought.to(edges.dtype))
    edges.scatter_add_(-1, right, -bought.to(edges.dtype))
    return edges.cumsum(-1) > 0
