"""The attention "kara" and its mask. Importing this registers both with transformers; no model is patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .models import not_plain


def kara_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention "kara": transformers' sdpa attention, over a KaraCache's blocks if a KaraCache is in use.

    Raises NotImplementedError if a KaraCache is in use and the call is not plain causal softmax attention.
    """
    tag = getattr(key, "_kara", None)
    if tag is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    cache, layer = tag
    causal = kwargs.get("is_causal")
    odd = not_plain(kwargs)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        odd.append("is_causal=False")
    if attention_mask is not None and not getattr(attention_mask, "_kara_plain", False):
        odd.append("a custom mask (give a 2-D padding mask or none)")
    if odd:
        where = type(module).__name__
        raise NotImplementedError(f"KaraCache does not support attention with {', '.join(odd)} ({where})")
    return cache.attend(module, layer, query, key, value, attention_mask, **kwargs)


def kara_mask(*, mask_function: Callable = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """transformers' sdpa mask, marked so that a cache can distinguish causal and padding masks from others."""
    mask = sdpa_mask(mask_function=mask_function, **kwargs)
    if mask is not None:
        mask._kara_plain = mask_function is causal_mask_function
    return mask


ALL_ATTENTION_FUNCTIONS.register("kara", kara_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("kara", kara_mask)
