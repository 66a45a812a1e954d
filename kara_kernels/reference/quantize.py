"""Rows of a context in fewer bits. See Payload in ``docs/method.md``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..payload import GROUP, LEVELS, PayloadLayout
from ..payload_arguments import LOSSY, Caches, PayloadArguments, check_gather, check_scatter
from .gather import gather_kind, halves, of_kind, put_rows, rows_of, scatter_kind, write_lists

FP8 = torch.float8_e4m3fn
SEVERAL = 8  # layers that are decoded together: enough for few calls, and few enough for a CPU's cache
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
        for half, pools in (("k", a.cache.k), ("v", a.cache.v or ())):
            for first in range(0, len(pools), SEVERAL):
                some = pools[first : first + SEVERAL]
                layers = slice(first, first + len(some))
                found = arrays[half][layers]
                if plan.form == "fp8":
                    found = found.float()
                else:
                    codes = 16 * _unpack(found)
                    if (half, section.grade) in residuals:
                        codes += (_unpack(residuals[half, section.grade][layers]) ^ 8) - 8
                    low, high = _of_elements(arrays[f"{half}_bounds"][layers].float(), half, section.rows)
                    found = low + _step(low, high) * codes.float()
                    if half == "k" and plan.rotate:
                        found = hadamard(found, plan.run) * 2.0 ** -_halvings(plan)[1]
                for layer, rows in enumerate(_rounded(found, some[0].dtype), start=first):
                    put_rows(a, section, layer, half, pools[layer], rows)


def hadamard(x: Tensor, run: int) -> Tensor:
    """Every ``run`` elements of ``x [..., D]`` times the Hadamard matrix of +1 and -1 (Sylvester's order), by sums and
    differences of pairs at distances 1, 2, 4, ..."""
    planes = x.movedim(-1, 0).contiguous()  # sums of whole planes take half the time of sums of neighbours
    distance = 1
    while distance < run:
        pairs = planes.unflatten(0, (-1, 2, distance))
        first, second = pairs[:, 0], pairs[:, 1]
        planes = torch.stack((first + second, first - second), 1).flatten(0, 2)
        distance *= 2
    return planes.movedim(0, -1).contiguous()


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


def _unpack(packed: Tensor) -> Tensor:
    """int32 ``[..., D]`` in ``0..15``."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()
