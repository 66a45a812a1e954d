"""Shrink the paged KV cache of a reasoning LLM while it decodes. Start at :func:`compress_window`."""

from .compress import CompressedWindow, compress_window
from .paged import PagedCache

__all__ = ["CompressedWindow", "PagedCache", "compress_window"]
__version__ = "0.1.0"
