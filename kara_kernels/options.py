"""The single list of options for scoring and selection, with two named sets of values.

Every field is declared, documented and checked only here. :func:`kara_kernels.compress_window` takes them as keywords,
:class:`kara_kernels.engine.Policy` inherits them, and integrations and benches pass them through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypedDict

from .values import check_choice, check_count, check_flag, check_number

ATTENTIONS = ("bidirectional", "causal")
REDUCTIONS = ("mean", "rms")
POOLS = ("head", "layer", "model")


class Options(TypedDict, total=False):
    """The fields of :class:`Scoring` and :class:`Selection` as keywords."""

    attention: str
    reduction: str
    value_norm: bool | None
    redundancy: float
    pool: str
    chunk_fraction: float
    max_chunk: int


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the keys of a window are scored. :func:`kara_kernels.ops.score_window` has the formulas.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    attention: str = "bidirectional"
    """``"bidirectional"`` lets every query see the whole window. ``"causal"``, an ablation, hides what comes later."""
    reduction: str = "rms"
    """Root mean square (``"rms"``) or ``"mean"`` over queries and GQA group."""
    value_norm: bool | None = None
    """Multiply each score by the Euclidean length of the value. None does so where a ``v_cache`` is given."""
    redundancy: float = 0.0
    """Weight of a key's similarity to the other keys, which is subtracted from its score."""

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("reduction", self.reduction, REDUCTIONS)
        if self.value_norm is not None:
            check_flag("value_norm", self.value_norm)
        # Always a float, because Triton would compile again for an int.
        object.__setattr__(self, "redundancy", check_number("redundancy", self.redundancy, 0.0, 3.4e38))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tokens are kept, given their scores.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    pool: str = "head"
    """Keep lists per KV head and layer (``"head"``), per ``"layer"`` (the mean over its heads), or one per sequence
    (``"model"``, the mean over heads and layers)."""
    chunk_fraction: float = 0.1
    """Share of ``keep`` that Token2Chunk may spend on gaps, ``0..1``; 0 is plain top-k. See
    :func:`kara_kernels.ops.expand_chunks`."""
    max_chunk: int = 8
    """Longest span that counts as a chunk, in tokens, both ends included."""

    def __post_init__(self) -> None:
        check_choice("pool", self.pool, POOLS)
        object.__setattr__(self, "chunk_fraction", check_number("chunk_fraction", self.chunk_fraction, 0.0, 1.0))
        check_count("max_chunk", self.max_chunk, 1, 2**31 - 1)

    def chunk_budget(self, keep: int) -> int:
        """The number of the ``keep`` tokens that may fill gaps. At least one token stays a candidate."""
        return min(round(self.chunk_fraction * keep), keep - 1)


OPTIONS = {field.name: field for part in (Scoring, Selection) for field in fields(part)}

RECOMMENDED: Mapping[str, Any] = MappingProxyType({name: field.default for name, field in OPTIONS.items()})
"""The defaults everywhere: what kept most of the meaning in the quality bench."""

PAPER: Mapping[str, Any] = MappingProxyType(
    {**RECOMMENDED, "reduction": "mean", "value_norm": False, "chunk_fraction": 0.3}
)
"""Kara as published (arXiv 2607.01237): ``compress_window(..., **PAPER)``."""


_DEFAULTS = Scoring(), Selection()


def split_options(given: Mapping[str, Any]) -> tuple[Scoring, Selection]:
    """Splits keywords into scoring and selection. Missing ones take their defaults.

    Raises:
        TypeError: an unknown name.
        TypeError, ValueError: a value out of range.
    """
    if not given:
        return _DEFAULTS
    if unknown := ", ".join(sorted(set(given) - set(OPTIONS))):
        raise TypeError(f"{unknown}: expected options among {', '.join(OPTIONS)}, got {unknown}")
    scoring = {name: value for name, value in given.items() if name in Scoring.__dataclass_fields__}
    selection = {name: value for name, value in given.items() if name in Selection.__dataclass_fields__}
    return Scoring(**scoring), Selection(**selection)
