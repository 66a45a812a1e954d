"""The operations, each with a Triton kernel and a PyTorch counterpart in :mod:`kara_kernels.reference`."""

from .chunks import expand_chunks
from .compact import compact_blocks
from .pack import pack_queries
from .score import score_window
from .select import select_topk

__all__ = ["compact_blocks", "expand_chunks", "pack_queries", "score_window", "select_topk"]
