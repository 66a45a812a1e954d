"""Every kernel as compiled for sm_80, run instruction by instruction. It agrees with the reference without problems.

The emulator of `tests/ptx` reports divergence and accesses that are out of bounds, misaligned, uninitialised or racing,
in several warp orders. Then bugs are planted in the compiled code to check that they are reported.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("runs compiled kernels: TRITON_INTERPRET=0", allow_module_level=True)

import worlds
from ptx import ORDERS, Launch, emulating
from worlds import Plan, Sequenced, World

from kara_kernels import compress_window, ops, reference
from kara_kernels.ops import compact, compact_blocks
from kara_kernels.options import RECOMMENDED

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
BOTH = {"value_norm": True, "redundancy": 0.5}
ONE = (Sequenced(start=5, tail=37),)
MIXED = (Sequenced(start=3, tail=70), Sequenced(start=9, lacking=2), Sequenced(start=0, tail=0))

# name: (plan, options of compress_window, keep). Each gives different machine code or another path through it.
WORLDS: dict[str, tuple[Plan, dict[str, object], int]] = {
    "llama": (Plan(MIXED, 2, 2, 4, 128, 128, 128, 128, 16, dtype=BF16, query_dtype=BF16), {}, 64),
    "small heads, all options": (
        Plan(ONE, 2, 2, 3, 256, 256, 64, 64, 16, "HND", BF16, BF16),
        {"reduction": "rms", "value_norm": True, "redundancy": 1.0}, 100),
    "pooled over the model": (
        Plan(MIXED, 2, 2, 2, 100, 60, 64, 64, 32, "cross_layer", FP16, FP16), {"pool": "model", "max_chunk": 20}, 37),
    "pooled over heads, pages interleaved": (
        Plan(MIXED, 1, 2, 1, 64, 64, 64, 64, 64, "kv_interleaved", FP16, FP16),
        {"pool": "layer", "reduction": "rms"}, 32),
    "causal, different values": (
        Plan(ONE, 1, 2, 1, 256, 200, 192, 128, 16, "packed", BF16, BF16), {"attention": "causal"}, 200),
    "fp8 cache": (
        Plan(MIXED, 1, 2, 4, 128, 100, 128, 128, 16, "stacked", FP8, BF16),
        {"k_scale": 0.5, "value_norm": True, "redundancy": 0.5}, 64),
    "latent cache": (Plan(ONE, 1, 1, 16, 128, 20, 576, 0, 64, dtype=BF16, query_dtype=BF16), {}, 50),
    "latent cache, two programs, all options": (
        Plan(ONE, 1, 1, 16, 150, 40, 576, 0, 64, dtype=BF16, query_dtype=BF16),
        {"reduction": "rms", "redundancy": 0.5}, 70),
    "sliced keys, causal, fp8": (
        Plan(ONE, 1, 1, 2, 256, 70, 288, 40, 16, dtype=FP8, query_dtype=FP16),
        {"attention": "causal", "k_scale": 0.5}, 128),
    "wide window, streamed": (Plan(ONE, 1, 1, 2, 2048, 70, 64, 64, 256, dtype=BF16, query_dtype=BF16), {}, 1024),
    "widest window": (Plan(ONE, 1, 1, 1, 4096, 20, 64, 64, 256, dtype=FP16, query_dtype=FP16), {}, 2000),
    "float32, pages of one": (Plan(MIXED, 1, 2, 3, 100, 40, 64, 64, 1), {"chunk_fraction": 0.0}, 50),
    "float32 streamed, odd head dimension": (Plan(MIXED, 1, 1, 3, 90, 1100, 24, 40, 4), BOTH, 89),
    "misaligned, padded rows": (
        Plan(ONE, 1, 2, 2, 33, 33, 72, 40, 16, dtype=BF16, query_dtype=BF16, k_pad=3, v_pad=1, guard=61), BOTH, 1),
    "misaligned by one element": (
        Plan(ONE, 1, 1, 1, 64, 20, 64, 56, 8, dtype=FP16, query_dtype=FP16, k_pad=1, v_pad=3, guard=63), BOTH, 30),
    "odd head dimensions": (Plan(ONE, 1, 2, 2, 33, 20, 40, 24, 16, dtype=BF16, query_dtype=BF16), BOTH, 16),
    "heads of four": (Plan(ONE, 1, 2, 2, 33, 20, 4, 4, 16, dtype=BF16, query_dtype=BF16), BOTH, 16),
    "fp8 of AMD, float32 queries": (
        Plan(ONE, 1, 1, 2, 17, 20, 8, 8, 4, dtype=torch.float8_e4m3fnuz), BOTH | {"k_scale": 0.5}, 9),
    "fp16 queries on e4m3fn keys": (
        Plan(ONE, 1, 2, 2, 64, 40, 64, 64, 16, dtype=FP8, query_dtype=FP16), BOTH | {"k_scale": 0.5}, 30),
    "bf16 queries on e5m2 keys": (
        Plan(ONE, 1, 2, 2, 64, 40, 64, 64, 16, dtype=torch.float8_e5m2, query_dtype=BF16), BOTH | {"k_scale": 0.5}, 30),
    "fp16 queries on e4m3fnuz keys": (
        Plan(ONE, 1, 1, 2, 33, 20, 24, 40, 16, dtype=torch.float8_e4m3fnuz, query_dtype=FP16),
        BOTH | {"k_scale": 2.0}, 16),
    "bf16 queries on e5m2fnuz keys": (
        Plan(ONE, 1, 1, 2, 33, 20, 24, 40, 16, dtype=torch.float8_e5m2fnuz, query_dtype=BF16),
        BOTH | {"k_scale": 2.0}, 16),
    "dtypes mixed": (Plan(ONE, 1, 1, 2, 50, 50, 32, 32, 8, dtype=BF16, query_dtype=torch.float32), {}, 25),
    "equal scores": (Plan(MIXED, 1, 2, 2, 256, 64, 64, 64, 16, dtype=BF16, query_dtype=BF16, content="equal"), {}, 128),
}  # fmt: skip


def clean(launches: list[Launch]) -> None:
    found = [f"{launch.name}: {problem}" for launch in launches for problem in launch.problems]
    assert not found, "\n".join(found)


def memory(world: World) -> list[torch.Tensor]:
    return [*world.query, *world.k_caches, *(world.v_caches or [])]


def compress(world: World, keep: int, **options: object):
    return compress_window(
        world.query, world.k_caches, world.v_caches, world.block_tables, world.seq_lens, window=world.plan.window,
        keep=keep, window_starts=world.window_starts, protected_lens=world.protected_lens, **options,
    )  # fmt: skip


# Lockstep for every world. Every order for worlds whose warps share memory or move rows in place.
CASES = [(name, "together") for name in WORLDS]
CASES += [
    (name, order)
    for name in ("llama", "pooled over the model", "fp8 cache", "equal scores", "latent cache")
    for order in ORDERS[1:]
]
# Rows so narrow that a lane holds one element of a sum, and several lanes store that sum.
NARROW = ("float32 streamed, odd head dimension", "misaligned, padded rows", "misaligned by one element",
          "odd head dimensions", "heads of four", "fp8 of AMD, float32 queries")  # fmt: skip
CASES += [(name, order) for name in NARROW for order in ORDERS[1:]]


@pytest.mark.parametrize(("name", "order"), CASES)
def test_compression_agrees_with_the_reference(name: str, order: str) -> None:
    """Moved bytes and keep lists match exactly, given the kernel's scores. Scores stay within the bound of float64."""
    plan, options, keep = WORLDS[name]
    world, twin = World(plan).give_values(), World(plan).give_values()
    before = world.snapshot()
    with emulating(order, memory(world)) as launches:
        result = compress(world, keep, backend="triton", **options)
    clean(launches)
    assert {launch.name for launch in launches} >= {"score_kernel", "keep_kernel", "compact_kernel"}
    assert any(launch.counts.matrix_operations for launch in launches)
    scoring = {key: value for key, value in options.items() if key in ("chunk_fraction", "max_chunk", "pool")}
    expected = compress(twin, keep, backend="torch", scores=result.scores.contiguous(), **scoring)
    assert torch.equal(result.keep_indices, expected.keep_indices)
    assert torch.equal(result.seq_lens, expected.seq_lens)
    world._assert_equal(twin.buffers)
    world.assert_compacted(before, result.keep_indices.tolist())
    if options.get("pool", "head") == "head":
        assert_scores(World(plan).give_values(), result.scores, options)
    else:
        fresh = World(plan).give_values()
        assert torch.allclose(result.scores, compress(fresh, keep, backend="torch", **options).scores, atol=1e-6)


