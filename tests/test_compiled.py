"""What the compiler makes of every kernel, for four GPUs: no spills, no atomics, shared memory within limits, matrix
instructions where scores are made, wide accesses, and the barrier that in-place moves need.

Run with TRITON_INTERPRET=0; nothing is launched.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip(
        "compiles kernels, which an interpreting process cannot: run with TRITON_INTERPRET=0", allow_module_level=True
    )

from bench.codegen.inspect import sass
from bench.compile_only import SHARED, TARGETS, Build, compiling_for
from kara_kernels import compress_window
from kara_kernels.ops import compact_blocks, expand_chunks, score_window, select_topk

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
    "different values, causal": (256, 192, 128, 1, 16, torch.bfloat16, {"attention": "causal"}),
    "heads of 256": (256, 256, 256, 4, 16, torch.bfloat16, {}),  # wanted more shared memory than sm_90 has
    "narrow window, heads of 256": (128, 256, 256, 4, 16, torch.bfloat16, {}),
    "fp8": (256, 128, 128, 4, 16, torch.float8_e4m3fn, {"k_scale": 0.5}),
    "float32, slots": (100, 64, 64, 3, 1, torch.float32, {"chunk_fraction": 0.0}),
}


def arguments(window: int, dim: int, v_dim: int, group: int, page: int, dtype: torch.dtype, sequences: int = 1,
              queries: int | None = None, heads: int = 2) -> dict[str, Any]:  # fmt: skip
    """Two layers in pools of their own, so that kernels take base addresses from a table."""
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
                r"ld\.global\.[^ ]*v4\.b32|cp\.async\.cg.*, 0x10|(global|buffer)_load_dwordx4", builds[name].assembly
            ), name


def assert_barrier_before_store(build: Build, moves: int) -> None:
    """Between the last wide load and the first wide store of each move stands a barrier of the whole program."""
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
    """``fma(x, x, y)`` with a partner's ``y`` rounds another product in each of two lanes, which then hold two sums."""
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
    """Fused multiply-adds whose addend is what the last instruction before them that wrote it got from another lane."""
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
    """Of ``R4``, ``v4`` or ``v[4:5]``; ``R4`` of an instruction on ``pairs`` is R4 and R5."""
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
        "score_kernel", "pool_kernel", "topk_kernel", "expand_kernel", "compact_kernel"
    }  # fmt: skip
    assert all(build.resources()["spills"] == 0 for build in builds)


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
            (8, 17, 1, 0.0),
            (2, 256, 255, 0.9),
        ]:
            given = arguments(256, 128, 128, 4, 16, torch.bfloat16, sequences, queries)
            starts = torch.zeros(sequences, dtype=torch.int32)
            compress_window(
                **given, window_starts=starts, keep=keep, chunk_fraction=fraction, max_chunk=keep, backend="triton"
            )
        # No chunk budget at all is another kernel: the two steps it leaves out cost registers.
        assert len(builds) == compiled + 1


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
