"""The effect of each instruction, in NumPy, for all threads of some warps at once.

`compile_step` turns an instruction into a function of the warps that run it. An opcode is looked up with all its
modifiers. If there is no entry, it is an error, so no modifier is ignored silently. Most instructions only map
registers to registers and are entries of `PURE`. The rest affect memory, other lanes, or ordering.

Source of the semantics: PTX ISA 8.8, chapters 9.7 (instructions) and 9.7.14 (matrix fragments).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import DISCARD, Address, Immediate, Instruction, Operand, Register, UnknownPTX

TYPES = {
    "pred": np.dtype(bool), "b8": np.dtype("u1"), "b16": np.dtype("u2"), "b32": np.dtype("u4"), "b64": np.dtype("u8"),
    "u8": np.dtype("u1"), "u16": np.dtype("u2"), "u32": np.dtype("u4"), "u64": np.dtype("u8"),
    "s8": np.dtype("i1"), "s16": np.dtype("i2"), "s32": np.dtype("i4"), "s64": np.dtype("i8"),
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2"), "tf32": np.dtype("u4"),
}  # fmt: skip
Step = Callable[[Any], None]
ALL_LANES = (1 << 32) - 1

# ------------------------------------------------------------------------------------------ registers to registers


def _shift(operation: Callable, width: int) -> Callable:
    """Counts beyond the width shift everything out. NumPy would wrap them around."""

    def shift(value: np.ndarray, count: np.ndarray) -> np.ndarray:
        if value.dtype.kind == "i":
            return operation(value, np.minimum(count, width - 1).astype(value.dtype))
        shifted = operation(value, np.minimum(count, width - 1).astype(value.dtype))
        return np.where(count < width, shifted, 0).astype(value.dtype)

    return shift


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    wide = object if a.itemsize == 8 else np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wide) * b.astype(wide) >> np.array(8 * a.itemsize, wide)).astype(a.dtype)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers divided towards zero; all ones for a divisor of zero, which PTX leaves open."""
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -quotient, quotient)).astype(a.dtype)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 ``a * b + c``, rounded once."""
    return _sum_of_product(a, b, c).astype(np.float32)


def _fma_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """bfloat16 ``a * b + c``, rounded once: odd in float32 where it is not exact there."""
    exact = _sum_of_product(*map(_bf16_to_f32, (a, b, c)))
    near = exact.astype(np.float32)
    cut = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    odd = (cut.view(np.uint32) | np.uint32(1)).view(np.float32)
    return _f32_to_bf16(np.where((near == exact) | ~np.isfinite(exact), near, odd))


def _sum_of_product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float64 ``a * b + c`` of float32 numbers.

    The product is exact, the sum may not be. Making the sum odd where it was rounded keeps a second rounding, to a
    narrower format, from landing on the wrong side of a tie.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)  # the exact rounding error (Knuth's two-sum)
    even = (total.view(np.int64) & 1) == 0
    toward = np.where((rest > 0) == (total > 0), 1, -1)
    return (total.view(np.int64) + np.where((rest != 0) & even & np.isfinite(total), toward, 0)).view(np.float64)


def _flushed(value: np.ndarray) -> np.ndarray:
    """.ftz: subnormal numbers become zeros of the same sign."""
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def _bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _f32_to_bf16(value: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _f32_to_pair(kind: str) -> Callable:
    """Two numbers in 32 bits, the first operand in the upper half."""

    def bits(value: np.ndarray) -> np.ndarray:
        half = value.astype(np.float16).view(np.uint16)
        return _f32_to_bf16(value) if kind == "bf16" else np.where(np.isnan(value), np.uint16(0x7FFF), half)

    return lambda high, low: bits(high).astype(np.uint32) << np.uint32(16) | bits(low)


def _f32_to_s32(a: np.ndarray) -> np.ndarray:
    """Towards zero, saturated; NaN becomes 0."""
    return np.clip(np.trunc(np.nan_to_num(a.astype(np.float64), nan=0.0)), -(2.0**31), 2.0**31 - 1).astype(np.int32)


def _f32_to_tf32(value: np.ndarray) -> np.ndarray:
    """To 10 bits of mantissa, ties away from zero."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), np.where(np.isinf(value), bits, rounded))


