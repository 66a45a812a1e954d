"""Kara in Hugging Face transformers: :class:`KaraCache` for ``generate()``, :class:`KaraBatching` for
``generate_batch()``. Importing this registers the attention "kara", which KaraCache needs and KaraBatching does not.
"""

from kara_kernels.engine import Compression

from .attention import kara_attention, kara_mask
from .batching import KaraBatching
from .cache import KaraCache

__all__ = ["Compression", "KaraBatching", "KaraCache", "kara_attention", "kara_mask"]
