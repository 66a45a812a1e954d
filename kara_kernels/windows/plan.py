"""Who is compressed when, and what that does to blocks and lengths. Host logic on counts alone.

A compression has three parts. To **plan**, the scheduler decides on a window from counts it has anyway. To **execute**
(:mod:`.execute`), every worker moves rows before the step writes into freed blocks. To **commit**, the scheduler books
the new lengths. The plan fixes how many tokens stay, so no scheduler waits for a worker and all tensor-parallel ranks
agree.

Two lengths are kept apart. The *logical* length counts every token ever seen; positions, stop conditions and
recomputation use it. The *physical* length counts the rows a sequence still holds; slots and attention use it. They
differ by what was *dropped*. The *frontier* is the physical length of what is never touched again: the prompt, then
what earlier compressions kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..checks import check_count
from .policy import Policy


class Held(NamedTuple):
    """A sequence that may be compressed now: its prompt is computed and none of its tokens is in flight."""

    request_id: str
    logical_len: int
    """Tokens computed so far; their keys and values are in the cache."""
    blocks: Sequence[int]
    """Ids of its blocks in order, or its slots with a page size of 1."""
    first_owned: int
    """Index of a block; it and all behind it belong to this sequence alone (reference count 1)."""


class Plan(NamedTuple):
    """One compression of one sequence: all that a worker needs to know."""

    request_id: str
    logical_len: int
    physical_len: int
    """Rows held before; afterwards ``new_len``."""
    new_len: int
    window_start: int
    """Physical index of the first window token."""
    blocks: tuple[int, ...]
    """All blocks before, of which those from index ``first_written`` on are rewritten or freed."""
    first_written: int
    kept_blocks: int
    """How many of ``blocks`` the sequence keeps; those behind go back to the pool."""
    last_query: int
    """Sample number of the last query that scores, see :class:`kara_kernels.engine.QueryRing`."""
    num_queries: int
    """``N``, how many recorded queries score: the last one and those before it. With ``attention="causal"`` these are
    the queries of the window's own tokens."""

    @property
    def touched(self) -> tuple[int, ...]:
        """Blocks that must leave the prefix cache before they are written or freed."""
        return self.blocks[self.first_written :]

    @property
    def freed(self) -> tuple[int, ...]:
        """Blocks that go back to the pool once the rows are moved."""
        return self.blocks[self.kept_blocks :]


@dataclass(slots=True)
class _State:
    """One running sequence."""

    order: int
    recorded_from: int  # logical position of the first query in the ring
    frontier: int
    dropped: int = 0
    windows: int = 0
    said: set[str] = field(default_factory=set)  # why this window waited; each reason counts once


