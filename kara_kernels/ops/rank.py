"""Order of all rows of a context, best first, so that any number of them can be kept by taking the first.

A merge sort of unique integer keys. One program sorts a tile in registers. Then runs merge in pairs: a key's place is
its place in its own run plus the number of greater keys in the other run, found by binary search. Keys carry their
positions, so no two are equal, every program writes to places of its own, and no atomics are needed.

Finding a key's place in all other tiles at once would take two launches for any length, but 1,397 loads for each key of
131,072 rows. Merging takes 98, in eight launches.
"""

import torch
from torch import Tensor

from ..checks import check_scores, require_rows
from ..paged import row_alignment
from ..reference.rank import MOST_ROWS, ranked_rows
from ..values import check_count
from ._triton import kernel, launch, resolve_backend, tl, triton
from .select import order_keys

# ------------------------------------------------------------------------------------------------- device code


@triton.jit
def store_ranked(out, place, keys, mask):
    """Stores keys to an int64 buffer, or the positions that they carry to an int32 one."""
    if out.dtype.element_ty == tl.int32:
        tl.store(out + place, 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32), mask=mask)
    else:
        tl.store(out + place, keys, mask=mask)


@kernel
def sort_kernel(
    out_ptr, scores_ptr, C, sinks, newest, stride_row: tl.int64, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid ``(rows, tiles)``: sorts the keys of a tile of ``scores [rows, C]`` into the same places of ``out [rows,
    C]``, greatest first.

    A key is the ordered bits of the score, above all scores for sinks and the newest rows, and then the position
    counted down.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < C
    scores = tl.load(tl.multiple_of(scores_ptr + row * stride_row, ALIGN) + offs, mask=inside, other=0.0)
    # The key of infinity is 0x7F800000. Among protected rows, positions decide.
    keys = tl.where((offs < sinks) | (offs >= C - newest), 0x7FFFFFFF, order_keys(scores))
    keys = (keys.to(tl.int64) << 32) | (0x7FFFFFFF - offs)
    keys = tl.where(inside, keys, -0x8000000000000000)  # padding, below all
    store_ranked(out_ptr + row * C, offs, tl.sort(keys, descending=True), inside)


@kernel
def merge_kernel(out_ptr, keys_ptr, C, run, BLOCK: tl.constexpr):
    """Grid ``(rows, tiles)``: merges each two neighbouring runs of ``run`` sorted keys, a power of two and a multiple
    of ``BLOCK``."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    inside = offs < C
    row_keys = keys_ptr + row * C
    keys = tl.load(row_keys + offs, mask=inside, other=0)
    other = (first ^ run) & -run  # the start of the neighbour; the last run may have none
    size = tl.minimum(tl.maximum(C - other, 0), run)
    greater = tl.zeros([BLOCK], tl.int32)  # keys of the neighbour that are known to be greater
    step = run
    while step > 0:
        probe = greater + step
        there = inside & (probe <= size)
        found = tl.load(row_keys + other + probe - 1, mask=there, other=0)
        greater = tl.where(there & (found > keys), probe, greater)
        step = step >> 1
    place = offs - (first & run) + greater
    store_ranked(out_ptr + row * C, place, keys, inside)


# --------------------------------------------------------------------------------------------- how it is launched

# Counted on sm_80: a key costs 507 instructions to sort in tiles of 1024, and 129 to 153 to merge once. Tiles of 512
# cost 433 and one more merge of 125. Eight warps execute 10 % more.
TILE, WARPS = 1024, 4
SCRATCH_BYTES = 256 << 20  # for two buffers of keys; rows are ranked some at a time to stay within


def launch_rank(order: Tensor, scores: Tensor, sinks: int, newest: int) -> None:
    """Ranks ``scores [rows, C]`` into ``order [rows, C]``, some rows at a time. Checks nothing."""
    rows, width = scores.shape
    at_once = min(rows, max(1, SCRATCH_BYTES // (16 * width)))
    buffers = torch.empty(2, at_once, width, dtype=torch.int64, device=scores.device)
    for first in range(0, rows, at_once):
        some = slice(first, min(first + at_once, rows))
        _rank(order[some], scores[some], buffers, sinks, newest)


def _rank(order: Tensor, scores: Tensor, buffers: Tensor, sinks: int, newest: int) -> None:
    rows, width = scores.shape
    grid = rows, triton.cdiv(width, TILE), 1
    source, target = buffers
    run = TILE
    launch(
        sort_kernel, grid, scores.device, out_ptr=target if run < width else order, scores_ptr=scores, C=width,
        sinks=sinks, newest=newest, stride_row=scores.stride(0), ALIGN=row_alignment(scores), BLOCK=TILE,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    while run < width:
        source, target = target, source
        launch(
            merge_kernel, grid, scores.device, out_ptr=target if 2 * run < width else order, keys_ptr=source, C=width,
            run=run, BLOCK=TILE, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        run *= 2


# ------------------------------------------------------------------------------------------------------ public


def rank_rows(scores: Tensor, *, sinks: int = 4, newest: int = 32, backend: str = "auto") -> Tensor:
    """The order in which rows of a context are kept: the first ``sinks``, the ``newest``, then the others, best first.

    Keeping the first ``K`` of the order keeps the best ``K`` rows, for any ``K``.

    Args:
        scores: float32 ``[..., C]``, ``C`` up to 2^25. On the Triton path rows must have a common stride, and the last
            dimension stride 1. Other layouts raise ValueError and are never copied silently.
        sinks: rows at the start of the context that come first whatever their scores, in position order.
        newest: rows at its end that come next, in position order. If ``sinks + newest >= C``, all rows come in position
            order.
        backend: ``"auto"`` (CUDA and HIP tensors run Triton, others PyTorch), ``"triton"`` or ``"torch"``.

    Returns:
        int32 ``[..., C]``: every row is a permutation of ``0..C-1``. Exact for any bit pattern: higher score first,
        ties to the lowest position, NaN ranks as -inf, -0.0 equals +0.0, as in
        :func:`kara_kernels.ops.select_topk`. Equal input bits give equal indices on every device and in every batch.

    Raises:
        TypeError, ValueError: wrong dtype or shape, counts that are negative, a backend that cannot run.
    """
    check_scores(scores, MOST_ROWS)
    check_count("sinks", sinks, 0, MOST_ROWS)
    check_count("newest", newest, 0, MOST_ROWS)
    if resolve_backend(backend, scores.device) == "torch":
        return ranked_rows(scores, sinks, newest)
    order = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    if order.numel():
        launch_rank(order.view(-1, scores.shape[-1]), require_rows("scores", scores), sinks, newest)
    return order
