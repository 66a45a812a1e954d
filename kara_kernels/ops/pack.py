"""Queries in four bits, written where they are kept: one launch per attention layer and step, and nothing else.

One program packs some (token, head) pairs. The largest magnitude of a pair gives its scale. Elements are divided by
the scale as it is stored and rounded to the nearest of 15 codes, so that rounding the scale costs nothing. A scale has
five significant bits and a code three, so that their product is exact in bfloat16, and in float16 within its range.

Method: symmetric round-to-nearest quantisation with a scale per token and head. Scales of five bits are this library's
choice.
"""

from torch import Tensor

from ..checks import check_unit_stride
from ..packed import PackedQueries, check_pack
from ..paged import row_alignment
from ..reference.pack import write_rows
from ._triton import kernel, launch, resolve_backend, tl, triton

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def _to_five_bits(x):
    """Positive float32 values rounded to five significant bits, half to even; what is not a normal number is 0."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x3FFFF + ((bits >> 19) & 1)) & -0x80000
    return tl.where(rounded < 0x800000, 0, rounded).to(tl.float32, bitcast=True)


@kernel
def pack_kernel(
    codes_ptr, scales_ptr, query_ptr, rows_ptr, count,
    stride_c_r: tl.int64, stride_c_h: tl.int64, stride_s_r: tl.int64, stride_s_h: tl.int64,
    stride_q_t: tl.int64, stride_q_h: tl.int64,
    HEADS: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, ALIGN_CODES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(tokens * heads / BLOCK_R),)``: token ``t`` of ``query`` goes to row ``rows[t]`` of codes and
    scales, or to row ``t``."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = pair < count
    token, head = pair // HEADS, pair % HEADS
    offs_d = tl.arange(0, BLOCK_D)
    source = tl.multiple_of(query_ptr + (token * stride_q_t + head * stride_q_h), ALIGN)
    x = tl.load(source[:, None] + offs_d[None, :], mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
    x = x.to(tl.float32)
    scale = _to_five_bits(tl.div_rn(tl.max(tl.abs(x), 1), 7.0))
    x = tl.div_rn(x, tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros_like(x))
    x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: addition rounds to whole numbers, half to even
    low, high = tl.split(tl.reshape(x.to(tl.int32) & 15, [BLOCK_R, BLOCK_D // 2, 2]))
    row = token
    if rows_ptr is not None:
        row = tl.load(rows_ptr + token, mask=inside, other=0)
    offs_b = tl.arange(0, BLOCK_D // 2)
    target = tl.multiple_of(codes_ptr + (row * stride_c_r + head * stride_c_h), ALIGN_CODES)
    mask = inside[:, None] & (offs_b < D // 2)[None, :]
    tl.store(target[:, None] + offs_b[None, :], (low | high << 4).to(tl.uint8), mask=mask)
    tl.store(scales_ptr + (row * stride_s_r + head * stride_s_h), scale.to(tl.bfloat16), mask=inside)


# --------------------------------------------------------------------------------------------- how it is launched


def launch_pack(out: PackedQueries, query: Tensor, rows: Tensor | None) -> None:
    """``query [T, H, D]`` into rows of ``out``: codes ``[R, H, D/2]``, scales ``[R, H]``. Checks nothing."""
    tokens, heads, dim = query.shape
    block_d = triton.next_power_of_2(dim)
    block_r = max(1, 4096 // block_d)  # 16 elements a lane at 8 warps
    launch(
        pack_kernel, (-(-tokens * heads // block_r), 1, 1), query.device,
        codes_ptr=out.codes, scales_ptr=out.scales, query_ptr=query, rows_ptr=rows, count=tokens * heads,
        stride_c_r=out.codes.stride(0), stride_c_h=out.codes.stride(1), stride_s_r=out.scales.stride(0),
        stride_s_h=out.scales.stride(1), stride_q_t=query.stride(0), stride_q_h=query.stride(1),
        HEADS=heads, D=dim, ALIGN=row_alignment(query), ALIGN_CODES=row_alignment(out.codes), BLOCK_R=block_r,
        BLOCK_D=block_d, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ public


def pack_queries(
    query: Tensor, *, out: PackedQueries | None = None, rows: Tensor | None = None, backend: str = "auto"
) -> PackedQueries:
    """Queries as 4-bit codes with a scale per token and head.

    Args:
        query: ``[..., H*G, D]`` float16, bfloat16 or float32, ``D`` even; the last stride 1 on the Triton path. With
            ``out`` it is ``[T, H*G, D]``.
        out: where the packed rows go, codes ``[R, H*G, D/2]`` and scales ``[R, H*G]``; new memory by default.
        rows: int64 ``[T]``, the row of ``out`` that takes each token; ``0..T-1`` by default. Of tokens that name the
            same row one is kept, and it is not said which.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        ``out``, or the new :class:`~kara_kernels.PackedQueries`. Both backends write the same bits.

    Raises:
        TypeError, ValueError: before anything is written. That ``rows`` lie in ``0..R-1`` is checked on the CPU and
            with ``KARA_KERNELS_DEBUG=1`` only.

    Elements that are not finite make the scores of their query NaN or are lost; they are not checked.
    """
    tokens, packed = check_pack(query, out, rows)
    if resolve_backend(backend, query.device) == "torch":
        write_rows(packed, tokens, rows)
    elif query.numel():
        check_unit_stride("query", query)
        launch_pack(packed.by_token(), tokens, rows)
    return packed
