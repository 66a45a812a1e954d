"""What the demo does: generation with the full cache and with Kara, then one text through all caches.

**Closeness** is measured on one text, the one written with the full cache. It is fed (teacher forcing) to
the full cache, to Kara and to the random baseline, so all three predict the same next tokens from the same
history and differ only in what their caches still hold. A window falls due at a known token, so the text is
fed in slices that end exactly there: what a cache holds at any token is what it holds there when decoding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from kara_kernels.integrations.transformers import KaraCache

from .. import DemoError
from ..model import load
from ..screen import Advance, Screen
from . import report

# Tokens per forward of the teacher-forced text: each cache holds SLICE x vocabulary logits at a time.
SLICE = 64


@dataclass
class Decoded:
    """One run of ``generate()``."""

    ids: list[int]
    cache: Any
    prefill_seconds: float
    decode_seconds: float
    step_seconds: list[float] = field(repr=False)
    blocks: list[int] = field(repr=False)  # blocks in use when new token i was written


class _Watch:
    """A streamer: ``generate()`` hands it the prompt, then every token as soon as it is known."""

    def __init__(self, blocks_now: Callable[[], int], advance: Advance) -> None:
        self.blocks_now, self.advance = blocks_now, advance
        self.times: list[float] = []
        self.blocks: list[int] = []
        self.started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 2:  # the prompt, before anything is computed
            self.started = time.perf_counter()
            return
        self.times.append(time.perf_counter())
        self.blocks.append(self.blocks_now())
        self.advance(1, f"{self.blocks[-1]} blocks")

    def end(self) -> None:
        pass


def generate(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    cache: Any,
    settings: GenerationConfig,
    seed: int,
    blocks_now: Callable[[], int],
    advance: Advance,
) -> Decoded:
    """Decode with `cache`; the same `seed` before each run makes sampling comparable."""
    watch = _Watch(blocks_now, advance)
    torch.manual_seed(seed)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        generation_config=settings,
        streamer=watch,
    )
    times = watch.times
    return Decoded(
        ids=out[0, prompt.shape[1] :].tolist(),
        cache=cache,
        blocks=watch.blocks,
        prefill_seconds=times[0] - watch.started,
        decode_seconds=times[-1] - times[0],
        step_seconds=[after - before for before, after in pairwise(times)],
    )


def slices(fed: int, window: int, tail: int) -> Iterator[tuple[int, int]]:
    """Cut `fed` decoded tokens into ranges of at most SLICE that end wherever a window falls due.

    The first window is due when `window + tail` tokens are decoded; from then on `tail` of them lie behind
    the frontier already, so the next ones follow every `window` tokens.
    """
    start = 0
    while start < fed:
        due = window + tail
        if start >= due:
            due += ((start - due) // window + 1) * window
        stop = min(start + SLICE, due, fed)
        yield start, stop
        start = stop


@torch.inference_mode()
def closeness(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    ids: list[int],
    full: Any,
    others: dict[str, Any],
    window: int,
    tail: int,
    advance: Advance,
) -> dict[str, dict[str, list[float]]]:
    """Per predicted token: KL(full || other) in nats and whether both rank the same token first."""
    found: dict[str, dict[str, list[float]]] = {name: {"kl": [], "top1": []} for name in others}

    def forward(cache: Any, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits[0].float().log_softmax(-1)

    text = torch.tensor([ids], device=prompt.device)
    # The prompt's last position predicts the first token, so the last token is never fed.
    parts = [(prompt, 1)] + [(text[:, a:b], b - a) for a, b in slices(len(ids) - 1, window, tail)]
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
    """A policy that keeps tokens by lot, each layer and head its own."""
    generator = torch.Generator().manual_seed(seed)

    def score(*, k_cache: Any, block_tables: torch.Tensor, window: int, **_: Any) -> torch.Tensor:
        shape = (len(k_cache), block_tables.shape[0], k_cache[0].shape[2], window)
        return torch.rand(shape, generator=generator).to(block_tables.device)

    return score


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The prompt as the model expects it: in its chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def generation_settings(options: argparse.Namespace, model: PreTrainedModel) -> GenerationConfig:
    """Everything that shapes the text, spelt out: a model's own defaults must not differ between users."""
    sampling = options.temperature > 0
    chosen = {"temperature": options.temperature, "top_p": 0.95, "top_k": 0} if sampling else {}
    own = model.generation_config
    ends = own.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else (ends[0] if isinstance(ends, list) else ends)
    return GenerationConfig(
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        do_sample=sampling,
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        repetition_penalty=options.repetition_penalty,
        **chosen,
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole demo; prints as it goes and returns what ``--json`` writes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # that of reading files, which is short
    huggingface_hub.utils.enable_progress_bars()  # that of downloads, which is not
    if options.threads:
        torch.set_num_threads(options.threads)
    screen = Screen()
    phases: dict[str, float] = {}

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: PyTorch finds no GPU here", 2)

    with screen.timed(phases, "load"):
        model, tokenizer = load(options.model, dtype=options.dtype, device=device, say=screen.say)
    prompt = encode(tokenizer, options.prompt).to(device)
    length = prompt.shape[1]
    most = getattr(model.config, "max_position_embeddings", None)
    if most and length + options.tokens > most:
        raise DemoError(f"--tokens {options.tokens} and the prompt's {length} exceed the model's {most}", 2)

    def kara_cache(**changed: Any) -> KaraCache:
        names = ("window", "keep", "tail", "block_size", "chunk_fraction", "max_chunk", "pool", "redundancy", "backend")
        settings = {name: getattr(options, name) for name in names}
        try:
            return KaraCache(model, **(settings | changed))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise DemoError(f"this model or setting does not work with KaraCache: {error}", 2) from error

    with screen.timed(phases, "warm-up"):
        _warm_up(model, prompt, kara_cache(), min(options.window + options.tail, options.tokens))

    settings = generation_settings(options, model)
    full = DynamicCache(config=model.config)
    with screen.phase(phases, "decoding, full cache", options.tokens) as advance:
        decoded_full = generate(
            model,
            prompt,
            full,
            settings,
            options.seed,
            lambda: -(-full.get_seq_length() // options.block_size),
            advance,
        )
    kara = kara_cache()
    with screen.phase(phases, "decoding, Kara", options.tokens) as advance:
        decoded_kara = generate(model, prompt, kara, settings, options.seed, lambda: kara.blocks_in_use, advance)

    others = {"kara": kara_cache()}
    if not options.no_baseline:
        others["random"] = kara_cache(
            scorer=random_scorer(options.seed), chunk_fraction=0.0, pool="head", redundancy=0.0
        )
    with screen.phase(phases, "comparing, same text", options.tokens) as advance:
        close = closeness(
            model,
            prompt,
            decoded_full.ids,
            DynamicCache(config=model.config),
            others,
            options.window,
            options.tail,
            advance,
        )

    result = report.collect(options, model, tokenizer, length, decoded_full, decoded_kara, close, others, phases)
    if options.picture is not None:
        from .picture import draw

        with screen.timed(phases, "picture"):
            draw(result, options.picture)
    report.show(screen, result)
    if options.json is not None:
        report.write_json(options.json, result)
        screen.say(f"figures: {options.json}")
    return result


@torch.inference_mode()
def _warm_up(model: PreTrainedModel, prompt: torch.Tensor, cache: KaraCache, count: int) -> None:
    """One compression before the clock starts: threads, allocator, on a GPU the compiling of the kernels."""
    for tokens in (prompt, prompt[:, :1].expand(1, count)):
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
