"""Attention mass that every key of a window receives from all window queries (README, "score")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..paged import (
    FP8_DTYPES,
    check_block_tables,
    check_contents,
    check_lengths,
    check_query,
    check_scoring,
    check_window,
    contents_are_checked,
    key_scales,
    per_layer,
    slices,
)

# Logits are made a slice of rows at a time, which bounds the memory for any window: 1 MB of them stays in a core's
# cache (a 256-token window of 9 heads took 37 ms instead of 42 over 30 layers). Keys are made float32 some heads at a
# time.
SLICE_BYTES = 1 << 20
KEY_BYTES = 32 << 20


@torch.no_grad()
def score_window(
    query: Tensor | Sequence[Tensor],
    k_cache: Tensor | Sequence[Tensor],
    block_tables: Tensor,
    window_starts: Tensor,
    window: int,
    *,
    scale: float | None = None,
    k_scale: float | Tensor | None = None,
    attention: str = "bidirectional",
    redundancy: float = 0.0,
) -> Tensor:
    """Scores of the ``W = window`` tokens from ``window_starts`` on; see :func:`kara_kernels.ops.score_window`.

    ``query`` ``[S, N, H*G, D]``, ``k_cache`` ``[B, P, H, D]`` -> float32 ``[S, H, W]``; sequences of ``L`` of both,
    or tensors with a leading ``L``, -> ``[L, S, H, W]``. Computed in float32.
    """
    queries, cache, many = per_layer(query, k_cache, None)
    check_window(window)
    table = check_block_tables(block_tables, cache.k[0].device)
    starts = check_lengths("window_starts", window_starts, table.shape[0], table.device)
    queries = check_query(queries, cache, table.shape[0])
    check_scoring(queries[0].shape[1], window, scale, attention, redundancy)
    scales = key_scales(k_scale, len(cache.k), cache.shape[2], table.device)
    if contents_are_checked(table.device):
        everywhere = torch.ones_like(starts, dtype=torch.bool)
        check_contents(cache, table, starts, starts.long() + window, everywhere, written=False)
    scores = torch.empty(len(cache.k), table.shape[0], cache.shape[2], window, dtype=torch.float32, device=table.device)
    for s, start in enumerate(starts.tolist()):
        for layer, keys in enumerate(cache.k):
            scores[layer, s] = score_sequence(
                queries[layer][s], keys, table[s], start, window,
                scale=scale, k_scale=scales if isinstance(scales, float) else scales[layer],
                attention=attention, redundancy=redundancy,
            )  # fmt: skip
    return scores if many else scores[0]


def score_sequence(
    query: Tensor,
    k_cache: Tensor,
    blocks: Tensor,
    start: int,
    window: int,
    *,
    scale: float | None,
    k_scale: float | Tensor,
    attention: str,
    redundancy: float,
) -> Tensor:
    """One layer of one sequence, unchecked: ``query [N, H*G, D]``, ``blocks [max_blocks]`` -> float32 ``[H, W]``."""
    heads, dim = k_cache.shape[2:]
    scale = dim**-0.5 if scale is None else scale
    rows = start + torch.arange(window, device=k_cache.device)
    where = blocks[rows // k_cache.shape[1]].long(), rows % k_cache.shape[1]
    scores = torch.empty(heads, window, device=k_cache.device)
    for some in slices(heads, max(1, KEY_BYTES // (4 * window * dim))):
        keys = _gather_keys(k_cache[:, :, some], *where)  # [h, W, D]
        factor = scale * (k_scale[some, None, None].float() if isinstance(k_scale, Tensor) else k_scale)
        scores[some] = _column_means(query.unflatten(1, (heads, -1))[:, some], keys, factor, attention)
        if redundancy:
            scores[some] -= redundancy * _mean_cosines(keys).softmax(-1)
    return scores


def _gather_keys(k_cache: Tensor, blocks: Tensor, rows: Tensor) -> Tensor:
    """float32 ``[h, W, D]``. fp8 travels as bytes: indexing is not defined for every float8 type."""
    if k_cache.dtype in FP8_DTYPES:
        return k_cache.view(torch.uint8)[blocks, rows].view(k_cache.dtype).float().transpose(0, 1)
    return k_cache[blocks, rows].float().transpose(0, 1)


def _column_means(query: Tensor, keys: Tensor, factor: float | Tensor, attention: str) -> Tensor:
    """``query [N, h, G, D]``, ``keys [h, W, D]`` -> ``[h, W]``: the mean over queries and group of softmax rows."""
    count, heads, group, dim = query.shape
    window = keys.shape[1]
    keys_t = (keys * factor).transpose(1, 2)
    total = torch.zeros(heads, window, device=keys.device)
    for some in slices(count, max(1, SLICE_BYTES // (4 * heads * group * window))):
        rows = query[some].float().permute(1, 0, 2, 3).reshape(heads, -1, dim)
        logits = torch.bmm(rows, keys_t)  # [h, n*G, W]
        if attention == "causal":  # query i is window token W - N + i and sees itself and what is before it
            token = torch.arange(some.start, some.stop, device=keys.device) + window - count
            hidden = torch.arange(window, device=keys.device) > token.repeat_interleave(group)[:, None]
            logits.masked_fill_(hidden, -torch.inf)
        total += logits.softmax(-1).sum(1)
    return total / (count * group)


def _mean_cosines(keys: Tensor) -> Tensor:
    """``keys [h, W, D]`` -> ``[h, W]``: mean cosine of each key to all keys of the window; a zero key has cosine 0.

    ``mean_i cos(k_i, k_j) = <k_j/|k_j|, mean_i k_i/|k_i|>``: O(W D) instead of the O(W^2 D) matrix (after R-KV,
    arXiv 2505.24133).
    """
    largest = keys.abs().amax(-1, keepdim=True)
    unit = keys / torch.where(largest > 0, largest, 1.0)  # squares of tiny and huge keys would leave float32
    norm = unit.square().sum(-1, keepdim=True).sqrt()
    unit = unit / torch.where(norm > 0, norm, 1.0)
    return (unit * unit.mean(1, keepdim=True)).sum(-1)
