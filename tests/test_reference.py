"""The PyTorch reference against the plain-Python oracle and the specified properties.

Indices and moved bytes must match exactly, scores must match float64 within `worlds.allowed_error`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import oracle
import pytest
import torch
import worlds
from hypothesis import example, given, settings
from worlds import FP8, Plan, Sequenced, World, plans

from kara_kernels import reference

few = settings(max_examples=30, deadline=None)
many = settings(max_examples=60, deadline=None)

ALL_LAYOUTS = (*worlds.LAYOUTS, "k_transposed")
SCORED_DTYPES = (*worlds.FLOATS, *FP8)
MOVED_DTYPES = (*SCORED_DTYPES, torch.uint8, torch.int8)


def score(world: World, layer: int = 0, value_norm: bool = False, **options: object) -> torch.Tensor:
    if value_norm:
        options["v_cache"] = world.v_caches[layer]
    return reference.score_window(
        world.query[layer],
        world.k_caches[layer],
        world.block_tables,
        world.window_starts,
        world.plan.window,
        **options,
    )


def score_alone(world: World, s: int, **options: object) -> torch.Tensor:
    """The scores of one sequence when it is the whole batch."""
    only = slice(s, s + 1)
    return reference.score_window(
        world.query[0][only],
        world.k_caches[0],
        world.block_tables[only],
        world.window_starts[only],
        world.plan.window,
        **options,
    )


def bounds(world: World, exact: torch.Tensor, value_norm: bool = False, **options: object) -> torch.Tensor:
    """The allowed error of each sequence's scores, shaped to compare with `[S, H, W]`."""
    limits = [
        worlds.allowed_error(
            world.query[0][s], world.read_keys(0, s), exact[s], values=world.read_values(0, s) if value_norm else None,
            **options,
        )
        for s in range(len(world.starts))
    ]  # fmt: skip
    return torch.tensor(limits, dtype=torch.float64).view(-1, 1, 1)


def exact_scores(world: World, **options: object) -> torch.Tensor:
    rows = [world.oracle_scores(0, s, **options) for s in range(len(world.starts))]
    return torch.tensor(rows, dtype=torch.float64)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(worlds.bits(a), worlds.bits(b))


# ---- score_window ----------------------------------------------------------------------------------------


@many
@given(
    plan=plans(layouts=ALL_LAYOUTS),
    scale=st.sampled_from([None, 0.3, 2.0]),
    reduction=st.sampled_from(["mean", "rms"]),
    value_norm=st.booleans(),
    redundancy=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_scores_match_the_oracle(
    plan: Plan, scale: float | None, reduction: str, value_norm: bool, redundancy: float
) -> None:
    world = World(plan).give_values()
    before = world.snapshot()
    options = {"scale": scale, "reduction": reduction, "value_norm": value_norm, "redundancy": redundancy}
    scores = score(world, **options)
    world.assert_untouched(before)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(plan.sequences), plan.heads, plan.window)
    exact = exact_scores(world, **options)
    error = (scores.double() - exact).abs()
    assert (error <= bounds(world, exact, **options)).all()


@many
@given(
    plan=plans(more_queries=False, layouts=ALL_LAYOUTS),
    reduction=st.sampled_from(["mean", "rms"]),
    redundancy=st.sampled_from([0.0, 1.0]),
)
def test_causal_scores_match_the_oracle(plan: Plan, reduction: str, redundancy: float) -> None:
    world = World(plan)
    options = {"reduction": reduction, "redundancy": redundancy}
    scores = score(world, attention="causal", **options)
    exact = exact_scores(world, causal=True, **options)
    error = (scores.double() - exact).abs()
    assert (error <= bounds(world, exact, causal=True, **options)).all()


@few
@given(plan=plans(dtypes=FP8), k_scale=st.sampled_from([None, 1.0, 0.25, 0.3]), as_tensor=st.booleans())
def test_fp8_keys_are_scored_with_their_scale(plan: Plan, k_scale: float | None, as_tensor: bool) -> None:
    world = World(plan)
    value = 1.0 if k_scale is None else float(torch.tensor(k_scale))  # float32, as a kernel receives it
    given_scale = torch.tensor([value]) if as_tensor and k_scale is not None else k_scale
    scores = score(world, k_scale=given_scale)
    exact = exact_scores(world, k_scale=value)
    assert ((scores.double() - exact).abs() <= bounds(world, exact, k_scale=value)).all()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", worlds.FLOATS)
