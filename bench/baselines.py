"""Baselines to time against: one compression of a paged cache as users write it today, in plain PyTorch.

Written from published descriptions, independently of the library, as a careful user would: layer by layer, all
sequences of a batch at once, with one host read of the lengths per compression and none per layer. Runs on any device.

Every baseline takes the same arguments: ``queries`` one ``[S, N, H*G, D]`` per layer, ``k_pools`` and ``v_pools`` one
``[B, P, H, D]`` (contiguous) per layer, ``block_tables`` int32 ``[S, max_blocks]``, ``window_starts`` and ``seq_lens``
int32 ``[S]`` in tokens (every window fits), ``window`` and ``keep`` in tokens. It changes the pools in place and
returns the new lengths, int32 ``[S]``.

A scorer takes one layer's ``query [S, N, H*G, D]`` and ``keys [S, H, W, D]`` and returns ``[S, H, W]``. The highest
scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SNAP_QUERIES, POOL = 32, 7
RKV_QUERIES, RKV_LAMBDA = 8, 0.1

Scorer = Callable[[Tensor, Tensor], Tensor]


def gather_keys(k_pool: Tensor, block_tables: Tensor, window_starts: Tensor, window: int) -> Tensor:
    """The windows' keys of one layer, ``[S, H, W, D]``, read through the block tables."""
    page = k_pool.shape[1]
    token = window_starts[:, None] + torch.arange(window, device=k_pool.device)
    block = block_tables.gather(1, token // page)
    return k_pool[block, token % page].transpose(1, 2)


# ---- scorers -----------------------------------------------------------------------------------------------


def attention_logits(query: Tensor, keys: Tensor) -> Tensor:
    """Scaled logits ``[S, H, G, N, W]`` without a mask: every query sees every key of the window."""
    query = query.unflatten(2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)  # [S, H, G, N, D]
    flat = query.flatten(2, 3) * keys.shape[-1] ** -0.5
    return (flat @ keys.transpose(-1, -2)).unflatten(2, query.shape[2:4])


def mean_attention(query: Tensor, keys: Tensor) -> Tensor:
    """The predecessor's code with Kara's score: softmax over the window, mean over group and all queries."""
    return attention_logits(query, keys).softmax(-1).mean((2, 3))


def rkv(query: Tensor, keys: Tensor) -> Tensor:
    """R-KV (arXiv 2505.24133): 0.1 x attention - 0.9 x softmax of the mean cosine to the other keys.

    Attention of the last 8 queries: maximum logits over the group, softmax, mean, max-pooled over 7 tokens. The full
    cosine matrix ``[S, H, W, W]`` is computed, as published. Zeroing the newest similar key in each column is left out,
    which favours the baseline.
    """
    attention = attention_logits(query[:, -RKV_QUERIES:], keys).amax(2).softmax(-1).mean(2)
    unit = F.normalize(keys, dim=-1)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    return RKV_LAMBDA * _max_pool(attention) - (1 - RKV_LAMBDA) * cosine.mean(-2).softmax(-1)


def snapkv(query: Tensor, keys: Tensor) -> Tensor:
    """SnapKV (arXiv 2404.14469): mean attention of the last 32 queries, max-pooled over 7 tokens."""
    return _max_pool(attention_logits(query[:, -SNAP_QUERIES:], keys).softmax(-1).mean((2, 3)))


def _max_pool(scores: Tensor) -> Tensor:
    return F.max_pool1d(scores, POOL, stride=1, padding=POOL // 2)


# ---- selection and compaction ------------------------------------------------------------------------------


def select(scores: Tensor, keep: int) -> Tensor:
    """Window-relative positions of the best scores, int64 ``[S, H, K]``, ascending."""
    return scores.topk(keep, dim=-1, sorted=False).indices.sort(-1).values


def tail_rows(
    block_tables: Tensor, window_starts: Tensor, seq_lens: Tensor, page: int, window: int, keep: int
) -> tuple[Tensor, Tensor]:
    """Source and target rows of all tails in a flat pool, int64 ``[T]`` each. The same for all layers."""
    sequence, source = [], []
    for s, (start, length) in enumerate(zip(window_starts.tolist(), seq_lens.tolist(), strict=True)):
        token = torch.arange(start + window, length, device=block_tables.device)
        source.append(token)
        sequence.append(torch.full_like(token, s))
    token, owner = torch.cat(source), torch.cat(sequence)
    return _rows(block_tables, owner, token, page), _rows(block_tables, owner, token - (window - keep), page)


def compact(
    pool: Tensor, block_tables: Tensor, window_starts: Tensor, keep_indices: Tensor, tail: tuple[Tensor, Tensor]
) -> None:
    """Moves survivors ``keep_indices [S, H, K]`` and ``tail`` of one pool up in place, by gather and index_copy_."""
    sequences, heads, keep = keep_indices.shape
    owner = torch.arange(sequences, device=pool.device)
    source = _rows(
        block_tables, owner[:, None, None], window_starts[:, None, None] + keep_indices, pool.shape[1]
    )  # [S, H, K]
    target = _rows(
        block_tables, owner[:, None], window_starts[:, None] + torch.arange(keep, device=pool.device), pool.shape[1]
    )  # [S, K]
    flat = pool.view(-1, *pool.shape[2:])
    survivors = flat[source.transpose(1, 2), torch.arange(heads, device=pool.device)]  # [S, K, H, D]
    rest = flat[tail[0]]  # read before anything is written; the copy makes the move safe
    flat.index_copy_(0, target.flatten(), survivors.flatten(0, 1))
    flat.index_copy_(0, tail[1], rest)


def _rows(block_tables: Tensor, sequence: Tensor, token: Tensor, page: int) -> Tensor:
    return block_tables[sequence, token // page].long() * page + token % page


# ---- one event ---------------------------------------------------------------------------------------------


@torch.no_grad()
def compress(
    scorer: Scorer,
    queries: Sequence[Tensor],
    k_pools: Sequence[Tensor],
    v_pools: Sequence[Tensor],
    block_tables: Tensor,
    window_starts: Tensor,
    seq_lens: Tensor,
    window: int,
    keep: int,
) -> Tensor:
    """Scores, selects and compacts every layer in turn. The module docstring describes the arguments."""
    tail = tail_rows(block_tables, window_starts, seq_lens, k_pools[0].shape[1], window, keep)
    for query, k_pool, v_pool in zip(queries, k_pools, v_pools, strict=True):
        keys = gather_keys(k_pool, block_tables, window_starts, window)
        kept = select(scorer(query, keys), keep)
        for pool in (k_pool, v_pool):
            compact(pool, block_tables, window_starts, kept, tail)
    return seq_lens - (window - keep)


@torch.no_grad()
def score(
    scorer: Scorer,
    queries: Sequence[Tensor],
    k_pools: Sequence[Tensor],
    block_tables: Tensor,
    window_starts: Tensor,
    window: int,
) -> Tensor:
    """Only the scoring of :func:`compress`: ``[L, S, H, W]``."""
    return torch.stack([
        scorer(query, gather_keys(k_pool, block_tables, window_starts, window))
        for query, k_pool in zip(queries, k_pools, strict=True)
    ])  # fmt: skip
