"""Rows of a context to a payload and back: the reference against an oracle in plain Python, kernels against the
reference, bit for bit and in poisoned memory, and what a prefix of a payload is worth."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import payload_oracle
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from on_gpu import ON_GPU
from payload_oracle import FLOATS
from payload_worlds import BF16, CONTENTS, FP8, FP16, FP32, POISON, Case, Context
from worlds import LAYOUTS, NEEDS_EQUAL_DIMS, bits

from kara_kernels import ops
from kara_kernels.ops._rows import from_words, to_words
from kara_kernels.ops._triton import tl, triton
from kara_kernels.paged import WORDS
from kara_kernels.payload import PayloadLayout
from kara_kernels.reference.quantize import hadamard

kernels = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="runs kernels: interpreted, or on a GPU")


@st.composite
def cases(draw: st.DrawFn, dims: tuple[int, ...] = (2, 4, 6, 8, 12, 16), tokens: int = 150) -> Case:
    form = draw(st.sampled_from(("int8", "int8", "int4", "fp8", "exact")))
    dtypes = {"fp8": (BF16, FP16, FP32), "exact": (BF16, torch.float64, torch.int8, FP8[0])}
    dtype = draw(st.sampled_from(dtypes.get(form, (BF16, FP16, FP32, *FP8))))
    dim, count = draw(st.sampled_from(dims)), draw(st.integers(1, tokens))
    layout = draw(st.sampled_from(LAYOUTS))
    v_dim = dim if layout in NEEDS_EQUAL_DIMS else draw(st.sampled_from((0, *dims)))
    channels = draw(st.none() | st.sampled_from(range(2, dim + 1, 2)))
    coded = form in ("int8", "int4")
    return Case(
        dim, v_dim, dtype, form, count, draw(st.none() | st.integers(1, count)), draw(st.booleans()), channels,
        -1 if form == "exact" else draw(st.sampled_from((-1, 0))), draw(st.booleans()) if coded else False,
        draw(st.sampled_from((64, 128))), draw(st.integers(1, 2)), draw(st.integers(1, 3)),
        draw(st.sampled_from((1, 4, 16))), layout, draw(st.sampled_from(CONTENTS)), draw(st.sampled_from((0, 3))),
        draw(st.sampled_from((64, 61))), draw(st.integers(0, 99)),
    )  # fmt: skip


SPECIAL = (
    Case(tokens=150, rows=140, channels=6, layers=1, grade_rows=128),
    Case(tokens=200, rows=70, places=False, form="int4"),
    Case(16, 0, FP32, tokens=66, exact_rows=0, content="zeros"),
    Case(dtype=FP16, content="constant", rotate=False),
    Case(dtype=FP8[0], form="int4", content="outliers", tokens=65, exact_rows=64),
    Case(dtype=FP32, form="fp8", content="huge", channels=2),
    Case(dtype=BF16, content="tiny", rotate=False),
    Case(tokens=1, heads=1, layers=1, form="int8"),
)


def prefixes(context: Context) -> list[int]:
    """The ends of sections from the first grade on."""
    ends = [(s.kind, s.offset + s.nbytes) for s in context.layout.sections]
    first = next(i for i, (kind, _) in enumerate(ends) if kind == "rows")
    return [end for _, end in ends[first:]]


@settings(max_examples=40)
@given(cases())
def test_the_reference_writes_what_the_oracle_writes(case: Case) -> None:
    check_against_the_oracle(case)


@pytest.mark.parametrize("case", SPECIAL, ids=str)
def test_the_reference_writes_what_the_oracle_writes_of(case: Case) -> None:
    check_against_the_oracle(case)


def check_against_the_oracle(case: Case) -> None:
    """All bytes of the payload, and of the world after each prefix of it is decoded."""
    context = Context(case)
    before = context.world.snapshot()
    room, payload = context.payload()
    poison, expected = room.clone(), context.oracle()
    context.encode("torch", payload)
    context.world.assert_untouched(before)
    written = [own if byte is None else byte for byte, own in zip(expected, poison[POISON:].tolist(), strict=False)]
    poison[POISON : POISON + len(written)] = torch.tensor(written, dtype=torch.uint8)
    assert torch.equal(room, poison)
    for nbytes, to in itertools.product(prefixes(context), ("places", "front")):
        target = Context(replace(case, seed=case.seed + 1))
        after = target.decoded(bytes(payload[:nbytes].tolist()), to if case.places else "front")
        target.decode("torch", payload[:nbytes], to)
        target.world._assert_equal(after)


# Runs of 64, of fewer, none; slices that divide the row or not; V of another width.
WIDE = (
    Case(128, 128, tokens=100), Case(64, 64, FP8[0], "int4", tokens=70), Case(80, 64, FP16, channels=50),
    Case(96, 40, FP32, tokens=130, rotate=False), Case(576, 0, heads=1, layers=1, page=16), Case(128, 96, form="fp8"),
    Case(72, 256, form="exact", channels=7), Case(256, 64, form="exact"), Case(64, 64, FP8[1], rows=66, channels=40),
)  # fmt: skip


@kernels
@settings(max_examples=30)
@given(cases(dims=(2, 8, 12, 16, 24, 64)))
def test_the_kernel_writes_what_the_reference_writes(case: Case) -> None:
    check_the_kernel(case)


@kernels
@pytest.mark.parametrize("case", SPECIAL + WIDE, ids=str)
def test_the_kernel_writes_what_the_reference_writes_of(case: Case) -> None:
    check_the_kernel(case)


def check_the_kernel(case: Case) -> None:
    rooms = []
    context = Context(case)
    before = context.world.snapshot()
    for backend in ("torch", "triton"):
        room, payload = context.payload()
        context.encode(backend, payload)
        rooms.append(room)
    assert torch.equal(*rooms)
    context.world.assert_untouched(before)
    ends = prefixes(context)
    for nbytes, to in itertools.product({ends[0], ends[len(ends) // 2], ends[-1]}, ("places", "front")):
        worlds = []
        for backend in ("torch", "triton"):
            target = Context(replace(case, seed=case.seed + 1))
            target.decode(backend, payload[:nbytes], to)
            worlds.append(target.world)
        worlds[1]._assert_equal(worlds[0].buffers)
        assert torch.equal(*rooms)


@pytest.mark.parametrize("form", ["exact", "int8"])
@pytest.mark.parametrize(("tokens", "dtype"), [(65536, torch.int16), (65537, torch.int32)])
def test_places_in_long_contexts(tokens: int, dtype: torch.dtype, form: str, backend: str) -> None:
    """16 bits are read as unsigned; a longer context has 32."""
    pool = torch.arange(1, 1025 * 64 + 1).view(1, 1025, 64, 1, 1).expand(-1, -1, -1, -1, 2).float()
    table = torch.arange(1024, -1, -1).int()
    places = torch.tensor([tokens - 1, 40_000, 32_768, 32_767, 0, 65_535 - 64]).int()
    layout = PayloadLayout(
        layers=1, heads=1, dim=2, v_dim=0, dtype=FP32, tokens=tokens, rows=6, form=form, rotate=False
    )
    write, read = (ops.gather_rows, ops.scatter_rows) if form == "exact" else (ops.quantize_rows, ops.dequantize_rows)
    payload = write(pool.contiguous(), None, table, places[None, None], layout, backend=backend)
    stored = [s.of(payload)["index"] for s in layout.sections if "index" in s.arrays]
    assert stored[0].dtype == dtype
    size = 1 << 8 * dtype.itemsize
    assert [i % size for part in stored for i in part.flatten().tolist()] == places.tolist()
    back = torch.zeros_like(pool).contiguous()
    read(payload, layout, back, None, table, backend=backend)
    rows = back[0].flip(0).flatten(0, 2)
    assert rows[:, 0].nonzero().flatten().tolist() == sorted(places.tolist())
    expected = pool[0].flip(0).flatten(0, 2)[places.long()]
    assert ((rows[places.long()] - expected).abs() <= (0 if form == "exact" else 70_000 / 480)).all()


# ----------------------------------------------------------------------------------------------- what rows are worth


def floats(context: Context, half: int, layer: int) -> torch.Tensor:
    """Rows of a half, best first, float64 ``[H, R, D]``."""
    cache = context.halves(layer)[half]
    blocks, places = context.world.window_cells(0)
    found = bits(cache)[blocks, places].view(cache.dtype).double().transpose(0, 1)
    if context.rows is None:
        return found[:, : context.layout.rows]
    return found.gather(1, context.rows[layer].long()[..., None].expand(-1, -1, found.shape[-1]))


def rotation(run: int, dim: int) -> torch.Tensor:
    """The orthogonal matrix of (-1) ** (set bits of i & j) for each run."""
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(run)] for i in range(run)]).double()
    return torch.block_diag(*[matrix / run**0.5] * (dim // run))


@pytest.mark.parametrize("content", ["normal", "outliers", "constant"])
@pytest.mark.parametrize(
    ("dtype", "rotate"), [(BF16, True), (BF16, False), (FP32, True), (FP16, False), (FP8[0], True)]
)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_promised_error(form: str, dtype: torch.dtype, rotate: bool, content: str) -> None:
    """Half a step of 240, or eight and a half with four bits, and the rounding of bounds and results."""
    case = Case(32, 32, dtype, form, 150, content=content, rotate=rotate, exact_rows=0, grade_rows=192)
    source, target = Context(case), Context(replace(case, seed=1))
    _, payload = source.payload()
    source.encode("torch", payload)
    target.rows = source.rows
    target.decode("torch", payload)
    share = (0.5 if form == "int8" else 8.5) / 240
    spacing = torch.finfo(dtype).eps
    of_bounds = torch.finfo(source.layout.bounds_dtype).eps
    for layer, half in itertools.product(range(2), range(2)):
        exact, found = floats(source, half, layer), floats(target, half, layer)
        if half == 0 and rotate:  # in the rotated channels; the result was rounded before, up to all of it in one
            turn = rotation(32, 32)
            rounding = (found.abs() * spacing / 2 + torch.finfo(dtype).tiny).sum(-1, keepdim=True)
            exact, found = exact @ turn, found @ turn
        else:
            rounding = found.abs() * spacing / 2 + torch.finfo(dtype).tiny
        groups = exact.split(64, 1) if half == 0 else [exact]
        high = torch.cat([g.amax(1 if half == 0 else 2, keepdim=True).expand_as(g) for g in groups], 1)
        low = torch.cat([g.amin(1 if half == 0 else 2, keepdim=True).expand_as(g) for g in groups], 1)
        magnitude = torch.maximum(high.abs(), low.abs())
        stored = of_bounds * magnitude if rotate and half == 0 else 0.0  # bounds of rotated channels are rounded
        assert ((found - exact).abs() <= share * (high - low) + rounding + stored + 2e-6 * magnitude).all()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_equal_elements_are_exact(form: str) -> None:
    """A range of zero has no steps, and its bound is the value."""
    case = Case(form=form, content="constant", rotate=False)
    source, target = Context(case), Context(replace(case, seed=1, content="normal"))
    _, payload = source.payload()
    source.encode("torch", payload)
    target.rows = source.rows
    target.decode("torch", payload)
    assert torch.equal(floats(source, 0, 0), floats(target, 0, 0))


def test_rotation_is_what_its_matrix_says() -> None:
    """Exact in small integers: one order of sums is like another there."""
    x = torch.randint(-9, 10, (5, 3 * 64), generator=torch.Generator().manual_seed(0))
    for run in (1, 2, 8, 64):
        matrix = rotation(run, 192) * run**0.5
        assert torch.equal(hadamard(x.float(), run).double(), (x.double() @ matrix).round())
        assert torch.equal(hadamard(hadamard(x.float(), run), run), x.float() * run)


def test_fp8_saturates() -> None:
    case = Case(2, 2, FP32, "fp8", 4, exact_rows=0, layers=1, heads=1, places=False)
    context = Context(case)
    numbers = torch.tensor([[448.0, 449.0], [-1e30, 464.0], [480.0, -torch.inf], [torch.inf, 2.0**-10]])
    context.world.write_keys(0, 0, numbers[:, None])
    _, payload = context.payload()
    context.encode("torch", payload)
    context.decode("torch", payload)
    found = context.world.read_keys(0, 0)[:, 0]
    assert found.tolist() == [[448.0, 448.0], [-448.0, 448.0], [448.0, -448.0], [448.0, 0.0]]


# ----------------------------------------------------------------------------------------------------------- prefixes


def written(context: Context, backend: str = "torch") -> torch.Tensor:
    payload = torch.zeros(context.layout.nbytes, dtype=torch.uint8)
    context.encode(backend, payload)
    return payload


@pytest.mark.parametrize("channels", [None, 6])
def test_four_bits_are_the_beginning_of_eight(channels: int | None, backend: str) -> None:
    case = Case(tokens=300, channels=channels, grade_rows=128)
    eight, four = (written(Context(replace(case, form=form)), backend) for form in ("int8", "int4"))
    assert len(four) < len(eight)
    assert torch.equal(four, eight[: len(four)])


@pytest.mark.parametrize("form", ["exact", "fp8", "int8", "int4"])
def test_fewer_rows_are_the_beginning_of_more(form: str) -> None:
    """If the smaller payload ends with a grade."""
    whole = Context(Case(form=form, tokens=400, grade_rows=128))
    payload = written(whole)
    for rows in (128 + whole.layout.exact_rows, 256 + whole.layout.exact_rows):
        part = Context(replace(whole.case, rows=rows))
        assert whole.rows is not None
        part.rows = whole.rows[..., :rows]
        part.world = whole.world
        smaller = written(part)
        grades = [section for section in part.layout.sections if section.kind != "residual"]
        end = grades[-1].offset + grades[-1].nbytes
        assert torch.equal(smaller[:end], payload[:end])
        assert end == len(smaller) or form == "int8"


@pytest.mark.parametrize("to", ["places", "front"])
@pytest.mark.parametrize("form", ["exact", "fp8", "int8", "int4"])
def test_a_prefix_has_the_rows_of_the_whole(form: str, to: str) -> None:
    """A grade is decoded alike whatever follows it: from four bits, or from eight once its residuals are there."""
    case = Case(form=form, tokens=300, rows=280, grade_rows=64)
    source = Context(case)
    payload = written(source)
    layout = source.layout

    def rows(nbytes: int) -> list[torch.Tensor]:
        target = Context(replace(case, seed=2))
        target.rows = source.rows if to == "places" else torch.arange(280).int().expand(2, 2, -1)
        target.decode("torch", payload[:nbytes], to)
        return [floats(target, half, layer) for half in range(2) for layer in range(2)]

    whole = rows(layout.nbytes)
    four = rows(next(s.offset for s in layout.sections if s.kind == "residual")) if form == "int8" else whole
    untouched = Context(replace(case, seed=2))
    untouched.rows = source.rows if to == "places" else torch.arange(280).int().expand(2, 2, -1)
    before = [floats(untouched, half, layer) for half in range(2) for layer in range(2)]
    for nbytes in prefixes(source):
        sections = layout.held(nbytes)
        held, finer = layout.rows_in(sections), layout.rows_in(sections, "residual")
        for i, found in enumerate(rows(nbytes)):
            assert torch.equal(found[:, :finer], whole[i][:, :finer])
            assert torch.equal(found[:, finer:held], four[i][:, finer:held])
            assert torch.equal(found[:, held:].nan_to_num(), before[i][:, held:].nan_to_num())


def test_a_sequence_does_not_depend_on_its_blocks_or_neighbours(backend: str) -> None:
    """Two worlds with other pages, layouts and layers around the same rows."""
    first = Context(Case(tokens=130, layers=2, heads=2))
    second = Context(Case(tokens=130, layers=1, heads=2, page=16, layout="HND", seed=5))
    assert first.rows is not None
    second.rows = first.rows[1:]
    for mine, other in zip(first.halves(1), second.halves(0), strict=True):
        bits(other)[second.world.window_cells(0)] = bits(mine)[first.world.window_cells(0)]
    payloads = written(first, backend), written(second, backend)
    for one, two in zip(first.layout.sections, second.layout.sections, strict=True):
        for name, array in two.of(payloads[1]).items():
            assert torch.equal(bits(one.of(payloads[0])[name][1]), bits(array[0])), name


# ------------------------------------------------------------------------------------------------------------ numbers


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Random bits of float32, and those around every boundary of a format: ties, subnormals, the largest."""
    draw = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (20_000,), generator=draw).int().view(FP32)
    near = torch.randn(20_000, generator=draw) * 2.0 ** torch.randint(-24, 17, (20_000,), generator=draw)
    form = FLOATS[str(dtype).removeprefix("torch.")]
    every = range(0, 1 << 8 * form.size, 1 if form.size == 1 else 37)
    grid = torch.tensor([form.decode(code) for code in every], dtype=torch.float64)
    ties = (grid[1:] + grid[:-1]) / 2
    exact = torch.cat((grid, ties, ties * (1 + 2.0**-20), ties * (1 - 2.0**-20))).float()
    found = torch.cat((random, near, exact, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 65519.9])))
    return found[~found.isnan()]