def test_large_windows_match_float64(dtype: torch.dtype, attention: str) -> None:
    """More queries, keys and dimensions than a tile holds. Dense float64 replaces the oracle."""
    sequence = Sequenced(5, tail=3)
    plan = Plan((sequence, sequence), 1, 2, 4, 300, 300, 96, 96, 16, dtype=dtype, query_dtype=dtype, seed=1)
    world = World(plan)
    causal = attention == "causal"
    rows = [
        worlds.dense_scores(world.query[0][s], world.read_keys(0, s), dtype=torch.float64, causal=causal)
        for s in range(2)
    ]
    exact = torch.stack(rows)
    scores = score(world, attention=attention)
    assert ((scores.double() - exact).abs() <= bounds(world, exact, causal=causal)).all()


@few
@given(plan=plans(), causal=st.booleans())
def test_scores_are_a_distribution(plan: Plan, causal: bool) -> None:
    plan = replace(plan, queries=min(plan.queries, plan.window)) if causal else plan
    scores = score(World(plan), attention="causal" if causal else "bidirectional")
    assert (scores >= 0).all()
    # W rounded scores, each the mean of N*G rounded attentions: a unit roundoff for each addition.
    roundings = plan.window + plan.queries * plan.group + 8
    assert ((scores.double().sum(-1) - 1).abs() <= roundings * torch.finfo(torch.float32).eps).all()


@few
@given(plan=plans(), data=st.data())
def test_the_order_of_queries_does_not_matter(plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    scores, limit = score(world), bounds(world, exact_scores(world))
    order = data.draw(st.permutations(range(plan.queries)))
    world.query[0].copy_(world.query[0][:, order].clone())
    assert ((score(world).double() - scores.double()).abs() <= 2 * limit).all()


@few
@given(plan=plans(), data=st.data(), redundancy=st.sampled_from([0.0, 1.0]))
def test_permuting_keys_permutes_scores(plan: Plan, data: st.DataObject, redundancy: float) -> None:
    world = World(plan)
    scores = score(world, redundancy=redundancy)
    limit = bounds(world, exact_scores(world, redundancy=redundancy), redundancy=redundancy)
    order = data.draw(st.permutations(range(plan.window)))
    for s in range(len(world.starts)):
        world.write_keys(0, s, world.read_keys(0, s)[order])
    moved = score(world, redundancy=redundancy)
    assert ((moved.double() - scores[..., order].double()).abs() <= 2 * limit).all()


@few
@given(plan=plans(contents=("integers",)))
def test_a_constant_added_to_all_keys_changes_nothing(plan: Plan) -> None:
    """Small integers, so that the shifted keys are exact in every dtype."""
    world = World(plan)
    scores, limit = score(world), bounds(world, exact_scores(world))
    shift = torch.randint(-4, 5, (plan.dim,), generator=world.generator).to(plan.dtype)
    for s in range(len(world.starts)):
        world.write_keys(0, s, world.read_keys(0, s) + shift)
    limit = limit + bounds(world, exact_scores(world))  # larger keys, larger logits, more to round
    assert ((score(world).double() - scores.double()).abs() <= limit).all()


@many
@given(
    plan=plans(dtypes=SCORED_DTYPES, layouts=ALL_LAYOUTS),
    causal=st.booleans(),
    redundancy=st.sampled_from([0.0, 1.0]),
)
def test_scores_do_not_depend_on_the_batch(plan: Plan, causal: bool, redundancy: float) -> None:
    plan = replace(plan, queries=min(plan.queries, plan.window)) if causal else plan
    world = World(plan)
    options = {"attention": "causal" if causal else "bidirectional", "redundancy": redundancy}
    scores = score(world, **options)
    for s in range(len(world.starts)):
        assert same_bits(score_alone(world, s, **options), scores[s : s + 1])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seqs", [2, 7])
def test_large_scores_do_not_depend_on_the_batch(seqs: int, dim: int) -> None:
    """Sizes for which matrix products change their blocking with the batch."""
    plan = Plan(tuple(Sequenced(s, tail=s) for s in range(seqs)), 1, 2, 4, 128, 128, dim, dim, 16, seed=2)
    world = World(plan)
    scores = score(world)
    for s in range(seqs):
        assert same_bits(score_alone(world, s), scores[s : s + 1])


@few
@given(plan=plans(max_window=8))
def test_a_broken_sequence_does_not_leak_into_others(plan: Plan) -> None:
    world = World(plan)
    healthy = score(world)
    world.write_keys(0, 0, torch.full_like(world.read_keys(0, 0), torch.nan))
    assert same_bits(score(world)[1:], healthy[1:])


@many
@given(plan=plans(max_layers=2, more_queries=False), causal=st.booleans(), stacked=st.booleans())
@example(  # queries at addresses for which the BLAS rounds otherwise
    plan=Plan(group=2, window=5, queries=5, dim=8, v_dim=8, page=1, guard=67), causal=False, stacked=False
)
def test_queries_are_found_by_their_rows(plan: Plan, causal: bool, stacked: bool) -> None:
    """Gives the same bits as copying each sequence's queries out of the shared buffer."""
    world = World(plan)
    buffers, rows = worlds.queries_by_row(world)
    rest = world.k_caches, world.block_tables, world.window_starts, plan.window
    attention = "causal" if causal else "bidirectional"
    copied = reference.score_window(world.query, *rest, attention=attention)
    buffer = torch.stack(buffers) if stacked else buffers
    assert same_bits(reference.score_window(buffer, *rest, attention=attention, query_rows=rows), copied)
    one = reference.score_window(
        buffers[-1], rest[0][-1], *rest[1:], attention=attention, query_rows=rows
    )  # no layers, no leading L
    assert same_bits(one, copied[-1])


def test_sequences_may_share_queries_and_name_them_twice() -> None:
    world = World(Plan(sequences=(Sequenced(2), Sequenced(5, tail=1)), heads=2, group=2, queries=4))
    rows = torch.tensor([[1, 0, 1, 2], [1, 2, 2, 2]], dtype=torch.int32)
    rest = world.k_caches[0], world.block_tables, world.window_starts, 4
    copied = reference.score_window(torch.stack([world.query[0][1][row] for row in rows.tolist()]), *rest)
    assert same_bits(reference.score_window(world.query[0][1], *rest, query_rows=rows), copied)


def test_equal_keys_score_equally() -> None:
    world = World(Plan((Sequenced(3, tail=2),), window=8, queries=5, group=2, content="equal"))
    assert same_bits(score(world), torch.full((1, 1, 8), 0.125))


# ---- select_topk and expand_chunks -----------------------------------------------------------------------


@many
@given(scores=worlds.score_rows(), data=st.data())
def test_select_topk_matches_the_oracle(scores: torch.Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, scores.shape[-1]))
    before = scores.clone()
    indices = reference.select_topk(scores, k)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [oracle.select_topk(row, k) for row in scores.tolist()]
    assert same_bits(scores, before)


