"""Latent caches (multi-head latent attention): one row for all heads, and queries in the form that reads it.

A row is the latent vector, of which every head's key and value are linear maps, and then the rotary part of the keys.
The map of keys may as well be applied to queries: `kv_lora_rank` numbers of every head, and then its rotary part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kara_kernels.ahead import LookAhead


def is_latent(layer: Any) -> bool:
    """Whether an attention layer of vLLM has a latent cache."""
    return hasattr(layer, "kv_lora_rank")


def write(layer: Any, rows: Sequence[Tensor], slots: Tensor) -> None:
    """Lets a layer write rows ``[N, H, D]`` to its cache: keys and values, or latent rows, which are of one head."""
    if not is_latent(layer):
        layer.impl.do_kv_cache_update(layer, *rows, layer.kv_cache, slots)
        return
    latent, rotary = rows[0].split([layer.kv_lora_rank, layer.qk_rope_head_dim], -1)
    layer.impl.do_kv_cache_update(
        latent[:, 0].contiguous(), rotary.contiguous(), layer.kv_cache, slots, layer.kv_cache_dtype, layer._k_scale
    )


def latent_query(layer: Any, query: Tensor, ahead: LookAhead | None) -> Tensor:
    """``[T, H, kv_lora_rank + R]`` of a layer's post-RoPE queries ``[T, H, N + R]``, and ``ahead`` of their positions.
    All are of one dtype.

    Kernels look ahead at the first dimensions of a row, and the rotary ones of a latent row are the last.
    """
    plain, rotary = query.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], -1)
    absorbed = torch.bmm(plain.transpose(0, 1), layer.W_UK_T).transpose(0, 1)
    return torch.cat((absorbed, rotary if ahead is None else _turned(rotary, ahead)), -1)


def _turned(rotary: Tensor, ahead: LookAhead) -> Tensor:
    """Rotated by these angles, pair by pair."""
    cos, sin = ahead.cos, ahead.sin
    axis = -1 if ahead.interleaved else -2
    shape = (-1, 2) if ahead.interleaved else (2, -1)
    x, y = rotary.unflatten(-1, shape).unbind(axis)
    return torch.stack((x * cos - y * sin, x * sin + y * cos), axis).flatten(-2)
