"""Rows of a context, by ranked lists per layer and head, between a paged cache and one contiguous payload.

One launch moves the rows of all layers. A program moves 64 rows of one head of one cache. It reads their places and the
ids of their blocks, one per thread, then the rows in slices of up to 256 bytes. Every byte of a row is read once and
written once. Bits are moved and never recomputed, so any dtype works.

Channels of K that were dropped (ThinK, arXiv 2407.21018) are not read. On the way back a row is written as zeros, and
after a barrier its kept channels.
"""

from torch import Tensor

from ..paged import WORDS
from ..payload import GROUP, PayloadLayout
from ..payload_arguments import Caches, PayloadArguments, check_gather, check_scatter
from ..reference import gather as reference
from ._payload import (
    array_of,
    copy_to_payload,
    copy_to_pool,
    given_places,
    list_arguments,
    list_of,
    payload_arguments,
    pool_rows,
    stored_places,
    tile_of,
    write_lists,
)
from ._rows import pool_arguments
from ._triton import kernel, launch, resolve_backend, tl
from .compact import row_slice

# ------------------------------------------------------------------------------------------------- device code


@kernel
def gather_kernel(
    words_ptr, index_ptr, kept_ptr, k_ptr, k_table, v_ptr, v_table, block_table_ptr, places_ptr, channels_ptr,
    rows, grade_rows, sections: tl.int64, stride_section: tl.int64, k_array: tl.int64, k_shift: tl.int64,
    v_array: tl.int64, v_shift: tl.int64, index_array: tl.int64, index_shift: tl.int64,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    stride_v_l: tl.int64, stride_v_b: tl.int64, stride_v_p: tl.int64, stride_v_h: tl.int64,
    stride_places_l: tl.int64, stride_places_h: tl.int64, stride_channels_l: tl.int64, stride_channels_h: tl.int64,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles, L*H, caches)``: rows ``places`` of the context go to the payload, in order.

    A tile is 64 rows in slices of up to 256 bytes: 16 KB, 256 bytes for each of 64 threads, 16 at a time.
    """
    heads = tl.program_id(1).to(tl.int64)
    tile = tile_of(tl.program_id(0) * TILE, heads, 0, rows, grade_rows)
    offs = tl.arange(0, TILE)
    inside = tile.offset + offs < tile.count
    places, channels = places_ptr, channels_ptr
    if places is not None:
        places = list_of(places, stride_places_l, stride_places_h, heads, H)
    place = given_places(places, tile, offs, inside)
    if channels is not None:
        channels = list_of(channels, stride_channels_l, stride_channels_h, heads, H)
    keys = pool_rows(k_ptr, k_table, stride_k_l, stride_k_b, stride_k_p, stride_k_h, block_table_ptr, heads, H)
    values = pool_rows(v_ptr, v_table, stride_v_l, stride_v_b, stride_v_p, stride_v_h, block_table_ptr, heads, H)
    if tl.program_id(2) == 0:
        index = array_of(tile, sections, stride_section, index_array, index_shift)
        write_lists(tile, place, inside, offs, index_ptr, index, channels, kept_ptr, KEPT)
        array = array_of(tile, sections, stride_section, k_array, k_shift)
        copy_to_payload(tile, keys, place, inside, offs, words_ptr, array, channels, KEPT, K, BLOCK_D)
    else:
        array = array_of(tile, sections, stride_section, v_array, v_shift)
        copy_to_payload(tile, values, place, inside, offs, words_ptr, array, None, V.dim, V, BLOCK_DV)


@kernel
def scatter_kernel(
    words_ptr, index_ptr, kept_ptr, k_ptr, k_table, v_ptr, v_table, block_table_ptr,
    rows, grade_rows, sections: tl.int64, stride_section: tl.int64, k_array: tl.int64, k_shift: tl.int64,
    v_array: tl.int64, v_shift: tl.int64, index_array: tl.int64, index_shift: tl.int64,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    stride_v_l: tl.int64, stride_v_b: tl.int64, stride_v_p: tl.int64, stride_v_h: tl.int64,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles, L*H, caches)``: rows of the payload go where they stood, or to the front."""
    heads = tl.program_id(1).to(tl.int64)
    tile = tile_of(tl.program_id(0) * TILE, heads, 0, rows, grade_rows)
    offs = tl.arange(0, TILE)
    inside = tile.offset + offs < tile.count
    index = array_of(tile, sections, stride_section, index_array, index_shift)
    place = stored_places(tile, inside, offs, index_ptr, index)
    channels = kept_ptr
    if channels is not None:
        channels += heads * KEPT
    keys = pool_rows(k_ptr, k_table, stride_k_l, stride_k_b, stride_k_p, stride_k_h, block_table_ptr, heads, H)
    values = pool_rows(v_ptr, v_table, stride_v_l, stride_v_b, stride_v_p, stride_v_h, block_table_ptr, heads, H)
    if tl.program_id(2) == 0:
        array = array_of(tile, sections, stride_section, k_array, k_shift)
        copy_to_pool(tile, keys, place, inside, offs, words_ptr, array, channels, KEPT, K, BLOCK_D)
    else:
        array = array_of(tile, sections, stride_section, v_array, v_shift)
        copy_to_pool(tile, values, place, inside, offs, words_ptr, array, None, V.dim, V, BLOCK_DV)


