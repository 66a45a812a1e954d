"""Named scores of the rows of a KV cache, for choosing which to keep. The highest are kept.

Every scorer takes :class:`Rows`, a window of a running sequence or a whole context, and returns float32 ``[L, H,
length]``. :func:`kara_kernels.ops.rank_rows` turns scores into an order that protects sinks and the newest rows, and
:func:`kara_kernels.compress_window` takes them as ``scores``.

A package adds its own with an entry point of the group ``kara_kernels.scorers``: its name is the scorer's, and it loads
a :data:`Scorer` or an :class:`Entry`.
"""

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import NamedTuple

from ..values import check_choice
from .own import kara, kara_mean, kara_sampled
from .published import (  # fmt: skip
    chunkkv,
    compactor,
    expected_attention,
    h2o,
    keydiff,
    knorm,
    kvzip,
    random_per_head,
    random_shared,
    rkv,
    snapkv,
    streaming_llm,
    tova,
)
from .rows import Repetition, Rows, Scorer

__all__ = [
    "GROUP", "NAMED", "NEEDS", "REGISTRY", "Entry", "Repetition", "Rows", "Scorer", "chunkkv", "compactor",
    "expected_attention", "h2o", "kara", "kara_mean", "kara_sampled", "keydiff", "knorm", "kvzip", "named",
    "random_per_head", "random_shared", "registered", "rkv", "snapkv", "streaming_llm", "tova",
]  # fmt: skip

GROUP = "kara_kernels.scorers"
NEEDS = ("rows", "queries", "every query", "context")


class Entry(NamedTuple):
    """A scorer, and what it needs."""

    scorer: Scorer
    needs: str = "queries"
    """``"rows"``: keys and values. ``"queries"``: those of some of the newest tokens, too. ``"every query"``: those of
    all scored rows. ``"context"``: more than a window of a running sequence has."""
    paper: str = ""
    """Where it was published, as an arXiv number."""


REGISTRY: Mapping[str, Entry] = MappingProxyType({
    "kara": Entry(kara, "queries", "2607.01237"),
    "kara_mean": Entry(kara_mean, "context", "2607.01237"),
    "kara_sampled": Entry(kara_sampled, "context", "2607.01237"),
    "compactor": Entry(compactor, "every query", "2507.08143"),
    "expected_attention": Entry(expected_attention, "context", "2510.00636"),
    "kvzip": Entry(kvzip, "context", "2505.23416"),
    "snapkv": Entry(snapkv, "queries", "2404.14469"),
    "keydiff": Entry(keydiff, "rows", "2504.15364"),
    "knorm": Entry(knorm, "rows", "2406.11430"),
    "h2o": Entry(h2o, "queries", "2306.14048"),
    "tova": Entry(tova, "queries", "2401.06104"),
    "rkv": Entry(rkv, "queries", "2505.24133"),
    "chunkkv": Entry(chunkkv, "queries", "2502.00299"),
    "streaming_llm": Entry(streaming_llm, "rows", "2309.17453"),
    "newest": Entry(streaming_llm, "rows", "2309.17453"),
    "random": Entry(random_per_head, "rows", "2609.03430"),
    "random_shared": Entry(random_shared, "context"),
})  # fmt: skip
"""This library's scorers, by the names that command lines and servers take."""
NAMED: Mapping[str, Scorer] = MappingProxyType({name: entry.scorer for name, entry in REGISTRY.items()})


def named(name: str) -> Scorer:
    """The scorer of that name. Raises the errors of :func:`registered`."""
    return registered(name).scorer


@functools.cache
def registered(name: str) -> Entry:
    """The scorer of that name and what it needs: one of the :data:`REGISTRY`, or of an installed package.

    Raises:
        ValueError: there is none, with the names that exist; or the entry point has no scorer.
    """
    if isinstance(name, str) and name in REGISTRY:
        return REGISTRY[name]
    others = {point.name: point for point in entry_points(group=GROUP)}
    check_choice("scorer", name, (*REGISTRY, *others))
    try:
        loaded = others[name].load()
    except Exception as error:
        raise ValueError(f"scorer: expected entry point {others[name].value} to load, got {error!r}") from error
    entry = loaded if isinstance(loaded, Entry) else Entry(loaded)
    if not callable(entry.scorer) or entry.needs not in NEEDS:
        raise ValueError(f"scorer: expected a scorer or an Entry in {others[name].value}, got {loaded!r}")
    return entry
