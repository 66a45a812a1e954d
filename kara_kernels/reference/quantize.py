"""Rows of a context in fewer bits. See Payload in ``docs/method.md``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..payload import GROUP, LEVELS, PayloadLayout
from ..payload_arguments import LOSSY, Caches, PayloadArguments, check_gather, check_scatter
from .gather import Target, grades_of, halves, joined, of_kind, pools_of, rows_of, write_lists

FP8 = torch.float8_e4m3fn
LEAST = 2.0**-126  # steps below it count as none, because some devices flush such numbers to zero


def quantize_rows(
    k_cache: Caches, v_cache: Caches | None, block_table: Tensor, rows: Tensor | None, layout: PayloadLayout, *,
    channels: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of a context as a payload of fewer bits. See :func:`kara_kernels.ops.quantize_rows`."""
    given = check_gather(k_cache, v_cache, block_table, rows, layout, channels, out, LOSSY)
    quantize(given)
    return given.payload


def dequantize_rows(
    payload: Tensor, layout: PayloadLayout, k_cache: Caches, v_cache: Caches | None, block_table: Tensor, *,
    to: str = "places",
) -> None:  # fmt: skip
    """Rows of a payload into a paged cache. See :func:`kara_kernels.ops.dequantize_rows`."""
    dequantize(check_scatter(payload, layout, k_cache, v_cache, block_table, to, LOSSY))


@torch.no_grad()
def quantize(a: PayloadArguments) -> None:
    """Writes a payload by checked arguments."""
    plan, exact, grades = a.layout, list(of_kind(a, "exact")), list(of_kind(a, "rows"))
    residuals = {(half, s.grade): arrays[half] for s, arrays in of_kind(a, "residual") for half in arrays}
    for layer, half, pool in halves(a):
        rows = rows_of(a, layer, half, pool)
        for section, arrays in (*exact, *grades):
            x = rows[:, section.first : section.first + section.rows]
            if section.kind == "exact":
                arrays[half][layer] = x
            elif plan.form == "fp8":
                arrays[half][layer] = x.float().clamp(-448.0, 448.0).to(FP8)
            else:
                x = x.float()
                if half == "k" and plan.rotate:
                    x = hadamard(x, plan.run) * 2.0 ** -_halvings(plan)[0]
                codes = _coded(x, half, arrays[f"{half}_bounds"][layer])
                arrays[half][layer] = _pack((codes + 8) >> 4)
                if (half, section.grade) in residuals:
                    residuals[half, section.grade][layer] = _pack(codes & 15)
    write_lists(a)


def _coded(x: Tensor, half: str, bounds: Tensor) -> Tensor:
    """Codes of ``x [H, r, D]`` in ``0..LEVELS``, a byte each. Its ranges are written to ``bounds``."""
    bounds.copy_(_ranges(x, half))
    low, high = bounds.float().unbind(-1 if half == "v" else -2)
    step = _step(low, high)
    divisor = torch.where(step > 0, step, 1.0)
    if half == "v":
        low, divisor = low[..., None], divisor[..., None]
    else:
        low, divisor = (some.repeat_interleave(GROUP, 1)[:, : x.shape[1]] for some in (low, divisor))
    return x.sub(low).div_(divisor).clamp_(0, LEVELS).round_().int().byte()


@torch.no_grad()
def dequantize(a: PayloadArguments) -> None:
    """Writes the rows of a payload by checked arguments."""
    plan, target = a.layout, Target(a)
    for half, _ in pools_of(a):
        stored, residuals = grades_of(a, "rows", half), grades_of(a, "residual", half)
        bounds = [] if plan.form == "fp8" else grades_of(a, "rows", f"{half}_bounds")
        for lanes in target.lanes:
            found = joined(stored, lanes)
            if plan.form == "fp8":
                found = target.ordered(_floats(plan, found), 0, lanes)
            else:
                restored, dim = (_restored_keys, 1) if half == "k" else (_restored_values, 0)
                found = restored(plan, *_codes(found, residuals, lanes), joined(bounds, lanes).float())
                found = target.ordered(found, dim, lanes).movedim(0, -1 if dim else 0)
            target.put(half, lanes, _rounded(found, plan.dtype))
        for exact in grades_of(a, "exact", half):
            target.put(half, slice(0, len(exact)), exact)


def _codes(upper: Tensor, residuals: list[Tensor], lanes: slice) -> tuple[Tensor, Tensor, int]:
    """Codes of even and of odd channels, and what was added to each, so that a byte holds them."""
    even, odd = upper * 16, upper & 0xF0  # a shift of bytes takes twice the time of a product
    if not residuals:
        return even, odd, 0
    some = [grade[lanes] for grade in residuals]
    held = sum(grade.shape[1] for grade in some)
    if held < upper.shape[1]:
        some.append(torch.zeros_like(upper[:, held:]))
    bits = torch.cat(some, 1).bitwise_xor_(0x88)
    return even.bitwise_or_(bits & 15), odd.bitwise_or_(bits.bitwise_right_shift_(4)), 8


