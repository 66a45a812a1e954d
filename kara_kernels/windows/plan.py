"""Decides which sequence is compressed when, and tracks blocks and lengths. Host logic that uses only counts.

A compression has three parts. To **plan**, the scheduler chooses a window from counts that it already has. To
**execute** (:mod:`.execute`), every worker moves rows before the step writes into freed blocks. To **commit**, the
scheduler records the new lengths. The plan fixes how many tokens are kept, so the scheduler never waits for a worker,
and all tensor-parallel ranks agree.

Each sequence has two lengths. The *logical* length counts every token ever seen. Positions, stop conditions and
recomputation use it. The *physical* length counts the rows a sequence still holds. Slots and attention use it. They
differ by the number of *dropped* tokens. The *frontier* is the physical length of the part that is never touched again:
the prompt and the survivors of earlier compressions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..values import check_count
from .policy import Policy


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
    """``N``, the number of recorded queries that score, up to and including the last one. With ``attention="causal"``
    these are the queries of the window's own tokens."""

    @property
    def touched(self) -> tuple[int, ...]:
        """Blocks to remove from the prefix cache before they are written or freed."""
        return self.blocks[self.first_written :]

    @property
    def freed(self) -> tuple[int, ...]:
        """Blocks that return to the pool after the rows have moved."""
        return self.blocks[self.kept_blocks :]


@dataclass(slots=True)
class _State:
    """One running sequence."""

    order: int
    policy: Policy
    recorded_from: int  # logical position of the first query in the ring
    frontier: int
    dropped: int = 0
    windows: int = 0
    said: set[str] = field(default_factory=set)  # reasons why this window waited; each counts once


