"""KV caches of eight-bit floats. vLLM allocates them as bytes. Each layer has factors for its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform

from .unsupported import FP8


def stored_as(cache_dtype: str, plain: torch.dtype) -> torch.dtype:
    """What the elements of a cache are, by vLLM's name for it; ``plain`` for one of that dtype."""
    if cache_dtype not in FP8:
        return plain
    e4m3: torch.dtype = current_platform.fp8_dtype()
    return torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else e4m3


def scales_of(layers: Sequence[Any]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """float32 ``[L, H]``: what a stored key and a stored value are multiplied by. None if that changes nothing.

    It waits for the device. vLLM sets these factors when it loads the model.
    """
    if layers[0].kv_cache_dtype not in FP8:
        return None, None
    keys, values = (
        torch.stack([by_head(getattr(layer, name), layer.num_kv_heads) for layer in layers])
        for name in ("_k_scale", "_v_scale")
    )
    if bool((keys == 1).all() and (values == 1).all()):
        return None, None
    return keys, values


def by_head(scale: Tensor, heads: int) -> Tensor:
    """float32 ``[H]`` of a factor that a layer has once or for each head."""
    return scale.detach().float().reshape(-1).expand(heads)


def plain(layer: Any, query: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's queries as the model made them, also where vLLM hands them to attention as eight-bit floats."""
    if query.dtype == dtype:
        return query
    heads = layer.num_kv_heads
    grouped = query.to(dtype).view(query.shape[0], heads, -1)
    return (grouped * by_head(layer._q_scale, heads).to(dtype)[:, None]).view(query.shape)
