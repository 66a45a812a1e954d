"""Published scores, a few lines of plain PyTorch each, written from their papers.

They work one layer at a time, in float32, and some queries at a time where the logits of all would be large. What the
methods do with their scores is left to the caller: budgets of layers and heads, observation windows, sinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ahead import LookAhead
from ..checks import slices
from .rows import Rows

SLICE_ELEMENTS = 1 << 24  # logits at a time, 64 MB
SINKS = 4  # first rows that KVzip and ExpectedAttention treat apart, as in their authors' code
SNAP_QUERIES, SNAP_POOL = 32, 7
RKV_QUERIES, RKV_POOL, RKV_LAMBDA, RKV_SIMILAR = 8, 7, 0.1, 0.5
CHUNK, COMPACTOR_CHUNK = 10, 256
FUTURE, EPSILON = 512, 0.01  # as ExpectedAttention's authors evaluate it


# --------------------------------------------------------------------------------------------- without queries


def random_per_head(rows: Rows) -> Tensor:
    """Random selection with one list per layer and KV head, the null baseline (arXiv 2609.03430)."""
    return torch.rand(rows.shape, generator=_generator(rows)).to(rows.keys.device)


def random_shared(rows: Rows) -> Tensor:
    """Random selection with one list for the whole model."""
    return torch.rand(rows.length, generator=_generator(rows)).to(rows.keys.device).expand(rows.shape)


def streaming_llm(rows: Rows) -> Tensor:
    """The newest tokens (arXiv 2309.17453). Its sinks, the very first tokens, are protected by the caller."""
    return torch.arange(rows.length, dtype=torch.float32, device=rows.keys.device).expand(rows.shape)


def knorm(rows: Rows) -> Tensor:
    """Prefers keys of small norm (arXiv 2406.11430)."""
    return _by_layer(rows, lambda layer: -rows.scored_keys(layer).norm(dim=-1))


def keydiff(rows: Rows) -> Tensor:
    """Prefers keys that differ from the mean of the normalised keys (arXiv 2504.15364)."""

    def score(layer: int) -> Tensor:
        keys = rows.scored_keys(layer)
        return -F.cosine_similarity(keys, F.normalize(keys, dim=-1).mean(-2, keepdim=True), dim=-1)

    return _by_layer(rows, score)


# ------------------------------------------------------------------------- by attention as it was in the model


def snapkv(rows: Rows) -> Tensor:
    """Attention of the last 32 queries, max-pooled over 7 tokens, per KV head (arXiv 2404.14469)."""
    return _by_layer(rows, lambda layer: _max_pool(_received(rows, layer, SNAP_QUERIES), SNAP_POOL))


def h2o(rows: Rows) -> Tensor:
    """All attention received so far (arXiv 2306.14048), summed over the queries of a KV head.

    Costs as much as one attention over all given queries.
    """
    count, group = rows.query.shape[1], rows.query.shape[3]
    return _by_layer(rows, lambda layer: _received(rows, layer, count) * (count * group))


def tova(rows: Rows) -> Tensor:
    """Attention of the newest query, averaged over all heads of a layer (arXiv 2401.06104)."""
    return _by_layer(rows, lambda layer: _received(rows, layer, 1).mean(0).expand(rows.keys.shape[1], -1))


def chunkkv(rows: Rows) -> Tensor:
    """Fixed chunks of 10 tokens by mean attention of the last 32 queries, one list per layer (arXiv 2502.00299)."""

    def score(layer: int) -> Tensor:
        received = _received(rows, layer, SNAP_QUERIES).mean(0)
        of_chunks = F.avg_pool1d(received[None], CHUNK, ceil_mode=True)[0]
        return of_chunks.repeat_interleave(CHUNK)[: rows.length].expand(rows.keys.shape[1], -1)

    return _by_layer(rows, score)


def rkv(rows: Rows) -> Tensor:
    """0.1 x attention of the last 8 queries - 0.9 x softmax of redundancy (arXiv 2505.24133).

    Attention: maximum logits over the group, softmax over the candidates, mean over the queries, max-pooled over 7.
    Redundancy: mean cosine to the other keys. Of the keys similar to a key (above 0.5), the newest is not counted.
    Takes time quadratic in the number of keys.
    """

    def score(layer: int) -> Tensor:
        query = rows.newest_queries(layer, RKV_QUERIES).permute(1, 2, 0, 3)
        logits = (query @ rows.scored_keys(layer).transpose(1, 2)[:, None] * rows.scale).amax(1)
        important = _max_pool(logits.softmax(-1).mean(1), RKV_POOL)
        redundant = _mean_similarity(F.normalize(rows.keys[layer, :, rows.start :].float(), dim=-1)).softmax(-1)
        return RKV_LAMBDA * important - (1 - RKV_LAMBDA) * redundant[:, : rows.length]

    return _by_layer(rows, score)


# --------------------------------------------------------------------------------- by other kinds of attention


def compactor(rows: Rows) -> Tensor:
    """Column sums of attention without a mask in chunks of 256 rows, times the value's norm, averaged over 3
    neighbours (arXiv 2507.08143, without its leverage scores). The published method closest to Kara."""
    skipped = rows.start - (rows.keys.shape[2] - rows.query.shape[1])
    if skipped < 0:
        raise ValueError(
            f"query: expected the queries of all scored rows, from row {rows.start} on, for compactor, got those from "
            f"row {rows.start - skipped} on"
        )

    def score(layer: int) -> Tensor:
        keys, mass = rows.scored_keys(layer), []
        for chunk in slices(rows.length, COMPACTOR_CHUNK):
            query = rows.query[layer, skipped : skipped + rows.length][chunk].float().permute(1, 2, 0, 3)
            logits = query @ keys[:, None, chunk].transpose(2, 3) * rows.scale
            mass.append(logits.softmax(-1).sum(2).mean(1))
        score = torch.cat(mass, -1) * rows.scored_values(layer).norm(dim=-1)
        return F.avg_pool1d(score[:, None], 3, 1, 1, count_include_pad=False)[:, 0]

    return _by_layer(rows, score)


def kvzip(rows: Rows) -> Tensor:
    """The greatest attention that a key receives while the context is repeated, over group and queries (arXiv
    2505.23416).

    A token of a pass sees the sinks, the rows that the pass repeats, and the pass up to itself. The softmax is over
    these, as in the authors' code. In a context of a single pass, that is what it saw in the model. Rows that no pass
    repeats score 0.
    """
    if not rows.repetitions:
        raise ValueError("repetitions: expected at least one for kvzip, got none")

    def score(layer: int) -> Tensor:
        keys = rows.keys[layer].float()
        best = keys.new_zeros(keys.shape[:2])
        for pass_ in rows.repetitions:
            span, sinks = slice(pass_.start, pass_.start + pass_.length), min(SINKS, pass_.start)
            seen = torch.cat((keys[:, :sinks], keys[:, span], pass_.keys[layer].float()), 1)
            for attention in _attention(pass_.query[layer].float(), seen, rows.scale):
                received = attention[..., sinks : sinks + pass_.length].amax((1, 2))
                best[:, span] = torch.maximum(best[:, span], received)
        return best[:, rows.span]

    return _by_layer(rows, score)


def expected_attention(rows: Rows) -> Tensor:
    """Attention that the queries of the next 512 positions are expected to give, times the value's norm (arXiv
    2510.00636).

    Queries before rotation count as normally distributed. Their mean ``m`` and covariance ``S`` are turned by the mean
    rotation of the next positions. A key ``k`` then expects ``exp(m k + k S k / 2)`` of scaled logits. These are
    normalised, averaged over the group, and ``(. + 0.01) |v|`` is the score. As in the authors' code, queries of the
    first four tokens are left out, and the first four keys are not in the normalisation, so they may score above 1.
    """
    count, total = rows.query.shape[1], rows.keys.shape[2]
    outliers = max(0, SINKS - (total - count))  # queries of sinks
    if count <= outliers:
        raise ValueError(f"query: expected queries after the first {SINKS} tokens, got {count} of {total} tokens")
    turn = None if rows.ahead is None else _Turn(rows.ahead, max(count + 1, FUTURE), rows.keys.device)

    def score(layer: int) -> Tensor:
        query = rows.query[layer, outliers:].float()
        if turn is not None:  # to the position after the newest, as if all were asked there
            query = turn(query, turn.angles[1 : len(query) + 1].flip(0)[:, None, None])
        mean = query.mean(0)
        covariance = torch.einsum("nhgd,nhge->hgde", query - mean, query - mean) / len(query)
        if turn is not None:
            future = turn.angles[:FUTURE].mean(0)
            mean = turn(mean, future)
            covariance = turn(turn(covariance, future).mT, future)
        keys = rows.scored_keys(layer)
        spread = [
            (keys[:, None, some] @ covariance * keys[:, None, some]).sum(-1)
            for some in slices(rows.length, max(1, SLICE_ELEMENTS // covariance[..., 0].numel()))
        ]
        logits = rows.scale * (mean @ keys.mT) + rows.scale**2 / 2 * torch.cat(spread, -1)
        norm = logits[..., max(0, SINKS - rows.start) :].logsumexp(-1, keepdim=True)
        return ((logits - norm).exp().mean(1) + EPSILON) * rows.scored_values(layer).norm(dim=-1)

    return _by_layer(rows, score)


# ------------------------------------------------------------------------------------------------ what they share


def _by_layer(rows: Rows, score: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([score(layer) for layer in range(len(rows.keys))])


def _generator(rows: Rows) -> torch.Generator:
    return torch.Generator().manual_seed(rows.seed)


def _attention(query: Tensor, keys: Tensor, scale: float) -> Iterator[Tensor]:
    """Causal attention ``[H, G, n, T]`` of ``query [N, H, G, D]`` to ``keys [H, T, D]``, some queries at a time. The
    last ``N`` keys are those of the queries' own tokens."""
    (count, heads, group, _), total = query.shape, keys.shape[1]
    place = torch.arange(total, device=keys.device)
    for some in slices(count, max(1, SLICE_ELEMENTS // (heads * group * total))):
        logits = query[some].permute(1, 2, 0, 3) @ keys.transpose(1, 2)[:, None] * scale
        later = place > place[total - count :][some, None]
        yield logits.masked_fill_(later, -math.inf).softmax(-1)


def _received(rows: Rows, layer: int, queries: int) -> Tensor:
    """Attention from the newest ``queries`` queries in the model, the mean over them and the group, ``[H, length]``."""
    query, received = rows.newest_queries(layer, queries), rows.keys.new_zeros(rows.shape[1:], dtype=torch.float32)
    for attention in _attention(query, rows.keys[layer].float(), rows.scale):
        received += attention[..., rows.span].sum((1, 2))
    return received / (query.shape[0] * query.shape[2])


def _mean_similarity(keys: Tensor) -> Tensor:
    """Mean cosine of the others to each of ``keys [H, T, D]``, as R-KV counts it, some of the others at a time."""
    heads, total, _ = keys.shape
    place, sums = torch.arange(total, device=keys.device), keys.new_zeros(heads, total)
    for some in slices(total, max(1, SLICE_ELEMENTS // (heads * total))):
        similar = (keys[:, some] @ keys.transpose(1, 2)).masked_fill_(place == place[some, None], 0.0)
        newest = torch.where(similar > RKV_SIMILAR, place, 0).amax(-1, keepdim=True)
        sums += similar.scatter_(-1, newest, 0.0).sum(1)
    return sums / total


def _max_pool(rows: Tensor, width: int) -> Tensor:
    return F.max_pool1d(rows[:, None], width, 1, width // 2)[:, 0]


class _Turn:
    """Rotations of a rotary embedding, as complex numbers."""

    def __init__(self, ahead: Callable[[int, torch.device], LookAhead], count: int, device: torch.device) -> None:
        cos, _, self.interleaved = ahead(1, device)
        self.angles = torch.ones(1, len(cos), dtype=torch.complex64, device=device)  # [positions, R/2], from 0 on
        while len(self.angles) < count:
            cos, sin, _ = ahead(len(self.angles), device)
            self.angles = torch.cat((self.angles, self.angles * torch.complex(cos, sin)))

    def __call__(self, x: Tensor, angles: Tensor) -> Tensor:
        """``x [..., D]`` with its first ``R`` dimensions turned by ``angles [..., R/2]``."""
        turning, rest = x.tensor_split([2 * angles.shape[-1]], -1)
        pairs = turning.unflatten(-1, (-1, 2)) if self.interleaved else turning.unflatten(-1, (2, -1)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angles)
        return torch.cat(((turned if self.interleaved else turned.mT).flatten(-2), rest), -1)
