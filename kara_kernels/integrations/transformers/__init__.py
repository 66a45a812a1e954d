"""Kara in Hugging Face transformers: :class:`KaraCache` for ``generate()``, :class:`KaraBatching` for
``generate_batch()``. Importing this registers the attention "kara", which KaraCache needs and KaraBatching does not.
"""

from .batching import BatchCompression, KaraBatching
from .cache import Compression, KaraCache, kara_attention, kara_mask

__all__ = ["BatchCompression", "Compression", "KaraBatching", "KaraCache", "kara_attention", "kara_mask"]
