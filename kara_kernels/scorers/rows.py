"""What a scorer is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..checks import SCORED_DTYPES, check_tensor
from ..values import check_count, check_number


@dataclass(frozen=True)
class Repetition:
    """What a model computed while it was made to repeat rows ``start..start + length - 1`` of a context, for KVzip.

    ``query [L, M, H, G, D]`` and ``keys [L, H, M, D]`` post-RoPE are those of all ``M`` tokens of the pass: the
    instruction, and then the repeated tokens as input. The pass had the whole context in its cache.
    """

    start: int
    length: int
    query: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Rows:
    """The input of a scorer: some rows of one sequence's cache, in all layers, and what is known about them.

    Raises:
        TypeError, ValueError: a tensor of another kind, or rows that do not exist. Contents are not checked.
    """

    query: Tensor
    """``[L, N, H, G, D]`` post-RoPE queries of the newest ``N`` of the ``T`` tokens, in their order. ``N`` may be 0:
    Knorm, KeyDiff, StreamingLLM and random scores need no queries. Compactor needs those of all scored rows."""
    keys: Tensor
    """``[L, H, T, D]`` post-RoPE keys of everything up to the newest token: float16, bfloat16 or float32."""
    values: Tensor
    """``[L, H, T, Dv]``"""
    start: int
    """The first scored row."""
    length: int
    """The number of scored rows. A window is followed by its tail. In a whole context, ``start`` is 0 and ``length``
    is ``T``."""
    scale: float
    """Of the logits, usually ``1/sqrt(D)``."""
    seed: int = 0
    """Of random scores."""
    ahead: Callable[[int, torch.device], LookAhead] | None = None
    """``ahead(n, device)`` returns the angles of ``n`` positions. None for models without a rotary embedding. The
    library's own score and ExpectedAttention look ahead with it."""
    repetitions: tuple[Repetition, ...] = ()
    """For KVzip."""

    def __post_init__(self) -> None:
        keys = check_tensor("keys", self.keys, (None,) * 4, SCORED_DTYPES, None)
        layers, heads, total, dim = keys.shape
        check_tensor("values", self.values, (layers, heads, total, None), SCORED_DTYPES, keys.device)
        check_tensor("query", self.query, (layers, None, heads, None, dim), SCORED_DTYPES, keys.device)
        if self.query.shape[1] > total:
            raise ValueError(f"query: expected queries of at most {total} tokens, got {self.query.shape[1]}")
        check_count("length", self.length, 1, total)
        check_count("start", self.start, 0, total - self.length)
        check_number("scale", self.scale, -3.4e38, 3.4e38)
        for i, pass_ in enumerate(self.repetitions):
            name, shape = f"repetitions[{i}]", (layers, None, heads, self.query.shape[3], dim)
            query = check_tensor(f"{name}.query", pass_.query, shape, SCORED_DTYPES, keys.device)
            check_tensor(f"{name}.keys", pass_.keys, (layers, heads, query.shape[1], dim), SCORED_DTYPES, keys.device)
            check_count(f"{name}.length", pass_.length, 1, total)
            check_count(f"{name}.start", pass_.start, 0, total - pass_.length)

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.length)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of scores: ``[L, H, length]``."""
        return self.keys.shape[0], self.keys.shape[1], self.length

    def scored_keys(self, layer: int) -> Tensor:
        """float32 ``[H, length, D]``."""
        return self.keys[layer, :, self.span].float()

    def scored_values(self, layer: int) -> Tensor:
        """float32 ``[H, length, Dv]``."""
        return self.values[layer, :, self.span].float()

    def newest_queries(self, layer: int, most: int) -> Tensor:
        """float32 ``[1..most, H, G, D]``, the newest last. Raises ValueError if there are none."""
        if not self.query.shape[1]:
            raise ValueError("query: expected at least 1 query for this scorer, got 0")
        return self.query[layer, -most:].float()


Scorer = Callable[[Rows], Tensor]
"""float32 ``[L, H, length]``. The highest are kept. Scores of a list that heads or layers share are expanded."""
