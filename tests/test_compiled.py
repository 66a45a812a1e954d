"""The compiled code of every kernel, for four GPUs: no spills, no atomics, shared memory within limits, matrix
instructions in scoring, wide accesses, and the barrier that in-place moves need.

Run with TRITON_INTERPRET=0. Nothing is launched.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import triton
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip(
        "compiles kernels, which an interpreting process cannot: run with TRITON_INTERPRET=0", allow_module_level=True
    )

from triton.backends.compiler import GPUTarget

from bench.codegen.goals import judge
from bench.codegen.inspect import facts, occupancy, sass, sass_loops
from bench.codegen.shapes import MOVES, PayloadShape, Shape, launch_moves
from bench.compile_only import SHARED, TARGETS, Build, CompileOnly, compiling_for, driving
from kara_kernels import PackedQueries, PagedCache, compress_window
from kara_kernels.engine import Plan, Policy, QueryRing, Span, execute, warm_up
from kara_kernels.ops import compact_blocks, expand_chunks, pack_queries, rank_rows, score_window, select_topk
from kara_kernels.ops._triton import ARCHITECTURES, architecture, launch, launch_again
from kara_kernels.ops.chunks import launch_keep
from kara_kernels.ops.quantize import launch_dequantize, launch_quantize
from kara_kernels.ops.select import launch_topk
from kara_kernels.payload import PayloadLayout
from kara_kernels.payload_arguments import PayloadArguments

# name: (window, D, Dv, G, page, cache dtype, options)
SHAPES: dict[str, tuple[int, int, int, int, int, torch.dtype, dict[str, Any]]] = {
    "small heads": (256, 64, 64, 3, 16, torch.bfloat16, {}),
    "llama, rms and lengths": (256, 128, 128, 4, 16, torch.bfloat16, {"reduction": "rms", "value_norm": True}),
    "small heads, rms and lengths": (256, 64, 64, 3, 16, torch.bfloat16, {"reduction": "rms", "value_norm": True}),
    "wide window, rms and lengths": (2048, 128, 128, 8, 32, torch.float16, {"reduction": "rms", "value_norm": True}),
    "llama, redundancy": (256, 128, 128, 4, 16, torch.bfloat16, {"redundancy": 1.0}),
    "wide window, pooled": (1024, 128, 128, 8, 32, torch.float16, {"pool": "layer"}),
    "widest window": (4096, 64, 64, 1, 256, torch.bfloat16, {}),
    "latent": (512, 576, 0, 16, 64, torch.bfloat16, {}),
    "latent, one pass": (256, 576, 0, 16, 64, torch.bfloat16, {"redundancy": 1.0}),
    "latent of fp8, causal": (256, 576, 0, 16, 64, torch.float8_e4m3fn, {"attention": "causal", "k_scale": 0.5}),
    "different values, causal": (256, 192, 128, 1, 16, torch.bfloat16, {"attention": "causal"}),
    "heads of 256": (256, 256, 256, 4, 16, torch.bfloat16, {}),  # wanted more shared memory than sm_90 has
    "narrow window, heads of 256": (128, 256, 256, 4, 16, torch.bfloat16, {}),
    "fp8": (256, 128, 128, 4, 16, torch.float8_e4m3fn, {"k_scale": 0.5}),
    "float32, odd head dimension": (100, 24, 40, 3, 16, torch.float32, {}),  # spilled on sm_120 with unscaled queries
    "float32, slots": (100, 64, 64, 3, 1, torch.float32, {"chunk_fraction": 0.0}),
}


def arguments(window: int, dim: int, v_dim: int, group: int, page: int, dtype: torch.dtype, sequences: int = 1,
              queries: int | None = None, heads: int = 2) -> dict[str, Any]:  # fmt: skip
    """Two layers in separate pools, so that kernels take base addresses from a table."""
    blocks = -(-window // page) + 1
    wide = dtype if dtype.itemsize > 1 else torch.bfloat16

    def pool(width: int) -> list[torch.Tensor]:
        return [torch.zeros(blocks * sequences, page, heads, width, dtype=dtype) for _ in range(2)]

    return {
        "query": torch.zeros(2, sequences, queries or window, heads * group, dim, dtype=wide),
        "k_cache": pool(dim),
        "v_cache": pool(v_dim) if v_dim else None,
        "block_tables": torch.arange(blocks * sequences, dtype=torch.int32).view(sequences, -1),
        "seq_lens": torch.full((sequences,), window, dtype=torch.int32),
        "window": window,
    }


def builds_of(target: str, shape: str) -> dict[str, Build]:
    window, dim, v_dim, group, page, dtype, options = SHAPES[shape]
    with compiling_for(target) as builds:
        compress_window(
            **arguments(window, dim, v_dim, group, page, dtype), keep=window // 2, backend="triton", **options
        )
    return {build.name: build for build in builds}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_compiles_well(shape: str, target: str) -> None:
    builds = builds_of(target, shape)
    pooled = {"pool_kernel"} if "pool" in SHAPES[shape][-1] else set()
    assert set(builds) == {"score_kernel", "keep_kernel", "compact_kernel"} | pooled
    for build in builds.values():
        assert build.resources()["spills"] == 0, f"{build.name} spills: {build.resources()}"
        assert build.shared <= SHARED[target], f"{build.name} needs {build.shared} bytes of shared memory"
        assert not re.search(r"\b(atom|red)\.|_atomic_|\bds_(add|max|min|or)_", build.assembly), build.name
    assert re.search(r"mma\.sync|wgmma|tcgen05\.mma|v_mfma", builds["score_kernel"].assembly)
    assert_barrier_before_store(builds["compact_kernel"], moves=1 if SHAPES[shape][2] == 0 else 2)
    if SHAPES[shape][4] > 1 or SHAPES[shape][1] % 64 == 0:
        for name in ("score_kernel", "compact_kernel"):
            assert re.search(
                r"ld\.global\.[^ ]*v4\.b32|cp\.async\.cg.*, 0x10|(global|buffer)_load_(lds_)?dwordx4",
                builds[name].assembly,
            ), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("move", MOVES, ids=str)
def test_whole_rows_move_well(move: tuple[int, int, torch.dtype], target: str) -> None:
    """As in calls with many heads. The calls above have few, and their rows are shared by programs."""
    with compiling_for(target) as builds:
        launch_moves(*move)
    (build,) = builds
    assert build.resources()["spills"] == 0, f"{build.name} spills: {build.resources()}"
    assert_barrier_before_store(build, moves=2)
    assert re.search(r"ld\.global\.[^ ]*v4\.b32|(global|buffer)_load_dwordx4", build.assembly)


def tile_of(build: Build) -> list[str]:
    """The instructions of the innermost loop with products."""
    loops = sass_loops(sass(build.kernel.asm["cubin"]))
    return min((loop for loop in loops if any("MMA" in opcode for opcode in loop)), key=len)


# Counted when sums of columns had begun to stay in registers until the last tile. Before: 1,073, 1,043 and 1,406.
LOOPS = {"sm_80": (850, 80), "sm_90": (600, 12), "sm_100": (500, 4)}


@pytest.mark.parametrize("target", LOOPS)
def test_a_tile_of_queries_takes_few_instructions(target: str) -> None:
    """Of 64 query rows and a whole window of 256 keys: exponentials, products, and two reductions of rows."""
    (build,) = (x for name, x in builds_of(target, "llama, rms and lengths").items() if name == "score_kernel")
    most, shuffles = LOOPS[target]
    loop = tile_of(build)
    assert sum(opcode == "MUFU.EX2" for opcode in loop) == 64
    assert len(loop) <= most
    assert sum(opcode.startswith("SHFL") for opcode in loop) <= shuffles
    if target == "sm_90":  # two programs: products of one hide the exponentials of the other
        assert occupancy(target, build.resources()["registers"], build.shared, 8) >= 0.25


@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="it sees packed queries through a loop")
@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_packed_queries_do_not_permute_keys(target: str) -> None:
    """Of 32 query rows: 531 and 551 instructions. Before, 64 took 2,630 on sm_80."""
    with compiling_for(target) as builds:
        Shape(recorded=True).launch()
    (build,) = (build for build in builds if build.name == "score_kernel")
    loop = tile_of(build)
    assert sum(opcode == "MUFU.EX2" for opcode in loop) == 32
    assert len(loop) <= 600


def assert_barrier_before_store(build: Build, moves: int) -> None:
    """A barrier of the whole program separates the last wide load from the first wide store of each move."""
    if build.target.startswith("sm"):
        kinds = {"L": r"ld\.global\.[^ ]*(v\d\.)?b(8|16|32)\b", "B": r"bar\.sync|barrier\.sync", "S": r"st\.global"}
    else:
        kinds = {"L": r"(global|buffer)_load_", "B": r"s_barrier", "S": r"(global|buffer)_store_"}
    events = ""
    for line in build.assembly.splitlines():
        for letter, pattern in kinds.items():
            if re.search(pattern, line):
                events += letter
    # Data loads, barrier, data stores; the single store of the new length and index loads lie around.
    assert len(re.findall(r"L+B+S+", events)) >= moves, events
    assert not re.search(r"LS", events.split("B", 1)[1]), f"a store follows a load without a barrier: {events}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("window", "dim", "v_dim", "dtype", "reduction"), [
    (256, 128, 128, torch.bfloat16, "mean"), (256, 128, 128, torch.bfloat16, "rms"), (33, 24, 40, torch.float16, "rms"),
    (2048, 64, 64, torch.float32, "rms"),
])  # fmt: skip
def test_no_product_is_fused_into_a_sum_across_lanes(
    window: int, dim: int, v_dim: int, dtype: torch.dtype, reduction: str, target: str
) -> None:
    """``fma(x, x, y)`` with a partner's ``y`` rounds different products in two lanes, whose sums then differ."""
    given = arguments(window, dim, v_dim, 2, 16, dtype)
    starts = torch.zeros(1, dtype=torch.int32)
    with compiling_for(target) as builds:
        score_window(
            given["query"], given["k_cache"], given["block_tables"], starts, window, v_cache=given["v_cache"],
            reduction=reduction, redundancy=1.0, backend="triton",
        )  # fmt: skip
    (build,) = (build for build in builds if build.name == "score_kernel")
    assert not fused_across_lanes(build)


