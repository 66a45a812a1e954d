"""One call that scores, selects and compacts a window: the only orchestration in this library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_contents, check_query, check_scoring, check_values, key_scales
from ..checks import (
    check_block_tables,
    check_choice,
    check_count,
    check_flag,
    check_lengths,
    check_number,
    check_tensor,
    check_unit_stride,
    check_window,
    contents_are_checked,
)
from ..ops._triton import resolve_backend
from ..ops.chunks import launch_keep
from ..ops.compact import launch_compact
from ..ops.pool import PartialRows, launch_pool
from ..ops.score import launch_score, plan_score
from ..paged import Layers, PagedCache, per_layer
from ..reference.chunks import expand_chunks
from ..reference.compact import compact_sequence
from ..reference.score import score_sequence
from .graph import implement, in_graph

POOLS = ("head", "layer", "model")


class CompressedWindow(NamedTuple):
    """What :func:`compress_window` did. With many layers the last two carry a leading ``L``."""

    seq_lens: Tensor
    """int32 ``[S]``: new physical lengths; unchanged for a skipped sequence."""
    keep_indices: Tensor
    """int32 ``[S, H, K]``: kept positions relative to the window, ascending; all -1 for a skipped sequence."""
    scores: Tensor
    """float32 ``[S, H, W]``: the scores that were selected from, after pooling; zero for a skipped sequence unless
    given."""


@dataclass(frozen=True)
class _Request:
    """Checked arguments in one form, many layers or one."""

    query: Layers | None
    cache: PagedCache
    block_tables: Tensor
    seq_lens: Tensor
    window: int
    keep: int
    scores: Tensor | None  # [L, S, H, W]
    window_starts: Tensor | None
    protected_lens: Tensor | None
    chunk_budget: int
    max_chunk: int
    attention: str
    reduction: str
    value_norm: bool
    pool: str
    redundancy: float
    scale: float
    k_scale: float | Tensor
    reduce_scores: Callable[[Tensor], Tensor] | None
    many: bool

    @property
    def lists(self) -> tuple[int, int, int]:
        """How many keep lists there are, as ``[L, S, H]`` with extent 1 where scores are pooled."""
        layers, heads = len(self.cache.k), self.cache.shape[2]
        return 1 if self.pool == "model" else layers, len(self.seq_lens), heads if self.pool == "head" else 1


def compress_window(
    query: Tensor | Sequence[Tensor] | None,
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor] | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    window: int,
    keep: int,
    scores: Tensor | None = None,
    window_starts: Tensor | None = None,
    protected_lens: Tensor | None = None,
    chunk_fraction: float = 0.3,
    max_chunk: int = 8,
    attention: str = "bidirectional",
    reduction: str = "mean",
    value_norm: bool = False,
    pool: str = "head",
    redundancy: float = 0.0,
    scale: float | None = None,
    k_scale: float | Tensor | None = None,
    reduce_scores: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> CompressedWindow:
    """Score a window of every sequence, keep ``keep`` of its tokens, and move what follows up behind them, in place.

    For a paged KV cache of one layer or of all layers at once: three kernel launches whatever ``L`` and ``S`` (a
    fourth where scores are pooled or reduced), no device-to-host synchronisation, no allocation that depends on
    contents. On the CPU the same by vectorised PyTorch, in slices, with at most 256 MB beside the result.

    Args:
        query: post-RoPE queries ``[S, N, H*G, D]`` float16, bfloat16 or float32, in any order; those of tokens
            behind the window may be among them and make good judges. For many layers ``[L, S, N, H*G, D]`` or ``L``
            tensors. None with ``scores``.
        k_cache: ``[B, P, H, D]``, or ``L`` of them, or ``PagedCache.k``. Any strides; the Triton path needs the last
            to be 1 and one set of strides for all layers. float16, bfloat16, float32 or float8; with ``scores`` any
            dtype of 1, 2, 4 or 8 bytes.
        v_cache: the same with ``Dv``, or None for caches with one latent tensor (MLA).
        block_tables: int32 ``[S, max_blocks]``: physical token ``t`` of sequence ``s`` lies in block
            ``block_tables[s, t // P]``, row ``t % P``. May be a narrowed view.
        seq_lens: int32 ``[S]``, **physical** lengths in tokens.
        window: ``W``, tokens that are compressed, up to 4096.
        keep: ``K``, tokens of them that stay, ``1 <= keep <= window``.
        scores: float32 ``[S, H, W]`` (``[L, S, H, W]``) to select by instead of scoring: any policy can be plugged
            in.
        window_starts: int32 ``[S]``, physical index of the first window token; ``seq_lens - window`` by default.
            What lies behind the window is the tail, which stays whole and moves up.
        protected_lens: int32 ``[S]``, physical tokens that may not be compressed (the prompt); 0 by default.
        chunk_fraction: share of ``keep`` that Token2Chunk may spend on gaps, ``0..1``; the budget is
            ``min(round(chunk_fraction * keep), keep - 1)``, see :func:`kara_kernels.ops.expand_chunks`. 0 is plain
            top-k.
        max_chunk: longest span that counts as a chunk, in tokens, ends included.
        attention: ``"bidirectional"``, or ``"causal"`` as an ablation; see :func:`kara_kernels.ops.score_window`.
        reduction: how the queries' attention is put together: their ``"mean"``, or ``"rms"``; see
            :func:`kara_kernels.ops.score_window`.
        value_norm: weigh each key by the Euclidean length of its value. Needs ``v_cache``.
        pool: how many keep lists there are: ``"head"`` (one per layer and KV head), ``"layer"`` (mean over heads) or
            ``"model"`` (mean over heads and layers: one per sequence).
        redundancy: weight of similarity to other keys, subtracted from the score; see
            :func:`kara_kernels.ops.score_window`.
        scale: of the logits, ``1/sqrt(D)`` by default.
        k_scale: factor on the keys of an fp8 cache; float or tensor, see :func:`kara_kernels.ops.score_window`.
        reduce_scores: called with the pooled scores before selection, for example to all-reduce them over
            tensor-parallel ranks. Gets and returns float32 ``[L, S, H, W]`` with extent 1 where pooled, without
            ``L`` for one layer. May work in place and return None; with ``scores`` and ``pool="head"`` it is handed
            the caller's own tensor.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        :class:`CompressedWindow`. A sequence whose window does not fit, ``window_start < protected_len`` or
        ``window_start + window > seq_len``, is skipped: nothing of it changes, its ``keep_indices`` are -1. That is
        decided on the device, so batches of mixed lengths need no host work. Pooled results are expanded views.

    Raises:
        TypeError, ValueError: before anything is written, naming argument, expected and got.

    Not checked on a GPU, unless ``KARA_KERNELS_DEBUG=1`` (it costs a synchronisation): used block ids in ``0..B-1``,
    lengths within the table's capacity, starts of 0 or more, and that no two sequences share a block from their
    windows on.
    Blocks that other sequences or a prefix cache still read must not be written: that is the engine's to know.

    Before serving, call it once with ``seq_lens`` of zeros: every sequence is skipped and every kernel compiled;
    batch, lengths, ``N`` and ``keep`` may then change without compiling anew. For CUDA graphs pass a
    :class:`PagedCache` and one stacked ``query``: lists of tensors cost an upload of their addresses per call.

    Under ``torch.compile`` the call is one node of the graph. Queries and caches must be tensors there, for many layers
    stacked ones; lists, a :class:`PagedCache` and ``reduce_scores`` are a TypeError.

    Method: Kara, sliding-window KV cache compression (arXiv 2607.01237); what the paper leaves open is marked where
    it is computed. The defaults are the method as published; what kept most of the meaning in this library's quality
    bench is ``**Policy().selection`` of :mod:`kara_kernels.engine`, which every integration uses.
    """
    if torch.compiler.is_compiling():
        return CompressedWindow(*in_graph(
            query, k_cache, v_cache, block_tables, seq_lens, window=window, keep=keep, scores=scores,
            window_starts=window_starts, protected_lens=protected_lens, chunk_fraction=chunk_fraction,
            max_chunk=max_chunk, attention=attention, reduction=reduction, value_norm=value_norm, pool=pool,
            redundancy=redundancy, scale=scale, k_scale=k_scale, reduce_scores=reduce_scores, backend=backend,
        ))  # fmt: skip
    request = _checked(
        query, k_cache, v_cache, block_tables, seq_lens, window, keep, scores, window_starts, protected_lens,
        chunk_fraction, max_chunk, attention, reduction, value_norm, pool, redundancy, scale, k_scale, reduce_scores,
    )  # fmt: skip
    compress = _compress_torch
    if resolve_backend(backend, request.seq_lens.device) == "triton" and len(request.seq_lens):
        request.cache.require_kernel_layout()
        if request.query is not None:
            request.query.require_kernel_layout("query")
        if request.scores is not None:
            check_unit_stride("scores", request.scores)
        compress = _compress_triton
    lengths, keep_indices, pooled = compress(request)
    shape = (len(request.cache.k), request.block_tables.shape[0], request.cache.shape[2])
    keep_indices, pooled = keep_indices.expand(*shape, -1), pooled.expand(*shape, -1)
    return CompressedWindow(
        lengths, keep_indices if request.many else keep_indices[0], pooled if request.many else pooled[0]
    )


def _checked(
    query, k_cache, v_cache, block_tables, seq_lens, window, keep, scores, window_starts, protected_lens,
    chunk_fraction, max_chunk, attention, reduction, value_norm, pool, redundancy, scale, k_scale, reduce_scores,
) -> _Request:  # fmt: skip
    """Every argument checked, before anything is written."""
    queries, cache, many = per_layer(query, k_cache, v_cache)
    device = cache.k[0].device
    layers, (_, _, heads, dim) = len(cache.k), cache.shape
    check_window(window)
    check_count("keep", keep, 1, window)
    check_count("max_chunk", max_chunk, 1, 2**31 - 1)
    chunk_fraction = check_number("chunk_fraction", chunk_fraction, 0.0, 1.0)
    check_choice("pool", pool, POOLS)
    table = check_block_tables(block_tables, device)
    sequences = table.shape[0]
    check_lengths("seq_lens", seq_lens, sequences, device)
    if window_starts is not None:
        check_lengths("window_starts", window_starts, sequences, device)
    if protected_lens is not None:
        check_lengths("protected_lens", protected_lens, sequences, device)
    check_scoring(scale, attention, reduction, redundancy)
    if scores is None:
        queries = check_query(queries, cache, sequences, None, window, attention)
    else:
        queries = None
        shape = (layers, sequences, heads, window) if many else (sequences, heads, window)
        check_tensor("scores", scores, shape, (torch.float32,), device)
        scores = scores if many else scores[None]
    check_flag("value_norm", value_norm)
    if value_norm and queries:
        if cache.v is None:
            raise ValueError("value_norm: expected False without a v_cache, got True")
        check_values(cache)
    if reduce_scores is not None and not callable(reduce_scores):
        raise TypeError(f"reduce_scores: expected a callable, got {type(reduce_scores).__name__}")
    scales = key_scales(k_scale, layers, heads, device)
    budget = min(round(chunk_fraction * keep), keep - 1)
    request = _Request(
        queries, cache, table, seq_lens, window, keep, scores, window_starts, protected_lens, budget, max_chunk,
        attention, reduction, value_norm, pool, redundancy, dim**-0.5 if scale is None else scale, scales,
        reduce_scores, many,
    )  # fmt: skip
    if contents_are_checked(device):
        starts, fits = _windows(request)
        # A default start below zero is a sequence shorter than its window: skipped. A given one is a mistake.
        named = fits if window_starts is None else fits | (window_starts < 0)
        check_contents(cache, table, starts, torch.where(fits, seq_lens, starts), named, seq_lens)
    return request


def _windows(request: _Request) -> tuple[Tensor, Tensor]:
    """``(starts int32 [S], fits bool [S])``."""
    starts = request.window_starts
    starts = request.seq_lens - request.window if starts is None else starts
    # Nothing is added to a start: one near 2^31 would wrap around and seem to fit.
    fits = (starts >= 0) & (request.seq_lens >= request.window) & (starts <= request.seq_lens - request.window)
    return starts, fits if request.protected_lens is None else fits & (starts >= request.protected_lens)


@torch.no_grad()
def _compress_torch(r: _Request) -> tuple[Tensor, Tensor, Tensor]:
    """(new lengths, keep indices, scores) by the PyTorch path, sequence by sequence."""
    layers, sequences, heads = len(r.cache.k), len(r.seq_lens), r.cache.shape[2]
    starts, fits = _windows(r)
    alive = [(s, start) for s, (start, fit) in enumerate(zip(starts.tolist(), fits.tolist(), strict=True)) if fit]
    scores = r.scores
    if scores is None or r.pool != "head":
        scores = torch.zeros(*r.lists, r.window, device=starts.device)
        if r.scores is not None:
            for s in range(sequences):
                scores[:, s] = _pooled(r, r.scores[:, s])
        elif r.query is not None:
            for s, start in alive:
                of_sequence = score_sequence(
                    r.query, r.cache.k, r.cache.v if r.value_norm else None, r.block_tables, s, start, r.window,
                    scale=r.scale, k_scale=r.k_scale, attention=r.attention, reduction=r.reduction,
                    redundancy=r.redundancy,
                )  # fmt: skip
                scores[:, s] = _pooled(r, of_sequence)
    scores = _reduced(r, scores)
    keep_indices = expand_chunks(scores, r.keep, r.chunk_budget, r.max_chunk)
    keep_indices = torch.where(fits[:, None, None], keep_indices, -1)
    rows = keep_indices.expand(layers, sequences, heads, r.keep)
    for s, start in alive:
        compact_sequence(r.cache, r.block_tables[s], start, int(r.seq_lens[s]), rows[:, s], r.window)
    return torch.where(fits, r.seq_lens - (r.window - r.keep), r.seq_lens), keep_indices, scores


def _pooled(r: _Request, scores: Tensor) -> Tensor:
    """Means over the pooled of ``[L, H, W]``, in float64 so that they do not depend on the order of addition."""
    dims = {"head": (), "layer": (1,), "model": (0, 1)}[r.pool]
    return scores.double().mean(dims, keepdim=True).float() if dims else scores


def _compress_triton(r: _Request) -> tuple[Tensor, Tensor, Tensor]:
    """The same in three launches, four where scores are pooled or handed out, whatever ``L`` and ``S``."""
    layers, sequences, heads = len(r.cache.k), len(r.seq_lens), r.cache.shape[2]
    fit = r.window_starts, r.seq_lens, r.protected_lens
    scores, computed, summed = r.scores, r.scores is None, PartialRows()
    if scores is None or r.pool != "head":
        scores = r.seq_lens.new_empty(*r.lists, r.window, dtype=torch.float32)
    if r.query is not None:
        config, summed = plan_score(r.query, r.cache.k, r.window, r.reduction, r.value_norm, r.redundancy)
        partials = scores.new_empty(layers, sequences, heads, summed.tiles, r.window)
        launch_score(partials, r.query, r.cache, r.block_tables, *fit, r.scale, r.k_scale, r.attention, summed, config)
    elif r.scores is not None:
        partials = r.scores[:, :, :, None]
    if r.pool != "head" or (computed and r.reduce_scores is not None):
        launch_pool(scores, partials, *fit, summed, computed)
        computed, summed = False, PartialRows()
    scores = _reduced(r, scores)
    if not computed:
        partials = scores[:, :, :, None]
    keep_indices = r.seq_lens.new_empty(*r.lists, r.keep)
    launch_keep(keep_indices, scores, partials, *fit, summed, r.chunk_budget, r.max_chunk, computed)
    new_lens = torch.empty_like(r.seq_lens)
    rows = keep_indices.expand(layers, sequences, heads, r.keep)
    launch_compact(new_lens, r.cache, r.block_tables, r.window_starts, r.seq_lens, rows, r.window)
    return new_lens, keep_indices, scores


def _reduced(r: _Request, scores: Tensor) -> Tensor:
    """The caller's hook between pooling and selection; it may work in place and return None."""
    if r.reduce_scores is None:
        return scores
    given = scores if r.many else scores[0]
    reduced = r.reduce_scores(given)
    reduced = given if reduced is None else reduced
    check_tensor("reduce_scores(...)", reduced, given.shape, (torch.float32,), given.device)
    check_unit_stride("reduce_scores(...)", reduced)
    return reduced if r.many else reduced[None]


implement(compress_window)
