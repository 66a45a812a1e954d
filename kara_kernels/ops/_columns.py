"""Device code of scoring: column sums of softmax rows, in the three ways that keys come on chip."""

from ._rows import load_rows
from ._triton import tl, triton


@triton.jit
def _load_queries(queries, scale, offs_m, offs_d, row_last, DIM: tl.constexpr, FORM: tl.constexpr):
    """Query rows ``offs_m`` as ``[rows, dims]``: row ``m`` is query ``m // group``, member ``m % group`` of it.

    With ``scale`` if products are float32: so they stay within its range where the logits do. Keys that are scaled
    instead spilled on sm_120.
    """
    ALIGN: tl.constexpr = FORM.align
    query = offs_m // FORM.group
    if queries.places is not None:
        query = tl.load(queries.places + query, mask=offs_m < row_last, other=0)
    offset = query.to(tl.int64) * queries.stride_query + (offs_m % FORM.group).to(tl.int64) * queries.stride_head
    row = tl.multiple_of(queries.base + offset, ALIGN)
    mask = (offs_m < row_last)[:, None] & (offs_d < DIM)[None, :]
    rows = tl.load(row[:, None] + offs_d[None, :], mask=mask, other=0.0).to(FORM.dtype)
    return rows * scale if FORM.scale_first else rows


@triton.jit
def _masked(logits, offs_m, offs_w, scale, num_queries, FORM: tl.constexpr):
    """Logits in units of log2, -inf where a query may not look."""
    seen = (offs_w < FORM.window)[None, :]
    if FORM.causal:  # query i is window token W - N + i
        seen = seen & (offs_w[None, :] <= (FORM.window - num_queries + offs_m // FORM.group)[:, None])
    return tl.where(seen, logits if FORM.scale_first else logits * scale, float("-inf"))


@triton.jit
def columns_whole(out, queries, keys, scale, row_first, row_last,
                  FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """All keys stay on chip, so a softmax row is whole in one tile: one pass."""
    W: tl.constexpr = FORM.window
    D: tl.constexpr = FORMAT.dim
    DTYPE: tl.constexpr = FORM.dtype
    PRECISION: tl.constexpr = FORM.precision
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    D0: tl.constexpr = CONFIG.d0
    D1: tl.constexpr = CONFIG.d1
    offs_w = tl.arange(0, BLOCK_W)
    d0 = tl.arange(0, D0)
    k0 = load_rows(keys, offs_w, d0, W, FORMAT, DTYPE)
    k1 = k0  # unused where one power of two is all of D
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k1 = load_rows(keys, offs_w, d1, W, FORMAT, DTYPE)
    columns = tl.zeros([BLOCK_W], tl.float32)
    for first in range(row_first, row_last, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        q0 = _load_queries(queries, scale, offs_m, d0, row_last, D, FORM)
        logits = tl.dot(q0, k0, input_precision=PRECISION)
        if D1 > 0:
            q1 = _load_queries(queries, scale, offs_m, d1, row_last, D, FORM)
            logits = tl.dot(q1, k1, logits, input_precision=PRECISION)
        logits = _masked(logits, offs_m, offs_w, scale, queries.count, FORM)
        columns += _column_sums(logits, offs_m, row_last, FORM)
    tl.store(out + offs_w, columns, mask=offs_w < W)


@triton.jit
def _column_sums(logits, offs_m, row_last, FORM: tl.constexpr):
    """Of the softmax of whole rows."""
    p = tl.exp2(logits - tl.max(logits, 1)[:, None])
    p = p * tl.where(offs_m < row_last, 1.0 / tl.sum(p, 1), 0.0)[:, None]
    return tl.sum(p * p if FORM.squares else p, 0)


@triton.jit
def columns_sliced(out, queries, keys, scale, row_first, row_last,
                   FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """The logits of all keys stay on chip, the keys pass in slices of the head dimension: one pass too."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    offs_w = tl.arange(0, BLOCK_W)
    columns = tl.zeros([BLOCK_W], tl.float32)
    for first in range(row_first, row_last, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        logits = _tile_logits(queries, keys, scale, offs_m, offs_w, row_last, FORM, FORMAT, CONFIG)
        columns += _column_sums(logits, offs_m, row_last, FORM)
    tl.store(out + offs_w, columns, mask=offs_w < FORM.window)


@triton.jit
def _tile_logits(queries, keys, scale, offs_m, offs_w, row_last,
                 FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """One tile of masked logits, as a matrix product over slices of the head dimension."""
    D: tl.constexpr = FORMAT.dim
    PRECISION: tl.constexpr = FORM.precision
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    BLOCK_D: tl.constexpr = CONFIG.d0
    logits = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        q = _load_queries(queries, scale, offs_m, offs_d, row_last, D, FORM)
        k = load_rows(keys, offs_w, offs_d, FORM.window, FORMAT, FORM.dtype)
        logits = tl.dot(q, k, logits, input_precision=PRECISION)
    return _masked(logits, offs_m, offs_w, scale, queries.count, FORM)


@triton.jit
def columns_streamed(out, queries, keys, scale, row_first, row_last,
                     FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Key tiles pass twice per query tile: for each row's log-sum-exp, then for the columns."""
    W: tl.constexpr = FORM.window
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    for first in range(row_first, row_last, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        # A causal row may see nothing of a tile: a finite start, the lowest, keeps -inf - -inf out of the recurrence.
        peak = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for tile in range(0, W, BLOCK_W):
            offs_w = tile + tl.arange(0, BLOCK_W)
            logits = _tile_logits(queries, keys, scale, offs_m, offs_w, row_last, FORM, FORMAT, CONFIG)
            higher = tl.maximum(peak, tl.max(logits, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
            peak = higher
        weight = tl.where(offs_m < row_last, 1.0 / total, 0.0)
        for tile in range(0, W, BLOCK_W):
            offs_w = tile + tl.arange(0, BLOCK_W)
            logits = _tile_logits(queries, keys, scale, offs_m, offs_w, row_last, FORM, FORMAT, CONFIG)
            p = tl.exp2(logits - peak[:, None]) * weight[:, None]
            columns = tl.sum(p * p if FORM.squares else p, 0)
            if first > row_first:
                # The program's own partial row is its accumulator. Another thread of it stored what this one loads.
                tl.debug_barrier()
                columns += tl.load(out + offs_w, mask=offs_w < W, other=0.0)
                tl.debug_barrier()
            tl.store(out + offs_w, columns, mask=offs_w < W)
