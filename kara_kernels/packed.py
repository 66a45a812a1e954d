"""Queries in four bits, which scoring reads in place of 16-bit queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import SCORED_DTYPES, check_tensor, check_unit_stride, contents_are_checked, refuse


class PackedQueries(NamedTuple):
    """Queries ``[..., H*G, D]`` as signed 4-bit codes with a scale per token and head: element = code * scale.

    :func:`kara_kernels.ops.pack_queries` makes them. They take ``4 + 16/D`` bits per element, about a quarter of 16-bit
    queries. :func:`kara_kernels.compress_window` and :func:`kara_kernels.ops.score_window` take them as ``query``.
    """

    codes: Tensor
    """uint8 ``[..., H*G, D/2]``: byte ``j`` has element ``2j`` in its low half and ``2j + 1`` in its high half, as
    two's complement in ``-7..7``."""
    scales: Tensor
    """bfloat16 ``[..., H*G]``: the largest magnitude of each token and head divided by 7, rounded to five significant
    bits, so that every product of code and scale is exact in bfloat16."""

    @staticmethod
    def empty(*shape: int, device: torch.device | str | None = None) -> PackedQueries:
        """Room for queries of ``shape [..., H*G, D]``; its contents are undefined."""
        codes = torch.empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device)
        return PackedQueries(codes, torch.empty(shape[:-1], dtype=torch.bfloat16, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def layer(self, index: int) -> PackedQueries:
        """Views ``[..., H*G, D/2]`` and ``[..., H*G]`` of one index of the first dimension."""
        return PackedQueries(self.codes[index], self.scales[index])

    def by_token(self) -> PackedQueries:
        """Views ``[T, H*G, D/2]`` and ``[T, H*G]`` with all leading dimensions as one."""
        return PackedQueries(self.codes.view(-1, *self.codes.shape[-2:]), self.scales.view(-1, self.scales.shape[-1]))


Queries = Tensor | Sequence[Tensor] | PackedQueries | Sequence[PackedQueries]
"""The queries that score a window: one tensor or one per layer, packed or not."""


def check_pack(query: Tensor, out: PackedQueries | None, rows: Tensor | None) -> tuple[Tensor, PackedQueries]:
    """Checks the arguments of ``pack_queries``. Returns the query as ``[T, H*G, D]``, and ``out`` or new memory."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a tensor, got {type(query).__name__}")
    if query.dim() < 2 or query.shape[-1] % 2 or not query.shape[-1]:
        raise ValueError(f"query: expected [..., H*G, D] with an even D, got shape {list(query.shape)}")
    check_tensor("query", query, (None,) * query.dim(), SCORED_DTYPES, query.device)
    try:
        tokens = query.view(-1, *query.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"query: expected tokens at one stride, got shape {list(query.shape)} with strides {query.stride()}"
        ) from None
    if out is None:
        if rows is not None:
            raise ValueError("rows: expected None without out, got a tensor")
        return tokens, PackedQueries.empty(*query.shape, device=query.device)
    if not isinstance(out, PackedQueries):
        raise TypeError(f"out: expected PackedQueries, got {type(out).__name__}")
    count, (heads, dim) = tokens.shape[0], query.shape[-2:]
    check_tensor("out.codes", out.codes, (None, heads, dim // 2), (torch.uint8,), query.device)
    check_unit_stride("out.codes", out.codes)
    room = out.codes.shape[0]
    check_tensor("out.scales", out.scales, (room, heads), (torch.bfloat16,), query.device)
    if rows is None:
        if room < count:
            raise ValueError(f"out: expected room for {count} tokens, got {room}")
        return tokens, out
    check_tensor("rows", rows, (count,), (torch.int64,), query.device)
    check_unit_stride("rows", rows, "")
    if contents_are_checked(query.device):
        refuse((rows < 0) | (rows >= room), "rows", f"a row of out in 0..{room - 1}", rows)
    return tokens, out
