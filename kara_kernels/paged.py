"""The paged KV cache: layers, their addresses, and checks that no two of them share memory.

Shapes use the symbols of ``docs/method.md``: ``L`` layers, ``S`` sequences, ``H`` KV heads, ``G`` query heads per KV
head, ``W`` window length, ``K`` tokens kept, ``N`` queries, ``D``/``Dv`` head dimensions, ``B`` blocks of ``P`` tokens.

Physical token ``t`` of sequence ``s`` lives in block ``block_tables[s, t // P]``, row ``t % P``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .checks import FP8_DTYPES, check_alike, check_unit_stride
from .overlap import View, dims_of, first_meeting, reaches_twice
from .packed import PackedQueries, Queries

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer type for moving each element size


def row_alignment(tensor: Tensor) -> int:
    """The largest power of two, up to 16 bytes, that divides the address of every row (along the last dimension).

    It limits the width of loads. It depends on strides as well as the base, so it is the same for all slices of a
    buffer, and kernels are compiled for it.
    """
    if tensor.is_contiguous():  # rows are consecutive, so a batch of one is aligned like any batch
        strides = tensor.shape[-1]
    else:
        strides = 0
        for stride, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True):
            strides |= stride if n > 1 else 0
    bits = 16 | tensor.data_ptr() | strides * tensor.element_size()
    return bits & -bits


class Layers(Sequence[Tensor]):
    """``L`` tensors, one per layer, of one shape, dtype and device. One launch processes all of them.

    A kernel finds a layer through ``table``, an int64 tensor of base addresses on the device. It is built on first use
    and kept. An engine therefore creates this object once per cache, not per call. Building the table on a GPU needs a
    small upload, which a CUDA graph cannot capture. Layers of one stacked tensor need no table.
    """

    def __init__(self, name: str, tensors: Tensor | Sequence[Tensor]):
        if not isinstance(tensors, (Tensor, Sequence)):
            raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(tensors).__name__}")
        if isinstance(tensors, Tensor) and tensors.dim() != 5:
            raise ValueError(f"{name}: expected 4 dimensions, or 5 with a leading L, got shape {list(tensors.shape)}")
        self.stacked = tensors if isinstance(tensors, Tensor) else None
        self._listed = () if isinstance(tensors, Tensor) else tuple(tensors)
        if self.stacked is None:
            check_alike(name, self._listed)
        elif not self.stacked.shape[0]:
            raise ValueError(f"{name}: expected at least one layer, got shape {list(self.stacked.shape)}")
        # Layers of a stacked tensor are created on demand, because creating 36 views takes longer than a launch.
        self._first = self._listed[0] if self.stacked is None else self.stacked[0]
        self._table: Tensor | None = None
        self._kernels_can_read = False
        self.arguments: dict[tuple[str, bool], dict[str, Any]] = {}  # kernel arguments that are the same in every call
        self.scales: Layers | None = None  # [S, N, H*G, 1] of packed queries
        self.pool: PagedCache | None = None  # the checked pool whose keys these are

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self._first if index == 0 else self.tensors[index]

    def __len__(self) -> int:
        return len(self._listed) if self.stacked is None else self.stacked.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._listed if self.stacked is None else tuple(self.stacked.unbind(0))

    @property
    def table(self) -> Tensor | None:
        """int64 ``[L]`` base addresses, or None if ``stride_layer`` reaches all layers from the first."""
        if self.stacked is None and len(self.tensors) > 1 and self._table is None:
            addresses = [tensor.data_ptr() for tensor in self.tensors]
            self._table = torch.tensor(addresses, dtype=torch.int64, device=self.tensors[0].device)
        return self._table

    def views(self) -> list[View]:
        """The bytes of each layer as views."""
        first, size = self._first, self._first.element_size()
        if self.stacked is None:
            return [View(x.data_ptr(), dims_of(x.shape, x.stride(), size)) for x in self._listed]
        dims = dims_of(first.shape, first.stride(), size)
        return [View(first.data_ptr() + layer * self.stride_layer * size, dims) for layer in range(len(self))]

    @functools.cached_property
    def alignment(self) -> int:
        """The largest power of two, up to 16 bytes, that divides the address of every row of every layer."""
        bits = row_alignment(self._first)
        if len(self) > 1:
            bits |= self.stride_layer * self._first.element_size()
        for tensor in self._listed:
            bits |= tensor.data_ptr()
        return bits & -bits

    @property
    def stride_layer(self) -> int:
        return 0 if self.stacked is None else self.stacked.stride(0)

    @functools.cached_property
    def strides(self) -> tuple[int, int, int, int]:
        """Strides in elements: between layers, and along all dimensions of a layer except the last."""
        first, second, third, _ = self._first.stride()
        return self.stride_layer, first, second, third

    @functools.cached_property
    def words(self) -> Tensor:
        """The first layer as integers of its element size, for moving rows or decoding fp8 in a kernel."""
        return self._first.view(WORDS[self._first.element_size()])

    def require_kernel_layout(self, name: str) -> None:
        """Checks what kernels need: rows of ``D`` contiguous elements, and the same strides in all layers."""
        if self._kernels_can_read:  # the answer does not change, and checking 36 tensors takes longer than a launch
            return
        first = self._first
        check_unit_stride(name, first)
        for layer, tensor in enumerate(self._listed):
            if tensor.stride() != first.stride() and tensor.numel():
                raise ValueError(
                    f"{name}[{layer}]: expected strides {first.stride()} as in {name}[0], got {tensor.stride()}"
                )
        self._kernels_can_read = True


class PagedCache:
    """The block pools of all layers. Checks them and stores their addresses once for many calls.

    Pass ``cache.k`` and ``cache.v`` where an operation takes ``k_cache`` and ``v_cache``. The tensors must keep their
    storage while this object is used.

    Args:
        k_caches: ``L`` tensors ``[B, P, H, D]``, or one ``[L, B, P, H, D]``, of any strides. Pass an HND pool as a
            permuted view.
        v_caches: the same with ``Dv``, or None if one latent tensor holds both (MLA).

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices; caches that overlap.
    """

    def __init__(self, k_caches: Tensor | Sequence[Tensor], v_caches: Tensor | Sequence[Tensor] | None = None):
        self.k = k_caches if isinstance(k_caches, Layers) else Layers("k_cache", k_caches)
        self.v: Layers | None = None
        if v_caches is not None:
            self.v = v_caches if isinstance(v_caches, Layers) else Layers("v_cache", v_caches)
        _check_pools(self.k, self.v)
        self.k.pool = self  # lets a pair that was checked together pass without another check
        self.events: dict[Hashable, Any] = {}  # what calls of :func:`kara_kernels.compress_window` keep

    @functools.cached_property
    def keys_alone(self) -> PagedCache:
        """The keys alone, already checked together with the values."""
        alone = copy.copy(self)
        alone.v = None
        return alone

    @staticmethod
    def of(k_cache: Tensor | Sequence[Tensor], v_cache: Tensor | Sequence[Tensor] | None) -> PagedCache:
        """The pool that both arguments belong to, or a new, checked one that contains them."""
        if isinstance(k_cache, Layers) and k_cache.pool is not None:
            if k_cache.pool.v is v_cache:
                return k_cache.pool
            if v_cache is None:
                return k_cache.pool.keys_alone
        return PagedCache(k_cache, v_cache)

    def require_kernel_layout(self) -> None:
        self.k.require_kernel_layout("k_cache")
        if self.v is not None:
            self.v.require_kernel_layout("v_cache")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, P, H, D)`` of the keys."""
        blocks, page, heads, dim = self.k[0].shape
        return blocks, page, heads, dim


