"""Exact top-k of a row of scores, in position order, one program per row and everything in registers.

Halving the range of a row's integer keys finds its k-th largest in at most 32 counts. Ties and output slots come from
prefix sums. No sort, no atomics: the same bits in give the same indices out, on every device. A search
costs about a third of the instructions of a bitonic top-k at ``W`` = 1024 to 4096.
"""

import torch
from torch import Tensor

from ..checks import check_count, check_scores, require_rows
from ..paged import row_alignment
from ..reference.select import best_positions
from ._triton import kernel, launch, resolve_backend, tl, triton

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def order_keys(scores):
    """int32 keys that order as float32 scores do, with NaN as -inf and one zero.

    Flipping all bits but the sign of a negative float's pattern makes patterns order as signed integers do.
    """
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(scores == 0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def take_best(keys, weights, budget):
    """Mask of the elements taken by descending key, ties to the lower index, while the sum of weights fits
    ``budget``.

    Elements of weight 0 are no candidates, padding among them: no key of it could tie with a real -inf. Taking stops
    at the first that does not fit. With weights of one this is the exact top-``budget``.
    """
    candidate = weights > 0
    # The smallest threshold whose strictly greater keys fit. At the greatest key nothing is greater: it always fits.
    low = tl.min(tl.where(candidate, keys, 2147483647), 0)
    high = tl.max(tl.where(candidate, keys, -2147483648), 0)
    low = tl.where(budget > 0, low, high)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        total = tl.sum(tl.where(keys > middle, weights, 0), 0)
        if total <= budget:
            high = middle
            low = tl.where(total == budget, middle, low)  # exact: nothing lower can fit
        else:
            low = middle + 1
    above = candidate & (keys > high)
    tied = candidate & (keys == high)
    left = budget - tl.sum(tl.where(above, weights, 0), 0)
    return above | (tied & (tl.cumsum(tl.where(tied, weights, 0), 0) <= left))


@triton.jit
def store_positions(out, kept, offs_w):
    """Positions of the kept elements, ascending, into consecutive slots."""
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(out + slot, offs_w, mask=kept)


@kernel
def topk_kernel(
    indices_ptr, scores_ptr, k, stride_row: tl.int64, W: tl.constexpr, ALIGN: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Grid ``(rows,)``: ``indices [rows, k]`` from ``scores [rows, W]``."""
    row = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    inside = offs_w < W
    scores = tl.load(tl.multiple_of(scores_ptr + row * stride_row, ALIGN) + offs_w, mask=inside, other=0.0)
    kept = take_best(order_keys(scores), inside.to(tl.int32), k)
    store_positions(indices_ptr + row * k, kept, offs_w)


# --------------------------------------------------------------------------------------------- how it is launched


def row_warps(window: int) -> int:
    """256 elements a warp: one warp counts without barriers, and wider rows stay in registers without a spill (at 512
    a warp, W = 4096 spilled scalar registers on gfx942). 128 at W = 2048: 256 spilled on sm_100 and sm_120.
    """
    block = triton.next_power_of_2(window)
    return 16 if block >= 2048 else max(1, block // 256)


def launch_topk(indices: Tensor, scores: Tensor, k: int) -> None:
    """``scores [rows, W]`` into ``indices [rows, k]``. Checks nothing."""
    rows, window = scores.shape
    launch(
        topk_kernel, (rows, 1, 1), scores.device, indices_ptr=indices, scores_ptr=scores, k=k,
        stride_row=scores.stride(0), W=window, ALIGN=row_alignment(scores), BLOCK_W=triton.next_power_of_2(window),
        num_warps=row_warps(window), enable_fp_fusion=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ public


def select_topk(scores: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """The ``k`` best positions of each row, in ascending position order.

    Args:
        scores: float32 ``[..., W]``, ``W`` up to 4096. On the Triton path rows must lie at one stride and the last
            dimension at stride 1; other rows are a ValueError and never a silent copy.
        k: how many, ``1 <= k <= W``.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        int32 ``[..., k]``. Exact for any bit pattern: higher score first, ties to the lowest position, NaN ranks as
        -inf, -0.0 equals +0.0. The same bits in give the same indices out on every device and in every batch.

    Raises:
        TypeError, ValueError: wrong dtype, ``k`` outside ``1..W``, a backend that cannot run.
    """
    check_scores(scores)
    check_count("k", k, 1, scores.shape[-1])
    if resolve_backend(backend, scores.device) == "torch":
        return best_positions(scores, k)
    indices = torch.empty(*scores.shape[:-1], k, dtype=torch.int32, device=scores.device)
    if indices.numel():
        launch_topk(indices.view(-1, k), require_rows("scores", scores), k)
    return indices
