"""The paged cache: layers, pools and their memory, and checks of everything that is read through them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import INTERPRETED

from kara_kernels import PagedCache, compress_window, ops, reference
from kara_kernels.paged import Layers

# ---- layers and pools ------------------------------------------------------------------------------------


def aligned(size: int) -> torch.Tensor:
    """float16 zeros at an address that is a multiple of 64 bytes."""
    room = torch.zeros(size + 32, dtype=torch.float16)
    return room[-room.data_ptr() % 64 // 2 :][:size]


@pytest.mark.parametrize(("offsets", "alignment"), [
    ([0, 128], 16), ([0, 132], 8), ([0, 130], 4), ([0, 129], 2), ([1, 129], 2), ([4, 128], 8),
    ([0, 128, 258], 4), ([0, 129, 256], 2), ([128, 256, 4], 8),
])  # fmt: skip
def test_layers_are_as_aligned_as_the_least_aligned(offsets: list[int], alignment: int) -> None:
    room = aligned(400)
    layers = [room[offset : offset + 128].view(2, 4, 2, 8) for offset in offsets]
    assert Layers("k_cache", layers).alignment == alignment


@pytest.mark.parametrize(("first", "step", "alignment"), [(0, 128, 16), (0, 132, 8), (0, 129, 2), (4, 128, 8)])
def test_stacked_layers_are_as_aligned_as_the_least_aligned(first: int, step: int, alignment: int) -> None:
    room = aligned(600)
    stack = room.as_strided((3, 2, 4, 2, 8), (step, 64, 16, 8, 1), room.storage_offset() + first)
    assert Layers("k_cache", stack).alignment == alignment


def pools(layers: int = 2) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return tuple([torch.randn(4, 4, 2, 8) for _ in range(layers)] for _ in range(2))  # type: ignore[return-value]


TABLES = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
STARTS, LENGTHS = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([6, 8], dtype=torch.int32)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the checks that ran, by function and by argument name, in all modules that import them."""
    counts: Counter[str] = Counter()

    def counted(check: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            named = args[0] if args and isinstance(args[0], str) else ""
            counts[f"{check.__name__}({named})"] += 1
            return check(*args, **kwargs)

        return run

    rooms = [module for name, module in sys.modules.items() if name.split(".")[0] == "kara_kernels"]
    checking = ("values", "checks", "arguments", "paged")
    for module in rooms:
        for name, value in list(vars(module).items()):
            ours = isinstance(value, FunctionType) and value.__module__.split(".")[-1] in checking
            if ours and name.lstrip("_").startswith(("check_", "per_layer")):
                monkeypatch.setattr(module, name, counted(value))
    return counts


QUERY, SCORES = torch.randn(2, 2, 4, 4, 8), torch.randn(2, 2, 2, 4)
KEEP = torch.tensor([0, 2], dtype=torch.int32).expand(2, 2, 2, 2)
# The check that must be among those of the call, so that the count is not empty.
CALLS: dict[str, tuple[Callable[..., object], str]] = {
    "score_window": (lambda op, k, v, **how: op(QUERY, k, TABLES, STARTS, 4, v_cache=v, **how), "check_query()"),
    "compact_blocks": (lambda op, k, v, **how: op(k, v, TABLES, STARTS, LENGTHS, KEEP, 4, **how), "check_contents()"),
    "select_topk": (lambda op, k, v, **how: op(SCORES, 2, **how), "check_scores()"),
    "expand_chunks": (lambda op, k, v, **how: op(SCORES, 3, 1, 4, **how), "check_chunks()"),
    "compress_window": (
        lambda op, k, v, **how: op(QUERY, k, v, TABLES, LENGTHS, window=4, keep=2, **how), "check_contents()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["torch", "triton", "reference"])
@pytest.mark.parametrize("operation", CALLS)
def test_a_call_checks_each_argument_once(operation: str, where: str, ran: Counter[str]) -> None:
    if operation == "compress_window" and where == "reference":
        pytest.skip("has no twin of its own")
    if where == "triton" and not INTERPRETED:
        pytest.skip("needs the interpreter")
    call, among = CALLS[operation]
    module = reference if where == "reference" else ops
    how = {} if where == "reference" else {"backend": where}
    call(compress_window if operation == "compress_window" else getattr(module, operation), *pools(), **how)
    assert among in ran
    assert set(ran.values()) == {1}, ran.most_common(3)


def test_a_pool_is_checked_once_whatever_is_asked_of_it(backend: str, ran: Counter[str]) -> None:
    """Scoring without values does not check the keys again, nor the pair afterwards."""
    cache = PagedCache(*pools())
    for _ in range(2):
        ops.score_window(QUERY, cache.k, TABLES, STARTS, 4, backend=backend)
        ops.score_window(QUERY, cache.k, TABLES, STARTS, 4, v_cache=cache.v, backend=backend)
        compress_window(QUERY, cache.k, cache.v, TABLES, LENGTHS, window=4, keep=2, backend=backend)
        compress_window(QUERY, cache.k, None, TABLES, LENGTHS, window=4, keep=2, backend=backend)
        ops.compact_blocks(cache.k, cache.v, TABLES, STARTS, LENGTHS, KEEP, 4, backend=backend)
        ops.compact_blocks(cache.k, None, TABLES, STARTS, LENGTHS, KEEP, 4, backend=backend)
    assert ran["_check_pools()"] == ran["_check_overlap()"] == 1


def test_a_pool_is_recognised_by_both_its_halves(backend: str) -> None:
    """Keys that were checked with one set of values are moved with the values of this call."""
    cache, others = PagedCache(*pools()), PagedCache(*pools())
    expected = [values.clone() for values in others.k]
    alone = [values.clone() for values in cache.v]  # type: ignore[union-attr]
    compact = ops.compact_blocks
    keep = torch.tensor([1, 3], dtype=torch.int32).expand(2, 2, 2, 2)
    compact(expected, None, TABLES, STARTS, LENGTHS, keep, 4, backend=backend)
    compact(cache.k, others.k, TABLES, STARTS, LENGTHS, keep, 4, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(others.k, expected, strict=True))
    assert cache.v is not None
    assert all(torch.equal(a, b) for a, b in zip(cache.v, alone, strict=True))
    compact(alone, None, TABLES, STARTS, LENGTHS, keep, 4, backend=backend)
    compact(cache.v, None, TABLES, STARTS, LENGTHS, keep, 4, backend=backend)  # values alone, as if they were keys
    assert all(torch.equal(a, b) for a, b in zip(cache.v, alone, strict=True))


def test_values_are_no_keys_of_their_own_pool() -> None:
    cache = PagedCache(*pools())
    with pytest.raises(ValueError, match=r"v_cache\[\d\]: expected memory of its own, got elements of k_cache"):
        PagedCache.of(cache.v, cache.v)  # type: ignore[arg-type]
    assert PagedCache.of(cache.v, None).k is cache.v  # type: ignore[arg-type]


# ---- no sequences ----------------------------------------------------------------------------------------


def none_of(*shape: int, dtype: type = np.int32) -> torch.Tensor:
    """An empty tensor as in NumPy, with strides of 0."""
    tensor = torch.from_numpy(np.zeros(shape, dtype))
    assert set(tensor.stride()) == {0}
    return tensor


@pytest.mark.parametrize("layers", [None, 2])
def test_a_batch_of_no_sequences_may_come_from_numpy(layers: int | None, backend: str) -> None:
    lead = () if layers is None else (layers,)
    k, v = torch.randn(2, *lead, 4, 4, 2, 8)
    tables, lengths = none_of(0, 3), none_of(0)
    query, keep = none_of(*lead, 0, 5, 4, 8, dtype=np.float32), none_of(*lead, 0, 2, 3)
    shared, rows = none_of(*lead, 0, 4, 8, dtype=np.float32), none_of(0, 5)
    scores = none_of(*lead, 0, 2, 4, dtype=np.float32)
    for how in ({"query": query}, {"query": shared, "query_rows": rows}, {"query": None, "scores": scores}):
        result = compress_window(
            k_cache=k, v_cache=v, block_tables=tables, seq_lens=lengths, window=4, keep=3, window_starts=lengths,
            protected_lens=lengths, backend=backend, **how,
        )  # fmt: skip
        assert [list(x.shape) for x in result] == [[0], [*lead, 0, 2, 3], [*lead, 0, 2, 4], [0]]
        if "scores" not in how:
            scored = ops.score_window(**how, k_cache=k, block_tables=tables, window_starts=lengths, window=4,
                                      backend=backend)  # fmt: skip
            assert scored.shape == (*lead, 0, 2, 4)
    assert ops.compact_blocks(k, v, tables, lengths, lengths, keep, 4, backend=backend).shape == (0,)
    assert ops.select_topk(scores, 3, backend=backend).shape == (*lead, 0, 2, 3)
    assert ops.expand_chunks(scores, 3, 1, 4, backend=backend).shape == (*lead, 0, 2, 3)


def test_layers_of_no_queries_may_have_any_strides(backend: str) -> None:
    k, v = torch.randn(2, 2, 4, 4, 2, 8)
    query = [torch.empty(0, 5, 4, 8), none_of(0, 5, 4, 8, dtype=np.float32)]
    result = compress_window(query, k, v, none_of(0, 3), none_of(0), window=4, keep=3, backend=backend)
    assert result.keep_indices.shape == (2, 0, 2, 3)
    assert ops.score_window(query, k, none_of(0, 3), none_of(0), 4, backend=backend).shape == (2, 0, 2, 4)


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


def test_a_given_start_below_zero_is_refused(backend: str) -> None:
    """It is an error, and not a sequence that is too short for its window. Nothing is written."""
    k, v = pools()
    before = [tensor.clone() for tensor in (*k, *v)]
    starts = torch.tensor([0, -1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"window_starts\[1\]: expected 0 or more, got -1"):
        ops.score_window(QUERY, k, TABLES, starts, 4, v_cache=v, backend=backend)
    with pytest.raises(ValueError, match=r"window_starts\[1\]: expected 0 or more, got -1"):
        ops.compact_blocks(k, v, TABLES, starts, LENGTHS, KEEP, 4, backend=backend)
    with pytest.raises(ValueError, match=r"window_starts\[1\]: expected 0 or more, got -1"):
        compress_window(QUERY, k, v, TABLES, LENGTHS, window=4, keep=2, window_starts=starts, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((*k, *v), before, strict=True))
