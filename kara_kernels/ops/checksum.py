"""CRC-32 of ranges of bytes where they lie, so that a packet is verified on the GPU that reads its rows.

A CRC is the remainder of a polynomial over GF(2), so it is linear: the parts of a range are divided side by side, each
remainder is multiplied by the power of x that stands for the bytes behind its part, and all are added, which is XOR. A
lane takes every ``LANES``-th word of a tile, so that loads are contiguous. Tiles are counted from a range's end, where
what lies behind them is a whole number of tiles; the first one is filled up with zeros, which change nothing.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..reference.checksum import crc32_of_ranges as _reference
from ..values import check_count
from ._triton import kernel, launch, resolve_backend, tl, triton

POLYNOMIAL = 0xEDB88320
"""zlib's. Bit 31 is the coefficient of x^0."""


def times(a: int, b: int) -> int:
    """The product of two remainders."""
    product = 0
    for bit in range(31, -1, -1):
        product ^= b * (a >> bit & 1)
        b = b >> 1 ^ POLYNOMIAL * (b & 1)
    return product


@functools.lru_cache(4096)
def power(exponent: int) -> int:
    """x to the power of ``exponent``."""
    if exponent == 0:
        return 1 << 31
    root = power(exponent // 2)
    square = times(root, root)
    return square >> 1 ^ POLYNOMIAL * (square & 1) if exponent % 2 else square


# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def _times(a, b, POLY: tl.constexpr):
    """The products of remainders, uint32. What depends on a constant ``b`` alone is computed by the compiler."""
    product = a & 0
    for i in tl.static_range(32):
        product ^= b * ((a >> (31 - i)) & 1)
        b = (b >> 1) ^ (b & 1) * POLY
    return product


@kernel
def checksum_kernel(
    out_ptr, words_ptr, ranges_ptr, tiles, X32: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
    POLY: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr, LANE_BITS: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles, ranges)``: each tile's share of its range's remainder, to ``out uint32 [ranges, tiles]``.

    ``ranges int64 [ranges, 2]``: first word and end. ``X32``, ``STEP`` and ``TILE``: x to the power of a word's bits,
    those of ``LANES`` words and those of a tile, ``WORDS * LANES`` words.
    """
    tile, which = tl.program_id(0), tl.program_id(1)
    first = tl.load(ranges_ptr + 2 * which)
    lane = tl.arange(0, LANES)
    at = tl.load(ranges_ptr + 2 * which + 1) - (tile + 1).to(tl.int64) * (WORDS * LANES)
    rest = tl.zeros([LANES], tl.uint32)
    step = tl.full([], STEP, tl.uint32)
    for word in range(WORDS):
        offs = at + word * LANES + lane
        rest = _times(rest, step, POLY) ^ tl.load(words_ptr + offs, mask=offs >= first, other=0).to(tl.uint32)
    behind = LANES - lane  # words from the lane's last to the tile's end, itself included
    up = tl.full([], X32, tl.uint32)
    for i in tl.static_range(LANE_BITS):
        rest = tl.where((behind >> i) & 1 != 0, _times(rest, up, POLY), rest)
        up = _times(up, up, POLY)
    share = tl.xor_sum(rest, 0)
    up = tl.full([], TILE, tl.uint32)
    left = tile
    while left > 0:
        share = tl.where(left & 1 != 0, _times(share, up, POLY), share)
        up = _times(up, up, POLY)
        left = left >> 1
    tl.store(out_ptr + which.to(tl.int64) * tiles + tile, share.to(tl.int32, bitcast=True))


# --------------------------------------------------------------------------------------------- how it is launched

LANES, WORDS, WARPS = 1024, 64, 8  # a tile of 256 KiB


def launch_checksum(shares: Tensor, words: Tensor, ranges: Tensor) -> None:
    """Writes ``shares``, int32 ``[ranges, tiles]``, of ``words``, int32 ``[n]``. Checks nothing."""
    count, tiles = shares.shape
    launch(
        checksum_kernel, (tiles, count, 1), words.device, out_ptr=shares, words_ptr=words, ranges_ptr=ranges,
        tiles=tiles, X32=power(32), STEP=power(32 * LANES), TILE=power(32 * LANES * WORDS), POLY=POLYNOMIAL,
        WORDS=WORDS, LANES=LANES, LANE_BITS=LANES.bit_length(), num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ public


def crc32_of_ranges(
    data: Tensor, ranges: Sequence[tuple[int, int]], start: int = 0, *, backend: str = "auto"
) -> list[int]:
    """``zlib.crc32(data[first:end], start)`` of each range, computed where ``data`` is. A GPU is waited for.

    Args:
        data: uint8 ``[n]``, contiguous, at an address that 4 divides.
        ranges: first byte and end of each, multiples of 4.
        start: a checksum to go on from, as zlib's.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Raises:
        TypeError, ValueError: naming argument, expected and got.
    """
    if not isinstance(data, Tensor) or data.dtype != torch.uint8:
        raise TypeError(f"data: expected a uint8 tensor, got {getattr(data, 'dtype', type(data).__name__)}")
    if data.dim() != 1 or data.stride(0) != 1 or data.data_ptr() % 4:
        raise ValueError(f"data: expected contiguous bytes at an address that 4 divides, got strides {data.stride()}")
    check_count("start", start, 0, 2**32 - 1)
    for first, end in ranges:
        if not 0 <= first <= end <= len(data) or first % 4 or end % 4:
            raise ValueError(f"ranges: expected multiples of 4 within {len(data)} bytes, got {first}..{end}")
    if resolve_backend(backend, data.device) == "torch":
        return _reference(data, ranges, start)
    longest = max((end - first for first, end in ranges), default=0)
    tiles = max(1, triton.cdiv(longest, 4 * LANES * WORDS))
    shares = torch.empty(len(ranges), tiles, dtype=torch.int32, device=data.device)
    if ranges:
        words = torch.tensor(ranges, dtype=torch.int64) // 4
        launch_checksum(shares, data[: len(data) // 4 * 4].view(torch.int32), words.to(data.device))
    rests = np.bitwise_xor.reduce(shares.cpu().numpy().view(np.uint32), axis=1)
    before = start ^ 0xFFFFFFFF
    return [
        times(before, power(8 * (end - first))) ^ int(rest) ^ 0xFFFFFFFF
        for (first, end), rest in zip(ranges, rests, strict=True)
    ]
