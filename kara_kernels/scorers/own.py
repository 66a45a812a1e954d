"""This library's own score of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_window
from ..ops import score_window
from ..options import Scoring
from ..values import CONTEXT_QUERIES, MAX_WINDOW
from .rows import Rows


def kara(
    rows: Rows, *, query: Any = None, scoring: Scoring = Scoring(), look_ahead: bool = True,  # noqa: B008, frozen
    query_rows: Tensor | None = None, window: int = MAX_WINDOW,
) -> Tensor:  # fmt: skip
    """This library's score with the recommended options, from queries turned ahead by the number of scored rows.

    :func:`kara_kernels.ops.score_window` takes windows of up to 4096 rows. Longer contexts are scored as the fewest
    windows of equal length (or one less), each by all queries: every window then receives as much attention as every
    other, and the scores of all compare. With half of the rows kept by :func:`kara_mean`, sixty texts of 768
    tokens lost 0.049 nats in one window and 0.052 in windows of 256 (``bench/results/contexts-frontier.md``). Each
    length of a window is compiled once on a GPU.

    Args:
        rows: what is scored. Without a rotary embedding, queries stay where they are.
        query: instead of ``rows.query``: what :func:`kara_kernels.ops.score_window` takes, for ``L`` layers and one
            sequence.
        scoring: other options.
        look_ahead: whether to look ahead.
        query_rows: int32 ``[1, N]``, as in :func:`kara_kernels.ops.score_window`.
        window: the longest window, ``1..4096`` rows.
    """
    device = rows.keys.device
    query = list(rows.query.flatten(2, 3)[:, None]) if query is None else query
    ahead = rows.ahead(rows.length, device) if look_ahead and rows.ahead is not None else None
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    windows = -(-rows.length // check_window(window))
    ends = [rows.start + rows.length * i // windows for i in range(windows + 1)]

    def score(first: int, last: int) -> Tensor:
        keys, values = (  # one block as long as the window
            [layer[:, first:last].transpose(0, 1)[None] for layer in of_all] for of_all in (rows.keys, rows.values)
        )
        return score_window(
            query, keys, zero[None], zero, last - first, scale=rows.scale, attention=scoring.attention,
            reduction=scoring.reduction, redundancy=scoring.redundancy,
            v_cache=None if scoring.value_norm is False else values, look_ahead=ahead, query_rows=query_rows,
        )[:, 0]  # fmt: skip

    return torch.cat([score(*ends[i : i + 2]) for i in range(windows)], -1)


def kara_mean(rows: Rows) -> Tensor:
    """:func:`kara` with ``reduction="mean"``. The two are close on whole contexts. Over sixty texts, this one has the
    lower median loss (0.021 against 0.022 nats with half of the rows, 0.071 against 0.091 with a quarter), but not the
    lower average (``bench/results/contexts-frontier.md``, "ours (mean)" and "ours")."""
    return kara(rows, scoring=Scoring(reduction="mean"))


def kara_sampled(rows: Rows) -> Tensor:
    """:func:`kara_mean` by at most 128 queries, the last of every ``ceil(N / 128)``.

    An engine records so many while it computes a prompt. ``rows.query`` may hold any of the context's queries, in their
    order.
    """
    stride = -(-rows.query.shape[1] // CONTEXT_QUERIES)
    return kara_mean(replace(rows, query=rows.query[:, stride - 1 :: stride]) if stride > 1 else rows)
