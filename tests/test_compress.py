"""`compress_window`: the whole operation against the oracle, and every documented error.

`backend` comes from `conftest.py`, so the same tests run on every backend that works here. Worlds are small, because
interpreted kernels are slow.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import oracle
import pytest
import torch
import worlds
from conftest import INTERPRETED
from hypothesis import HealthCheck, given, settings
from worlds import FP8, Plan, Sequenced, World, plans

from kara_kernels import CompressedWindow, compress_window
from kara_kernels.ops import score
from kara_kernels.options import PAPER, RECOMMENDED

# The backend fixture is a constant, so examples may share it; interpreted examples are slow by nature.
quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
few = settings(max_examples=25, deadline=None, suppress_health_check=quiet)
many = settings(max_examples=40, deadline=None, suppress_health_check=quiet)

POOLS = ("head", "layer", "model")
MOVED_DTYPES = (*worlds.FLOATS, *FP8, torch.uint8, torch.int8)


# ---- running and checking ---------------------------------------------------------------------------------


def compress(world: World, keep: int, backend: str, **options: Any) -> CompressedWindow:
    """Every layer of the world in one call, one layer as plain tensors: the paper's method unless options differ."""
    single = world.plan.layers == 1
    values = world.v_caches
    arguments = {
        "query": world.query[0] if single else world.query,
        "k_cache": world.k_caches[0] if single else world.k_caches,
        "v_cache": values[0] if single and values else values,
        "block_tables": world.block_tables,
        "seq_lens": world.seq_lens,
        "window": world.plan.window,
        "keep": keep,
        "window_starts": world.window_starts,
        "protected_lens": world.protected_lens,
        "backend": backend,
        **PAPER,
    }
    return call({**arguments, **options})


def call(arguments: dict[str, Any]) -> CompressedWindow:
    """Passes arguments positionally if the signature allows it, so that their order is tested too."""
    arguments = dict(arguments)
    names = ("query", "k_cache", "v_cache", "block_tables", "seq_lens")
    positional = [arguments.pop(name) for name in names]
    return compress_window(*positional, **arguments)


def layered(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """The result with a leading L, even for one layer."""
    return tensor[None] if world.plan.layers == 1 else tensor


def check(
    world: World,
    before: list[torch.Tensor],
    result: CompressedWindow,
    keep: int,
    *,
    chunk_fraction: float = 0.3,
    max_chunk: int = 8,
) -> None:
    """Checks that keep lists follow from the returned scores, and caches and lengths from the keep lists."""
    plan = world.plan
    rows = [plan.layers, len(world.starts), plan.heads]
    scores, kept = layered(world, result.scores), layered(world, result.keep_indices)
    assert result.scores.dtype == torch.float32
    assert result.keep_indices.dtype == torch.int32
    assert result.seq_lens.dtype == torch.int32
    assert list(scores.shape) == [*rows, plan.window]
    assert list(kept.shape) == [*rows, keep]

    budget = oracle.chunk_budget(chunk_fraction, keep)
    expected = [
        [
            [[-1] * keep if skipped else oracle.expand_chunks(row, keep, budget, max_chunk) for row in heads]
            for heads, skipped in zip(layer, world.skipped, strict=True)
        ]
        for layer in scores.tolist()
    ]
    assert kept.tolist() == expected
    assert result.seq_lens.tolist() == world.assert_compacted(before, expected)
    assert result.frontiers.dtype == torch.int32
    protected = [0] * len(world.starts) if world.protected_lens is None else world.protected_lens.tolist()
    ends = zip(world.starts, world.skipped, protected, strict=True)
    assert result.frontiers.tolist() == [max(floor, 0) if skip else start + keep for start, skip, floor in ends]


def check_scores(
    world: World, result: CompressedWindow, *, pool: str = "head", value_norm: bool = False, **options: Any
) -> None:
    """Checks that returned scores are the oracle's, pooled, and zero for skipped sequences."""
    scores = layered(world, result.scores).double()
    for s, skipped in enumerate(world.skipped):
        if skipped:
            assert (scores[:, s] == 0).all()
            continue
        exact = [world.oracle_scores(layer, s, value_norm=value_norm, **options) for layer in range(world.plan.layers)]
        limit = max(
            worlds.allowed_error(
                query[s], world.read_keys(layer, s), torch.tensor(rows).double(),
                values=world.read_values(layer, s) if value_norm else None, **options,
            )
            for layer, (query, rows) in enumerate(zip(world.query, exact, strict=True))
        )  # fmt: skip
        # A mean of rounded scores is at most as wrong as the worst of them, plus its own additions and division.
        pooled = torch.tensor(oracle.pool_scores(exact, pool)).double()
        largest = max(1.0, float(torch.tensor(exact).abs().max())) + options.get("redundancy", 0.0)
        limit += 8 * torch.finfo(torch.float32).eps * largest * (pool != "head")
        assert ((scores[:, s] - pooled).abs() <= limit).all()


def given_scores(world: World, *, integers: bool = True) -> torch.Tensor:
    """Scores of a caller. Small integers tie often."""
    shape = [world.plan.layers, len(world.starts), world.plan.heads, world.plan.window]
    scores = torch.randint(-8, 9, shape, generator=world.generator).float()
    if not integers:
        scores = torch.randn(shape, generator=world.generator)
    return scores[0] if world.plan.layers == 1 else scores


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()  # pooled results may be expanded views
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(worlds.bits(a), worlds.bits(b))


def same_result(a: CompressedWindow, b: CompressedWindow) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


# ---- the whole operation ---------------------------------------------------------------------------------


@many
@given(plan=plans(skips=True), data=st.data())
def test_one_layer(backend: str, plan: Plan, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, plan.window))
    world, original = World(plan), World(plan)
    before = world.snapshot()
    result = compress(world, keep, backend)
    check(world, before, result, keep)
    check_scores(original, result)


