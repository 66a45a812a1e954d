"""What Kara computes, in plain Python: lists, loops, `math`. The tests' executable specification.

Nothing here is fast, and nothing here uses tensors. Scores are computed in float64 for one sequence and one KV head
at a time. Every ranking is exact. The rest of the suite tests the library against these functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

Vector = Sequence[float]
Row = TypeVar("Row")
Cell = tuple[int, int]  # (physical block, row of the block)


# ---- scores ----------------------------------------------------------------------------------------------


def dot(x: Vector, y: Vector) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def softmax(logits: Vector) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def score_window(
    query: Sequence[Sequence[Vector]],
    keys: Sequence[Vector],
    *,
    scale: float | None = None,
    k_scale: float = 1.0,
    causal: bool = False,
    reduction: str = "mean",
    values: Sequence[Vector] | None = None,
    redundancy: float = 0.0,
) -> list[float]:
    """Scores of the window's keys for one KV head: `query[N][G][D]`, `keys[W][D]`, `values[W][Dv]` -> `[W]`.

    The mean, over all queries and all query heads of the group, of the attention each key receives; or, "rms", its
    root mean square. With values, scores are multiplied by their norms. Causal: query `i` is window token `W - N + i`
    and sees the keys up to itself.
    """
    window, count = len(keys), len(query)
    scale = 1 / math.sqrt(len(keys[0])) if scale is None else scale
    keys = [[k_scale * x for x in key] for key in keys]
    received: list[list[float]] = [[] for _ in keys]
    for i, group in enumerate(query):
        visible = window - count + i + 1 if causal else window
        for vector in group:
            attention = softmax([scale * dot(vector, key) for key in keys[:visible]])
            for j in range(window):
                received[j].append(attention[j] if j < visible else 0.0)
    if reduction == "rms":
        scores = [math.sqrt(dot(column, column) / len(column)) for column in received]
    else:
        scores = [math.fsum(column) / len(column) for column in received]
    if values is not None:
        scores = [score * math.hypot(*value) for score, value in zip(scores, values, strict=True)]
    if redundancy:
        alike = softmax(mean_cosines(keys))
        scores = [score - redundancy * a for score, a in zip(scores, alike, strict=True)]
    return scores


def cosine(x: Vector, y: Vector) -> float:
    norms = math.sqrt(dot(x, x)) * math.sqrt(dot(y, y))
    return dot(x, y) / norms if norms else 0.0


def mean_cosines(keys: Sequence[Vector]) -> list[float]:
    """`r_j`: the mean cosine of key `j` with all keys of the window, itself included."""
    return [math.fsum(cosine(other, key) for other in keys) / len(keys) for key in keys]


def pool_scores(scores: Sequence[Sequence[Vector]], pool: str) -> list[list[list[float]]]:
    """`scores[L][H][W]` of one sequence: means over heads ("layer") or over layers and heads ("model")."""
    layers, heads, window = len(scores), len(scores[0]), len(scores[0][0])

    def mean(rows: Sequence[Vector]) -> list[float]:
        return [math.fsum(row[j] for row in rows) / len(rows) for j in range(window)]

    if pool == "head":
        return [[list(row) for row in layer] for layer in scores]
    if pool == "layer":
        return [[mean(layer)] * heads for layer in scores]
    if pool == "model":
        return [[mean([row for layer in scores for row in layer])] * heads] * layers
    raise ValueError(pool)


# ---- selection -------------------------------------------------------------------------------------------


def rank(score: float) -> float:
    """The sort key: NaN counts as -inf. (Python already compares -0.0 and +0.0 as equal.)"""
    return -math.inf if math.isnan(score) else score


def best_first(scores: Vector, positions: Sequence[int]) -> list[int]:
    """Positions by score, highest first; ties to the lowest position."""
    return sorted(positions, key=lambda j: (-rank(scores[j]), j))


def select_topk(scores: Vector, k: int) -> list[int]:
    return sorted(best_first(scores, range(len(scores)))[:k])


def chunk_budget(chunk_fraction: float, keep: int) -> int:
    """`A`: how many of the `keep` tokens may be chunk interiors; at least one candidate always remains."""
    return min(round(chunk_fraction * keep), keep - 1)


def expand_chunks(scores: Vector, keep: int, budget: int, max_chunk: int) -> list[int]:
    """Token2Chunk: exactly `keep` positions, ascending."""
    # 1. Candidates.
    candidates = select_topk(scores, keep - budget)

    # 2. Pairs of neighbouring candidates with something between them and a short enough span.
    pairs = [
        (left, right) for left, right in pairwise(candidates) if right - left - 1 >= 1 and right - left + 1 <= max_chunk
    ]

    # 3. Buy the best pairs until one does not fit. Worth is the weaker end point.
    def worth(pair: tuple[int, int]) -> float:
        return min(rank(scores[pair[0]]), rank(scores[pair[1]]))

    kept = set(candidates)
    spent = 0
    for left, right in sorted(pairs, key=lambda pair: (-worth(pair), pair[0])):
        interior = range(left + 1, right)
        if spent + len(interior) > budget:
            break
        spent += len(interior)
        kept.update(interior)

    # 4. Fill with the best of the rest.
    rest = [j for j in range(len(scores)) if j not in kept]
    kept.update(best_first(scores, rest)[: keep - len(kept)])
    return sorted(kept)


# ---- compaction ------------------------------------------------------------------------------------------


def cell_of(block_table: Sequence[int], page: int, token: int) -> Cell:
    """Where physical token `token` of a sequence lives."""
    return block_table[token // page], token % page


def compact(
    cells: Mapping[Cell, Row],
    block_table: Sequence[int],
    page: int,
    start: int,
    seq_len: int,
    keep: Sequence[int],
    window: int,
) -> tuple[dict[Cell, Row], int]:
    """The cells of one sequence, layer and head after compaction, and the new length.

    Survivors move to the front of the window, the tail follows them; every other cell stays as it was, those
    past the new length too. `keep` full of -1 leaves everything alone.
    """
    after = dict(cells)
    if any(j < 0 for j in keep):
        return after, seq_len
    survivors = [start + j for j in keep]
    tail = list(range(start + window, seq_len))
    for target, source in enumerate(survivors + tail, start):
        after[cell_of(block_table, page, target)] = cells[cell_of(block_table, page, source)]
    return after, seq_len - window + len(keep)


def is_skipped(start: int, window: int, seq_len: int, protected_len: int = 0) -> bool:
    """Whether the window does not fit between the protected tokens and the sequence's end."""
    return start < protected_len or start + window > seq_len