class PackedCache:
    """Pools whose blocks hold rows at arbitrary element offsets, such as bfloat16 packed for matrix instructions.

    Work on rows copies their blocks into plain ones, works there and writes them back. This moves more bytes than work
    in place.

    Args:
        pools: ``L`` tensors ``[B, E]``, one row of ``E`` elements per block, stride 1 along ``E``, of one dtype and
            device.
        k_offsets: int64 ``[P, H, D]``, the offset in a block's row of element ``d`` of the key of token ``t``, head
            ``h``.
        v_offsets: the same for values, ``[P, H, Dv]``.

    Raises:
        TypeError, ValueError: offsets outside the block, or the same offset twice.
    """

    def __init__(self, pools: Sequence[Tensor], k_offsets: Tensor, v_offsets: Tensor) -> None:
        self.pools = list(pools)
        check_alike("pools", self.pools)
        first = self.pools[0]
        if first.dim() != 2:
            raise ValueError(f"pools[0]: expected shape [B, E], got {list(first.shape)}")
        for layer, pool in enumerate(self.pools):
            check_unit_stride(f"pools[{layer}]", pool)
        for name, offsets in (("k_offsets", k_offsets), ("v_offsets", v_offsets)):
            if offsets.dtype != torch.int64:
                raise TypeError(f"{name}: expected dtype torch.int64, got {offsets.dtype}")
            if offsets.dim() != 3 or 0 in offsets.shape or offsets.shape[:2] != k_offsets.shape[:2]:
                raise ValueError(f"{name}: expected [P, H, D], one P and H for both, got {list(offsets.shape)}")
        flat = torch.cat([k_offsets.flatten(), v_offsets.flatten()])
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= first.shape[1]:
            raise ValueError(f"offsets: expected 0..{first.shape[1] - 1}, got {low}..{high}")
        if len(flat.unique()) != len(flat):
            raise ValueError("offsets: expected every element at an offset of its own, got one twice")
        self._offsets = flat.to(first.device)
        self._shapes = k_offsets.shape, v_offsets.shape

    def load(self, blocks: Tensor) -> PagedCache:
        """The blocks ``[n]`` of all layers as a plain cache of ``n`` blocks."""
        # One tensor for all layers, because a list would cost an upload of addresses.
        k, v = (self.pools[0].new_empty(len(self.pools), len(blocks), *shape) for shape in self._shapes)
        for pool, of_keys, of_values in zip(self.pools, k, v, strict=True):
            rows = pool.index_select(0, blocks).index_select(1, self._offsets)  # half the time of pool[blocks, offsets]
            for plain, part in zip((of_keys, of_values), rows.split(self._sizes, 1), strict=True):
                plain.copy_(part.view_as(plain))
        return PagedCache(k, v)

    def store(self, blocks: Tensor, cache: PagedCache) -> None:
        """Writes the plain blocks back."""
        assert cache.v is not None
        for pool, k, v in zip(self.pools, cache.k, cache.v, strict=True):
            pool[blocks[:, None], self._offsets] = torch.cat([k.flatten(1), v.flatten(1)], 1)

    @property
    def _sizes(self) -> list[int]:
        return [shape.numel() for shape in self._shapes]