@pytest.mark.parametrize("dtype", [FP16, BF16, *FP8], ids=str)
def test_the_oracle_rounds_as_torch_does(dtype: torch.dtype) -> None:
    form = FLOATS[str(dtype).removeprefix("torch.")]
    x = numbers(dtype)
    cast = x if dtype not in FP8 else x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    expected = bits(cast.to(dtype)).tolist()
    size = 1 << 8 * form.size
    assert [form.encode(value) for value in x.tolist()] == [code % size for code in expected]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_the_oracle_reads_every_byte_as_torch_does(dtype: torch.dtype) -> None:
    form = FLOATS[str(dtype).removeprefix("torch.")]
    codes = torch.arange(256, dtype=torch.uint8)
    found = torch.tensor([form.decode(code) for code in codes.tolist()])
    assert torch.equal(found.nan_to_num(-1.0), codes.view(dtype).float().nan_to_num(-1.0))
    again = [form.encode(value) for value in found.tolist()]
    expected = [form.nan if value != value else min(code & 127, form.largest) | code & 128
                for code, value in zip(codes.tolist(), found.tolist(), strict=True)]  # fmt: skip
    assert again == expected


@triton.jit
def cast_kernel(x_ptr, words_ptr, back_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = to_words(tl.load(x_ptr + offs), KIND)
    tl.store(words_ptr + offs, words)
    tl.store(back_ptr + offs, from_words(words, KIND))


@triton.jit
def read_kernel(words_ptr, x_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, from_words(tl.load(words_ptr + offs), KIND))


def launched(kernel: Any, blocks: int, tensors: list[torch.Tensor], kind: str) -> None:
    """Interpreted, on a GPU or in the emulator; writes into ``tensors``."""
    if ON_GPU:
        there = [tensor.cuda() for tensor in tensors]
        kernel[(blocks, 1, 1)](*there, KIND=kind, BLOCK=256, enable_fp_fusion=False)
        for own, tensor in zip(tensors, there, strict=True):
            own.copy_(tensor)
    elif INTERPRETED:
        kernel[(blocks, 1, 1)](*tensors, KIND=kind, BLOCK=256, enable_fp_fusion=False)
    else:
        from ptx import emulating

        with emulating() as launches:
            kernel[(blocks, 1, 1)](*tensors, KIND=kind, BLOCK=256, enable_fp_fusion=False)
        assert not [str(problem) for launch in launches for problem in launch.problems]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, *FP8], ids=str)
