"""compress_window as an operator of PyTorch, for graphs that `torch.compile` makes.

Dynamo cannot look into checks that read addresses, nor need it: under `torch.compile` the call becomes one node that
changes the caches in place. Eager calls never come here: an operator's dispatch costs more than the call's own checks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCHEMA = (
    "compress_window(Tensor? query, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor block_tables, Tensor seq_lens, *, "
    "int window, int keep, Tensor? scores, Tensor? window_starts, Tensor? protected_lens, float chunk_fraction, "
    "int max_chunk, str attention, str reduction, bool value_norm, str pool, float redundancy, float? scale, "
    "float? k_scale, Tensor? k_scales, str backend) -> (Tensor, Tensor, Tensor)"
)

library = torch.library.Library("kara_kernels", "DEF")
library.define(SCHEMA)


def implement(compress_window: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """What the node runs; called once, by the module that has it."""

    def run(query, k_cache, v_cache, block_tables, seq_lens, *, k_scale, k_scales, scores, **options):
        lengths, keep_indices, pooled = compress_window(
            query, k_cache, v_cache, block_tables, seq_lens, scores=scores,
            k_scale=k_scale if k_scales is None else k_scales, **options,
        )  # fmt: skip
        # An operator's results are tensors of their own: no expanded views, nothing of the caller's.
        return lengths, keep_indices.contiguous(), (pooled if scores is None else pooled.clone()).contiguous()

    library.impl("compress_window", run, "CompositeExplicitAutograd")


@torch.library.register_fake("kara_kernels::compress_window", lib=library)
def _shapes(query, k_cache, v_cache, block_tables, seq_lens, *, window, keep, **options):
    lists = (*k_cache.shape[:-4], block_tables.shape[0], k_cache.shape[-2])
    return (
        torch.empty_like(seq_lens),
        seq_lens.new_empty(*lists, keep),
        seq_lens.new_empty(*lists, window, dtype=torch.float32),
    )


def in_graph(
    query: object, k_cache: object, v_cache: object, block_tables: Tensor, seq_lens: Tensor, *, k_scale: object,
    reduce_scores: object, **options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The node of a graph. Tensors alone can be seen through by a compiler: lists and pools raise TypeError."""
    for name, value in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor under torch.compile, for many layers one stacked [L, ...]")
    if reduce_scores is not None:
        raise TypeError("reduce_scores: expected None under torch.compile, got a callable")
    scales = (None, k_scale) if isinstance(k_scale, Tensor) else (k_scale, None)
    return torch.ops.kara_kernels.compress_window(
        query, k_cache, v_cache, block_tables, seq_lens, k_scale=scales[0], k_scales=scales[1], **options
    )
