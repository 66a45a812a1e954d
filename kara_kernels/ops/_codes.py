"""Codes of rows, in kernels: rotation, ranges, four bits and what they leave over, and fp8. See Payload in
``docs/method.md``."""

from dataclasses import dataclass

from ..payload import LEVELS
from ._payload import put_row
from ._rows import fp8_to_float, from_words, nearest_even, to_words
from ._triton import tl, triton


@dataclass(frozen=True)
class CodeForm:
    """Compile-time constants about codes."""

    name: str  # of the form
    kind: str  # of the cache
    bounds: str  # kind of the bounds
    run: int  # channels of K that are rotated together; 0: none
    lane: int  # elements of the cache in 16 bytes. Wider accesses of codes would pass elements from lane to lane
    levels: int = LEVELS

    @property
    def before(self) -> float:
        """The factor of rotated K. Twice the matrix gives ``run`` times the vector."""
        return 2.0 ** -((self.run.bit_length() - 1) // 2)

    @property
    def after(self) -> float:
        """The factor of K that is rotated back."""
        return 1 / (self.run * self.before)


@triton.jit
def load_floats(source, offs_d, inside, channels, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """Elements ``offs_d`` of rows as float32 ``[rows, dims]``, or of their kept channels."""
    column = offs_d
    if channels is not None:
        column = tl.load(channels + offs_d, mask=offs_d < WIDTH, other=0)
    words = tl.load(source[:, None] + column[None, :], mask=inside[:, None] & (offs_d < WIDTH)[None, :], other=0)
    KIND: tl.constexpr = FORM.kind
    return from_words(words, KIND)  # from bits, because the interpreter reads small bfloat16 wrongly


@triton.jit
def hadamard(x, RUN: tl.constexpr):
    """Every ``RUN`` elements of rows times the Hadamard matrix, by sums and differences of pairs at distances 1, 2, 4
    and so on."""
    ROWS: tl.constexpr = x.shape[0]
    DIMS: tl.constexpr = x.shape[1]
    for i in tl.static_range(6):
        if (2 << i) <= RUN:
            pairs = tl.reshape(x, [ROWS, DIMS // (2 << i), 2, 1 << i])
            first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
            x = tl.reshape(pairs, [ROWS, DIMS])
    return x


@triton.jit
def range_of(x, inside, AXIS: tl.constexpr):
    """Least and greatest along an axis. Zeros are +0, because both zeros are equally small."""
    low = tl.min(tl.where(inside, x, float("inf")), AXIS)
    high = tl.max(tl.where(inside, x, float("-inf")), AXIS)
    return tl.where(low == 0, 0.0, low), tl.where(high == 0, 0.0, high)


@triton.jit
def _step(low, high, LEVELS: tl.constexpr):
    step = tl.div_rn(high - low, tl.full(low.shape, LEVELS, tl.float32))
    return tl.where(step >= 1.1754943508222875e-38, step, 0.0)  # some devices flush smaller ones to zero


@triton.jit
def _pack(codes):
    """Bytes ``[rows, dims / 2]`` of the lower four bits, the lower dimension in the low half."""
    low, high = tl.split(tl.reshape(codes & 15, [codes.shape[0], codes.shape[1] // 2, 2]))
    return (low | high << 4).to(tl.uint8)


@triton.jit
def _unpack(codes):
    """int32 ``[rows, dims]`` in 0..15 from bytes ``[rows, dims / 2]``."""
    codes = codes.to(tl.int32)
    return tl.reshape(tl.join(codes & 15, codes >> 4), [codes.shape[0], 2 * codes.shape[1]])


@triton.jit
def encode(x, low, high, codes_ptr, array, residual, line, offs_b, inside, FORM: tl.constexpr, BYTES: tl.constexpr):
    """Stores 4-bit codes of ``x [rows, dims]``, and what they leave over, in ``BYTES`` bytes of a row each."""
    step = _step(low, high, FORM.levels)
    code = tl.div_rn(x - low, tl.where(step > 0, step, 1.0) + tl.zeros_like(x))
    code = nearest_even(tl.minimum(tl.maximum(code, 0.0), FORM.levels))
    upper = (code + 8) >> 4
    ALIGN: tl.constexpr = FORM.lane // 2
    place = line[:, None] * BYTES + offs_b[None, :]
    mask = inside[:, None] & (offs_b < BYTES)[None, :]
    tl.store(tl.multiple_of(codes_ptr + array, ALIGN) + place, _pack(upper), mask=mask)
    if FORM.name == "int8":
        tl.store(tl.multiple_of(codes_ptr + residual, ALIGN) + place, _pack(code - 16 * upper), mask=mask)


@triton.jit
def decode(low, high, codes_ptr, array, residual, line, offs_b, inside, finer, FORM: tl.constexpr,
           BYTES: tl.constexpr):  # fmt: skip
    """float32 ``[rows, dims]`` from codes; ``finer``: rows whose residuals the payload has."""
    place = line[:, None] * BYTES + offs_b[None, :]
    dims = (offs_b < BYTES)[None, :]
    ALIGN: tl.constexpr = FORM.lane // 2
    upper = tl.load(tl.multiple_of(codes_ptr + array, ALIGN) + place, mask=inside[:, None] & dims, other=0)
    code = _unpack(upper) * 16
    if FORM.name == "int8":
        rest = tl.load(tl.multiple_of(codes_ptr + residual, ALIGN) + place, mask=finer[:, None] & dims, other=0)
        code += (_unpack(rest) ^ 8) - 8
    return low + _step(low, high, FORM.levels) * code.to(tl.float32)


@triton.jit
def quantize_keys(tile, source, inside, line, part, bounds_ptr, bounds, codes_ptr, array, residual, channels,
                  WIDTH: tl.constexpr, FORM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """``BLOCK_D`` channels of a tile of K, with bounds per channel."""
    BOUNDS: tl.constexpr = FORM.bounds
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_b = part * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
    bounds_ptr = _group_bounds(tile, bounds_ptr, bounds, WIDTH, TILE)
    x = load_floats(source, offs_d, inside, channels, WIDTH, FORM)
    if FORM.run > 1:
        x = hadamard(x, FORM.run) * FORM.before
    low, high = range_of(x, inside[:, None], 0)
    low_words, high_words = to_words(low, BOUNDS), to_words(high, BOUNDS)
    tl.store(bounds_ptr + offs_d, low_words, mask=offs_d < WIDTH)
    tl.store(bounds_ptr + WIDTH + offs_d, high_words, mask=offs_d < WIDTH)
    low, high = from_words(low_words, BOUNDS), from_words(high_words, BOUNDS)
    encode(x, low[None, :], high[None, :], codes_ptr, array, residual, line, offs_b, inside, FORM, WIDTH // 2)


@triton.jit
def restore_keys(tile, target, inside, finer, line, part, bounds_ptr, bounds, codes_ptr, array, residual, channels,
                 WIDTH: tl.constexpr, FORM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """``BLOCK_D`` channels of a tile of K."""
    BOUNDS: tl.constexpr = FORM.bounds
    KIND: tl.constexpr = FORM.kind
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_b = part * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
    bounds_ptr = _group_bounds(tile, bounds_ptr, bounds, WIDTH, TILE)
    low = from_words(tl.load(bounds_ptr + offs_d, mask=offs_d < WIDTH, other=0), BOUNDS)
    high = from_words(tl.load(bounds_ptr + WIDTH + offs_d, mask=offs_d < WIDTH, other=0), BOUNDS)
    x = decode(low[None, :], high[None, :], codes_ptr, array, residual, line, offs_b, inside, finer, FORM, WIDTH // 2)
    if FORM.run > 1:
        x = hadamard(x, FORM.run) * FORM.after
    put_row(target, offs_d, to_words(x, KIND), inside, channels, WIDTH)


@triton.jit
def _group_bounds(tile, bounds_ptr, bounds, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Address of the bounds of the tile's group."""
    BYTES: tl.constexpr = bounds_ptr.dtype.element_ty.primitive_bitwidth // 8
    group = tile.heads * ((tile.count + TILE - 1) // TILE) + tile.offset // TILE
    return tl.multiple_of(bounds_ptr + bounds // BYTES, 16) + group * (2 * WIDTH)


@triton.jit
def quantize_values(source, inside, line, bounds_ptr, bounds, codes_ptr, array, residual, WIDTH: tl.constexpr,
                    FORM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows of V with bounds per row."""
    BOUNDS: tl.constexpr = FORM.bounds
    offs_d = tl.arange(0, BLOCK_D)
    x = load_floats(source, offs_d, inside, None, WIDTH, FORM)
    low, high = range_of(x, (offs_d < WIDTH)[None, :], 1)
    words = tl.join(to_words(low, BOUNDS), to_words(high, BOUNDS))
    tl.store(_row_bounds(bounds_ptr, bounds, line), words, mask=inside[:, None])
    encode(x, low[:, None], high[:, None], codes_ptr, array, residual, line, tl.arange(0, BLOCK_D // 2), inside, FORM,
           WIDTH // 2)  # fmt: skip


@triton.jit
def restore_values(target, inside, finer, line, bounds_ptr, bounds, codes_ptr, array, residual, WIDTH: tl.constexpr,
                   FORM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows of V."""
    BOUNDS: tl.constexpr = FORM.bounds
    KIND: tl.constexpr = FORM.kind
    words = tl.load(_row_bounds(bounds_ptr, bounds, line), mask=inside[:, None], other=0)
    low, high = tl.split(from_words(words, BOUNDS))
    x = decode(low[:, None], high[:, None], codes_ptr, array, residual, line, tl.arange(0, BLOCK_D // 2), inside,
               finer, FORM, WIDTH // 2)  # fmt: skip
    put_row(target, tl.arange(0, BLOCK_D), to_words(x, KIND), inside, None, WIDTH)


@triton.jit
def _row_bounds(bounds_ptr, bounds, line):
    """Addresses ``[rows, 2]`` of both bounds of rows."""
    BYTES: tl.constexpr = bounds_ptr.dtype.element_ty.primitive_bitwidth // 8
    first = tl.multiple_of(bounds_ptr + bounds // BYTES, 16)
    return first + (line[:, None] * 2 + tl.arange(0, 2)[None, :])


@triton.jit
def to_fp8(source, inside, line, part, codes_ptr, array, channels, WIDTH: tl.constexpr, FORM: tl.constexpr,
           BLOCK_D: tl.constexpr):  # fmt: skip
    """``BLOCK_D`` elements of rows, by value."""
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    x = to_words(load_floats(source, offs_d, inside, channels, WIDTH, FORM), "e4m3fn")
    ALIGN: tl.constexpr = FORM.lane
    target = tl.multiple_of(codes_ptr + array, ALIGN) + (line[:, None] * WIDTH + offs_d[None, :])
    tl.store(target, x, mask=inside[:, None] & (offs_d < WIDTH)[None, :])


@triton.jit
def from_fp8(target, inside, line, part, codes_ptr, array, channels, WIDTH: tl.constexpr, FORM: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """``BLOCK_D`` elements of rows, by value."""
    KIND: tl.constexpr = FORM.kind
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    ALIGN: tl.constexpr = FORM.lane
    source = tl.multiple_of(codes_ptr + array, ALIGN) + (line[:, None] * WIDTH + offs_d[None, :])
    x = tl.load(source, mask=inside[:, None] & (offs_d < WIDTH)[None, :], other=0)
    put_row(target, offs_d, to_words(fp8_to_float(x, "e4m3fn", tl.float32), KIND), inside, channels, WIDTH)
