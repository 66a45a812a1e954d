"""The four operations in plain PyTorch: the truth that the kernels are held to, and what CPUs run.

Same names and signatures as :mod:`kara_kernels.ops`, without ``backend``. Nothing here imports Triton or any kernel.
Work is done per layer and sequence, in slices, with shapes that do not depend on the rest of the batch: that is what
keeps the extra memory bounded and a sequence's result the same to the bit whatever it is batched with.
"""

from .chunks import expand_chunks
from .compact import compact_blocks
from .score import score_window
from .select import select_topk

__all__ = ["compact_blocks", "expand_chunks", "score_window", "select_topk"]
