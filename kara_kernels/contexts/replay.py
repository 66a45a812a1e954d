"""One context in a transformers model: its rows and queries, and queries asked behind rows that a codec gave back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ahead import LookAhead
from ..scorers import Repetition, Rows

ATTENTION = "kara-contexts"
MOST_REPEATED = 2048  # tokens of one pass of a repetition (KVzip, arXiv 2505.23416)


@dataclass
class _Pass:
    """What the attention below does and sees in one forward pass."""

    segments: Tensor | None = None  # [q]: new tokens see those of their own segment only; None: all before them
    keep: bool = False
    query: list[Tensor] = field(default_factory=list)  # per layer, [H*G, q, D]
    keys: list[Tensor] = field(default_factory=list)  # of the new tokens, [H, q, D]
    scaling: float | None = None


_now = _Pass()


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """transformers' sdpa attention with a mask of its own: all of the cache, and what came before in the segment."""
    new, held = query.shape[2], key.shape[2] - query.shape[2]
    if _now.keep:
        _now.query.append(query[0])
        _now.keys.append(key[0, :, held:])
        _now.scaling = kwargs.get("scaling")
    mask = None
    if held and new > 1:
        mask = torch.ones(new, held + new, dtype=torch.bool, device=query.device).tril(held)
        if _now.segments is not None:
            mask[:, held:] &= _now.segments[:, None] == _now.segments
        mask = mask[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda **kwargs: None)


@contextmanager
def _passing(**options: Any) -> Iterator[_Pass]:
    global _now
    before, _now = _now, _Pass(**options)
    try:
        yield _now
    finally:
        _now = before


class Replay:
    """A context in the full cache of a model with full attention in all layers.

    Args:
        model: a causal language model of transformers. Its attention implementation is replaced.
        ids: int64 ``[C]``, the context's tokens.
        dtype: to which rows are rounded, as a serving cache of this dtype has them; None: as the model has them.
        ahead: angles for looking ahead; see :class:`~kara_kernels.scorers.Rows`.

    Raises:
        ValueError: a model with layers that do not keep all rows.
    """

    def __init__(
        self, model: Any, ids: Tensor, *, dtype: torch.dtype | None = None,
        ahead: Callable[[int, torch.device], LookAhead] | None = None,
    ) -> None:  # fmt: skip
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(model.config, "sliding_window", None):
            raise ValueError(f"model: expected full attention in all layers, got {', '.join(sorted(kinds))}")
        self.model, self.ids, self.ahead = model, ids, ahead
        model.set_attn_implementation(ATTENTION)
        cache = DynamicCache()
        with _passing(keep=True) as seen:
            self._forward(cache, ids, torch.arange(len(ids), device=ids.device), torch.zeros(1, dtype=torch.long))
        self.keys, self.values = (  # [L, H, C, D]
            torch.stack([getattr(layer, half)[0] for layer in cache.layers]) for half in ("keys", "values")
        )
        if dtype is not None:
            self.keys, self.values = (rows.to(dtype).to(rows.dtype) for rows in (self.keys, self.values))
        self.scale = seen.scaling if seen.scaling is not None else self.keys.shape[-1] ** -0.5
        self.query = self._grouped(seen.query)

    def _grouped(self, query: list[Tensor]) -> Tensor:
        """``[L, q, H, G, D]`` from ``[H*G, q, D]`` of each layer."""
        return torch.stack(query).unflatten(1, (self.keys.shape[1], -1)).permute(0, 3, 1, 2, 4)

    def rows(self, seed: int = 0, repeat: Sequence[int] | None = None) -> Rows:
        """What scorers take. ``repeat``: tokens of an instruction to repeat what was said, for KVzip."""
        passes = () if repeat is None else tuple(self._repetitions(torch.tensor(repeat, device=self.ids.device)))
        return Rows(
            self.query, self.keys, self.values, 0, len(self.ids), self.scale, seed, self.ahead, repetitions=passes
        )

    def _repetitions(self, instruction: Tensor) -> Iterator[Repetition]:
        for start in range(0, len(self.ids), MOST_REPEATED):
            part = self.ids[start : start + MOST_REPEATED]
            said = torch.cat((instruction, part))
            with _passing(keep=True) as seen:
                self.ask(self.full(), [said], [1])
            yield Repetition(start, len(part), self._grouped(seen.query), torch.stack(seen.keys))

    def full(self) -> DynamicCache:
        return cache_of(self.keys, self.values)

    def ask(self, cache: DynamicCache, questions: Sequence[Tensor], last: Sequence[int]) -> list[Tensor]:
        """Log-probabilities ``[last, vocabulary]`` of the ``last`` tokens of each question, in one pass, each as if it
        alone followed the context. ``cache`` takes up the questions."""
        ids = torch.cat(list(questions))
        segments = torch.cat([torch.full_like(q, i) for i, q in enumerate(questions)])
        positions = torch.cat([torch.arange(len(q), device=q.device) for q in questions]) + len(self.ids)
        ends = torch.tensor([len(q) for q in questions]).cumsum(0).tolist()
        wanted = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, last, strict=True)])
        if _now.keep:  # a single segment
            return [self._forward(cache, ids, positions, wanted)]
        with _passing(segments=segments):
            return list(self._forward(cache, ids, positions, wanted).split(list(last)))

    def answer(self, cache: DynamicCache, question: Tensor, most: int, ends: Sequence[int]) -> Tensor:
        """The most probable continuation of a question, int64 ``[1..most]``, up to one of the tokens ``ends``, which is
        part of it. ``cache`` takes up question and answer."""
        said: list[int] = []
        ids, position = question, len(self.ids)
        while len(said) < most and (not said or said[-1] not in ends):
            places = torch.arange(position, position + len(ids), device=ids.device)
            position += len(ids)
            best = self._forward(cache, ids, places, torch.tensor([len(ids) - 1]))[-1].argmax()
            said.append(int(best))
            ids = best[None]
        return torch.tensor(said, device=question.device)

    @torch.inference_mode()
    def _forward(self, cache: DynamicCache, ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids[None], position_ids=positions[None], past_key_values=cache,
            logits_to_keep=wanted.to(ids.device),
        )  # fmt: skip
        return out.logits[0].float().log_softmax(-1)


def cache_of(keys: Tensor, values: Tensor) -> DynamicCache:
    """A cache with copies of ``keys [L, H, R, D]`` and ``values [L, H, R, Dv]``."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None].clone(), v[None].clone(), layer)
    return cache
