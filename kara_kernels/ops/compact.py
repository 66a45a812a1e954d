"""Moves the survivors of a window together, in place, through the block table. The tail follows.

Row ``window_start + r`` receives row ``window_start + keep_indices[r]``. Sources ascend and no destination comes after
its source. No later tile reads what a tile overwrites, so rows move in ascending order without a second buffer. Within
a tile a barrier separates loads from stores, because a warp may store a row that another has not loaded yet. Bytes are
moved and never recomputed, so any dtype works.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import Windows, check_compact_blocks
from ..checks import check_unit_stride
from ..reference.compact import compact_windows
from ._rows import PagedRows, pool_arguments, row_pointer
from ._triton import Launch, kernel, launch, layer_pointer, resolve_backend, tl, triton

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def _move_rows(rows, keep_list, length, keep, W: tl.constexpr, FORMAT: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Moves all rows of one head from the window's start to ``length``, in ascending order, ``BLOCK_R`` at a time."""
    P: tl.constexpr = FORMAT.page
    D: tl.constexpr = FORMAT.dim
    count = length - rows.start - W + keep  # rows after the move: survivors, then the tail
    for first in range(0, count, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        survivor = tl.load(keep_list + offs_r, mask=offs_r < keep, other=0)
        source = rows.start + tl.where(offs_r < keep, survivor, offs_r - keep + W)
        target = rows.start + offs_r
        moves = (offs_r < count) & (source != target)  # a row that stays in place costs nothing
        from_block = tl.load(rows.table + source // P, mask=moves, other=0)
        to_block = tl.load(rows.table + target // P, mask=moves, other=0)
        from_row = row_pointer(rows, from_block, source % P, FORMAT)
        to_row = row_pointer(rows, to_block, target % P, FORMAT)
        for slice_ in range(0, D, BLOCK_D):
            offs_d = slice_ + tl.arange(0, BLOCK_D)
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
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_RV: tl.constexpr,
):  # fmt: skip
    """Grid ``(S*H, caches, L)``: one program moves one head of one cache. A keep list of -1 skips its
    sequence."""
    seq = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens_ptr + seq)
    if starts_ptr is None:
        start = length - W
    else:
        start = tl.load(starts_ptr + seq)
    keep_list = keep_ptr + layer * stride_i_l + seq * stride_i_s + head * stride_i_h
    alive = tl.load(keep_list) >= 0
    if (head == 0) & (layer == 0) & (tl.program_id(1) == 0):
        tl.store(new_lens_ptr + seq, tl.where(alive, length - W + keep, length))
        if frontiers_ptr is not None:
            untouched = 0
            if protected_ptr is not None:
                untouched = tl.maximum(tl.load(protected_ptr + seq), 0)
            tl.store(frontiers_ptr + seq, tl.where(alive, start + keep, untouched))
    if alive:
        table = block_tables_ptr + seq * stride_t_s
        # Keys and values may have different types, so one variable cannot hold both.
        if tl.program_id(1) == 0:
            k_base = layer_pointer(k_ptr, k_table, stride_k_l, layer) + head * stride_k_h
            keys = PagedRows(k_base, table, start, stride_k_b, stride_k_p)
            _move_rows(keys, keep_list, length, keep, W, K, BLOCK_D, BLOCK_R)
        else:
            v_base = layer_pointer(v_ptr, v_table, stride_v_l, layer) + head * stride_v_h
            values = PagedRows(v_base, table, start, stride_v_b, stride_v_p)
            _move_rows(values, keep_list, length, keep, W, V, BLOCK_DV, BLOCK_RV)


# --------------------------------------------------------------------------------------------- how it is launched


def row_block(dim: int, itemsize: int) -> tuple[int, int]:
    """``(BLOCK_D, rows of a tile)``.

    Rows are moved in slices of up to 256 bytes. A slice is a power of two, and divides the row if one of at least 32
    bytes does, so that no lane idles for rows of 192 or 576 elements. A tile has 128 rows, one per thread. Block ids
    are then loaded once each and passed on through shared memory. With fewer rows than threads, every thread of a row
    loads its block ids itself, which requests 35 % more bytes at D = 128.
    """
    block_d = dim & -dim  # the largest power of two that divides it
    if block_d * itemsize < 32:
        block_d = triton.next_power_of_2(dim)
    return min(block_d, max(1, 256 // itemsize)), 128


def launch_compact(new_lens: Tensor, frontiers: Tensor | None, w: Windows, keep_indices: Tensor) -> Launch:
    """Move rows by ``keep_indices [L, S, H, K]`` (any strides, the last 1) and write ``new_lens [S]``.

    ``frontiers`` (int32 ``[S]``) receives the end of the kept rows of each sequence. It is ``start + K``, or for a
    skipped sequence its protected length, at least 0. Checks nothing.
    """
    layers, sequences, heads, keep = keep_indices.shape
    keys, values = w.cache.k, w.cache.v or w.cache.k
    block_d, block_r = row_block(keys[0].shape[3], keys[0].element_size())
    block_dv, block_rv = row_block(values[0].shape[3], values[0].element_size())
    stride_layer, stride_sequence, stride_head, _ = keep_indices.stride()
    return launch(
        compact_kernel, (sequences * heads, 1 if w.cache.v is None else 2, layers), new_lens.device,
        new_lens_ptr=new_lens, frontiers_ptr=frontiers, block_tables_ptr=w.block_tables, starts_ptr=w.window_starts,
        seq_lens_ptr=w.seq_lens, protected_ptr=w.protected_lens, keep_ptr=keep_indices, keep=keep,
        stride_t_s=w.block_tables.stride(0), stride_i_l=stride_layer, stride_i_s=stride_sequence,
        stride_i_h=stride_head, **pool_arguments("k", keys, decoded=False),
        **pool_arguments("v", values, decoded=False), H=heads, W=w.window, BLOCK_D=block_d, BLOCK_R=block_r,
        BLOCK_DV=block_dv, BLOCK_RV=block_rv, num_warps=4, enable_fp_fusion=True,
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
