"""Order of all rows of a context, best first. See Rank in ``docs/method.md``."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_scores
from ..values import check_count
from .select import by_rows, order_keys, unique_rank

MOST_ROWS = 1 << 25  # a grid has 65,535 tiles of 1,024 rows


def rank_rows(scores: Tensor, *, sinks: int = 4, newest: int = 32) -> Tensor:
    """The first ``sinks`` rows, the ``newest``, both in position order, then the others by descending score.

    ``scores`` is float32 ``[..., C]``, ``C`` up to 2^25. Returns int32 ``[..., C]``, a permutation of each row. Exact
    for any bit pattern: ties to the lower position, NaN ranks as -inf, -0.0 equals +0.0. Raises TypeError or ValueError
    for a wrong dtype or count.
    """
    check_scores(scores, MOST_ROWS)
    check_count("sinks", sinks, 0, MOST_ROWS)
    check_count("newest", newest, 0, MOST_ROWS)
    return ranked_rows(scores, sinks, newest)


def ranked_rows(scores: Tensor, sinks: int, newest: int) -> Tensor:
    """:func:`rank_rows` without checks."""

    def ranked(rows: Tensor) -> Tensor:
        keys = order_keys(rows)
        for protected in (slice(0, sinks), slice(max(0, width - newest), width)):
            keys[:, protected] = 0x7FFFFFFF  # the key of infinity is 0x7F800000; among these, positions decide
        return unique_rank(keys).argsort(dim=-1, descending=True).int()

    width = scores.shape[-1]
    return by_rows(ranked, scores, width)
