"""Exact top-k of a row of scores, in position order. One program handles a row, entirely in registers.

Bisection over a row's integer keys finds the k-th largest in at most 32 counting passes. Ties and output slots come
from prefix sums. Without sorts and atomics, equal input bits give equal indices on every device. A search costs about a
third of the instructions of a bitonic top-k at ``W`` = 1024 to 4096.
"""

import torch
from torch import Tensor

from ..checks import check_scores, require_rows
from ..paged import row_alignment
from ..reference.select import best_positions
from ..values import check_count
from ._triton import kernel, launch, resolve_backend, tl, triton

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def order_keys(scores):
    """int32 keys that order like the float32 scores, with NaN as -inf and a single zero.

    Flipping all bits except the sign of negative floats makes bit patterns order like signed integers.
    """
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(scores == 0, 0.0, scores)
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def take_best(keys, weights, budget):
    """Mask of the elements taken by descending key, ties to the lower index, while the sum of weights fits
    ``budget``.

    Elements of weight 0, including padding, are not candidates, so padding cannot tie with a real -inf. Taking stops
    at the first element that does not fit. With weights of one this is the exact top-``budget``.
    """
    candidate = weights > 0
    # Find the smallest threshold such that all strictly greater keys fit. The greatest key always qualifies.
    low = tl.min(tl.where(candidate, keys, 2147483647), 0)
    high = tl.max(tl.where(candidate, keys, -2147483648), 0)
    low = tl.where(budget > 0, low, high)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        total = tl.sum(tl.where(keys > middle, weights, 0), 0)
        if total <= budget:
            high = middle
            low = tl.where(total == budget, middle, low)  # exact, so nothing lower can fit
        else:
            low = middle + 1
    above = candidate & (keys > high)
    tied = candidate & (keys == high)
    left = budget - tl.sum(tl.where(above, weights, 0), 0)
    return above | (tied & (tl.cumsum(tl.where(tied, weights, 0), 0) <= left))


@triton.jit
def store_positions(out, kept, offs_w):
    """Store the positions of the kept elements, ascending, in consecutive slots."""
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
    """256 elements per warp. A single warp counts without barriers, and wider rows stay in registers without spills.

    With 512 per warp, W = 4096 spilled scalar registers on gfx942. At W = 2048 it is 128 per warp, because 256 spilled
    on sm_100 and sm_120.
    """
    block = triton.next_power_of_2(window)
    return 16 if block >= 2048 else max(1, block // 256)


def launch_topk(indices: Tensor, scores: Tensor, k: int) -> None:
    """Selects from ``scores [rows, W]`` into ``indices [rows, k]``. Checks nothing."""
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
        scores: float32 ``[..., W]``, ``W`` up to 4096. On the Triton path rows must have a common stride, and the
            last dimension stride 1. Other layouts raise ValueError and are never copied silently.
        k: how many, ``1 <= k <= W``.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        int32 ``[..., k]``. Exact for any bit pattern: higher score first, ties to the lowest position, NaN ranks as
        -inf, -0.0 equals +0.0. Equal input bits give equal indices on every device and in every batch.

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
