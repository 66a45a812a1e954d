"""What a paged KV cache is to this library: views, layers, base addresses, and the checks on them.

Shapes use the letters of the README: ``L`` layers, ``S`` sequences, ``H`` KV heads, ``G`` query heads per KV
head, ``W`` window, ``K`` kept of it, ``N`` queries, ``D``/``Dv`` head dimensions, ``B`` blocks of ``P`` tokens.

Physical token ``t`` of sequence ``s`` lives in block ``block_tables[s, t // P]``, row ``t % P``.

Every check raises before anything is written. What only the *contents* of a tensor can tell (block ids, lengths)
is checked where reading them is free, on the CPU; on a GPU it would stall the stream, so there it is the caller's
promise unless ``KARA_KERNELS_DEBUG=1``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

REDUCTIONS = ("mean", "rms")
MAX_WINDOW = 4096  # the selection kernel holds a whole row in registers; 4096 is what fits without spills
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
SCORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what rows of an element size are moved as


class Layers(Sequence[Tensor]):
    """``L`` tensors of one shape, stride, dtype and device, one per layer, that a single launch can reach.

    A kernel finds a layer through ``table``, an int64 tensor of base addresses on the device. It is built on
    first use and kept, so an engine makes this object once per cache and not per call: building it on a GPU is a
    small upload, which a CUDA graph cannot capture. Layers cut from one stacked tensor need no table.
    """

    def __init__(self, name: str, tensors: Tensor | Sequence[Tensor]):
        if not isinstance(tensors, (Tensor, Sequence)):
            raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(tensors).__name__}")
        if isinstance(tensors, Tensor) and tensors.dim() != 5:
            raise ValueError(f"{name}: expected 4 dimensions, or 5 with a leading L, got shape {list(tensors.shape)}")
        self.stacked = tensors if isinstance(tensors, Tensor) else None
        self._listed = () if isinstance(tensors, Tensor) else tuple(tensors)
        self._table: Tensor | None = None
        self._kernels_can_read = False
        self.pool: PagedCache | None = None  # the pool this was checked with
        if not len(self):
            raise ValueError(f"{name}: expected at least one layer, got an empty sequence")
        # Layers of a stacked tensor are cut when they are asked for: 36 views take longer than a launch.
        self._first = first = self._listed[0] if self.stacked is None else self.stacked[0]
        for layer, tensor in enumerate(self._listed):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{layer}]: expected a tensor, got {type(tensor).__name__}")
            for what in ("shape", "dtype", "device"):
                if getattr(tensor, what) != getattr(first, what):
                    raise ValueError(
                        f"{name}[{layer}]: expected {what} {getattr(first, what)} as in {name}[0], "
                        f"got {getattr(tensor, what)}"
                    )

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
        """int64 ``[L]`` base addresses, or None where ``stride_layer`` from the first layer does."""
        if self.stacked is None and len(self.tensors) > 1 and self._table is None:
            addresses = [tensor.data_ptr() for tensor in self.tensors]
            self._table = torch.tensor(addresses, dtype=torch.int64, device=self.tensors[0].device)
        return self._table

    @functools.cached_property
    def alignment(self) -> int:
        """Bytes, up to 16, that every layer's base address is a multiple of: it decides how wide loads may be."""
        bits = 16 | self._first.data_ptr()
        if len(self) > 1:
            bits |= self.stride_layer * self._first.element_size()
        for tensor in self._listed:
            bits |= tensor.data_ptr()
        return bits & -bits

    @property
    def stride_layer(self) -> int:
        return 0 if self.stacked is None else self.stacked.stride(0)

    def require_kernel_layout(self, name: str) -> None:
        """Kernels read rows of ``D`` contiguous elements and one set of strides for all layers."""
        if self._kernels_can_read:  # a pool's answer does not change, and asking 36 tensors takes longer than a launch
            return
        first = self._first
        check_unit_stride(name, first)
        for layer, tensor in enumerate(self._listed):
            if tensor.stride() != first.stride():
                raise ValueError(
                    f"{name}[{layer}]: expected strides {first.stride()} as in {name}[0], got {tensor.stride()}"
                )
        self._kernels_can_read = True


