"""Repeats an event whose arguments differ from those of an earlier one in addresses and contents alone.

Checks, layout and launches follow from shapes, dtypes, strides, alignments and options: the metadata of a call. An
engine's calls have few kinds of it, so its :class:`~kara_kernels.PagedCache` keeps the launches of each kind. A
repetition allocates the results and launches compiled kernels, which takes a tenth of an ordinary call's host time.
Always ordinary are lists of queries, given scores, dry runs, and calls whose contents are checked.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import FP8_DTYPES, contents_are_checked
from ..ops._triton import Launch, launch_again
from ..packed import PackedQueries
from ..paged import Layers, PagedCache
from .request import reduced_scores

Results = tuple[Tensor, Tensor, Tensor, Tensor]
MOST = 256  # kinds of calls that a cache keeps

_VARYING = frozenset({
    "q_ptr", "q_scales_ptr", "query_rows_ptr", "k_scale_ptr", "cos_ptr", "sin_ptr", "block_tables_ptr", "stride_t_s",
    "starts_ptr", "seq_lens_ptr", "protected_ptr", "partials_ptr", "scores_ptr", "indices_ptr", "keep_ptr",
    "new_lens_ptr", "frontiers_ptr",
})  # fmt: skip
_GIVEN = ("window_starts", "protected_lens", "query_rows")


def kind_of(
    query: Any, k_cache: Any, v_cache: Any, block_tables: Tensor, seq_lens: Tensor, backend: str, given: dict[str, Any]
) -> Hashable | None:
    """The metadata of a call of :func:`kara_kernels.compress_window`, or None if it cannot be repeated.

    Nothing is checked here. A call that raises an error is never kept, and equal kinds raise equal errors. Types of
    numbers are part of it, because True equals 1 and 256.0 equals 256.
    """
    pool = k_cache.pool if isinstance(k_cache, Layers) else None
    if pool is None or pool.v is not v_cache or contents_are_checked(k_cache[0].device):
        return None
    if given["scores"] is not None or given["dry_run"] is not False:
        return None
    options, hook = given["options"], given["reduce_scores"]
    try:
        parts = tuple(query) if query.__class__ is PackedQueries else (query,)
        count, width = block_tables.shape  # the width differs from call to call
        unit = block_tables.stride(1)
        tensors = [*parts, seq_lens, *[given[name] for name in _GIVEN]]
        numbers = [given["window"], given["keep"], given["scale"], *options.values()]
        for value in (given["k_scale"], *(given["look_ahead"] or ())):
            (tensors if isinstance(value, Tensor) else numbers).append(value)
        return (
            backend, None if hook is None else callable(hook), len(parts), *[part.data_ptr() & 15 for part in parts],
            count, width if unit != 1 else 0, unit, block_tables.dtype, block_tables.device,
            *[None if t is None else (t.shape, t.dtype, t.device, t.stride()) for t in tensors],
            *options, *numbers, *map(type, numbers),
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError, RuntimeError):  # not tensors
        return None


def kept_event(k_cache: Any, kind: Hashable) -> Event | None:
    """The event of this kind that the pool of ``k_cache`` keeps."""
    try:
        return k_cache.pool.events.get(kind)
    except TypeError:  # an option that cannot be hashed, which its check refuses
        return None


def keep_event(cache: PagedCache, kind: Hashable, event: Event) -> None:
    if len(cache.events) >= MOST:
        cache.events.clear()
    cache.events[kind] = event


class Event:
    """The launches of a call, for other calls of its kind."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        *scoring, selection, compaction = launches
        scored, selected = scoring[0].arguments, selection.arguments
        self._partials, self._scores, self._indices = (
            (tuple(made.shape), made.stride())  # as tuples, which PyTorch reads faster
            for made in (scored["partials_ptr"], selected["scores_ptr"], selected["indices_ptr"])
        )
        self._device = selected["indices_ptr"].device
        self._pools = len(scoring) > 1
        self._scoring = [launch.again(_VARYING) for launch in scoring]
        self._moving = [launch.again(_VARYING) for launch in (selection, compaction)]
        layers, sequences, heads = scored["partials_ptr"].shape[:3]
        self._shape = layers, sequences, heads, -1

    def __call__(self, query: Any, block_tables: Tensor, seq_lens: Tensor, given: dict[str, Any]) -> Results:
        """``(seq_lens, keep_indices, scores, frontiers)``. The arguments are those of :func:`kind_of`."""
        codes, scales = query if query.__class__ is PackedQueries else (query, None)
        cos, sin, *_ = given["look_ahead"] or (None, None)
        new_lens, frontiers = torch.empty_like(seq_lens), torch.empty_like(seq_lens)
        indices = seq_lens.new_empty_strided(*self._indices)
        partials, scores = (
            seq_lens.new_empty_strided(*made, dtype=torch.float32) for made in (self._partials, self._scores)
        )
        values = {
            "q_ptr": codes.view(torch.uint8) if codes.dtype in FP8_DTYPES else codes, "q_scales_ptr": scales,
            "query_rows_ptr": given["query_rows"], "k_scale_ptr": given["k_scale"], "cos_ptr": cos, "sin_ptr": sin,
            "block_tables_ptr": block_tables, "stride_t_s": block_tables.stride(0), "seq_lens_ptr": seq_lens,
            "starts_ptr": given["window_starts"], "protected_ptr": given["protected_lens"],
            "partials_ptr": partials, "scores_ptr": scores, "indices_ptr": indices, "keep_ptr": indices,
            "new_lens_ptr": new_lens, "frontiers_ptr": frontiers,
        }  # fmt: skip
        launch_again(self._scoring, self._device, values)
        if self._pools:
            scores = reduced_scores(given["reduce_scores"], scores)
            if not scores.is_contiguous() or scores.data_ptr() & 15:  # as the launches read them
                scores = torch.empty(scores.shape, dtype=scores.dtype, device=self._device).copy_(scores)
            values["partials_ptr"] = values["scores_ptr"] = scores
            indices, scores = indices.expand(self._shape), scores.expand(self._shape)
        launch_again(self._moving, self._device, values)
        return new_lens, indices, scores, frontiers
