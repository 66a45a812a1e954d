"""Rows of a context in fewer bits: from pages to payload in one launch, and back in one. Rows that stay exact take a
second launch, that of :mod:`gather <kara_kernels.ops.gather>`.

A program quantises up to 4,096 elements of 64 rows of one head: some channels of K, or some of the rows of V. For K it
takes the least and greatest element of each channel in its rows (KIVI, arXiv 2402.02750: the outliers of K are whole
channels), for V those of each row. A range is divided into 240 steps. The code of the nearest step is split into the
nearest multiple of 16, which is the 4-bit code, and a remainder in -8..7, which makes it 8 bits. So four bits alone use
the whole range, unlike the upper half of an ordinary 8-bit code. Bounds are elements of the cache, stored exactly in
its dtype; those of rotated channels are rounded to it.

Products and sums are rounded one by one (no fused multiply-add), so that every device gives the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from ..payload import GROUP, PayloadLayout
from ..payload_arguments import LOSSY, Caches, PayloadArguments, check_gather, check_scatter
from ..reference import quantize as reference
from ._codes import CodeForm, from_fp8, quantize_keys, quantize_values, restore_keys, restore_values, to_fp8
from ._payload import (
    array_of,
    cells,
    clear,
    code_arguments,
    given_places,
    line_of,
    list_arguments,
    list_of,
    payload_arguments,
    pool_rows,
    stored_places,
    tile_of,
    write_lists,
)
from ._rows import FP8_NAMES, pool_arguments
from ._triton import architecture, kernel, launch, resolve_backend, tl, triton
from .compact import row_slice
from .gather import launch_gather, launch_scatter

# ------------------------------------------------------------------------------------------------- device code


@kernel
def quantize_kernel(
    codes_ptr, bounds_ptr, index_ptr, kept_ptr, k_ptr, k_table, v_ptr, v_table, block_table_ptr, places_ptr,
    channels_ptr, rows, grade_rows, sections: tl.int64, stride_section: tl.int64,
    k_array: tl.int64, k_shift: tl.int64, v_array: tl.int64, v_shift: tl.int64,
    index_array: tl.int64, index_shift: tl.int64, k_bounds_array: tl.int64, k_bounds_shift: tl.int64,
    v_bounds_array: tl.int64, v_bounds_shift: tl.int64,
    residuals: tl.int64, stride_residual: tl.int64, v_residual_array: tl.int64, v_residual_shift: tl.int64,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    stride_v_l: tl.int64, stride_v_b: tl.int64, stride_v_p: tl.int64, stride_v_h: tl.int64,
    stride_places_l: tl.int64, stride_places_h: tl.int64, stride_channels_l: tl.int64, stride_channels_h: tl.int64,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr, FORM: tl.constexpr,
    EXACT: tl.constexpr, K_PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_RV: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles, L*H, parts)``: rows ``places`` of the context after the exact ones go to the payload, in order. A
    part is ``BLOCK_D`` channels of K, or ``BLOCK_RV`` rows of V."""
    heads = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    tile = tile_of(tl.program_id(0) * TILE, heads, EXACT, rows, grade_rows)
    places, channels = places_ptr, channels_ptr
    if places is not None:
        places = list_of(places, stride_places_l, stride_places_h, heads, H)
    if channels is not None:
        channels = list_of(channels, stride_channels_l, stride_channels_h, heads, H)
    if part < K_PARTS:
        offs = tl.arange(0, TILE)
        inside = tile.offset + offs < tile.count
        place = given_places(places, tile, offs, inside)
        if part == 0:
            index = array_of(tile, sections, stride_section, index_array, index_shift)
            write_lists(tile, place, inside, offs, index_ptr, index, channels, kept_ptr, KEPT)
        keys = pool_rows(k_ptr, k_table, stride_k_l, stride_k_b, stride_k_p, stride_k_h, block_table_ptr, heads, H)
        source, line = cells(keys, place, inside, K), line_of(tile, offs)
        array = array_of(tile, sections, stride_section, k_array, k_shift)
        if FORM.name == "fp8":
            to_fp8(source, inside, line, part, codes_ptr, array, channels, KEPT, FORM, BLOCK_D)
        else:
            bounds = array_of(tile, sections, stride_section, k_bounds_array, k_bounds_shift)
            residual = residuals + tile.grade * stride_residual
            quantize_keys(tile, source, inside, line, part, bounds_ptr, bounds, codes_ptr, array, residual, channels,
                          KEPT, FORM, BLOCK_D, TILE)  # fmt: skip
    elif BLOCK_RV > 0:  # there is a cache of V
        some = (part - K_PARTS) * BLOCK_RV + tl.arange(0, BLOCK_RV)
        within = tile.offset + some < tile.count
        values = pool_rows(v_ptr, v_table, stride_v_l, stride_v_b, stride_v_p, stride_v_h, block_table_ptr, heads, H)
        v_source, v_line = cells(values, given_places(places, tile, some, within), within, V), line_of(tile, some)
        array = array_of(tile, sections, stride_section, v_array, v_shift)
        if FORM.name == "fp8":
            to_fp8(v_source, within, v_line, 0, codes_ptr, array, None, V.dim, FORM, BLOCK_DV)
        else:
            bounds = array_of(tile, sections, stride_section, v_bounds_array, v_bounds_shift)
            residual = array_of(tile, residuals, stride_residual, v_residual_array, v_residual_shift)
            quantize_values(v_source, within, v_line, bounds_ptr, bounds, codes_ptr, array, residual, V.dim, FORM,
                            BLOCK_DV)  # fmt: skip


