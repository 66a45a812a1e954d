"""compress_window as a PyTorch operator, for graphs of `torch.compile`.

Dynamo cannot trace checks that read addresses. Under `torch.compile` the call therefore becomes one node that changes
the caches in place. Eager calls do not use it, because dispatching an operator costs more than the call's own checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..options import OPTIONS
from .request import check_request
from .run import run

_KINDS = {"str": "str", "int": "int", "float": "float", "bool | None": "bool?"}
SCHEMA = (
    "compress_window(Tensor? query, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor block_tables, Tensor seq_lens, *, "
    "int window, int keep, Tensor? scores, Tensor? window_starts, Tensor? protected_lens, Tensor? query_rows, "
    "float? scale, float? k_scale, Tensor? k_scales, Tensor? cos, Tensor? sin, bool interleaved, str backend, "
    + ", ".join(f"{_KINDS[str(option.type)]} {name}" for name, option in OPTIONS.items())
    + ") -> (Tensor, Tensor, Tensor, Tensor)"
)
_DEFAULTS = {name: option.default for name, option in OPTIONS.items()}

library = torch.library.Library("kara_kernels", "DEF")
library.define(SCHEMA)


@torch.library.impl(library, "compress_window", "CompositeExplicitAutograd")
def _run(
    query: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, block_tables: Tensor, seq_lens: Tensor, *,
    scores: Tensor | None, k_scale: float | None, k_scales: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, backend: str, **given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given |= {"k_scale": k_scale if k_scales is None else k_scales, "reduce_scores": None, "dry_run": False}
    given["look_ahead"] = None if cos is None or sin is None else LookAhead(cos, sin, interleaved)
    options = {name: given.pop(name) for name in OPTIONS}
    request = check_request(query, k_cache, v_cache, block_tables, seq_lens, scores=scores, options=options, **given)
    lengths, keep_indices, pooled, frontiers = run(request, backend)
    # An operator must return new tensors: no expanded views, and none of the caller's tensors.
    pooled = pooled if scores is None else pooled.clone()
    return lengths, keep_indices.contiguous(), pooled.contiguous(), frontiers


@torch.library.register_fake("kara_kernels::compress_window", lib=library)
def _shapes(
    query: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, block_tables: Tensor, seq_lens: Tensor, *,
    window: int, keep: int, **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lists = (*k_cache.shape[:-4], block_tables.shape[0], k_cache.shape[-2])
    return (
        torch.empty_like(seq_lens), seq_lens.new_empty(*lists, keep),
        seq_lens.new_empty(*lists, window, dtype=torch.float32), torch.empty_like(seq_lens),
    )  # fmt: skip


def in_graph(
    query: object, k_cache: object, v_cache: object, block_tables: Tensor, seq_lens: Tensor, *, k_scale: object,
    look_ahead: LookAhead | None, reduce_scores: object, dry_run: bool, options: Mapping[str, Any], **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The node of a graph. A compiler can only trace tensors, so lists and pools raise TypeError."""
    for name, value in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected a tensor under torch.compile, for many layers one stacked [L, ...], got "
                f"{type(value).__name__}"
            )
    if reduce_scores is not None:
        raise TypeError("reduce_scores: expected None under torch.compile, got a callable")
    if dry_run:
        raise TypeError("dry_run: expected False under torch.compile, because the node is known to write, got True")
    scales = (None, k_scale) if isinstance(k_scale, Tensor) else (k_scale, None)
    cos, sin, interleaved = (None, None, False) if look_ahead is None else LookAhead(*look_ahead)
    return torch.ops.kara_kernels.compress_window(
        query, k_cache, v_cache, block_tables, seq_lens, k_scale=scales[0], k_scales=scales[1], cos=cos, sin=sin,
        interleaved=interleaved,
        **others, **{**_DEFAULTS, **options},
    )  # fmt: skip
