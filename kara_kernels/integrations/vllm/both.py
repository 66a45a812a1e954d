"""Windows and contexts in one engine: schedulers that do both.

Neither room knows the other, because they never meet in a block. A context is whole blocks of a prompt without its last
token. Windows begin behind the prompt. So no plan rewrites or frees what a store reads, and a context can be stored
whole from a request that has lost rows. A packet may have fewer rows than tokens. The ledger of windows then counts the
others as dropped before the request is given blocks, and everything goes on from there as after a window.

They meet on purpose when a request ends or is preempted: what windows left may be stored. Then windows say how many
rows stand for how many tokens.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request

from .contexts.scheduler import WithContexts
from .windows.scheduler import KaraAsyncScheduler, KaraScheduler


class _WithBoth(WithContexts):
    def begin_without(self, request_id: str, dropped: int) -> None:
        self._ledger.admit(request_id, dropped)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        output.kara.contexts = output.kv_connector_metadata.judged
        return output

    def _is_lost(self, plan: Any, output: Any) -> bool:
        leaving = {job.request_id for job in output.kv_connector_metadata.leaving}
        return plan.request_id not in leaving and super()._is_lost(plan, output)

    def may_compress(self, request: Request) -> bool:
        choice = self._choose(request)
        return choice.own is not None or choice.reason == "short"

    def left_of(self, request_id: str, written: int, tokens: int) -> int | None:
        ledger, dropped = self._ledger, self._ledger.dropped(request_id)
        reached = ledger.windows(request_id) > 0 and ledger.uncompressed(request_id, written) < written - tokens
        return tokens - dropped if dropped and not reached else None


class BothScheduler(_WithBoth, KaraScheduler):
    """Synchronous."""


class BothAsyncScheduler(_WithBoth, KaraAsyncScheduler):
    """Asynchronous."""