@kernel
def dequantize_kernel(
    codes_ptr, bounds_ptr, index_ptr, kept_ptr, k_ptr, k_table, v_ptr, v_table, block_table_ptr,
    finer_rows, rows, grade_rows, sections: tl.int64, stride_section: tl.int64,
    k_array: tl.int64, k_shift: tl.int64, v_array: tl.int64, v_shift: tl.int64,
    index_array: tl.int64, index_shift: tl.int64, k_bounds_array: tl.int64, k_bounds_shift: tl.int64,
    v_bounds_array: tl.int64, v_bounds_shift: tl.int64,
    residuals: tl.int64, stride_residual: tl.int64, v_residual_array: tl.int64, v_residual_shift: tl.int64,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    stride_v_l: tl.int64, stride_v_b: tl.int64, stride_v_p: tl.int64, stride_v_h: tl.int64,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr, FORM: tl.constexpr,
    EXACT: tl.constexpr, K_PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_RV: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles, L*H, parts)``: rows of the payload after the exact ones go where they stood, or to the front. A
    part is ``BLOCK_D`` channels of K, or all where ``K_PARTS`` is 1, or ``BLOCK_RV`` rows of V. The first
    ``finer_rows`` have residuals."""
    SLICES: tl.constexpr = (KEPT + BLOCK_D - 1) // BLOCK_D // K_PARTS
    heads = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    tile = tile_of(tl.program_id(0) * TILE, heads, EXACT, rows, grade_rows)
    index = array_of(tile, sections, stride_section, index_array, index_shift)
    if part < K_PARTS:
        offs = tl.arange(0, TILE)
        inside = tile.offset + offs < tile.count
        keys = pool_rows(k_ptr, k_table, stride_k_l, stride_k_b, stride_k_p, stride_k_h, block_table_ptr, heads, H)
        target = cells(keys, stored_places(tile, inside, offs, index_ptr, index), inside, K)
        channels = kept_ptr
        if channels is not None:
            channels += heads * KEPT
            clear(target, inside, K.dim, BLOCK_D)
        array = array_of(tile, sections, stride_section, k_array, k_shift)
        bounds = array_of(tile, sections, stride_section, k_bounds_array, k_bounds_shift)
        residual = residuals + tile.grade * stride_residual
        finer = inside & (tile.first + offs < finer_rows)
        for slice_ in range(part * SLICES, (part + 1) * SLICES):
            if FORM.name == "fp8":
                from_fp8(target, inside, line_of(tile, offs), slice_, codes_ptr, array, channels, KEPT, FORM, BLOCK_D)
            else:
                restore_keys(tile, target, inside, finer, line_of(tile, offs), slice_, bounds_ptr, bounds, codes_ptr,
                             array, residual, channels, KEPT, FORM, BLOCK_D, TILE)  # fmt: skip
    elif BLOCK_RV > 0:  # there is a cache of V
        some = (part - K_PARTS) * BLOCK_RV + tl.arange(0, BLOCK_RV)
        within = tile.offset + some < tile.count
        values = pool_rows(v_ptr, v_table, stride_v_l, stride_v_b, stride_v_p, stride_v_h, block_table_ptr, heads, H)
        v_target = cells(values, stored_places(tile, within, some, index_ptr, index), within, V)
        array = array_of(tile, sections, stride_section, v_array, v_shift)
        if FORM.name == "fp8":
            from_fp8(v_target, within, line_of(tile, some), 0, codes_ptr, array, None, V.dim, FORM, BLOCK_DV)
        else:
            bounds = array_of(tile, sections, stride_section, v_bounds_array, v_bounds_shift)
            residual = array_of(tile, residuals, stride_residual, v_residual_array, v_residual_shift)
            finer_v = within & (tile.first + some < finer_rows)
            restore_values(v_target, within, finer_v, line_of(tile, some), bounds_ptr, bounds, codes_ptr, array,
                           residual, V.dim, FORM, BLOCK_DV)  # fmt: skip


# --------------------------------------------------------------------------------------------- how it is launched

# Of a program, whose 256 threads have 16 each. With 128 threads quantising took 153 registers on sm_80, which left room
# for 12 warps on a multiprocessor; now 76 leave room for 24.
TILE_ELEMENTS = 4096


def _kind(dtype: torch.dtype) -> str:
    return FP8_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def _launch(kernel: Any, a: PayloadArguments, index: bool, parts: int | None, **more: Any) -> None:
    """Launches programs for every tile; ``parts`` of them for K, or one for each slice of channels."""
    plan, count = a.layout, a.layout.rows_in(a.sections) - a.layout.exact_rows
    keys, values = a.cache.k, a.cache.v or a.cache.k
    run, block_v = plan.run if plan.rotate else 0, max(2, triton.next_power_of_2(values[0].shape[3]))
    block_k = max(2, run, min(row_slice(plan.k_dim, plan.dtype.itemsize), TILE_ELEMENTS // GROUP))
    rows_v = 0 if a.cache.v is None else min(GROUP, max(1, TILE_ELEMENTS // block_v))
    parts = parts or -(-plan.k_dim // block_k)
    grid = -(-count // GROUP), plan.layers * plan.heads, parts + (GROUP // rows_v if rows_v else 0)
    launch(
        kernel, grid, a.payload.device, **payload_arguments(a, index), **code_arguments(a),
        **pool_arguments("k", keys, decoded=False), **pool_arguments("v", values, decoded=False), **more,
        FORM=CodeForm(plan.form, _kind(plan.dtype), _kind(plan.bounds_dtype), run, 16 // plan.dtype.itemsize),
        EXACT=plan.exact_rows, K_PARTS=parts, BLOCK_D=block_k, BLOCK_DV=block_v, BLOCK_RV=rows_v,
        num_warps=4 if architecture(a.payload.device).amd else 8, enable_fp_fusion=False,
    )  # fmt: skip


def launch_quantize(a: PayloadArguments) -> None:
    """Writes a payload. Checks nothing."""
    if a.layout.exact_rows:
        launch_gather(a, "exact")
    _launch(
        quantize_kernel, a, a.layout.places, None, **list_arguments("places", a.rows),
        **list_arguments("channels", a.channels),
    )  # fmt: skip


def launch_dequantize(a: PayloadArguments) -> None:
    """Writes the rows of a payload into the pool. Checks nothing."""
    if a.layout.exact_rows:
        launch_scatter(a, "exact")
    # A program that clears rows stores all their channels.
    parts = None if a.layout.channels is None else 1
    _launch(dequantize_kernel, a, not a.to_front, parts, finer_rows=a.layout.rows_in(a.sections, "residual"))


# ------------------------------------------------------------------------------------------------------ public


def quantize_rows(
    k_cache: Caches, v_cache: Caches | None, block_table: Tensor, rows: Tensor | None, layout: PayloadLayout, *,
    channels: Tensor | None = None, out: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Rows of one context as a payload of fewer bits: all layers and heads in one contiguous buffer.

    Args:
        k_cache: ``[B, P, H, D]`` float16, bfloat16, float32 or, unless ``layout.form`` is ``"fp8"``, float8, of any
            strides (the last 1 on the Triton path), or ``L`` such tensors, or a :class:`~kara_kernels.PagedCache` half.
        v_cache, block_table, rows, channels, out, backend: as in :func:`gather_rows`.
        layout: a :class:`~kara_kernels.PayloadLayout` of the form ``"fp8"``, ``"int8"`` or ``"int4"``, whose docstring
            says where everything lies and what codes mean.

    Returns:
        ``out``, or the new payload. Both backends write the same bits. Gaps between arrays and the ends of sections are
        not written.

    Raises:
        TypeError, ValueError: before anything is written. Contents (block ids, places, channels) are checked on the CPU
            and with ``KARA_KERNELS_DEBUG=1`` only.

    A decoded element differs from the original by at most 1/480 of its range (``(high - low) / 480``) with 8 bits, and
    17/480 with 4, and by rounding to the cache's dtype. With ``rotate`` this holds of rotated channels, whose bounds
    are rounded too. An element that is not finite, a range beyond float32, or a rotated key beyond the dtype of the
    bounds (float16: keys of 8,000 and more) spoils the channel of its 64 rows of K, or its row of V; that is not
    checked.
    """
    given = check_gather(k_cache, v_cache, block_table, rows, layout, channels, out, LOSSY)
    if resolve_backend(backend, given.payload.device) == "torch":
        reference.quantize(given)
    else:
        given.cache.require_kernel_layout()
        launch_quantize(given)
    return given.payload


def dequantize_rows(
    payload: Tensor, layout: PayloadLayout, k_cache: Caches, v_cache: Caches | None, block_table: Tensor, *,
    to: str = "places", backend: str = "auto",
) -> None:  # fmt: skip
    """Rows of a payload of fewer bits into a paged cache; see :func:`quantize_rows`.

    Args:
        payload: uint8 ``[n]`` at an address that 16 divides: the payload, or a prefix of it that ends with a section
            and has at least one grade of rows. Grades without residuals are decoded from four bits. Rows that it lacks
            are left alone.
        layout: of the whole payload.
        k_cache, v_cache: of the dtype that was quantised. Their rows are overwritten; dropped channels of K become
            zero.
        block_table, to, backend: as in :func:`scatter_rows`.

    Raises:
        TypeError, ValueError: before anything is written. Contents (block ids, the payload's places and channels) are
            checked on the CPU and with ``KARA_KERNELS_DEBUG=1`` only.

    Both backends write the same bits.
    """
    given = check_scatter(payload, layout, k_cache, v_cache, block_table, to, LOSSY)
    if resolve_backend(backend, given.payload.device) == "torch":
        reference.dequantize(given)
    else:
        given.cache.require_kernel_layout()
        launch_dequantize(given)
