"""Moves the survivors of a window together, in place, through the block table. See Compact in ``docs/method.md``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import CompactArguments, Windows, check_compact_blocks
from ..paged import WORDS

TILE_BYTES = 8 << 20  # rows copied at a time; bounds the extra memory for any tail, and fits in the CPU's cache


def compact_blocks(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor] | None,
    block_tables: Tensor,
    window_starts: Tensor,
    seq_lens: Tensor,
    keep_indices: Tensor,
    window: int,
) -> Tensor:
    """Keep ``keep_indices`` of each window and move the tail up after them. See
    :func:`kara_kernels.ops.compact_blocks`.

    ``keep_indices`` is int32 ``[S, H, K]`` (``[L, S, H, K]`` for ``L`` layers), window-relative and ascending, or all
    -1 for a skipped sequence. Returns the new lengths, int32 ``[S]``. Both caches are changed in place.
    """
    return compact_windows(
        check_compact_blocks(k_cache, v_cache, block_tables, window_starts, seq_lens, keep_indices, window)
    )


@torch.no_grad()
def compact_windows(a: CompactArguments) -> Tensor:
    """Moves rows by checked arguments. Returns the new lengths, int32 ``[S]``."""
    active = a.keep_indices[0, :, 0, 0] >= 0
    for s in active.nonzero().flatten().tolist():
        compact_sequence(a, s, int(a.window_starts[s]), int(a.seq_lens[s]), a.keep_indices[:, s])
    return torch.where(active, a.seq_lens - (a.window - a.keep_indices.shape[-1]), a.seq_lens)


def compact_sequence(w: Windows, s: int, start: int, length: int, keep: Tensor) -> None:
    """Moves the rows of sequence ``s`` in all layers by ``keep [L, H, K]``. Checks nothing."""
    for layer, keys in enumerate(w.cache.k):
        pools = (keys,) if w.cache.v is None else (keys, w.cache.v[layer])
        _move_rows(pools, w.block_tables[s], start, length, keep[layer], w.window)


def _move_rows(pools: Sequence[Tensor], blocks: Tensor, start: int, length: int, keep: Tensor, window: int) -> None:
    """Row ``start + r`` receives row ``start + keep[h, r]``, then the tail follows, a tile of rows at a time.

    Sources ascend and no destination comes after its source, so a tile never overwrites what a later tile reads.
    """
    words = [pool.view(WORDS[pool.element_size()]) for pool in pools]
    page, heads = words[0].shape[1:3]
    kept, new_length = keep.shape[-1], length - start - window + keep.shape[-1]
    head = torch.arange(heads, device=blocks.device)[:, None]
    tile = max(1, TILE_BYTES // max(heads * pool.shape[3] * pool.element_size() for pool in pools))
    for first in range(0, new_length, tile):
        place = torch.arange(first, min(first + tile, new_length), device=blocks.device)
        survivors = keep[:, first : first + len(place)]  # [H, r], empty in tiles of the tail
        tail = (place[survivors.shape[1] :] + (window - kept)).expand(heads, -1)
        source, target = start + torch.cat((survivors, tail), dim=1), start + place
        taken = blocks[source // page].long(), source % page, head
        given = blocks[target // page].long(), target % page, head
        for pool in words:
            pool[given] = pool[taken]