@many
@given(scores=worlds.score_rows(), data=st.data())
def test_expand_chunks_matches_the_oracle(scores: torch.Tensor, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, scores.shape[-1]))
    budget = data.draw(st.integers(0, keep - 1))
    max_chunk = data.draw(st.integers(1, 12))
    indices = reference.expand_chunks(scores, keep, budget, max_chunk)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [oracle.expand_chunks(row, keep, budget, max_chunk) for row in scores.tolist()]


@many
@given(scores=worlds.score_rows(max_rows=2), data=st.data())
def test_chunks_keep_exactly_k_ascending_positions(scores: torch.Tensor, data: st.DataObject) -> None:
    width = scores.shape[-1]
    keep = data.draw(st.integers(1, width))
    budget = data.draw(st.integers(0, keep - 1))
    for row in reference.expand_chunks(scores, keep, budget, data.draw(st.integers(1, 12))).tolist():
        assert len(row) == keep
        assert all(a < b for a, b in pairwise(row))
        assert row[0] >= 0
        assert row[-1] < width


@few
@given(scores=worlds.score_rows(), data=st.data())
def test_no_chunk_budget_is_plain_topk(scores: torch.Tensor, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, scores.shape[-1]))
    assert same_bits(reference.expand_chunks(scores, keep, 0, 8), reference.select_topk(scores, keep))


def test_selection_ranks_denormals_apart_from_zero() -> None:
    scores = worlds.from_bits([0x00000000, 0x00000001, 0x80000001, 0x80000000])
    assert reference.select_topk(scores, 1).tolist() == [1]
    assert reference.select_topk(scores, 3).tolist() == [0, 1, 3]  # the negative denormal is below both zeros


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 2, 2, 7)])
def test_selection_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    rows = scores.view(-1, shape[-1]).tolist()
    for indices, of in (
        (reference.select_topk(scores, 3), [oracle.select_topk(row, 3) for row in rows]),
        (reference.expand_chunks(scores, 4, 2, 5), [oracle.expand_chunks(row, 4, 2, 5) for row in rows]),
    ):
        assert indices.shape[:-1] == shape[:-1]
        assert indices.view(-1, indices.shape[-1]).tolist() == of