class Ledger:
    """The compression state of every running sequence of one engine.

    Call ``start`` when a sequence's first tokens are scheduled. Call ``forget`` when it finishes, is aborted **or is
    preempted**. After preemption the compressed cache is lost with its blocks, and the sequence is recomputed. No state
    depends on a position in the batch. A sequence that was never started is never compressed.

    Args:
        policy: the compression settings.
        page_size: ``P``, tokens per block; 1 for slot tables.
        query_rows: queries that the ring holds per sequence. The default and minimum is ``policy.query_rows``. With
            more, a window that had to wait is still scored by its own queries and those of its tail, and sequences may
            have larger windows.

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
        self._planned: dict[str, Plan] = {}  # plans of the latest round, until committed
        self._of_round: set[str] = set()  # sequences with a plan in the latest round, committed or not
        self._started = 0
        self._rounds = 0

    def start(
        self, request_id: str, prompt_len: int, computed: int, *, window: int | None = None, keep: int | None = None
    ) -> None:
        """Registers a sequence that starts, or restarts after preemption.

        Args:
            request_id: its name.
            prompt_len: tokens that are never compressed. If ``policy.protected`` is larger, it counts instead.
            computed: tokens served by the prefix cache, whose queries were not recorded.
            window, keep: the sequence's own, instead of the policy's.

        Raises:
            TypeError, ValueError: a ``window`` or ``keep`` that a policy could not have, or more queries than the ring
                holds.
        """
        policy = self.policy.resized(window, keep)
        if policy is not self.policy:
            policy.check_page_size(self.page_size)
            check_count("query_rows", self.query_rows, policy.query_rows, 2**31 - 1)
        self._planned.pop(request_id, None)
        frontier = max(prompt_len, policy.protected)
        self._states[request_id] = _State(self._started, policy, max(prompt_len, computed), frontier)
        self._started += 1

    def forget(self, request_id: str) -> None:
        """Removes a sequence that no longer holds blocks. Unknown names are ignored: it may never have started."""
        self._states.pop(request_id, None)
        self._planned.pop(request_id, None)

    def dropped(self, request_id: str) -> int:
        """Logical minus physical length; 0 for a sequence that was never compressed or is unknown."""
        state = self._states.get(request_id)
        return 0 if state is None else state.dropped

    def windows(self, request_id: str) -> int:
        """Compressions since the sequence started or restarted."""
        state = self._states.get(request_id)
        return 0 if state is None else state.windows

    def uncompressed(self, request_id: str, logical_len: int) -> int:
        """Decoded tokens after the frontier, not yet in a window. 0 for an unknown sequence or within a prompt."""
        state = self._states.get(request_id)
        return 0 if state is None else max(0, logical_len - state.dropped - state.frontier)

    def is_due(self, request_id: str, logical_len: int, *, urgent: bool = False) -> bool:
        """Whether the sequence has a full window and tail. ``urgent``: or a tail for :meth:`relieve`. Cheap: call it
        before you create a :class:`Held`."""
        state = self._states.get(request_id)
        if state is None:
            return False
        return self.uncompressed(request_id, logical_len) >= _enough(state.policy, urgent)

    def peak(self, prompt_len: int, total: int, *, window: int | None = None, keep: int | None = None) -> int:
        """The most rows that a sequence of ``total`` tokens holds, if it is computed in the chunks of :meth:`chunk`."""
        policy = self.policy.resized(window, keep)
        protected, most = max(prompt_len, policy.protected), policy.window + policy.tail + self.page_size
        windows = max(0, total - protected - policy.tail) // policy.window
        return min(total, protected + windows * policy.keep + most)

    def chunk(
        self, request_id: str, prompt_len: int, computed: int, *, window: int | None = None, keep: int | None = None
    ) -> int:
        """The most tokens that a sequence with ``computed`` ones should compute next, when its text is already known.

        Up to its next window and tail. While that window has to wait, the sequence goes on by a block at a time. The
        sequence may not have started yet; ``window`` and ``keep`` are those of :meth:`start`.
        """
        state, policy = self._states.get(request_id), self.policy.resized(window, keep)
        frontier = max(prompt_len, policy.protected) if state is None else state.frontier + state.dropped
        left = frontier + policy.window + policy.tail - computed
        return left if left > 0 else self.page_size

    def plan(self, held: Iterable[Held]) -> list[Plan]:
        """The compressions of this engine step: at most one per sequence and ``max_sequences`` in all.

        Sequences with the most uncompressed tokens go first, then those that have run longest, so that none starves.
        No length changes. A plan that is not committed before the next call is discarded.

        Raises ValueError if a sequence that is due has fewer blocks than rows.
        """
        self._planned, self._of_round = {}, set()
        self._rounds += 1
        if (self._rounds - 1) % self.policy.period:
            return []
        plans = self._in_turn(held)
        for plan in plans[self.policy.max_sequences :]:
            self._skip(self._states[plan.request_id], "cap")
        del plans[self.policy.max_sequences :]
        return self._remember(plans)

    def relieve(self, held: Iterable[Held], blocks: int) -> list[Plan]:
        """More compressions of this step, which free ``blocks`` blocks if they can. Call it after :meth:`plan`, when
        the engine would otherwise preempt a sequence.

        Sequences without a plan are compressed with a tail of at least ``policy.least_tail``, as many as it takes. If
        that frees too few blocks, those without a ``keep`` of their own keep ``policy.least_keep``. ``period`` and
        ``max_sequences`` do not hold, and every plan frees a block.
        """
        others = [sequence for sequence in held if sequence.request_id not in self._of_round]
        plans: list[Plan] = []
        for pressure in (1, 2):
            plans, freed = [], 0
            for plan in self._in_turn(others, pressure):
                if freed >= blocks:
                    break
                plans.append(plan)
                freed += len(plan.freed)
            if freed >= blocks:
                break
        return self._remember(plans)

    def _remember(self, plans: list[Plan]) -> list[Plan]:
        self._planned |= {plan.request_id: plan for plan in plans}
        self._of_round |= self._planned.keys()
        return plans

    def commit(self, plan: Plan) -> None:
        """Records a plan. Every worker must execute it before it computes another token of this sequence.

        Raises ValueError if the plan is from an earlier round, was already committed, or its sequence was forgotten or
        restarted since.
        """
        if self._planned.get(plan.request_id) != plan:
            raise ValueError(f"plan: expected an uncommitted one of the latest round, got {plan}")
        del self._planned[plan.request_id]
        state = self._states[plan.request_id]
        state.dropped += plan.window - plan.keep
        state.frontier = plan.window_start + plan.keep
        state.windows += 1
        state.said.clear()

    def _in_turn(self, held: Iterable[Held], pressure: int = 0) -> list[Plan]:
        """Plans of all sequences that need not wait. Those with the most uncompressed tokens go first."""
        due = [found for sequence in held if (found := self._plan(sequence, pressure)) is not None]
        due.sort(key=lambda found: (-found[0], self._states[found[1].request_id].order))
        return [plan for _, plan in due]

    def _plan(self, held: Held, pressure: int) -> tuple[int, Plan] | None:
        """The number of compressible tokens and the plan for the oldest window, or None if it has to wait.

        ``pressure`` is 0, 1 with a shorter tail, or 2 with a smaller ``keep`` as well.
        """
        state, urgent = self._states.get(held.request_id), pressure > 0
        if state is None or not self.is_due(held.request_id, held.logical_len, urgent=urgent):
            return None
        policy, page, enough = state.policy, self.page_size, _enough(state.policy, urgent)
        keep = policy.least_keep if pressure > 1 and policy is self.policy else policy.keep
        physical = held.logical_len - state.dropped
        filled = -(-physical // page)
        if len(held.blocks) < filled:
            raise ValueError(
                f"blocks: expected at least {filled} for the {physical} rows of {held.request_id}, "
                f"got {len(held.blocks)}"
            )
        after = physical - (policy.window - keep)
        kept = -(-after // page)
        gain = filled - kept
        begin = max(state.frontier, held.first_owned * page)
        start, first, last = self._judges(state, begin, held.logical_len, urgent)
        reason = ""
        if physical - begin < enough:
            reason = "shared"
        # One more block of tokens covers every possible gain. After that the window is compressed anyway.
        elif (urgent and not gain) or (gain < policy.min_freed_blocks and physical - begin < enough + page):
            reason = "gain"
        # Decoded tokens served by the prefix cache have no recorded queries, so wait until enough are recorded.
        elif physical - start < enough or last - first + 1 < max(1, policy.query_rows // 4):
            reason = "queries"
        if reason:
            if not urgent:
                self._skip(state, reason)
            return None
        return physical - begin, Plan(
            request_id=held.request_id, logical_len=held.logical_len, physical_len=physical, new_len=after,
            window_start=start, window=policy.window, keep=keep, blocks=tuple(held.blocks),
            first_written=start // page, kept_blocks=kept, last_query=last, num_queries=last - first + 1,
        )  # fmt: skip

    def _judges(self, state: _State, begin: int, logical: int, urgent: bool) -> tuple[int, int, int]:
        """``(window start, first sample, last sample)`` of the oldest window from physical row ``begin`` on."""
        policy, stride = state.policy, state.policy.query_stride
        newest = (logical - 1) // stride
        # Sample n is the query at logical position n * stride. The ring holds the newest ones.
        oldest = max((state.recorded_from - 1) // stride, newest - self.query_rows) + 1
        if policy.attention == "causal":
            # Query i acts as window token i, so a token whose own query is gone fits in no window.
            start = max(begin, oldest - state.dropped)
            first = start + state.dropped
            return start, first, first + policy.window - 1
        rows = policy.query_rows
        # Queries of the window and its tail. If it had to wait, later ones have overwritten the oldest.
        first = -(-(begin + state.dropped) // stride)
        if not urgent:  # always as many, however samples fall
            first = min(first, newest - rows + 1)
        first = max(oldest, first)
        return begin, first, min(newest, first + rows - 1)

    def _skip(self, state: _State, reason: str) -> None:
        if reason not in state.said:
            state.said.add(reason)
            self.skipped[reason] += 1


def _enough(policy: Policy, urgent: bool) -> int:
    """Uncompressed tokens of a sequence that is due."""
    return policy.window + (policy.least_tail if urgent else policy.tail)
