"""One compression of one sequence: which window, which queries score it, and what happens to its blocks.

Each sequence has two lengths. The *logical* length counts every token ever seen. Positions, stop conditions and
recomputation use it. The *physical* length counts the rows a sequence still holds. Slots and attention use it. They
differ by the number of *dropped* tokens. The *frontier* is the physical length of the part that no window reaches:
the prompt and the survivors of earlier compressions. Only shortage of blocks may compress survivors once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .policy import KARA, Policy


class Held(NamedTuple):
    """A sequence whose prompt is computed, so that it may be compressed now."""

    request_id: str
    logical_len: int
    """Tokens whose keys and values are in the cache when the plan is executed. Tokens of a step in flight count if it
    runs before, and if none of them can be rejected."""
    blocks: Sequence[int]
    """Ids of its blocks in order, or its slots with a page size of 1."""
    first_owned: int
    """Index of the first block that, like all later ones, belongs to this sequence alone (reference count 1)."""


class Plan(NamedTuple):
    """One compression of one sequence, with everything a worker needs."""

    request_id: str
    logical_len: int
    physical_len: int
    """Rows before the compression; ``new_len`` after it."""
    new_len: int
    window_start: int
    """Physical index of the first window token."""
    window: int
    """``W``, tokens of the window."""
    keep: int
    """``K``, how many of them stay."""
    blocks: tuple[int, ...]
    """All blocks before the compression. Those from index ``first_written`` on are rewritten or freed."""
    first_written: int
    kept_blocks: int
    """How many of ``blocks`` the sequence keeps. The later ones go back to the pool."""
    last_query: int
    """Sample number of the last query that scores, see :class:`kara_kernels.engine.QueryRing`."""
    num_queries: int
    """``N``, the number of recorded queries that score, up to and including the last one. 0 for a scorer that needs
    none. With ``attention="causal"`` these are the queries of the window's own tokens."""

    @property
    def touched(self) -> tuple[int, ...]:
        """Blocks to remove from the prefix cache before they are written or freed."""
        return self.blocks[self.first_written :]

    @property
    def freed(self) -> tuple[int, ...]:
        """Blocks that return to the pool after the rows have moved."""
        return self.blocks[self.kept_blocks :]


