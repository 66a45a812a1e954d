"""Windows and contexts in one engine: schedulers that do both.

Neither room knows the other, because they never meet in a block. A context is whole blocks of a prompt without its last
token. Windows begin behind the prompt. So no plan rewrites or frees what a store reads, and a context can be stored
whole from a request that has lost rows. Rows out of a packet are as many as their tokens, so nothing is dropped when a
request is admitted.
"""

from __future__ import annotations

from .contexts.scheduler import WithContexts
from .windows.scheduler import KaraAsyncScheduler, KaraScheduler


class BothScheduler(WithContexts, KaraScheduler):
    """Synchronous."""


class BothAsyncScheduler(WithContexts, KaraAsyncScheduler):
    """Asynchronous."""