def fused_across_lanes(build: Build) -> list[str]:
    """Fused multiply-adds whose addend was last written by a shuffle from another lane."""
    if build.target.startswith("sm"):
        code, shuffles, fused = sass(build.kernel.asm["cubin"]), r"SHFL", r"FFMA2?\b"
    else:
        code, shuffles, fused = build.assembly, r"ds_bpermute|ds_swizzle|v_permlane|v_mov_b32_dpp", r"v_(pk_)?fma"
    shuffled: set[str] = set()
    found = []
    for opcode, rest in re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@\S+\s+)?([A-Za-z]\w+)\S*\s+(\S.*)", code, re.M):
        operands = [registers(operand, opcode in ("FADD2", "FMUL2", "FFMA2")) for operand in rest.split(",")]
        if re.match(fused, opcode) and operands[0 if "fmac" in opcode else 3] & shuffled:
            found.append(f"{opcode} {rest}")
        if re.match(shuffles, opcode):
            shuffled |= operands[1 if opcode == "SHFL" else 0]  # the first operand of SHFL is a predicate
            if "permlane" in opcode:
                shuffled |= operands[1]
        else:
            shuffled -= operands[0]
    return found


def registers(operand: str, pairs: bool) -> set[str]:
    """The registers of ``R4``, ``v4`` or ``v[4:5]``. In an instruction on ``pairs``, ``R4`` means R4 and R5."""
    if span := re.match(r"\s*v\[(\d+):(\d+)\]", operand):
        return {f"v{number}" for number in range(int(span[1]), int(span[2]) + 1)}
    if found := re.search(r"\b([Rv])(\d+)", operand):
        return {found[0], f"R{int(found[2]) + 1}"} if pairs else {found[0]}
    return set()


