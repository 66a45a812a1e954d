"""The pools of all layers, and the blocks of each sequence of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kara_kernels import PagedCache


class Allocator:
    """Tracks free blocks. An id means the same block in every layer. The lowest ids are handed out first and sequences
    return their last blocks, so a single sequence always holds blocks 0, 1, 2, ..."""

    def __init__(self, size: int | None) -> None:
        self.growable = size is None
        self.size = size or 0
        self.free = list(range(self.size - 1, -1, -1))
        self.peak = 0

    @property
    def in_use(self) -> int:
        return self.size - len(self.free)

    def take(self, count: int) -> list[int]:
        """``count`` block ids. A growing pool at least doubles when it is full, a fixed one raises RuntimeError."""
        short = count - len(self.free)
        if short > 0:
            if not self.growable:
                raise RuntimeError(
                    f"KaraCache is out of blocks: num_blocks={self.size}, {self.in_use} in use, {count} more "
                    f"needed; give num_blocks >= {self.in_use + count} or a smaller batch"
                )
            grown = self.size + max(self.size, short)
            self.free = list(range(grown - 1, self.size - 1, -1)) + self.free
            self.size = grown
        taken = [self.free.pop() for _ in range(count)]
        self.peak = max(self.peak, self.in_use)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        self.free = sorted([*self.free, *blocks], reverse=True)


class Blocks:
    """Keys and values of a batch, in blocks of ``page`` rows. Memory stays allocated when sequences leave.

    Args:
        page: rows in a block.
        num_blocks: size of the pools. With None they grow.
    """

    def __init__(self, page: int, num_blocks: int | None) -> None:
        self.page = page
        self.allocator = Allocator(num_blocks)
        self.k: list[Tensor] = []  # [H, B, P, D] per layer, so that attention reads a head's rows contiguously
        self.v: list[Tensor] = []
        self.tables: list[list[int]] = []  # block ids of each sequence
        self._paged: PagedCache | None = None
        self._table: Tensor | None = None  # the tables on the device, [S, nb] int64
        self._chosen: slice | Tensor = slice(0)  # the same, as one index into the pools

    def begin(self, sequences: int) -> None:
        """Starts empty sequences. Earlier ones return their blocks."""
        self.allocator.give_back([block for table in self.tables for block in table])
        self.allocator.peak = 0
        self.tables = [[] for _ in range(sequences)]
        self._table, self._chosen = None, slice(0)

    def reserve(self, lengths: Sequence[int], device: torch.device) -> Tensor | None:
        """Allocates blocks for ``lengths`` rows per sequence. Returns the ids of new blocks, None if there are none."""
        missing = [max(0, -(-rows // self.page) - len(table)) for rows, table in zip(lengths, self.tables, strict=True)]
        fresh = self.allocator.take(sum(missing))
        if not fresh:
            return None
        given = iter(fresh)
        for table, count in zip(self.tables, missing, strict=True):
            table += [next(given) for _ in range(count)]
        self._tables_changed(device)
        return torch.tensor(fresh, device=device)

    def shorten(self, kept: Mapping[int, int]) -> None:
        """Sequence ``s`` keeps its first ``kept[s]`` blocks."""
        freed = [block for s, count in kept.items() for block in self.tables[s][count:]]
        if freed:
            assert self._table is not None
            for s, count in kept.items():
                del self.tables[s][count:]
            # The next owner writes to these blocks on the same stream, so after the moves.
            self.allocator.give_back(freed)
            self._tables_changed(self._table.device)

    def slots(self, rows: Tensor) -> Tensor:
        """Slots of rows ``[S, q]`` of each sequence: ``block * page + row in the block``."""
        assert self._table is not None
        return self._table.gather(1, rows // self.page) * self.page + rows % self.page

    def table(self, sequences: Sequence[int]) -> Tensor:
        """int32 ``[n, nb]``: the block tables of these sequences, each padded with one of its own blocks."""
        assert self._table is not None
        rows = self._table if len(sequences) == len(self.tables) else torch.stack([self._table[s] for s in sequences])
        return rows.to(torch.int32)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, fresh: Tensor | None) -> None:
        """Writes rows ``k [H, n, D]``, ``v [H, n, Dv]`` to ``slots [n]``, after clearing the blocks ``fresh``."""
        for pools, new in ((self.k, k), (self.v, v)):
            if layer == len(pools) or pools[layer].shape[1] < self.allocator.size:
                self._grow(pools, layer, new)
            pool = pools[layer]
            if fresh is not None:
                # Attention multiplies masked rows by 0, and a NaN from a former owner would survive that.
                pool.index_fill_(1, fresh, 0)
            pool.flatten(1, 2).index_copy_(1, slots, new)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[S, H, length, D]``: one copy each, and no copy for a single sequence."""
        return self._gather(self.k[layer], length), self._gather(self.v[layer], length)

    @property
    def pools(self) -> list[Tensor]:
        """The pools of keys, then those of values."""
        return self.k + self.v

    @property
    def paged(self) -> PagedCache:
        """The pools of all layers as ``[B, P, H, D]``."""
        if self._paged is None:
            self._paged = PagedCache(*([x.permute(1, 2, 0, 3) for x in pools] for pools in (self.k, self.v)))
        return self._paged

    def _gather(self, pool: Tensor, length: int) -> Tensor:
        chosen = pool[:, self._chosen] if isinstance(self._chosen, slice) else pool.index_select(1, self._chosen)
        return chosen.view(len(pool), len(self.tables), -1, pool.shape[3]).transpose(0, 1)[:, :, :length]

    def _tables_changed(self, device: torch.device) -> None:
        width = max(map(len, self.tables))
        # Short tables are padded with one of their own blocks, which attention reads and masks.
        filled = [table + (table or [0])[:1] * (width - len(table)) for table in self.tables]
        self._table = torch.tensor(filled, device=device)
        self._chosen = slice(width) if len(filled) == 1 else self._table.flatten()

    @torch.inference_mode(False)  # a tensor created in inference mode cannot be written outside of it
    def _grow(self, pools: list[Tensor], layer: int, like: Tensor) -> None:
        pool = like.new_zeros(like.shape[0], self.allocator.size, self.page, like.shape[2])
        if layer == len(pools):
            pools.append(pool)
        else:
            pool[:, : pools[layer].shape[1]] = pools[layer]
            pools[layer] = pool
        self._paged = None  # it holds the address of the old tensor