def test_kernels_round_as_torch_does(dtype: torch.dtype) -> None:
    """Half to even, at every tie and among subnormals; float8 saturates."""
    x = numbers(dtype) if dtype != FP32 else numbers(BF16)
    x = x[: len(x) // 256 * 256]
    cast = x if dtype not in FP8 else x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    expected = cast.to(dtype)
    found, back = bits(torch.zeros_like(expected)), torch.zeros_like(x)
    launched(cast_kernel, len(x) // 256, [x, found, back], str(dtype).removeprefix("torch.").removeprefix("float8_"))
    assert torch.equal(found, bits(expected))
    assert torch.equal(back, expected.float())


@pytest.mark.parametrize("dtype", [FP16, BF16, *FP8], ids=str)
def test_kernels_read_every_pattern(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    codes = torch.arange(1 << 8 * size).to(WORDS[size])
    found = torch.zeros(len(codes))
    launched(read_kernel, len(codes) // 256, [codes, found], str(dtype).removeprefix("torch.").removeprefix("float8_"))
    expected = codes.view(dtype).float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_kernels_write_no_number_for_what_is_none() -> None:
    x = torch.full((256,), torch.nan)
    for dtype in (FP16, BF16, *FP8):
        words = torch.zeros(256, dtype=WORDS[dtype.itemsize])
        kind = str(dtype).removeprefix("torch.").removeprefix("float8_")
        launched(cast_kernel, 1, [x, words, torch.zeros(256)], kind)
        assert words.view(dtype).float().isnan().all(), dtype


def test_the_rotation_of_the_oracle_is_its_own_inverse() -> None:
    x = [np.float32(i * i % 23 - 11) for i in range(48)]
    twice = payload_oracle.hadamard(payload_oracle.hadamard(x, 16), 16)
    assert twice == [16 * y for y in x]
