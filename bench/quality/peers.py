"""Scorers of other methods, each a few lines of plain PyTorch written from its paper, independent of the library.

Each takes a :class:`Window` and returns scores ``[L, H, W]``. The highest are kept. Lists shared by heads or layers are
expanded. The methods were designed for whole caches. Here each scores a window and sees its tail, which stands for the
recent tokens that most of them keep anyway. A query sees what it saw in the model: everything up to itself.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .replay import Window

SNAP_QUERIES, SNAP_POOL = 32, 7
RKV_QUERIES, RKV_POOL, RKV_LAMBDA, RKV_SIMILAR = 8, 7, 0.1, 0.5
CHUNK = 10


def attention(window: Window, layer: int, queries: int) -> Tensor:
    """Attention from the last ``queries`` queries to the window's keys in the model, ``[H, G, queries, W]``."""
    query = window.query[layer, -queries:].permute(1, 2, 0, 3)
    queries = query.shape[2]
    logits = query @ window.keys[layer].transpose(1, 2)[:, None] * window.scale
    total = logits.shape[-1]
    later = (
        torch.arange(total, device=logits.device) > torch.arange(total - queries, total, device=logits.device)[:, None]
    )
    return logits.masked_fill(later, -math.inf).softmax(-1)[..., window.span]


def _by_layer(window: Window, score: object) -> Tensor:
    return torch.stack([score(layer) for layer in range(len(window.query))])  # type: ignore[operator]


def _generator(window: Window) -> torch.Generator:
    return torch.Generator().manual_seed(window.seed)


def nothing_known(window: Window) -> Tensor:
    """The same score for every key."""
    return torch.zeros(window.window_keys.shape[:3], device=window.keys.device)


def random_per_head(window: Window) -> Tensor:
    """Random selection with one list per layer and KV head, the null baseline (arXiv 2609.03430)."""
    return torch.rand(window.window_keys.shape[:3], generator=_generator(window)).to(window.keys.device)


def random_shared(window: Window) -> Tensor:
    """Random selection with one list for the whole model."""
    row = torch.rand(window.length, generator=_generator(window)).to(window.keys.device)
    return row.expand(window.window_keys.shape[:3])


def streaming_llm(window: Window) -> Tensor:
    """The newest tokens (arXiv 2309.17453). Its sinks, the very first tokens, are in the protected prompt."""
    row = torch.arange(window.length, dtype=torch.float32, device=window.keys.device)
    return row.expand(window.window_keys.shape[:3])


def snapkv(window: Window) -> Tensor:
    """Attention of the last 32 queries, max-pooled over 7 tokens, per KV head (arXiv 2404.14469)."""

    def layer(i: int) -> Tensor:
        return _max_pool(attention(window, i, SNAP_QUERIES).mean((1, 2)), SNAP_POOL)

    return _by_layer(window, layer)


def h2o(window: Window) -> Tensor:
    """All attention received so far (arXiv 2306.14048), summed over the queries of a KV head."""
    return _by_layer(window, lambda i: attention(window, i, window.query.shape[1]).sum((1, 2)))


def tova(window: Window) -> Tensor:
    """Attention of the newest query, averaged over all heads of a layer (arXiv 2401.06104)."""

    def layer(i: int) -> Tensor:
        return attention(window, i, 1).mean((0, 1, 2)).expand(window.keys.shape[1], -1)

    return _by_layer(window, layer)


def knorm(window: Window) -> Tensor:
    """Prefers keys of small norm (arXiv 2406.11430)."""
    return -window.window_keys.norm(dim=-1)


def keydiff(window: Window) -> Tensor:
    """Prefers keys that differ from the mean of the normalised keys (arXiv 2504.15364)."""
    keys = window.window_keys
    return -F.cosine_similarity(keys, F.normalize(keys, dim=-1).mean(-2, keepdim=True), dim=-1)


def rkv(window: Window) -> Tensor:
    """0.1 x attention of the last 8 queries - 0.9 x softmax of redundancy (arXiv 2505.24133).

    Attention: maximum logits over the group, softmax over the candidates, mean over the queries, max-pooled over 7.
    Redundancy: mean cosine to the other keys. Of the keys similar to a key (above 0.5), the newest is not counted.
    """

    def layer(i: int) -> Tensor:
        query = window.query[i, -RKV_QUERIES:].permute(1, 2, 0, 3)
        logits = (query @ window.window_keys[i].transpose(1, 2)[:, None] * window.scale).amax(1)
        important = _max_pool(logits.softmax(-1).mean(1), RKV_POOL)
        keys = F.normalize(window.keys[i, :, window.start :], dim=-1)
        similar = keys @ keys.transpose(1, 2)
        similar.diagonal(dim1=1, dim2=2).zero_()
        place = torch.arange(similar.shape[-1], device=similar.device)
        newest = torch.where(similar > RKV_SIMILAR, place, 0).amax(-1, keepdim=True)
        redundant = similar.scatter(-1, newest, 0.0).mean(-2).softmax(-1)[:, : window.length]
        return RKV_LAMBDA * important - (1 - RKV_LAMBDA) * redundant

    return _by_layer(window, layer)


def chunkkv(window: Window) -> Tensor:
    """Fixed chunks of 10 tokens by mean attention of the last 32 queries, one list per layer (arXiv 2502.00299)."""

    def layer(i: int) -> Tensor:
        score = attention(window, i, SNAP_QUERIES).mean((0, 1, 2))
        chunk = torch.arange(window.length, device=score.device) // CHUNK
        sums = torch.zeros(int(chunk[-1]) + 1, device=score.device).index_add_(0, chunk, score)
        return (sums / torch.bincount(chunk))[chunk].expand(window.keys.shape[1], -1)

    return _by_layer(window, layer)


def compactor(window: Window) -> Tensor:
    """Column sums of unmasked attention between the window's own queries and keys, times the value's norm, averaged
    over 3 neighbours (arXiv 2507.08143). The published method closest to Kara."""

    def layer(i: int) -> Tensor:
        query = window.query[i, : window.length].permute(1, 2, 0, 3)
        mass = (query @ window.window_keys[i].transpose(1, 2)[:, None] * window.scale).softmax(-1).sum(2).mean(1)
        score = mass * window.window_values[i].norm(dim=-1)
        return F.avg_pool1d(score[:, None], 3, 1, 1, count_include_pad=False)[:, 0]

    return _by_layer(window, layer)


def _max_pool(rows: Tensor, width: int) -> Tensor:
    return F.max_pool1d(rows[:, None], width, 1, width // 2)[:, 0]
