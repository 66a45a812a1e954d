"""Token2Chunk: spends part of the budget on filling short gaps between good tokens.

Choosing candidates, buying chunks and filling up use one primitive, :func:`kara_kernels.ops.select.take_best`, on
different keys and weights. One program therefore processes a whole row in registers. Inside
:func:`kara_kernels.compress_window` the same kernel first sums the partial rows of scoring, so that selection costs
one launch.

Method: Token2Chunk of Kara (arXiv 2607.01237). The worth of a chunk (the lower of its two scores), the buying order
(best first, until one does not fit) and filling up to exactly ``keep`` are this library's choices.
"""

import torch
from torch import Tensor

from ..arguments import Windows
from ..checks import check_chunks, check_scores, require_rows
from ..reference.chunks import expanded_positions
from ._triton import Launch, dependent, kernel, launch, resolve_backend, tl, triton, window_of
from .pool import PartialRows, partial_arguments, row_scores
from .select import order_keys, row_warps, store_positions, take_best

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def _later(pos_a, key_a, pos_b, key_b):
    """Scan operator: the rightmost candidate, with its key."""
    right = pos_b > pos_a
    return tl.where(right, pos_b, pos_a), tl.where(right, key_b, key_a)


@triton.jit
def _earlier(pos_a, key_a, pos_b, key_b):
    left = pos_b < pos_a
    return tl.where(left, pos_b, pos_a), tl.where(left, key_b, key_a)


