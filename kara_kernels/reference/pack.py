"""Queries in four bits, in plain PyTorch; see :class:`kara_kernels.PackedQueries`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import LARGEST_CODE, PackedQueries


@torch.no_grad()
def pack_rows(query: Tensor) -> PackedQueries:
    """``query [..., D]`` of a floating point dtype, ``D`` even, unchecked."""
    x = query.float()
    scales = (x.abs().amax(-1) / LARGEST_CODE).to(torch.bfloat16)
    divisor = torch.where(scales > 0, scales.float(), 1.0)[..., None]
    codes = (x / divisor).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8).view(torch.uint8) & 15
    return PackedQueries(codes[..., 0::2] | codes[..., 1::2] << 4, scales)


def write_rows(out: PackedQueries, tokens: Tensor, rows: Tensor | None) -> None:
    """``tokens [T, H*G, D]`` packed into rows of ``out``, unchecked."""
    packed, places = pack_rows(tokens), slice(len(tokens)) if rows is None else rows
    into = out.by_token()
    into.codes[places], into.scales[places] = packed


def unpacked(packed: PackedQueries) -> Tensor:
    """float32 ``[..., D]``."""
    nibbles = torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten(-2).to(torch.int8)
    return ((nibbles ^ 8) - 8).float() * packed.scales.float()[..., None]
