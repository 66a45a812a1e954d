"""Which channels of K matter to the queries, so that the others need not be stored.

One program squares the queries and the keys of one head, a tile of rows at a time, for a slice of channels. It adds
tiles in order, element by element, and sums over rows once at the end.

Method: ThinK (arXiv 2407.21018). A channel's share of all logits is bounded by the norm of its queries times that of
its keys; channels with the largest product stay. :func:`gather_rows` and :func:`quantize_rows` leave the others out
while they load rows, and :func:`scatter_rows` and :func:`dequantize_rows` put zeros in their place.
"""

from typing import Any

import torch
from torch import Tensor

from ..payload_arguments import Caches
from ..reference.channels import ChannelArguments, channel_scores, check_channels
from ..reference.select import best_positions
from ._rows import PagedRows, fp8_to_float, pool_arguments, row_pointer
from ._triton import kernel, launch, layer_pointer, resolve_backend, tl, triton
from .select import launch_topk

# ------------------------------------------------------------------------------------------------- device code


@kernel
def channel_kernel(
    scores_ptr, q_ptr, q_table, k_ptr, k_table, block_table_ptr, tokens, query_rows,
    stride_q_l: tl.int64, stride_q_n: tl.int64, stride_q_h: tl.int64,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid ``(slices of channels, H, L)``."""
    head, layer = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_R)
    dims = (offs_d < K.dim)[None, :]
    queries = layer_pointer(q_ptr, q_table, stride_q_l, layer) + head * G * stride_q_h
    asked = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, query_rows, BLOCK_R):
        row = (first + offs_r).to(tl.int64)
        place = row // G * stride_q_n + row % G * stride_q_h
        x = tl.load(queries + place[:, None] + offs_d[None, :], mask=(row < query_rows)[:, None] & dims, other=0.0)
        x = x.to(tl.float32)
        asked += x * x
    base = layer_pointer(k_ptr, k_table, stride_k_l, layer) + head * stride_k_h
    pool = PagedRows(base, block_table_ptr, 0, stride_k_b, stride_k_p)
    FP8: tl.constexpr = K.fp8  # Triton 3.6 passes on no string that it takes out of a tuple
    held = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, tokens, BLOCK_R):
        token = first + offs_r
        block = tl.load(block_table_ptr + token // K.page, mask=token < tokens, other=0)
        row = row_pointer(pool, block, token % K.page, K)
        keys = tl.load(row[:, None] + offs_d[None, :], mask=(token < tokens)[:, None] & dims, other=0)
        if FP8 is not None:
            keys = fp8_to_float(keys, FP8, tl.float32)
        keys = keys.to(tl.float32)
        held += keys * keys
    score = (tl.sum(asked, 0) / query_rows) * (tl.sum(held, 0) / tokens)
    tl.store(scores_ptr + (layer * H + head) * K.dim + offs_d, score, mask=offs_d < K.dim)


# --------------------------------------------------------------------------------------------- how it is launched


def launch_channels(scores: Tensor, a: ChannelArguments) -> None:
    """Writes ``scores``, float32 ``[L, H, D]`` and contiguous. Checks nothing."""
    _, _, heads, dim = a.cache.shape
    layer, _, token, head = a.query.strides
    group = a.query[0].shape[2] // heads
    block_d = min(64, triton.next_power_of_2(dim))
    arguments: dict[str, Any] = pool_arguments("k", a.cache.k)
    launch(
        channel_kernel, (-(-dim // block_d), heads, len(a.cache.k)), scores.device, scores_ptr=scores, q_ptr=a.query[0],
        q_table=a.query.table, block_table_ptr=a.block_table, tokens=a.tokens,
        query_rows=a.query[0].shape[1] * group, stride_q_l=layer, stride_q_n=token, stride_q_h=head, **arguments,
        H=heads, G=group, BLOCK_R=32, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True,  # 64 rows spilled on sm_100
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ public


def rank_channels(
    query: Caches, k_cache: Caches, block_table: Tensor, tokens: int, keep: int, *, backend: str = "auto"
) -> Tensor:
    """The ``keep`` channels of K with the largest product of mean squares of queries and keys, per KV head.

    Args:
        query: ``[N, H*G, D]`` float16, bfloat16 or float32, the last stride 1, or ``L`` such tensors: post-RoPE queries
            of recent tokens. ThinK takes the last 32.
        k_cache: ``[B, P, H, D]`` float16, bfloat16, float32 or float8 of any strides (the last 1 on the Triton path),
            or ``L`` such tensors, or a :class:`~kara_kernels.PagedCache` half.
        block_table: int32 ``[max_blocks]``, the context's blocks.
        tokens: of the context.
        keep: channels to keep, ``1..D``.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        int32 ``[H, keep]``, for many layers ``[L, H, keep]``: ascending channels. Of equal products the lower channel
        stays. Sums of squares are rounded in another order by each backend, so close products may rank differently.

    Raises:
        TypeError, ValueError: naming argument, expected and got. Block ids are checked on the CPU and with
            ``KARA_KERNELS_DEBUG=1`` only.
    """
    a = check_channels(query, k_cache, block_table, tokens, keep)
    if resolve_backend(backend, a.block_table.device) == "torch":
        kept = best_positions(channel_scores(a), keep)
    else:
        a.cache.require_kernel_layout()
        a.query.require_kernel_layout("query")
        scores = torch.empty(len(a.cache.k), *a.cache.shape[2:], dtype=torch.float32, device=a.block_table.device)
        launch_channels(scores, a)
        kept = torch.empty(*scores.shape[:2], keep, dtype=torch.int32, device=scores.device)
        launch_topk(kept.view(-1, keep), scores.view(-1, scores.shape[-1]), keep)
    return kept if a.many else kept[0]
