"""Attention mass that every key of a window receives from all window queries. See Score in ``docs/method.md``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..arguments import ScoreArguments, check_score_window
from ..checks import FP8_DTYPES, slices
from ..packed import PackedQueries, Queries
from .pack import unpacked

# Slices bound the memory for any window. 1 MB of logits fits in a core's cache, so a 256-token window of 9 heads took
# 37 ms instead of 42 over 30 layers. Keys are converted to float32 some heads at a time.
SLICE_BYTES = 1 << 20
KEY_BYTES = 32 << 20


def score_window(
    query: Queries, k_cache: Tensor | Sequence[Tensor], block_tables: Tensor, window_starts: Tensor,
    window: int, *, scale: float | None = None, k_scale: float | Tensor | None = None,
    attention: str = "bidirectional", reduction: str = "mean", v_cache: Tensor | Sequence[Tensor] | None = None,
    redundancy: float = 0.0, query_rows: Tensor | None = None, look_ahead: LookAhead | None = None,
) -> Tensor:  # fmt: skip
    """Scores of the ``W = window`` tokens from ``window_starts`` on. See :func:`kara_kernels.ops.score_window`.

    ``query`` ``[S, N, H*G, D]`` and ``k_cache`` ``[B, P, H, D]`` give float32 ``[S, H, W]``. Sequences of ``L`` of
    both, or tensors with a leading ``L``, give ``[L, S, H, W]``. With ``query_rows`` ``[S, N]``, ``query`` is
    ``[R, H*G, D]``. All arithmetic is in float32.
    """
    arguments = check_score_window(
        query, k_cache, v_cache, block_tables, window_starts, window, query_rows, scale, k_scale, look_ahead,
        attention=attention, reduction=reduction, redundancy=redundancy,
    )  # fmt: skip
    scores = score_windows(arguments)
    return scores if arguments.many else scores[0]


@torch.no_grad()
def score_windows(a: ScoreArguments) -> Tensor:
    """float32 ``[L, S, H, W]`` for checked arguments with ``window_starts``."""
    assert a.window_starts is not None
    shape = len(a.cache.k), len(a.window_starts), a.cache.shape[2], a.window
    scores = a.window_starts.new_empty(shape, dtype=torch.float32)
    for s, start in enumerate(a.window_starts.tolist()):
        scores[:, s] = score_sequence(a, s, start)
    return scores


def score_sequence(a: ScoreArguments, s: int, start: int) -> Tensor:
    """float32 ``[L, H, W]`` of sequence ``s``, whose window starts at ``start``. Checks nothing."""
    return torch.stack([_score_layer(a, layer, s, start) for layer in range(len(a.cache.k))])


def _score_layer(a: ScoreArguments, layer: int, s: int, start: int) -> Tensor:
    assert a.query is not None
    k_cache, how = a.cache.k[layer], a.scoring
    heads, dim = k_cache.shape[2:]
    query = _rows(a.query[layer], s, a.query_rows)
    if a.query.scales is not None:
        query = unpacked(PackedQueries(query, _rows(a.query.scales[layer], s, a.query_rows)[..., 0]))
    rows = start + torch.arange(a.window, device=k_cache.device)
    where = a.block_tables[s, rows // k_cache.shape[1]].long(), rows % k_cache.shape[1]
    scores = torch.empty(heads, a.window, device=k_cache.device)
    for some in slices(heads, max(1, KEY_BYTES // (4 * a.window * dim))):
        keys = _gather(k_cache[:, :, some], *where)  # [h, W, D]
        k_scale = a.k_scale[layer, some, None, None].float() if isinstance(a.k_scale, Tensor) else a.k_scale
        judges = query.unflatten(1, (heads, -1))[:, some]
        turned = keys if a.look_ahead is None else _turned_back(keys, a.look_ahead)
        scores[some] = _column_means(judges, turned, a.scale * k_scale, how.attention, how.reduction)
        if a.value_norm:
            assert a.cache.v is not None
            scores[some] *= _norms(_gather(a.cache.v[layer][:, :, some], *where))
        if how.redundancy:
            scores[some] -= how.redundancy * _mean_cosines(keys).softmax(-1)
    return scores


def _rows(query: Tensor, s: int, query_rows: Tensor | None) -> Tensor:
    """``[N, H*G, D]`` of sequence ``s``."""
    if query_rows is None:
        return query[s]
    if query.dtype in FP8_DTYPES:  # indexing is not implemented for every float8 type
        return query[0].view(torch.uint8).index_select(0, query_rows[s]).view(query.dtype)
    return query[0].index_select(0, query_rows[s])


def _gather(cache: Tensor, blocks: Tensor, rows: Tensor) -> Tensor:
    """float32 ``[h, W, D]``. fp8 is gathered as bytes, as above."""
    if cache.dtype in FP8_DTYPES:
        return cache.view(torch.uint8)[blocks, rows].view(cache.dtype).float().transpose(0, 1)
    return cache[blocks, rows].float().transpose(0, 1)


def _turned_back(keys: Tensor, ahead: LookAhead) -> Tensor:
    """``keys [h, W, D]`` rotated back by the angles of ``ahead``. The products equal those of queries rotated ahead."""
    cos, sin, interleaved = ahead
    rotary = 2 * len(cos)
    if interleaved:
        x, y = keys[..., 0:rotary:2], keys[..., 1:rotary:2]
        turned = torch.stack((x * cos + y * sin, y * cos - x * sin), -1).flatten(-2)
    else:
        x, y = keys[..., :rotary].chunk(2, -1)
        turned = torch.cat((x * cos + y * sin, y * cos - x * sin), -1)
    return torch.cat((turned, keys[..., rotary:]), -1)


def _column_means(query: Tensor, keys: Tensor, factor: float | Tensor, attention: str, reduction: str) -> Tensor:
    """``query [N, h, G, D]``, ``keys [h, W, D]`` -> ``[h, W]``: mean or root mean square of the softmax rows over
    queries and group."""
    count, heads, group = query.shape[:3]
    window = keys.shape[1]
    keys_t = (keys * factor).transpose(1, 2)
    total = torch.zeros(heads, window, device=keys.device)
    for some in slices(count, max(1, SLICE_BYTES // (4 * heads * group * window))):
        # Always a copy: products of other strides or addresses may round otherwise.
        rows = query[some].float().permute(1, 0, 2, 3).clone(memory_format=torch.contiguous_format)
        logits = torch.bmm(rows.flatten(1, 2), keys_t)  # [h, n*G, W]
        if attention == "causal":  # query i is window token W - N + i and sees no later token
            token = torch.arange(some.start, some.stop, device=keys.device) + window - count
            hidden = torch.arange(window, device=keys.device) > token.repeat_interleave(group)[:, None]
            logits.masked_fill_(hidden, -torch.inf)
        mass = logits.softmax(-1)
        total += (mass.square_() if reduction == "rms" else mass).sum(1)
    mean = total / (count * group)
    return mean.sqrt_() if reduction == "rms" else mean


def _norms(values: Tensor) -> Tensor:
    """``[h, W, Dv]`` -> ``[h, W]``: Euclidean norms."""
    largest = values.abs().amax(-1)
    unit = values / torch.where(largest > 0, largest, 1.0)[..., None]  # tiny or huge squares would leave float32
    return largest * unit.square().sum(-1).sqrt()


def _mean_cosines(keys: Tensor) -> Tensor:
    """``keys [h, W, D]`` -> ``[h, W]``: mean cosine of each key to all keys of the window. A zero key has cosine 0.

    ``mean_i cos(k_i, k_j) = <k_j/|k_j|, mean_i k_i/|k_i|>`` takes O(W D) instead of O(W^2 D) for the matrix (after
    R-KV, arXiv 2505.24133).
    """
    largest = keys.abs().amax(-1, keepdim=True)
    unit = keys / torch.where(largest > 0, largest, 1.0)  # tiny or huge squares would leave float32's range
    norm = unit.square().sum(-1, keepdim=True).sqrt()
    unit = unit / torch.where(norm > 0, norm, 1.0)
    return (unit * unit.mean(1, keepdim=True)).sum(-1)
