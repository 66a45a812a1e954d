"""The engine-neutral shim: what a serving engine needs to switch Kara on, with no engine imported.

- :class:`Policy`: settings, checked.
- :class:`Ledger`: who is compressed when, and what happens to blocks and lengths (plan, commit).
- :class:`QueryRing`: the queries that score, in bounded memory.
- :func:`execute`: moves the rows, on any paged view; :class:`PackedCache` for layouts that no strides describe;
  :func:`warm_up`: compiles it before.
- :class:`Compression`: the record of what one did.

An engine calls ``ledger.start`` when a sequence is scheduled first and ``ledger.forget`` when it finishes, is aborted
or preempted; before every step ``ledger.plan``, takes ``plan.touched`` out of its prefix cache, ``ledger.commit``,
returns ``plan.freed`` to its pool and has every worker ``execute`` before anything is written to a block. From then on
lengths and slots of a sequence are its logical ones minus ``ledger.dropped``; positions stay logical. The README shows
it in twenty lines.
"""

from ..windows.events import Compression
from ..windows.execute import PackedCache, execute, warm_up
from ..windows.plan import Held, Ledger, Plan
from ..windows.policy import Policy
from ..windows.queries import QueryRing, Span, ring_bytes

__all__ = [
    "Compression",
    "Held",
    "Ledger",
    "PackedCache",
    "Plan",
    "Policy",
    "QueryRing",
    "Span",
    "execute",
    "ring_bytes",
    "warm_up",
]