@many
@given(
    plan=plans(max_layers=3, skips=True, max_window=12),
    pool=st.sampled_from(POOLS),
    reduction=st.sampled_from(["mean", "rms"]),
    value_norm=st.booleans(),
    redundancy=st.sampled_from([0.0, 0.5]),
    fraction=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    max_chunk=st.integers(2, 9),
    data=st.data(),
)
def test_many_layers(
    backend: str,
    plan: Plan,
    pool: str,
    reduction: str,
    value_norm: bool,
    redundancy: float,
    fraction: float,
    max_chunk: int,
    data: st.DataObject,
) -> None:
    keep = data.draw(st.integers(1, plan.window))
    world, original = World(plan).give_values(), World(plan).give_values()
    before = world.snapshot()
    options = {"pool": pool, "reduction": reduction, "value_norm": value_norm, "redundancy": redundancy}
    result = compress(world, keep, backend, chunk_fraction=fraction, max_chunk=max_chunk, **options)
    check(world, before, result, keep, chunk_fraction=fraction, max_chunk=max_chunk)
    check_scores(original, result, **options)


@many
@given(
    plan=plans(max_layers=2, skips=True, latent=True, dtypes=MOVED_DTYPES),
    pool=st.sampled_from(POOLS),
    fraction=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    max_chunk=st.integers(1, 9),
    data=st.data(),
)
def test_given_scores_replace_scoring(
    backend: str, plan: Plan, pool: str, fraction: float, max_chunk: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, plan.window))
    world = World(plan)
    scores = given_scores(world, integers=data.draw(st.booleans()))
    before, scores_before = world.snapshot(), scores.clone()
    result = compress(
        world,
        keep,
        backend,
        query=None,
        scores=scores,
        pool=pool,
        chunk_fraction=fraction,
        max_chunk=max_chunk,
    )
    check(world, before, result, keep, chunk_fraction=fraction, max_chunk=max_chunk)
    assert same_bits(scores, scores_before)
    if pool == "head":
        assert same_bits(result.scores, scores)
        return
    per_sequence = layered(world, scores).transpose(0, 1).tolist()
    pooled = torch.tensor([oracle.pool_scores(rows, pool) for rows in per_sequence]).transpose(0, 1)
    limit = 8 * torch.finfo(torch.float32).eps * float(scores.abs().max())
    assert ((layered(world, result.scores).double() - pooled.double()).abs() <= limit).all()


@few
@given(plan=plans(max_layers=2, skips=True, max_window=12), pool=st.sampled_from(POOLS), data=st.data())
def test_a_dry_run_moves_nothing_and_says_what_would_be(
    backend: str, plan: Plan, pool: str, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, plan.window))
    world, moved = World(plan).give_values(), World(plan).give_values()
    before = world.snapshot()
    result = compress(world, keep, backend, pool=pool, value_norm=True, dry_run=True)
    assert all(same_bits(*pair) for pair in zip(world.snapshot(), before, strict=True))
    assert same_result(result, compress(moved, keep, backend, pool=pool, value_norm=True))


@few
@given(plan=plans(explicit_starts=False, skips=True), data=st.data())
def test_the_window_is_the_newest_tokens_by_default(backend: str, plan: Plan, data: st.DataObject) -> None:
    """Sequences shorter than the window, empty ones among them, are skipped: no start below 0."""
    keep = data.draw(st.integers(1, plan.window))
    world, original = World(plan), World(plan)
    before = world.snapshot()
    result = compress(world, keep, backend, window_starts=None)
    check(world, before, result, keep)
    check_scores(original, result)


@few
@given(plan=plans(), data=st.data())
def test_nothing_is_protected_by_default(backend: str, plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    before = world.snapshot()
    keep = data.draw(st.integers(1, plan.window))
    check(world, before, compress(world, keep, backend, protected_lens=None), keep)


@few
@given(plan=plans(max_window=10, more_queries=False), data=st.data())
def test_causal_attention(backend: str, plan: Plan, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, plan.window))
    world, original = World(plan), World(plan)
    before = world.snapshot()
    result = compress(world, keep, backend, attention="causal", scale=0.5)
    check(world, before, result, keep)
    check_scores(original, result, causal=True, scale=0.5)


@few
@given(plan=plans(dtypes=FP8, max_layers=2, max_window=10), k_scale=st.sampled_from([0.25, 3.0]), data=st.data())
def test_fp8_caches(backend: str, plan: Plan, k_scale: float, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, plan.window))
    as_given = data.draw(st.sampled_from([k_scale, torch.tensor([k_scale])]))
    world, original = World(plan), World(plan)
    before = world.snapshot()
    result = compress(world, keep, backend, k_scale=as_given)
    check(world, before, result, keep)
    check_scores(original, result, k_scale=k_scale)


@pytest.mark.parametrize("per", ["layer", "head"])
def test_fp8_scales_of_layers_and_heads(backend: str, per: str) -> None:
    """`k_scale [L]` or `[L, H]`."""
    plan = replace(TWO_LAYERS, dtype=torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 3.0], [1.0, 2.0]])
    given_scales = scales if per == "head" else scales[:, 0]
    world, original = World(plan), World(plan)
    result = compress(world, 3, backend, k_scale=given_scales)
    for layer in range(2):
        for h in range(2):
            used = float(scales[layer, h if per == "head" else 0])
            for s in range(2):
                exact = torch.tensor(original.oracle_scores(layer, s, k_scale=used)).double()
                limit = worlds.allowed_error(
                    original.query[layer][s], original.read_keys(layer, s), exact, k_scale=used
                )
                assert ((result.scores[layer, s, h].double() - exact[h]).abs() <= limit).all()


@few
@given(plan=plans(layouts=("k_transposed",), skips=True), data=st.data())
def test_transposed_keys(backend: str, plan: Plan, data: st.DataObject) -> None:
    """Kernels need a last dimension of stride 1; the reference takes any strides."""
    if backend != "torch":
        pytest.skip("a kernel needs stride 1 in the last dimension")
    keep = data.draw(st.integers(1, plan.window))
    world = World(plan)
    before = world.snapshot()
    check(world, before, compress(world, keep, backend), keep)


