"""Measures actual decoding: KaraCache compresses while it reads a text window by window, as in decoding.

The text is what the model generates greedily with its full cache. Until a compressed run leaves that text, both have
the same history. So the first token that the compressed model would choose differently is where its own greedy
generation would diverge. Forward passes end exactly where a window is due, so at every token the cache holds what it
would hold when decoding token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kara_kernels.integrations.transformers import KaraCache
from kara_kernels.integrations.transformers.rotary import find_look_ahead
from kara_kernels.scorers import Rows

from .methods import OURS, Method

SLICE = 128


@torch.inference_mode()
def write(model: Any, prompts: list[Tensor], tokens: int) -> list[Tensor]:
    """Greedy generations with the full cache, ``tokens`` tokens each."""
    texts = []
    for prompt in prompts:
        out = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, min_new_tokens=tokens,
            max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
        texts.append(out[0, len(prompt) :])
    return texts


def _scorer(method: Method, prompt: int, scale: float, ahead: Any) -> Callable[..., Tensor]:
    """A method as KaraCache's scorer, for one sequence. It sees what the compressed cache still holds."""

    def scores(*, query: Tensor, k_cache: Any, v_cache: Any, block_tables: Tensor, window_starts: Tensor,
               window: int) -> Tensor:  # fmt: skip
        start = int(window_starts[0])
        rows = torch.arange(start + query.shape[2], device=query.device)
        page = k_cache[0].shape[1]
        where = block_tables[0][rows // page].long(), rows % page
        keys, values = (torch.stack([pool[where].transpose(0, 1) for pool in cache]) for cache in (k_cache, v_cache))
        grouped = query[:, 0].unflatten(2, (keys.shape[1], -1))
        return method.scorer(Rows(grouped, keys, values, start, window, scale, start - prompt, ahead))[:, None]

    return scores


@torch.inference_mode()
def follow(model: Any, prompt: Tensor, text: Tensor, cache: Any, tail: int, window: int) -> Tensor:
    """Log-probabilities ``[n, vocabulary]`` after the prompt and after each token of ``text`` except the last."""
    out = [model(prompt[None], past_key_values=cache, logits_to_keep=1).logits[0]]
    due, start = window + tail, 0
    while start < len(text) - 1:
        stop = min(start + SLICE, due, len(text) - 1)
        out.append(model(text[None, start:stop], past_key_values=cache).logits[0])
        start = stop
        due += window if start == due else 0
    return torch.cat(out).float().log_softmax(-1)


def decoding(
    model: Any, name: str, prompt: Tensor, text: Tensor, cells: list[tuple[Method, float]]
) -> Iterator[dict[str, Any]]:
    """How long each method stays on the text, and its KL and top-1 agreement after the first compression."""
    model.set_attn_implementation("kara")
    ahead = find_look_ahead(model)
    scale = next(module.scaling for module in model.modules() if hasattr(module, "scaling"))
    full: Tensor | None = None
    for method, retention in cells:
        if full is None:
            full = follow(model, prompt, text, DynamicCache(), method.tail, method.window)
        keep = round(retention * method.window)
        ours = method.scorer is OURS
        cache = KaraCache(
            model, window=method.window, keep=keep, tail=method.tail,
            scorer=None if ours else _scorer(method, len(prompt), scale, ahead), **method.selection,
        )  # fmt: skip
        seen = follow(model, prompt, text, cache, method.tail, method.window)
        behind = method.window + method.tail + 1  # the first token read with a compressed cache
        kl = (full.exp() * (full - seen)).sum(-1)[behind:]
        left = (seen.argmax(-1) != text).nonzero()
        yield {
            "task": "decoding", "item": name, "method": method.name, "retention": retention,
            "kl": float(kl.mean()), "top1": float((full.argmax(-1) == seen.argmax(-1))[behind:].float().mean()),
            "until": int(left[0]) if len(left) else len(text), "of": len(text), "held": cache.retention,
            "score_seconds": sum(event.seconds for event in cache.events) / max(1, len(cache.events)),
        }  # fmt: skip
