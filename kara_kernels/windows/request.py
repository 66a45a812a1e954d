"""The arguments of one compression: those of scoring, selecting and moving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..arguments import ScoreArguments, check_contents, check_scoring, check_windows
from ..checks import check_tensor, check_unit_stride, contents_are_checked
from ..options import Selection, split_options
from ..packed import Queries
from ..values import check_count, check_flag

ReduceScores = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Request(ScoreArguments):
    """Checked arguments of :func:`kara_kernels.compress_window`. Shapes are the same, always with a leading ``L``."""

    seq_lens: Tensor
    keep: int
    scores: Tensor | None  # [L, S, H, W]
    selection: Selection
    reduce_scores: ReduceScores | None
    dry_run: bool

    @property
    def lists(self) -> tuple[int, int, int]:
        """The number of keep lists as ``(L, S, H)``, with extent 1 for pooled dimensions."""
        layers, heads, pool = len(self.cache.k), self.cache.shape[2], self.selection.pool
        return 1 if pool == "model" else layers, self.seq_lens.shape[0], heads if pool == "head" else 1

    @property
    def chunk_budget(self) -> int:
        return self.selection.chunk_budget(self.keep)

    def windows(self) -> tuple[Tensor, Tensor]:
        """``(starts int32 [S], fits bool [S])``."""
        starts = self.seq_lens - self.window if self.window_starts is None else self.window_starts
        # Nothing is added to a start, because a value near 2^31 would wrap around and seem to fit.
        fits = (starts >= 0) & (self.seq_lens >= self.window) & (starts <= self.seq_lens - self.window)
        return starts, fits if self.protected_lens is None else fits & (starts >= self.protected_lens)

    def lengths(self, starts: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
        """int32 ``[S]`` each: lengths and frontiers after the compression of :meth:`windows`."""
        protected = torch.zeros_like(starts) if self.protected_lens is None else self.protected_lens.clamp(min=0)
        shorter = self.seq_lens - (self.window - self.keep)
        return torch.where(fits, shorter, self.seq_lens), torch.where(fits, starts + self.keep, protected)

    def reduced(self, scores: Tensor) -> Tensor:
        """``scores [L, S, H, W]`` after the hook, which sees no ``L`` if the caller gave one layer."""
        if self.many:
            return reduced_scores(self.reduce_scores, scores)
        return reduced_scores(self.reduce_scores, scores[0])[None]

    def require_kernel_layout(self) -> None:
        """Raises an error for strides that kernels cannot read."""
        super().require_kernel_layout()
        if self.scores is not None:
            check_unit_stride("scores", self.scores)


def reduced_scores(hook: ReduceScores | None, scores: Tensor) -> Tensor:
    """Applies the caller's hook between pooling and selection, which may work in place and return None."""
    reduced = None if hook is None else hook(scores)
    if reduced is None:
        return scores
    check_tensor("reduce_scores(...)", reduced, scores.shape, (torch.float32,), scores.device)
    check_unit_stride("reduce_scores(...)", reduced)
    return reduced


def check_request(
    query: Queries | None, k_cache: Tensor | Sequence[Tensor], v_cache: Tensor | Sequence[Tensor] | None,
    block_tables: Tensor, seq_lens: Tensor, *, window: int, keep: int, scores: Tensor | None,
    window_starts: Tensor | None, protected_lens: Tensor | None, query_rows: Tensor | None, scale: float | None,
    k_scale: float | Tensor | None, look_ahead: LookAhead | None, reduce_scores: ReduceScores | None,
    dry_run: bool, options: Mapping[str, Any],
) -> Request:  # fmt: skip
    """Checks the arguments of :func:`kara_kernels.compress_window` except the backend, before anything is written."""
    scoring, selection = split_options(options)
    lengths = {"seq_lens": seq_lens, "window_starts": window_starts, "protected_lens": protected_lens}
    given = {name: value for name, value in lengths.items() if value is not None or name == "seq_lens"}
    queries, where = check_windows(query, k_cache, v_cache, block_tables, window, query_rows, **given)
    check_count("keep", keep, 1, window)
    check_flag("dry_run", dry_run)
    if reduce_scores is not None and not callable(reduce_scores):
        raise TypeError(f"reduce_scores: expected a callable, got {type(reduce_scores).__name__}")
    if scores is not None:
        cache = where["cache"]
        shape = (len(cache.k), seq_lens.shape[0], cache.shape[2], window)[0 if where["many"] else 1 :]
        check_tensor("scores", scores, shape, (torch.float32,), seq_lens.device)
        scores = scores if where["many"] else scores[None]
    by = check_scoring(queries, where, query_rows, scale, k_scale, look_ahead, scoring, scores)
    request = Request(
        **where, **by, keep=keep, scores=scores, selection=selection, reduce_scores=reduce_scores, dry_run=dry_run
    )
    if contents_are_checked(seq_lens.device):
        starts, fits = request.windows()
        # A sequence with a negative default start is shorter than its window and skipped. A negative given start is an
        # error.
        named = fits if window_starts is None else fits | (window_starts < 0)
        check_contents(request, starts, torch.where(fits, seq_lens, starts), named)
    return request
