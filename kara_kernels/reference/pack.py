"""Queries in four bits, in plain PyTorch; see :class:`kara_kernels.PackedQueries`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import PackedQueries, check_pack


def pack_queries(query: Tensor, *, out: PackedQueries | None = None, rows: Tensor | None = None) -> PackedQueries:
    """``query [..., H*G, D]`` as 4-bit codes with scales; see :func:`kara_kernels.ops.pack_queries`."""
    tokens, packed = check_pack(query, out, rows)
    write_rows(packed, tokens, rows)
    return packed


@torch.no_grad()
def pack_rows(query: Tensor) -> PackedQueries:
    """``query [..., D]`` of a floating point dtype, ``D`` even, unchecked."""
    x = query.float()
    scales = _to_five_bits(x.abs().amax(-1) / 7)
    divisor = torch.where(scales > 0, scales, 1.0)[..., None]
    # A scale is at most a thirty-second too low, so that the largest quotient is 7.22 and rounds to 7.
    codes = (x / divisor).round().to(torch.int8).view(torch.uint8) & 15
    return PackedQueries(codes[..., 0::2] | codes[..., 1::2] << 4, scales.to(torch.bfloat16))


def _to_five_bits(x: Tensor) -> Tensor:
    """Positive float32 values rounded to five significant bits, half to even; what is not a normal number is 0."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x3FFFF + ((bits >> 19) & 1)) & -0x80000
    return torch.where(rounded < 0x800000, 0, rounded).view(torch.float32)


def write_rows(out: PackedQueries, tokens: Tensor, rows: Tensor | None) -> None:
    """``tokens [T, H*G, D]`` packed into rows of ``out``, unchecked."""
    packed, places = pack_rows(tokens), slice(len(tokens)) if rows is None else rows
    into = out.by_token()
    into.codes[places], into.scales[places] = packed


def unpacked(packed: PackedQueries) -> Tensor:
    """float32 ``[..., D]``."""
    nibbles = torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten(-2).to(torch.int8)
    return ((nibbles ^ 8) - 8).float() * packed.scales.float()[..., None]
