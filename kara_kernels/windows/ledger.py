"""Decides which sequence is compressed when, and tracks blocks and lengths. Host logic that uses only counts.

A compression has three parts. To **plan**, the scheduler chooses a window from counts that it already has. To
**execute** (:mod:`.execute`), every worker moves rows before the step writes into freed blocks. To **commit**, the
scheduler records the new lengths. The plan fixes how many tokens are kept, so the scheduler never waits for a worker,
and all tensor-parallel ranks agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..values import check_count
from .plan import Held, Plan, Running
from .policy import Policy


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
        shadow: plan as usual, but drop nothing. A committed window only passes, whole, and nothing else of the engine
            changes.

    Raises:
        TypeError, ValueError: settings that could never free a block of this size; too few rows.
    """

    def __init__(self, policy: Policy, page_size: int, *, query_rows: int | None = None, shadow: bool = False) -> None:
        policy.check_page_size(page_size)
        self.policy = policy
        self.page_size = page_size
        self.shadow = shadow
        self.query_rows = policy.query_rows if query_rows is None else query_rows
        check_count("query_rows", self.query_rows, policy.query_rows, 2**31 - 1)
        self.skipped: Counter[str] = Counter()
        """Windows that had to wait; every window and reason counts once. ``shared``: others hold blocks of it;
        ``gain``: it would free too few blocks yet; ``queries``: too few are recorded; ``cap``: others went first.
        ``loss``: the guard stopped the sequence."""
        self._states: dict[str, Running] = {}
        self._admitted: dict[str, int] = {}  # tokens without rows, of sequences that have not started
        self._planned: dict[str, Plan] = {}  # plans of the latest round, until committed
        self._of_round: set[str] = set()  # sequences with a plan in the latest round, committed or not
        self._started = 0
        self._rounds = 0

    def admit(self, request_id: str, dropped: int) -> None:
        """Tells that a sequence will start with the rows of a compressed context, ``dropped`` fewer than its tokens.

        The engine can count on them from now on. A later call replaces it. Raises ValueError for a negative number.
        """
        self._admitted[request_id] = check_count("dropped", dropped, 0, 2**31 - 1)

    def start(
        self, request_id: str, prompt_len: int, computed: int, *, window: int | None = None, keep: int | None = None
    ) -> None:
        """Registers a sequence that starts, or restarts after preemption.

        Args:
            request_id: its name.
            prompt_len: tokens that are never compressed. If ``policy.protected`` is larger, it counts instead.
            computed: tokens whose queries were not recorded. If some have no rows (:meth:`admit`), none is compressed.
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
        dropped = self._admitted.pop(request_id, 0)
        frontier = max(prompt_len, policy.protected, computed if dropped else 0) - dropped
        self._states[request_id] = Running(
            self._started, policy, policy is not self.policy, max(prompt_len, computed), frontier, squeezed=frontier,
            dropped=dropped,
        )  # fmt: skip
        self._started += 1

    def forget(self, request_id: str) -> None:
        """Removes a sequence that no longer holds blocks. Unknown names are ignored: it may never have started."""
        for of_sequence in (self._states, self._admitted, self._planned):
            of_sequence.pop(request_id, None)

    def dropped(self, request_id: str) -> int:
        """Logical minus physical length; 0 for an unknown sequence, and one with all rows."""
        state = self._states.get(request_id)
        return self._admitted.get(request_id, 0) if state is None else state.dropped

    def windows(self, request_id: str) -> int:
        """Compressions since the sequence started or restarted."""
        state = self._states.get(request_id)
        return 0 if state is None else state.windows

    def uncompressed(self, request_id: str, logical_len: int) -> int:
        """Decoded tokens after the frontier, not yet in a window. 0 for an unknown sequence or within a prompt."""
        state = self._states.get(request_id)
        return 0 if state is None else state.uncompressed(logical_len)

    def is_due(self, request_id: str, logical_len: int, *, urgent: bool = False) -> bool:
        """Whether the sequence has a full window and tail. ``urgent``: or may have something for :meth:`relieve`.
        Cheap: call it before you create a :class:`Held`."""
        state = self._states.get(request_id)
        return state is not None and state.is_due(logical_len, urgent)

    def peak(self, prompt_len: int, total: int, *, window: int | None = None, keep: int | None = None) -> int:
        """The most rows that a sequence of ``total`` tokens holds, if it is computed in the chunks of :meth:`chunk`."""
        if self.shadow:
            return total
        policy = self.policy.resized(window, keep)
        protected, most = max(prompt_len, policy.protected), policy.window + policy.tail + self.page_size
        windows = max(0, total - protected - policy.tail) // policy.window
        return min(total, protected + windows * policy.most_keep + most)

    def chunk(
        self, request_id: str, prompt_len: int, computed: int, *, window: int | None = None, keep: int | None = None
    ) -> int:
        """The most tokens that a sequence with ``computed`` ones should compute next, when its text is already known.

        Up to its next window and tail. While that window has to wait, the sequence goes on by a block at a time. The
        sequence may not have started yet; ``window`` and ``keep`` are those of :meth:`start`.
        """
        if self.shadow:
            return 2**31 - 1
        state, policy = self._states.get(request_id), self.policy.resized(window, keep)
        frontier = max(prompt_len, policy.protected) if state is None else state.frontier + state.dropped
        left = frontier + policy.window + policy.tail - computed
        return left if left > 0 else self.page_size

    def observe(self, request_id: str, needed: int) -> None:
        """Tells the guard how many tokens the latest window of a sequence needed, by
        :func:`kara_kernels.engine.needed_tokens` of ``policy.max_loss``.

        It sets ``keep`` of the sequence's next window within ``min_keep`` and ``max_keep``, or stops compressing the
        sequence. Sequences with a ``window`` or ``keep`` of their own, and unknown ones, are left alone. A late call
        only acts later.
        """
        state = self._states.get(request_id)
        if state is None or state.own or self.policy.max_loss is None:
            return
        state.keep = self.policy.guarded(needed)
        if state.keep is None and not state.stopped:
            state.stopped = True
            self._skip(state, "loss")

    def update(self, policy: Policy) -> None:
        """Replaces the settings while sequences run. Those of their own keep their ``window`` and ``keep``. The guard
        starts anew.

        Raises ValueError for settings that could never free a block, or need more queries than the ring holds.
        """
        policy.check_page_size(self.page_size)
        check_count("query_rows", self.query_rows, policy.query_rows, 2**31 - 1)
        for state in self._states.values():
            own = state.policy
            state.policy = policy.resized(own.window, own.keep) if state.own else policy
            state.keep, state.stopped = None, False
        self.policy = policy

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

        Sequences without a plan are compressed as many as it takes, with a tail of at least ``policy.least_tail`` and
        windows of ``policy.least_window`` where there is no larger one. If that frees too few blocks, they keep
        ``policy.least_keep``, and then their survivors are compressed once more, to the same share. Sequences with
        settings of their own or a guard yield no more than a shorter tail. ``period`` and ``max_sequences`` do not
        hold, and every plan frees a block.
        """
        if self.shadow:
            return []
        others = [sequence for sequence in held if sequence.request_id not in self._of_round]
        plans = _freeing(blocks, self._in_turn(others, 1))
        if sum(len(plan.freed) for plan in plans) < blocks:
            fresh = self._in_turn(others, 2)
            plans = _freeing(blocks, fresh + self._squeezing(others, {plan.request_id for plan in fresh}))
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
        kept = plan.window if self.shadow else plan.keep
        state.dropped += plan.window - kept
        if plan.window_start < state.frontier:  # survivors
            state.frontier -= plan.window - kept
            state.squeezed = plan.window_start + kept
        else:
            state.frontier = plan.window_start + kept
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
        if state is None or not state.is_due(held.logical_len, urgent):
            return None
        policy = state.policy
        keep = policy.keep if state.keep is None else state.keep
        if pressure > 1 and state.yields:
            keep = policy.least_keep
        plan = state.oldest_window(held, self.page_size, self.query_rows, keep, urgent)
        if isinstance(plan, str):
            if not urgent:
                self._skip(state, plan)
            return None
        return plan.physical_len - max(state.frontier, held.first_owned * self.page_size), plan

    def _squeezing(self, held: Iterable[Held], besides: set[str]) -> list[Plan]:
        """Plans of survivors. Sequences with most that were compressed once go first."""
        states = [(self._states[x.request_id], x) for x in held if x.request_id in self._states.keys() - besides]
        states.sort(key=lambda found: (found[0].squeezed - found[0].frontier, found[0].order))
        return [plan for state, x in states if (plan := state.oldest_survivors(x, self.page_size)) is not None]

    def _skip(self, state: Running, reason: str) -> None:
        if reason not in state.said:
            state.said.add(reason)
            self.skipped[reason] += 1


def _freeing(blocks: int, plans: list[Plan]) -> list[Plan]:
    """The first of ``plans``, as many as free ``blocks`` blocks, or all."""
    taken, freed = 0, 0
    while taken < len(plans) and freed < blocks:
        freed += len(plans[taken].freed)
        taken += 1
    return plans[:taken]
