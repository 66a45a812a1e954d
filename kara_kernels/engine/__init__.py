"""The engine-neutral shim: everything a serving engine needs to use Kara. It imports no engine.

- :class:`Policy` holds the settings and checks them.
- :class:`Ledger` decides which sequence is compressed when, and tracks blocks and lengths (plan, commit).
- :class:`QueryRing` records the queries used for scoring, in bounded memory.
- :func:`execute` moves the rows in any paged view. :class:`PackedCache` supports layouts that strides cannot describe,
  and :func:`warm_up` compiles the kernels in advance.
- :class:`Compression` is the record of one compression, and :class:`Losses` measures what it lost, which the guard of
  ``policy.max_loss`` acts on.

An engine calls ``ledger.start`` when it first schedules a sequence, and ``ledger.forget`` when the sequence finishes,
is aborted or is preempted. Before every step it calls ``ledger.plan``, removes ``plan.touched`` from its prefix cache,
calls ``ledger.commit``, returns ``plan.freed`` to its pool, and has every worker call ``execute`` before anything is
written to a block. From then on a sequence's lengths and slots are its logical ones minus ``ledger.dropped``. Positions
stay logical. ``docs/engine.md`` shows this in thirty lines.
"""

from ..paged import PackedCache
from ..windows.events import Compression
from ..windows.execute import execute, warm_up
from ..windows.ledger import Ledger
from ..windows.loss import Loss, Losses, lost_share, needed_tokens
from ..windows.plan import Held, Plan
from ..windows.policy import Policy
from ..windows.queries import QueryRing, Span, check_ring, fit_queries, ring_bytes

__all__ = [
    "Compression", "Held", "Ledger", "Loss", "Losses", "PackedCache", "Plan", "Policy", "QueryRing", "Span",
    "check_ring", "execute", "fit_queries", "lost_share", "needed_tokens", "ring_bytes", "warm_up",
]  # fmt: skip
