"""The angles of a model's rotary position embedding in vLLM, for looking ahead."""

from __future__ import annotations

from typing import Any

import torch

from kara_kernels.ahead import LookAhead
from kara_kernels.engine import Policy

# vLLM's embeddings whose angles are linear in the position and do not depend on the text length.
STEADY = (
    "RotaryEmbedding", "LinearScalingRotaryEmbedding", "NTKScalingRotaryEmbedding", "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)  # fmt: skip


def look_ahead_of(model: Any, policy: Policy, device: torch.device) -> LookAhead | None:
    """The angles of ``policy.positions_ahead`` positions, from the table of the model's rotary embedding.

    None if that is 0, or if the operator left it open and the embedding is not of a known kind.

    Raises:
        ValueError: the operator asks for positions ahead, and the embedding is of another kind or its table too short.
    """
    n = policy.positions_ahead
    if not n:
        return None
    tables = [module for module in model.modules() if hasattr(module, "cos_sin_cache")]
    kinds = sorted({type(module).__name__ for module in tables})
    alike = {(module.cos_sin_cache.data_ptr(), module.is_neox_style) for module in tables}
    if len(alike) != 1 or not set(kinds) <= set(STEADY) or len(tables[0].cos_sin_cache) <= n:
        if policy.look_ahead is None:
            return None
        length = f" of {len(tables[0].cos_sin_cache)} positions" if len(alike) == 1 else ""
        raise ValueError(
            f"kara: look_ahead: expected 0 without one rotary embedding of a known kind for more than {n} positions, "
            f"got {', '.join(kinds) or 'none'}{length}"
        )
    table = tables[0].cos_sin_cache.to(device)
    return LookAhead.of_table(table, n, interleaved=not tables[0].is_neox_style)
