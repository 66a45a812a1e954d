"""Kara in Hugging Face transformers: :class:`KaraCache` for ``generate()``, :class:`KaraBatching` for
``generate_batch()``. Importing this registers the attention "kara", which KaraCache needs and KaraBatching does not.
"""

from .cache import Compression, KaraCache, kara_attention, kara_mask
from .continuous import BatchCompression, KaraBatching

__all__ = ["BatchCompression", "Compression", "KaraBatching", "KaraCache", "kara_attention", "kara_mask"]
