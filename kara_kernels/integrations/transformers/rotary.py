"""The angles of a model's rotary position embedding, for looking ahead.

Recorded queries have the positions of their tokens. Kept tokens serve queries that come after the window, so the
queries that score it are moved ahead. A rotary embedding rotates queries by angles that are linear in the position, so
the angles of ``n`` move any query ``n`` positions ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kara_kernels import LookAhead
from kara_kernels.engine import Policy

# Kinds whose angles do not depend on the text length, so that asking for one position has no side effect.
_STEADY = ("default", "linear", "llama3", "yarn")

Ahead = Callable[[int, torch.device], LookAhead]


def find_look_ahead(model: Any) -> Ahead | None:
    """A function ``ahead(n, device)`` that returns the :class:`~kara_kernels.LookAhead` of ``n`` positions.

    None if the model's rotary embedding is not of the common kind. The common kind has one module ``rotary_emb``, whose
    angles do not depend on the text length, and a function ``apply_rotary_pos_emb`` in the model's module. That
    function is tried out, to see which dimensions it pairs.
    """
    found = [module.rotary_emb for module in getattr(model, "modules", list)() if hasattr(module, "rotary_emb")]
    apply = getattr(sys.modules.get(type(model).__module__), "apply_rotary_pos_emb", None)
    if apply is None or len({id(rotary) for rotary in found}) != 1:
        return None
    rotary, prefix, more = found[0], "", {}
    kind: Any = getattr(rotary, "rope_type", None)
    if isinstance(kind, dict):  # angles for each kind of layer
        kind, prefix, more = kind.get("full_attention"), "full_attention_", {"layer_type": "full_attention"}
    if kind not in _STEADY:
        return None

    def angles(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[R]`` as ``apply`` takes them, without the embedding's factor."""
        with torch.no_grad():
            both = rotary(torch.empty(0, device=device), torch.full((1, 1), n, device=device), **more)
        scaling = getattr(rotary, f"{prefix}attention_scaling", 1.0)
        cos, sin = (part[0, 0].float() / scaling for part in both)
        return cos, sin

    frequencies = getattr(rotary, f"{prefix}inv_freq")
    pairing = _pairing(apply, *angles(5, frequencies.device))
    if pairing is None or not _rotates_the_first(model.config, 2 * frequencies.numel()):
        return None
    which, interleaved = pairing

    def ahead(n: int, device: torch.device) -> LookAhead:
        cos, sin = (part[which].contiguous() for part in angles(n, device))
        return LookAhead(cos, sin, interleaved)

    return ahead


def resolve_look_ahead(policy: Policy, model: Any) -> tuple[Policy, Ahead | None]:
    """The policy with the positions that this model allows, and the model's angles if these are not 0.

    Raises:
        ValueError: the policy asks for positions ahead of a model whose angles are not known.
    """
    ahead = find_look_ahead(model)
    if ahead is None and policy.look_ahead:
        raise ValueError(
            f"look_ahead: expected 0 for {type(model).__name__}, which has no rotary position embedding of the common "
            f"kind, got {policy.look_ahead}"
        )
    policy = replace(policy, look_ahead=0 if ahead is None else policy.positions_ahead)
    return policy, ahead if policy.look_ahead else None


def _pairing(apply: Callable[..., Any], cos: Tensor, sin: Tensor) -> tuple[slice, bool] | None:
    """Which entries of ``cos`` and ``sin [R]`` are those of the pairs, and whether pairs are interleaved."""
    dims = len(cos)
    query = torch.linspace(1, 2, dims, device=cos.device)
    try:
        turned = apply(*[query.view(1, 1, 1, -1)] * 2, cos[None, None], sin[None, None], unsqueeze_dim=2)[0].flatten()
    except (TypeError, RuntimeError):
        return None
    first, every_second = slice(0, dims // 2), slice(0, dims, 2)
    for which, interleaved in ((first, False), (first, True), (every_second, True)):
        x, y = query.view(-1, 2).unbind(1) if interleaved else query.chunk(2)
        c, s = cos[which], sin[which]
        parts = x * c - y * s, y * c + x * s
        expected = torch.stack(parts, 1).flatten() if interleaved else torch.cat(parts)
        if turned.shape == expected.shape and torch.allclose(turned, expected, atol=1e-4):
            return which, interleaved
    return None


def _rotates_the_first(config: Any, dims: int) -> bool:
    """Whether the rotated dimensions of a head are its first ones."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = getattr(config, "rope_parameters", None) or {}
    return dims == head or "partial_rotary_factor" in parameters or hasattr(config, "partial_rotary_factor")
