"""The emulator itself: every instruction against plain Python, and every report against code with that bug."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from ptx.instructions import OTHERS, PURE
from ptx.machine import ORDERS, Kernel, Launch, run
from ptx.program import UnknownPTX

HEADER = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %rs<64>;
.reg .b32 %r<64>;
.reg .b64 %rd<64>;
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
{load}
{body}
ret;
}}
"""


def kernel(body: str, arrays: int, warps: int = 1) -> Kernel:
    """``%rd0``, ``%rd1`` ... are the addresses of the arguments; ``%r0`` is the thread, ``%r1`` the block."""
    names = [f"kernel_param_{i}" for i in range(arrays)]
    text = HEADER.format(
        parameters=",\n".join(f".param .u64 .ptr .global .align 1 {name}" for name in names),
        threads=32 * warps,
        load="\n".join(f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names)),
        body=body,
    )
    return Kernel(text)


def execute(body: str, *arrays: np.ndarray, warps: int = 1, blocks: int = 1, **options: object) -> Launch:
    launch = run(kernel(body, len(arrays), warps), (blocks, 1, 1), arrays, warps=warps, **options)  # type: ignore[arg-type]
    return launch


def kinds(launch: Launch) -> set[str]:
    return {problem.kind for problem in launch.problems}


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy aligned to a memory sector."""
    room = np.zeros(values.nbytes + 32, np.uint8)
    start = -room.ctypes.data % 32
    out = room[start : start + values.nbytes].view(values.dtype)
    out[:] = values
    return out


CHASE = "ld.global.b64 %rd1, [%rd0];\nld.global.b64 %rd2, [%rd1];\n"
SIDE_BY_SIDE = "ld.global.b32 %r2, [%rd0];\nadd.s32 %r2, %r2, %r2;\nld.global.b32 %r3, [%rd0+8];\n"
STORE = "st.global.b32 [%rd0+16], %r2;\nst.global.b32 [%rd0+20], %r3;\n"
BY_ONE_WARP = "setp.lt.u32 %p1, %r0, 32;\n@%p1 ld.global.b32 %r2, [%rd0];\n"
BARRIER = "bar.sync 0;\nld.global.b32 %r3, [%rd0];\n"


@pytest.mark.parametrize(
    ("body", "trips"),
    [
        (CHASE, 1), (CHASE + "st.global.b64 [%rd0+16], %rd2;", 2), (SIDE_BY_SIDE, 0), (SIDE_BY_SIDE + STORE, 1),
        (SIDE_BY_SIDE + STORE + CHASE, 2), (STORE + CHASE, 1),
        ("setp.lt.u32 %p1, %r0, 0;\n@%p1 ld.global.b32 %r2, [%rd0];\n" + STORE, 0),  # nobody asks
        (BY_ONE_WARP + "st.global.b32 [%rd0+16], %r2;\n" + BARRIER + STORE, 2),  # the other warp waits, too
        (BY_ONE_WARP + BARRIER + STORE, 1),  # a barrier alone waits for no load
        ("ld.global.b32 %r2, [%rd0];\nsetp.eq.u32 %p1, %r2, 7;\n@%p1 bra $L;\n$L:\n" + BARRIER + STORE, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", ORDERS)
def test_round_trips_are_counted(body: str, trips: int, order: str) -> None:
    place = aligned(np.zeros(4, np.uint64))
    place[0] = place.ctypes.data
    assert execute(body, place, warps=2, order=order, timed=True).counts.round_trips == trips
    assert execute(body, place, warps=2, order=order).counts.round_trips is None


def test_a_parameter_that_a_program_chooses() -> None:
    """Compilers merge two branches that differ in arguments only into one that loads from a chosen address."""
    out, first, second = aligned(np.zeros(32, np.uint64)), np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    execute(
        "setp.lt.u32 %p1, %r0, 5;\nmov.b64 %rd5, kernel_param_1;\nmov.b64 %rd6, kernel_param_2;\n"
        "selp.b64 %rd7, %rd5, %rd6, %p1;\nld.param.b64 %rd8, [%rd7];\nmul.wide.u32 %rd9, %r0, 8;\n"
        "add.s64 %rd9, %rd0, %rd9;\nst.global.b64 [%rd9], %rd8;",
        out, first, second,
    )  # fmt: skip
    assert out.tolist() == [first.ctypes.data if i < 5 else second.ctypes.data for i in range(32)]


# -------------------------------------------------------------------------- registers to registers, against Python

WIDTH = {"pred": 4, "b16": 2, "b32": 4, "b64": 8, "f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8}
INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    64,
    100,
    255,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x1234567890ABCDEF,
]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    3.0,
    1e-40,
    -1e-40,
    1e38,
    -1e38,
    math.inf,
    -math.inf,
    math.nan,
    0.1,
    1 + 2**-23,
    2**-126,
    65519.0,
]


def width(kind: str) -> int:
    return WIDTH.get(kind) or int(kind[1:]) // 8


def register(kind: str, number: int) -> str:
    if kind == "pred":
        return f"%p{number}"
    return {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}[width(kind)] + str(number)


def to_number(kind: str, bits: int) -> int | float | bool:
    """The value of a register's bits."""
    if kind == "pred":
        return bits != 0
    if kind == "f16":
        return struct.unpack("<e", bits.to_bytes(2, "little"))[0]
    if kind in ("bf16", "f32", "tf32"):
        return struct.unpack("<f", (bits << 16 if kind == "bf16" else bits).to_bytes(4, "little"))[0]
    if kind == "f64":
        return struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    size = 8 * int(kind[1:]) // 8
    bits &= (1 << size) - 1
    return bits - (1 << size) if kind[0] == "s" and bits >> size - 1 else bits


