"""Device code: rows of a window, found through the block table, fp8 decoded on the way."""

from ..checks import FP8_DTYPES
from ._triton import tl, triton

FP8_NAMES = {dtype: str(dtype).removeprefix("torch.float8_") for dtype in FP8_DTYPES}


@triton.jit
def fp8_to_float(bits, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """fp8 bytes to ``DTYPE``, exactly: placed in a wider float whose exponent bias differs by a power of two.

    Decoding by hand runs on every target, also on those without fp8 instructions (sm_80).
    """
    bits = bits.to(tl.int32)
    if FP8 == "e5m2":
        half = (bits << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)  # float16's own top byte
    elif FP8 == "e5m2fnuz":  # its largest exponent is a number where float16's is not: by way of float32
        half = (((bits & 0x80) << 24) | ((bits & 0x7F) << 21)).to(tl.float32, bitcast=True) * 2.596148429267414e33
    else:
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        half = half * (256.0 if FP8 == "e4m3fn" else 128.0)  # float16's bias of 15 against 7 and 8
    if FP8 == "e4m3fn":
        half = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
    if FP8 == "e4m3fnuz" or FP8 == "e5m2fnuz":  # no negative zero: that pattern is the NaN
        half = tl.where(bits == 0x80, float("nan"), half)
    return half.to(DTYPE)


@triton.jit
def load_rows(base, table, start, offs_w, offs_d, head, stride_b, stride_p, stride_h,
               W: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr,
               FP8: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Keys or values of window tokens ``offs_w`` as ``[dims, tokens]``, zero outside of window and ``DIM``."""
    token = start + offs_w
    block = tl.load(table + token // P, mask=offs_w < W, other=0).to(tl.int64)
    row = base + block * stride_b + (token % P).to(tl.int64) * stride_p + head * stride_h
    keys = tl.load(row[None, :] + offs_d[:, None], mask=(offs_w < W)[None, :] & (offs_d < DIM)[:, None], other=0.0)
    if FP8 is not None:
        keys = fp8_to_float(keys, FP8, DTYPE)
    return keys.to(DTYPE)
