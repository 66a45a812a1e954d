"""The operations in plain PyTorch: the ground truth for the kernels, and the path that runs on CPUs.

Names and signatures are those of :mod:`kara_kernels.ops`, without ``backend``. Nothing here imports Triton or a kernel.
Work is done per layer and sequence, in slices whose shapes do not depend on the rest of the batch. This bounds the
extra memory, and gives a sequence the same bits in every batch.
"""

from .channels import rank_channels
from .checksum import crc32_of_ranges
from .chunks import expand_chunks
from .compact import compact_blocks
from .gather import gather_rows, scatter_rows
from .pack import pack_queries
from .quantize import dequantize_rows, quantize_rows
from .rank import rank_rows
from .score import score_window
from .select import select_topk

__all__ = [
    "compact_blocks", "crc32_of_ranges", "dequantize_rows", "expand_chunks", "gather_rows", "pack_queries",
    "quantize_rows", "rank_channels", "rank_rows", "scatter_rows", "score_window", "select_topk",
]  # fmt: skip
