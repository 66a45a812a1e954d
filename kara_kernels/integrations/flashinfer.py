"""Converts block tables in CSR form, as FlashInfer uses them, to the rectangular tables of this library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor, contents_are_checked, refuse
from ..values import check_count


def block_tables_from_csr(
    indptr: Tensor, indices: Tensor, last_page_len: Tensor, *, page_size: int, max_blocks: int
) -> tuple[Tensor, Tensor]:
    """Convert CSR page lists to block tables and sequence lengths.

    Nothing is read back to the host. The caller gives the width of the tables, because only the device knows the
    longest sequence. The call can be captured in a CUDA graph.

    Args:
        indptr: int32 ``[S + 1]``. Sequence ``s`` owns the pages ``indices[indptr[s] : indptr[s + 1]]``.
        indices: int32 ``[nnz]`` block ids. Entries after ``indptr[S]`` are ignored.
        last_page_len: int32 ``[S]``, tokens in the last page of each sequence, ``1..page_size``. Ignored for a
            sequence without pages.
        page_size: ``P``, tokens per block.
        max_blocks: columns of the block table, at least the number of pages of the longest sequence.

    Returns:
        ``(block_tables [S, max_blocks], seq_lens [S])``, both int32, as :func:`kara_kernels.compress_window` takes
        them. Unused columns are 0. A sequence without pages has length 0.

    Raises:
        TypeError, ValueError: naming argument, expected and got.

    On a GPU the contents are checked only with ``KARA_KERNELS_DEBUG=1``, because it costs a synchronisation:
    ``indptr`` starts at 0, never decreases and ends within ``indices``; no sequence has more than ``max_blocks`` pages;
    ids are 0 or more; ``last_page_len`` is in range. Memory outside ``indices`` is never read.
    """
    device = indptr.device if isinstance(indptr, Tensor) else torch.device("cpu")
    check_tensor("indptr", indptr, (None,), (torch.int32,), device)
    if len(indptr) < 1:
        raise ValueError(f"indptr: expected shape [S + 1], got {list(indptr.shape)}")
    check_tensor("indices", indices, (None,), (torch.int32,), device)
    check_tensor("last_page_len", last_page_len, (len(indptr) - 1,), (torch.int32,), device)
    check_count("page_size", page_size, 1, 2**31 - 1)
    check_count("max_blocks", max_blocks, 1, 2**31 - 1)
    if contents_are_checked(device):
        _check_contents(indptr, indices, last_page_len, page_size, max_blocks)
    begins, pages = indptr[:-1], indptr.diff()
    column = torch.arange(max_blocks, dtype=torch.int32, device=device)
    used = column < pages[:, None]
    seq_lens = torch.where(pages > 0, (pages - 1) * page_size + last_page_len, 0)
    if len(indices) == 0:
        return torch.zeros_like(used, dtype=torch.int32), seq_lens
    place = (begins[:, None] + column).clamp_(0, len(indices) - 1)
    return torch.where(used, indices[place], 0), seq_lens


def _check_contents(indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int, max_blocks: int) -> None:
    refuse(indptr[:1] != 0, "indptr", "0", indptr)
    pages = indptr.diff()
    for bad, expected in (
        (pages < 0, "at least as much as before"),
        (indptr[1:] > len(indices), f"at most {len(indices)}, the entries of indices"),
        (pages > max_blocks, f"at most max_blocks = {max_blocks} pages of a sequence"),
    ):
        if bool(bad.any()):
            s = int(bad.nonzero()[0])
            raise ValueError(f"indptr[{s + 1}]: expected {expected}, got {int(indptr[s + 1])} after {int(indptr[s])}")
    bad = (pages > 0) & ((last_page_len < 1) | (last_page_len > page_size))
    refuse(bad, "last_page_len", f"1..{page_size}", last_page_len)
    used = indices[: int(indptr[-1])]
    refuse(used < 0, "indices", "a block id of 0 or more", used)
