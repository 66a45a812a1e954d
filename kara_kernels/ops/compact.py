"""Moves the survivors of a window together, in place, through the block table. The tail follows.

Row ``window_start + r`` receives row ``window_start + keep_indices[r]``. Sources ascend and no destination comes after
its source. No later tile reads what a tile overwrites, so rows move in ascending order without a second buffer. Within
a tile a barrier separates loads from stores, because a warp may store a row that another has not loaded yet. Bytes are
moved and never recomputed, so any dtype works.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import Windows, check_compact_blocks
from ..checks import check_unit_stride
from ..reference.compact import compact_windows
from ._rows import PagedRows, pool_arguments, row_pointer
from ._triton import Launch, dependent, kernel, launch, layer_pointer, resolve_backend, tl, triton

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def _rows_of_tile(rows, keep_list, offs_r, count, keep, W: tl.constexpr, P: tl.constexpr):
    """Where rows ``offs_r`` after the move come from, and the blocks of both places."""
    survivor = tl.load(keep_list + offs_r, mask=offs_r < keep, other=0)
    source = rows.start + tl.where(offs_r < keep, survivor, offs_r - keep + W)
    target = rows.start + offs_r
    moves = (offs_r < count) & (source != target)
    from_block = tl.load(rows.table + source // P, mask=moves, other=0)
    to_block = tl.load(rows.table + target // P, mask=moves, other=0)
    return source, from_block, to_block


@triton.jit
def _move_rows(rows, keep_list, length, keep, part, W: tl.constexpr, FORMAT: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Moves all rows of one head from the window's start to ``length``, in ascending order, ``BLOCK_R`` at a time.

    With several ``PARTS`` it moves slice ``part`` of every row. The next tile's block ids are on their way while a tile
    moves, so a tile waits for memory once.
    """
    P: tl.constexpr = FORMAT.page
    D: tl.constexpr = FORMAT.dim
    SPAN: tl.constexpr = D if PARTS == 1 else BLOCK_D
    count = length - rows.start - W + keep  # rows after the move: survivors, then the tail
    source, from_block, to_block = _rows_of_tile(rows, keep_list, tl.arange(0, BLOCK_R), count, keep, W, P)
    for first in range(0, count, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        target = rows.start + offs_r
        moves = (offs_r < count) & (source != target)  # a row that stays in place costs nothing
        from_row = row_pointer(rows, from_block, source % P, FORMAT)
        to_row = row_pointer(rows, to_block, target % P, FORMAT)
        source, from_block, to_block = _rows_of_tile(rows, keep_list, offs_r + BLOCK_R, count, keep, W, P)
        for slice_ in range(0, SPAN, BLOCK_D):
            offs_d = part * BLOCK_D + slice_ + tl.arange(0, BLOCK_D)
            mask = moves[:, None] & (offs_d < D)[None, :]
            words = tl.load(from_row[:, None] + offs_d[None, :], mask=mask)
            tl.debug_barrier()  # all warps have loaded their rows before any is overwritten
            tl.store(to_row[:, None] + offs_d[None, :], words, mask=mask)


@kernel
def compact_kernel(
    new_lens_ptr, frontiers_ptr, k_ptr, k_table, v_ptr, v_table, block_tables_ptr, starts_ptr, seq_lens_ptr,
    protected_ptr, keep_ptr, keep,
    stride_k_l: tl.int64, stride_k_b: tl.int64, stride_k_p: tl.int64, stride_k_h: tl.int64,
    stride_v_l: tl.int64, stride_v_b: tl.int64, stride_v_p: tl.int64, stride_v_h: tl.int64,
    stride_t_s: tl.int64,
    stride_i_l: tl.int64, stride_i_s: tl.int64, stride_i_h: tl.int64,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
    FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Grid ``(S*H, parts, L)``: one program moves one head of one cache, or a part of each of its rows. Keys have
    the first parts. A keep list of -1 skips its sequence."""
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
    seq = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    part = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens_ptr + seq)
    if starts_ptr is None:
        start = length - W
    else:
        start = tl.load(starts_ptr + seq)
    keep_list = keep_ptr + layer * stride_i_l + seq * stride_i_s + head * stride_i_h
    alive = tl.load(keep_list) >= 0
    if (head == 0) & (layer == 0) & (part == 0):
        tl.store(new_lens_ptr + seq, tl.where(alive, length - W + keep, length))
        if frontiers_ptr is not None:
            untouched = 0
            if protected_ptr is not None:
                untouched = tl.maximum(tl.load(protected_ptr + seq), 0)
            tl.store(frontiers_ptr + seq, tl.where(alive, start + keep, untouched))
    if alive:
        table = block_tables_ptr + seq * stride_t_s
        # Keys and values may have different types, so one variable cannot hold both.
        if part < K_TILE.parts:
            k_base = layer_pointer(k_ptr, k_table, stride_k_l, layer) + head * stride_k_h
            keys = PagedRows(k_base, table, start, stride_k_b, stride_k_p)
            _move_rows(keys, keep_list, length, keep, part, W, K, K_TILE.dims, K_TILE.rows, K_TILE.parts)
        else:
            v_base = layer_pointer(v_ptr, v_table, stride_v_l, layer) + head * stride_v_h
            values = PagedRows(v_base, table, start, stride_v_b, stride_v_p)
            part -= K_TILE.parts
            _move_rows(values, keep_list, length, keep, part, W, V, V_TILE.dims, V_TILE.rows, V_TILE.parts)


# --------------------------------------------------------------------------------------------- how it is launched


@dataclass(frozen=True)
class MoveTile:
    """What a program moves at once: ``rows`` rows of ``dims`` elements. ``parts`` programs share a row; 1: none do."""

    dims: int
    rows: int
    parts: int = 1


TILE_BYTES = 32768
FEW = 128  # programs of a sequence. 128 tiles are what an H200 moves in 0.9 us, about the latency of its memory


def row_slice(dim: int, itemsize: int, most: int = 256) -> int:
    """Elements of a slice of up to ``most`` bytes.

    A slice is a power of two, and divides the row if one of at least 32 bytes does, so that no lane idles for rows of
    192 or 576 elements.
    """
    block_d = dim & -dim  # the largest power of two that divides it
    if block_d * itemsize < 32:
        block_d = triton.next_power_of_2(dim)
    return min(block_d, max(1, most // itemsize))


def move_tile(dim: int, itemsize: int, programs: int) -> MoveTile:
    """The tile of rows of ``dim`` elements, if a sequence has ``programs`` heads of all caches and layers.

    A tile has 32 KB, so that each of 128 threads has 256 bytes on their way. Usually it is 128 rows, one per thread, of
    up to 256 bytes. Block ids are then loaded once each and passed on through shared memory. With fewer rows than
    threads, every thread of a row loads its block ids itself, which requests 35 % more bytes at D = 128.

    A single sequence with few heads would leave most of a GPU idle and wait for one tile after another. Several
    programs then share a row. A slice has an eighth of it, but at least 64 bytes, which DRAM reads at once. Each
    program loads the block ids, up to 7 % of the bytes, once more. ``programs`` does not depend on the batch.
    """
    if programs >= FEW:
        return MoveTile(row_slice(dim, itemsize), 128)
    eighth = 1 << (max(64, dim * itemsize // 8).bit_length() - 1)
    dims = row_slice(dim, itemsize, min(256, eighth))
    return MoveTile(dims, TILE_BYTES // max(64, dims * itemsize), -(-dim // dims))


def launch_compact(
    new_lens: Tensor, frontiers: Tensor | None, w: Windows, keep_indices: Tensor, follows: bool = False
) -> Launch:
    """Move rows by ``keep_indices [L, S, H, K]`` (any strides, the last 1) and write ``new_lens [S]``.

    ``frontiers`` (int32 ``[S]``) receives the end of the kept rows of each sequence. It is ``start + K``, or for a
    skipped sequence its protected length, at least 0. ``follows``: it may overlap with the kernel before. Checks
    nothing.
    """
    layers, sequences, heads, keep = keep_indices.shape
    keys, values = w.cache.k, w.cache.v or w.cache.k
    caches = 1 if w.cache.v is None else 2
    k_tile, v_tile = (
        move_tile(half[0].shape[3], half[0].element_size(), layers * heads * caches) for half in (keys, values)
    )
    stride_layer, stride_sequence, stride_head, _ = keep_indices.stride()
    parts = k_tile.parts + (v_tile.parts if caches == 2 else 0)
    return launch(
        compact_kernel, (sequences * heads, parts, layers), new_lens.device,
        new_lens_ptr=new_lens, frontiers_ptr=frontiers, block_tables_ptr=w.block_tables, starts_ptr=w.window_starts,
        seq_lens_ptr=w.seq_lens, protected_ptr=w.protected_lens, keep_ptr=keep_indices, keep=keep,
        stride_t_s=w.block_tables.stride(0), stride_i_l=stride_layer, stride_i_s=stride_sequence,
        stride_i_h=stride_head, **pool_arguments("k", keys, decoded=False),
        **pool_arguments("v", values, decoded=False), H=heads, W=w.window, K_TILE=k_tile, V_TILE=v_tile,
        **dependent(follows), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ public


def compact_blocks(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor] | None,
    block_tables: Tensor,
    window_starts: Tensor,
    seq_lens: Tensor,
    keep_indices: Tensor,
    window: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Keep ``keep_indices`` of every window and move the tail up after them, in place, for every layer and head.

    Args:
        k_cache: ``[B, P, H, D]`` of any dtype of 1, 2, 4 or 8 bytes and any strides (the last 1 on the Triton path), or
            ``L`` such tensors, or a :class:`~kara_kernels.PagedCache` half.
        v_cache: the same with ``Dv``, or None for caches with one latent tensor (MLA).
        block_tables: int32 ``[S, max_blocks]``; may be a narrowed view.
        window_starts: int32 ``[S]``, physical index of the first window token.
        seq_lens: int32 ``[S]``, physical lengths.
        keep_indices: int32 ``[S, H, K]``, for many layers ``[L, S, H, K]``: positions relative to the window,
            ascending. All -1 skips a sequence, and its window start is not read.
        window: window length ``W`` in tokens.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        int32 ``[S]``: ``seq_lens - W + K``, unchanged for a skipped sequence. Rows after the new length, other
        sequences' blocks and everything before the window keep their bits.

    Raises:
        TypeError, ValueError: before anything is written. Contents (block ids, lengths, order of ``keep_indices``,
            blocks that two sequences share from their windows on) are checked on the CPU and with
            ``KARA_KERNELS_DEBUG=1`` only.
    """
    given = check_compact_blocks(k_cache, v_cache, block_tables, window_starts, seq_lens, keep_indices, window)
    if resolve_backend(backend, given.seq_lens.device) == "torch":
        return compact_windows(given)
    given.cache.require_kernel_layout()
    check_unit_stride("keep_indices", given.keep_indices)
    new_lens = torch.empty_like(given.seq_lens)
    if new_lens.numel():
        launch_compact(new_lens, None, given, given.keep_indices)
    return new_lens