def test_selection_takes_any_strides() -> None:
    base = torch.randn(9, 4, generator=torch.Generator().manual_seed(4))
    for scores in (base.t(), base.t()[:, ::2], base.t()[:1].expand(3, 9)):
        assert same_bits(reference.select_topk(scores, 3), reference.select_topk(scores.contiguous(), 3))
        chunks = reference.expand_chunks(scores, 4, 2, 5)
        assert same_bits(chunks, reference.expand_chunks(scores.contiguous(), 4, 2, 5))


@pytest.mark.parametrize("width", [1024, 4096])
def test_wide_rows_full_of_ties(width: int) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.randint(0, 40, (2, width), generator=generator).float()
    scores[:, ::7] = math.nan
    keep = width // 3
    chosen = reference.expand_chunks(scores, keep, keep // 2, 8).tolist()
    assert chosen == [oracle.expand_chunks(row, keep, keep // 2, 8) for row in scores.tolist()]


@few
@given(scores=worlds.score_rows(), data=st.data())
def test_a_row_is_selected_alone_as_in_a_batch(scores: torch.Tensor, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, scores.shape[-1]))
    budget = data.draw(st.integers(0, keep - 1))
    together = reference.expand_chunks(scores, keep, budget, 6)
    for r in range(len(scores)):
        assert same_bits(reference.expand_chunks(scores[r : r + 1], keep, budget, 6), together[r : r + 1])


# ---- compact_blocks --------------------------------------------------------------------------------------


@many
@given(plan=plans(dtypes=MOVED_DTYPES, layouts=ALL_LAYOUTS, skips=True, latent=True), data=st.data())
def test_compaction_moves_bytes_and_nothing_else(plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    keep = data.draw(worlds.keep_lists(plan, data.draw(st.integers(1, plan.window))))
    before = world.snapshot()
    new_lens = reference.compact_blocks(
        world.k_caches[0],
        world.v_caches[0] if world.v_caches else None,
        world.block_tables,
        world.window_starts,
        world.seq_lens,
        torch.tensor(keep[0], dtype=torch.int32),
        plan.window,
    )
    lengths = world.assert_compacted(before, keep)
    assert new_lens.dtype == torch.int32
    assert new_lens.tolist() == lengths


@many
@given(
    plan=plans(max_layers=3, dtypes=MOVED_DTYPES, layouts=ALL_LAYOUTS, skips=True, latent=True),
    data=st.data(),
)
def test_many_layers_are_compacted_in_one_call(plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    keep = data.draw(worlds.keep_lists(plan, data.draw(st.integers(1, plan.window))))
    before = world.snapshot()
    new_lens = reference.compact_blocks(
        world.k_caches,
        world.v_caches,
        world.block_tables,
        world.window_starts,
        world.seq_lens,
        torch.tensor(keep, dtype=torch.int32),
        plan.window,
    )
    assert new_lens.tolist() == world.assert_compacted(before, keep)


def test_the_start_of_a_sequence_left_alone_is_not_checked() -> None:
    world = World(Plan((Sequenced(2, tail=1), Sequenced(3)), window=4))
    keep = [[[[0, 3]], [[-1, -1]]]]
    starts = world.window_starts.clone()
    starts[1] = -5
    before = world.snapshot()
    new_lens = reference.compact_blocks(
        world.k_caches[0],
        world.v_caches[0],
        world.block_tables,
        starts,
        world.seq_lens,
        torch.tensor(keep[0], dtype=torch.int32),
        4,
    )
    assert new_lens.tolist() == world.assert_compacted(before, keep)


def test_keeping_the_whole_window_moves_nothing() -> None:
    world = World(Plan((Sequenced(3, tail=4),), window=6))
    before = world.snapshot()
    new_lens = reference.compact_blocks(
        world.k_caches[0],
        world.v_caches[0],
        world.block_tables,
        world.window_starts,
        world.seq_lens,
        torch.arange(6, dtype=torch.int32).view(1, 1, 6),
        6,
    )
    world.assert_untouched(before)
    assert new_lens.tolist() == world.lengths


def test_heads_of_a_layer_keep_different_tokens() -> None:
    world = World(Plan((Sequenced(1, tail=2),), heads=3, window=5))
    keep = [[[[0, 1], [2, 4], [3, 4]]]]
    before = world.snapshot()
    reference.compact_blocks(
        world.k_caches[0],
        world.v_caches[0],
        world.block_tables,
        world.window_starts,
        world.seq_lens,
        torch.tensor(keep[0], dtype=torch.int32),
        5,
    )
    world.assert_compacted(before, keep)