class PagedCache:
    """The block pools of all layers, checked and addressed once, for many calls.

    ``k_caches``: ``L`` tensors ``[B, P, H, D]`` (or one ``[L, B, P, H, D]``), ``v_caches``: the same with ``Dv``, or
    None where one latent tensor holds both (MLA). Any strides: an HND pool is passed as a permuted view. Pass
    ``cache.k`` and ``cache.v`` where an operation takes ``k_cache`` and ``v_cache``. The tensors must keep their
    storage while this object is used.
    """

    def __init__(self, k_caches: Tensor | Sequence[Tensor], v_caches: Tensor | Sequence[Tensor] | None = None):
        self.k = k_caches if isinstance(k_caches, Layers) else Layers("k_cache", k_caches)
        self.v: Layers | None = None
        if v_caches is not None:
            self.v = v_caches if isinstance(v_caches, Layers) else Layers("v_cache", v_caches)
        _check_pools(self.k, self.v)
        # Each half names its pool, so that a pair that was checked together is recognised without a new check.
        self.k.pool = self
        if self.v is not None:
            self.v.pool = self

    @staticmethod
    def of(k_cache: Tensor | Sequence[Tensor], v_cache: Tensor | Sequence[Tensor] | None) -> PagedCache:
        """The pool that both arguments belong to, or a new one (checked now) around them."""
        if isinstance(k_cache, Layers) and k_cache.pool is not None and k_cache.pool.v is v_cache:
            return k_cache.pool
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


def per_layer(
    query: Tensor | Sequence[Tensor] | None,
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor] | None,
) -> tuple[Layers | None, PagedCache, bool]:
    """The arguments of one or of many layers in one form: queries, pool, and whether results carry a leading L.

    ``[B, P, H, D]`` caches with a ``[S, N, H*G, D]`` query are one layer. Sequences, or tensors with a leading
    ``L``, are many.
    """
    if not isinstance(k_cache, Layers):  # first what decides how the rest is read
        k_cache = k_cache if isinstance(k_cache, Tensor) and k_cache.dim() == 4 else Layers("k_cache", k_cache)
    many = isinstance(k_cache, Layers)
    if isinstance(k_cache, Tensor):
        if isinstance(query, Tensor) and query.dim() != 4:
            raise ValueError(
                f"query: expected [S, N, H*G, D] beside one layer's k_cache, got shape {list(query.shape)}"
            )
        if v_cache is not None and not isinstance(v_cache, Tensor):
            raise TypeError(f"v_cache: expected a tensor as k_cache is one, got {type(v_cache).__name__}")
        if query is not None and not isinstance(query, Tensor):
            raise TypeError(f"query: expected a tensor as k_cache is one, got {type(query).__name__}")
        query = None if query is None else query[None]
        k_cache, v_cache = k_cache[None], None if v_cache is None else v_cache[None]
    queries = query if query is None or isinstance(query, Layers) else Layers("query", query)
    return queries, PagedCache.of(k_cache, v_cache), many


