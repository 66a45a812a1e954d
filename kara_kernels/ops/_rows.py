"""Loads rows of a window through the block table and decodes fp8."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..checks import FP8_DTYPES
from ..paged import Layers
from ._triton import tl, triton

FP8_NAMES = {dtype: str(dtype).removeprefix("torch.float8_") for dtype in FP8_DTYPES}


class PagedRows(NamedTuple):
    """Where the rows of one sequence and head are, in a kernel."""

    base: Any  # row 0 of block 0
    table: Any  # block ids
    start: Any  # of the window
    stride_block: Any
    stride_token: Any


@dataclass(frozen=True)
class RowFormat:
    """Compile-time constants about rows."""

    page: int
    dim: int
    align: int  # bytes that divide every row's address; limits the width of accesses
    fp8: str | None = None

    @staticmethod
    def of(layers: Layers, decoded: bool = True) -> "RowFormat":
        """The format of rows that are decoded to numbers, or moved as raw bytes."""
        first = layers[0]
        fp8 = FP8_NAMES.get(first.dtype) if decoded else None
        return RowFormat(first.shape[1], first.shape[3], layers.alignment, fp8)

    @property
    def block(self) -> int:
        return triton.next_power_of_2(self.dim)


def pool_arguments(name: str, layers: Layers, decoded: bool = True) -> dict[str, Any]:
    """A kernel's arguments for a pool: ``k_ptr``, ``k_table``, ``stride_k_l`` ... ``stride_k_h`` and the format ``K``.

    ``decoded``: rows are decoded to numbers. Otherwise they are moved as raw bytes.
    """
    if (name, decoded) not in layers.arguments:
        layer, block, token, head = layers.strides
        first = layers.words if not decoded or layers[0].dtype in FP8_DTYPES else layers[0]
        layers.arguments[name, decoded] = {
            f"{name}_ptr": first, f"{name}_table": layers.table, f"stride_{name}_l": layer, f"stride_{name}_b": block,
            f"stride_{name}_p": token, f"stride_{name}_h": head, name.upper(): RowFormat.of(layers, decoded),
        }  # fmt: skip
    return layers.arguments[name, decoded]


@triton.jit
def fp8_to_float(bits, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """Converts fp8 bytes to ``DTYPE`` exactly. Places them in a wider float and scales by a power of two.

    Decoding in code works on every target, including those without fp8 instructions (sm_80).
    """
    bits = bits.to(tl.int32)
    if FP8 == "e5m2":
        half = (bits << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)  # float16's own top byte
    elif FP8 == "e5m2fnuz":  # its largest exponent holds numbers and float16's does not, so go through float32
        half = (((bits & 0x80) << 24) | ((bits & 0x7F) << 21)).to(tl.float32, bitcast=True) * 2.596148429267414e33
    else:
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        half = half * (256.0 if FP8 == "e4m3fn" else 128.0)  # float16's bias of 15 against 7 and 8
    if FP8 == "e4m3fn":
        half = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
    if FP8 == "e4m3fnuz" or FP8 == "e5m2fnuz":  # no negative zero; that pattern is NaN
        half = tl.where(bits == 0x80, float("nan"), half)
    return half.to(DTYPE)


@triton.jit
def load_rows(rows, offs_w, offs_d, W: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Keys or values of window tokens ``offs_w`` as ``[dims, tokens]``, zero outside the window and ``FORMAT.dim``.

    ``rows`` are PagedRows, ``FORMAT`` their RowFormat.
    """
    block = load_blocks(rows, offs_w, W, FORMAT)
    return load_rows_of(rows, block, offs_w, offs_d, W, FORMAT, DTYPE)


@triton.jit
def load_blocks(rows, offs_w, W: tl.constexpr, FORMAT: tl.constexpr):
    """The block ids of window tokens ``offs_w``."""
    return tl.load(rows.table + (rows.start + offs_w) // FORMAT.page, mask=offs_w < W, other=0)


@triton.jit
def load_rows_of(rows, block, offs_w, offs_d, W: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """:func:`load_rows` of tokens whose block ids were loaded before."""
    FP8: tl.constexpr = FORMAT.fp8
    token = rows.start + offs_w
    row = row_pointer(rows, block, token % FORMAT.page, FORMAT)
    mask = (offs_w < W)[None, :] & (offs_d < FORMAT.dim)[:, None]
    keys = tl.load(row[None, :] + offs_d[:, None], mask=mask, other=0.0)
    if FP8 is not None:
        keys = fp8_to_float(keys, FP8, DTYPE)
    return keys.to(DTYPE)


@triton.jit
def row_pointer(rows, block, place, FORMAT: tl.constexpr):
    """Addresses of rows ``place`` of the blocks ``block``."""
    ALIGN: tl.constexpr = FORMAT.align
    # One addition to the base, so that the hint applies to the sum. A hint on a constant 0 would be folded away.
    offset = block.to(tl.int64) * rows.stride_block + place.to(tl.int64) * rows.stride_token
    return tl.multiple_of(rows.base + offset, ALIGN)


@triton.jit
def nearest_even(x):
    """float32 ``x`` in 0..2^22 as int32, half to even."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: addition rounds to whole numbers


@triton.jit
def to_words(x, KIND: tl.constexpr):
    """float32 as the bits of ``KIND``, rounded half to even; float8 saturates at its largest number."""
    bits = x.to(tl.int32, bitcast=True)
    if KIND == "float32":
        return bits
    elif KIND == "bfloat16":  # by hand, because the interpreter truncates
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.int16)
    elif KIND == "float16":
        return x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        FNUZ: tl.constexpr = KIND == "e4m3fnuz" or KIND == "e5m2fnuz"  # a zero without sign, and one more of the bias
        E4: tl.constexpr = KIND == "e4m3fn" or KIND == "e4m3fnuz"
        MANTISSA: tl.constexpr = 3 if E4 else 2
        BIAS: tl.constexpr = (7 if E4 else 15) + (1 if FNUZ else 0)
        LARGEST: tl.constexpr = 0x7F if FNUZ else (0x7E if E4 else 0x7B)
        size = bits & 0x7FFFFFFF
        code = (size + ((1 << (22 - MANTISSA)) - 1) + ((size >> (23 - MANTISSA)) & 1)) >> (23 - MANTISSA)
        code -= (127 - BIAS) << MANTISSA
        # Below the smallest normal number steps are equal. This includes rounding up to it.
        tiny = nearest_even(tl.minimum(tl.abs(x), 1.0) * (1 << (BIAS - 1 + MANTISSA)))
        code = tl.minimum(tl.where(size < ((128 - BIAS) << 23), tiny, code), LARGEST)
        sign = (bits >> 24) & 0x80
        if FNUZ:
            sign = tl.where(code == 0, 0, sign)
        return tl.where(x != x, 0x80 if FNUZ else 0x7F, code | sign).to(tl.uint8)


@triton.jit
def from_words(words, KIND: tl.constexpr):
    """float32 from the bits of ``KIND``."""
    if KIND == "float32":
        return words.to(tl.float32, bitcast=True)
    elif KIND == "bfloat16":
        return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "float16":
        return words.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return fp8_to_float(words, KIND, tl.float32)
