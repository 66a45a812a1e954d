"""Device code of scoring: softmax rows of a tile, and sums of their columns that stay in registers."""

from ._triton import reciprocal, tl, triton


@triton.jit
def seen_keys(offs_m, offs_w, num_queries, FORM: tl.constexpr):
    """Whether a query row may see a key."""
    seen = (offs_w < FORM.window)[None, :]
    if FORM.causal:  # query i is window token W - N + i
        seen = seen & (offs_w[None, :] <= (FORM.window - num_queries + offs_m // FORM.group)[:, None])
    return seen


@triton.jit
def add_rows(columns, products, factor, scale, offs_m, offs_w, left, num_queries,
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
    seen = seen_keys(offs_m, offs_w, num_queries, FORM)
    if FORM.signed and scale < 0:
        peak = tl.min(tl.where(seen, products, float("inf")) if MASKED else products, 1) * factor
    else:
        peak = tl.max(tl.where(seen, products, float("-inf")) if MASKED else products, 1) * factor
    factor = tl.broadcast_to(factor[:, None], products.shape)
    p = tl.exp2(tl.fma(products, factor, tl.broadcast_to(-peak[:, None], products.shape)))
    if MASKED:
        p = tl.where(seen, p, 0.0)
    p = p * tl.where(tl.arange(0, BLOCK_M) < left, reciprocal(tl.sum(p, 1)), 0.0)[:, None]
    if CONFIG.fold == 2:
        first, p = tl.split(tl.permute(tl.reshape(p, (BLOCK_M // 16, 2, 8, BLOCK_W)), (0, 2, 3, 1)))
        columns = tl.fma(first, first, columns) if FORM.squares else columns + first
    else:
        p = tl.reshape(p, columns.shape)
    return tl.fma(p, p, columns) if FORM.squares else columns + p
