"""What a query ring should hold, and what it holds, as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from kara_kernels import PackedQueries
from kara_kernels.engine import Policy, QueryRing
from kara_kernels.reference import pack_queries
from kara_kernels.reference.pack import unpacked


def as_recorded(query: Tensor, policy: Policy, kv_heads: int) -> Tensor:
    """Queries ``[T, H*G, D]`` as a ring with this policy should keep them."""
    if policy.query_heads == "mean":
        query = query.unflatten(1, (kv_heads, -1)).mean(2)
    if policy.query_dtype == "int4":
        return unpacked(pack_queries(query))
    return query.clamp(-448, 448).to(torch.float8_e4m3fn).float() if policy.query_dtype == "fp8" else query


def held(ring: QueryRing, layer: int, rows: Tensor) -> Tensor:
    """Rows of a layer of a ring."""
    if isinstance(ring.queries, PackedQueries):
        return unpacked(PackedQueries(*(part[layer, rows] for part in ring.queries)))
    return ring.queries[layer].float()[rows]