def _bit_field(value: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: ``length`` bits from ``position`` on, extended with zeros or with the sign of the field."""
    bits = 8 * value.dtype.itemsize
    position, length = (count.astype(np.int64) & 255 for count in (position, length))
    moved = value >> np.minimum(position, bits - 1).astype(value.dtype)
    if value.dtype.kind == "u":  # a signed value that is shifted out leaves its sign
        moved = np.where(position < bits, moved, value.dtype.type(0))
    above = np.clip(bits - length, 0, bits - 1).astype(value.dtype)
    return np.where(length > 0, moved << above >> above, value.dtype.type(0))


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each nibble of ``selector`` names a byte of the eight of ``b:a``, or with its top bit that one's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for place in range(4):
        choice = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = both >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(choice & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * place)
    return out


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _compare(name: str, kind: str) -> Callable:
    """Plain float comparisons are false for NaN, those ending in u are true for it."""
    if kind[0] != "f":
        return COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in COMPARE:
        return lambda a, b: COMPARE[name](a, b) & ~(np.isnan(a) | np.isnan(b))
    return lambda a, b: COMPARE[name[:2]](a, b) | np.isnan(a) | np.isnan(b)


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply}
INTEGER = r"([su](?:16|32|64))"
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}

# opcode -> (types of the sources, type of the result, function); m is the match.
PURE: list[tuple[str, Callable[[re.Match], tuple[list[str], str, Callable]]]] = [
    (rf"(add|sub|mul\.lo)\.{INTEGER}", lambda m: ([m[2]] * 2, m[2], ARITHMETIC[m[1]])),
    (r"(add|sub|mul)(?:\.rn)?\.(f16|f32|f64)", lambda m: ([m[2]] * 2, m[2], ARITHMETIC[m[1]])),
    (rf"(min|max)\.{INTEGER}", lambda m: ([m[2]] * 2, m[2], np.minimum if m[1] == "min" else np.maximum)),
    (r"(min|max)\.f32", lambda m: (["f32"] * 2, "f32", np.fmin if m[1] == "min" else np.fmax)),
    (r"(min|max)\.NaN\.f32", lambda m: (["f32"] * 2, "f32", np.minimum if m[1] == "min" else np.maximum)),
    (r"mul\.hi\.([su](?:32|64))", lambda m: ([m[1]] * 2, m[1], _high)),
    (r"div\.([su]32)", lambda m: ([m[1]] * 2, m[1], _quotient)),
    (r"mul\.wide\.([su])(16|32)", lambda m: (
        [m[1] + m[2]] * 2, m[1] + str(2 * int(m[2])),
        lambda a, b: a.astype(TYPES[m[1] + str(2 * int(m[2]))]) * b)),
    (rf"mad\.lo\.{INTEGER}", lambda m: ([m[1]] * 3, m[1], lambda a, b, c: a * b + c)),
    (r"mad\.wide\.([su])32", lambda m: (
        [m[1] + "32"] * 2 + [m[1] + "64"], m[1] + "64", lambda a, b, c: a.astype(c.dtype) * b + c)),
    (r"fma\.rn\.f32", lambda m: (["f32"] * 3, "f32", _fma)),
    (r"fma\.rn\.bf16", lambda m: (["bf16"] * 3, "bf16", _fma_bf16)),
    (r"(and|or|xor)\.(pred|b16|b32|b64)", lambda m: ([m[2]] * 2, m[2], BITWISE[m[1]])),
    (r"not\.(pred|b16|b32|b64)", lambda m: ([m[1]], m[1], np.bitwise_not)),
    (r"shl\.b(16|32|64)", lambda m: (["b" + m[1], "u32"], "b" + m[1], _shift(np.left_shift, int(m[1])))),
    (r"shr\.([sub])(16|32|64)", lambda m: ([m[1] + m[2], "u32"], m[1] + m[2], _shift(np.right_shift, int(m[2])))),
    (r"neg\.(s32|s64|f32)", lambda m: ([m[1]], m[1], np.negative)),
    (r"abs\.(s32|f32)", lambda m: ([m[1]], m[1], np.abs)),
    (r"div\.(?:full|approx|rn)\.(f32)|div\.rn\.(f64)", lambda m: ([m[1] or m[2]] * 2, m[1] or m[2], np.divide)),
    (r"sqrt\.rn\.f32", lambda m: (["f32"], "f32", np.sqrt)),
    (r"div\.approx\.ftz\.f32",
     lambda m: (["f32"] * 2, "f32", lambda a, b: _flushed(np.divide(_flushed(a), _flushed(b))))),
    (r"sqrt\.approx\.ftz\.f32", lambda m: (["f32"], "f32", lambda a: np.sqrt(_flushed(a)))),
    (r"ex2\.approx\.f32", lambda m: (["f32"], "f32", np.exp2)),
    (r"ex2\.approx\.ftz\.f32", lambda m: (["f32"], "f32", lambda a: _flushed(np.exp2(_flushed(a))))),
    (r"setp\.(eq|ne|lt|le|gt|ge)\.([sub](?:16|32|64))", lambda m: ([m[2]] * 2, "pred", _compare(m[1], m[2]))),
    (r"setp\.(num|nan|(?:eq|ne|lt|le|gt|ge)u?)\.(f32|f64)", lambda m: ([m[2]] * 2, "pred", _compare(m[1], m[2]))),
    (r"selp\.([bsuf](?:16|32|64))", lambda m: ([m[1]] * 2 + ["pred"], m[1], lambda a, b, p: np.where(p, a, b))),
    (r"mov\.(pred|[bsuf](?:16|32|64))", lambda m: ([m[1]], m[1], lambda a: a)),
    (r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))", lambda m: ([m[2]], m[1], lambda a: a.astype(TYPES[m[1]]))),
    (r"cvt\.rn\.(f16|f32)\.([su](?:16|32|64))", lambda m: ([m[2]], m[1], lambda a: a.astype(TYPES[m[1]]))),
    (r"cvt\.(f32|f64)\.(f16|f32)", lambda m: ([m[2]], m[1], lambda a: a.astype(TYPES[m[1]]))),
    (r"cvt\.rn\.(f16|f32)\.(f32|f64)", lambda m: ([m[2]], m[1], lambda a: a.astype(TYPES[m[1]]))),
    (r"cvt\.f32\.bf16", lambda m: (["bf16"], "f32", _bf16_to_f32)),
    (r"cvt\.rn\.bf16\.f32", lambda m: (["f32"], "bf16", _f32_to_bf16)),
    (r"cvt\.rn\.(b?f16)x2\.f32", lambda m: (["f32"] * 2, "b32", _f32_to_pair(m[1]))),
    (r"cvt\.rzi\.s32\.f32", lambda m: (["f32"], "s32", _f32_to_s32)),
    (r"cvt\.rna\.tf32\.f32", lambda m: (["f32"], "tf32", _f32_to_tf32)),
    (r"bfe\.([su](?:32|64))", lambda m: ([m[1], "u32", "u32"], m[1], _bit_field)),
    (r"prmt\.b32", lambda m: (["b32"] * 3, "b32", _permute_bytes)),
]  # fmt: skip


def _pure(instruction: Instruction, sources: list[str], result: str, function: Callable) -> Step:
    target, *given = instruction.operands
    if len(given) != len(sources):
        raise UnknownPTX(f"line {instruction.line}: {instruction.opcode} of {len(given)} operands")
    read = [reader(operand, kind) for operand, kind in zip(given, sources, strict=True)]
    write = writer(target, result)
    return lambda warps: write(warps, function(*[source(warps) for source in read]))


# --------------------------------------------------------------------------------------------- operands


def reader(operand: Operand, kind: str) -> Callable[[Any], np.ndarray]:
    """An operand as an array of ``kind``: a register's low bits, or a constant."""
    dtype = TYPES[kind]
    if isinstance(operand, Immediate):
        unsigned = f"u{dtype.itemsize}"
        constant = np.array([[operand.bits & (1 << 8 * dtype.itemsize) - 1]], np.uint64).astype(unsigned)
        constant = constant != 0 if kind == "pred" else constant.view(dtype)
        return lambda warps: constant
    if not isinstance(operand, Register):
        raise UnknownPTX(f"operand {operand}")
    name = operand.name

    def read(warps: Any) -> np.ndarray:
        bits = warps.registers[name]
        if bits.dtype.itemsize != dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")
        return bits.view(dtype)

    return read


def writer(operand: Operand, kind: str) -> Callable[[Any, np.ndarray], None]:
    """Writes to a register of active threads. A narrow signed value is sign-extended."""
    if not isinstance(operand, Register):
        raise UnknownPTX(f"operand {operand}")
    name, signed = operand.name, kind[0] == "s"

    def write(warps: Any, value: np.ndarray) -> None:
        before = warps.registers[name]
        size = before.dtype.itemsize
        if value.dtype.itemsize < size:
            value = value.astype(f"{'i' if signed else 'u'}{size}")
        elif value.dtype.itemsize > size:
            raise UnknownPTX(f"{kind} into {name}")
        value = value.view(before.dtype)
        if not warps.full:
            value = np.where(warps.mask, value, before)
        elif value.shape != before.shape:
            value = np.broadcast_to(value, before.shape)
        warps.registers[name] = value

    return write


def _addresses(operand: Operand) -> Callable[[Any], np.ndarray]:
    """int64 addresses of all threads."""
    if not isinstance(operand, Address) or operand.name:
        raise UnknownPTX(f"address {operand}")
    offset = operand.offset
    if operand.base is None:
        return lambda warps: np.full(warps.mask.shape, offset, np.int64)
    name = operand.base.name
    return lambda warps: warps.registers[name].astype(np.int64) + offset


# ------------------------------------------------------------------------------------------------- memory


def _parameter(m: re.Match, instruction: Instruction) -> Step:
    target, source = instruction.operands
    write, dtype = writer(target, m[1]), TYPES[m[1]]
    if not source.name:
        return _chosen_parameter(write, dtype, _addresses(source))

    def step(warps: Any) -> None:
        value = np.frombuffer(warps.parameters[source.name], dtype, 1)
        write(warps, value.reshape(1, 1))

    return step


def _chosen_parameter(write: Callable, dtype: np.dtype, locate: Callable) -> Step:
    """A parameter through its address, of which each has eight bytes."""

    def step(warps: Any) -> None:
        held = np.frombuffer(b"".join(value.ljust(8, b"\0") for value in warps.parameters.values()), np.uint8)
        first = locate(warps)[..., None] + np.arange(dtype.itemsize)
        write(warps, np.ascontiguousarray(held[first]).view(dtype)[..., 0])

    return step


def _load(m: re.Match, instruction: Instruction) -> Step:
    space, count, kind = m[1], int(m[2] or 1), m[3]
    targets, address = instruction.operands
    targets = targets if isinstance(targets, tuple) else (targets,)
    write, locate = [writer(target, kind) for target in targets], _addresses(address)
    if len(write) != count:
        raise UnknownPTX(f"line {instruction.line}: {len(write)} registers of {instruction.opcode}")
    dtype = TYPES[kind]
    size = count * dtype.itemsize

    def step(warps: Any) -> None:
        data = warps.load(space, locate(warps), size, instruction).view(dtype)
        for place, to in enumerate(write):
            value = np.zeros(warps.mask.shape, dtype)
            value[warps.mask] = data[:, place]
            to(warps, value)

    return step


def _store(m: re.Match, instruction: Instruction) -> Step:
    space, count, kind = m[1], int(m[2] or 1), m[3]
    address, sources = instruction.operands
    sources = sources if isinstance(sources, tuple) else (sources,)
    read, locate = [reader(source, kind) for source in sources], _addresses(address)
    if len(read) != count:
        raise UnknownPTX(f"line {instruction.line}: {len(read)} registers of {instruction.opcode}")

    def step(warps: Any) -> None:
        values = [np.broadcast_to(source(warps), warps.mask.shape)[warps.mask] for source in read]
        warps.store(space, locate(warps), np.stack(values, 1).view(np.uint8), instruction)

    return step


def _copy_async(m: re.Match, instruction: Instruction) -> Step:
    """``[shared], [global], size, bytes to read``; the rest of ``size`` becomes zeros."""
    target, source, size, *given = instruction.operands
    to, of = _addresses(target), _addresses(source)
    bytes_ = size.bits
    if (m[1] == "cg" and bytes_ != 16) or len(given) > 1:
        raise UnknownPTX(f"line {instruction.line}: {instruction.opcode} of {bytes_} bytes")
    wanted = reader(given[0], "u32") if given else None

    def step(warps: Any) -> None:
        wants = (
            np.full(warps.mask.shape, bytes_) if wanted is None else np.broadcast_to(wanted(warps), warps.mask.shape)
        )
        if np.any((wants != 0) & (wants != bytes_) & warps.mask):
            raise UnknownPTX(f"line {instruction.line}: an asynchronous copy of a part")
        warps.copy_async(to(warps), of(warps), bytes_, wants != 0, instruction)

    return step


# ------------------------------------------------------------------------------------------------ other lanes

LANE = np.arange(32)


def _shuffle(m: re.Match, instruction: Instruction) -> Step:
    target, value, choice, clamp, members = instruction.operands
    if not isinstance(clamp, Immediate) or not isinstance(members, Immediate) or members.bits & ALL_LANES != ALL_LANES:
        raise UnknownPTX(f"line {instruction.line}: {instruction.opcode} of some lanes")
    last, segment = clamp.bits & 31, clamp.bits >> 8 & 31
    lowest, highest = LANE & segment, (LANE & segment) | (last & ~segment & 31)
    read, lanes, write = reader(value, "b32"), reader(choice, "s32"), writer(target, "b32")

    def step(warps: Any) -> None:
        warps.converged(instruction)
        of = np.broadcast_to(lanes(warps) & 31, warps.mask.shape)
        if m[1] == "bfly":
            of = LANE ^ of
            valid = of <= highest
        elif m[1] == "up":  # its clamp is the lowest lane
            of = LANE - of
            valid = of >= highest
        elif m[1] == "down":
            of = LANE + of
            valid = of <= highest
        else:
            of = lowest | (of & ~segment)
            valid = of <= highest
        of = np.where(valid, of, LANE)
        write(warps, np.take_along_axis(np.broadcast_to(read(warps), warps.mask.shape), of, 1))

    return step


REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def _reduce(m: re.Match, instruction: Instruction) -> Step:
    target, value, members = instruction.operands
    read, wanted, write = reader(value, m[2]), reader(members, "u32"), writer(target, m[2])
    reduce = REDUCE[m[1]].reduce

    def step(warps: Any) -> None:
        warps.converged(instruction)
        if np.any(np.broadcast_to(wanted(warps), warps.mask.shape)[warps.mask] != ALL_LANES):
            raise UnknownPTX(f"line {instruction.line}: {instruction.opcode} of some lanes")
        values = np.broadcast_to(read(warps), warps.mask.shape)
        write(warps, np.broadcast_to(reduce(values, 1, dtype=values.dtype, keepdims=True), warps.mask.shape))

    return step


def _load_matrices(m: re.Match, instruction: Instruction) -> Step:
    """ldmatrix: lane ``8 i + r`` holds the address of row ``r`` of matrix ``i``, eight 16-bit elements."""
    targets, address = instruction.operands
    count, transposed = int(m[1]), bool(m[2])
    write, locate = [writer(target, "b32") for target in targets], _addresses(address)

    def step(warps: Any) -> None:
        warps.converged(instruction)
        used = warps.mask & (8 * count > LANE)
        rows = np.zeros((*warps.mask.shape, 8), np.uint16)
        rows[used] = warps.load("shared", locate(warps), 16, instruction, used).view(np.uint16)
        matrices = rows.reshape(-1, 4, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        fragments = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, 32)
        for place, to in enumerate(write):
            to(warps, fragments[:, place])

    return step


def _elements(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Registers of matrix elements as float32 ``[warps, 32, registers, elements]``."""
    bits = np.stack(registers, -1)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = bits[..., None].view(np.uint16)
    return halves.view(np.float16).astype(np.float32) if kind == "f16" else _bf16_to_f32(halves)


def _multiply_matrices(m: re.Match, instruction: Instruction) -> Step:
    """D = A B + C, 16 x 8 from 16 x K and K x 8. Products are exact, summed in float64 and rounded once.

    Lane ``4 g + t`` holds of A rows g and g + 8, of B column g, of C and D rows g and g + 8; t picks the rest.
    """
    depth, kind = int(m[1]), m[2]
    results, *sources = instruction.operands
    read = [[reader(source, "b32") for source in fragment] for fragment in sources]
    write = [writer(target, "f32") for target in results]
    packed = 1 if kind == "tf32" else 2  # elements of a register
    if (depth, len(read[0]), len(read[1])) != (8 * packed, 4, 2):
        raise UnknownPTX(f"line {instruction.line}: {instruction.opcode}")

    def step(warps: Any) -> None:
        warps.converged(instruction)
        a, b, c = ([np.broadcast_to(source(warps), warps.mask.shape) for source in fragment] for fragment in read)
        count = len(warps.mask)
        # [warp, g, t, register, element]: register i of A is row g + 8 (i % 2), columns t * packed + half (i // 2).
        a = _elements(a, kind).reshape(count, 8, 4, 2, 2, packed)  # g, t, half of the columns, half of the rows
        a = a.transpose(0, 4, 1, 3, 2, 5).reshape(count, 16, depth)
        b = _elements(b, kind).reshape(count, 8, 4, 2, packed)  # g, t, half of the rows
        b = b.transpose(0, 3, 2, 4, 1).reshape(count, depth, 8)
        c = np.stack(c, -1).view(np.float32).reshape(count, 8, 4, 2, 2)  # g, t, half of the rows, column
        c = c.transpose(0, 3, 1, 2, 4).reshape(count, 16, 8)
        d = (np.matmul(a.astype(np.float64), b.astype(np.float64)) + c).astype(np.float32)
        d = d.reshape(count, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(count, 32, 4)
        for place, to in enumerate(write):
            to(warps, np.ascontiguousarray(d[..., place]))
        warps.counts.matrix_operations += int(warps.mask.any(1).sum()) * 2 * 16 * 8 * depth

    return step


# ---------------------------------------------------------------------------------------------- packing, order


def _move_vector(m: re.Match, instruction: Instruction) -> Step:
    """``{lo, hi} = whole`` and ``whole = {lo, hi}``."""
    target, source = instruction.operands
    whole = m[1]
    vector = target if isinstance(target, tuple) else source
    part = f"b{int(whole[1:]) // len(vector)}"
    if isinstance(target, tuple):
        read = reader(source, whole)
        write = {place: writer(to, part) for place, to in enumerate(target) if to != DISCARD}

        def step(warps: Any) -> None:
            parts = np.ascontiguousarray(np.broadcast_to(read(warps), warps.mask.shape))[..., None].view(TYPES[part])
            for place, to in write.items():
                to(warps, np.ascontiguousarray(parts[..., place]))

    else:
        gather, to_whole = [reader(of, part) for of in source], writer(target, whole)

        def step(warps: Any) -> None:
            parts = [np.broadcast_to(of(warps), warps.mask.shape) for of in gather]
            to_whole(warps, np.stack(parts, -1).view(TYPES[whole])[..., 0])

    return step


def _branch(m: re.Match, instruction: Instruction) -> Step:
    (label,) = instruction.operands
    return lambda warps: warps.jump(label.name)


def _only(step: Callable[[Any, Instruction], None]) -> Callable[[re.Match, Instruction], Step]:
    return lambda m, instruction: lambda warps: step(warps, instruction)


def _barrier(m: re.Match, instruction: Instruction) -> Step:
    if instruction.operands != (Immediate(0),):
        raise UnknownPTX(f"line {instruction.line}: a barrier other than 0")
    return lambda warps: warps.wait_at_barrier(instruction)


def _wait_group(m: re.Match, instruction: Instruction) -> Step:
    (allowed,) = instruction.operands
    return lambda warps: warps.wait_for_copies(allowed.bits)


SPACE = r"(global|shared)(?:::cta)?"
OTHERS: list[tuple[str, Callable[[re.Match, Instruction], Step]]] = [
    (r"ld\.param\.([bsuf](?:32|64))", _parameter),
    (rf"ld\.{SPACE}(?:\.v([24]))?\.([bsuf](?:8|16|32|64))", _load),
    (rf"st\.{SPACE}(?:\.v([24]))?\.([bsuf](?:8|16|32|64))", _store),
    (r"cp\.async\.(ca|cg)\.shared\.global", _copy_async),
    (r"cp\.async\.commit_group", _only(lambda warps, _: warps.commit_copies())),
    (r"cp\.async\.wait_group", _wait_group),
    (r"cp\.async\.wait_all", _only(lambda warps, _: warps.wait_for_copies(None))),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", _load_matrices),
    (r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", _multiply_matrices),
    (r"shfl\.sync\.(bfly|up|down|idx)\.b32", _shuffle),
    (r"redux\.sync\.(add|min|max|and|or|xor)\.([sub]32)", _reduce),
    (r"bar\.warp\.sync", _only(lambda warps, instruction: warps.converged(instruction))),
    (r"bar\.sync", _barrier),
    (r"bra(?:\.uni)?", _branch),
    (r"ret", _only(lambda warps, _: warps.leave())),
]


def compile_step(instruction: Instruction) -> Step:
    """A function that applies the instruction to the warps that run it, where its predicate holds."""
    step = _unguarded(instruction)
    if instruction.predicate is None:
        return step
    holds, negated = reader(instruction.predicate, "pred"), instruction.negated

    def guarded(warps: Any) -> None:
        mask, full = warps.mask, warps.full
        warps.mask = mask & (holds(warps) != negated)
        warps.full = False
        if warps.mask.any():
            step(warps)
        warps.mask, warps.full = mask, full

    return guarded


def _unguarded(instruction: Instruction) -> Step:
    opcode = instruction.opcode
    if any(isinstance(operand, tuple) for operand in instruction.operands):
        found = re.fullmatch(r"mov\.(b32|b64)", opcode)
        if found:
            return _move_vector(found, instruction)
    else:
        for pattern, describe in PURE:
            found = re.fullmatch(pattern, opcode)
            if found:
                return _pure(instruction, *describe(found))
    for pattern, make in OTHERS:
        found = re.fullmatch(pattern, opcode)
        if found:
            return make(found, instruction)
    raise UnknownPTX(
        f"line {instruction.line} ({instruction.source}): {opcode} is not an instruction that this emulator has"
    )
