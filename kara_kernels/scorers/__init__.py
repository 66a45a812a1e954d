"""Named scores of the rows of a KV cache, for choosing which to keep. The highest are kept.

Every scorer takes :class:`Rows`, a window of a running sequence or a whole context, and returns float32 ``[L, H,
length]``. :func:`kara_kernels.ops.rank_rows` turns scores into an order that protects sinks and the newest rows, and
:func:`kara_kernels.compress_window` takes them as ``scores``.
"""

from collections.abc import Mapping
from types import MappingProxyType

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
    "NAMED", "Repetition", "Rows", "Scorer", "chunkkv", "compactor", "expected_attention", "h2o", "kara", "kara_mean",
    "kara_sampled", "keydiff", "knorm", "kvzip", "named", "random_per_head", "random_shared", "rkv", "snapkv",
    "streaming_llm", "tova",
]  # fmt: skip

NAMED: Mapping[str, Scorer] = MappingProxyType({
    "kara": kara, "kara_mean": kara_mean, "kara_sampled": kara_sampled, "compactor": compactor,
    "expected_attention": expected_attention, "kvzip": kvzip, "snapkv": snapkv, "keydiff": keydiff, "knorm": knorm,
    "h2o": h2o, "tova": tova, "rkv": rkv, "chunkkv": chunkkv, "streaming_llm": streaming_llm,
    "random": random_per_head, "random_shared": random_shared,
})  # fmt: skip
"""All scorers, by the names that command lines take."""


def named(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        ValueError: there is none, with the names that exist.
    """
    check_choice("scorer", name, tuple(NAMED))
    return NAMED[name]