def test_standalone_operations_compile() -> None:
    given = arguments(256, 64, 64, 4, 16, torch.bfloat16)
    starts, lens = torch.zeros(1, dtype=torch.int32), given["seq_lens"]
    keep = torch.arange(128, dtype=torch.int32).expand(2, 1, 2, 128)
    with compiling_for("sm_90") as builds:
        scores = score_window(given["query"], given["k_cache"], given["block_tables"], starts, 256, backend="triton")
        select_topk(scores, 128, backend="triton")
        expand_chunks(scores, 128, 38, 8, backend="triton")
        compact_blocks(
            given["k_cache"], given["v_cache"], given["block_tables"], starts, lens, keep, 256, backend="triton"
        )
    assert {build.name for build in builds} == {
        "score_kernel", "pool_kernel", "topk_kernel", "keep_kernel", "compact_kernel"
    }  # fmt: skip
    assert all(build.resources()["spills"] == 0 for build in builds)


@pytest.mark.parametrize("target", TARGETS)
def test_packed_queries_compile(target: str) -> None:
    """For every way of scoring, without spills; and nothing compiles again for more queries or rows of a buffer."""
    with compiling_for(target) as builds:
        for window, dim, v_dim, group in [(256, 128, 128, 4), (256, 64, 64, 3), (256, 192, 128, 4), (256, 576, 0, 16),
                                          (1024, 128, 128, 4)]:  # fmt: skip
            for queries, sequences in [(window, 1), (17, 4)]:
                given = arguments(window, dim, v_dim, group, 16, BF16, sequences, queries)
                given["query"] = PackedQueries.empty(*given["query"].shape)
                compress_window(**given, keep=window // 2, backend="triton")
        for tokens in (1, 16):
            pack_queries(torch.zeros(tokens, 8, 128, dtype=BF16), backend="triton")
    names = [build.name for build in builds]
    assert (names.count("score_kernel"), names.count("pack_kernel")) == (5, 1)
    assert all(build.resources()["spills"] == 0 for build in builds)


@pytest.mark.parametrize("target", TARGETS)
def test_ranking_compiles_once_for_all_lengths(target: str) -> None:
    """Without spills or atomics: a sort and a merge, each storing keys or positions."""
    with compiling_for(target) as builds:
        rank_rows(torch.zeros(2, 4096), backend="triton")
        rank_rows(torch.zeros(2, 64), backend="triton")
        assert sorted(build.name for build in builds) == ["merge_kernel"] * 2 + ["sort_kernel"] * 2
        for rows, width in ((1, 1024), (5, 70000), (2, 16)):
            rank_rows(torch.zeros(rows, width), sinks=1, newest=width // 2, backend="triton")
        assert len(builds) == 4
    for build in builds:
        assert build.resources()["spills"] == 0, f"{build.name} spills: {build.resources()}"
        assert build.shared <= SHARED[target]
        assert not re.search(r"\b(atom|red)\.|_atomic_|\bds_(add|max|min|or)_", build.assembly), build.name


PAYLOADS = (PayloadShape(), PayloadShape(576, 0, torch.float8_e4m3fn), PayloadShape(form="exact", channels=80))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", PAYLOADS, ids=lambda shape: shape.label)
def test_payload_kernels_meet_the_goals(shape: PayloadShape, target: str) -> None:
    """No spills or atomics, 16-byte accesses of the pool, warps to hide its latency. Here no exception is needed."""
    with compiling_for(target) as builds:
        shape.launch()
    coded = {"quantize_kernel", "dequantize_kernel"} if shape.form != "exact" else set()
    assert {build.name for build in builds} == {"gather_kernel", "scatter_kernel"} | coded
    rows = [{"triton": "", "shape": shape.label, **facts(build)} for build in builds]
    assert not [(verdict.goal, row) for verdict in judge(rows, ()) for row in verdict.missed]
    for build in builds:  # a choice between two arguments is compiled into a load from a chosen address
        assert not re.search(r"(?<!\[)\b\w+_kernel_param_\d+;", build.assembly) or build.name == "scatter_kernel"


def test_payloads_compile_nothing_after_the_first() -> None:
    """For any number of rows, sections and grades, and for slices of buffers at any address that 16 divides."""
    k = torch.zeros(2, 40, 16, 2, 64, dtype=BF16)
    lists, table = torch.arange(600).int().expand(2, 2, 600), torch.arange(80).int() % 40
    room = torch.zeros(1 << 20, dtype=torch.uint8)
    with compiling_for("sm_80") as builds:
        for i, (tokens, rows, grade_rows) in enumerate([(600, 300, 64), (601, 5, 128), (65536, 600, 64), (70, 64, 64)]):
            layout = PayloadLayout(layers=2, heads=2, dim=64, v_dim=64, dtype=BF16, tokens=tokens, rows=rows,
                                   grade_rows=grade_rows)  # fmt: skip
            given = PayloadArguments(
                cache=PagedCache(k, k.clone()), block_table=table[i:], layout=layout, sections=len(layout.sections) - i,
                payload=room[-room.data_ptr() % 64 + 16 * i :][: layout.nbytes], rows=lists[..., :rows],
            )  # fmt: skip
            launch_quantize(given)
            launch_dequantize(given)
    assert sorted(build.name for build in builds) == [
        "dequantize_kernel", "gather_kernel", "quantize_kernel", "scatter_kernel"
    ]  # fmt: skip


def test_nothing_compiles_after_a_warm_up_call() -> None:
    """A call with lengths of zero compiles everything: batch, lengths, keep, budget and queries do not specialise."""
    with compiling_for("sm_90") as builds:
        given = arguments(256, 128, 128, 4, 16, torch.bfloat16)
        given["seq_lens"].zero_()
        starts = torch.zeros(1, dtype=torch.int32)
        compress_window(**given, window_starts=starts, keep=128, backend="triton")
        compiled = len(builds)
        assert compiled == 3
        for sequences, queries, keep, fraction in [
            (1, 256, 128, 0.3),
            (3, 300, 100, 0.2),
            (8, 17, 1, 0.0),  # no chunk budget at all
            (2, 256, 255, 0.9),
        ]:
            given = arguments(256, 128, 128, 4, 16, torch.bfloat16, sequences, queries)
            starts = torch.zeros(sequences, dtype=torch.int32)
            compress_window(
                **given, window_starts=starts, keep=keep, chunk_fraction=fraction, max_chunk=keep, backend="triton"
            )
        assert len(builds) == compiled


BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.mark.parametrize(("k_dtype", "v_dtype", "k_scale"), [
    (BF16, BF16, None), (FP16, FP16, None), (FP32, FP32, None), (FP8, FP8, 0.5), (FP8, FP8, torch.tensor([2.0])),
    (BF16, FP8, None), (FP8, BF16, 1),
])  # fmt: skip
def test_the_shim_compiles_nothing_after_its_warm_up(
    k_dtype: torch.dtype, v_dtype: torch.dtype, k_scale: float | torch.Tensor | None
) -> None:
    """For any batch. By default Triton recompiles if a pointer or a number is a multiple of 16."""
    layers, heads, group, dim, page = 2, 2, 2, 32, 16
    policy = Policy(window=32, keep=16, tail=16, max_sequences=9)
    with compiling_for("sm_80") as builds:
        pools = [
            [torch.zeros(72, page, heads, dim, dtype=dtype) for _ in range(layers)] for dtype in (k_dtype, v_dtype)
        ]
        cache = PagedCache(*pools)
        ring = QueryRing(
            policy, layers=layers, query_heads=heads * group, kv_heads=heads, head_dim=dim, max_sequences=9,
            max_tokens=64, dtype=k_dtype if k_dtype.itemsize > 1 else BF16, device="cpu",
        )  # fmt: skip
        warm_up(cache, ring, policy, k_scale=k_scale, backend="triton")
        compiled = [build.name for build in builds]
        # For windows of 32, and of 8 when blocks are short.
        assert sorted(compiled) == 2 * ["compact_kernel"] + 2 * ["keep_kernel"] + 2 * ["score_kernel"]
        ring.prepare([Span(str(s), 0, 0, 1) for s in range(9)])
        plans = [
            Plan(str(s), 99, 80 + s, 64 + s, window_start=16 + s, window=32, keep=16 - s,
                 blocks=tuple(range(8 * s, 8 * s + 6 + s % 3)), first_written=s % 2, kept_blocks=5, last_query=40,
                 num_queries=policy.query_rows)
            for s in range(9)
        ]  # fmt: skip
        for count in range(1, 10):
            execute(plans[:count], cache, ring, policy, k_scale=k_scale, backend="triton")
            short = [plan._replace(window=policy.least_window, keep=4) for plan in plans[:count]]
            execute(short, cache, ring, policy, k_scale=k_scale, backend="triton")
        assert [build.name for build in builds] == compiled


SLICES = [(0, 1, 8, 64), (1, 1, 8, 64), (1, 2, 7, 63), (3, 4, 8, 64), (16, 16, 5, 5)]  # first, S, blocks, queries


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("starts", [True, False])
def test_slices_of_buffers_compile_nothing(starts: bool, in_place: bool) -> None:
    """An engine with permanent buffers for lengths, tables and queries passes slices at any offset."""
    given = arguments(64, 64, 64, 2, 16, BF16, 9)
    numbers = torch.zeros(3, 40, dtype=torch.int32)
    tables, rows = torch.zeros(40, 13, dtype=torch.int32), torch.zeros(40, 71, dtype=torch.int32)
    queries = torch.zeros(2, 40, 100, 4, 64, dtype=BF16)
    compiled: int | None = None
    with compiling_for("sm_80") as builds:
        for first, count, width, number in SLICES:
            some = slice(first, first + count)
            given |= {
                "block_tables": tables[some, first % 3 : first % 3 + width], "seq_lens": numbers[0, some],
                "protected_lens": numbers[1, some], "window_starts": numbers[2, some] if starts else None,
                "query": queries.flatten(1, 2)[:, first:] if in_place else queries[:, some, first : first + number],
                "query_rows": rows[some, :number] if in_place else None,
            }  # fmt: skip
            numeric = {"redundancy": 0, "scale": 1, "k_scale": 1} if first % 2 else {"redundancy": 0.0, "scale": 0.5}
            compress_window(**given, keep=32 - first, backend="triton", **numeric)
            compiled = compiled or len(builds)
            assert len(builds) == compiled, [build.name for build in builds[compiled:]]


def test_slices_of_rows_of_scores_compile_nothing() -> None:
    given = arguments(64, 64, 64, 2, 16, BF16, 9)
    scores = torch.zeros(2, 40, 2, 64)
    with compiling_for("sm_80") as builds:
        for first, count in [(0, 1), (1, 1), (3, 2), (5, 4), (16, 16)]:
            some = scores[:, first : first + count]
            given |= {"query": None, "block_tables": torch.zeros(count, 5, dtype=torch.int32)}
            given["seq_lens"] = torch.zeros(count, dtype=torch.int32)
            compress_window(**given, scores=some, keep=32, backend="triton")
            select_topk(some[0], 30 + first, backend="triton")
            expand_chunks(some[1], 30 + first, first, 8, backend="triton")
        assert sorted(build.name for build in builds) == [
            "compact_kernel", "keep_kernel", "keep_kernel", "topk_kernel"
        ]  # fmt: skip


def test_a_single_row_is_compiled_for_as_any_other_is() -> None:
    """One layer, head and sequence: no second row tells how rows are aligned, and the next batch has one."""
    with compiling_for("sm_80") as builds:
        for sequences in (1, 2):
            given = arguments(33, 16, 16, 1, 16, BF16, sequences, heads=1)
            given |= {name: given[name][0] for name in ("query", "k_cache", "v_cache")}
            compress_window(**given, keep=16, value_norm=False, backend="triton")
        assert len(builds) == 3


@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("sequences", [1, 5])
def test_launches_do_not_grow_with_layers_or_sequences(
    layers: int, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    run = JITFunction.run
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *a, **k: (launched.append(self.fn.__name__), run(self, *a, **k))[1]
    )
    given = arguments(64, 64, 64, 2, 16, torch.bfloat16, sequences)
    for name in ("query", "k_cache", "v_cache"):
        given[name] = [given[name][0].clone() for _ in range(layers)]
    with compiling_for("sm_80"):
        for options in ({}, {"reduction": "rms", "value_norm": True, "redundancy": 1.0}):
            for pool, count in (("head", 3), ("layer", 4), ("model", 4)):
                launched.clear()
                compress_window(**given, keep=32, pool=pool, backend="triton", **options)
                assert len(launched) == count


WAITS = {
    "plain": ({}, {"keep_kernel", "compact_kernel"}),
    "pooled": ({"pool": "layer"}, {"compact_kernel"}),
    "reduced": ({"reduce_scores": torch.neg}, {"compact_kernel"}),
    "given": ({"query": None, "scores": torch.zeros(2, 1, 2, 64)}, {"compact_kernel"}),
    "dry run": ({"dry_run": True}, {"keep_kernel"}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", WAITS)
def test_kernels_that_overlap_wait_before_they_touch_memory(
    form: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With programmatic dependent launch. A kernel waits for one of its own event only, so that each has waited for all
    before it, and the first of the next event, launched ordinarily, waits for all of this one."""
    monkeypatch.setenv("KARA_KERNELS_PDL", "1")
    given, waits = WAITS[form]
    with compiling_for(target) as builds:
        compress_window(**arguments(64, 64, 64, 2, 16, BF16) | given, keep=32, backend="triton")
    if target in ("sm_80", "gfx942", "gfx950"):
        assert not any("griddepcontrol" in build.assembly for build in builds)
        return
    assert {build.name for build in builds if build.kernel.metadata.launch_pdl} == waits
    for build in builds:
        code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", sass(build.kernel.asm["cubin"]), re.M)
        before = list(itertools.takewhile(lambda line: "ACQBULK" not in line, code))
        if build.name in waits:
            assert len(before) < len(code), "no wait"
            touches = [
                line for line in before if re.search(r"\b(LD|ST|LDG|STG|LDGSTS|RED|ATOM|BRA|UBLKCP|UTMA\w*)\b", line)
            ]
            assert not touches, build.name
        else:
            assert len(before) == len(code), "waits for a kernel that is not of its event"
        leads = build.name == "score_kernel" or (build.name == "keep_kernel" and "keep_kernel" in waits)
        assert any("PREEXIT" in line for line in code) == leads, build.name


MIXED = [
    (BF16, FP8), (FP8, BF16), (FP16, FP32), (FP16, BF16), (FP8, torch.uint8), (torch.uint8, torch.int8)
]  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize(("k_dtype", "v_dtype"), MIXED)
def test_keys_and_values_of_different_types(k_dtype: torch.dtype, v_dtype: torch.dtype, target: str) -> None:
    given = arguments(64, 64, 64, 2, 16, BF16)
    for name, dtype in (("k_cache", k_dtype), ("v_cache", v_dtype)):
        given[name] = [pool.to(dtype) for pool in given[name]]
    if k_dtype == torch.uint8:
        given |= {"query": None, "scores": torch.zeros(2, 1, 2, 64)}
    with compiling_for(target) as builds:
        compress_window(**given, keep=32, value_norm=v_dtype.is_floating_point, backend="triton")
    assert {"keep_kernel", "compact_kernel"} <= {build.name for build in builds}
    assert all(build.resources()["spills"] == 0 for build in builds)


FIRST = itertools.count(0, 2)


class Driver(CompileOnly):
    """Two GPUs with different targets. Records where kernels are launched."""

    def __init__(self, *targets: GPUTarget) -> None:
        super().__init__("sm_80")
        # Kernels are kept for each device, so that no two drivers may share a number.
        self.first = self.current = next(FIRST)
        self.second = self.first + 1
        self.targets = dict(zip((self.first, self.second), targets, strict=True))
        self.launched: list[tuple[int, int, int | str]] = []  # current device, stream, target that it was compiled for
        self.switched: list[int] = []
        self.launcher_cls = lambda source, metadata: (
            lambda x, y, z, stream, *rest: self.launched.append((self.current, stream, metadata.target.arch))
        )

    def get_current_target(self) -> GPUTarget:
        return self.targets[self.current]

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def set_current_device(self, device: int) -> None:
        self.switched.append(device)
        self.current = device


@pytest.fixture
def two_gpus(request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = Driver(*(TARGETS[name] if isinstance(name, str) else name for name in request.param))
    with driving(driver):
        yield driver


@pytest.mark.parametrize("two_gpus", [("sm_90", "gfx942"), ("gfx950", "sm_80")], indirect=True)
def test_kernels_run_where_their_tensors_are(two_gpus: Driver) -> None:
    """On the tensors' device and stream and with its configuration, whichever device is current."""
    first, second = two_gpus.first, two_gpus.second

    class OnSecond(torch.Tensor):
        """A tensor that claims to be on the second GPU, like tensors made from it."""

        device = torch.device("cuda", second)  # type: ignore[assignment]

    given = arguments(64, 64, 64, 2, 16, BF16, 2)
    for name in ("query", "k_cache", "v_cache", "block_tables", "seq_lens"):
        value = given[name] if isinstance(given[name], torch.Tensor) else torch.stack(given[name])
        given[name] = value.as_subclass(OnSecond)
    there = second, 1000 + second, two_gpus.targets[second].arch
    compress_window(**given, keep=32, pool="layer", backend="triton")
    assert two_gpus.launched == [there] * 4
    launch_topk(torch.zeros(3, 9).int(), torch.zeros(3, 64).as_subclass(OnSecond), 9)
    rows = torch.zeros(1, 1, 3, 64).as_subclass(OnSecond)
    made = launch_keep(torch.zeros(1, 1, 3, 9).int(), rows, rows[:, :, :, None], None, None, 2, 8)
    again = made.again(("partials_ptr", "indices_ptr"))
    launch_again([again, again], rows.device, {"partials_ptr": rows, "indices_ptr": torch.zeros(3, 9).int()})
    assert two_gpus.launched == [there] * 8
    assert two_gpus.current == first
    for index, target in two_gpus.targets.items():
        assert architecture(torch.device("cuda", index)) == ARCHITECTURES[target.arch]
    # Tensors on the current device switch nothing.
    two_gpus.current = second
    two_gpus.switched.clear()
    compress_window(**given, keep=32, pool="layer", backend="triton")
    assert two_gpus.launched == [there] * 12
    assert not two_gpus.switched


@pytest.mark.parametrize("two_gpus", [("sm_90", "sm_80")], indirect=True)
def test_the_current_device_is_back_after_a_launch_that_fails(two_gpus: Driver) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            raise RuntimeError(f"on {two_gpus.current}")

    with pytest.raises(RuntimeError, match=f"on {two_gpus.second}"):
        launch(Broken(), (1, 1, 1), torch.device("cuda", two_gpus.second))
    assert two_gpus.current == two_gpus.first


@pytest.mark.parametrize(
    "two_gpus", [(GPUTarget("cuda", 75, 32), GPUTarget("hip", "gfx90a", 64))], indirect=True
)  # fmt: skip
def test_unknown_targets_get_what_every_gpu_has(two_gpus: Driver) -> None:
    nvidia, amd = (architecture(torch.device("cuda", index)) for index in two_gpus.targets)
    assert nvidia.shared_memory == amd.shared_memory == 65536 == min(a.shared_memory for a in ARCHITECTURES.values())
    assert not nvidia.amd
    assert amd.amd
    for known in (nvidia, amd):
        with pytest.raises(FrozenInstanceError):
            known.shared_memory = 1 << 20  # type: ignore[misc]
    with pytest.raises(TypeError):
        ARCHITECTURES[75] = nvidia  # type: ignore[index]


def test_what_launchers_are_told_is_what_triton_knows() -> None:
    for name, target in TARGETS.items():
        assert ARCHITECTURES[target.arch].shared_memory == SHARED[name]
        assert ARCHITECTURES[target.arch].amd == (target.backend == "hip")
