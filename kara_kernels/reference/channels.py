"""Which channels of K matter to the queries. See Channels in ``docs/method.md``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import FP8_DTYPES, SCORED_DTYPES, check_tensor, check_unit_stride, contents_are_checked, refuse, slices
from ..paged import Layers, PagedCache, per_layer
from ..payload_arguments import Caches
from ..values import check_count
from .select import best_positions

ROWS = 4096  # rows squared at a time


@dataclass(frozen=True)
class ChannelArguments:
    """Checked arguments of ``rank_channels``."""

    query: Layers  # [1, N, H*G, D]
    cache: PagedCache
    block_table: Tensor
    tokens: int
    keep: int
    many: bool


def check_channels(query: Any, k_cache: Any, block_table: object, tokens: int, keep: int) -> ChannelArguments:
    """Checks the arguments of ``rank_channels``."""
    _, cache, many = per_layer(None, k_cache, None)
    blocks, page, heads, dim = cache.shape
    device = cache.k[0].device
    if cache.k[0].dtype not in SCORED_DTYPES + FP8_DTYPES:
        raise TypeError(f"k_cache: expected float16, bfloat16, float32 or float8, got {cache.k[0].dtype}")
    queries = [query] if not many and isinstance(query, Tensor) else query
    if not isinstance(queries, (list, tuple, Tensor)) or len(queries) != len(cache.k):
        raise ValueError(f"query: expected one tensor [N, H*G, D] per layer of k_cache, got {type(query).__name__}")
    for layer, rows in enumerate(queries):
        name = f"query[{layer}]" if many else "query"
        checked = check_tensor(name, rows, (None, None, dim), SCORED_DTYPES, device)
        check_unit_stride(name, checked)
        if not checked.shape[0] or checked.shape[1] < heads or checked.shape[1] % heads:
            raise ValueError(
                f"{name}: expected [N, H*G, {dim}], N from 1 on, of {heads} KV heads, got {list(checked.shape)}"
            )
    table = check_tensor("block_table", block_table, (None,), (torch.int32,), device)
    check_unit_stride("block_table", table, "")
    check_count("tokens", tokens, 1, len(table) * page)
    check_count("keep", keep, 1, dim)
    if contents_are_checked(device):
        used = table[: -(-tokens // page)]
        refuse((used < 0) | (used >= blocks), "block_table", f"a block id in 0..{blocks - 1}", used)
    return ChannelArguments(Layers("query", [q[None] for q in queries]), cache, table, tokens, keep, many)


def rank_channels(query: Caches, k_cache: Caches, block_table: Tensor, tokens: int, keep: int) -> Tensor:
    """The channels of K to keep. See :func:`kara_kernels.ops.rank_channels`."""
    a = check_channels(query, k_cache, block_table, tokens, keep)
    kept = best_positions(channel_scores(a), keep)
    return kept if a.many else kept[0]


@torch.no_grad()
def channel_scores(a: ChannelArguments) -> Tensor:
    """float32 ``[L, H, D]``: the mean square of queries times that of keys."""
    _, page, heads, _ = a.cache.shape
    token = torch.arange(a.tokens, device=a.block_table.device)
    blocks, places = a.block_table[token // page].long(), token % page
    scores = []
    for query, keys in zip(a.query, a.cache.k, strict=True):
        asked = query[0].float().square().unflatten(1, (heads, -1)).mean((0, 2))
        held = torch.zeros_like(asked)
        for some in slices(a.tokens, ROWS):
            held += keys[blocks[some], places[some]].float().square().sum(0)
        scores.append(asked * (held / a.tokens))
    return torch.stack(scores)
