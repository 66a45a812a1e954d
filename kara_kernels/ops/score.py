"""Attention mass that every key of a window receives from all window queries, in one pass if the window fits on chip.

    a[s,h,g,i,j] = scale * <query[s,i,h*G+g], key[s,h,j]>
    p[s,h,g,i,:] = softmax_j(a[s,h,g,i,:])
    scores[s,h,j] = mean over g and i of p[s,h,g,i,j], or the root of the mean of its square

One program owns some of the ``N*G`` query rows of one (layer, sequence, KV head). With all ``W`` keys on chip, softmax
rows are local to a tile. The program walks over its query tiles and sums columns, and the ``N x W`` logits never leave
registers. It writes one partial row. The next kernel sums the partial rows in a fixed order, without atomics and with
the same bits every time. If heads are too wide to keep on chip, keys are streamed once per query tile in slices of the
head dimension. Wider windows stream key tiles twice, first for each row's log-sum-exp and then for the columns.

Method: bidirectional attention scores of Kara (arXiv 2607.01237), redundancy after R-KV (arXiv 2505.24133), and value
norms as in Compactor (arXiv 2507.08143). Root mean squares are this library's choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..arguments import ScoreArguments, check_score_window
from ..packed import Queries
from ..paged import row_alignment
from ..reference.score import score_windows
from ._columns import columns_sliced, columns_streamed, columns_whole
from ._keys import KeyRows, pairs_of
from ._norms import mean_cosines, value_norms
from ._queries import QueryRows, query_arguments
from ._rows import FP8_NAMES, PagedRows, pool_arguments
from ._tiles import ScoreConfig, matrix_dtype, score_config
from ._triton import INTERPRETED, Launch, architecture, kernel, launch, layer_pointer, resolve_backend, tl, window_of
from .pool import PartialRows, launch_pool

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

PARTIAL_BYTES = 256 << 20
"""Most bytes of partial rows on a GPU. Layers are scored in groups that fit, and at least one at a time."""


# ------------------------------------------------------------------------------------------------- device code


@dataclass(frozen=True)
class ScoreForm:
    """Compile-time constants about queries and options. ``ScoreConfig`` has the tile sizes."""

    heads: int  # KV heads
    group: int
    window: int
    align: int  # bytes that divide every query row's address
    align_partials: int  # ... partial row's
    causal: bool
    squares: bool
    value_norm: int  # partial rows that hold value norms
    redundancy: int  # ... the softmax of mean cosines
    dtype: Any  # Triton's, of the products
    precision: str
    scale_first: bool  # True: queries are scaled before the product. False: the product is scaled
    signed: bool  # True: the scale of the product may be negative
    query_fp8: str | None  # fp8 type of the queries
    rotary: int  # dimensions of a key that look_ahead turns
    interleaved: bool  # how they pair
    leads: bool  # the kernel after it may be launched while it runs

    @property
    def run(self) -> int:
        """Dimensions in a row whose partners lie in a row, too, up to 16."""
        half = self.rotary // 2
        return min(16, half & -half)


@kernel
def score_kernel(
    partials_ptr, q_ptr, q_table, q_scales_ptr, q_scales_table, query_rows_ptr, k_ptr, k_table, v_ptr, v_table,
    block_tables_ptr, starts_ptr, seq_lens_ptr, protected_ptr, scale, k_scale_ptr, cos_ptr, sin_ptr, num_queries,
    num_tiles, first_layer,
    stride_q_l: tl.int64, stride_q_s: tl.int64, stride_q_n: tl.int64, stride_q_h: tl.int64, stride_qr_s: tl.int64,
    stride_qs_l: tl.int64, stride_qs_s: tl.int64, stride_qs_n: tl.int64, stride_qs_h: tl.int64,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    stride_v_l: tl.int64, stride_v_b: tl.int64, stride_v_p: tl.int64, stride_v_h: tl.int64,
    stride_t_s: tl.int64, stride_ks_l: tl.int64, stride_ks_h: tl.int64,
    FORM: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Grid ``(S*H, tiles, L)``: writes partial rows ``[L, S, H, tiles, W]``. They are column sums (of squares with
    ``FORM.squares``), then a row of value norms with ``FORM.value_norm``, and last a row of redundancy's softmax with
    ``FORM.redundancy``. ``L`` counts from ``first_layer`` of the pools.

    Copy plan at W = 256, D = 128, 16 bits, 256 threads: keys once, 64 KB, 256 bytes a thread, and stay on chip. Query
    tiles of 64 rows, 16 KB, 64 bytes a thread, 16 at a time, one tile ahead of the products. Packed ones take 4 KB. A
    partial row, 1 KB, is written once per 512 query rows. Where keys stream (`columns_streamed`, `columns_sliced`), a
    stage is 64 dimensions of 64 keys or of the whole window.

    A sequence whose window does not fit is skipped, and its partial rows are never read.
    """
    if FORM.leads:
        tl.extra.cuda.gdc_launch_dependents()
    ALIGN: tl.constexpr = FORM.align_partials
    BLOCK_R: tl.constexpr = 16  # tokens per step of cosines
    NORM_ROWS: tl.constexpr = 16 if V.block > 256 else min(CONFIG.norm_rows, 16384 // V.block)
    seq = (tl.program_id(0) // FORM.heads).to(tl.int64)
    head = (tl.program_id(0) % FORM.heads).to(tl.int64)
    tile = tl.program_id(1)
    layer = first_layer + tl.program_id(2).to(tl.int64)
    start, fits = window_of(seq, starts_ptr, seq_lens_ptr, protected_ptr, FORM.window)
    if fits:
        table = block_tables_ptr + seq * stride_t_s
        k_base = layer_pointer(k_ptr, k_table, stride_k_l, layer) + head * stride_k_h
        keys = KeyRows(k_base, table, start, stride_k_b, stride_k_p, cos_ptr, sin_ptr)
        row = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_tiles + tile
        out = tl.multiple_of(partials_ptr + row * FORM.window, ALIGN)
        if FORM.redundancy and tile == num_tiles - 1:
            mean_cosines(out, keys, FORM.window, K, K.block, BLOCK_R)
        elif FORM.value_norm and tile == num_tiles - 1 - FORM.redundancy:
            v_base = layer_pointer(v_ptr, v_table, stride_v_l, layer) + head * stride_v_h
            values = PagedRows(v_base, table, start, stride_v_b, stride_v_p)
            value_norms(out, values, FORM.window, V, V.block, NORM_ROWS)
        else:
            q_base = layer_pointer(q_ptr, q_table, stride_q_l, layer) + seq * stride_q_s
            scales, places = q_scales_ptr, query_rows_ptr
            if q_scales_ptr is not None:
                scales = layer_pointer(q_scales_ptr, q_scales_table, stride_qs_l, layer) + seq * stride_qs_s
                scales += head * FORM.group * stride_qs_h
            if query_rows_ptr is not None:
                places += seq * stride_qr_s
            queries = QueryRows(
                q_base + head * FORM.group * stride_q_h, stride_q_n, stride_q_h, scales, stride_qs_n, stride_qs_h,
                places, num_queries,
            )  # fmt: skip
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


def plan_score(a: ScoreArguments) -> tuple[ScoreConfig, PartialRows]:
    """The launch configuration, and the partial rows that it writes per KV head."""
    assert a.query is not None
    q, k, how = a.query[0], a.cache.k[0], a.scoring
    dim = k.shape[3]
    packed = a.query.scales is not None
    pairs = pairs_of(a.look_ahead, dim)
    config = score_config(a.window, dim, matrix_dtype(q, k), architecture(k.device), pairs, packed)
    rows = _count(a) * (q.shape[2] // k.shape[2])
    tiles = -(-rows // config.rows) + a.value_norm + (how.redundancy > 0)  # triton.cdiv takes 10 us here
    return config, PartialRows(tiles, 1 / rows, how.reduction == "rms", a.value_norm, how.redundancy)


def _count(a: ScoreArguments) -> int:
    """``N``, the number of queries per sequence."""
    assert a.query is not None
    return a.query[0].shape[1] if a.query_rows is None else a.query_rows.shape[1]


def launch_score(
    partials: Tensor, a: ScoreArguments, config: ScoreConfig, rows: PartialRows, first_layer: int = 0,
    leads: bool = False,
) -> Launch:  # fmt: skip
    """Writes the partial rows of all sequences in ``L`` layers of the pools from ``first_layer`` on into ``partials``.

    ``partials`` is ``[L, S, H, tiles, W]``. ``leads``: the kernel after it may overlap with it. Checks nothing.
    """
    assert a.query is not None
    layers, sequences, heads, tiles, window = partials.shape
    values = a.cache.v if rows.value_norm and a.cache.v is not None else a.cache.k  # keys are a placeholder
    q, device = a.query[0], partials.device
    dtype = matrix_dtype(q, a.cache.k[0])
    cos, sin, interleaved = a.look_ahead or (None, None, False)
    by_head, scale = (a.k_scale, a.scale) if isinstance(a.k_scale, Tensor) else (None, a.scale * a.k_scale)
    scale_first = dtype == torch.float32
    form = ScoreForm(
        heads, q.shape[2] // heads, window, a.query.alignment, row_alignment(partials),
        a.scoring.attention == "causal", rows.squares, int(rows.value_norm), int(rows.redundancy > 0),
        # The interpreter's bfloat16 arithmetic is wrong, so it takes products in float32.
        tl.float32 if INTERPRETED else TRITON_DTYPES[dtype], architecture(device).float32_products,
        scale_first, not scale_first and a.query.scales is None and (by_head is not None or scale < 0),
        FP8_NAMES.get(q.dtype), 0 if cos is None else 2 * len(cos), interleaved, leads,
    )  # fmt: skip
    # Allow only explicit fused multiply-adds. If a lane holds one term of a sum across lanes, the compiler produces
    # `shfl y, x*x; fma x, x, y`. The lane then rounds its partner's product but not its own, the partner does the
    # opposite, and the two store different last bits of one sum to the same address. This affected sums of narrow or
    # misaligned rows on all targets, and all columns on sm_100, where each lane holds one query row.
    return launch(
        score_kernel, (sequences * heads, tiles, layers), device,
        partials_ptr=partials, **query_arguments(a.query, a.query_rows),
        block_tables_ptr=a.block_tables, starts_ptr=a.window_starts, seq_lens_ptr=a.seq_lens,
        protected_ptr=a.protected_lens, scale=scale,
        k_scale_ptr=by_head, cos_ptr=cos, sin_ptr=sin, num_queries=_count(a), num_tiles=tiles, first_layer=first_layer,
        stride_t_s=a.block_tables.stride(0), stride_ks_l=0 if by_head is None else by_head.stride(0),
        stride_ks_h=0 if by_head is None else by_head.stride(1),
        **pool_arguments("k", a.cache.k), **pool_arguments("v", values),
        FORM=form, CONFIG=config, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def layers_at_once(sequences: int, heads: int, window: int, rows: PartialRows) -> int:
    """The number of layers whose partial rows may exist at once, at least one."""
    return max(1, PARTIAL_BYTES // (4 * sequences * heads * rows.tiles * window))


def launch_scores(scores: Tensor, a: ScoreArguments, config: ScoreConfig, rows: PartialRows) -> None:
    """Writes the scores of all heads to ``scores [L, S, H, W]``, some layers at a time to bound the partial rows.

    Zero for a sequence whose window does not fit. Checks nothing.
    """
    layers, sequences, heads, window = scores.shape
    at_once = min(layers, layers_at_once(sequences, heads, window, rows))
    partials = scores.new_empty(at_once, sequences, heads, rows.tiles, window)
    for first in range(0, layers, at_once):
        some = partials[: layers - first]
        launch_score(some, a, config, rows, first)
        launch_pool(scores[first : first + at_once], some, a, rows)


# ------------------------------------------------------------------------------------------------------ public


def score_window(
    query: Queries,
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
    look_ahead: LookAhead | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention mass that every key of each window receives from all queries, without the causal mask.

    Args:
        query: ``[S, N, H*G, D]`` float16, bfloat16, float32 or float8, post-RoPE, in any order (a ring buffer needs no
            rotation). They may include queries of tokens after the window. Or ``L`` such tensors, or one ``[L, S,
            N, H*G, D]``. Or the same as :class:`~kara_kernels.PackedQueries`.
        k_cache: ``[B, P, H, D]`` of those dtypes or float8, any strides (the last 1 on the Triton path); or ``L`` of
            them.
        block_tables: int32 ``[S, max_blocks]``; may be a narrowed view.
        window_starts: int32 ``[S]``, physical index of the first window token.
        window: window length ``W`` in tokens, up to 4096.
        scale: of the logits; ``1/sqrt(D)`` by default.
        k_scale: factor on the keys of an fp8 cache: a float, or a tensor of one element, ``[H]`` (``[L]`` for many
            layers), or ``[L, H]``. On the Triton path it is read on the device.
        attention: ``"bidirectional"`` or ``"causal"``. With ``"causal"``, query ``i`` is window token ``W - N + i`` and
            sees no later token (an ablation; needs ``N <= W``).
        reduction: ``"mean"`` over queries and group, or ``"rms"``, the root of their mean square. With ``"rms"`` a key
            that few queries need a lot scores higher than one that all queries need a little.
        v_cache: ``[B, P, H, Dv]``, or ``L`` of them. With it each score is multiplied by the Euclidean norm of the
            value. In an fp8 cache this is the stored value, without its scale.
        redundancy: ``rho >= 0`` subtracts ``rho * softmax_j(mean_i cos(key_i, key_j))``, after all of the above.
        query_rows: int32 ``[S, N]``, stride 1 along ``N``. ``query`` is then ``[R, H*G, D]``, or ``L`` such tensors, or
            ``[L, R, H*G, D]``. Query ``i`` of sequence ``s`` is row ``query_rows[s, i]`` in every layer. Sequences can
            thus share a query buffer that is read in place. A row may be named more than once.
        look_ahead: rotates queries ahead of their own positions, see :class:`~kara_kernels.LookAhead`. Keys are rotated
            back while they are loaded, in float32, and rounded to the dtype of the products.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        float32 ``[S, H, W]`` (``[L, S, H, W]`` for many layers). Rows of plain means sum to 1. A row has the same
        bits whatever else is in the batch. Products are taken in the query's dtype and summed in float32; float32 on
        NVIDIA GPUs takes three TF32 products. Float32 queries are scaled before the product. Kernels scale bfloat16
        products afterwards: if the largest of a row exceeds float32's range, every score of its head is NaN.

    Raises:
        TypeError, ValueError: before anything is launched. Contents (block ids, starts, ``query_rows`` in ``0..R-1``)
            are checked on the CPU and with ``KARA_KERNELS_DEBUG=1`` only. A window that exceeds its sequence cannot be
            detected here.
    """
    given = check_score_window(
        query, k_cache, v_cache, block_tables, window_starts, window, query_rows, scale, k_scale, look_ahead,
        attention=attention, reduction=reduction, redundancy=redundancy,
    )  # fmt: skip
    by_torch = resolve_backend(backend, given.block_tables.device) == "torch"
    scores = score_windows(given) if by_torch else _score_by_kernels(given)
    return scores if given.many else scores[0]


def _score_by_kernels(a: ScoreArguments) -> Tensor:
    a.require_kernel_layout()
    shape = len(a.cache.k), a.block_tables.shape[0], a.cache.shape[2], a.window
    scores = torch.empty(shape, dtype=torch.float32, device=a.block_tables.device)
    if scores.numel():
        launch_scores(scores, a, *plan_score(a))
    return scores
