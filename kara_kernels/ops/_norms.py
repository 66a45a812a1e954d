"""Device code of scoring: value norms, and the similarity of each key to the others in its window."""

from ._rows import load_blocks, load_rows, load_rows_of
from ._triton import tl, triton


@triton.jit
def mean_cosines(out, rows, W: tl.constexpr, FORMAT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Write softmax_j of the mean cosine of key j to all keys. Reads the keys three times and keeps only a mean."""
    offs_d = tl.arange(0, BLOCK_D)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, W, BLOCK_R):
        offs_w = first + tl.arange(0, BLOCK_R)
        keys = load_rows(rows, offs_w, offs_d, W, FORMAT, tl.float32)
        mean += tl.sum(_unit(keys), 1)
    mean = mean / W
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in range(0, W, BLOCK_R):
        offs_w = first + tl.arange(0, BLOCK_R)
        keys = load_rows(rows, offs_w, offs_d, W, FORMAT, tl.float32)
        cosine = tl.where(offs_w < W, tl.sum(_unit(keys) * mean[:, None], 0), float("-inf"))
        higher = tl.maximum(peak, tl.max(cosine, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(cosine - higher), 0)
        peak = higher
    for first in range(0, W, BLOCK_R):
        offs_w = first + tl.arange(0, BLOCK_R)
        keys = load_rows(rows, offs_w, offs_d, W, FORMAT, tl.float32)
        cosine = tl.sum(_unit(keys) * mean[:, None], 0)
        tl.store(out + offs_w, tl.exp(cosine - peak) / total, mask=offs_w < W)


@triton.jit
def _unit(keys):
    """Columns of ``[dims, tokens]`` at norm 1. Zero columns stay zero. Safe if squares would leave float32's range."""
    largest = tl.max(tl.abs(keys), 0)
    keys = keys / tl.where(largest > 0, largest, 1.0)[None, :]
    norm = tl.sqrt(tl.sum(keys * keys, 0))
    return keys / tl.where(norm > 0, norm, 1.0)[None, :]


@triton.jit
def value_norms(out, rows, W: tl.constexpr, FORMAT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Write the Euclidean norm of every value of the window.

    The next rows' block ids come while rows are summed. With ids loaded where they are used, 128 rows spilled on sm_120
    (Triton 3.6) and gfx950.
    """
    offs_d = tl.arange(0, BLOCK_D)
    block = load_blocks(rows, tl.arange(0, BLOCK_R), W, FORMAT)
    for first in range(0, W, BLOCK_R):
        offs_w = first + tl.arange(0, BLOCK_R)
        following = load_blocks(rows, offs_w + BLOCK_R, W, FORMAT)
        values = load_rows_of(rows, block, offs_w, offs_d, W, FORMAT, tl.float32)
        block = following
        largest = tl.max(tl.abs(values), 0)
        unit = values / tl.where(largest > 0, largest, 1.0)[None, :]
        tl.store(out + offs_w, largest * tl.sqrt_rn(tl.sum(unit * unit, 0)), mask=offs_w < W)
