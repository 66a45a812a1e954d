"""Finds out where the rows of a KV cache lie by writing to it.

The shape of vLLM's caches is not enough: on CPUs keys are transposed inside a block, and bfloat16 is packed for matrix
instructions. So the attention backend writes numbered rows into one free block, and they are located there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kara_kernels.paged import PackedCache, PagedCache

from .latent import is_latent, write
from .quantised import by_head, stored_as

_PROBED = 1  # block 0 is vLLM's null block


def paged_view(layers: Sequence[Any], num_blocks: int, block_size: int) -> PagedCache | PackedCache:
    """The caches of all layers, as views ``[B, P, H, D]`` if strides can describe them, otherwise by element offsets.
    Those of eight-bit floats have their dtype, not that of bytes. Latent caches have no values.

    Args:
        layers: vLLM's attention layers, with caches allocated but not yet in use.
        num_blocks, block_size: of the cache.

    Raises:
        ValueError: caches that differ between layers, or a backend that stores part of a row outside its block.
    """
    caches = [x.kv_cache.view(stored_as(x.kv_cache_dtype, x.kv_cache.dtype)) for x in layers]
    first = caches[0]
    dims = [dim for dim, extent in enumerate(first.shape) if extent == num_blocks]
    alike = all(x.shape == first.shape and x.stride() == first.stride() and x.dtype == first.dtype for x in caches)
    dims = dims[:1]  # another extent may happen to be as large; a wrong choice would be found below
    if not dims or not alike or num_blocks <= _PROBED:
        raise ValueError(
            f"kara: expected caches of one layout with one dimension of {num_blocks} blocks, got shapes "
            f"{sorted({tuple(x.shape) for x in caches})}"
        )
    dim = dims[0]
    offsets = _element_offsets(layers[0], first, dim, block_size)
    views: list[list[Tensor]] = []
    for where in offsets:
        strides = _strides(where)
        if strides is None:
            if len(offsets) < 2:
                raise ValueError("kara: expected latent rows that strides can describe, got packed ones")
            size = int(offsets.max()) + 1
            pools = [x.as_strided((num_blocks, size), (x.stride(dim), 1), x.storage_offset()) for x in caches]
            return PackedCache(pools, *offsets)
        shape, strides, start = (num_blocks, *where.shape), (first.stride(dim), *strides), int(where[0, 0, 0])
        views.append([x.as_strided(shape, strides, x.storage_offset() + start) for x in caches])
    return PagedCache(*views)


@torch.inference_mode()
def _element_offsets(layer: Any, cache: Tensor, dim: int, block_size: int) -> Tensor:
    """int64 ``[2, P, H, D]`` for keys and values, or ``[1, P, 1, D]`` for latent rows: storage offset of an element
    from the start of its block."""
    heads, size = layer.num_kv_heads, layer.head_size
    scales = (layer._k_scale,) if is_latent(layer) else (layer._k_scale, layer._v_scale)
    shape = len(scales), block_size, heads, size
    numbers = torch.arange(1, math.prod(shape) + 1, device=cache.device).view(shape)
    slots = torch.arange(block_size, device=cache.device) + _PROBED * block_size
    base = min(128, round(2 / torch.finfo(cache.dtype).eps))  # the dtype represents these digits exactly
    factors = [by_head(scale, heads)[:, None] for scale in scales]  # vLLM divides by them
    block, written = (x.narrow(dim, _PROBED, 1) for x in (cache, layer.kv_cache))
    dtype = getattr(layer, "dtype", cache.dtype)
    found, place = torch.zeros(block.shape, dtype=torch.int64, device=cache.device), 1
    while place <= numbers.numel():
        digits = numbers // place % base
        rows = [(part * factor).to(dtype) for part, factor in zip(digits, factors, strict=True)]
        written.zero_()
        write(layer, rows, slots)
        found += block.float().to(torch.int64) * place
        place *= base
    written.zero_()
    where = _places(block.shape, block.stride(), cache.device)
    held, order = found.flatten().sort()
    order = order[held > 0]
    if not torch.equal(held[held > 0], numbers.flatten()):
        raise ValueError(
            f"kara: expected each of the {numbers.numel()} elements of a block's rows once in that block of the KV "
            f"cache, got {len(order)} elements there"
        )
    return where.flatten()[order].view(shape)


def _strides(where: Tensor) -> tuple[int, ...] | None:
    """Strides that give these offsets, or None if no strides do."""
    strides = tuple(
        int(where.select(axis, 1).flatten()[0] - where.flatten()[0]) if where.shape[axis] > 1 else 1
        for axis in range(where.dim())
    )
    ideal = where.flatten()[0] + _places(where.shape, strides, where.device)
    return strides if torch.equal(ideal, where) else None


def _places(shape: Sequence[int], strides: Sequence[int], device: torch.device) -> Tensor:
    """int64 of this shape: the offset of each element of a strided tensor from its first."""
    where = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
    for axis, (extent, stride) in enumerate(zip(shape, strides, strict=True)):
        along = [1] * len(shape)
        along[axis] = extent
        where += (torch.arange(extent, device=device) * stride).view(along)
    return where
