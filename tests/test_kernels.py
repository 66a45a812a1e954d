"""Each kernel against the reference, interpreted or, with TRITON_INTERPRET=0, on a GPU: indices and bytes match
exactly, scores within rounding.

`test_compiled.py` and `test_emulated.py` check what the interpreter cannot see: races, missing barriers, widths.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import worlds
from conftest import INTERPRETED
from hypothesis import given, settings
from on_gpu import ON_GPU, lent
from worlds import FP8, Plan, Sequenced, World, plans

import kara_kernels
from kara_kernels import CompressedWindow, reference
from kara_kernels.ops import compact, compact_blocks, expand_chunks, pack_queries, score_window, select_topk
from kara_kernels.ops._tiles import score_config
from kara_kernels.ops._triton import ARCHITECTURES

pytestmark = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="needs the interpreter or a GPU")

few = settings(max_examples=4 if ON_GPU else 12)  # on a GPU, most examples compile kernels
many = settings(max_examples=15 if ON_GPU else 40)
compress_window = lent(kara_kernels.compress_window)
ops = SimpleNamespace(
    score_window=lent(score_window), select_topk=lent(select_topk), expand_chunks=lent(expand_chunks),
    compact_blocks=lent(compact_blocks),
)  # fmt: skip
REDUCTIONS = st.sampled_from(["mean", "rms"])
MOVED_DTYPES = (*worlds.FLOATS, *FP8, torch.uint8, torch.int8)


def score(world: World, module: Any, layer: int | None = None, **options: object) -> torch.Tensor:
    query, keys = world.query, world.k_caches
    if layer is not None:
        query, keys = query[layer], keys[layer]
    return module.score_window(query, keys, world.block_tables, world.window_starts, world.plan.window, **options)


def assert_scores_agree(world: World, value_norm: bool = False, **options: object) -> None:
    """Kernel and reference are within the bound of float64 in every layer, and nothing is written."""
    given = {**options, "v_cache": world.give_values().v_caches} if value_norm else options
    before = world.snapshot()
    kernel = score(world, ops, backend="triton", **given)
    world.assert_untouched(before)
    twin = score(world, reference, **given)
    assert kernel.shape == twin.shape
    causal = options.pop("attention", "bidirectional") == "causal"
    for layer in range(world.plan.layers):
        for s in range(len(world.starts)):
            query, keys = world.query[layer][s], world.read_keys(layer, s)
            options["values"] = world.read_values(layer, s) if value_norm else None
            exact = worlds.dense_scores(query, keys, dtype=torch.float64, causal=causal, **options)
            bound = worlds.allowed_error(query, keys, exact, causal=causal, **options)
            assert (kernel[layer, s].double() - exact).abs().max() <= bound
            assert (twin[layer, s].double() - exact).abs().max() <= bound


@few
@given(plan=plans(max_layers=2), reduction=REDUCTIONS, value_norm=st.booleans(), redundancy=st.sampled_from([0.0, 0.5]))
def test_scores_agree(plan: Plan, reduction: str, value_norm: bool, redundancy: float) -> None:
    assert_scores_agree(World(plan), reduction=reduction, value_norm=value_norm, redundancy=redundancy)


@few
@given(plan=plans(more_queries=False), reduction=REDUCTIONS)
def test_causal_scores_agree(plan: Plan, reduction: str) -> None:
    assert_scores_agree(World(plan), attention="causal", reduction=reduction)


@few
@given(plan=plans(dtypes=FP8), k_scale=st.sampled_from([1.0, 0.3]), value_norm=st.booleans())
def test_fp8_scores_agree(plan: Plan, k_scale: float, value_norm: bool) -> None:
    assert_scores_agree(World(plan), k_scale=k_scale, value_norm=value_norm)


# Each row takes a different path through the kernel: (window, queries, group, dim, dtype, one pass).
WAYS = {
    "whole, two programs": (256, 256, 3, 64, torch.bfloat16, True),
    "whole, head dimension of two parts": (60, 64, 2, 80, torch.float16, True),
    "whole, head dimension not of sixteens": (33, 33, 1, 72, torch.bfloat16, True),
    "whole, sliced": (140, 140, 4, 576, torch.bfloat16, True),
    "streamed, several key and query tiles": (200, 256, 3, 24, torch.float32, False),
    "streamed, latent cache": (70, 40, 4, 576, torch.float32, False),
    "streamed for width": (1500, 70, 2, 16, torch.bfloat16, False),
}


@pytest.mark.parametrize("reduction", ["mean", "rms"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_the_score_kernel(way: str, attention: str, reduction: str) -> None:
    window, queries, group, dim, dtype, whole = WAYS[way]
    queries = min(queries, window) if attention == "causal" else queries
    assert score_config(window, dim, dtype, ARCHITECTURES[80]).whole == whole
    world = World(
        Plan(
            sequences=(Sequenced(start=5, tail=3),), group=group, window=window, queries=queries, dim=dim, v_dim=dim,
            page=16, dtype=dtype, query_dtype=dtype,
        )
    )  # fmt: skip
    extra = {"redundancy": 0.5, "value_norm": True} if attention == "bidirectional" else {}
    assert_scores_agree(world, attention=attention, reduction=reduction, **extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_float32_products_beyond_float32(sign: int, causal: bool, dtype: torch.dtype) -> None:
    """Logits that float32 holds, of products that it does not: in the kernel as in the reference. Any keys."""
    plan = Plan((Sequenced(3, tail=2),), layers=2, group=2, window=70, queries=40, dim=64, v_dim=64, dtype=dtype)
    world = worlds.huge_products(plan)
    how = {"scale": sign * worlds.HUGE_SCALE, "attention": "causal" if causal else "bidirectional"}
    for module, options in ((ops, {"backend": "triton"}), (reference, {})):
        scores = score(world, module, **how, **options)
        worlds.assert_scores_of_huge_products(world, scores, scale=how["scale"], causal=causal)


@pytest.mark.parametrize("window", [64, 52])  # without and with keys of a tile that nobody sees
@pytest.mark.parametrize("dim", [64, 576, 24])  # whole, sliced, streamed
@pytest.mark.parametrize("packed", [False, True])
def test_scales_of_any_sign(window: int, dim: int, packed: bool) -> None:
    """The greatest logit of a row belongs to the smallest product where the scale is negative."""
    dtype = torch.float32 if dim == 24 else torch.bfloat16
    plan = Plan((Sequenced(3, tail=2),), heads=3, group=2, window=window, queries=50, dim=dim, v_dim=dim, page=16,
                dtype=dtype, query_dtype=dtype)  # fmt: skip
    world = World(plan)
    if packed:
        world.query = pack_queries(torch.stack(world.query))
        world.query.scales[..., ::2] *= -1
    else:
        assert_scores_agree(world, scale=-20.0)
    by_head = torch.tensor([0.5, -0.5, 0.0])
    # So large that powers of a wrong one's distances leave float32.
    for options in ({"scale": -20.0}, {"scale": 20.0, "k_scale": by_head}, {"scale": -20.0, "k_scale": by_head}):
        found, expected = score(world, ops, backend="triton", **options), score(world, reference, **options)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)
    assert not torch.allclose(found[:, :, 0], found[:, :, 1], rtol=1e-2)


def test_bfloat16_products_beyond_float32_are_no_scores() -> None:
    """What `score_window` says of them. The reference, in float32, scales before the product."""
    dtype = torch.bfloat16
    plan = Plan((Sequenced(),), heads=2, window=33, queries=20, dim=64, v_dim=64, dtype=dtype, query_dtype=dtype)
    world = worlds.huge_products(plan)
    world.query[0][:, :, 1] /= worlds.HUGE  # only products of head 0 leave float32
    scores = score(world, ops, scale=worlds.HUGE_SCALE, backend="triton")[0, 0]
    assert scores[0].isnan().all()
    assert scores[1].isfinite().all()
    assert score(world, reference, scale=worlds.HUGE_SCALE).isfinite().all()


@pytest.mark.parametrize("magnitude", [-3.3e38, 3.3e38])
def test_logits_at_the_edges_of_float32(magnitude: float) -> None:
    """All equal, so that attention is even; streamed, where a row's peak starts from below."""
    keys, query = torch.full((1, 16, 1, 8), magnitude), torch.zeros(1, 1, 1, 8)
    query[..., 0] = 1
    table, start = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for module, options in ((ops, {"backend": "triton"}), (reference, {})):
        scores = module.score_window(query, keys, table, start, 16, scale=0.6931471, **options)
        assert torch.allclose(scores, torch.tensor(1 / 16))


