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

SINKS = 4  # first rows that every window of several begins with


def kara(
    rows: Rows, *, query: Any = None, scoring: Scoring = Scoring(), look_ahead: bool = True,  # noqa: B008, frozen
    query_rows: Tensor | None = None, window: int = MAX_WINDOW,
) -> Tensor:  # fmt: skip
    """This library's score with the recommended options, from queries turned ahead by the number of scored rows.

    :func:`kara_kernels.ops.score_window` takes up to 4096 rows. More are scored as the fewest windows of one length,
    evenly spread, each by all queries. Every window begins with the first four rows, because models attend to these
    most: in a window without them the others would receive their share, too, and rank above equal rows of the first
    window. Where windows overlap, rows have their scores in the last. With half of the rows kept by :func:`kara_mean`,
    sixty texts of 768 tokens lost 0.049 nats in one window and 0.060 in windows of 256
    (``bench/results/contexts-frontier.md``). Each length of a window is compiled once on a GPU.

    Args:
        rows: what is scored. Without a rotary embedding, queries stay where they are.
        query: instead of ``rows.query``: what :func:`kara_kernels.ops.score_window` takes, for ``L`` layers and one
            sequence.
        scoring: other options.
        look_ahead: whether to look ahead.
        query_rows: int32 ``[1, N]``, as in :func:`kara_kernels.ops.score_window`.
        window: the longest window, ``1..4096`` rows.
    """
    query = list(rows.query.flatten(2, 3)[:, None]) if query is None else query
    ahead = rows.ahead(rows.length, rows.keys.device) if look_ahead and rows.ahead is not None else None
    zero = rows.keys.new_zeros(1, dtype=torch.int32)
    width = min(rows.length, check_window(window))
    sinks = min(SINKS, width - 1)
    rest, gaps = rows.length - width, -(-(rows.length - width) // (width - sinks))
    steps = [rest * i // max(1, gaps) for i in range(gaps + 1)]  # of windows, from the first

    def score(step: int, to: int) -> Tensor:
        places = torch.arange(rows.start, rows.start + width, device=zero.device)
        places[sinks:] += step
        keys, values = ([layer[:, places].transpose(0, 1)[None] for layer in of] for of in (rows.keys, rows.values))
        return score_window(
            query, keys, zero[None], zero, width, scale=rows.scale, attention=scoring.attention,
            reduction=scoring.reduction, redundancy=scoring.redundancy,
            v_cache=None if scoring.value_norm is False else values, look_ahead=ahead, query_rows=query_rows,
        )[:, 0, :, sinks if step else 0 : sinks + to - step]  # fmt: skip

    return torch.cat(list(map(score, steps, [*steps[1:], rows.length - sinks])), -1)


def kara_mean(rows: Rows) -> Tensor:
    """:func:`kara` with ``reduction="mean"``. The two are close on whole contexts. Over sixty texts, this one has the
    lower median loss (0.021 against 0.022 nats with half of the rows, 0.071 against 0.091 with a quarter), but not the
    lower average (``bench/results/contexts-frontier.md``, "ours (mean)" and "ours")."""
    return kara(rows, scoring=Scoring(reduction="mean"))


def kara_sampled(rows: Rows) -> Tensor:
    """:func:`kara_mean` by at most 128 queries, the last of every ``ceil(N / 128)``, in windows of a power of two.

    An engine records so many while it computes a prompt. ``rows.query`` may hold any of the context's queries, in their
    order. Contexts of any length share a few lengths of windows, so that a server can compile all of them beforehand.
    """
    stride = max(1, -(-rows.query.shape[1] // CONTEXT_QUERIES))
    rows = replace(rows, query=rows.query[:, stride - 1 :: stride])
    return kara(rows, scoring=Scoring(reduction="mean"), window=1 << min(rows.length, MAX_WINDOW).bit_length() - 1)