def nearest_float(value: Fraction | float, places: int, lowest: int, ties: str = "even") -> float:
    """A number rounded once to ``places`` bits of mantissa, with the given lowest exponent."""
    if isinstance(value, float) or value == 0:
        return float(value)
    exponent = max(math.frexp(float(abs(value)))[1] - 1, lowest)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent and exponent > lowest:
        exponent -= 1
    step = Fraction(2) ** (exponent - places)
    quotient = abs(value) / step
    whole = quotient.numerator // quotient.denominator
    rest = quotient - whole
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and (ties == "away" or whole % 2 == 1))
    size = (whole + up) * step
    return math.copysign(float(size), value) if size < Fraction(2) ** 1024 else math.copysign(math.inf, value)


def to_float32(value: Fraction | float) -> float:
    rounded = nearest_float(value, 23, -126)
    return math.copysign(math.inf, rounded) if abs(rounded) >= 2.0**128 and not math.isnan(rounded) else rounded


def exactly(function: Callable) -> Callable:
    """Computes finite numbers as fractions, rounded once to float32, and others as IEEE floats."""

    def apply(*values: float) -> float:
        if all(map(math.isfinite, values)):
            exact = function(*map(Fraction, values))
            # A fraction has one zero.
            return to_float32(exact) if exact else float(np.float32(function(*map(np.float64, values))))
        return float(function(*map(np.float64, values)))

    return apply


def compared(operation: Callable, unordered: bool) -> Callable:
    return lambda a, b: unordered if math.isnan(a) or math.isnan(b) else operation(a, b)


def not_nan(choose: Callable) -> Callable:
    """PTX min and max ignore a NaN operand."""
    return lambda a, b: b if math.isnan(a) else a if math.isnan(b) else choose(a, b)


def with_nan(choose: Callable) -> Callable:
    return lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else choose(a, b)


def root(a: float) -> float:
    return float(np.float32(math.sqrt(a))) if a >= 0 else math.nan


def power_of_two(a: float) -> float:
    return float(np.float32(np.exp2(np.float64(a))))


def rounded(places: int, ties: str = "even") -> Callable:
    """Rounds to a format with float32's exponent range."""
    return lambda a: nearest_float(Fraction(a), places, -126, ties) if math.isfinite(a) and a else a


def f16_bits(a: float) -> int:
    """To nearest, ties to even; every NaN becomes 0x7FFF."""
    return 0x7FFF if math.isnan(a) else int(np.float16(np.float32(a)).view(np.uint16))


def bf16_bits(a: float) -> int:
    """To nearest, ties to even; every NaN becomes 0x7FFF."""
    number = rounded(7)(a)
    with np.errstate(over="ignore"):  # beyond the largest lies infinity
        return 0x7FFF if math.isnan(a) else int(np.float32(number).view(np.uint32)) >> 16


def fused_bf16(a: float, b: float, c: float) -> float:
    if all(map(math.isfinite, (a, b, c))) and (exact := Fraction(a) * Fraction(b) + Fraction(c)):
        near = nearest_float(exact, 7, -126, "even")
        return near if abs(near) < 2.0**128 else math.copysign(math.inf, near)
    return float(np.float64(a) * np.float64(b) + np.float64(c))


def divided(a: float, b: float) -> float:
    if b == 0 or not math.isfinite(a) or not math.isfinite(b):
        with np.errstate(all="ignore"):
            return float(np.float64(a) / np.float64(b))
    return to_float32(Fraction(a) / Fraction(b)) if a else math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))


def flushed(a: float) -> float:
    return math.copysign(0.0, a) if abs(a) < 2.0**-126 else a


def field(value: int, position: int, length: int, signed: bool, bits: int = 32) -> int:
    """bfe as in the pseudo code of the ISA."""
    position, length = position & 255, length & 255
    sign = 0
    if signed and length:
        sign = value >> min(position + length - 1, bits - 1) & 1
    out = 0
    for i in range(bits):
        bit = value >> position + i & 1 if i < length and position + i < bits else sign
        out |= bit << i
    return out


