"""Runs one text through a model once, then compresses the resulting cache in many ways and continues from each.

The full cache reads the text in one forward pass, which yields queries, keys and values of every token. A method then
scores every window of the decoded text, :func:`kara_kernels.compress_window` selects by these scores, and the model
continues from the compressed cache. The expensive part is done once for all methods, so hundreds of settings can be
compared. Decoding again for each would take days. One thing differs from decoding: the queries and keys of a window
come from a model that had seen everything before it, not from one with a compressed cache. ``decode.py`` measures that
effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kara_kernels import PagedCache, compress_window
from kara_kernels.integrations.transformers.rotary import find_look_ahead
from kara_kernels.scorers import Rows

PAGE = 16
_taken: list[tuple[Tensor, Tensor, Tensor]] | None = None  # inputs recorded by the attention below
_segments: Tensor | None = None  # [q] the segment of each new token; None: a single segment


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """transformers' sdpa attention with its own mask. Layers may hold different numbers of tokens, and new tokens see
    only those of their own segment."""
    if _taken is not None:
        _taken.append((query, key, value))
    new, held = query.shape[2], key.shape[2] - query.shape[2]
    mask = None
    if held and new > 1:
        mask = torch.ones(new, held + new, dtype=torch.bool, device=query.device).tril(held)
        if _segments is not None:
            mask[:, held:] &= _segments[:, None] == _segments
        mask = mask[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("replay", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("replay", lambda **kwargs: None)


class Replay:
    """A text in the full cache. The first ``prompt`` tokens are protected, the others count as decoded."""

    def __init__(self, model: Any, ids: Tensor, prompt: int) -> None:
        global _taken
        self.model, self.prompt, self.length = model, prompt, len(ids)
        self.ahead = find_look_ahead(model)
        model.set_attn_implementation("replay")
        _taken = []
        try:
            with torch.inference_mode():
                model(input_ids=ids[None], past_key_values=DynamicCache(), logits_to_keep=1)
            query, key, value = (torch.stack([layer[i][0] for layer in _taken]) for i in range(3))
        finally:
            _taken = None
        heads = key.shape[1]
        # [L, N, H, G, D] and [L, H, T, D]
        self.query = query.unflatten(1, (heads, -1)).permute(0, 3, 1, 2, 4).contiguous()
        self.keys, self.values = key, value
        self.scale = key.shape[-1] ** -0.5

    def windows(self, window: int, tail: int) -> int:
        """The number of windows of the decoded text that are followed by a tail."""
        return max(0, (self.length - self.prompt - tail) // window)

    def first(self, window: int, tail: int) -> int:
        """The start of the first window. The last window ends where the tail starts, so any rest is protected too."""
        return self.length - tail - self.windows(window, tail) * window

    def window(self, index: int, window: int, tail: int, seed: int = 0) -> Rows:
        start = self.first(window, tail) + index * window
        end = start + window + tail
        return Rows(
            self.query[:, start:end], self.keys[:, :, :end], self.values[:, :, :end], start, window, self.scale,
            seed * 1000 + index, self.ahead,
        )  # fmt: skip

    def full(self) -> DynamicCache:
        return _cache(self.keys, self.values)

    def compressed(self, scores: list[Tensor], keep: list[list[int]], tail: int, **selection: Any) -> DynamicCache:
        """The cache after reducing every window to ``keep[window][layer]`` tokens by its ``scores [L, H, W]``.

        The last window goes first, so that no window has moved before its turn.
        """
        pages = -(-self.length // PAGE)
        pools = []
        for rows in (self.keys, self.values):
            pool = rows.new_zeros(rows.shape[0], pages * PAGE, rows.shape[1], rows.shape[3])
            pool[:, : self.length] = rows.transpose(1, 2)
            pools.append(pool.view(rows.shape[0], pages, PAGE, rows.shape[1], rows.shape[3]))
        table = torch.arange(pages, dtype=torch.int32, device=self.keys.device)[None]
        cache = DynamicCache()
        layers = range(len(self.keys))
        alike = all(len(set(of_window)) == 1 for of_window in keep)
        for some in [list(layers)] if alike else [[i] for i in layers]:
            paged = PagedCache(*([pool[i] for i in some] for pool in pools))
            lengths = torch.tensor([self.length], dtype=torch.int32, device=self.keys.device)
            for index in reversed(range(len(scores))):
                window = scores[index].shape[-1]
                starts = torch.full_like(lengths, self.first(window, tail) + index * window)
                lengths = compress_window(
                    None, paged.k, paged.v, table, lengths, window=window, keep=keep[index][some[0]],
                    scores=scores[index][some, None], window_starts=starts, **selection,
                ).seq_lens  # fmt: skip
            for i in some:
                k, v = (pool[i].flatten(0, 1)[: int(lengths)].transpose(0, 1)[None] for pool in pools)
                cache.update(k, v, i)
        return cache

    def go_on(self, cache: DynamicCache, ids: Tensor) -> Tensor:
        """Log-probabilities ``[n, vocabulary]`` after each of ``ids [n]``, which follow the text in ``cache``."""
        positions = torch.arange(self.length, self.length + len(ids), device=ids.device)
        return self._forward(cache, ids, positions, 0)

    def ask(self, cache: DynamicCache, questions: list[Tensor], last: list[int]) -> list[Tensor]:
        """The same for many texts at once, each as if it alone followed the text. Returns the ``last`` of each."""
        global _segments
        ids = torch.cat(questions)
        _segments = torch.cat([torch.full_like(q, i) for i, q in enumerate(questions)])
        positions = torch.cat([torch.arange(len(q), device=q.device) for q in questions]) + self.length
        ends = torch.tensor([len(q) for q in questions]).cumsum(0).tolist()
        wanted = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, last, strict=True)])
        try:
            return list(self._forward(cache, ids, positions, wanted.to(ids.device)).split(last))
        finally:
            _segments = None

    @torch.inference_mode()
    def _forward(self, cache: DynamicCache, ids: Tensor, positions: Tensor, wanted: int | Tensor) -> Tensor:
        out = self.model(
            input_ids=ids[None], position_ids=positions[None], past_key_values=cache, logits_to_keep=wanted
        )
        return out.logits[0].float().log_softmax(-1)


def _cache(keys: Tensor, values: Tensor) -> DynamicCache:
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None], v[None], layer)
    return cache
