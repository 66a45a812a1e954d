"""Conversations (FlowKV, arXiv 2505.15347): the next turn goes on with the rows that windows left of this one.

When a request ends that has fewer rows than tokens, these rows are stored as the context of its whole text, prompt and
answer. They are copied as they are, so they lose nothing at any later turn. The next turn, whose prompt begins with
that text, is admitted with them. Its windows begin behind its prompt, so no turn is compressed a second time.

To a packet, a conversation is a context of as many tokens as it has rows. Only the scheduler knows the number of
tokens that they stand for. A request whose tokens all have rows leaves no conversation: what it computed lies in the
engine's own cache, and its context is stored as any other.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request, RequestStatus

from .manager import ContextManager, Place
from .scheduler import salt

WHOLE = RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED
"""How requests end whose next turn may come."""


class Conversations:
    """Of one engine's requests.

    Args:
        scheduler: a :class:`~.scheduler.WithContexts`.
    """

    def __init__(self, manager: ContextManager, scheduler: Any) -> None:
        self._manager, self._scheduler = manager, scheduler
        self._names: set[str] = set()  # requests that have not opted out

    def __contains__(self, request_id: object) -> bool:
        """Whether a request may be admitted with rows that windows left, and leave some."""
        return request_id in self._names

    def arrived(self, request: Request) -> None:
        """A request has come that may be admitted with contexts."""
        if self._scheduler.may_compress(request):
            self._names.add(request.request_id)

    def ended(self, request: Request, blocks: list[int]) -> None:
        """Offers what a request leaves in its ``blocks``, if that is a conversation."""
        name = request.request_id
        if name not in self._names:
            return
        self._names.discard(name)
        written = request.num_tokens - 1  # its last token was never computed
        size = self._manager.block_size
        tokens = written // size * size
        if request.status not in WHOLE or request.num_computed_tokens < written or tokens < self._manager.min_tokens:
            return
        rows = self._scheduler.left_of(name, written, tokens)
        if rows is not None:
            salt(request, "")  # it may have been admitted: its text is named as that of any request of its tenant
            place = Place(request.block_hashes[tokens // size - 1], tokens, rows)
            self._manager.offer(name, place, blocks[: -(-rows // size)], ())