def rows_of(pool: Tensor, blocks: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """The rows ``[1, H, n*P, D]`` of some blocks of one layer, times ``scale``, a float or ``[H]``. Those of an fp8
    cache are float32."""
    if pool.dtype in FP8_DTYPES:  # as bytes, because indexing is not implemented for every float8 type
        rows = pool.view(torch.uint8)[blocks].view(pool.dtype).float()
    else:
        rows = pool[blocks]
    rows = rows.flatten(0, 1).transpose(0, 1)[None]
    if isinstance(scale, Tensor):
        return rows * scale[:, None, None]
    return rows if scale == 1 else rows * scale


def per_layer(
    query: Queries | None,
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor] | None,
    query_rows: Tensor | None = None,
) -> tuple[Layers | None, PagedCache, bool]:
    """Arguments for one or many layers in a common form: queries, pool, and whether results have a leading ``L``.

    ``[B, P, H, D]`` caches with a ``[S, N, H*G, D]`` query are one layer. Sequences, or tensors with a leading
    ``L``, are many. With ``query_rows`` a layer's query is ``[R, H*G, D]`` and is returned as ``[1, R, H*G, D]``.
    """
    rows, scales = _parts(query)
    if not isinstance(k_cache, Layers):  # k_cache first, because it decides how the rest is read
        k_cache = k_cache if isinstance(k_cache, Tensor) and k_cache.dim() == 4 else Layers("k_cache", k_cache)
    many = isinstance(k_cache, Layers)
    if isinstance(k_cache, Tensor):
        if v_cache is not None and not isinstance(v_cache, Tensor):
            raise TypeError(f"v_cache: expected a tensor like k_cache, got {type(v_cache).__name__}")
        if rows is not None and not isinstance(rows, Tensor):
            raise TypeError(f"query: expected a tensor like k_cache, got {type(query).__name__}")
        k_cache, v_cache = k_cache[None], None if v_cache is None else v_cache[None]
    queries = _query_layers(rows, many, query_rows is not None)
    if queries is not None and scales is not None:
        queries.scales = _query_layers(scales, many, query_rows is not None, "query.scales")
    return queries, PagedCache.of(k_cache, v_cache), many