@dataclass(slots=True)
class Running:
    """One running sequence, and its oldest window."""

    order: int
    """Sequences that started later have a larger one."""
    policy: Policy
    """The ledger's, or one with the sequence's own window and keep."""
    own: bool
    """Whether it is the sequence's own."""
    recorded_from: int
    """Logical position of the first query in the ring."""
    frontier: int
    squeezed: int
    """Physical length of the prompt and of the survivors that were compressed twice. Those from here to the frontier
    were compressed once."""
    dropped: int = 0
    windows: int = 0
    keep: int | None = None
    """``keep`` of the next window, if the guard has set it."""
    stopped: bool = False
    """Whether the guard has stopped its compression."""
    said: set[str] = field(default_factory=set)
    """Reasons why this window waited; each counts once."""

    def uncompressed(self, logical_len: int) -> int:
        """Decoded tokens after the frontier. 0 within a prompt."""
        return max(0, logical_len - self.dropped - self.frontier)

    @property
    def yields(self) -> bool:
        """Whether shortage of blocks may take more than its settings say."""
        return not self.own and self.policy.max_loss is None

    @property
    def least_window(self) -> int:
        """Tokens of its smallest window when blocks are short."""
        return self.policy.least_window if self.yields else self.policy.window

    def enough(self, urgent: bool) -> int:
        """Uncompressed tokens that make it due."""
        policy = self.policy
        return self.least_window + policy.least_tail if urgent else policy.window + policy.tail

    def is_due(self, logical_len: int, urgent: bool) -> bool:
        """Whether it may have a window; or survivors, if urgent."""
        survivors = urgent and self.yields and self.frontier - self.squeezed >= self.least_window
        return survivors or (not self.stopped and self.uncompressed(logical_len) >= self.enough(urgent))

    def oldest_window(self, held: Held, page: int, query_rows: int, keep: int, urgent: bool) -> Plan | str:
        """The plan of its oldest window, or the reason why that has to wait, as :attr:`Ledger.skipped` counts them.

        Args:
            held: the sequence, which is due.
            page: tokens per block.
            query_rows: queries that the ring holds.
            keep: tokens of the window that stay.
            urgent: with a shorter tail, of fewer tokens if there are too few, and only if it frees a block.
        """
        policy, window = self.policy, self.policy.window
        physical = held.logical_len - self.dropped
        filled = -(-physical // page)
        if len(held.blocks) < filled:
            raise ValueError(
                f"blocks: expected at least {filled} for the {physical} rows of {held.request_id}, "
                f"got {len(held.blocks)}"
            )
        begin = max(self.frontier, held.first_owned * page)
        tail = policy.least_tail if urgent else policy.tail
        if urgent and physical - begin < window + tail:
            window, keep = self.least_window, max(1, keep * self.least_window // window)
        enough = window + tail
        gain = filled - -(-(physical - (window - keep)) // page)
        start, first, last = self._judges(begin, held.logical_len, query_rows, urgent)
        if physical - begin < enough:
            return "shared"
        # One more block of tokens covers every possible gain. After that the window is compressed anyway.
        if (urgent and not gain) or (gain < policy.min_freed_blocks and physical - begin < enough + page):
            return "gain"
        # Decoded tokens served by the prefix cache have no recorded queries, so wait until enough are recorded.
        if physical - start < enough or self._too_few(first, last):
            return "queries"
        return self._plan(held, page, start, window, keep, first, last)

    def oldest_survivors(self, held: Held, page: int) -> Plan | None:
        """The plan that compresses a window of survivors once more, scored by the newest queries, if it frees a block.

        As many of them stay as ``policy.least_keep`` is of ``policy.keep``.
        """
        policy = self.policy
        start = max(self.squeezed, held.first_owned * page)
        window = policy.window if self.frontier - start >= policy.window else self.least_window
        keep = max(1, window * policy.least_keep // policy.keep)
        first, last = self._recorded(held.logical_len, policy.query_rows)
        if policy.scorer != KARA:  # others take query i for that of the i-th newest row
            first = max(first, self.frontier + self.dropped)
        # The ring no longer has the queries of survivors.
        possible = self.yields and not policy.own_queries and self.frontier - start >= window > keep
        if not possible or self._too_few(first, last):
            return None
        plan = self._plan(held, page, start, window, keep, first, last)
        return plan if plan.freed else None

    def _plan(self, held: Held, page: int, start: int, window: int, keep: int, first: int, last: int) -> Plan:
        """Of samples ``first`` to ``last``, both included."""
        physical = held.logical_len - self.dropped
        after = physical - (window - keep)
        return Plan(
            request_id=held.request_id, logical_len=held.logical_len, physical_len=physical, new_len=after,
            window_start=start, window=window, keep=keep, blocks=tuple(held.blocks), first_written=start // page,
            kept_blocks=-(-after // page), last_query=last, num_queries=last - first + 1,
        )  # fmt: skip

    def _judges(self, begin: int, logical: int, query_rows: int, urgent: bool) -> tuple[int, int, int]:
        """``(window start, first sample, last sample)`` of the oldest window from physical row ``begin`` on."""
        policy = self.policy
        oldest, newest = self._recorded(logical, query_rows)
        if policy.own_queries:
            # A token whose own query is gone fits in no window.
            start = max(begin, oldest - self.dropped)
            first = start + self.dropped
            # Causal query i acts as window token i.
            return start, first, first + policy.window - 1 if policy.attention == "causal" else newest
        rows = policy.query_rows
        # Queries of the window and its tail. If it had to wait, later ones have overwritten the oldest.
        first = -(-(begin + self.dropped) // policy.query_stride)
        if not urgent:  # always as many, however samples fall
            first = min(first, newest - rows + 1)
        first = max(oldest, first)
        return begin, first, min(newest, first + rows - 1)

    def _recorded(self, logical: int, rows: int) -> tuple[int, int]:
        """The oldest and the newest of the last ``rows`` samples. Sample n is the query at position n * stride."""
        newest = (logical - 1) // self.policy.query_stride
        return max((self.recorded_from - 1) // self.policy.query_stride, newest - rows) + 1, newest

    def _too_few(self, first: int, last: int) -> bool:
        rows = self.policy.query_rows
        return last - first + 1 < min(rows, max(1, rows // 4))