def slices(total: int, size: int) -> Iterator[slice]:
    """``0..total`` in pieces of ``size``: how the PyTorch path bounds its memory."""
    return (slice(i, min(i + size, total)) for i in range(0, total, size))


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
    """No element may be reachable twice: an in-place move through one name would destroy the other."""
    views = [(f"k_cache[{i}]" if len(k) > 1 else "k_cache", t) for i, t in enumerate(k)]
    if v is not None:
        views += [(f"v_cache[{i}]" if len(k) > 1 else "v_cache", t) for i, t in enumerate(v)]
    for name, tensor in views:
        if _reaches_twice(tensor):
            raise ValueError(
                f"{name}: expected every element at its own address, got shape {tuple(tensor.shape)} with strides "
                f"{tensor.stride()} that overlap"
            )
    views.sort(key=lambda view: view[1].data_ptr())
    for i, (name, tensor) in enumerate(views):
        end = tensor.data_ptr() + _span(tensor)
        for other_name, other in views[i + 1 :]:
            if other.data_ptr() >= end:
                break
            if _share_elements(tensor, other):
                raise ValueError(
                    f"{other_name}: expected memory of its own, got elements of {name}: overlapping caches"
                )


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the end of the last element."""
    extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (extent + 1) * tensor.element_size()


def _reaches_twice(tensor: Tensor) -> bool:
    reach = 0
    for stride, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (n - 1) * stride
    return False


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two strided views meet anywhere, exactly: sum(stride * step) == distance has a solution in bytes.

    Pools of one allocation often interleave (keys and values of a block side by side), so address ranges alone
    would refuse good caches. Largest stride first leaves two or three candidates per dimension.
    """
    distance = b.data_ptr() - a.data_ptr()
    steps: list[tuple[int, int, int]] = [(1, 1 - b.element_size(), a.element_size() - 1)]
    for tensor, sign in ((a, 1), (b, -1)):
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            low, high = sorted((0, sign * (n - 1)))
            steps.append((stride * tensor.element_size(), low, high))
    steps.sort()

    def solvable(remaining: int, i: int) -> bool:
        if i < 0:
            return remaining == 0
        stride, low, high = steps[i]
        below = [(s * lo, s * hi) for s, lo, hi in steps[:i]]
        reach_low, reach_high = sum(lo for lo, _ in below), sum(hi for _, hi in below)
        first = max(low, -((reach_high - remaining) // stride))
        last = min(high, (remaining - reach_low) // stride)
        return any(solvable(remaining - stride * step, i - 1) for step in range(first, last + 1))

    return solvable(distance, len(steps) - 1)


# ------------------------------------------------------------------------------------------- argument checks


def check_count(name: str, value: object, low: int, high: int) -> int:
    """An int (no bool) in ``low..high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low}..{high}, got {value}")
    return value


def check_window(window: int) -> int:
    return check_count("window", window, 1, MAX_WINDOW)


def check_number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:  # also false for NaN
        raise ValueError(f"{name}: expected {low}..{high}, got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_tensor(
    name: str, value: object, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device
) -> Tensor:
    """A tensor of this shape (None: any extent), one of these dtypes, on this device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.dim() != len(shape) or any(want not in (None, n) for want, n in zip(shape, value.shape, strict=True)):
        want_text = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{want_text}], got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return value


def check_unit_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got {tensor.stride(-1)}")


def check_block_tables(block_tables: object, device: torch.device, sequences: int | None = None) -> Tensor:
    table = check_tensor("block_tables", block_tables, (sequences, None), (torch.int32,), device)
    if table.stride(1) != 1 and table.shape[1] > 1:
        raise ValueError(f"block_tables: expected stride 1 along blocks, got {table.stride(1)}")
    return table


def check_lengths(name: str, value: object, sequences: int, device: torch.device) -> Tensor:
    """int32 ``[S]``, contiguous."""
    lengths = check_tensor(name, value, (sequences,), (torch.int32,), device)
    if lengths.stride(0) != 1 and sequences > 1:
        raise ValueError(f"{name}: expected stride 1, got {lengths.stride(0)}")
    return lengths


def check_scores(scores: object) -> Tensor:
    """float32 ``[..., W]`` with ``1 <= W <= MAX_WINDOW``."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: expected a tensor, got {type(scores).__name__}")
    if scores.dtype != torch.float32:
        raise TypeError(f"scores: expected dtype torch.float32, got {scores.dtype}")
    if scores.dim() == 0 or not 1 <= scores.shape[-1] <= MAX_WINDOW:
        raise ValueError(f"scores: expected [..., W] with W in 1..{MAX_WINDOW}, got shape {list(scores.shape)}")
    return scores


def require_rows(name: str, scores: Tensor) -> Tensor:
    """``scores [..., W]`` as a view ``[rows, W]`` with its last dimension at stride 1."""
    try:
        rows = scores.view(-1, scores.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or (rows.stride(1) != 1 and rows.shape[1] > 1):
        raise ValueError(
            f"{name}: expected rows at one stride and the last dimension at stride 1, got shape "
            f"{list(scores.shape)} with strides {scores.stride()}"
        )
    return rows


def check_chunks(window: int, keep: int, chunk_budget: int, max_chunk: int) -> None:
    check_count("keep", keep, 1, window)
    check_count("chunk_budget", chunk_budget, 0, keep - 1)
    check_count("max_chunk", max_chunk, 1, 2**31 - 1)


def check_keep_indices(keep_indices: object, cache: PagedCache, sequences: int, window: int, many: bool) -> Tensor:
    """int32 ``[S, H, K]``, or ``[L, S, H, K]`` for many layers, as ``[L, S, H, K]``."""
    layers, heads = len(cache.k), cache.shape[2]
    shape = (layers, sequences, heads, None) if many else (sequences, heads, None)
    keep = check_tensor("keep_indices", keep_indices, shape, (torch.int32,), cache.k[0].device)
    if not 1 <= keep.shape[-1] <= window:
        raise ValueError(f"keep_indices: expected 1..{window} indices per row, got {keep.shape[-1]}")
    keep = keep if many else keep[None]
    if contents_are_checked(keep.device):
        ascending = (keep[..., 1:] > keep[..., :-1]).all(-1) & (keep[..., 0] >= 0) & (keep[..., -1] < window)
        left_alone = (keep == -1).all(-1)
        bad = ~(ascending | left_alone) | (left_alone != left_alone[:1, :, :1])
        if bool(bad.any()):
            row = bad.nonzero()[0].tolist()
            raise ValueError(
                f"keep_indices{row}: expected ascending indices in 0..{window - 1}, or -1 throughout a sequence, "
                f"got {keep[tuple(row)].tolist()[:8]}"
            )
    return keep


def check_scoring(queries: int, window: int, scale: object, attention: str, reduction: str, redundancy: object) -> None:
    check_choice("attention", attention, ("bidirectional", "causal"))
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("redundancy", redundancy, 0.0, 3.4e38)
    if scale is not None:
        check_number("scale", scale, -3.4e38, 3.4e38)
    if attention == "causal" and queries > window:
        raise ValueError(
            f"query: expected at most {window} queries with attention='causal' (query i is window token W - N + i), "
            f"got {queries}"
        )


def check_query(query: Layers | None, cache: PagedCache, sequences: int) -> Layers:
    """``L`` tensors ``[S, N, H*G, D]`` of a dtype that can be scored, matching the pool."""
    _, _, heads, dim = cache.shape
    if query is None:
        raise TypeError("query: expected a tensor or one per layer, got None (only given scores replace it)")
    first = query[0]
    if len(query) != len(cache.k):
        raise ValueError(f"query: expected {len(cache.k)} layers as in k_cache, got {len(query)}")
    check_tensor("query", first, (sequences, None, None, dim), SCORED_DTYPES, cache.k[0].device)
    if first.shape[1] < 1:
        raise ValueError(f"query: expected at least one query per sequence, got shape {list(first.shape)}")
    if first.shape[2] < heads or first.shape[2] % heads:
        raise ValueError(f"query: expected a multiple of {heads} KV heads in dimension H*G, got {first.shape[2]}")
    if cache.k[0].dtype not in SCORED_DTYPES + FP8_DTYPES:
        raise TypeError(
            f"k_cache: expected a dtype that can be scored (float16, bfloat16, float32 or float8), got "
            f"{cache.k[0].dtype}; view fp8 bytes as their float8 dtype, or pass scores="
        )
    return query


def key_scales(k_scale: float | Tensor | None, layers: int, heads: int, device: torch.device) -> float | Tensor:
    """``k_scale`` as a float, or as a float view ``[L, H]``; one dimension means layers, or heads of one layer."""
    if k_scale is None:
        return 1.0
    if not isinstance(k_scale, Tensor):
        return check_number("k_scale", k_scale, -3.4e38, 3.4e38)
    if not k_scale.is_floating_point():
        raise TypeError(f"k_scale: expected a floating point tensor, got {k_scale.dtype}")
    if k_scale.device != device:
        raise ValueError(f"k_scale: expected device {device}, got {k_scale.device}")
    shaped = k_scale.reshape(1, 1) if k_scale.numel() == 1 else k_scale
    if shaped.dim() == 1:
        shaped = shaped[:, None] if layers > 1 else shaped[None, :]
    try:
        return shaped.expand(layers, heads)
    except RuntimeError:
        raise ValueError(
            f"k_scale: expected one element, [{layers}] per layer or [{layers}, {heads}] per layer and KV head, "
            f"got shape {list(k_scale.shape)}"
        ) from None


# ------------------------------------------------------------- all arguments of an operation, for either backend


def check_values(cache: PagedCache) -> None:
    """Values whose length can be taken, if there are any."""
    if cache.v is not None and cache.v[0].dtype not in SCORED_DTYPES + FP8_DTYPES:
        raise TypeError(
            f"v_cache: expected float16, bfloat16, float32 or float8 to take lengths of, got {cache.v[0].dtype}"
        )


def check_score_window(
    query: Layers | None, cache: PagedCache, block_tables: object, window_starts: object, window: int,
    scale: float | None, k_scale: float | Tensor | None, attention: str, reduction: str, redundancy: float,
) -> tuple[Layers, Tensor, Tensor, float | Tensor]:  # fmt: skip
    """Arguments of ``score_window`` as (queries, block tables, starts, key scales)."""
    check_window(window)
    device, (_, _, heads, _) = cache.k[0].device, cache.shape
    table = check_block_tables(block_tables, device)
    starts = check_lengths("window_starts", window_starts, table.shape[0], device)
    queries = check_query(query, cache, table.shape[0])
    check_scoring(queries[0].shape[1], window, scale, attention, reduction, redundancy)
    check_values(cache)
    scales = key_scales(k_scale, len(cache.k), heads, device)
    if contents_are_checked(device):
        everywhere = torch.ones_like(starts, dtype=torch.bool)
        check_contents(cache, table, starts, starts.long() + window, everywhere, written=False)
    return queries, table, starts, scales


def check_compact_blocks(
    cache: PagedCache, block_tables: object, window_starts: object, seq_lens: object, keep_indices: object,
    window: int, many: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments of ``compact_blocks`` as (block tables, starts, lengths, keep indices ``[L, S, H, K]``)."""
    check_window(window)
    device = cache.k[0].device
    table = check_block_tables(block_tables, device)
    starts = check_lengths("window_starts", window_starts, table.shape[0], device)
    lengths = check_lengths("seq_lens", seq_lens, table.shape[0], device)
    keep = check_keep_indices(keep_indices, cache, table.shape[0], window, many)
    if contents_are_checked(device):
        check_contents(cache, table, starts, lengths, keep[0, :, 0, 0] >= 0, lengths, window)
    return table, starts, lengths, keep


# ------------------------------------------------------------------------------------------- content checks


def contents_are_checked(device: torch.device) -> bool:
    """On the CPU always; elsewhere it costs a stream synchronisation and is asked for by KARA_KERNELS_DEBUG=1."""
    return device.type == "cpu" or os.environ.get("KARA_KERNELS_DEBUG", "0") == "1"


def check_contents(
    cache: PagedCache,
    block_tables: Tensor,
    starts: Tensor,
    ends: Tensor,
    active: Tensor,
    seq_lens: Tensor | None = None,
    window: int = 0,
    written: bool = True,
) -> None:
    """Block ids and lengths that tokens ``starts..ends`` of the ``active`` sequences would be reached through.

    ``starts``, ``ends``, ``seq_lens`` int32 ``[S]``, ``active`` bool ``[S]``. From a start on, ``window`` tokens must
    lie before the end. With ``written`` no block may be used by two sequences: only blocks that a sequence owns alone
    may be rewritten. Only called where reading contents is free or asked for.
    """
    blocks, page, _, _ = cache.shape
    capacity = block_tables.shape[1] * page
    for name, values, rows in (("seq_lens", seq_lens, None), ("window_starts + window", ends, active)):
        if values is None:
            continue
        beyond = values > capacity if rows is None else (values > capacity) & rows
        if bool(beyond.any()):
            s = int(beyond.nonzero()[0])
            raise ValueError(
                f"{name}[{s}]: expected at most {capacity} (the block table's capacity), got {int(values[s])}"
            )
    negative = (starts < 0) & active
    if bool(negative.any()):
        s = int(negative.nonzero()[0])
        raise ValueError(f"window_starts[{s}]: expected 0 or more, got {int(starts[s])}")
    late = (starts > ends - window) & active
    if bool(late.any()):
        s = int(late.nonzero()[0])
        raise ValueError(
            f"window_starts[{s}]: expected at most {int(ends[s]) - window}, a window of {window} before the "
            f"sequence's end, got {int(starts[s])}"
        )
    column = torch.arange(block_tables.shape[1], device=block_tables.device)
    used = active[:, None] & (column >= (starts // page)[:, None]) & (column <= ((ends - 1) // page)[:, None])
    bad = used & ((block_tables < 0) | (block_tables >= blocks))
    if bool(bad.any()):
        s, b = bad.nonzero()[0].tolist()
        raise ValueError(
            f"block_tables[{s}, {b}]: expected a block id in 0..{blocks - 1}, got {int(block_tables[s, b])}"
        )
    if written:
        ids, counts = block_tables[used].unique(return_counts=True)
        if bool((counts > 1).any()):
            block = int(ids[counts > 1][0])
            raise ValueError(
                f"block_tables: expected blocks that one sequence owns alone from its window on, "
                f"got block {block} twice"
            )
