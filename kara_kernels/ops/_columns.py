"""Device code of scoring: the column sums of one program's query rows, in three ways that differ in what stays on
chip."""

from ._keys import load_halves, load_keys
from ._queries import load_queries, row_factors
from ._triton import reciprocal, tl, triton


@triton.jit
def columns_whole(out, queries, keys, scale, row_first, row_last,
                  FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """All keys stay on chip. A tile has whole softmax rows, so one pass is enough."""
    # Triton 3.6 takes block shapes only from names, not from fields.
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    SUMS: tl.constexpr = CONFIG.sums
    D0: tl.constexpr = CONFIG.d0
    D1: tl.constexpr = CONFIG.d1
    offs_w = tl.arange(0, BLOCK_W)
    if CONFIG.halves:  # one product: of two in a row, the first takes a layout of its own, and its result is moved
        first_half, second_half = load_halves(keys, offs_w, D0 // 2, FORMAT, FORM)
        k0 = tl.reshape(tl.permute(tl.join(first_half, second_half), (2, 0, 1)), (D0, BLOCK_W))
    else:
        k0 = load_keys(keys, offs_w, tl.arange(0, D0), FORMAT, FORM)
    k1 = k0  # unused if one power of two covers D
    if D1 > 0:
        k1 = load_keys(keys, offs_w, D0 + tl.arange(0, D1), FORMAT, FORM)
    columns = tl.zeros([SUMS, 8, BLOCK_W], tl.float32)
    if CONFIG.ahead:
        q0, q1, factor = _whole_queries(queries, scale, row_first, row_last, FORM, FORMAT, CONFIG)
    for first in range(row_first, row_last, BLOCK_M):
        if not CONFIG.ahead:
            q0, q1, factor = _whole_queries(queries, scale, first, row_last, FORM, FORMAT, CONFIG)
        products = tl.dot(q0, k0, input_precision=FORM.precision)
        if D1 > 0:
            products = tl.dot(q1, k1, products, input_precision=FORM.precision)
        current = factor
        if CONFIG.ahead:
            q0, q1, factor = _whole_queries(queries, scale, first + BLOCK_M, row_last, FORM, FORMAT, CONFIG)
        offs_m = first + tl.arange(0, BLOCK_M)
        columns = _add_rows(
            columns, products, current, scale, offs_m, offs_w, row_last - first, queries.count, FORM, CONFIG
        )
    tl.store(out + offs_w, tl.sum(tl.sum(columns, 0), 0), mask=offs_w < FORM.window)


@triton.jit
def _whole_queries(queries, scale, first, row_last, FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):
    """A tile of queries, in two parts if keys are, and the factors of its rows' products."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    HALF: tl.constexpr = FORM.rotary // 2 if CONFIG.halves else 0
    offs_m = first + tl.arange(0, BLOCK_M)
    before, factor = row_factors(queries, scale, offs_m, row_last, FORM)
    q0 = load_queries(queries, before, offs_m, 0, row_last, CONFIG.d0, HALF, FORMAT.dim, FORM)
    q1 = q0  # unused if one power of two covers D
    if CONFIG.d1 > 0:
        q1 = load_queries(queries, before, offs_m, CONFIG.d0, row_last, CONFIG.d1, 0, FORMAT.dim, FORM)
    return q0, q1, factor


@triton.jit
def columns_sliced(out, queries, keys, scale, row_first, row_last,
                   FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """All logits stay on chip, and keys are streamed in slices of the head dimension. One pass is enough."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    SUMS: tl.constexpr = CONFIG.sums
    offs_w = tl.arange(0, BLOCK_W)
    columns = tl.zeros([SUMS, 8, BLOCK_W], tl.float32)
    for first in range(row_first, row_last, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        before, factor = row_factors(queries, scale, offs_m, row_last, FORM)
        products = _tile_products(queries, keys, before, offs_m, offs_w, row_last, FORM, FORMAT, CONFIG)
        columns = _add_rows(
            columns, products, factor, scale, offs_m, offs_w, row_last - first, queries.count, FORM, CONFIG
        )
    tl.store(out + offs_w, tl.sum(tl.sum(columns, 0), 0), mask=offs_w < FORM.window)


@triton.jit
def _tile_products(queries, keys, factor, offs_m, offs_w, row_last,
                   FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Products of a tile of queries, times ``factor``, and one of keys, summed over slices of the head dimension."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    BLOCK_D: tl.constexpr = CONFIG.d0
    products = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for d in range(0, FORMAT.dim, BLOCK_D):
        q = load_queries(queries, factor, offs_m, d, row_last, BLOCK_D, 0, FORMAT.dim, FORM)
        k = load_keys(keys, offs_w, d + tl.arange(0, BLOCK_D), FORMAT, FORM)
        products = tl.dot(q, k, products, input_precision=FORM.precision)
    return products


@triton.jit
def _tile_logits(queries, keys, scale, offs_m, offs_w, row_last,
                 FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Masked logits of a tile of queries and one of keys."""
    before, factor = row_factors(queries, scale, offs_m, row_last, FORM)
    products = _tile_products(queries, keys, before, offs_m, offs_w, row_last, FORM, FORMAT, CONFIG)
    return _masked(products, factor, offs_m, offs_w, queries.count, FORM)


@triton.jit
def columns_streamed(out, queries, keys, scale, row_first, row_last,
                     FORM: tl.constexpr, FORMAT: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Streams key tiles twice per query tile: first for each row's log-sum-exp, then for the columns."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    for first in range(row_first, row_last, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        # A causal row may see no key of a tile. Starting from the lowest finite value avoids -inf - -inf.
        peak = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for tile in range(0, FORM.window, BLOCK_W):
            offs_w = tile + tl.arange(0, BLOCK_W)
            logits = _tile_logits(queries, keys, scale, offs_m, offs_w, row_last, FORM, FORMAT, CONFIG)
            higher = tl.maximum(peak, tl.max(logits, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
            peak = higher
        weight = tl.where(offs_m < row_last, 1.0 / total, 0.0)
        for tile in range(0, FORM.window, BLOCK_W):
            offs_w = tile + tl.arange(0, BLOCK_W)
            logits = _tile_logits(queries, keys, scale, offs_m, offs_w, row_last, FORM, FORMAT, CONFIG)
            p = tl.exp2(logits - peak[:, None]) * weight[:, None]
            columns = tl.sum(p * p if FORM.squares else p, 0)
            if first > row_first:
                # The program's own partial row is its accumulator. A thread may load what another thread stored.
                tl.debug_barrier()
                columns += tl.load(out + offs_w, mask=offs_w < FORM.window, other=0.0)
                tl.debug_barrier()
            tl.store(out + offs_w, columns, mask=offs_w < FORM.window)


@triton.jit
def _masked(products, factor, offs_m, offs_w, num_queries, FORM: tl.constexpr):
    """Logits in units of log2, -inf for keys that a query may not see."""
    seen = (offs_w < FORM.window)[None, :]
    if FORM.causal:  # query i is window token W - N + i
        seen = seen & (offs_w[None, :] <= (FORM.window - num_queries + offs_m // FORM.group)[:, None])
    return tl.where(seen, products * factor[:, None], float("-inf"))


@triton.jit
def _add_rows(columns, products, factor, scale, offs_m, offs_w, left, num_queries,
             FORM: tl.constexpr, CONFIG: tl.constexpr):  # fmt: skip
    """Adds the softmax of the first ``left`` rows of logits, ``products * factor``, or its squares, to ``columns
    [block_m / fold / 8, 8, W]``.

    These sums stay in registers while a program walks over its query tiles. No thread needs another's rows, if
    ``fold`` is 2 where threads hold pairs of rows eight apart. Reducing each tile across lanes and warps took a third
    of all instructions.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_W: tl.constexpr = CONFIG.block_w
    MASKED: tl.constexpr = FORM.causal or FORM.window < CONFIG.block_w
    if MASKED:  # once: with a mask of the peak and one of the powers, sm_120 spilled
        logits = _masked(products, factor, offs_m, offs_w, num_queries, FORM)
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
    else:
        if FORM.signed and scale < 0:
            peak = tl.min(products, 1) * factor
        else:
            peak = tl.max(products, 1) * factor
        factor = tl.broadcast_to(factor[:, None], products.shape)
        p = tl.exp2(tl.fma(products, factor, tl.broadcast_to(-peak[:, None], products.shape)))
    p = p * tl.where(tl.arange(0, BLOCK_M) < left, reciprocal(tl.sum(p, 1)), 0.0)[:, None]
    if CONFIG.fold == 2:
        first, p = tl.split(tl.permute(tl.reshape(p, (BLOCK_M // 16, 2, 8, BLOCK_W)), (0, 2, 3, 1)))
        columns = tl.fma(first, first, columns) if FORM.squares else columns + first
    else:
        p = tl.reshape(p, columns.shape)
    return tl.fma(p, p, columns) if FORM.squares else columns + p
