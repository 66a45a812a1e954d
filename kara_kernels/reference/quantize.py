"""Rows of a context in fewer bits. See Payload in ``docs/method.md``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..payload import GROUP, LEVELS, PayloadLayout
from ..payload_arguments import LOSSY, Caches, PayloadArguments, check_gather, check_scatter
from .gather import gather_kind, halves, of_kind, pools_of, put_rows, rows_of, scatter_kind, write_lists

FP8 = torch.float8_e4m3fn
TOGETHER = 2**18  # elements that are decoded together: enough for few calls, and few enough for a CPU's cache
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
    plan, residuals = a.layout, _residuals(a)
    gather_kind(a, "exact")
    for section, arrays in of_kind(a, "rows"):
        for layer, half, pool in halves(a):
            x = rows_of(a, section, layer, half, pool).float()
            if plan.form == "fp8":
                arrays[half][layer] = x.clamp(-448.0, 448.0).to(FP8)
                continue
            if half == "k" and plan.rotate:
                x = hadamard(x, plan.run) * 2.0 ** -_halvings(plan)[0]
            bounds = arrays[f"{half}_bounds"][layer]
            bounds.copy_(_ranges(x, half))
            low, high = _of_elements(bounds.float(), half, section.rows)
            step = _step(low, high)
            codes = ((x - low) / torch.where(step > 0, step, 1.0)).clamp(0, LEVELS).round().int()
            upper = (codes + 8) >> 4
            arrays[half][layer] = _pack(upper)
            if (half, section.grade) in residuals:
                residuals[half, section.grade][layer] = _pack(codes - 16 * upper)
    write_lists(a)


@torch.no_grad()
def dequantize(a: PayloadArguments) -> None:
    """Writes the rows of a payload by checked arguments."""
    plan, residuals = a.layout, _residuals(a)
    scatter_kind(a, "exact")
    for section, arrays in of_kind(a, "rows"):
        for half, pools in pools_of(a):
            several = max(1, TOGETHER // (plan.heads * section.rows * pools[0].shape[-1]))
            for first in range(0, len(pools), several):
                layers = slice(first, first + several)
                found = arrays[half][layers]
                if plan.form == "fp8":
                    found = _rounded(found.float(), plan.dtype)
                else:
                    residual = residuals.get((half, section.grade))
                    codes = _codes(found, None if residual is None else residual[layers])
                    restored = _restored_keys if half == "k" else _restored_values
                    found = restored(plan, *codes, arrays[f"{half}_bounds"][layers].float())
                put_rows(a, section, half, layers, found)


def _codes(upper: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of even and of odd channels, each plus 8, so that a byte holds them."""
    if residual is None:
        return (upper << 4) | 8, (upper & 0xF0) | 8
    return (upper << 4) | ((residual & 15) ^ 8), (upper & 0xF0) | ((residual >> 4) ^ 8)


def _restored_values(plan: PayloadLayout, even: Tensor, odd: Tensor, bounds: Tensor) -> Tensor:
    """Rows of V, ``[L, H, r, D]``, of bounds ``[L, H, r, 2]``."""
    pairs = (odd.short() << 8).bitwise_or_(even)  # two bytes at a time, in the order of the channels
    return _rounded(_restored(pairs.view(torch.uint8).float(), bounds[..., :1], bounds[..., 1:]), plan.dtype)


def _restored_keys(plan: PayloadLayout, even: Tensor, odd: Tensor, bounds: Tensor) -> Tensor:
    """Rows of K, ``[L, H, r, D]``, of bounds ``[L, H, groups, 2, D]``. Until the end they lie as planes, one of each
    channel, with room for whole groups."""
    layers, heads, groups, _, dim = bounds.shape
    planes = bounds.new_empty(dim, layers, heads, groups * GROUP)
    rows = planes[..., : even.shape[-2]]
    rows[0::2], rows[1::2] = even.permute(3, 0, 1, 2), odd.permute(3, 0, 1, 2)
    low, high = bounds.permute(3, 4, 0, 1, 2)[..., None]
    _restored(planes.unflatten(-1, (groups, GROUP)), low, high)
    if plan.rotate:
        planes = _rotated(planes, plan.run).mul_(2.0 ** -_halvings(plan)[1])
    return _rounded(planes, plan.dtype)[..., : even.shape[-2]].permute(1, 2, 3, 0).contiguous()


def _restored(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Elements in place of their codes plus 8."""
    return torch.add(low, x.sub_(8).mul_(_step(low, high)), out=x)


def hadamard(x: Tensor, run: int) -> Tensor:
    """Every ``run`` elements of ``x [..., D]`` times the Hadamard matrix of +1 and -1 (Sylvester's order), by sums and
    differences of pairs at distances 1, 2, 4, ..."""
    planes = x.movedim(-1, 0).clone(memory_format=torch.contiguous_format)
    return _rotated(planes, run).movedim(0, -1).contiguous()


def _rotated(x: Tensor, run: int) -> Tensor:
    """The same of planes ``[D, ...]``, which are overwritten. Sums of whole planes take half the time of sums of
    neighbours."""
    spare, distance = torch.empty_like(x), 1
    while distance < run:
        pairs, found = x.unflatten(0, (-1, 2, distance)), spare.unflatten(0, (-1, 2, distance))
        torch.add(pairs[:, 0], pairs[:, 1], out=found[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=found[:, 1])
        x, spare, distance = spare, x, 2 * distance
    return x


def _halvings(plan: PayloadLayout) -> tuple[int, int]:
    """How often K is halved before and after, because twice the matrix gives ``run`` times the vector."""
    doublings = plan.run.bit_length() - 1
    return doublings // 2, doublings - doublings // 2


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To ``dtype``; a float8 saturates."""
    if dtype.itemsize == 1:
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return x.to(dtype)


def _residuals(a: PayloadArguments) -> dict[tuple[str, int], Tensor]:
    """Residual codes by half and grade."""
    return {(half, s.grade): arrays[half] for s, arrays in of_kind(a, "residual") for half in arrays}


def _ranges(x: Tensor, half: str) -> Tensor:
    """Least and greatest of ``x [H, r, D]``: of each channel in ``GROUP`` rows for K, ``[H, groups, 2, D]``; of each
    row for V, ``[H, r, 2]``. Zeros are +0, because both zeros are equally small."""
    if half == "v":
        bounds = torch.stack((x.amin(-1), x.amax(-1)), -1)
    else:
        bounds = torch.stack([torch.stack((some.amin(1), some.amax(1)), 1) for some in x.split(GROUP, dim=1)], 1)
    return torch.where(bounds == 0, 0.0, bounds)


def _of_elements(bounds: Tensor, half: str, rows: int) -> tuple[Tensor, ...]:
    """Both bounds as tensors that broadcast with ``[..., H, r, D]``."""
    if half == "v":
        return bounds[..., :1], bounds[..., 1:]
    return tuple(bound.repeat_interleave(GROUP, -2)[..., :rows, :] for bound in bounds.unbind(-2))


def _step(low: Tensor, high: Tensor) -> Tensor:
    step = (high - low) / LEVELS
    return torch.where(step >= LEAST, step, 0.0)


def _pack(codes: Tensor) -> Tensor:
    """uint8 ``[..., D/2]`` of the lower four bits, the lower dimension in the low half."""
    nibbles = (codes & 15).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
