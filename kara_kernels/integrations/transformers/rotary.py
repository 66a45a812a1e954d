"""Queries rotated ahead by the model's own rotary position embedding.

Recorded queries have the positions of their tokens. Kept tokens serve queries that come after the window, so the
queries that score it are moved ahead first. A rotary embedding turns a query by an angle that is linear in the
position. Turning a recorded query again by the angle of ``n`` moves it ``n`` positions ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Kinds whose angles do not depend on the text length, so that asking for one position has no side effect.
_STEADY = ("default", "linear", "llama3", "yarn")

Ahead = Callable[[Tensor, int], Tensor]


def find_rotation(model: Any) -> Ahead | None:
    """A function ``ahead(query [..., N, heads, D], n)`` that returns the queries ``n`` positions ahead.

    None if the model's rotary embedding is not of the common kind. The common kind has one module ``rotary_emb``, whose
    angles do not depend on the text length, and a function ``apply_rotary_pos_emb`` in the model's module.
    """
    found = [module.rotary_emb for module in getattr(model, "modules", list)() if hasattr(module, "rotary_emb")]
    apply = getattr(sys.modules.get(type(model).__module__), "apply_rotary_pos_emb", None)
    if apply is None or len({id(rotary) for rotary in found}) != 1:
        return None
    rotary = found[0]
    if getattr(rotary, "rope_type", None) not in _STEADY:
        return None

    def ahead(query: Tensor, n: int) -> Tensor:
        rows = query.flatten(0, -4) if query.dim() > 4 else query
        cos, sin = rotary(rows, torch.full((1, 1), n, device=query.device))
        scaling = getattr(rotary, "attention_scaling", 1.0)
        turned, _ = apply(rows, rows[:1, :1], cos / scaling, sin / scaling, unsqueeze_dim=2)
        return turned.view(query.shape)

    return ahead