@pytest.mark.parametrize("reduction", ["mean", "rms"])
def test_more_queries_than_a_program_takes(reduction: str) -> None:
    """Several partial rows of sums come before those of norms and redundancy."""
    plan = Plan(sequences=(Sequenced(start=1, tail=0),), heads=2, group=2, window=20, queries=1100, dim=16, v_dim=16)
    assert_scores_agree(World(plan), reduction=reduction, value_norm=True, redundancy=0.5)


def test_what_few_queries_need_much_counts_more_in_squares() -> None:
    """Head 0 always attends to key 0. Head 1 attends to key 1 in one of four queries, and to key 2 in the others."""
    keys = torch.zeros(1, 4, 1, 4)
    keys[0, :, 0] = torch.eye(4) * 100
    query = torch.zeros(1, 4, 2, 4)
    query[0, :, 0, 0] = 1
    query[0, 0, 1, 1], query[0, 1:, 1, 2] = 1, 1
    table, start = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for module, options in ((ops, {"backend": "triton"}), (reference, {})):
        mean, rms = (
            module.score_window(query, keys, table, start, 4, scale=1.0, reduction=reduction, **options)[0, 0]
            for reduction in ("mean", "rms")
        )
        assert mean.tolist() == pytest.approx([0.5, 0.125, 0.375, 0], abs=1e-6)
        assert rms.tolist() == pytest.approx([0.5**0.5, 0.125**0.5, 0.375**0.5, 0], abs=1e-6)


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e25])
def test_lengths_at_the_edges_of_float32(magnitude: float) -> None:
    values = torch.randn(1, 16, 1, 8, generator=torch.Generator().manual_seed(0)) * magnitude
    values[0, 3] = 0
    table, start = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    keys, query = torch.zeros(1, 16, 1, 8), torch.zeros(1, 1, 1, 8)  # attends evenly
    exact = values[0, :, 0].double().norm(dim=-1) / 16
    for module, options in ((ops, {"backend": "triton"}), (reference, {})):
        scores = module.score_window(query, keys, table, start, 16, v_cache=values, **options)
        assert torch.allclose(scores[0, 0].double(), exact, rtol=1e-5 if magnitude > 1e-38 else 0.1, atol=2e-45)


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e25])
def test_redundancy_at_the_edges_of_float32(magnitude: float) -> None:
    """Squares of such keys are zero or infinite in float32, but cosines are not. A zero key has cosine 0."""
    keys = torch.randn(1, 16, 1, 8) * magnitude
    keys[0, 3] = 0
    table, start = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    wide = keys[0, :, 0].double()
    unit = wide / torch.where(wide.norm(dim=-1, keepdim=True) > 0, wide.norm(dim=-1, keepdim=True), 1.0)
    exact = -(unit @ unit.mean(0)).softmax(-1)
    for module, options in ((ops, {"backend": "triton"}), (reference, {})):
        query = torch.zeros(1, 1, 1, 8)  # attends evenly
        scores = module.score_window(query, keys, table, start, 16, redundancy=1.0, **options)
        assert torch.allclose(scores[0, 0].double(), 1 / 16 + exact, atol=1e-7)


