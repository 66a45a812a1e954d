"""Rows of contexts as they were computed, in blocks of the GPU's pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kara_kernels.contexts.directory import Copy
from kara_kernels.contexts.keeper import Keeper

from .settings import needs_queries


class FullRows(NamedTuple):
    """Where the rows of a context lie."""

    request_id: str
    blocks: Sequence[int]
    unjudged: int | None
    """The first tokens, whose queries the request has not computed. None: no queries are recorded."""

    def may_replace(self, copy: Copy | None) -> bool:
        """Whether the context may be encoded anew. Without queries, others would make room for a packet like ``copy``
        that cannot be encoded."""
        return copy is None or self.unjudged is not None or not needs_queries(copy.option.method)


class RowsAtHand(dict[str, FullRows]):
    """By contexts, until blocks are freed.

    Args:
        storing: ``storing(request)``: stores that read its blocks.
    """

    def __init__(self, keeper: Keeper, storing: Callable[[str], Sequence[int]]) -> None:
        super().__init__()
        self._keeper, self._storing = keeper, storing

    def hold(self, request_id: str) -> bool:
        """Whether stores of the request's rows run, or may still begin."""
        return bool(self._storing(request_id)) or any(rows.request_id == request_id for rows in self.values())

    def forget(self, request_id: str, *, but_due: bool = False) -> None:
        """The request's blocks are freed when nothing holds them. ``but_due``: what waits for room may go on,
        but for rows that queries rank, which are gone with the request."""
        for key, rows in list(self.items()):
            waits = but_due and rows.unjudged is None and self._keeper.is_due(key)
            if rows.request_id == request_id and not waits:
                del self[key]
                self._keeper.forget_rows(key)
