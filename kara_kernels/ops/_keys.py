"""Keys of a window, turned back by the angles of ``look_ahead`` while they are loaded."""

from typing import Any, NamedTuple

from ..ahead import LookAhead
from ._rows import load_rows
from ._triton import tl, triton


class KeyRows(NamedTuple):
    """PagedRows, and the angles that turn them."""

    base: Any
    table: Any
    start: Any
    stride_block: Any
    stride_token: Any
    cos: Any  # [R/2]; None: keys are not turned
    sin: Any


def pairs_of(ahead: LookAhead | None, dim: int) -> str:
    """Which of ``D = dim`` dimensions turn together: the first half with the second (``"halves"``), ``"others"``, or
    none (``""``)."""
    if ahead is None:
        return ""
    half = len(ahead.cos)
    # The codes of packed queries can only be split between bytes.
    return "halves" if 2 * half == dim and half % 2 == 0 and not ahead.interleaved else "others"


@triton.jit
def load_halves(keys, offs_w, SIZE: tl.constexpr, FORMAT: tl.constexpr, FORM: tl.constexpr):
    """Both halves of keys of which every dimension rotates, each loaded once, as ``[SIZE, tokens]``."""
    HALF: tl.constexpr = FORM.rotary // 2
    offs_d = tl.arange(0, SIZE)
    inside = offs_d < HALF
    cos = tl.load(keys.cos + offs_d, mask=inside, other=0.0)[:, None]
    sin = tl.load(keys.sin + offs_d, mask=inside, other=0.0)[:, None]
    x = load_rows(keys, offs_w, offs_d, FORM.window, FORMAT, tl.float32)
    y = load_rows(keys, offs_w, HALF + offs_d, FORM.window, FORMAT, tl.float32)
    return (x * cos + y * sin).to(FORM.dtype), (y * cos - x * sin).to(FORM.dtype)


@triton.jit
def load_keys(keys, offs_w, offs_d, FORMAT: tl.constexpr, FORM: tl.constexpr):
    """Keys of window tokens ``offs_w`` as ``[dims, tokens]`` of ``FORM.dtype``, zero outside the window and
    ``FORMAT.dim``."""
    rows = load_rows(keys, offs_w, offs_d, FORM.window, FORMAT, FORM.dtype)
    if keys.cos is not None:
        HALF: tl.constexpr = FORM.rotary // 2
        rotates = offs_d < FORM.rotary
        if FORM.interleaved:
            behind, pair, other = offs_d % 2 == 1, offs_d // 2, offs_d ^ 1
        else:
            behind = offs_d >= HALF
            pair = tl.where(behind, offs_d - HALF, offs_d)
            other = tl.where(behind, offs_d - HALF, offs_d + HALF)
            RUN: tl.constexpr = FORM.run  # without the hint, partners would be loaded one by one
            other = tl.max_contiguous(tl.multiple_of(other, RUN), RUN)
        cos = tl.load(keys.cos + pair, mask=rotates, other=1.0)
        sin = tl.load(keys.sin + pair, mask=rotates, other=0.0)
        sin = tl.where(behind, -sin, sin)
        partners = load_rows(keys, offs_w, other, FORM.window, FORMAT, tl.float32)
        rows = (rows.to(tl.float32) * cos[:, None] + partners * sin[:, None]).to(FORM.dtype)
    return rows
