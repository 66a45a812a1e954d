"""What a paged cache is: layers, pools and their memory, and the checks of everything that is read through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kara_kernels import ops, reference
from kara_kernels.paged import Layers

# ---- queries found by their rows -------------------------------------------------------------------------

ROWS = torch.tensor([[4, 0, 1], [2, 2, 3]], dtype=torch.int32)


def by_rows(layers: int | None = None) -> dict[str, Any]:
    """Two sequences of three queries in a buffer of five; H 2, G 2, D 4."""
    lead = () if layers is None else (layers,)
    return {
        "query": torch.randn(*lead, 5, 4, 4),
        "k_cache": torch.randn(*lead, 4, 4, 2, 4),
        "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "window_starts": torch.tensor([0, 3], dtype=torch.int32),
        "window": 4,
        "query_rows": ROWS,
    }


WRONG_ROWS: dict[str, tuple[int | None, dict[str, Any], type[Exception], str]] = {
    "int64": (None, {"query_rows": ROWS.long()}, TypeError, r"query_rows: expected dtype torch.int32, got torch.int64"),
    "a list": (None, {"query_rows": ROWS.tolist()}, TypeError, "query_rows: expected a tensor, got list"),
    "of another batch": (None, {"query_rows": ROWS[:1]}, ValueError, r"query_rows: expected shape \[2, any\], got"),
    "flat": (None, {"query_rows": ROWS[0]}, ValueError, r"query_rows: expected shape \[2, any\], got \[3\]"),
    "strided": (None, {"query_rows": ROWS.t().contiguous().t()}, ValueError, "query_rows: expected stride 1 .*, got 2"),
    "none": (None, {"query_rows": ROWS[:, :0]}, ValueError, r"query_rows: expected at least one .*got shape \[2,"),
    "negative": (None, {"query_rows": ROWS - 1}, ValueError, r"query_rows\[0, 1\]: expected .* 0\.\.4, got -1"),
    "beyond": (None, {"query_rows": ROWS + 1}, ValueError, r"query_rows\[0, 0\]: expected .* 0\.\.4, got 5"),
    "elsewhere": (None, {"query_rows": ROWS.to("meta")}, ValueError, "query_rows: expected device cpu, got meta"),
    "causal": (
        None, {"window": 2, "attention": "causal"}, ValueError, "query_rows: expected at most 2 queries .*, got 3",
    ),
    "queries by sequence": (
        None, {"query": torch.randn(2, 3, 4, 4)}, ValueError, r"query: expected \[R, H\*G, D\] with .*\[2, 3,",
    ),
    "many, queries by sequence": (
        2, {"query": torch.randn(2, 2, 3, 4, 4)}, ValueError, r"query: expected \[L, R, H\*G, D\] with query_rows",
    ),
    "many, a list of queries by sequence": (
        2, {"query": [torch.randn(2, 3, 4, 4)] * 2}, ValueError, r"query\[0\]: expected \[R, H\*G, D\] with query_rows",
    ),
    "many, a list with something else": (
        2, {"query": [torch.randn(5, 4, 4), 3]}, TypeError, r"query\[1\]: expected a tensor, got int",
    ),
    "many, layers by sequence": (
        2, {"query": Layers("query", torch.randn(2, 2, 3, 4, 4))}, ValueError,
        r"query: expected layers of \[1, R, H\*G, D\] with query_rows, got shape \[2, 3, 4, 4\]",
    ),
    "many, fewer": (2, {"query": torch.randn(1, 5, 4, 4)}, ValueError, "query: expected 2 layers as in k_cache, got 1"),
    "no rows": (None, {"query": torch.randn(0, 4, 4)}, ValueError, r"query: expected at least one row .*\[0, 4, 4\]"),
    "another dimension": (
        None, {"query": torch.randn(5, 4, 3)}, ValueError, r"query: expected shape \[any, any, 4\], got \[5, 4, 3\]",
    ),
    "rows, but for no buffer": (
        None, {"query_rows": None}, ValueError, r"query: expected \[S, N, H\*G, D\] beside one layer .*\[5, 4, 4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_wrong_query_rows_are_named(wrong: str, backend: str) -> None:
    layers, change, error, words = WRONG_ROWS[wrong]
    score: Callable[..., torch.Tensor] = ops.score_window
    with pytest.raises(error, match=words):
        score(**(by_rows(layers) | change), backend=backend)


@pytest.mark.parametrize("layers", [None, 2])
def test_a_query_buffer_may_be_kept_as_layers(layers: int | None) -> None:
    given = by_rows(layers)
    if layers is not None:
        given["query"] = Layers("query", given["query"][:, None])
    copied = given["query"][ROWS] if layers is None else torch.stack([layer[0][ROWS] for layer in given["query"]])
    plain = {**given, "query": copied, "query_rows": None}
    assert torch.equal(reference.score_window(**given), reference.score_window(**plain))
