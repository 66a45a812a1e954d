"""The demo: decodes with the full cache and with Kara in turns, then feeds one text through all caches."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from kara_kernels.integrations.transformers import KaraCache

from .. import DemoError
from ..command import library_checks
from ..machine import available_bytes, cpu_seconds, share_of_others
from ..model import load
from ..screen import Screen, rough
from . import report
from .closeness import SLICE, closeness, random_scorer
from .decode import Decoding, Sampler, choose_threads, next_logits, take_turns
from .memory import Rows, check_memory
from .report import Compared, Decoded


@dataclass
class Stage:
    """State shared by all phases of the demo."""

    options: argparse.Namespace
    model: PreTrainedModel
    tokenizer: Any
    prompt: torch.Tensor
    screen: Screen
    phases: dict[str, float] = field(default_factory=dict)

    def full_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def kara_cache(self, **policy: Any) -> KaraCache:
        """A cache with the requested scoring and selection, or with `policy` instead."""
        settings = {name: getattr(self.options, name) for name in ("window", "keep", "tail", "block_size", "backend")}
        with library_checks():
            return KaraCache(self.model, **settings, **(policy or self.options.policy))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the demo. Prints progress and returns what ``--json`` writes."""
    stage = _load(options)
    screen, phases = stage.screen, stage.phases
    with screen.waiting(phases, "warm-up"):
        _warm_up(stage)
        trial = _threads(stage)
    decoded, others = _decode(stage)
    compared = _compare(stage, decoded)
    result = report.collect(options, stage.model, stage.tokenizer, trial, decoded, others, compared)
    if options.picture is not None:
        from .picture import draw

        with screen.timed(phases, "picture"):
            draw(result, options.picture)
    result["phases"] = {name: round(seconds, 3) for name, seconds in phases.items()}
    report.show(screen, result)
    if options.json is not None:
        report.write_json(options.json, result)
        screen.say(f"figures: {options.json}")
    return result


def _load(options: argparse.Namespace) -> Stage:
    """Load model, tokenizer and prompt. Raises an error if the model or the memory has too little room."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # for reading files, which is fast
    huggingface_hub.utils.enable_progress_bars()  # for downloads, which are slow
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: PyTorch finds no GPU here", 2)
    screen = Screen()
    phases: dict[str, float] = {}
    with screen.timed(phases, "load"):
        model, tokenizer = load(options.model, dtype=options.dtype, device=device, say=screen.say)
    prompt = encode(tokenizer, options.prompt).to(device)
    length = prompt.shape[1]
    most = getattr(model.config, "max_position_embeddings", None)
    if most and length + options.tokens > most:
        raise DemoError(f"--tokens {options.tokens} and the prompt's {length} exceed the model's {most}", 2)
    check_memory(Rows.of(model), options, options.usual, length, available_bytes(device))
    return Stage(options, model, tokenizer, prompt, screen, phases)


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The tokenised prompt ``[1, tokens]``, in the model's chat template if it has one."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        made = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        made = tokenizer(prompt, return_tensors="pt")
    return made["input_ids"]


@torch.inference_mode()
def _warm_up(stage: Stage) -> None:
    """Run one untimed compression: starts threads, fills the allocator and, on a GPU, compiles the kernels."""
    cache, options = stage.kara_cache(), stage.options
    next_logits(stage.model, stage.prompt, cache)
    due = min(options.window + options.tail, options.tokens)
    for start in range(0, due, SLICE):
        next_logits(stage.model, stage.prompt[:, :1].expand(1, min(SLICE, due - start)), cache)


def _threads(stage: Stage) -> dict[int, float]:
    """Set the number of threads. Returns the results of the trial, or {} if there was none."""
    options, screen = stage.options, stage.screen
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        return {}
    if stage.model.device.type != "cpu":
        return {}
    trial = choose_threads(stage.model, stage.prompt)
    chosen = torch.get_num_threads()
    tried = ", ".join(f"{seconds * 1e3:.0f} ms with {count}" for count, seconds in trial.items())
    screen.say(f"threads: {chosen}, after a trial (a token took {tried}; --threads N sets them)")
    screen.say(f"decoding will take about {rough(2 * options.tokens * trial[chosen])}")
    return trial


def _decode(stage: Stage) -> tuple[dict[str, Decoded], float | None]:
    """Decode with both caches in turns. Also returns the share of CPU time that other programs used."""
    options, model, prompt = stage.options, stage.model, stage.prompt
    full, kara = stage.full_cache(), stage.kara_cache()
    counts = {"full": lambda: -(-full.get_seq_length() // options.block_size), "kara": lambda: kara.blocks_in_use}
    decodings = {
        name: Decoding(model, prompt, cache, Sampler(options, model), counts[name], options.tokens)
        for name, cache in (("full", full), ("kara", kara))
    }
    before = cpu_seconds()
    with stage.screen.phase(stage.phases, "decoding in turns", options.tokens) as advance:
        take_turns(decodings, options.tokens, advance)
    others = share_of_others(before, cpu_seconds())
    held = {"full": report.held_in_full(full, options.block_size), "kara": report.held_in_kara(kara)}
    windows = {"full": [], "kara": report.windows(kara, prompt.shape[1])}
    return {
        name: Decoded(decoding.ids, decoding.seconds, decoding.blocks, held[name], windows[name])
        for name, decoding in decodings.items()
    }, others


def _compare(stage: Stage, decoded: dict[str, Decoded]) -> dict[str, Compared]:
    """Feed the full cache's text through the full cache, Kara and, if requested, the random baseline."""
    options, prompt = stage.options, stage.prompt
    caches = {"kara": stage.kara_cache()}
    if not options.no_baseline:
        caches["random"] = stage.kara_cache(scorer=random_scorer(options.seed), chunk_fraction=0.0)
    # When a cache compresses depends only on token counts, so all compress at the same tokens as when decoding.
    stops = [window.decoded_tokens for window in decoded["kara"].windows]
    with stage.screen.phase(stage.phases, "comparing, same text", options.tokens) as advance:
        found = closeness(stage.model, prompt, decoded["full"].ids, stage.full_cache(), caches, stops, advance)
    return {name: Compared(found[name], report.windows(cache, prompt.shape[1])) for name, cache in caches.items()}
