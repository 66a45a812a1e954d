"""Tile sizes of scoring, as a function of shape, dtype and target."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import FP8_DTYPES
from ._triton import Architecture, triton


@dataclass(frozen=True)
class ScoreConfig:
    whole: bool  # True: a tile has all keys of the window, one pass. False: keys are streamed in tiles, two passes
    sliced: bool  # True: products are summed over slices of the head dimension. False: whole keys stay on chip
    block_m: int  # query rows of a tile
    block_w: int  # keys of a tile
    d0: int  # sliced: a slice of the head dimension. Otherwise all of it, as one power of two ...
    d1: int  # ... and a second one for the rest (0: none), because padding 192 to 256 would cost a third more work
    halves: bool  # True: d0 are two halves of a head, which look_ahead pairs, each padded to a power of two
    ahead: bool  # whole: the next tile's queries are loaded before the softmax of a tile
    fold: int  # rows of a tile that a thread sums: see Architecture
    rows: int  # query rows of a program
    num_warps: int
    num_stages: int
    norm_rows: int = 16  # values at once. Where keys stream, more would take more registers than the scores

    @property
    def sums(self) -> int:
        """Rows of column sums, in eights."""
        return self.block_m // self.fold // 8


@functools.lru_cache(maxsize=256)
def score_config(
    window: int, dim: int, dtype: torch.dtype, target: Architecture, pairs: str = "", packed: bool = False
) -> ScoreConfig:
    """Launch configuration from shape and target alone. A choice that depended on the batch would change last bits.

    ``dtype`` is the input type of the matrix products. ``pairs`` are those that ``look_ahead`` turns: ``"halves"``
    are loaded once, others with a second load of every key, which takes twice the registers. ``packed``:
    queries are unpacked in registers.
    """
    rows = 512  # keys are read and a partial row is written once per 512 query rows: under 2 % of the bytes at W = 256
    block_w = max(16, triton.next_power_of_2(window))
    d0 = max(16, 1 << (dim.bit_length() - 1))
    d1 = max(16, triton.next_power_of_2(dim - d0)) if dim > d0 else 0
    halves = pairs == "halves"
    if halves:
        d0, d1 = 2 * max(16, triton.next_power_of_2(dim // 2)), 0
    # 64 accumulators per thread at 8 warps. 128 reached 255 registers, and spilled with a second query tile.
    # Two products per tile (d1) need more registers: 32 rows still spilled on sm_90 and sm_100.
    block_m = min(64, max(16, 16384 // block_w))
    if halves:  # they need fewer registers than unequal parts, but 64 rows of D = 192 spilled with Triton 3.6
        block_m = min(block_m, 64 if d0 + d1 <= 128 else 32)
    elif d1:  # 16 rows of W = 128, D = 192 left sm_120's assembler at 64 registers, where it spilled; 32 did not
        block_m = 32 if block_w <= 128 and not target.amd else 16
    if block_w == 256:
        block_m = min(block_m, target.rows_of_256)
    if packed and dim > 64:
        block_m = min(block_m, target.packed_rows)

    def fits(block_m: int) -> bool:
        needed = (block_w + target.query_tiles * block_m) * (d0 + d1) * dtype.itemsize
        return needed + (0 if target.amd else 16384) <= target.shared_memory

    # float32 runs as three TF32 products. Their fragments leave registers only for a slice of 32 dimensions.
    turnable = not pairs or halves or block_w * (d0 + d1) <= 16384
    if dtype != torch.float32 and block_w <= 1024 and turnable:
        if (d1 or halves) and not fits(block_m):
            block_m = 16
        if d0 == 256 and block_w == 256 and (target.amd or not fits(block_m)):
            block_m = 32  # W = 256 on sm_90 and sm_100; 64 spilled on gfx950
        if fits(block_m):
            # For D >= 256, 4 warps filled only a sixteenth of a multiprocessor, and spilled at D = 576.
            num_warps = 4 if block_w <= 128 and d0 + d1 <= 128 else 8
            by_warps = target.by_warps(block_m)
            # If Triton sees four bits behind an operand of mma.sync, it permutes both operands for them. Version 3.9
            # does not see through a loop, and a tile takes a third to half fewer instructions.
            ahead, fold = packed and by_warps, 2 if by_warps else target.fold
            norms = target.norm_rows
            return ScoreConfig(True, False, block_m, block_w, d0, d1, halves, ahead, fold, rows, num_warps, 2, norms)
    stages = 2 if target.amd else 3
    slice_ = 32 if dtype == torch.float32 else target.slice_dims
    while dim % slice_ and slice_ > 16:
        slice_ //= 2
    # Heads too wide to keep on chip. One pass takes half the products and exponentials of two. There are 64
    # accumulators per thread, as above.
    if dtype != torch.float32 and block_w <= 256 and not pairs:
        return ScoreConfig(True, True, 64, block_w, slice_, 0, False, False, target.fold, rows, 8, stages)
    # With 64 keys two programs fit a multiprocessor. 128 spilled on sm_100.
    block_m = 64 if dtype == torch.float32 else 128
    return ScoreConfig(False, True, block_m, min(64, block_w), slice_, 0, False, False, target.fold, rows, 8, stages)


def matrix_dtype(query: Tensor, keys: Tensor) -> torch.dtype:
    """The dtype of products: the query's, which represents any fp8 key exactly, or float32 if dtypes are mixed. Packed
    and fp8 queries take the keys' dtype, and fp8 keys are exact in bfloat16."""
    if query.dtype == torch.uint8 or query.dtype in FP8_DTYPES:
        return torch.bfloat16 if keys.dtype in FP8_DTYPES else keys.dtype
    mixed = keys.dtype != query.dtype and keys.dtype not in FP8_DTYPES
    return torch.float32 if mixed else query.dtype