@pytest.mark.parametrize("dtype", [*FP8, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_every_fp8_pattern_is_decoded_exactly(dtype: torch.dtype) -> None:
    """One window per pattern, with a zero key and that pattern. The ratio of their scores gives its value."""
    patterns = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    keys = torch.zeros(256, 2, 1, 1, dtype=torch.uint8)
    keys[:, 1, 0, 0] = torch.arange(256)
    table, starts = torch.arange(256, dtype=torch.int32)[:, None], torch.zeros(256, dtype=torch.int32)
    query, scale = torch.ones(256, 1, 1, 1), 4.0 / float(patterns[patterns.isfinite()].max())
    scores = ops.score_window(query, keys.view(dtype), table, starts, 2, scale=scale, backend="triton")
    seen, exact = scores[:, 0, 1].double(), (patterns.double() * scale).sigmoid()
    finite = patterns.isfinite()
    assert (seen[finite] - exact[finite]).abs().max() < 1e-6
    assert seen[patterns.isnan()].isnan().all()


@many
@given(scores=worlds.score_rows(), data=st.data())
def test_topk_agrees(scores: torch.Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, scores.shape[-1]))
    assert torch.equal(ops.select_topk(scores, k, backend="triton"), reference.select_topk(scores, k))


@many
@given(scores=worlds.score_rows(), data=st.data())
def test_chunks_agree(scores: torch.Tensor, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, scores.shape[-1]))
    budget, max_chunk = data.draw(st.integers(0, keep - 1)), data.draw(st.integers(1, 12))
    kernel = ops.expand_chunks(scores, keep, budget, max_chunk, backend="triton")
    assert torch.equal(kernel, reference.expand_chunks(scores, keep, budget, max_chunk))


