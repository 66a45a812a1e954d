"""Attention mass that every key of a window receives from all window queries, in one pass where the window fits.

    a[s,h,g,i,j] = scale * <query[s,i,h*G+g], key[s,h,j]>
    p[s,h,g,i,:] = softmax_j(a[s,h,g,i,:])
    scores[s,h,j] = mean over g and i of p[s,h,g,i,j], or the root of the mean of its square

One program owns some of the ``N*G`` query rows of one (layer, sequence, KV head). With all ``W`` keys at hand a softmax
row is local to a tile. So the program keeps the keys on chip, walks its query tiles and adds up columns; the ``N x W``
logits never leave registers. Each program leaves one partial row, and whoever needs the scores adds the partial rows in
fixed order, without atomics and with the same bits every time. Where heads are too wide for that, keys pass once per
query tile in slices of the head dimension. Wider windows stream key tiles twice, once for each row's log-sum-exp and
once for the columns.

Method: bidirectional attention scores of Kara (arXiv 2607.01237); redundancy after R-KV (arXiv 2505.24133); weights by
the length of values as in Compactor (arXiv 2507.08143); root mean squares are this library's choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import ScoreArguments, check_score_window
from ..checks import FP8_DTYPES
from ..paged import Layers, PagedCache, row_alignment
from ..reference.score import score_windows
from ._columns import columns_sliced, columns_streamed, columns_whole
from ._norms import mean_cosines, value_norms
from ._rows import PagedRows, QueryRows, RowFormat
from ._tiles import ScoreConfig, score_config
from ._triton import INTERPRETED, architecture, kernel, launch, layer_pointer, resolve_backend, tl, window_of
from .pool import PartialRows, launch_pool

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

PARTIAL_BYTES = 256 << 20
"""Bytes of partial rows on a GPU, or those of one layer if they are more; further layers are scored after them."""


# ------------------------------------------------------------------------------------------------- device code


@dataclass(frozen=True)
class ScoreForm:
    """What the kernel is compiled to know of queries and options; ``ScoreConfig`` is how it goes about it."""

    heads: int  # KV heads
    group: int
    window: int
    align: int  # bytes that every query row's address is a multiple of
    align_partials: int  # ... partial row's
    causal: bool
    squares: bool
    value_norm: int  # partial rows that hold value norms
    redundancy: int  # ... the softmax of mean cosines
    dtype: Any  # Triton's, of the products
    precision: str
    scale_first: bool  # queries are scaled before the product, else the product


@kernel
def score_kernel(
    partials_ptr, query_ptr, query_table, query_rows_ptr, k_ptr, k_table, v_ptr, v_table, block_tables_ptr, starts_ptr,
    seq_lens_ptr, protected_ptr, scale, k_scale_ptr, num_queries, num_tiles, first_layer,
    stride_q_l: tl.int64, stride_q_s: tl.int64, stride_q_n: tl.int64, stride_q_h: tl.int64, stride_qr_s: tl.int64,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    stride_v_l: tl.int64, stride_v_b: tl.int64, stride_v_p: tl.int64, stride_v_h: tl.int64,
    stride_t_s: tl.int64, stride_ks_l: tl.int64, stride_ks_h: tl.int64,
    FORM: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Grid ``(S*H, tiles, L)``: partial rows ``[L, S, H, tiles, W]``: column sums, of squares with ``FORM.squares``;
    then a row of value norms with ``FORM.value_norm``; last one of redundancy's softmax with ``FORM.redundancy``.
    ``L`` counts from ``first_layer`` of the pools.

    A sequence whose window does not fit is left out; nobody reads its partial rows.
    """
    W: tl.constexpr = FORM.window
    ALIGN: tl.constexpr = FORM.align_partials
    NORM: tl.constexpr = FORM.value_norm
    REDUNDANCY: tl.constexpr = FORM.redundancy
    BLOCK_R: tl.constexpr = 16  # tokens that norms and cosines are taken of at a time
    seq = (tl.program_id(0) // FORM.heads).to(tl.int64)
    head = (tl.program_id(0) % FORM.heads).to(tl.int64)
    tile = tl.program_id(1)
    layer = first_layer + tl.program_id(2).to(tl.int64)
    start, fits = window_of(seq, starts_ptr, seq_lens_ptr, protected_ptr, W)
    if fits:
        table = block_tables_ptr + seq * stride_t_s
        k_base = layer_pointer(k_ptr, k_table, stride_k_l, layer) + head * stride_k_h
        keys = PagedRows(k_base, table, start, stride_k_b, stride_k_p)
        row = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_tiles + tile
        out = tl.multiple_of(partials_ptr + row * W, ALIGN)
        if REDUNDANCY and tile == num_tiles - 1:
            mean_cosines(out, keys, W, K, K.block, BLOCK_R)
        elif NORM and tile == num_tiles - 1 - REDUNDANCY:
            v_base = layer_pointer(v_ptr, v_table, stride_v_l, layer) + head * stride_v_h
            values = PagedRows(v_base, table, start, stride_v_b, stride_v_p)
            value_norms(out, values, W, V, V.block, BLOCK_R)
        else:
            q_base = layer_pointer(query_ptr, query_table, stride_q_l, layer)
            q_base += seq * stride_q_s + head * FORM.group * stride_q_h
            places = query_rows_ptr
            if query_rows_ptr is not None:
                places += seq * stride_qr_s
            queries = QueryRows(q_base, places, stride_q_n, stride_q_h, num_queries)
            factor = tl.cast(scale, tl.float32) * 1.4426950408889634  # log2(e): exp2 is the native instruction
            if k_scale_ptr is not None:
                factor *= tl.load(k_scale_ptr + layer * stride_ks_l + head * stride_ks_h).to(tl.float32)
            row_first = tile * CONFIG.rows
            row_last = tl.minimum(row_first + CONFIG.rows, num_queries * FORM.group)
            if CONFIG.whole and CONFIG.sliced:
                columns_sliced(out, queries, keys, factor, row_first, row_last, FORM, K, CONFIG)
            elif CONFIG.whole:
                columns_whole(out, queries, keys, factor, row_first, row_last, FORM, K, CONFIG)
            else:
                columns_streamed(out, queries, keys, factor, row_first, row_last, FORM, K, CONFIG)


# --------------------------------------------------------------------------------------------- how it is launched


def plan_score(
    query: Layers, k_cache: Layers, window: int, reduction: str, value_norm: bool, redundancy: float,
    query_rows: Tensor | None = None,
) -> tuple[ScoreConfig, PartialRows]:  # fmt: skip
    """The launch configuration and the partial rows that it leaves per KV head; arguments as of ``launch_score``."""
    q, k = query[0], k_cache[0]
    config = score_config(window, k.shape[3], _matrix_dtype(q, k), architecture(k.device))
    queries = q.shape[1] if query_rows is None else query_rows.shape[1]
    rows = queries * (q.shape[2] // k.shape[2])
    tiles = -(-rows // config.rows) + value_norm + (redundancy > 0)  # triton.cdiv takes 10 us here
    return config, PartialRows(tiles, 1 / rows, reduction == "rms", value_norm, redundancy)


def _matrix_dtype(query: Tensor, keys: Tensor) -> torch.dtype:
    """What products are taken in: the query's dtype, which holds any fp8 key exactly; float32 where dtypes mix."""
    mixed = keys.dtype != query.dtype and keys.dtype not in FP8_DTYPES
    return torch.float32 if mixed else query.dtype


def launch_score(
    partials: Tensor, query: Layers, cache: PagedCache, block_tables: Tensor, starts: Tensor | None,
    seq_lens: Tensor | None, protected: Tensor | None, scale: float, k_scale: float | Tensor, attention: str,
    rows: PartialRows, config: ScoreConfig, query_rows: Tensor | None = None, first_layer: int = 0,
) -> None:  # fmt: skip
    """Partial rows of all sequences in layers ``first_layer`` ... of the pools into ``partials [L, S, H, tiles, W]``.

    ``query``: ``[S, N, H*G, D]`` of each layer. With ``query_rows`` (int32 ``[S, N]``, the last stride 1) it is
    ``[1, R, H*G, D]`` instead, and query ``i`` of sequence ``s`` is row ``query_rows[s, i]``. Checks nothing.
    """
    layers, sequences, heads, tiles, window = partials.shape
    values = cache.v if rows.value_norm and cache.v is not None else cache.k  # keys stand in where none are read
    q, k, v = query[0], cache.k[0], values[0]
    form = ScoreForm(
        heads, q.shape[2] // heads, window, query.alignment, row_alignment(partials), attention == "causal",
        rows.squares, int(rows.value_norm), int(rows.redundancy > 0),
        # The interpreter's bfloat16 arithmetic is wrong; there products are taken in float32.
        tl.float32 if INTERPRETED else TRITON_DTYPES[_matrix_dtype(q, k)], architecture(k.device).float32_products,
        _matrix_dtype(q, k) == torch.float32,
    )  # fmt: skip
    by_head = k_scale if isinstance(k_scale, Tensor) else None
    # No fused multiply-add but those that are written as such. Where a lane holds one term of a sum across lanes, the
    # compiler makes `shfl y, x*x; fma x, x, y` of it: the lane rounds its partner's product and not its own, the
    # partner does the opposite, and the two store different last bits of one sum to one address. It happened to the
    # sums of narrow or misaligned rows everywhere, and to all columns on sm_100, whose lanes hold one query row each.
    launch(
        score_kernel, (sequences * heads, tiles, layers), k.device,
        partials_ptr=partials, query_ptr=q, query_table=query.table, query_rows_ptr=query_rows,
        k_ptr=_bytes_of_fp8(k), k_table=cache.k.table, v_ptr=_bytes_of_fp8(v), v_table=values.table,
        block_tables_ptr=block_tables, starts_ptr=starts, seq_lens_ptr=seq_lens, protected_ptr=protected,
        scale=float(scale if isinstance(k_scale, Tensor) else scale * k_scale), k_scale_ptr=by_head,
        num_queries=q.shape[1] if query_rows is None else query_rows.shape[1], num_tiles=tiles, first_layer=first_layer,
        stride_q_l=query.stride_layer, stride_q_s=q.stride(0) if query_rows is None else 0,
        stride_q_n=q.stride(1), stride_q_h=q.stride(2),
        stride_qr_s=0 if query_rows is None else query_rows.stride(0),
        stride_k_l=cache.k.stride_layer, stride_k_b=k.stride(0), stride_k_p=k.stride(1), stride_k_h=k.stride(2),
        stride_v_l=values.stride_layer, stride_v_b=v.stride(0), stride_v_p=v.stride(1), stride_v_h=v.stride(2),
        stride_t_s=block_tables.stride(0),
        stride_ks_l=0 if by_head is None else by_head.stride(0),
        stride_ks_h=0 if by_head is None else by_head.stride(1),
        FORM=form, K=RowFormat.of(cache.k), V=RowFormat.of(values), CONFIG=config,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def _bytes_of_fp8(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8) if rows.dtype in FP8_DTYPES else rows


def layers_at_once(sequences: int, heads: int, window: int, rows: PartialRows) -> int:
    """Layers whose partial rows may be there together; at least one."""
    return max(1, PARTIAL_BYTES // (4 * sequences * heads * rows.tiles * window))


def launch_scores(
    scores: Tensor, query: Layers, cache: PagedCache, block_tables: Tensor, starts: Tensor | None,
    seq_lens: Tensor | None, protected: Tensor | None, scale: float, k_scale: float | Tensor, attention: str,
    rows: PartialRows, config: ScoreConfig, query_rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Scores of every head into ``scores [L, S, H, W]``, some layers at a time so that partial rows stay bounded.

    Zero for a sequence whose window does not fit. Checks nothing.
    """
    layers, sequences, heads, window = scores.shape
    at_once = min(layers, layers_at_once(sequences, heads, window, rows))
    partials = scores.new_empty(at_once, sequences, heads, rows.tiles, window)
    for first in range(0, layers, at_once):
        some = partials[: layers - first]
        launch_score(
            some, query, cache, block_tables, starts, seq_lens, protected, scale, k_scale, attention, rows, config,
            query_rows, first,
        )  # fmt: skip
        launch_pool(scores[first : first + at_once], some, starts, seq_lens, protected, rows, True)


# ------------------------------------------------------------------------------------------------------ public


def score_window(
    query: Tensor | Sequence[Tensor],
    k_cache: Tensor | Sequence[Tensor],
    block_tables: Tensor,
    window_starts: Tensor,
    window: int,
    *,
    scale: float | None = None,
    k_scale: float | Tensor | None = None,
    attention: str = "bidirectional",
    reduction: str = "mean",
    v_cache: Tensor | Sequence[Tensor] | None = None,
    redundancy: float = 0.0,
    query_rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention mass that every key of each window receives from all queries, without the causal mask.

    Args:
        query: ``[S, N, H*G, D]`` float16, bfloat16 or float32, post-RoPE, in any order (a ring buffer needs no
            rotation). Queries of tokens behind the window may be among them. Or ``L`` such tensors, or one ``[L, S,
            N, H*G, D]``.
        k_cache: ``[B, P, H, D]`` of those dtypes or float8, any strides (the last 1 on the Triton path); or ``L`` of
            them.
        block_tables: int32 ``[S, max_blocks]``; may be a narrowed view.
        window_starts: int32 ``[S]``, physical index of the first window token.
        window: window length ``W`` in tokens, up to 4096.
        scale: of the logits; ``1/sqrt(D)`` by default.
        k_scale: factor on the keys of an fp8 cache: a float, or a tensor of one element, ``[H]`` (``[L]`` for many
            layers), or ``[L, H]``. On the Triton path it is read on the device.
        attention: ``"bidirectional"``; ``"causal"`` restricts query ``i``, then window token ``W - N + i``, to what
            is not after it (an ablation; needs ``N <= W``).
        reduction: ``"mean"`` over queries and group, or ``"rms"``, the root of their mean square. With ``"rms"`` a key
            that few queries need much counts more than one that all need little.
        v_cache: ``[B, P, H, Dv]``, or ``L`` of them. With it each score is multiplied by the Euclidean length of the
            value. In an fp8 cache the stored value counts, without its scale.
        redundancy: ``rho >= 0`` subtracts ``rho * softmax_j(mean_i cos(key_i, key_j))``, after all of the above.
        query_rows: int32 ``[S, N]``, stride 1 along ``N``. ``query`` is then ``[R, H*G, D]``, or ``L`` such tensors, or
            ``[L, R, H*G, D]``; query ``i`` of sequence ``s`` is row ``query_rows[s, i]``, of every layer. So sequences
            share a buffer of queries that is read where it lies. A row may be named more than once.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        float32 ``[S, H, W]`` (``[L, S, H, W]`` for many layers). Rows of plain means sum to 1. A row is the same to
        the bit whatever else is in the batch. Products are taken in the query's dtype and summed in float32;
        float32 on NVIDIA GPUs as three TF32 products. Float32 queries are scaled before the product. Kernels scale
        bfloat16 products: one beyond float32's range, the largest of its row, makes every score of its head NaN.

    Raises:
        TypeError, ValueError: before anything is launched. Contents (block ids, starts, ``query_rows`` in ``0..R-1``)
            are checked on the CPU and with ``KARA_KERNELS_DEBUG=1`` only. A window that runs past its sequence cannot
            be noticed here.
    """
    given = check_score_window(
        query, k_cache, v_cache, block_tables, window_starts, window, query_rows, scale, k_scale,
        attention=attention, reduction=reduction, redundancy=redundancy,
    )  # fmt: skip
    if resolve_backend(backend, given.starts.device) == "torch":
        scores = score_windows(given)
    else:
        scores = _score_by_kernels(given)
    return scores if given.many else scores[0]


def _score_by_kernels(a: ScoreArguments) -> Tensor:
    a.query.require_kernel_layout("query")
    a.cache.require_kernel_layout()
    how = a.scoring
    config, rows = plan_score(
        a.query, a.cache.k, a.window, how.reduction, a.cache.v is not None, how.redundancy, a.query_rows
    )
    shape = len(a.cache.k), len(a.starts), a.cache.shape[2], a.window
    scores = torch.empty(shape, dtype=torch.float32, device=a.starts.device)
    if len(a.starts):
        launch_scores(
            scores, a.query, a.cache, a.block_tables, a.starts, None, None, a.scale, a.k_scale, how.attention, rows,
            config, a.query_rows,
        )  # fmt: skip
    return scores