def _floats(plan: PayloadLayout, x: Tensor) -> Tensor:
    """``x [lanes, r, D]`` in float32, behind room for exact rows."""
    found = torch.empty(len(x), plan.exact_rows + x.shape[1], x.shape[2], device=x.device)
    found[:, plan.exact_rows :] = x
    return found


def _restored_values(plan: PayloadLayout, even: Tensor, odd: Tensor, added: int, bounds: Tensor) -> Tensor:
    """Rows of V, ``[lanes, r, D]``, of bounds ``[lanes, r, 2]``, behind room for exact rows."""
    pairs = (odd.short() << 8).bitwise_or_(even)  # two bytes at a time, in the order of the channels
    rows = _floats(plan, pairs.view(torch.uint8))
    _restore(rows[:, plan.exact_rows :], added, bounds.permute(2, 0, 1))
    return rows


def _restored_keys(plan: PayloadLayout, even: Tensor, odd: Tensor, added: int, bounds: Tensor) -> Tensor:
    """K as planes, one of each channel, ``[D, lanes, r]``, of bounds ``[lanes, groups, 2, D]``, behind room for exact
    rows and with room for whole groups."""
    lanes, groups, _, dim = bounds.shape
    planes = bounds.new_empty(dim, lanes, plan.exact_rows + groups * GROUP)
    rows = planes[..., plan.exact_rows :]
    rows[0::2, :, : even.shape[1]], rows[1::2, :, : even.shape[1]] = even.permute(2, 0, 1), odd.permute(2, 0, 1)
    _restore(rows.unflatten(-1, (groups, GROUP)), added, bounds.permute(2, 3, 0, 1))
    return _rotated(planes, plan.run).mul_(2.0 ** -_halvings(plan)[1]) if plan.rotate else planes


def _restore(x: Tensor, added: int, bounds: Tensor) -> None:
    """Puts elements in place of their codes. ``bounds`` are two to each ``x[..., :]``."""
    low, high = bounds.contiguous()[..., None]
    if added:
        x.sub_(added)
    torch.add(low, x.mul_(_step(low, high)), out=x)


def hadamard(x: Tensor, run: int) -> Tensor:
    """Every ``run`` elements of ``x [..., D]`` times the Hadamard matrix of +1 and -1 (Sylvester's order), by sums and
    differences of pairs at distances 1, 2, 4, ..."""
    planes = x.movedim(-1, 0).clone(memory_format=torch.contiguous_format)
    return _rotated(planes, run).movedim(0, -1).contiguous()


def _rotated(x: Tensor, run: int) -> Tensor:
    """The same of planes ``[D, ...]``, which are overwritten. Sums of whole planes take half the time of sums of
    neighbours. Sums go to the first half of a run and differences to the second, so that the next pairs are neighbours
    again and the last round leaves all in order."""
    half, buffers = run // 2, (x, torch.empty_like(x))
    runs = [planes.unflatten(0, (-1, run)) for planes in buffers]
    pairs = [(planes[:, 0::2], planes[:, 1::2]) for planes in runs]
    found = [(planes[:, :half], planes[:, half:]) for planes in runs]
    rounds = run.bit_length() - 1
    for i in range(rounds):
        torch.add(*pairs[i % 2], out=found[1 - i % 2][0])
        torch.sub(*pairs[i % 2], out=found[1 - i % 2][1])
    return buffers[rounds % 2]


def _halvings(plan: PayloadLayout) -> tuple[int, int]:
    """How often K is halved before and after, because twice the matrix gives ``run`` times the vector."""
    doublings = plan.run.bit_length() - 1
    return doublings // 2, doublings - doublings // 2


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To ``dtype``; a float8 saturates."""
    if dtype.itemsize == 1:
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return x.to(dtype)


def _ranges(x: Tensor, half: str) -> Tensor:
    """Least and greatest of ``x [H, r, D]``: of each channel in ``GROUP`` rows for K, ``[H, groups, 2, D]``; of each
    row for V, ``[H, r, 2]``. Zeros are +0, because both zeros are equally small."""
    if half == "v":
        bounds = torch.stack((x.amin(-1), x.amax(-1)), -1)
    else:
        bounds = torch.stack([torch.stack((some.amin(1), some.amax(1)), 1) for some in x.split(GROUP, dim=1)], 1)
    return torch.where(bounds == 0, 0.0, bounds)


def _step(low: Tensor, high: Tensor) -> Tensor:
    step = (high - low) / LEVELS
    return torch.where(step >= LEAST, step, 0.0)


def _pack(nibbles: Tensor) -> Tensor:
    """uint8 ``[..., D/2]`` of ``[..., D]`` in 0..15, the lower dimension in the low half."""
    pairs = nibbles.view(torch.int16)
    return (pairs | pairs >> 4).byte()