@few
@given(plan=plans(max_layers=2, max_window=10, skips=True), pool=st.sampled_from(POOLS), data=st.data())
def test_results_do_not_depend_on_the_batch(backend: str, plan: Plan, pool: str, data: st.DataObject) -> None:
    """Scores, keep lists and every byte of memory have the same bits with one sequence at a time."""
    keep = data.draw(st.integers(1, plan.window))
    together, apart = World(plan), World(plan)
    result = compress(together, keep, backend, pool=pool)
    for s in range(len(plan.sequences)):
        only = slice(s, s + 1)
        query = [layer[only] for layer in apart.query]
        single = compress(
            apart,
            keep,
            backend,
            pool=pool,
            query=query[0] if plan.layers == 1 else query,
            block_tables=apart.block_tables[only],
            seq_lens=apart.seq_lens[only],
            window_starts=apart.window_starts[only],
            protected_lens=apart.protected_lens[only],
        )
        assert same_bits(layered(apart, single.scores), layered(together, result.scores)[:, only])
        assert same_bits(layered(apart, single.keep_indices), layered(together, result.keep_indices)[:, only])
        assert same_bits(single.seq_lens, result.seq_lens[only])
    apart.assert_untouched(together.snapshot())


@few
@given(plan=plans(max_layers=3, max_window=10), data=st.data())
def test_layers_do_not_depend_on_each_other(backend: str, plan: Plan, data: st.DataObject) -> None:
    """One call for all layers gives the same bits as one call per layer, unless scores are pooled over layers."""
    keep = data.draw(st.integers(1, plan.window))
    pool = data.draw(st.sampled_from(["head", "layer"]))
    together, apart = World(plan), World(plan)
    result = compress(together, keep, backend, pool=pool)
    for layer in range(plan.layers):
        values = apart.v_caches[layer] if apart.v_caches else None
        single = compress(
            apart,
            keep,
            backend,
            pool=pool,
            query=apart.query[layer],
            k_cache=apart.k_caches[layer],
            v_cache=values,
        )
        assert same_bits(single.scores, layered(together, result.scores)[layer])
        assert same_bits(single.keep_indices, layered(together, result.keep_indices)[layer])
        assert same_bits(single.seq_lens, result.seq_lens)
    apart.assert_untouched(together.snapshot())


@few
@given(plan=plans(max_layers=2, skips=True, max_window=10), data=st.data())
def test_the_same_call_gives_the_same_bits(backend: str, plan: Plan, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, plan.window))
    first, second = World(plan), World(plan)
    assert same_result(compress(first, keep, backend), compress(second, keep, backend))
    first.assert_untouched(second.snapshot())


@few
@given(plan=plans(max_window=8, skips=True), data=st.data())
def test_a_broken_sequence_leaves_the_others_alone(backend: str, plan: Plan, data: st.DataObject) -> None:
    """NaN in the first sequence's keys still gives K ascending tokens there, and does not affect other sequences."""
    keep = data.draw(st.integers(1, plan.window))
    broken, healthy = World(plan), World(plan)
    if not broken.skipped[0]:
        broken.write_keys(0, 0, torch.full_like(broken.read_keys(0, 0), torch.nan))
    before = broken.snapshot()
    result = compress(broken, keep, backend)
    check(broken, before, result, keep)
    expected = compress(healthy, keep, backend)
    assert same_bits(result.scores[1:], expected.scores[1:])
    assert same_bits(result.keep_indices[1:], expected.keep_indices[1:])


# ---- arguments in all their forms ------------------------------------------------------------------------

TWO_LAYERS = Plan((Sequenced(3, tail=2), Sequenced(1)), layers=2, heads=2, group=2, window=6, queries=6, seed=7)
ONE_LAYER = replace(TWO_LAYERS, layers=1)


def test_layers_may_come_as_lists_tuples_or_stacked_tensors(backend: str) -> None:
    """A stacked tensor is compacted in place, not in a copy."""
    as_lists, as_tuples, stacked = World(TWO_LAYERS), World(TWO_LAYERS), World(TWO_LAYERS)
    result = compress(as_lists, 3, backend)
    tuples = {
        "query": tuple(as_tuples.query),
        "k_cache": tuple(as_tuples.k_caches),
        "v_cache": tuple(as_tuples.v_caches or ()),
    }
    assert same_result(compress(as_tuples, 3, backend, **tuples), result)
    tensors = {
        "query": torch.stack(stacked.query),
        "k_cache": torch.stack(stacked.k_caches),
        "v_cache": torch.stack(stacked.v_caches or []),
    }
    assert same_result(compress(stacked, 3, backend, **tensors), result)
    for layer in range(2):
        assert same_bits(tensors["k_cache"][layer], as_lists.k_caches[layer])
        assert same_bits(tensors["v_cache"][layer], (as_lists.v_caches or [])[layer])


def test_one_layer_in_a_list_keeps_its_leading_dimension(backend: str) -> None:
    world, plain = World(ONE_LAYER), World(ONE_LAYER)
    result = compress(world, 3, backend, query=world.query, k_cache=world.k_caches, v_cache=world.v_caches)
    expected = compress(plain, 3, backend)
    assert same_bits(result.scores, expected.scores[None])
    assert same_bits(result.keep_indices, expected.keep_indices[None])
    assert same_bits(result.seq_lens, expected.seq_lens)


def test_the_result_is_a_named_tuple(backend: str) -> None:
    result = compress(World(ONE_LAYER), 3, backend)
    assert isinstance(result, CompressedWindow)
    assert CompressedWindow._fields == ("seq_lens", "keep_indices", "scores", "frontiers")
    assert result[0] is result.seq_lens


def test_the_defaults_are_the_recommended_options(backend: str) -> None:
    """They include value norms if there are values, and exclude them if there are none."""
    plan = Plan((Sequenced(2),), layers=2, heads=2, window=40, queries=8, dim=8, v_dim=8, seed=11)
    for values in (True, False):
        by_default, spelled_out = World(plan), World(plan)
        arguments = {"query": by_default.query, "k_cache": by_default.k_caches, "window": 40, "keep": 13}
        rest = {"block_tables": by_default.block_tables, "seq_lens": by_default.seq_lens, "backend": backend}
        given_values = by_default.v_caches if values else None
        result = call({**arguments, "v_cache": given_values, **rest, "window_starts": by_default.window_starts})
        options = {**RECOMMENDED, "value_norm": values, "attention": "bidirectional", "scale": plan.dim**-0.5}
        without = {} if values else {"v_cache": None}
        assert same_result(compress(spelled_out, 13, backend, **options, **without), result)
        paper = compress(World(plan), 13, backend, **without)
        assert not torch.equal(paper.scores, result.scores)