# --------------------------------------------------------------------------------------------- how it is launched


def _arguments(a: PayloadArguments, index: bool, kind: str) -> dict[str, object]:
    keys, values = a.cache.k, a.cache.v or a.cache.k
    itemsize = a.layout.dtype.itemsize
    return {
        **payload_arguments(a, index, kind), **pool_arguments("k", keys, decoded=False),
        **pool_arguments("v", values, decoded=False), "words_ptr": a.payload.view(WORDS[itemsize]),
        "BLOCK_D": row_slice(a.layout.k_dim, itemsize), "BLOCK_DV": row_slice(values[0].shape[3], itemsize),
        "num_warps": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def _grid(a: PayloadArguments, kind: str) -> tuple[int, int, int]:
    plan = a.layout
    rows = plan.exact_rows if kind == "exact" else plan.rows_in(a.sections)
    return -(-rows // GROUP), plan.layers * plan.heads, 1 if a.cache.v is None else 2


def launch_gather(a: PayloadArguments, kind: str = "rows") -> None:
    """Writes the sections of ``kind``, ``"rows"`` of an exact payload or ``"exact"`` of any other. Checks nothing."""
    launch(
        gather_kernel, _grid(a, kind), a.payload.device, **_arguments(a, a.layout.places, kind),
        **list_arguments("places", a.rows), **list_arguments("channels", a.channels),
    )  # fmt: skip


def launch_scatter(a: PayloadArguments, kind: str = "rows") -> None:
    """Writes the rows of the sections of ``kind`` into the pool. Checks nothing."""
    launch(scatter_kernel, _grid(a, kind), a.payload.device, **_arguments(a, not a.to_front, kind))


# ------------------------------------------------------------------------------------------------------ public


def gather_rows(
    k_cache: Caches, v_cache: Caches | None, block_table: Tensor, rows: Tensor | None, layout: PayloadLayout, *,
    channels: Tensor | None = None, out: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Rows of one context as an exact payload: all layers and heads in one contiguous buffer.

    Args:
        k_cache: ``[B, P, H, D]`` of any dtype of 1, 2, 4 or 8 bytes and any strides (the last 1 on the Triton path), or
            ``L`` such tensors, or a :class:`~kara_kernels.PagedCache` half.
        v_cache: the same with ``Dv`` and the same dtype, or None for caches with one latent tensor (MLA).
        block_table: int32 ``[max_blocks]``, the context's blocks.
        rows: int32 ``[H, R]``, for many layers ``[L, H, R]``: distinct places in the context, best first; see
            :func:`rank_rows`. None with a layout without places: row ``i`` is token ``i``.
        layout: a :class:`~kara_kernels.PayloadLayout` of the form ``"exact"``, whose docstring says where everything
            lies.
        channels: int32 ``[H, k_dim]``, for many layers ``[L, H, k_dim]``: distinct channels of K to keep, if ``layout``
            drops some.
        out: uint8 ``[layout.nbytes]`` at an address that 16 divides; new memory by default.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        ``out``, or the new payload. Gaps between arrays and the ends of sections are not written.

    Raises:
        TypeError, ValueError: before anything is written. Contents (block ids, places, channels) are checked on the CPU
            and with ``KARA_KERNELS_DEBUG=1`` only.
    """
    given = check_gather(k_cache, v_cache, block_table, rows, layout, channels, out, ("exact",))
    if resolve_backend(backend, given.payload.device) == "torch":
        reference.gather(given)
    else:
        given.cache.require_kernel_layout()
        launch_gather(given)
    return given.payload


def scatter_rows(
    payload: Tensor, layout: PayloadLayout, k_cache: Caches, v_cache: Caches | None, block_table: Tensor, *,
    to: str = "places", backend: str = "auto",
) -> None:  # fmt: skip
    """Rows of an exact payload into a paged cache; the inverse of :func:`gather_rows`.

    Args:
        payload: uint8 ``[n]`` at an address that 16 divides: the payload, or a prefix of it that ends with a section
            and has at least one grade of rows. Rows that it lacks are left alone.
        layout: of the whole payload.
        k_cache, v_cache: as in :func:`gather_rows`. Their rows are overwritten; dropped channels of K become zero.
        block_table: int32 ``[max_blocks]``: distinct blocks.
        to: ``"places"`` puts rows where they stood; ``"front"`` puts row ``i`` at token ``i``, so that ``R`` rows take
            ``ceil(R / P)`` blocks. Attention does not depend on the order of past rows.
        backend: as in :func:`gather_rows`.

    Raises:
        TypeError, ValueError: before anything is written. Contents (block ids, the payload's places and channels) are
            checked on the CPU and with ``KARA_KERNELS_DEBUG=1`` only.
    """
    given = check_scatter(payload, layout, k_cache, v_cache, block_table, to, ("exact",))
    if resolve_backend(backend, given.payload.device) == "torch":
        reference.scatter(given)
    else:
        given.cache.require_kernel_layout()
        launch_scatter(given)