def _parts(query: Any) -> tuple[Tensor | Sequence[Tensor] | None, Tensor | Sequence[Tensor] | None]:
    """Queries as they are, or the codes and the scales ``[..., H*G, 1]`` of packed ones."""
    if isinstance(query, PackedQueries):
        return query.codes, query.scales[..., None]
    if isinstance(query, (list, tuple)) and query and all(isinstance(layer, PackedQueries) for layer in query):
        return [layer.codes for layer in query], [layer.scales[..., None] for layer in query]
    return query, None


def _query_layers(
    query: Tensor | Sequence[Tensor] | None, many: bool, by_row: bool, name: str = "query"
) -> Layers | None:
    """Queries as ``L`` tensors ``[S, N, H*G, D]``, or ``[1, R, H*G, D]`` if ``query_rows`` picks from them."""
    if query is None or isinstance(query, Layers):
        return query
    letters, lead = ("R, H*G, D", 3) if by_row else ("S, N, H*G, D", 4)
    with_rows = " with query_rows" if by_row else ""
    if isinstance(query, Tensor):
        if query.dim() != lead + many:
            raise ValueError(
                f"{name}: expected [{'L, ' if many else ''}{letters}]{with_rows} beside "
                f"{'many layers' if many else 'one layer'} of k_cache, got shape {list(query.shape)}"
            )
        query = query if many else query[None]
        return Layers(name, query[:, None] if by_row else query)
    if by_row and isinstance(query, Sequence):
        for layer, rows in enumerate(query):
            if isinstance(rows, Tensor) and rows.dim() != lead:
                raise ValueError(f"{name}[{layer}]: expected [{letters}]{with_rows}, got shape {list(rows.shape)}")
        query = [rows[None] if isinstance(rows, Tensor) else rows for rows in query]  # Layers reports non-tensors
    return Layers(name, query)


def _check_pools(k: Layers, v: Layers | None) -> None:
    for name, layers in (("k_cache", k), ("v_cache", v)):
        if layers is not None and layers[0].dim() != 4:
            raise ValueError(f"{name}: expected [B, P, H, D], got shape {tuple(layers[0].shape)}")
        if layers is not None and layers[0].element_size() not in WORDS:
            raise TypeError(f"{name}: expected a dtype of 1, 2, 4 or 8 bytes, got {layers[0].dtype}")
        if layers is not None and 0 in layers[0].shape:
            raise ValueError(f"{name}: expected no empty dimension, got shape {tuple(layers[0].shape)}")
    if v is not None:
        if len(v) != len(k):
            raise ValueError(f"v_cache: expected {len(k)} layers as in k_cache, got {len(v)}")
        if v[0].shape[:3] != k[0].shape[:3]:
            raise ValueError(
                f"v_cache: expected [B, P, H] = {tuple(k[0].shape[:3])} as in k_cache, got {tuple(v[0].shape[:3])}"
            )
        if v[0].device != k[0].device:
            raise ValueError(f"v_cache: expected device {k[0].device} as k_cache, got {v[0].device}")
    _check_overlap(k, v)


def _check_overlap(k: Layers, v: Layers | None) -> None:
    """Checks that no element is reachable twice, because a move through one view would corrupt the other."""
    halves = [("k_cache", k)] if v is None else [("k_cache", k), ("v_cache", v)]
    views = [view for _, layers in halves for view in layers.views()]
    names = [f"{half}[{i}]" if len(k) > 1 else half for half, layers in halves for i in range(len(layers))]
    for i, (name, view) in enumerate(zip(names, views, strict=True)):
        if reaches_twice(view.dims):
            tensor = halves[i // len(k)][1][i % len(k)]
            raise ValueError(
                f"{name}: expected every element at its own address, got shape {tuple(tensor.shape)} with strides "
                f"{tensor.stride()} that overlap"
            )
    if (met := first_meeting(views)) is not None:
        name, other = names[met[0]], names[met[1]]
        raise ValueError(f"{other}: expected memory of its own, got elements of {name}: overlapping caches")
