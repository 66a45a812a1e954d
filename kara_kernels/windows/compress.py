"""One call that scores, selects and compacts a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ..ahead import LookAhead
from ..options import Options
from ..packed import Queries
from .graph import in_graph
from .repeat import kept_event, kind_of
from .request import ReduceScores, check_request
from .run import run


class CompressedWindow(NamedTuple):
    """The result of :func:`compress_window`. With many layers ``keep_indices`` and ``scores`` have a leading ``L``."""

    seq_lens: Tensor
    """int32 ``[S]``: new physical lengths; unchanged for a skipped sequence."""
    keep_indices: Tensor
    """int32 ``[S, H, K]``: kept positions relative to the window, ascending; all -1 for a skipped sequence."""
    scores: Tensor
    """float32 ``[S, H, W]``: the scores after pooling, from which tokens were selected; zero for a skipped sequence,
    unless ``scores`` was given."""
    frontiers: Tensor
    """int32 ``[S]``: the end of the survivors, ``window_start + K``; ``max(protected_len, 0)`` for a skipped sequence.
    Pass them as the next call's ``protected_lens``, so that survivors are not compressed again."""


def compress_window(
    query: Queries | None,
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
    query_rows: Tensor | None = None,
    scale: float | None = None,
    k_scale: float | Tensor | None = None,
    look_ahead: LookAhead | None = None,
    reduce_scores: ReduceScores | None = None,
    dry_run: bool = False,
    backend: str = "auto",
    **options: Unpack[Options],
) -> CompressedWindow:
    """Score a window of every sequence, keep ``keep`` of its tokens, and move the tokens after it up, in place.

    It works on the paged KV cache of one layer or of all layers at once. It takes three kernel launches whatever ``L``
    and ``S`` are, and a fourth if scores are pooled or reduced. There is no device-to-host synchronisation, and no
    allocation that depends on contents. Apart from the result it allocates at most 256 MB, or what one layer needs if
    that is more. To stay within that, a GPU scores long windows with many queries some layers at a time, with two
    launches each. On the CPU, PyTorch works in slices.

    Args:
        query: post-RoPE queries ``[S, N, H*G, D]`` float16, bfloat16, float32 or float8, in any order. They may include
            queries of tokens after the window, which score well. For many layers ``[L, S, N, H*G, D]`` or ``L``
            tensors. Or the same as :class:`~kara_kernels.PackedQueries`. None with ``scores``.
        k_cache: ``[B, P, H, D]``, or ``L`` of them, or ``PagedCache.k``. Any strides. On the Triton path the last must
            be 1, and all layers must have the same strides. float16, bfloat16, float32 or float8; with ``scores`` any
            dtype of 1, 2, 4 or 8 bytes.
        v_cache: the same with ``Dv``, or None for caches with one latent tensor (MLA). Its dtype may differ.
        block_tables: int32 ``[S, max_blocks]``: physical token ``t`` of sequence ``s`` lies in block
            ``block_tables[s, t // P]``, row ``t % P``. May be a narrowed view. For tables in CSR form see
            :func:`kara_kernels.block_tables_from_csr`.
        seq_lens: int32 ``[S]``, **physical** lengths in tokens.
        window: ``W``, tokens in the window, up to 4096.
        keep: ``K``, tokens of the window that are kept, ``1 <= keep <= window``.
        scores: float32 ``[S, H, W]`` (``[L, S, H, W]``) to select by instead of computing scores, so that any policy
            can be plugged in.
        window_starts: int32 ``[S]``, physical index of the first window token; ``seq_lens - window`` by default.
            Everything after the window is the tail, which is kept whole and moves up.
        protected_lens: int32 ``[S]``, physical tokens that may not be compressed: the prompt at first, then the
            ``frontiers`` of the previous call. 0 by default.
        query_rows: int32 ``[S, N]``, rows of the queries in a buffer that all sequences share. ``query`` is then
            ``[R, H*G, D]`` (many layers: ``[L, R, H*G, D]`` or ``L`` tensors), and query ``i`` of sequence ``s`` is
            its row ``query_rows[s, i]``. A query ring is thus read in place.
        scale: factor on the logits, ``1/sqrt(D)`` by default.
        k_scale: factor on the keys of an fp8 cache; float or tensor, see :func:`kara_kernels.ops.score_window`.
        look_ahead: :class:`~kara_kernels.LookAhead`, rotates the queries ahead of their own positions, because kept
            tokens serve queries that come after the window. ``window`` positions ahead scored best.
        reduce_scores: called with the pooled scores before selection, for example to all-reduce them over
            tensor-parallel ranks. Gets and returns float32 ``[L, S, H, W]`` with extent 1 in pooled dimensions,
            without ``L`` for one layer. May work in place and return None. With ``scores`` and ``pool="head"`` it gets
            the caller's own tensor.
        dry_run: True scores and selects, and moves nothing. The result is the same as if it had moved the rows.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.
        **options: ``attention``, ``reduction``, ``value_norm``, ``redundancy`` of
            :class:`~kara_kernels.options.Scoring` and ``pool``, ``chunk_fraction``, ``max_chunk`` of
            :class:`~kara_kernels.options.Selection`. The defaults are ``kara_kernels.options.RECOMMENDED``,
            chosen to stay close to the full cache in this library's quality bench. ``**kara_kernels.options.PAPER``
            gives the published method.

    Returns:
        :class:`CompressedWindow`. A sequence is skipped if its window does not fit: ``window_start < protected_len`` or
        ``window_start + window > seq_len``. Its cache does not change, and its ``keep_indices`` are -1. The device
        decides that, so batches of mixed lengths need no host work. Pooled results are expanded views.

    Raises:
        TypeError, ValueError: before anything is written, naming argument, expected and got.

    On a GPU the following is checked only with ``KARA_KERNELS_DEBUG=1``, because it costs a synchronisation: used block
    ids in ``0..B-1``, ``query_rows`` in ``0..R-1``, lengths within the table's capacity, starts of 0 or more, and that
    no two sequences share a block from their windows on. The library cannot know which blocks other sequences or a
    prefix cache still read. The engine must make sure that they are not written.

    Before serving, call it once with ``seq_lens`` of zeros. That skips every sequence and compiles every kernel. Batch,
    lengths, ``N`` and ``keep`` may then change without recompilation. Pass a :class:`~kara_kernels.PagedCache` and one
    stacked ``query``. Lists of tensors cost an upload of addresses per call, which a CUDA graph cannot capture. With
    both, calls of the same shapes and options after the first take a tenth of its time on the host, because the pool
    keeps their launches.

    Under ``torch.compile`` the call is one node of the graph. Queries and caches must be tensors there, stacked
    ones for many layers. Lists, a :class:`~kara_kernels.PagedCache`, ``reduce_scores`` and ``dry_run`` raise TypeError.

    Method: Kara, sliding-window KV cache compression (arXiv 2607.01237). ``docs/method.md`` has the formulas and marks
    the choices that the paper leaves open.
    """
    given: dict[str, Any] = {
        "window": window, "keep": keep, "scores": scores, "window_starts": window_starts,
        "protected_lens": protected_lens, "query_rows": query_rows, "scale": scale, "k_scale": k_scale,
        "look_ahead": look_ahead, "reduce_scores": reduce_scores, "dry_run": dry_run, "options": options,
    }  # fmt: skip
    if torch.compiler.is_compiling():
        return CompressedWindow(*in_graph(query, k_cache, v_cache, block_tables, seq_lens, backend=backend, **given))
    kind = kind_of(query, k_cache, v_cache, block_tables, seq_lens, backend, given)
    if kind is not None and (event := kept_event(k_cache, kind)) is not None:
        return CompressedWindow(*event(query, block_tables, seq_lens, given))
    request = check_request(query, k_cache, v_cache, block_tables, seq_lens, **given)
    return CompressedWindow(*run(request, backend, kind))
