"""The engine-neutral shim: what a serving engine needs to switch Kara on. It imports no engine.

- :class:`Policy` holds the settings and checks them.
- :class:`Ledger` decides who is compressed when, and what happens to blocks and lengths (plan, commit).
- :class:`QueryRing` keeps the queries that score, in bounded memory.
- :func:`execute` moves the rows on any paged view. :class:`PackedCache` serves layouts that no strides describe, and
  :func:`warm_up` compiles the kernels beforehand.
- :class:`Compression` is the record of what one compression did.

An engine calls ``ledger.start`` when it first schedules a sequence, and ``ledger.forget`` when the sequence finishes,
is aborted or is preempted. Before every step it calls ``ledger.plan``, takes ``plan.touched`` out of its prefix cache,
calls ``ledger.commit``, returns ``plan.freed`` to its pool, and has every worker ``execute`` before anything is written
to a block. From then on a sequence's lengths and slots are its logical ones minus ``ledger.dropped``. Positions stay
logical. ``docs/engine.md`` shows it in thirty lines.
"""

from ..windows.events import Compression
from ..windows.execute import PackedCache, execute, warm_up
from ..windows.plan import Held, Ledger, Plan
from ..windows.policy import Policy
from ..windows.queries import QueryRing, Span, ring_bytes

__all__ = [
    "Compression", "Held", "Ledger", "PackedCache", "Plan", "Policy", "QueryRing", "Span", "execute", "ring_bytes",
    "warm_up",
]  # fmt: skip