def test_frontiers_keep_survivors_from_being_compressed_again(backend: str) -> None:
    """Three rounds of decoding. With only the prompt protected, the second would compress survivors of the first."""
    torch.manual_seed(0)
    page, window, keep, prompt = 4, 8, 4, 6
    k_cache = torch.randn(16, page, 1, 4)
    v_cache, query = torch.randn_like(k_cache), torch.randn(1, 3, 2, 4)
    tables = torch.arange(16, dtype=torch.int32)[None]
    length, frontiers = prompt, torch.tensor([prompt], dtype=torch.int32)
    for round_ in range(3):
        length += window
        before = k_cache.flatten(0, 1)[:length].clone()
        result = compress_window(
            query, k_cache, v_cache, tables, torch.tensor([length], dtype=torch.int32), window=window, keep=keep,
            window_starts=frontiers, protected_lens=frontiers, backend=backend,
        )  # fmt: skip
        length = prompt + (round_ + 1) * keep
        assert result.seq_lens.tolist() == result.frontiers.tolist() == [length]
        assert torch.equal(k_cache.flatten(0, 1)[: int(frontiers)], before[: int(frontiers)])
        frontiers = result.frontiers
        # Nothing decoded since: there is nothing to compress, and a call that tries is skipped.
        again = compress_window(
            query, k_cache, v_cache, tables, result.seq_lens, window=window, keep=keep, protected_lens=frontiers,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(again.seq_lens, result.seq_lens)
        assert torch.equal(again.frontiers, frontiers)


def test_default_chunks_by_hand(backend: str) -> None:
    """A row whose keep list says the fraction is 0.3 and the longest chunk 8 tokens."""
    candidates = [0, 8, *range(15, 25), 26, 30]  # 20 kept, round(0.3 * 20) = 6 reserved, so 14 candidates
    row = torch.arange(40) / 100
    row[9:15] = -1.0
    row[candidates] = 100.0 - torch.arange(14)
    # The best pair, (0, 8), spans 9: no chunk. Were it one, its 7 tokens would not fit and nothing would be
    # bought. (8, 15) spans 8 and its 6 tokens spend the budget. One more would also buy 25, and lose 30.
    world = World(Plan((Sequenced(2),), window=40, seed=12))
    before = world.snapshot()
    result = compress(world, 20, backend, query=None, scores=row.view(1, 1, 40))
    check(world, before, result, 20)
    assert result.keep_indices.flatten().tolist() == [0, *range(8, 25), 26, 30]


def test_every_chunk_limit(backend: str) -> None:
    plan = Plan((Sequenced(1, tail=2),), heads=2, window=60, seed=14)
    scores = torch.randn(1, 2, 60, generator=torch.Generator().manual_seed(15))
    chosen = set()
    for max_chunk in range(1, 9):
        world = World(plan)
        before = world.snapshot()
        result = compress(world, 20, backend, query=None, scores=scores, chunk_fraction=0.6, max_chunk=max_chunk)
        check(world, before, result, 20, chunk_fraction=0.6, max_chunk=max_chunk)
        chosen.add(str(result.keep_indices.tolist()))
    assert len(chosen) > 4  # the limit mattered


def test_auto_runs_where_the_tensors_are(backend: str) -> None:
    chosen, automatic = World(ONE_LAYER), World(ONE_LAYER)
    result, expected = compress(automatic, 3, "auto"), compress(chosen, 3, backend)
    assert same_bits(result.seq_lens, expected.seq_lens)
    assert result.keep_indices.shape == expected.keep_indices.shape
    if backend == "torch":
        assert same_result(result, expected)
        chosen.assert_untouched(automatic.snapshot())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("plan", [ONE_LAYER, TWO_LAYERS], ids=["one layer", "two layers"])
def test_reduce_scores_sees_pooled_scores_and_decides(backend: str, plan: Plan, pool: str) -> None:
    """A tensor-parallel engine sums scores there. Here the order is reversed, and selection must follow."""
    world, original = World(plan), World(plan)
    seen: list[torch.Tensor] = []

    def reverse(scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return -scores

    before = world.snapshot()
    result = compress(world, 3, backend, pool=pool, reduce_scores=reverse)
    check(world, before, result, 3)
    [pooled] = seen
    assert pooled.dtype == torch.float32
    assert same_bits(torch.broadcast_to(-pooled, result.scores.shape), result.scores)
    check_scores(original, result._replace(scores=-result.scores), pool=pool)
    if pool == "head":
        assert pooled.shape == result.scores.shape


@pytest.mark.parametrize("options", [
    {}, {"pool": "layer"}, {"pool": "model"}, {"reduce_scores": lambda scores: scores * 2},
    {"redundancy": 0.5, "value_norm": True, "reduction": "rms", "k_scale": torch.tensor([1.0, 2.0, 0.5])},
])  # fmt: skip
def test_layers_scored_in_slices_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Partial rows of long windows are bounded. Here there are three layers and room for two."""
    if not INTERPRETED:
        pytest.skip("runs kernels interpreted")
    plan = Plan((Sequenced(2, tail=1), Sequenced(0)), layers=3, heads=2, window=6, queries=3, dim=4, v_dim=4, seed=5)
    whole, sliced = World(plan), World(plan)
    expected = compress(whole, 3, "triton", **options)
    one_layer = 4 * 2 * 2 * 6 * (1 + options.get("value_norm", 0) + ("redundancy" in options))
    monkeypatch.setattr("kara_kernels.ops.score.PARTIAL_BYTES", 2 * one_layer)
    launches: list[int] = []
    launch = score.launch_score
    monkeypatch.setattr(
        score, "launch_score", lambda partials, *rest: launches.append(len(partials)) or launch(partials, *rest)
    )
    assert same_result(compress(sliced, 3, "triton", **options), expected)
    assert launches == [2, 1]
    caches = zip([*whole.k_caches, *(whole.v_caches or [])], [*sliced.k_caches, *(sliced.v_caches or [])], strict=True)
    assert all(same_bits(a, b) for a, b in caches)


@pytest.mark.parametrize("many", [False, True])
def test_queries_are_read_where_they_lie(backend: str, many: bool) -> None:
    """Rows of a shared buffer, in any order, give the same result as copied queries."""
    plan = Plan(
        (Sequenced(2, tail=1), Sequenced(0)), layers=2 if many else 1, heads=2, group=2, window=6, queries=3, seed=6
    )
    copied, shared = World(plan), World(plan)
    expected = compress(copied, 3, backend)
    rows = torch.tensor([[7, 0, 3], [5, 1, 6]], dtype=torch.int32)
    buffers = [torch.full((9, *query.shape[2:]), float("nan"), dtype=query.dtype) for query in shared.query]
    for buffer, query in zip(buffers, shared.query, strict=True):
        buffer[rows.long()] = query
    given = torch.stack(buffers) if many else buffers[0]
    result = compress(shared, 3, backend, query=given, query_rows=rows)
    assert same_result(result, expected)


def test_reduce_scores_sees_given_scores_too(backend: str) -> None:
    world = World(ONE_LAYER)
    scores = given_scores(world)
    before = world.snapshot()
    result = compress(world, 3, backend, query=None, scores=scores, reduce_scores=lambda x: x * 2 + 1)
    check(world, before, result, 3)
    assert same_bits(result.scores, scores * 2 + 1)


@pytest.mark.parametrize("pool", POOLS)
def test_reduce_scores_may_work_in_place(backend: str, pool: str) -> None:
    """As `torch.distributed.all_reduce` does, which returns nothing."""

    def negate(scores: torch.Tensor) -> None:
        scores.neg_()

    in_place, returned = World(TWO_LAYERS), World(TWO_LAYERS)
    result = compress(in_place, 3, backend, pool=pool, reduce_scores=negate)
    expected = compress(returned, 3, backend, pool=pool, reduce_scores=torch.neg)
    assert same_result(result, expected)


def test_pooled_lists_are_shared(backend: str) -> None:
    by_layer = compress(World(TWO_LAYERS), 3, backend, pool="layer").keep_indices
    assert torch.equal(by_layer, by_layer[:, :, :1].expand_as(by_layer))
    by_model = compress(World(TWO_LAYERS), 3, backend, pool="model").keep_indices
    assert torch.equal(by_model, by_model[:1, :, :1].expand_as(by_model))


@pytest.mark.parametrize("pool", ["layer", "model"])
def test_pooled_scores_are_rounded_once(backend: str, pool: str) -> None:
    """2^24 + 1 is no float32: a mean in float32 loses every one beside it, in whatever order it adds."""
    layers, heads = (1, 5) if pool == "layer" else (5, 1)
    plan = Plan((Sequenced(1, tail=3),), layers=layers, heads=heads, window=4)
    each = torch.tensor([[2.0**24, 0, -(2.0**24), 3]] + [[1.0, 1e-3, 1, 2.0**25]] * 4)
    scores = each.view(layers, 1, heads, 4)
    result = compress(World(plan), 2, backend, query=None, scores=scores if layers > 1 else scores[0], pool=pool)
    exact = [float(sum(map(Fraction, column)) / 5) for column in each.t().tolist()]  # float64, then float32
    assert layered(World(plan), result.scores)[0, 0, 0].tolist() == torch.tensor(exact).tolist()


def test_any_bit_pattern_is_a_score(backend: str) -> None:
    patterns = list(worlds.SPECIAL_BITS)
    plan = Plan((Sequenced(1, tail=3),), window=len(patterns), heads=2, seed=3)
    scores = torch.stack([worlds.from_bits(patterns), worlds.from_bits(patterns[::-1])])[None]
    for keep in (1, 5, 11, 16):
        world = World(plan)
        before = world.snapshot()
        result = compress(world, keep, backend, query=None, scores=scores, chunk_fraction=0.4)
        check(world, before, result, keep, chunk_fraction=0.4)


def test_scores_may_be_an_expanded_view(backend: str) -> None:
    world = World(TWO_LAYERS)
    scores = torch.arange(6.0).expand(2, 2, 2, 6)
    before = world.snapshot()
    check(world, before, compress(world, 3, backend, query=None, scores=scores), 3)


def test_keeping_the_whole_window_changes_nothing(backend: str) -> None:
    world = World(TWO_LAYERS)
    before = world.snapshot()
    result = compress(world, 6, backend)
    world.assert_untouched(before)
    assert result.seq_lens.tolist() == world.lengths
    assert result.keep_indices.tolist() == torch.arange(6).expand(2, 2, 2, 6).tolist()


def test_a_batch_of_skipped_sequences_is_left_alone(backend: str) -> None:
    plan = replace(ONE_LAYER, sequences=(Sequenced(3, overlap=1), Sequenced(2, lacking=1)))
    world = World(plan)
    before = world.snapshot()
    result = compress(world, 3, backend)
    world.assert_untouched(before)
    assert result.seq_lens.tolist() == world.lengths
    assert (result.keep_indices == -1).all()
    assert (result.scores == 0).all()


@pytest.mark.parametrize("limit", ["window_starts", "protected_lens"])
def test_a_start_far_beyond_the_sequence_is_no_window(backend: str, limit: str) -> None:
    """If `start + W` exceeds 32 bits, the window does not fit the sequence, which is skipped."""
    world = World(ONE_LAYER)
    world.skipped[1] = True
    before = world.snapshot()
    setattr(world, limit, torch.tensor([int(getattr(world, limit)[0]), 2**31 - 1], dtype=torch.int32))
    result = compress(world, 3, backend)
    check(world, before, result, 3)
    assert (result.scores[1] == 0).all()


def test_the_largest_window(backend: str) -> None:
    if backend != "torch":
        pytest.skip("the kernels' own tests cover it")
    plan = Plan((Sequenced(5, tail=3),), window=4096, queries=4, page=16, seed=13)
    world = World(plan)
    before = world.snapshot()
    check(world, before, compress(world, 1000, backend), 1000)


def test_compressing_again_behind_what_was_kept(backend: str) -> None:
    """Two rounds on one sequence: the second window starts where the survivors of the first end."""
    plan = Plan((Sequenced(2, tail=6),), heads=2, window=6, queries=6, seed=17)
    world = World(plan)
    before = world.snapshot()
    first = compress(world, 4, backend)
    check(world, before, first, 4)

    world.starts, world.lengths = [2 + 4], first.seq_lens.tolist()
    starts = torch.tensor(world.starts, dtype=torch.int32)
    scores = given_scores(world)
    before = world.snapshot()
    again = {"query": None, "scores": scores, "seq_lens": first.seq_lens, "window_starts": starts}
    second = compress(world, 4, backend, protected_lens=starts, **again)
    check(world, before, second, 4)
    assert second.seq_lens.tolist() == [2 + 4 + 4]


# ---- errors ----------------------------------------------------------------------------------------------
#
# Each case changes the arguments `b` of a good call; the message must contain the words.

Arguments = dict[str, Any]
Change = Callable[[Arguments], dict[str, Any]]


def good_arguments(layers: int, backend: str) -> tuple[World, Arguments]:
    world = World(replace(TWO_LAYERS, layers=layers))
    single = layers == 1
    assert world.v_caches is not None
    arguments = {
        "query": world.query[0] if single else world.query,
        "k_cache": world.k_caches[0] if single else world.k_caches,
        "v_cache": world.v_caches[0] if single else world.v_caches,
        "block_tables": world.block_tables,
        "seq_lens": world.seq_lens,
        "window": 6,
        "keep": 3,
        "window_starts": world.window_starts,
        "protected_lens": world.protected_lens,
        "backend": backend,
    }
    return world, arguments


def expect_error(
    arguments: Arguments,
    world: World,
    change: Change,
    exception: type[Exception] | tuple[type[Exception], ...],
    words: Sequence[str],
) -> None:
    """Checks that the error contains the expected words, and that no byte of any argument has changed.

    A word may list alternatives, "a|b", where two arguments contradict each other.
    """
    changed = {**arguments, **change(arguments)}
    tensors = [x for value in changed.values() for x in (value if isinstance(value, list) else [value])]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    tensors = [x for x in tensors if x.element_size() in worlds.INTEGER]
    copies = [x.clone() for x in tensors]
    before = world.snapshot()
    with pytest.raises(exception) as caught:
        call(changed)
    for word in words:
        assert re.search(rf"(?<!\w)({word})(?!\w)", str(caught.value)), (word, str(caught.value))
    world.assert_untouched(before)
    assert all(same_bits(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def with_entry(name: str, index: Any, value: int) -> Change:
    """One entry of an integer tensor replaced, in a copy."""

    def change(b: Arguments) -> dict[str, Any]:
        tensor = b[name].clone()
        tensor[index] = value
        return {name: tensor}

    return change


def of(name: str, make: Callable[[Any], Any]) -> Change:
    return lambda b: {name: make(b[name])}


# TWO_LAYERS: S 2, H 2, G 2, W 6, N 6, D 4, Dv 4, P 2; sequence 0 has 3 + 6 + 2 tokens, sequence 1 has 1 + 6.
ONE_LAYER_ERRORS: dict[str, tuple[Change, type[Exception], list[str]]] = {
    # numbers
    "keep 0": (lambda b: {"keep": 0}, ValueError, ["keep", "0"]),
    "keep negative": (lambda b: {"keep": -1}, ValueError, ["keep", "-1"]),
    "keep above window": (lambda b: {"keep": 7}, ValueError, ["keep", "6", "7"]),
    "keep a float": (lambda b: {"keep": 3.0}, TypeError, ["keep"]),
    "window 0": (lambda b: {"window": 0}, ValueError, ["window", "0"]),
    "window too large": (lambda b: {"window": 4097}, ValueError, ["window", "4096", "4097"]),
    "window a float": (lambda b: {"window": 6.0}, TypeError, ["window"]),
    "chunk_fraction above 1": (lambda b: {"chunk_fraction": 1.5}, ValueError, ["chunk_fraction", "1.5"]),
    "chunk_fraction negative": (lambda b: {"chunk_fraction": -0.1}, ValueError, ["chunk_fraction", "-0.1"]),
    "chunk_fraction NaN": (lambda b: {"chunk_fraction": float("nan")}, ValueError, ["chunk_fraction", "nan"]),
    "max_chunk 0": (lambda b: {"max_chunk": 0}, ValueError, ["max_chunk", "0"]),
    "max_chunk a float": (lambda b: {"max_chunk": 2.5}, TypeError, ["max_chunk"]),
    "reduction unknown": (lambda b: {"reduction": "max"}, ValueError, ["reduction", "mean", "rms", "max"]),
    "value_norm no bool": (lambda b: {"value_norm": 1}, TypeError, ["value_norm", "int"]),
    "value_norm without values": (
        lambda b: {"value_norm": True, "v_cache": None},
        ValueError,
        ["value_norm", "v_cache", "True"],
    ),
    "value_norm of bytes": (
        lambda b: {"value_norm": True, "v_cache": b["v_cache"].to(torch.int16)},
        TypeError,
        ["v_cache", "torch.int16"],
    ),
    "redundancy negative": (lambda b: {"redundancy": -1.0}, ValueError, ["redundancy", "-1.0"]),
    "redundancy NaN": (lambda b: {"redundancy": float("nan")}, ValueError, ["redundancy", "nan"]),
    "scale a string": (lambda b: {"scale": "1"}, TypeError, ["scale"]),
    # names
    "pool": (lambda b: {"pool": "heads"}, ValueError, ["pool", "heads", "head", "layer", "model"]),
    "attention": (
        lambda b: {"attention": "full"},
        ValueError,
        ["attention", "full", "bidirectional", "causal"],
    ),
    "backend": (lambda b: {"backend": "cuda"}, ValueError, ["backend", "cuda", "auto", "torch", "triton"]),
    # query
    "query missing": (lambda b: {"query": None}, (TypeError, ValueError), ["query"]),
    "query not a tensor": (lambda b: {"query": 3}, (TypeError, ValueError), ["query"]),
    "query of integers": (of("query", lambda x: x.int()), (TypeError, ValueError), ["query", "int32"]),
    "query too flat": (of("query", lambda x: x[0]), ValueError, ["query"]),
    "query of another batch": (of("query", lambda x: x[:1]), ValueError, ["query", "1", "2"]),
    "query of another dimension": (of("query", lambda x: x[..., :3]), ValueError, ["query", "3", "4"]),
    "query heads no multiple": (of("query", lambda x: x[:, :, :3]), ValueError, ["query", "3"]),
    "no queries": (of("query", lambda x: x[:, :0]), ValueError, ["query"]),
    "causal with more queries than window": (
        lambda b: {"query": torch.cat([b["query"], b["query"]], 1), "attention": "causal"},
        ValueError,
        ["query", "12", "6"],
    ),
    # caches
    "k_cache missing": (lambda b: {"k_cache": None}, (TypeError, ValueError), ["k_cache"]),
    "integer keys cannot be scored": (
        lambda b: {"k_cache": b["k_cache"].to(torch.uint8), "v_cache": b["v_cache"].to(torch.uint8)},
        (TypeError, ValueError),
        ["k_cache", "uint8"],
    ),
    "k_cache too flat": (of("k_cache", lambda x: x[0]), ValueError, ["k_cache"]),
    "v_cache too flat": (of("v_cache", lambda x: x[0]), ValueError, ["v_cache"]),
    "v_cache of other blocks": (of("v_cache", lambda x: x[:-1]), ValueError, ["v_cache"]),
    "v_cache of another page": (of("v_cache", lambda x: x[:, :1]), ValueError, ["v_cache"]),
    "v_cache of other heads": (of("v_cache", lambda x: x[:, :, :1]), ValueError, ["v_cache"]),
    "one cache for keys and values": (
        lambda b: {"v_cache": b["k_cache"]},
        ValueError,
        ["v_cache", "k_cache"],
    ),
    "values overlap keys": (lambda b: overlapping(b["k_cache"], shift=3), ValueError, ["v_cache", "k_cache"]),
    "values inside keys": (lambda b: {"v_cache": b["k_cache"][..., :2]}, ValueError, ["v_cache", "k_cache"]),
    "keys of an expanded block": (
        lambda b: {"k_cache": b["k_cache"][:1].expand_as(b["k_cache"])},
        ValueError,
        ["k_cache"],
    ),
    "values of an expanded head": (
        lambda b: {"v_cache": b["v_cache"][:, :, :1].expand_as(b["v_cache"])},
        ValueError,
        ["v_cache"],
    ),
    "rows that overlap": (
        lambda b: {"k_cache": b["k_cache"].contiguous().view(-1).as_strided(b["k_cache"].shape, (16, 8, 3, 1))},
        ValueError,
        ["k_cache"],
    ),
    # tables and lengths
    "block_tables int64": (
        of("block_tables", lambda x: x.long()),
        TypeError,
        ["block_tables", "int32", "int64"],
    ),
    "block_tables too flat": (of("block_tables", lambda x: x[0]), ValueError, ["block_tables"]),
    "block_tables of another batch": (
        of("block_tables", lambda x: x[:1]),
        ValueError,
        ["block_tables|seq_lens", "1", "2"],
    ),
    "seq_lens int64": (of("seq_lens", lambda x: x.long()), TypeError, ["seq_lens", "int32", "int64"]),
    "seq_lens of another batch": (of("seq_lens", lambda x: x[:1]), ValueError, ["seq_lens", "1", "2"]),
    "seq_lens a list": (of("seq_lens", lambda x: x.tolist()), TypeError, ["seq_lens"]),
    "seq_lens beyond the table": (with_entry("seq_lens", 1, 10**6), ValueError, ["seq_lens", "1000000"]),
    "window_starts int64": (
        of("window_starts", lambda x: x.long()),
        TypeError,
        ["window_starts", "int32", "int64"],
    ),
    "window_starts of another batch": (of("window_starts", lambda x: x[:1]), ValueError, ["window_starts"]),
    "window_starts negative": (with_entry("window_starts", 1, -1), ValueError, ["window_starts", "-1"]),
    "protected_lens int64": (
        of("protected_lens", lambda x: x.long()),
        TypeError,
        ["protected_lens", "int32", "int64"],
    ),
    "protected_lens of another batch": (
        of("protected_lens", lambda x: x[:1]),
        ValueError,
        ["protected_lens"],
    ),
    "block id B": (lambda b: bad_block(b, len(b["k_cache"])), ValueError, ["block_tables"]),
    "block id -1": (lambda b: bad_block(b, -1), ValueError, ["block_tables", "-1"]),
    "block id of the first token": (
        with_entry("block_tables", (1, 0), 2**31 - 1),
        ValueError,
        ["block_tables"],
    ),
    # scores
    "scores half": (
        lambda b: {"scores": torch.zeros(2, 2, 6).half()},
        TypeError,
        ["scores", "float32", "float16"],
    ),
    "scores too short": (lambda b: {"scores": torch.zeros(2, 2, 5)}, ValueError, ["scores", "5", "6"]),
    "scores of other heads": (lambda b: {"scores": torch.zeros(2, 1, 6)}, ValueError, ["scores"]),
    "scores with layers": (lambda b: {"scores": torch.zeros(1, 2, 2, 6)}, ValueError, ["scores"]),
    "k_scale of another shape": (lambda b: {"k_scale": torch.ones(3)}, ValueError, ["k_scale", "3"]),
    "k_scale a string": (lambda b: {"k_scale": "1"}, TypeError, ["k_scale"]),
    "reduce_scores changes the shape": (
        lambda b: {"reduce_scores": lambda scores: scores[..., :2]},
        ValueError,
        ["reduce_scores"],
    ),
    "reduce_scores changes the dtype": (
        lambda b: {"reduce_scores": lambda scores: scores.double()},
        TypeError,
        ["reduce_scores", "float32", "float64"],
    ),
    "reduce_scores not callable": (lambda b: {"reduce_scores": 3}, TypeError, ["reduce_scores"]),
    # devices
    "query on another device": (of("query", lambda x: x.to("meta")), ValueError, ["query", "cpu", "meta"]),
    "v_cache on another device": (
        of("v_cache", lambda x: x.to("meta")),
        ValueError,
        ["v_cache", "cpu", "meta"],
    ),
    "tables on another device": (
        of("block_tables", lambda x: x.to("meta")),
        ValueError,
        ["block_tables", "cpu", "meta"],
    ),
    "lengths on another device": (
        of("seq_lens", lambda x: x.to("meta")),
        ValueError,
        ["seq_lens", "cpu", "meta"],
    ),
    "scores on another device": (
        lambda b: {"scores": torch.zeros(2, 2, 6, device="meta")},
        ValueError,
        ["scores", "cpu", "meta"],
    ),
}


def bad_block(b: Arguments, value: int) -> dict[str, Any]:
    """An impossible id in the last entry that sequence 0 uses: token 10 of 11, in blocks of two."""
    return with_entry("block_tables", (0, 5), value)(b)


def overlapping(cache: torch.Tensor, shift: int) -> dict[str, Any]:
    """Keys and values cut out of the same rows, overlapping by one element."""
    *outer, dim = cache.shape
    rows = torch.zeros(*outer, dim + shift)
    return {"k_cache": rows[..., :dim], "v_cache": rows[..., shift:]}


@pytest.mark.parametrize(("change", "exception", "words"), list(ONE_LAYER_ERRORS.values()), ids=list(ONE_LAYER_ERRORS))
def test_bad_arguments_are_named_and_nothing_is_written(
    backend: str, change: Change, exception: type[Exception], words: list[str]
) -> None:
    world, arguments = good_arguments(1, backend)
    expect_error(arguments, world, change, exception, words)


MANY_LAYERS_ERRORS: dict[str, tuple[Change, type[Exception], list[str]]] = {
    "a layer listed twice": (
        lambda b: {"k_cache": [b["k_cache"][0]] * 2},
        ValueError,
        ["k_cache"],
    ),
    "values of a layer listed twice": (
        lambda b: {"v_cache": [b["v_cache"][0]] * 2},
        ValueError,
        ["v_cache"],
    ),
    "keys of one layer are values of another": (
        lambda b: {"v_cache": [b["v_cache"][0], b["k_cache"][0]]},
        ValueError,
        ["v_cache", "k_cache"],
    ),
    "layers of an expanded stack": (
        lambda b: {"k_cache": b["k_cache"][0].expand(2, *b["k_cache"][0].shape)},
        ValueError,
        ["k_cache"],
    ),
    "fewer values than keys": (lambda b: {"v_cache": b["v_cache"][:1]}, ValueError, ["v_cache", "1", "2"]),
    "fewer queries than layers": (lambda b: {"query": b["query"][:1]}, ValueError, ["query", "1", "2"]),
    "a single query for many layers": (
        lambda b: {"query": b["query"][0]},
        (TypeError, ValueError),
        ["query"],
    ),
    "no layers": (lambda b: {"query": [], "k_cache": [], "v_cache": []}, ValueError, ["k_cache|query"]),
    "layers of different shapes": (
        lambda b: {"k_cache": [b["k_cache"][0], b["k_cache"][1][..., :3].clone()]},
        ValueError,
        ["k_cache"],
    ),
    "layers of different dtypes": (
        lambda b: {"k_cache": [b["k_cache"][0], b["k_cache"][1].half()]},
        (TypeError, ValueError),
        ["k_cache", "float16"],
    ),
    "queries of different shapes": (
        lambda b: {"query": [b["query"][0], b["query"][1][:, :5]]},
        ValueError,
        ["query"],
    ),
    "a cache that is no tensor": (lambda b: {"k_cache": [b["k_cache"][0], 3]}, TypeError, ["k_cache"]),
    "scores without layers": (lambda b: {"scores": torch.zeros(2, 2, 6)}, ValueError, ["scores"]),
}


@pytest.mark.parametrize(
    ("change", "exception", "words"), list(MANY_LAYERS_ERRORS.values()), ids=list(MANY_LAYERS_ERRORS)
)
def test_bad_layers_are_named_and_nothing_is_written(
    backend: str, change: Change, exception: type[Exception], words: list[str]
) -> None:
    world, arguments = good_arguments(2, backend)
    expect_error(arguments, world, change, exception, words)


def test_kernels_need_a_last_dimension_of_stride_1(backend: str) -> None:
    if backend == "torch":
        pytest.skip("the reference takes any strides")
    world = World(replace(ONE_LAYER, layout="k_transposed"))
    before = world.snapshot()
    with pytest.raises(ValueError, match="k_cache"):
        compress(world, 3, backend)
    world.assert_untouched(before)


def test_unused_table_entries_are_not_looked_at(backend: str) -> None:
    """Engines leave garbage after the entries in use. Every world does too; here all of it is out of range."""
    world = World(ONE_LAYER)
    before = world.snapshot()
    tables = torch.full((2, 9), 2**31 - 1, dtype=torch.int32)
    for row, table in zip(tables, world.tables, strict=True):
        row[: len(table)] = torch.tensor(table, dtype=torch.int32)
    check(world, before, compress(world, 3, backend, block_tables=tables), 3)


def test_a_full_table_is_long_enough(backend: str) -> None:
    """`seq_len` may be as large as the table's capacity, not one larger."""
    world = World(replace(ONE_LAYER, sequences=(Sequenced(4, tail=2), Sequenced(2))))
    exact = world.block_tables[:, :6]  # twelve tokens in blocks of two
    before = world.snapshot()
    check(world, before, compress(world, 3, backend, block_tables=exact), 3)

    world = World(replace(ONE_LAYER, sequences=(Sequenced(4, tail=2), Sequenced(2))))
    before = world.snapshot()
    with pytest.raises(ValueError, match="seq_lens"):
        compress(world, 3, backend, block_tables=world.block_tables[:, :5])
    world.assert_untouched(before)


CANNOT_RUN = """
import torch
from kara_kernels import compress_window
cache = torch.zeros(2, 4, 1, 4)
try:
    compress_window(torch.zeros(1, 4, 1, 4), cache, cache.clone(), torch.zeros(1, 2, dtype=torch.int32),
                    torch.tensor([4], dtype=torch.int32), window=4, keep=2, backend="triton")
except (ValueError, RuntimeError, ImportError) as error:
    assert "triton" in str(error).lower(), error
    assert not cache.any()
    print("refused")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens where Triton cannot run")
def test_triton_is_refused_where_it_cannot_run() -> None:
    """In a separate process, because the interpreter is enabled for a whole process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "KARA"))}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", CANNOT_RUN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused", done.stderr