@triton.jit
def chunk_mask(keys, inside, offs_w, keep, chunk_budget, max_chunk, W: tl.constexpr):
    """Mask of exactly ``keep`` kept positions."""
    kept = take_best(keys, inside.to(tl.int32), keep - chunk_budget)
    if chunk_budget > 0:
        # The nearest candidate on either side of each position, and its key.
        left, left_key = tl.associative_scan((tl.where(kept, offs_w, -1), keys), 0, _later)
        right, right_key = tl.associative_scan((tl.where(kept, offs_w, W), keys), 0, _earlier, reverse=True)
        # The first position of a gap stands for its pair, so pairs are in position order.
        pair = inside & (left >= 0) & (right < W) & (right - left < max_chunk)
        first = pair & (offs_w == left + 1) & (right > offs_w)
        bought = take_best(tl.minimum(left_key, right_key), tl.where(first, right - left - 1, 0), chunk_budget)
        # A position is bought if no candidate lies between it and the latest bought first position to its left.
        opened = tl.associative_scan(tl.where(bought, offs_w, -1), 0, _maximum)
        kept = kept | (inside & (opened > left))
        missing = keep - tl.sum(kept.to(tl.int32), 0)
        kept = kept | take_best(keys, (inside & ~kept).to(tl.int32), missing)
    return kept


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@kernel
def keep_kernel(
    indices_ptr, scores_ptr, partials_ptr, starts_ptr, seq_lens_ptr, protected_ptr, num_tiles, inverse, redundancy,
    keep, chunk_budget, max_chunk, stride_p_l: tl.int64, stride_p_s: tl.int64, stride_p_h: tl.int64,
    COMPUTED: tl.constexpr, SQUARES: tl.constexpr, VALUE_NORM: tl.constexpr, REDUNDANCY: tl.constexpr,
    W: tl.constexpr, ALIGN: tl.constexpr, BLOCK_W: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Grid ``(keep lists of a layer, S, layers of lists)``: the keep list of one row, or -1 if the window does not
    fit. Rows that belong to no window have neither starts nor lengths.

    With ``COMPUTED`` the row is first summed from partial rows and written to ``scores``, as zeros if the window does
    not fit. Without it, ``partials`` are the scores.
    """
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    list_ = tl.program_id(0).to(tl.int64)
    seq = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    fits = True
    if seq_lens_ptr is not None:
        _, fits = window_of(seq, starts_ptr, seq_lens_ptr, protected_ptr, W)
    row = (layer * tl.num_programs(1) + seq) * tl.num_programs(0) + list_
    offs_w = tl.arange(0, BLOCK_W)
    inside = offs_w < W
    out = tl.multiple_of(scores_ptr + row * W, ALIGN)
    if fits:
        partials = tl.multiple_of(partials_ptr + layer * stride_p_l + seq * stride_p_s + list_ * stride_p_h, ALIGN)
        if COMPUTED:
            scores = row_scores(
                partials, offs_w, num_tiles, inverse, redundancy, W, SQUARES, VALUE_NORM, REDUNDANCY, BLOCK_W
            )
            tl.store(out + offs_w, scores, mask=inside)
        else:
            scores = tl.load(partials + offs_w, mask=inside, other=0.0)
        keys = order_keys(scores)
        kept = chunk_mask(keys, inside, offs_w, keep, chunk_budget, max_chunk, W)
        store_positions(indices_ptr + row * keep, kept, offs_w)
    else:
        tl.store(indices_ptr + row * keep + offs_w, tl.full([BLOCK_W], -1, tl.int32), mask=offs_w < keep)
        if COMPUTED:
            tl.store(out + offs_w, tl.zeros([BLOCK_W], tl.float32), mask=inside)


# --------------------------------------------------------------------------------------------- how it is launched


def launch_keep(
    indices: Tensor, scores: Tensor, partials: Tensor, w: Windows | None, rows: PartialRows | None, chunk_budget: int,
    max_chunk: int, follows: bool = False,
) -> Launch:  # fmt: skip
    """Selects from ``partials [l, S, h, tiles, W]`` into ``indices [l, S, h, keep]`` and ``scores [l, S, h, W]``.

    ``rows`` describes the partials. None means one tile, the scores themselves, and ``scores`` is not written. Without
    ``w`` every row is selected from. ``follows``: it may overlap with the kernel before. Checks nothing.
    """
    layers, sequences, lists, _, window = partials.shape
    return launch(
        keep_kernel, (lists, sequences, layers), scores.device,
        indices_ptr=indices, keep=indices.shape[-1], chunk_budget=chunk_budget, max_chunk=max_chunk,
        **partial_arguments(partials, scores, w, rows), **dependent(follows),
        BLOCK_W=triton.next_power_of_2(window), num_warps=row_warps(window), enable_fp_fusion=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ public


def expand_chunks(scores: Tensor, keep: int, chunk_budget: int, max_chunk: int, *, backend: str = "auto") -> Tensor:
    """Select ``keep`` positions of each row: the best tokens, plus the short gaps between them as far as a budget
    allows.

    1. The best ``keep - chunk_budget`` tokens are candidates, ranked as in :func:`select_topk`.
    2. Two neighbouring candidates with a gap between them are a possible chunk if they span at most ``max_chunk``
       tokens, both ends included. It is worth the lower of their two scores.
    3. Chunks are bought best first (ties: the lower position) while their gaps sum to at most ``chunk_budget``. Buying
       stops at the first chunk that does not fit. Neighbouring chunks share an end, so they can form longer ones.
    4. The best tokens not yet kept fill up to ``keep``.

    Args:
        scores: float32 ``[..., W]``, ``W`` up to 4096; rows as in :func:`select_topk`.
        keep: how many, ``1 <= keep <= W``.
        chunk_budget: tokens reserved for gaps, ``0 <= chunk_budget < keep``; 0 is plain top-k.
        max_chunk: longest span that counts as a chunk, in tokens, both ends included.
        backend: as in :func:`select_topk`.

    Returns:
        int32 ``[..., keep]``, ascending, always exactly ``keep`` distinct positions. All layers and heads share a
        block table, so a paged engine can only free blocks if their counts are equal.

    Raises:
        TypeError, ValueError: wrong dtype or range, a backend that cannot run.
    """
    check_scores(scores)
    check_chunks(scores.shape[-1], keep, chunk_budget, max_chunk)
    if resolve_backend(backend, scores.device) == "torch":
        return expanded_positions(scores, keep, chunk_budget, max_chunk)
    indices = torch.empty(*scores.shape[:-1], keep, dtype=torch.int32, device=scores.device)
    if indices.numel():
        rows = require_rows("scores", scores)[None, None]
        launch_keep(indices.view(1, 1, -1, keep), rows, rows[:, :, :, None], None, None, chunk_budget, max_chunk)
    return indices