def assert_scores(world: World, scores: torch.Tensor, options: dict[str, object]) -> None:
    options = {**RECOMMENDED, **options}
    wanted = {key: options[key] for key in ("k_scale", "reduction", "redundancy") if key in options}
    wanted["causal"] = options["attention"] == "causal"
    weighed = world.v_caches is not None if options["value_norm"] is None else options["value_norm"]
    for layer in range(world.plan.layers):
        for s in range(len(world.starts)):
            if world.skipped[s]:
                assert not scores[layer, s].any()
                continue
            query, keys = world.query[layer][s], world.read_keys(layer, s)
            wanted["values"] = world.read_values(layer, s) if weighed else None
            exact = worlds.dense_scores(query, keys, dtype=torch.float64, **wanted)  # type: ignore[arg-type]
            bound = worlds.allowed_error(query, keys, exact, **wanted)  # type: ignore[arg-type]
            assert (scores[layer, s].double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(("sign", "causal"), [(1, False), (-1, True)])
def test_float32_products_beyond_float32(sign: int, causal: bool, dtype: torch.dtype) -> None:
    """Three TF32 products each: a part that overflowed would be lost and leave a number that is wrong."""
    world = worlds.huge_products(Plan(ONE, 2, 1, 2, 70, 40, 64, 64, 16, dtype=dtype))
    scale = sign * worlds.HUGE_SCALE
    with emulating("together", memory(world)) as launches:
        scores = ops.score_window(
            world.query, world.k_caches, world.block_tables, world.window_starts, 70, scale=scale,
            attention="causal" if causal else "bidirectional", backend="triton",
        )  # fmt: skip
    clean(launches)
    worlds.assert_scores_of_huge_products(world, scores, scale=scale, causal=causal)


ROWS = torch.tensor([[0.5, float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 0.5, 1e-45, -1e-45] * 30] * 3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [1, 100, 270])
def test_selection_is_exact(width: int, order: str) -> None:
    scores = ROWS[:, :width].clone()
    for keep in sorted({1, width // 2 or 1, width}):
        with emulating(order) as launches:
            best = ops.select_topk(scores, keep, backend="triton")
            chunks = ops.expand_chunks(scores, keep, keep // 3, 5, backend="triton")
        clean(launches)
        assert torch.equal(best, reference.select_topk(scores, keep))
        assert torch.equal(chunks, reference.expand_chunks(scores, keep, keep // 3, 5))


@pytest.mark.parametrize("width", [1024, 4096])
def test_selection_of_wide_rows(width: int) -> None:
    scores = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    with emulating("shuffled") as launches:
        best = ops.select_topk(scores, width // 3, backend="triton")
        chunks = ops.expand_chunks(scores, width // 2, width // 8, 9, backend="triton")
    clean(launches)
    assert torch.equal(best, reference.select_topk(scores, width // 3))
    assert torch.equal(chunks, reference.expand_chunks(scores, width // 2, width // 8, 9))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [1, 100, 1024, 2500])
def test_ranking_is_exact(width: int, order: str) -> None:
    """Rows of a wider tensor: within a tile, a full tile, and three tiles, of which the last merges with none first."""
    scores = ROWS.repeat(1, 10)[:2, :width]
    with emulating(order, [scores]) as launches:
        ranked = ops.rank_rows(scores, sinks=2, newest=7, backend="triton")
    clean(launches)
    assert [launch.name for launch in launches] == ["sort_kernel"] + ["merge_kernel"] * (0 if width <= 1024 else 2)
    assert torch.equal(ranked, reference.rank_rows(scores, sinks=2, newest=7))


def test_ranking_of_long_rows() -> None:
    scores = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0)).round(decimals=2)  # many ties
    with emulating("shuffled") as launches:
        ranked = ops.rank_rows(scores, backend="triton")
    clean(launches)
    assert torch.equal(ranked, reference.rank_rows(scores))


def test_the_same_bits_in_every_order_and_batch() -> None:
    """Scores of a sequence do not depend on the warp order or on other sequences."""
    plan, options, keep = WORLDS["llama"]
    seen = []
    for order in ORDERS:
        world = World(plan).give_values()  # values of random bits would score NaN, which equals nothing
        with emulating(order, memory(world)):
            seen.append(compress(world, keep, backend="triton", **options).scores)
    assert all(torch.equal(seen[0], scores) for scores in seen)
    world = World(plan).give_values()
    with emulating("together", memory(world)):
        alone = compress_window(
            [query[2:] for query in world.query], world.k_caches, world.v_caches, world.block_tables[2:],
            world.seq_lens[2:], window=plan.window, keep=keep, window_starts=world.window_starts[2:],
            backend="triton",
        )  # fmt: skip
    assert torch.equal(seen[0][:, 2:], alone.scores)


def test_memory_beyond_two_to_the_31_elements() -> None:
    """Block ids times strides that only 64 bits hold."""
    pages, stride = 3, 2**31 + 64  # elements between pages
    room = torch.empty(2 * stride + 16 * 128, dtype=BF16)  # 8 GB of addresses; memory only where it is touched
    pool = room.as_strided((pages, 16, 2, 64), (stride, 128, 64, 1))
    pool.copy_(torch.randn(pages, 16, 2, 64))
    small = pool.clone()
    query = torch.randn(1, 32, 2, 64).to(BF16)
    table, length, start = torch.tensor([[2, 0, 1]]).int(), torch.tensor([45]).int(), torch.tensor([5]).int()

    def go(cache: torch.Tensor, backend: str):
        return compress_window(
            query, cache, None, table, length, window=32, keep=16, window_starts=start, backend=backend
        )

    with emulating("together", [pool]) as launches:
        result = go(pool, "triton")
    clean(launches)
    expected = go(small, "torch")
    assert torch.equal(result.keep_indices, expected.keep_indices)
    assert torch.equal(pool, small)


# ------------------------------------------------------------------------------------------------ planted bugs


def without(pattern: str, kernel: str, which: slice = slice(None)) -> Callable[[str, str], str]:
    """Drops matching lines of a kernel's code."""

    def rewrite(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        lines = ptx.splitlines()
        found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
        assert found, f"no {pattern} in {name}"
        for i in found[which]:
            lines[i] = "//" + lines[i]
        return "\n".join(lines)

    return rewrite


def problems(name: str, rewrite: Callable[[str, str], str], order: str = "together", **changes: object) -> set[str]:
    plan, options, keep = WORLDS[name]
    world = World(replace(plan, **changes)).give_values()  # type: ignore[arg-type]
    with emulating(order, memory(world), rewrite) as launches:
        compress(world, keep, backend="triton", **options)
    return {problem.kind for launch in launches for problem in launch.problems}


MOVED = ("llama", "latent cache", "fp8 cache", "odd head dimensions", "misaligned by one element")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MOVED)
def test_whole_rows_move_in_place(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in calls with many heads. Worlds here have few, and their rows are shared by programs."""
    monkeypatch.setattr(compact, "FEW", 0)
    world, keep = World(WORLDS[name][0]), WORLDS[name][2]
    lists = oracle_lists(world, keep)
    before = world.snapshot()
    with emulating(order, memory(world)) as launches:
        compact_blocks(
            world.k_caches, world.v_caches, world.block_tables, world.window_starts, world.seq_lens,
            torch.tensor(lists).int(), world.plan.window, backend="triton",
        )  # fmt: skip
    clean(launches)
    world.assert_compacted(before, lists)


def oracle_lists(world: World, keep: int) -> list[list[list[list[int]]]]:
    """Random keep lists, -1 throughout for skipped sequences."""
    random_ = random.Random(0)
    return [
        [
            [[-1] * keep if skipped else sorted(random_.sample(range(world.plan.window), keep))
             for _ in range(world.plan.heads)]
            for skipped in world.skipped
        ]
        for _ in range(world.plan.layers)
    ]  # fmt: skip


@pytest.mark.parametrize(("dim", "v_dim", "before"), [(128, 128, 68), (64, 64, 68), (576, 0, 332)])
def test_a_long_tail_rarely_waits_for_memory(dim: int, v_dim: int, before: int) -> None:
    """A program of one KV head waits a quarter as often as when it moved whole rows and asked for their blocks tile by
    tile. Those numbers were counted in the same way."""
    plan = Plan((Sequenced(tail=4096),), 1, 1, 1, 256, 1, dim, v_dim, 16, dtype=BF16)
    world = World(plan)
    lists = oracle_lists(world, 128)
    with emulating("together", memory(world), timed=True) as launches:
        compact_blocks(
            world.k_caches, world.v_caches, world.block_tables, world.window_starts, world.seq_lens,
            torch.tensor(lists).int(), 256, backend="triton",
        )  # fmt: skip
    clean(launches)
    (trips,) = (launch.counts.round_trips for launch in launches)
    assert trips is not None
    assert 9 <= trips <= before / 4


@pytest.mark.parametrize(("dim", "before"), [(128, 33), (64, 33)])
def test_value_norms_rarely_wait_for_memory(dim: int, before: int) -> None:
    """The program of value norms waits an eighth as often as when it took 16 rows at a time."""
    world = World(Plan(ONE, 1, 1, 1, 256, 1, dim, dim, 16, dtype=BF16, query_dtype=BF16)).give_values()
    with emulating("together", memory(world), timed=True) as launches:
        ops.score_window(
            world.query[0], world.k_caches[0], world.block_tables, world.window_starts, 256, v_cache=world.v_caches[0],
            backend="triton",
        )  # fmt: skip
    clean(launches)
    (trips,) = (launch.counts.round_trips for launch in launches if launch.name == "score_kernel")
    assert trips is not None
    assert 3 <= trips <= before / 8


@pytest.mark.parametrize("few", [0, 10**6], ids=["rows whole", "rows shared"])
@pytest.mark.parametrize("order", ORDERS)
def test_compaction_without_its_barrier_is_reported(order: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "FEW", few)
    found = problems("llama", without(r"bar\.sync", "compact_kernel"), order)
    assert found & {"write races in global memory", "read races with a write of global memory"}


def test_a_lost_wait_is_reported() -> None:
    found = problems("llama", without(r"cp\.async\.wait_group", "score_kernel"))
    assert "read of an asynchronous copy before its wait" in found


def test_lost_barriers_of_scoring_are_reported() -> None:
    assert problems("llama", without(r"bar\.sync", "score_kernel")) & {
        "read races with a write of shared memory", "write races in shared memory",
        "asynchronous copy races in shared memory",
    }  # fmt: skip
    # Partial rows that a program adds to are in global memory, and the barriers around them order its warps.
    found = problems("wide window, streamed", without(r"bar\.sync", "score_kernel"))
    assert "read races with a write of global memory" in found


def test_lost_barriers_of_selection_are_reported() -> None:
    found = problems("wide window, streamed", without(r"bar\.sync", "keep_kernel"))
    assert found & {"read races with a write of shared memory", "write races in shared memory"}


def problems_of_ranking(rewrite: Callable[[str, str], str], width: int) -> set[str]:
    with emulating("together", rewrite=rewrite) as launches:
        ops.rank_rows(torch.randn(2, width), backend="triton")
    return {problem.kind for launch in launches for problem in launch.problems}


def test_lost_barriers_of_ranking_are_reported() -> None:
    found = problems_of_ranking(without(r"bar\.sync", "sort_kernel"), 1024)
    assert found & {"read races with a write of shared memory", "write races in shared memory"}


@pytest.mark.parametrize(("instruction", "kernel"), [
    (r"ld\.global\.b32", "sort_kernel"), (r"st\.global\.b64", "sort_kernel"), (r"st\.global\.b32", "merge_kernel"),
    (r"ld\.global\.b64", "merge_kernel"),
])  # fmt: skip
def test_a_lost_mask_of_ranking_is_reported(instruction: str, kernel: str) -> None:
    assert problems_of_ranking(unmasked(instruction, kernel), 1500)


def unmasked(instruction: str, kernel: str) -> Callable[[str, str], str]:
    return lambda name, ptx: re.sub(rf"@%p\d+ ({instruction})", r"\1", ptx) if name == kernel else ptx


@pytest.mark.parametrize(("instruction", "kernel"), [
    (r"ld\.global\.b32", "compact_kernel"), (r"ld\.global\.v4\.b32", "keep_kernel"), (r"st\.global", "keep_kernel"),
    (r"st\.global\.b32", "score_kernel"),
])  # fmt: skip
def test_a_lost_mask_is_reported(instruction: str, kernel: str) -> None:
    assert problems("float32, pages of one", unmasked(instruction, kernel))
