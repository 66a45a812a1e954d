"""Payloads in plain Python, after the docstring of ``kara_kernels.payload.PayloadLayout``: from the bits of rows to
bytes, and back. Shares no code with the library.

Rows are lists ``[L][H][R][D]`` of integers, the bits of elements. A payload is a list of bytes, None where nothing is
written. Single operations of float32 are NumPy's; all else is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Rows = list[list[list[list[int]]]]


@dataclass(frozen=True)
class Float:
    """A number format: sign, exponent, mantissa."""

    size: int  # bytes
    mantissa: int  # bits
    bias: int
    largest: int  # bits of the largest finite number
    nan: int
    infinite: bool = True  # infinity comes after the largest number
    unsigned_zero: bool = False  # the pattern of -0 is NaN

    def decode(self, bits: int) -> float:
        sign, size = bits >> (8 * self.size - 1), bits & ((1 << (8 * self.size - 1)) - 1)
        if size > self.largest or (self.unsigned_zero and sign and not size):
            return (-1) ** sign * math.inf if self.infinite and size == self.largest + 1 else math.nan
        exponent, fraction = size >> self.mantissa, size & ((1 << self.mantissa) - 1)
        whole = fraction + (1 << self.mantissa if exponent else 0)
        return math.ldexp((-1.0) ** sign * whole, max(exponent, 1) - self.bias - self.mantissa)

    def encode(self, x: float) -> int:
        """Rounded half to even; a float8 saturates."""
        if math.isnan(x):
            return self.nan
        most = self.largest + (self.size > 1)
        code = most
        if math.isfinite(x):
            exponent = max(math.frexp(x)[1] - 1 if x else -math.inf, 1 - self.bias)
            steps = round(math.ldexp(abs(x), self.mantissa - int(exponent)))  # Python rounds half to even
            code = min(most, steps + ((int(exponent) - (1 - self.bias)) << self.mantissa))
        negative = math.copysign(1, x) < 0 and not (self.unsigned_zero and not code)
        return code | negative << (8 * self.size - 1)


FLOATS = {
    "float32": Float(4, 23, 127, 0x7F7FFFFF, 0x7FC00000),
    "float16": Float(2, 10, 15, 0x7BFF, 0x7E00),
    "bfloat16": Float(2, 7, 127, 0x7F7F, 0x7FC0),
    "float8_e4m3fn": Float(1, 3, 7, 0x7E, 0x7F, infinite=False),
    "float8_e5m2": Float(1, 2, 15, 0x7B, 0x7F),
    "float8_e4m3fnuz": Float(1, 3, 8, 0x7F, 0x80, infinite=False, unsigned_zero=True),
    "float8_e5m2fnuz": Float(1, 2, 16, 0x7F, 0x80, infinite=False, unsigned_zero=True),
}


class Part(NamedTuple):
    """A section: its arrays as name -> (offset in the payload, bytes of an element, elements)."""

    kind: str
    first: int
    rows: int
    offset: int
    nbytes: int
    arrays: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Payload:
    """The fields of a PayloadLayout, all given. ``dtype`` is a name of FLOATS, or any other with ``size``."""

    layers: int
    heads: int
    dim: int
    v_dim: int
    dtype: str
    size: int
    tokens: int
    rows: int
    form: str
    places: bool
    channels: int | None
    exact_rows: int
    rotate: bool
    grade_rows: int

    @property
    def coded(self) -> bool:
        return self.form in ("int8", "int4")

    @property
    def k_dim(self) -> int:
        return self.dim if self.channels is None else self.channels

    @property
    def run(self) -> int:
        run = 1
        while run < 64 and self.k_dim % (2 * run) == 0:
            run *= 2
        return run

    @property
    def bounds(self) -> Float:
        return FLOATS["bfloat16" if self.size == 1 else self.dtype]

    def grades(self) -> Iterator[tuple[int, int]]:
        """First row and rows of each grade."""
        for first in range(self.exact_rows, self.rows, self.grade_rows):
            yield first, min(self.grade_rows, self.rows - first)

    def arrays(self, kind: str, rows: int) -> list[tuple[str, int, int]]:
        """Name, bytes of an element and elements of each head, in order."""
        if kind == "channels":
            return [("channels", 2, self.k_dim)]
        exact = kind == "exact" or self.form == "exact"
        size, share = (self.size, 1) if exact else (1, 2 if self.coded else 1)
        found = [("k", size, rows * self.k_dim // share), ("v", size, rows * self.v_dim // share)]
        if kind == "rows" and self.coded:
            found.append(("k_bounds", self.bounds.size, -(-rows // 64) * 2 * self.k_dim))
            found.append(("v_bounds", self.bounds.size, rows * 2 if self.v_dim else 0))
        if kind != "residual" and self.places:
            found.append(("index", 2 if self.tokens <= 65536 else 4, rows))
        return [array for array in found if array[2]]

    def parts(self) -> list[Part]:
        grades = list(self.grades())
        wanted = [("channels", 0, 0)] if self.channels is not None else []
        wanted += [("exact", 0, self.exact_rows)] if self.exact_rows else []
        wanted += [("rows", *grade) for grade in grades]
        wanted += [("residual", *grade) for grade in grades] if self.form == "int8" else []
        found, offset = [], 0
        for kind, first, rows in wanted:
            end, placed = 0, {}
            for name, size, each in self.arrays(kind, rows):
                begin = -(-end // 16) * 16
                placed[name] = offset + begin, size, each * self.layers * self.heads
                end = begin + size * each * self.layers * self.heads
            nbytes = -(-(end + 8) // 64) * 64
            found.append(Part(kind, first, rows, offset, nbytes, placed))
            offset += nbytes
        return found


# ------------------------------------------------------------------------------------------------------ arithmetic


def hadamard(x: Sequence[np.float32], run: int) -> list[np.float32]:
    """Each ``run`` numbers times the matrix of (-1) ** (set bits of i & j), at distances 1, 2, 4 and so on."""
    out = list(x)
    distance = 1
    while distance < run:
        out = [out[i ^ distance] - y if i & distance else y + out[i ^ distance] for i, y in enumerate(out)]
        distance *= 2
    return out


def step_of(low: np.float32, high: np.float32) -> np.float32:
    step = (high - low) / np.float32(240)
    return step if step >= 2.0**-126 else np.float32(0)


def code_of(x: np.float32, low: np.float32, high: np.float32) -> int:
    step = step_of(low, high)
    quotient = float((x - low) / (step if step > 0 else np.float32(1)))
    return round(min(max(quotient, 0.0), 240.0))


def bounds_of(x: Sequence[np.float32], form: Float) -> tuple[np.float32, np.float32]:
    """Least and greatest, as they are stored."""
    low, high = (np.float32(form.decode(form.encode(float(y)))) for y in (min(x), max(x)))
    return low + np.float32(0), high + np.float32(0)  # -0 becomes +0


def words(numbers: Sequence[int], size: int) -> list[int]:
    return [byte for number in numbers for byte in (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")]


def nibbles(codes: Sequence[int]) -> list[int]:
    return [(low & 15) | (high & 15) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]


# ---------------------------------------------------------------------------------------------------------- encoding


def encode(
    p: Payload, k: Rows, v: Rows | None, places: list[list[list[int]]] | None, channels: list[list[list[int]]] | None
) -> list[int | None]:
    """The payload of ``R`` rows, best first; ``places [L][H][R]``, ``channels [L][H][k_dim]``."""
    parts = p.parts()
    out: list[int | None] = [None] * (parts[-1].offset + parts[-1].nbytes)
    codes: dict[tuple[str, int], list[list[int]]] = {}  # of a half and first row: all rows

    def put(part: Part, name: str, content: list[int]) -> None:
        offset, size, count = part.arrays[name]
        assert len(content) == size * count, name
        out[offset : offset + len(content)] = content

    every = [(layer, head) for layer in range(p.layers) for head in range(p.heads)]
    for part in parts:
        if part.kind == "channels":
            assert channels is not None
            put(part, "channels", words([c for la, h in every for c in channels[la][h]], 2))
            continue
        some = slice(part.first, part.first + part.rows)
        if "index" in part.arrays:
            assert places is not None
            put(part, "index", words([i for la, h in every for i in places[la][h][some]], part.arrays["index"][1]))
        for half, source in (("k", k), ("v", v)):
            if half not in part.arrays:
                continue
            assert source is not None
            if part.kind == "residual":
                put(part, half, [b for row in codes[half, part.first] for b in nibbles([residual(c) for c in row])])
                continue
            heads = [source[la][h][some] for la, h in every]
            if half == "k" and channels is not None:
                heads = [[[row[c] for c in channels[la][h]] for row in rows]
                         for (la, h), rows in zip(every, heads, strict=True)]  # fmt: skip
            if part.kind == "exact" or p.form == "exact":
                put(part, half, words([bits for rows in heads for row in rows for bits in row], p.size))
            elif p.form == "fp8":
                numbers = [FLOATS[p.dtype].decode(bits) for rows in heads for row in rows for bits in row]
                put(part, half, [FLOATS["float8_e4m3fn"].encode(x) for x in numbers])
            else:
                coded = [encode_head(p, half, rows) for rows in heads]
                codes[half, part.first] = [row for head, _ in coded for row in head]
                put(part, half, [b for row in codes[half, part.first] for b in nibbles([upper(c) for c in row])])
                form = p.bounds
                numbers = [float(x) for _, bounds in coded for x in bounds]
                put(part, f"{half}_bounds", words([form.encode(x) for x in numbers], form.size))
    return out


def upper(code: int) -> int:
    """The nearest multiple of 16, upwards from the middle, in units of 16."""
    return math.floor(code / 16 + 0.5)


def residual(code: int) -> int:
    return code - 16 * upper(code)


def encode_head(p: Payload, half: str, rows: list[list[int]]) -> tuple[list[list[int]], list[np.float32]]:
    """Codes ``[r][D]`` in 0..240 of one layer and head of a grade, and its bounds in the order in which they lie."""
    values = [[np.float32(FLOATS[p.dtype].decode(bits)) for bits in row] for row in rows]
    if half == "v":
        bounds = [bounds_of(row, p.bounds) for row in values]
        codes = [[code_of(x, *both) for x in row] for row, both in zip(values, bounds, strict=True)]
        return codes, [x for both in bounds for x in both]
    if p.rotate:
        factor = np.float32(2.0 ** -(int(math.log2(p.run)) // 2))
        values = [[y * factor for y in hadamard(row, p.run)] for row in values]
    codes, held = [], []
    for first in range(0, len(values), 64):
        group = values[first : first + 64]
        of_channels = [bounds_of(channel, p.bounds) for channel in zip(*group, strict=True)]
        held += [low for low, _ in of_channels] + [high for _, high in of_channels]
        codes += [[code_of(x, *both) for x, both in zip(row, of_channels, strict=True)] for row in group]
    return codes, held


# ---------------------------------------------------------------------------------------------------------- decoding


def decode(p: Payload, payload: bytes) -> tuple[Rows, Rows, list[list[list[int]]]]:
    """Rows of K and V that a prefix has, ``[L][H][rows][D]``, and their places."""
    parts = [part for part in p.parts() if part.offset + part.nbytes <= len(payload)]
    assert parts[-1].offset + parts[-1].nbytes == len(payload)
    k, v, places = ([[[] for _ in range(p.heads)] for _ in range(p.layers)] for _ in range(3))
    kept = None

    def get(part: Part, name: str) -> list[list[int]]:
        """The elements of an array, for each layer and head."""
        offset, size, count = part.arrays[name]
        numbers = [int.from_bytes(payload[offset + i * size : offset + (i + 1) * size], "little") for i in range(count)]
        each = count // (p.layers * p.heads)
        return [numbers[i : i + each] for i in range(0, count, each)]

    finer = {part.first: part for part in parts if part.kind == "residual"}
    for part in parts:
        if part.kind == "channels":
            kept = get(part, "channels")
        if part.kind not in ("exact", "rows"):
            continue
        for half, out in (("k", k), ("v", v)):
            if half not in part.arrays:
                continue
            width = p.k_dim if half == "k" else p.v_dim
            for i, found in enumerate(get(part, half)):
                layer, head = divmod(i, p.heads)
                if part.kind == "exact" or p.form == "exact":
                    rows = chunks(found, width)
                elif p.form == "fp8":
                    numbers = [FLOATS["float8_e4m3fn"].decode(code) for code in found]
                    rows = chunks([FLOATS[p.dtype].encode(x) for x in numbers], width)
                else:
                    rest = get(finer[part.first], half)[i] if part.first in finer else None
                    bounds = [np.float32(p.bounds.decode(bits)) for bits in get(part, f"{half}_bounds")[i]]
                    rows = decode_head(p, half, width, found, rest, bounds)
                if half == "k" and kept is not None:
                    rows = [spread(row, kept[i], p.dim) for row in rows]
                out[layer][head] += rows
        for i in range(p.layers * p.heads):
            layer, head = divmod(i, p.heads)
            where = get(part, "index")[i] if p.places else range(part.first, part.first + part.rows)
            places[layer][head] += where
    return k, v, places


def chunks(numbers: list[int], width: int) -> list[list[int]]:
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def spread(row: list[int], kept: list[int], dim: int) -> list[int]:
    """Kept channels where they were, zeros elsewhere."""
    whole = [0] * dim
    for channel, bits in zip(kept, row, strict=True):
        whole[channel] = bits
    return whole


def decode_head(
    p: Payload, half: str, width: int, packed: list[int], rest: list[int] | None, bounds: list[np.float32]
) -> list[list[int]]:
    def unpack(codes: list[int]) -> list[int]:
        return [nibble for byte in codes for nibble in (byte % 16, byte // 16)]

    codes = [16 * code for code in unpack(packed)]
    if rest is not None:
        codes = [code + (r - 16 if r >= 8 else r) for code, r in zip(codes, unpack(rest), strict=True)]
    rows = []
    for i, row in enumerate(chunks(codes, width)):
        if half == "v":
            both = [(bounds[2 * i], bounds[2 * i + 1])] * width
        else:
            group = bounds[i // 64 * 2 * width :]
            both = list(zip(group[:width], group[width : 2 * width], strict=True))
        values = [low + step_of(low, high) * np.float32(code) for code, (low, high) in zip(row, both, strict=True)]
        if half == "k" and p.rotate:
            doublings = int(math.log2(p.run))
            factor = np.float32(2.0 ** -(doublings - doublings // 2))
            values = [y * factor for y in hadamard(values, p.run)]
        rows.append([FLOATS[p.dtype].encode(float(x)) for x in values])
    return rows