@pytest.mark.parametrize("width", [1, 2, 255, 1000, 4096])
@pytest.mark.parametrize("values", [2, 50, 10**6])
def test_wide_rows_agree(width: int, values: int) -> None:
    scores = torch.randint(values, (3, width), generator=torch.Generator().manual_seed(width)).float()
    keep = (width + 1) // 2
    for budget in {0, keep // 3, keep - 1}:
        kernel = ops.expand_chunks(scores, keep, budget, 8, backend="triton")
        assert torch.equal(kernel, reference.expand_chunks(scores, keep, budget, 8))
    assert torch.equal(ops.select_topk(scores, keep, backend="triton"), reference.select_topk(scores, keep))


@few
@given(plan=plans(max_layers=2, dtypes=MOVED_DTYPES, skips=True, latent=True), data=st.data())
def test_compaction_moves_bytes_and_nothing_else(plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    keep = data.draw(worlds.keep_lists(plan, data.draw(st.integers(1, plan.window))))
    before = world.snapshot()
    with mock.patch.object(compact, "FEW", data.draw(st.sampled_from([0, 10**6]))):  # rows whole, and shared
        new_lens = ops.compact_blocks(
            world.k_caches, world.v_caches, world.block_tables, world.window_starts, world.seq_lens,
            torch.tensor(keep, dtype=torch.int32), plan.window, backend="triton",
        )  # fmt: skip
    assert new_lens.tolist() == world.assert_compacted(before, keep)


@pytest.mark.parametrize("tail", [0, 1, 300, 1100])
@pytest.mark.parametrize("few", [0, 10**6], ids=["rows whole", "rows shared"])
def test_long_tails_follow_in_many_tiles(tail: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "FEW", few)
    plan = Plan(sequences=(Sequenced(start=3, tail=tail),), window=150, queries=1, dim=128, v_dim=72, page=4)
    world, keep = World(plan), [[[[*range(0, 150, 2)]]]]
    before = world.snapshot()
    new_lens = ops.compact_blocks(
        world.k_caches, world.v_caches, world.block_tables, world.window_starts, world.seq_lens,
        torch.tensor(keep, dtype=torch.int32), 150, backend="triton",
    )  # fmt: skip
    assert new_lens.tolist() == world.assert_compacted(before, keep)


@pytest.mark.parametrize("operation", ["select_topk", "expand_chunks"])
def test_rows_the_kernel_cannot_reach_are_refused_not_copied(operation: str) -> None:
    scores = torch.randn(4, 3).t()
    arguments = (2,) if operation == "select_topk" else (2, 1, 4)
    with pytest.raises(ValueError, match="scores: expected rows at one stride"):
        getattr(ops, operation)(scores, *arguments, backend="triton")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("pool", ["head", "model"])
def test_given_scores_the_kernel_cannot_reach_are_refused_not_copied(pool: str, layers: int) -> None:
    """Every second element of wider rows. PyTorch accepts them, but a kernel would read the elements in between."""
    plan = Plan(sequences=(Sequenced(2, tail=1), Sequenced(5)), layers=layers, heads=2, window=6)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(layers, 2, 2, 12, generator=generator)[..., ::2]
    wide = wide if layers > 1 else wide[0]

    def compress(world: World, scores: torch.Tensor, backend: str) -> CompressedWindow:
        values = world.v_caches
        assert values is not None
        caches = (world.k_caches, values) if layers > 1 else (world.k_caches[0], values[0])
        return compress_window(
            None, *caches, world.block_tables, world.seq_lens, window=6, keep=3, scores=scores, pool=pool,
            window_starts=world.window_starts, backend=backend,
        )  # fmt: skip

    refused, strided, dense = World(plan), World(plan), World(plan)
    before = refused.snapshot()
    with pytest.raises(ValueError, match="scores: expected stride 1 in the last dimension, got 2"):
        compress(refused, wide, "triton")
    refused.assert_untouched(before)
    result = compress(strided, wide, "torch")
    assert all(map(torch.equal, result, compress(dense, wide.contiguous(), "triton")))
    strided.assert_untouched(dense.snapshot())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pools_beyond_32_bit_offsets(backend: str) -> None:
    """Two blocks at the end of a pool of over 2^31 elements. Only touched pages take memory."""
    width = 64
    blocks = 2**31 // (width * 16) + 8
    pools = [torch.empty(blocks, 16, 1, width, dtype=torch.float8_e5m2) for _ in range(2)]
    near = [torch.empty(2, 16, 1, width, dtype=torch.float8_e5m2) for _ in range(2)]
    far_table = torch.tensor([[blocks - 2, blocks - 1]], dtype=torch.int32)
    near_table = torch.tensor([[0, 1]], dtype=torch.int32)
    query = torch.randn(1, 8, 2, width)
    results = []
    for (k, v), table in ((pools, far_table), (near, near_table)):
        for cache, seed in ((k, 0), (v, 1)):
            values = torch.randn(2, 16, 1, width, generator=torch.Generator().manual_seed(seed))
            cache[table[0].long()] = values.to(torch.float8_e5m2)
        lengths = torch.tensor([29], dtype=torch.int32)
        starts = torch.tensor([3], dtype=torch.int32)
        results.append(
            compress_window(query, k, v, table, lengths, window=20, keep=9, window_starts=starts, backend=backend)
        )
        assert results[-1].seq_lens.tolist() == [18]
    assert torch.equal(results[0].keep_indices, results[1].keep_indices)
    assert torch.equal(results[0].scores, results[1].scores)
    for far, close in zip(pools, near, strict=True):
        moved = far.view(torch.uint8)[far_table[0].long()].flatten(0, 1)[:18]
        assert torch.equal(moved, close.view(torch.uint8).flatten(0, 1)[:18])


COMPACT = {
    "k_cache": torch.zeros(4, 4, 2, 3),
    "v_cache": torch.ones(4, 4, 2, 5),
    "block_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    "window_starts": torch.tensor([0, 1], dtype=torch.int32),
    "seq_lens": torch.tensor([6, 7], dtype=torch.int32),
    "keep_indices": torch.tensor([0, 2], dtype=torch.int32).expand(2, 2, 2),
    "window": 6,
}
# name: (what is changed, exception, words of the message)
WRONG_COMPACTIONS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "window past the end": ({"window": 7}, ValueError, r"window_starts\[0\]: expected at most -1"),
    "descending": ({"keep_indices": torch.tensor([2, 0], dtype=torch.int32).expand(2, 2, 2)}, ValueError, "ascending"),
    "outside": ({"keep_indices": torch.tensor([2, 6], dtype=torch.int32).expand(2, 2, 2)}, ValueError, r"0\.\.5"),
    "too many": ({"window": 1}, ValueError, r"keep_indices: expected 1\.\.1 indices"),
    "int64": ({"keep_indices": torch.zeros(2, 2, 2, dtype=torch.int64)}, TypeError, "keep_indices: expected dtype"),
    "dtype of 16 bytes": ({"k_cache": torch.zeros(4, 4, 2, 3, dtype=torch.complex128)}, TypeError, "1, 2, 4 or 8 byt"),
    "shared block": (
        {"block_tables": torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)}, ValueError, "got block 1 twice",
    ),
    "half a sequence left alone": (
        {"keep_indices": torch.tensor([[[0, 1], [-1, -1]]] * 2, dtype=torch.int32)}, ValueError, "throughout",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wrong", WRONG_COMPACTIONS)
def test_a_wrong_compaction_is_refused_before_anything_moves(wrong: str, backend: str) -> None:
    if ON_GPU and backend == "triton":
        pytest.skip("contents are not checked on a GPU")
    change, error, words = WRONG_COMPACTIONS[wrong]
    given_ = COMPACT | {"k_cache": torch.randn(4, 4, 2, 3), "v_cache": torch.randn(4, 4, 2, 5)} | change
    before = given_["k_cache"].clone(), given_["v_cache"].clone()
    with pytest.raises(error, match=words):
        ops.compact_blocks(**given_, backend=backend)
    assert torch.equal(given_["k_cache"], before[0])
    assert torch.equal(given_["v_cache"], before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_dtype_is_moved(dtype: torch.dtype, backend: str) -> None:
    cache = torch.arange(4 * 4 * 2 * 3).view(4, 4, 2, 3).to(dtype)
    expected = cache.clone()
    expected[0, 1], expected[2, 2] = cache[0, 2], cache[2, 3]
    lens = ops.compact_blocks(**(COMPACT | {"k_cache": cache, "v_cache": None}), backend=backend)
    assert lens.tolist() == [2, 3]
    assert torch.equal(cache[0, :2], expected[0, :2])
    assert torch.equal(cache[2, :3], expected[2, :3])