class Ledger:
    """The compression state of every running sequence of one engine.

    Call ``start`` when a sequence's first tokens are scheduled. Call ``forget`` when it finishes, is aborted **or is
    preempted**: what was kept is lost with the blocks, and recomputation begins anew. No state is tied to a place in a
    batch.

    Args:
        policy: what to do.
        page_size: ``P``, tokens in a block; 1 for slot tables.
        query_rows: queries that the ring holds per sequence; by default, and at least, ``policy.query_rows``. With
            more of them, a window that had to wait is still judged by its own queries and its tail's.

    Raises:
        TypeError, ValueError: settings that could never free a block of this size; too few rows.
    """

    def __init__(self, policy: Policy, page_size: int, *, query_rows: int | None = None) -> None:
        policy.check_page_size(page_size)
        self.policy = policy
        self.page_size = page_size
        self.query_rows = policy.query_rows if query_rows is None else query_rows
        check_count("query_rows", self.query_rows, policy.query_rows, 2**31 - 1)
        self.skipped: Counter[str] = Counter()
        """Windows that had to wait; every window and reason counts once. ``shared``: others hold blocks of it;
        ``gain``: it would free too few blocks yet; ``queries``: too few are recorded; ``cap``: others went first."""
        self._states: dict[str, _State] = {}
        self._planned: dict[str, Plan] = {}  # of the latest round, until they are committed
        self._started = 0
        self._rounds = 0

    def start(self, request_id: str, prompt_len: int, computed: int) -> None:
        """A sequence begins, or begins anew after preemption.

        Args:
            request_id: its name.
            prompt_len: tokens that are never compressed, at least those of ``policy.protected``.
            computed: tokens that the prefix cache served; their queries were never seen.
        """
        self._planned.pop(request_id, None)
        frontier = max(prompt_len, self.policy.protected)
        self._states[request_id] = _State(self._started, max(prompt_len, computed), frontier)
        self._started += 1

    def forget(self, request_id: str) -> None:
        """The sequence holds no blocks any more. Unknown names are ignored: it may never have begun."""
        self._states.pop(request_id, None)
        self._planned.pop(request_id, None)

    def dropped(self, request_id: str) -> int:
        """Logical minus physical length; 0 for a sequence that was never compressed or is unknown."""
        state = self._states.get(request_id)
        return 0 if state is None else state.dropped

    def windows(self, request_id: str) -> int:
        """Compressions since the sequence began (anew)."""
        state = self._states.get(request_id)
        return 0 if state is None else state.windows

    def uncompressed(self, request_id: str, logical_len: int) -> int:
        """Rows behind the frontier: decoded, and in no window so far. 0 for an unknown sequence or within a prompt."""
        state = self._states.get(request_id)
        return 0 if state is None else max(0, logical_len - state.dropped - state.frontier)

    def is_due(self, request_id: str, logical_len: int) -> bool:
        """Whether the sequence has a window and a tail to compress. Cheap; ask before you make a :class:`Held`."""
        return self.uncompressed(request_id, logical_len) >= self.policy.window + self.policy.tail

    def plan(self, held: Iterable[Held]) -> list[Plan]:
        """The compressions of this engine step: at most one per sequence and ``max_sequences`` in all.

        Sequences with most uncompressed tokens go first, then those that run longest, so that nobody starves. No
        length changes: a plan that is not committed before the next call has not happened.

        Raises ValueError if a sequence that is due has fewer blocks than rows.
        """
        self._planned = {}
        self._rounds += 1
        if (self._rounds - 1) % self.policy.period:
            return []
        due = [found for sequence in held if (found := self._plan(sequence)) is not None]
        due.sort(key=lambda found: (-found[0], self._states[found[1].request_id].order))
        plans = [plan for _, plan in due]
        for plan in plans[self.policy.max_sequences :]:
            self._skip(self._states[plan.request_id], "cap")
        del plans[self.policy.max_sequences :]
        self._planned = {plan.request_id: plan for plan in plans}
        return plans

    def commit(self, plan: Plan) -> None:
        """Books a plan that every worker executes before it computes another token of this sequence.

        Raises ValueError for a plan of an earlier round, one that was committed before, or one whose sequence was
        forgotten or began anew since.
        """
        if self._planned.get(plan.request_id) != plan:
            raise ValueError(f"plan: expected an uncommitted one of the latest round, got {plan}")
        del self._planned[plan.request_id]
        state = self._states[plan.request_id]
        state.dropped += self.policy.dropped
        state.frontier = plan.window_start + self.policy.keep
        state.windows += 1
        state.said.clear()

    def _plan(self, held: Held) -> tuple[int, Plan] | None:
        """Tokens that may be compressed, and the plan for the oldest window of them; None: it has to wait."""
        state = self._states.get(held.request_id)
        if state is None or not self.is_due(held.request_id, held.logical_len):
            return None
        policy, page = self.policy, self.page_size
        physical = held.logical_len - state.dropped
        enough = policy.window + policy.tail
        filled = -(-physical // page)
        if len(held.blocks) < filled:
            raise ValueError(
                f"blocks: expected at least {filled} for the {physical} rows of {held.request_id}, "
                f"got {len(held.blocks)}"
            )
        after = physical - policy.dropped
        kept = -(-after // page)
        begin = max(state.frontier, held.first_owned * page)
        start, first, last = self._judges(state, begin, held.logical_len)
        reason = ""
        if physical - begin < enough:
            reason = "shared"
        # A block of further tokens passes through every gain there can be; after that the window goes ahead anyway.
        elif filled - kept < policy.min_freed_blocks and physical - begin < enough + page:
            reason = "gain"
        # Decoded tokens that the prefix cache served left no queries: wait until enough are recorded.
        elif physical - start < enough or last - first + 1 < max(1, policy.query_rows // 4):
            reason = "queries"
        if reason:
            self._skip(state, reason)
            return None
        return physical - begin, Plan(
            request_id=held.request_id, logical_len=held.logical_len, physical_len=physical, new_len=after,
            window_start=start, blocks=tuple(held.blocks), first_written=start // page, kept_blocks=kept,
            last_query=last, num_queries=last - first + 1,
        )  # fmt: skip

    def _judges(self, state: _State, begin: int, logical: int) -> tuple[int, int, int]:
        """``(window start, first sample, last sample)`` of the oldest window from physical row ``begin`` on."""
        policy, stride = self.policy, self.policy.query_stride
        newest = (logical - 1) // stride
        # Sample n is that of logical position n * stride; a ring holds the newest ones.
        oldest = max((state.recorded_from - 1) // stride, newest - self.query_rows) + 1
        if policy.attention == "causal":
            # Query i judges as window token i, so a token whose own query is gone fits into no window.
            start = max(begin, oldest - state.dropped)
            first = start + state.dropped
            return start, first, first + policy.window - 1
        rows = policy.query_rows
        # Queries of the window and its tail. Where it had to wait, later ones have overwritten the oldest of them.
        first = max(oldest, min(-(-(begin + state.dropped) // stride), newest - rows + 1))
        return begin, first, min(newest, first + rows - 1)

    def _skip(self, state: _State, reason: str) -> None:
        if reason not in state.said:
            state.said.add(reason)
            self.skipped[reason] += 1
