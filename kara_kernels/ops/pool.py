"""Computes the scores of a KV head from its partial rows, and averages them if heads or layers share a keep list."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..arguments import Windows
from ..paged import row_alignment
from ._triton import Launch, kernel, launch, tl, triton, window_of

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def row_scores(partials, offs_w, num_tiles, inverse, redundancy, W: tl.constexpr, SQUARES: tl.constexpr,
               VALUE_NORM: tl.constexpr, REDUNDANCY: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Scores of one KV head from its partial rows, added in ascending order."""
    inside = offs_w < W
    sums = num_tiles - VALUE_NORM - REDUNDANCY
    total = tl.zeros([BLOCK_W], tl.float32)
    for tile in range(0, sums):
        total += tl.load(partials + tile * W + offs_w, mask=inside, other=0.0)
    total = total * tl.cast(inverse, tl.float32)
    if SQUARES:
        total = tl.sqrt_rn(total)
    if VALUE_NORM:
        total *= tl.load(partials + sums * W + offs_w, mask=inside, other=0.0)
    if REDUNDANCY:
        alike = tl.load(partials + (num_tiles - 1) * W + offs_w, mask=inside, other=0.0)
        total -= tl.cast(redundancy, tl.float32) * alike
    return total


@kernel
def pool_kernel(
    scores_ptr, partials_ptr, starts_ptr, seq_lens_ptr, protected_ptr, num_tiles, inverse, redundancy,
    stride_p_l: tl.int64, stride_p_s: tl.int64, stride_p_h: tl.int64,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, COMPUTED: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr,
    SQUARES: tl.constexpr, VALUE_NORM: tl.constexpr, REDUNDANCY: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Grid ``(lists of a layer, S, pooled layers)``: scores ``[pooled L, S, pooled H, W]``, means over ``HEADS`` and
    ``LAYERS``.

    Means are taken in float64 and rounded once, so that they do not depend on the order of addition. Computed scores
    of a sequence whose window does not fit are zero.
    """
    offs_w = tl.program_id(0) % tl.cdiv(W, BLOCK_W) * BLOCK_W + tl.arange(0, BLOCK_W)
    list_ = (tl.program_id(0) // tl.cdiv(W, BLOCK_W)).to(tl.int64)
    lists = tl.num_programs(0) // tl.cdiv(W, BLOCK_W)
    seq = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    fits = True
    if COMPUTED:
        _, fits = window_of(seq, starts_ptr, seq_lens_ptr, protected_ptr, W)
    out = tl.multiple_of(scores_ptr + ((layer * tl.num_programs(1) + seq) * lists + list_) * W, ALIGN) + offs_w
    if fits:
        partials = tl.multiple_of(partials_ptr + layer * stride_p_l + seq * stride_p_s + list_ * stride_p_h, ALIGN)
        if LAYERS * HEADS == 1:
            pooled = row_scores(
                partials, offs_w, num_tiles, inverse, redundancy, W, SQUARES, VALUE_NORM, REDUNDANCY, BLOCK_W
            )
        else:
            total = tl.zeros([BLOCK_W], tl.float64)
            for row in range(0, LAYERS * HEADS):
                source = tl.multiple_of(partials + (row // HEADS * stride_p_l + row % HEADS * stride_p_h), ALIGN)
                scores = row_scores(
                    source, offs_w, num_tiles, inverse, redundancy, W, SQUARES, VALUE_NORM, REDUNDANCY, BLOCK_W
                )
                total += scores.to(tl.float64)
            pooled = (total / (LAYERS * HEADS)).to(tl.float32)
        tl.store(out, pooled, mask=offs_w < W)
    else:
        tl.store(out, tl.zeros([BLOCK_W], tl.float32), mask=offs_w < W)


# --------------------------------------------------------------------------------------------- how it is launched


@dataclass(frozen=True)
class PartialRows:
    """What the partial rows of a KV head contain, and how they become its scores. See ``row_scores``."""

    tiles: int = 1
    inverse: float = 1.0  # 1 / the number of softmax rows in a column sum
    squares: bool = False
    value_norm: bool = False
    redundancy: float = 0.0


def launch_pool(scores: Tensor, partials: Tensor, w: Windows, rows: PartialRows | None) -> Launch:
    """Pools ``partials [L, S, H, tiles, W]`` into ``scores [L or 1, S, H or 1, W]``, averaged if the extent is 1.

    ``rows`` describes the partials. None means one tile, the scores themselves.
    """
    layers, sequences, heads, _, window = partials.shape
    pooled_layers, _, lists, _ = scores.shape
    block = min(256, triton.next_power_of_2(window))
    return launch(
        pool_kernel, (lists * triton.cdiv(window, block), sequences, pooled_layers), scores.device,
        **partial_arguments(partials, scores, w, rows),
        LAYERS=layers // pooled_layers, HEADS=heads // lists, BLOCK_W=block, num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip


def partial_arguments(
    partials: Tensor, scores: Tensor, w: Windows | None, rows: PartialRows | None
) -> dict[str, Any]:  # fmt: skip
    """Arguments shared by the kernels that compute ``scores`` from ``partials``."""
    _, _, _, tiles, window = partials.shape
    stride_layer, stride_sequence, stride_head, _, _ = partials.stride()
    of = rows or PartialRows()
    starts, seq_lens, protected = (w.window_starts, w.seq_lens, w.protected_lens) if w else (None, None, None)
    return {
        "scores_ptr": scores, "partials_ptr": partials, "starts_ptr": starts, "seq_lens_ptr": seq_lens,
        "protected_ptr": protected, "num_tiles": tiles, "inverse": of.inverse, "redundancy": of.redundancy,
        "stride_p_l": stride_layer, "stride_p_s": stride_sequence, "stride_p_h": stride_head,
        "COMPUTED": rows is not None, "SQUARES": of.squares, "VALUE_NORM": int(of.value_norm),
        "REDUNDANCY": int(of.redundancy > 0), "W": window,
        "ALIGN": min(row_alignment(partials), row_alignment(scores)),
    }  # fmt: skip
