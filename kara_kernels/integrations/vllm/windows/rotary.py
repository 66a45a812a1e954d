"""The angles of a model's rotary position embedding in vLLM, for looking ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kara_kernels.ahead import LookAhead
from kara_kernels.engine import Policy

# vLLM's embeddings whose angles are linear in the position and do not depend on the text length.
STEADY = (
    "RotaryEmbedding", "LinearScalingRotaryEmbedding", "NTKScalingRotaryEmbedding", "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding", "DeepseekScalingRotaryEmbedding",
)  # fmt: skip


def look_ahead_of(attention: Sequence[Any], policy: Policy, device: torch.device) -> LookAhead | None:
    """The angles of ``policy.positions_ahead`` positions, from the table of the rotary embedding in these modules.

    None if that is 0, or if the operator left it open and the embedding is not of a known kind.

    Raises:
        ValueError: the operator asks for positions ahead, and the embedding is of another kind or its table too short.
    """
    n = policy.positions_ahead
    if not n:
        return None
    tables, kinds = _tables(attention)
    if len(tables) != 1 or not kinds <= set(STEADY) or len(tables[0].cos_sin_cache) <= n:
        if policy.look_ahead is None:
            return None
        length = f" of {len(tables[0].cos_sin_cache)} positions" if len(tables) == 1 else ""
        raise ValueError(
            f"kara: look_ahead: expected 0 without one rotary embedding of a known kind for more than {n} positions, "
            f"got {', '.join(sorted(kinds)) or 'none'}{length}"
        )
    return _angles(tables[0], n, device)


def look_ahead_by(attention: Sequence[Any]) -> Callable[[int, torch.device], LookAhead] | None:
    """A function of positions and device; None if the embedding is not of a known kind. Positions beyond the table
    raise ValueError."""
    tables, kinds = _tables(attention)
    if len(tables) != 1 or not kinds <= set(STEADY):
        return None
    return functools.partial(_angles, tables[0])


def _tables(attention: Sequence[Any]) -> tuple[list[Any], set[str]]:
    """The rotary embeddings, one of those that are alike, and the names of all their kinds."""
    found = [module for outer in attention for module in outer.modules() if hasattr(module, "cos_sin_cache")]
    alike = {(module.cos_sin_cache.data_ptr(), module.is_neox_style): module for module in found}
    return list(alike.values()), {type(module).__name__ for module in found}


def _angles(embedding: Any, n: int, device: torch.device) -> LookAhead:
    return LookAhead.of_table(embedding.cos_sin_cache.to(device), n, interleaved=not embedding.is_neox_style)