def permuted(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = []
    for place in range(4):
        choice = selector >> 4 * place & 15
        byte = source[choice & 7]
        out.append((255 if byte & 128 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(out), "little")


# opcode: (types of the sources, type of the result, the same in Python numbers)
EXPECTED: dict[str, tuple[list[str], str, Callable]] = {
    "add.s32": (["s32"] * 2, "s32", lambda a, b: a + b),
    "add.s64": (["s64"] * 2, "s64", lambda a, b: a + b),
    "sub.s32": (["s32"] * 2, "s32", lambda a, b: a - b),
    "mul.lo.s32": (["s32"] * 2, "s32", lambda a, b: a * b),
    "mul.lo.s64": (["s64"] * 2, "s64", lambda a, b: a * b),
    "add.f32": (["f32"] * 2, "f32", exactly(lambda a, b: a + b)),
    "sub.f32": (["f32"] * 2, "f32", exactly(lambda a, b: a - b)),
    "mul.f32": (["f32"] * 2, "f32", exactly(lambda a, b: a * b)),
    "mul.rn.f16": (["f16"] * 2, "f16", lambda a, b: float(np.float16(a * b))),  # float64 holds the product exactly
    "add.f64": (["f64"] * 2, "f64", lambda a, b: a + b),
    "min.s32": (["s32"] * 2, "s32", min),
    "max.s32": (["s32"] * 2, "s32", max),
    "min.u32": (["u32"] * 2, "u32", min),
    "min.s64": (["s64"] * 2, "s64", min),
    "max.s64": (["s64"] * 2, "s64", max),
    "max.f32": (["f32"] * 2, "f32", not_nan(max)),
    "min.f32": (["f32"] * 2, "f32", not_nan(min)),
    "max.NaN.f32": (["f32"] * 2, "f32", with_nan(max)),
    "mul.hi.u32": (["u32"] * 2, "u32", lambda a, b: a * b >> 32),
    "mul.hi.s32": (["s32"] * 2, "s32", lambda a, b: a * b >> 32),
    "mul.hi.u64": (["u64"] * 2, "u64", lambda a, b: a * b >> 64),
    "mul.hi.s64": (["s64"] * 2, "s64", lambda a, b: a * b >> 64),
    "div.s32": (["s32"] * 2, "s32", lambda a, b: math.trunc(Fraction(a, b)) if b else -1),
    "div.u32": (["u32"] * 2, "u32", lambda a, b: a // b if b else -1),
    "mul.wide.u16": (["u16"] * 2, "u32", lambda a, b: a * b),
    "mul.wide.u32": (["u32"] * 2, "u64", lambda a, b: a * b),
    "mul.wide.s32": (["s32"] * 2, "s64", lambda a, b: a * b),
    "mad.lo.s64": (["s64"] * 3, "s64", lambda a, b, c: a * b + c),
    "mad.wide.s32": (["s32", "s32", "s64"], "s64", lambda a, b, c: a * b + c),
    "mad.wide.u32": (["u32", "u32", "u64"], "u64", lambda a, b, c: a * b + c),
    "fma.rn.bf16": (["bf16"] * 3, "bf16", fused_bf16),
    "fma.rn.f32": (["f32"] * 3, "f32", exactly(lambda a, b, c: a * b + c)),
    "and.b16": (["b16"] * 2, "b16", lambda a, b: a & b),
    "and.b32": (["b32"] * 2, "b32", lambda a, b: a & b),
    "and.b64": (["b64"] * 2, "b64", lambda a, b: a & b),
    "and.pred": (["pred"] * 2, "pred", lambda a, b: a and b),
    "or.b32": (["b32"] * 2, "b32", lambda a, b: a | b),
    "or.b64": (["b64"] * 2, "b64", lambda a, b: a | b),
    "or.pred": (["pred"] * 2, "pred", lambda a, b: a or b),
    "xor.b32": (["b32"] * 2, "b32", lambda a, b: a ^ b),
    "xor.b64": (["b64"] * 2, "b64", lambda a, b: a ^ b),
    "xor.pred": (["pred"] * 2, "pred", lambda a, b: a != b),
    "not.pred": (["pred"], "pred", lambda a: not a),
    "not.b32": (["b32"], "b32", lambda a: ~a),
    "shl.b16": (["b16", "u32"], "b16", lambda a, n: a << min(n, 16)),
    "shl.b32": (["b32", "u32"], "b32", lambda a, n: a << min(n, 32)),
    "shl.b64": (["b64", "u32"], "b64", lambda a, n: a << min(n, 64)),
    "shr.s32": (["s32", "u32"], "s32", lambda a, n: a >> min(n, 31)),
    "shr.s64": (["s64", "u32"], "s64", lambda a, n: a >> min(n, 63)),
    "shr.u32": (["u32", "u32"], "u32", lambda a, n: a >> min(n, 32)),
    "shr.u64": (["u64", "u32"], "u64", lambda a, n: a >> min(n, 64)),
    "neg.s32": (["s32"], "s32", lambda a: -a),
    "neg.f32": (["f32"], "f32", lambda a: -a),
    "abs.f32": (["f32"], "f32", abs),
    "abs.s32": (["s32"], "s32", abs),
    "div.full.f32": (["f32"] * 2, "f32", divided),
    "div.approx.f32": (["f32"] * 2, "f32", divided),
    "div.approx.ftz.f32": (["f32"] * 2, "f32", lambda a, b: flushed(divided(flushed(a), flushed(b)))),
    "div.rn.f64": (["f64"] * 2, "f64", lambda a, b: float(np.float64(a) / np.float64(b))),
    "sqrt.rn.f32": (["f32"], "f32", root),
    "sqrt.approx.ftz.f32": (["f32"], "f32", lambda a: root(flushed(a))),
    "ex2.approx.f32": (["f32"], "f32", power_of_two),
    "ex2.approx.ftz.f32": (["f32"], "f32", lambda a: flushed(power_of_two(a))),
    "setp.eq.b32": (["b32"] * 2, "pred", lambda a, b: a == b),
    "setp.lt.s32": (["s32"] * 2, "pred", lambda a, b: a < b),
    "setp.gt.s64": (["s64"] * 2, "pred", lambda a, b: a > b),
    "setp.ge.s64": (["s64"] * 2, "pred", lambda a, b: a >= b),
    "setp.gt.u32": (["u32"] * 2, "pred", lambda a, b: a > b),
    "setp.le.u64": (["u64"] * 2, "pred", lambda a, b: a <= b),
    "setp.ne.b16": (["b16"] * 2, "pred", lambda a, b: a != b),
    "setp.eq.f32": (["f32"] * 2, "pred", compared(lambda a, b: a == b, False)),
    "setp.ne.f32": (["f32"] * 2, "pred", compared(lambda a, b: a != b, False)),
    "setp.neu.f32": (["f32"] * 2, "pred", compared(lambda a, b: a != b, True)),
    "setp.gt.f32": (["f32"] * 2, "pred", compared(lambda a, b: a > b, False)),
    "setp.ltu.f32": (["f32"] * 2, "pred", compared(lambda a, b: a < b, True)),
    "setp.nan.f32": (["f32"] * 2, "pred", compared(lambda a, b: False, True)),
    "setp.num.f32": (["f32"] * 2, "pred", compared(lambda a, b: True, False)),
    "selp.b16": (["b16", "b16", "pred"], "b16", lambda a, b, p: a if p else b),
    "selp.b32": (["b32", "b32", "pred"], "b32", lambda a, b, p: a if p else b),
    "selp.b64": (["b64", "b64", "pred"], "b64", lambda a, b, p: a if p else b),
    "selp.f32": (["f32", "f32", "pred"], "f32", lambda a, b, p: a if p else b),
    "mov.b32": (["b32"], "b32", lambda a: a),
    "mov.u64": (["u64"], "u64", lambda a: a),
    "mov.pred": (["pred"], "pred", lambda a: a),
    "cvt.s64.s32": (["s32"], "s64", lambda a: a),
    "cvt.u16.u32": (["u32"], "u16", lambda a: a),
    "cvt.u32.u16": (["u16"], "u32", lambda a: a),
    "cvt.u32.u64": (["u64"], "u32", lambda a: a),
    "cvt.u64.u32": (["u32"], "u64", lambda a: a),
    "cvt.rn.f32.s32": (["s32"], "f32", lambda a: to_float32(Fraction(a))),
    "cvt.rn.f16.s32": (["s32"], "f16", lambda a: float(np.float16(a))),
    "cvt.rn.f32.u32": (["u32"], "f32", lambda a: to_float32(Fraction(a))),
    "cvt.rn.f32.u16": (["u16"], "f32", lambda a: float(a)),
    "cvt.rzi.s32.f32": (["f32"], "s32", lambda a: 0 if a != a else int(max(-(2.0**31), min(2.0**31 - 1, a)))),
    "cvt.f32.f16": (["f16"], "f32", lambda a: a),
    "cvt.f64.f32": (["f32"], "f64", lambda a: a),
    "cvt.rn.f32.f64": (["f64"], "f32", lambda a: to_float32(Fraction(a)) if math.isfinite(a) and a else a),
    "cvt.rn.f16.f32": (["f32"], "f16", lambda a: float(np.float16(np.float32(a)))),
    "cvt.f32.bf16": (["bf16"], "f32", lambda a: a),
    "cvt.rn.bf16.f32": (["f32"], "bf16", rounded(7)),
    "cvt.rn.f16x2.f32": (["f32"] * 2, "b32", lambda a, b: f16_bits(a) << 16 | f16_bits(b)),
    "cvt.rn.bf16x2.f32": (["f32"] * 2, "b32", lambda a, b: bf16_bits(a) << 16 | bf16_bits(b)),
    "cvt.rna.tf32.f32": (["f32"], "tf32", rounded(10, "away")),
    "bfe.u32": (["u32"] * 3, "u32", lambda a, n, length: field(a, n, length, False)),
    "bfe.s32": (["s32", "u32", "u32"], "s32", lambda a, n, length: field(a & 0xFFFFFFFF, n, length, True)),
    "bfe.u64": (["u64", "u32", "u32"], "u64", lambda a, n, length: field(a, n, length, False, 64)),
    "bfe.s64": (["s64", "u32", "u32"], "s64", lambda a, n, length: field(a & (1 << 64) - 1, n, length, True, 64)),
    "prmt.b32": (["b32"] * 3, "b32", permuted),
}  # fmt: skip


def test_every_kind_of_instruction_is_tested() -> None:
    for pattern, _ in PURE:
        assert any(re.fullmatch(pattern, opcode) for opcode in EXPECTED), pattern
    source = Path(__file__).read_text()
    for pattern, _ in OTHERS:
        assert re.search(rf"(?<![\w.]){pattern}(?![\w.])", source), pattern


def operands(sources: list[str]) -> list[tuple[int, ...]]:
    """Bits of 128 choices of operands: corner cases first, then random ones."""
    draw = random.Random(repr(sources))
    corners = []
    for kind in sources:
        bits = 8 * width(kind)
        pool = [value & (1 << bits) - 1 for value in INTEGERS]
        if kind in ("f32", "f64"):
            pool = [int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", value), "little") for value in FLOATS]
        elif kind == "pred":
            pool = [0, 1]
        corners.append([*pool, *(draw.getrandbits(bits) for _ in range(8 if kind != "pred" else 0))])
    product = list(itertools.product(*corners))
    return [product[0], product[-1], *(draw.choice(product) for _ in range(126))]


@pytest.mark.parametrize("opcode", EXPECTED)
def test_instruction(opcode: str) -> None:
    sources, result, function = EXPECTED[opcode]
    given = operands(sources)
    arrays = [np.array([row[i] for row in given], f"u{width(kind)}") for i, kind in enumerate(sources)]
    out = np.zeros(128, f"u{width(result)}")
    body = ""
    for i, kind in enumerate(sources):
        size, at = width(kind), 10 + i
        body += f"mad.wide.u32 %rd{20 + i}, %r0, {size}, %rd{i};\n"
        if kind == "pred":
            body += f"ld.global.b32 %r{40 + i}, [%rd{20 + i}];\nsetp.ne.b32 %p{at}, %r{40 + i}, 0;\n"
        else:
            body += f"ld.global.b{8 * size} {register(kind, at)}, [%rd{20 + i}];\n"
    size, held = width(result), register(result, 9)
    body += f"{opcode} {held}, {', '.join(register(kind, 10 + i) for i, kind in enumerate(sources))};\n"
    if result == "pred":
        body, held = body + "selp.b32 %r8, 1, 0, %p9;\n", "%r8"
    body += f"mad.wide.u32 %rd40, %r0, {size}, %rd{len(sources)};\nst.global.b{8 * size} [%rd40], {held};"
    assert not execute(body, *arrays, out, warps=4).problems
    with np.errstate(all="ignore"):
        for row, bits in zip(given, out.tolist(), strict=True):
            numbers = [to_number(kind, value) for kind, value in zip(sources, row, strict=True)]
            expected, got = function(*numbers), to_number(result, bits)
            if isinstance(expected, float):
                same = math.isnan(expected) and math.isnan(got)
                if result == "f32" and abs(expected) > np.finfo(np.float32).max and math.isfinite(expected):
                    expected = math.copysign(math.inf, expected)
                if result in ("f32", "f64") and opcode.startswith("ex2"):
                    same |= got == pytest.approx(expected, rel=2e-7, abs=2e-45)
                # Which zero min and max return is not tested.
                same |= got == expected and (
                    math.copysign(1, got) == math.copysign(1, expected) or opcode[1:3] in ("ax", "in")
                )
                assert same, f"{opcode} of {numbers} is {expected}, got {got}"
            else:
                assert got == to_number(result, int(expected) & (1 << 8 * size) - 1), f"{opcode} of {numbers}"


# ------------------------------------------------------------------------------ other lanes, memory, order of things

FOUR_BYTES = "mad.wide.u32 %rd20, %r0, 4, %rd0;\nmad.wide.u32 %rd21, %r0, 4, %rd1;\n"


@pytest.mark.parametrize(("mode", "distance", "clamp", "source"), [
    ("bfly", 1, 31, lambda lane: lane ^ 1),
    ("bfly", 16, 31, lambda lane: lane ^ 16),
    ("up", 4, 0, lambda lane: lane - 4 if lane >= 4 else lane),
    ("down", 8, 31, lambda lane: lane + 8 if lane + 8 < 32 else lane),
    ("idx", 5, 31, lambda lane: 5),
    ("idx", 3, 6175, lambda lane: lane // 8 * 8 + 3),  # 0x181f: segments of eight lanes
    ("bfly", 4, 7199, lambda lane: lane),  # 0x1c1f: segments of four, which lane ^ 4 leaves
])  # fmt: skip
def test_shuffle(mode: str, distance: int, clamp: int, source: Callable[[int], int]) -> None:
    """shfl.sync.bfly.b32 and its siblings."""
    if (mode, distance, clamp) == ("bfly", 4, 7199):
        source = lambda lane: lane if (lane ^ 4) > (lane & 28 | 3) else lane ^ 4  # noqa: E731
    values, out = np.arange(64, dtype=np.uint32) * 7, np.zeros(64, np.uint32)
    launch = execute(
        FOUR_BYTES + f"ld.global.b32 %r10, [%rd20];\nshfl.sync.{mode}.b32 %r11, %r10, {distance}, {clamp}, -1;\n"
        "st.global.b32 [%rd21], %r11;", values, out, warps=2,
    )  # fmt: skip
    assert not launch.problems
    assert out.tolist() == [7 * (warp * 32 + source(lane)) for warp in range(2) for lane in range(32)]


@pytest.mark.parametrize(("name", "function"), [
    ("add.s32", sum), ("min.s32", min), ("max.s32", max), ("min.u32", min), ("max.u32", max), ("add.u32", sum),
    ("xor.b32", lambda values: functools.reduce(operator.xor, values)),
])  # fmt: skip
def test_reduction(name: str, function: Callable) -> None:
    kind = np.int32 if name.endswith("s32") else np.uint32
    values = np.array([random.Random(i).getrandbits(32) for i in range(64)], np.uint32).view(kind)
    out = np.zeros(64, kind)
    execute(FOUR_BYTES + "ld.global.b32 %r10, [%rd20];\nmov.b32 %r12, -1;\n"  # redux.sync.add.s32
            f"redux.sync.{name} %r11, %r10, %r12;\nst.global.b32 [%rd21], %r11;", values, out, warps=2)  # fmt: skip
    for warp in range(2):
        expected = function(values[warp * 32 : warp * 32 + 32].tolist()) & 0xFFFFFFFF
        assert (out[warp * 32 : warp * 32 + 32].view(np.uint32) == expected).all()


def test_vectors_are_packed_and_unpacked() -> None:
    """mov.b64 and mov.b32 in both directions, low part first. A part may go nowhere."""
    values, out = np.arange(32, dtype=np.uint64) * 0x100010001 + 0x1122334455667788, np.zeros(32, np.uint64)
    execute("mad.wide.u32 %rd20, %r0, 8, %rd0;\nmad.wide.u32 %rd21, %r0, 8, %rd1;\nld.global.b64 %rd22, [%rd20];\n"
            "mov.b64 {%r10, _}, %rd22;\nmov.b64 {_, %r11}, %rd22;\nmov.b32 {%rs1, %rs2}, %r10;\n"
            "mov.b32 %r12, {%rs2, %rs1};\nmov.b64 %rd23, {%r12, %r11};\n"
            "st.global.b64 [%rd21], %rd23;", values, out)  # fmt: skip
    halves = values.view(np.uint16).reshape(32, 4)
    assert (out.view(np.uint16).reshape(32, 4) == halves[:, [1, 0, 2, 3]]).all()


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_matrix_product(kind: str) -> None:
    """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 and its siblings, by the fragment tables of the ISA."""
    depth = 8 if kind == "tf32" else 16
    draw = np.random.default_rng(0)
    a, b, c = draw.standard_normal((16, depth)), draw.standard_normal((depth, 8)), draw.standard_normal((16, 8))

    def bits(value: float) -> int:
        word = int(np.float32(value).view(np.uint32))
        if kind == "f16":
            return int(np.float16(value).view(np.uint16))
        return word >> 16 if kind == "bf16" else word & 0xFFFFE000

    def number(value: float) -> float:
        return float(to_number({"tf32": "f32"}.get(kind, kind), bits(value)))

    per = 1 if kind == "tf32" else 2
    fragments = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(4):
            row = group + (8 if i % 2 else 0)
            columns = [thread * per + j + (depth // 2 if i >= 2 else 0) for j in range(per)]
            fragments[lane, i] = sum(bits(a[row, column]) << 16 * j for j, column in enumerate(columns))
        for i in range(2):
            rows = [thread * per + j + (depth // 2 if i else 0) for j in range(per)]
            fragments[lane, 4 + i] = sum(bits(b[row, group]) << 16 * j for j, row in enumerate(rows))
        for i in range(4):
            value = c[group + (8 if i >= 2 else 0), thread * 2 + i % 2]
            fragments[lane, 6 + i] = np.float32(value).view(np.uint32)
    out = np.zeros((32, 4), np.float32)
    body = "mad.wide.u32 %rd20, %r0, 40, %rd0;\nmad.wide.u32 %rd21, %r0, 16, %rd1;\n"
    body += "".join(f"ld.global.b32 %r{10 + i}, [%rd20+{4 * i}];\n" for i in range(10))
    launch = execute(
        body + f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{ %r30, %r31, %r32, %r33 }}, "
        "{ %r10, %r11, %r12, %r13 }, { %r14, %r15 }, { %r16, %r17, %r18, %r19 };\n"
        "st.global.v4.b32 [%rd21], { %r30, %r31, %r32, %r33 };", fragments, out,
    )  # fmt: skip
    exact = np.vectorize(number)(a) @ np.vectorize(number)(b) + c.astype(np.float32)
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
            assert out[lane, i] == pytest.approx(exact[row, column], rel=1e-6, abs=1e-6)
    assert launch.counts.matrix_operations == 2 * 16 * 8 * depth


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_loaded(count: int, transposed: bool) -> None:
    """ldmatrix.sync.aligned.m8n8.x4.shared.b16 and ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16."""
    values, out = np.arange(256, dtype=np.uint16), np.zeros((32, 4), np.uint32)
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    trans = ".trans" if transposed else ""
    body = f"""mad.wide.u32 %rd20, %r0, 16, %rd0;
        mad.wide.u32 %rd21, %r0, 16, %rd1;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd20];
        shl.b32 %r14, %r0, 4;
        st.shared.v4.b32 [%r14], {{%r10, %r11, %r12, %r13}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r14];
        """
    body += "".join(f"st.global.b32 [%rd21+{4 * i}], %r{20 + i};\n" for i in range(count))
    assert not execute(body, values, out, shared=512).problems
    matrices = values.reshape(4, 8, 8)
    for lane, i in itertools.product(range(32), range(count)):
        matrix = matrices[i].T if transposed else matrices[i]
        low, high = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
        assert out[lane, i] == low | high << 16


def test_addition_of_many_threads_with_a_loop_and_early_exit() -> None:
    """Each thread leaves a loop after as many rounds as its number. Threads diverge and reconverge."""
    out = np.zeros(64, np.uint32)
    body = """mad.wide.u32 %rd20, %r0, 4, %rd0;
        mov.b32 %r10, 0;
        mov.b32 %r11, 0;
        $L_loop:
        setp.ge.s32 %p1, %r10, %r0;
        @%p1 bra $L_done;
        add.s32 %r11, %r11, %r10;
        add.s32 %r10, %r10, 1;
        bra.uni $L_loop;
        $L_done:
        bar.warp.sync -1;
        shfl.sync.bfly.b32 %r12, %r11, 1, 31, -1;
        st.global.b32 [%rd20], %r12;"""
    launch = execute(body, out, warps=2)
    assert not launch.problems
    assert out.tolist() == [sum(range(thread ^ 1)) for thread in range(64)]


def test_a_predicate_leaves_registers_alone_where_it_is_false() -> None:
    """ld.global.b32, st.global.b32 and arithmetic under @%p and @!%p."""
    out = np.full(32, 9, np.uint32)
    body = """mad.wide.u32 %rd20, %r0, 4, %rd0;
        setp.lt.s32 %p1, %r0, 10;
        setp.lt.s32 %p2, %r0, 20;
        mov.b32 %r10, 1;
        @%p1 mov.b32 %r10, 2;
        @!%p1 add.s32 %r10, %r10, 4;
        @%p2 st.global.b32 [%rd20], %r10;"""
    execute(body, out)
    assert out.tolist() == [2] * 10 + [5] * 10 + [9] * 12


# Reverses 128 words of a block through shared memory.
REVERSE = """
    mad.lo.s32 %r2, %r1, 128, %r0;
    mad.wide.u32 %rd20, %r2, 4, %rd0;
    mad.wide.u32 %rd21, %r2, 4, %rd1;
    ld.global.b32 %r10, [%rd20];
    shl.b32 %r11, %r0, 2;
    st.shared.b32 [%r11], %r10;
    bar.sync 0;
    sub.s32 %r12, 508, %r11;
    ld.shared.b32 %r13, [%r12];
    st.global.b32 [%rd21], %r13;
"""


def reverse(body: str = REVERSE, blocks: int = 3, **options: object) -> tuple[Launch, bool]:
    values, out = aligned(np.arange(128 * blocks, dtype=np.uint32)), aligned(np.zeros(128 * blocks, np.uint32))
    launch = execute(body, values, out, warps=4, blocks=blocks, **{"shared": 512, **options})
    return launch, bool((out.reshape(blocks, 128) == values.reshape(blocks, 128)[:, ::-1]).all())


@pytest.mark.parametrize("order", ORDERS)
def test_correct_code_is_not_accused(order: str) -> None:
    launch, right = reverse(order=order)
    assert right
    assert not launch.problems
    counts = launch.counts
    assert (counts.global_loaded, counts.global_stored) == (3 * 512, 3 * 512)
    assert counts.load_sectors == counts.store_sectors == counts.touched_load_sectors == 3 * 16
    assert counts.barriers == 3
    assert counts.shared_requests == counts.shared_wavefronts == counts.shared_least_wavefronts == 3 * 8
    assert counts.opcodes["bar.sync"] == 3 * 4
    assert counts.instructions == sum(counts.opcodes.values())


@pytest.mark.parametrize("order", ORDERS)
def test_a_dropped_barrier_is_a_race_in_any_order(order: str) -> None:
    launch, right = reverse(REVERSE.replace("bar.sync 0;", ""), order=order)
    assert kinds(launch) & {"read races with a write of shared memory", "write races in shared memory"}
    # In lockstep the data are still right, so correct data alone prove nothing.
    assert right == (order == "together")


def test_other_mistakes_with_shared_memory() -> None:
    launch, _ = reverse(REVERSE.replace("st.shared.b32 [%r11], %r10;", ""))
    assert kinds(launch) == {"read of shared memory that nobody wrote"}
    launch, _ = reverse(shared=508)
    assert kinds(launch) == {"shared access out of bounds"}
    assert all(problem.address == 508 for problem in launch.problems if "bounds" in problem.kind)
    launch, _ = reverse(REVERSE.replace("[%r11]", "[%r11+2]"), shared=1024)
    assert "misaligned shared access" in kinds(launch)
    launch, _ = reverse(REVERSE.replace("st.shared.b32 [%r11]", "st.shared.b32 [0]"))
    assert "write races in shared memory" in kinds(launch)


def test_barriers_that_not_all_come_to() -> None:
    half_a_warp = "setp.lt.s32 %p1, %r0, 16;\n@%p1 bar.sync 0;\n"
    assert "bar.sync that not all lanes have come to" in kinds(execute(half_a_warp, np.zeros(1), warps=2))
    one_warp = "setp.lt.s32 %p1, %r0, 32;\n@%p1 bar.sync 0;\n"
    found = kinds(execute(one_warp, np.zeros(1), warps=2))
    assert found == {"barrier that not all warps of the block have come to"}
    different = "setp.lt.s32 %p1, %r0, 32;\n@%p1 bra $L_a;\nbar.sync 0;\nbra.uni $L_b;\n$L_a:\nbar.sync 0;\n$L_b:\n"
    found = kinds(execute(different, np.zeros(1), warps=2))
    assert found == {"barrier that not all warps of the block have come to"}


@pytest.mark.parametrize("instruction", [
    "shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;", "redux.sync.add.s32 %r10, %r0, -1;", "bar.warp.sync -1;",
])  # fmt: skip
def test_warp_instructions_in_half_a_warp(instruction: str) -> None:
    body = f"setp.lt.s32 %p1, %r0, 16;\n@%p1 bra $L_skip;\n{instruction}\n$L_skip:\n"
    (found,) = kinds(execute(body, np.zeros(1)))
    assert found.endswith("that not all lanes have come to")


def test_global_memory_is_bounded_and_aligned() -> None:
    memory = np.zeros(64, np.uint32)
    body = "mad.wide.u32 %rd20, %r0, 4, %rd0;\nsetp.lt.s32 %p1, %r0, 16;\n@%p1 ld.global.b32 %r10, [%rd20+{at}];"
    for at, wrong in [(0, 0), (4, 1), (60, 15), (-4, 1), (64, 16)]:
        launch = execute(body.format(at=at), memory[16:32])
        assert launch.problem_count == wrong
        assert kinds(launch) <= {"access out of bounds"}
    assert execute(body.format(at=0).replace("@%p1 ", ""), memory[16:32]).problem_count == 16  # a mask was dropped
    assert "misaligned access" in kinds(execute(body.format(at=2), memory))
    launch = execute("mad.wide.u32 %rd20, %r0, 4, %rd0;\nst.global.b32 [%rd20], %r0;", memory[16:32])
    assert launch.problem_count == 16
    assert memory[16:32].tolist() == list(range(16))
    assert not memory[:16].any()
    assert not memory[32:].any()


MOVE = """mul.wide.u32 %rd20, %r0, 4;
    add.s64 %rd20, %rd20, %rd0;
    ld.global.b32 %r10, [%rd20+4];
    bar.sync 0;
    st.global.b32 [%rd20], %r10;"""


@pytest.mark.parametrize("order", ORDERS)
def test_moves_in_place_race_without_a_barrier(order: str) -> None:
    memory = np.arange(129, dtype=np.uint32)
    launch = execute(MOVE, memory, warps=4, order=order)
    assert not launch.problems
    assert memory.tolist() == [*range(1, 129), 128]
    memory = np.arange(129, dtype=np.uint32)
    launch = execute(MOVE.replace("bar.sync 0;", ""), memory, warps=4, order=order)
    # Two neighbours in each of three places: the warp below loads the first word of the warp above.
    assert launch.problem_count == 3
    assert kinds(launch) <= {"write races in global memory", "read races with a write of global memory"}
    assert (memory.tolist() == [*range(1, 129), 128]) == (order in ("together", "forward"))


def test_blocks_have_no_order() -> None:
    """No block may touch what another block writes in the same launch, with or without a barrier."""
    write = "mad.wide.u32 %rd20, %r1, 4, %rd0;\nmov.b32 %r5, %r1;\nadd.s32 %r5, %r5, 1;\n"
    one_word_each = write + "setp.eq.s32 %p1, %r0, 0;\n@%p1 st.global.b32 [%rd20], %r5;"
    assert not execute(one_word_each, np.zeros(100, np.uint32), blocks=100).problems
    everybody = one_word_each.replace("[%rd20]", "[%rd0]")
    assert kinds(execute(everybody, np.zeros(100, np.uint32), blocks=100)) == {"write races in global memory"}
    neighbour = one_word_each + "\nbar.sync 0;\nld.global.b32 %r10, [%rd0];"
    assert "read races with a write of global memory" in kinds(execute(neighbour, np.zeros(100, np.uint32), blocks=100))
    reads = "ld.global.b32 %r10, [%rd0];"
    assert not execute(reads, np.zeros(100, np.uint32), blocks=100).problems


COPY = """shl.b32 %r11, %r0, 4;
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    mad.wide.u32 %rd21, %r0, 16, %rd1;
    setp.lt.s32 %p1, %r0, 24;
    selp.b32 %r12, 16, 0, %p1;
    cp.async.cg.shared.global [%r11], [%rd20], 0x10, %r12;
    cp.async.commit_group;
    add.s32 %r13, %r11, 512;
    cp.async.ca.shared.global [%r13], [%rd20+512], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r11];
    st.global.v4.b32 [%rd21], {%r20, %r21, %r22, %r23};
    cp.async.wait_group 0;
    ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r13];
    st.global.v4.b32 [%rd21+512], {%r20, %r21, %r22, %r23};"""


def copied(body: str) -> tuple[Launch, list[int]]:
    values, out = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    return execute(body, values, out, shared=1024), out.tolist()


def test_asynchronous_copies_arrive_at_their_wait() -> None:
    launch, out = copied(COPY)
    assert not launch.problems
    assert out == [*range(96), *[0] * 32, *range(128, 256)]  # the last eight threads asked for no bytes: zeros
    assert not copied(COPY.replace("cp.async.wait_group 0;", "cp.async.wait_all;"))[0].problems
    late = {"read of an asynchronous copy before its wait"}
    launch, out = copied(COPY.replace("cp.async.wait_group 1;", "cp.async.wait_group 2;"))
    assert kinds(launch) >= late
    assert out[:96] != list(range(96))
    assert kinds(copied(COPY.replace("cp.async.wait_group 0;", ""))[0]) >= late
    uncommitted = COPY.replace("cp.async.commit_group;\n    cp.async.wait", "cp.async.wait")
    assert kinds(copied(uncommitted)[0]) >= late


def test_an_asynchronous_copy_needs_a_barrier_for_other_warps() -> None:
    body = """shl.b32 %r11, %r0, 4;
        xor.b32 %r12, %r11, 512;
        mad.wide.u32 %rd20, %r0, 16, %rd0;
        cp.async.cg.shared.global [%r11], [%rd20], 0x10;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        ld.shared.b32 %r13, [%r12];"""
    assert not execute(body, np.zeros(256, np.uint32), warps=2, shared=1024).problems
    launch = execute(body.replace("bar.sync 0;", ""), np.zeros(256, np.uint32), warps=2, shared=1024)
    assert "read races with a write of shared memory" in kinds(launch)
    again = body + "\ncp.async.cg.shared.global [%r11], [%rd20], 0x10;"  # while the other warp still reads
    launch = execute(again, np.zeros(256, np.uint32), warps=2, shared=1024)
    assert kinds(launch) == {"asynchronous copy races in shared memory"}


@pytest.mark.parametrize(("stride", "passes"), [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
def test_bank_conflicts_are_counted(stride: int, passes: int) -> None:
    body = f"mul.lo.s32 %r10, %r0, {stride};\nmov.b32 %r11, 1;\nst.shared.b32 [%r10], %r11;"
    assert execute(body, np.zeros(1), shared=8192).counts.shared_wavefronts == passes


@pytest.mark.parametrize(
    ("stride", "size", "expected"), [(4, 4, 4), (16, 16, 16), (32, 4, 32), (64, 4, 32), (0, 4, 1), (8, 4, 8)]
)
def test_sectors_are_counted(stride: int, size: int, expected: int) -> None:
    memory = aligned(np.zeros(4096, np.uint8))
    load = "ld.global.b32 %r10, [%rd20];" if size == 4 else "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd20];"
    counts = execute(f"mad.wide.u32 %rd20, %r0, {stride}, %rd0;\n{load}\n{load}", memory).counts
    assert counts.load_sectors == 2 * expected
    assert counts.touched_load_sectors == expected
    assert counts.global_loaded == 2 * 32 * size


@pytest.mark.parametrize("unknown", [
    "add.rz.f32 %r10, %r11, %r12;", "add.f16x2 %r10, %r11, %r12;", "ld.global.cv.b32 %r10, [%rd0];",
    "wgmma.fence.sync.aligned;", "atom.global.add.u32 %r10, [%rd0], %r11;", "bar.sync 1, 64;",
    "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "setp.lo.u32 %p1, %r1, %r2;",
    "shfl.sync.bfly.b32 %r10, %r11, 1, 31, 15;", "mov.b32 %r10, other_smem;",
    "cp.async.cg.shared.global [%r1], [%rd0], 8;",
])  # fmt: skip
def test_what_is_not_known_is_an_error(unknown: str) -> None:
    with pytest.raises(UnknownPTX, match="line"):
        kernel(unknown, 1)


def test_problems_name_their_place() -> None:
    body = ".loc 1 45 12 // compact.py:45:12\n" + "mad.wide.u32 %rd20, %r0, 4, %rd0;\nld.global.b32 %r10, [%rd20];"
    memory = np.zeros(63, np.uint32)
    launch = execute(body, memory, warps=2)
    (problem,) = launch.problems
    assert (problem.source, problem.warp, problem.lane, problem.block) == ("compact.py:45", 1, 31, 0)
    assert "compact.py:45" in str(problem)


def test_a_loop_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ptx.machine

    monkeypatch.setattr(ptx.machine, "STEP_LIMIT", 1000)
    with pytest.raises(RuntimeError, match="runs forever"):
        execute("$L_a:\nadd.s32 %r10, %r10, 1;\nbra $L_a;", np.zeros(1))
