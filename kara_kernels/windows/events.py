"""The record of one compression, in the same form for every engine, in memory and in a trace."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .plan import Plan


class Compression(NamedTuple):
    """One compression of one sequence. Lengths are in tokens."""

    request_id: str
    """The sequence's name; in a batch without names its index, ``"0"``, ``"1"``, ..."""
    logical_len: int
    """Tokens computed before the event, without padding."""
    physical_len_before: int
    """Rows held before."""
    physical_len_after: int
    """Rows held after."""
    window_start: int
    """Physical index of the first window token."""
    window: int
    """``W``, tokens of the window."""
    keep: int
    """``K``, tokens of the window that were kept."""
    keep_indices: Tensor
    """int32 ``[L, H, K]`` on the CPU: window-relative, ascending."""
    freed_blocks: int
    """Blocks that went back to the pool."""
    recomputed_len: int
    """Tokens recomputed when the request last resumed from preemption; 0 if it never did, or if nobody counts them."""
    seconds: float
    """Wall clock of the call that moved the rows, divided by the number of sequences it compressed."""
    lost: float | None
    """Share of the window's scores that dropped tokens had, see :func:`kara_kernels.engine.lost_share`. None if nobody
    measured it."""
    moved: bool
    """False if nothing was dropped, because the engine only watches."""

    @classmethod
    def of(
        cls, plan: Plan, keep_indices: Tensor, *, seconds: float, request_id: str | None = None,
        recomputed_len: int = 0, lost: float | None = None, moved: bool = True,
    ) -> Compression:  # fmt: skip
        """The record of an executed plan.

        Args:
            plan: the executed plan.
            keep_indices: int32 ``[L, H, K]`` on the CPU, as :func:`kara_kernels.engine.execute` returned them. With
                tensor parallelism ``H`` counts the heads of all ranks.
            seconds, recomputed_len, lost, moved: see the fields.
            request_id: a name to use instead of the plan's, such as the client's.
        """
        return cls(
            request_id=plan.request_id if request_id is None else request_id, logical_len=plan.logical_len,
            physical_len_before=plan.physical_len, physical_len_after=plan.new_len, window_start=plan.window_start,
            window=plan.window, keep=plan.keep, keep_indices=keep_indices, freed_blocks=len(plan.freed),
            recomputed_len=recomputed_len, seconds=seconds, lost=lost, moved=moved,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON types, ``keep_indices`` as nested lists. This is a line of a trace."""
        return self._asdict() | {"keep_indices": self.keep_indices.tolist()}
