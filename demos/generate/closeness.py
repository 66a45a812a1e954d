"""How close caches stay to the full one, measured on the text written with the full cache.

The text is fed (teacher forcing) to the full cache, to Kara and to the random baseline. All three predict the same next
tokens from the same history and differ only in what their caches still hold. The text is fed in slices that end exactly
where a cache compresses, so at every token a cache holds what it would hold when decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from ..screen import Advance

SLICE = 64  # tokens per forward pass; each cache produces SLICE x vocabulary logits at a time

Found = dict[str, list[float]]


def slices(fed: int, stops: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Cut `fed` decoded tokens into ranges of at most SLICE tokens that end at each count in `stops`."""
    start = 0
    for stop in [*sorted(stop for stop in stops if stop < fed), fed]:
        while start < stop:
            end = min(start + SLICE, stop)
            yield start, end
            start = end


@torch.inference_mode()
def closeness(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    ids: list[int],
    full: Any,
    others: dict[str, Any],
    stops: Iterable[int],
    advance: Advance,
) -> dict[str, Found]:
    """For each predicted token: KL(full || other) in nats, and whether both rank the same token first.

    `stops`: the numbers of decoded tokens after which the `others` compress. They depend on token counts alone.
    """
    found: dict[str, Found] = {name: {"kl": [], "top1": []} for name in others}

    def forward(cache: Any, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits[0].float().log_softmax(-1)

    text = torch.tensor([ids], device=prompt.device)
    # The prompt's last position predicts the first token, so the last token is never fed.
    parts = [(prompt, 1)] + [(text[:, a:b], b - a) for a, b in slices(len(ids) - 1, stops)]
    for tokens, count in parts:
        expected = forward(full, tokens, count)
        for name, cache in others.items():
            got = forward(cache, tokens, count)
            kl = (expected.exp() * (expected - got)).sum(-1).clamp_min(0)  # below 0 by rounding only
            found[name]["kl"] += kl.tolist()
            found[name]["top1"] += (expected.argmax(-1) == got.argmax(-1)).float().tolist()
        advance(count)
    return found


def random_scorer(seed: int) -> Callable[..., torch.Tensor]:
    """A scorer that keeps random tokens, drawn separately for each layer and head."""
    generator = torch.Generator().manual_seed(seed)

    def score(*, k_cache: Any, block_tables: torch.Tensor, window: int, **_: Any) -> torch.Tensor:
        shape = (len(k_cache), block_tables.shape[0], k_cache[0].shape[2], window)
        return torch.rand(shape, generator=generator).to(block_tables.device)

    return score
