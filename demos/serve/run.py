"""What the demo does: a server without Kara and one with it, the same blocks and the same load for both."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from .. import DemoError
from ..model import packaged_model
from ..screen import Screen
from . import report
from .load import drive
from .prompts import PROMPTS
from .server import Settings, serving

SIDES = {"vllm": "vLLM", "kara": "vLLM + Kara"}
WARM_TOKENS = 8  # fills buffers and starts threads; kernels for GPUs compile at the first compression


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole demo; prints as it goes and returns what ``--json`` writes."""
    screen = Screen()
    phases: dict[str, float] = {}
    model = options.model or str(packaged_model(screen.say))
    prompts = list(islice(cycle(PROMPTS), options.requests))
    lengths = prompt_lengths(model, prompts)
    demand = sum(blocks(length + options.tokens, options.block_size) for length in lengths)
    longest = max(lengths) + options.tokens
    limit = round(demand * options.budget)
    least = blocks(longest, options.block_size)
    if limit < least:
        raise DemoError(f"--budget {options.budget:g} is {limit} blocks, but one request alone needs {least}", 2)

    import torch

    settings = Settings(
        model=model,
        blocks=limit + 1,  # vLLM sets one aside as the block that is never used
        block_size=options.block_size,
        max_model_len=longest + options.block_size,
        max_requests=options.requests,
        dtype=options.dtype,
        eager=not options.compile,
        cpu=not torch.cuda.is_available(),
        threads=options.threads,
    )
    screen.say(
        f"{options.requests} requests of {options.tokens:,} new tokens each need {demand:,} blocks of "
        f"{options.block_size} tokens if nothing is dropped"
    )
    stages = {"limited": limit}
    if not options.no_plentiful:
        stages["plentiful"] = demand + options.requests
    found: dict[str, dict[str, Any]] = {}
    for stage, count in stages.items():
        screen.say(f"{stage} memory: {count:,} blocks")
        found[stage] = {"blocks": count}
        for side, name in SIDES.items():
            chosen = replace(settings, blocks=count + 1, kara=options.policy if side == "kara" else None)
            log = options.logs / f"{stage}-{side}.log"
            watched, start = _measure(screen, phases, f"{name}, {stage}", chosen, log, prompts, options)
            found[stage][side] = report.figures(watched, count, start)

    result = report.collect(options, model, settings, lengths, demand, found, phases)
    if options.picture is not None:
        from .picture import draw

        with screen.timed(phases, "picture"):
            draw(result, options.picture)
    report.show(screen, result)
    if options.json is not None:
        report.write_json(options.json, result)
        screen.say(f"figures: {options.json}")
    return result


def _measure(
    screen: Screen,
    phases: dict[str, float],
    name: str,
    settings: Settings,
    log: Path,
    prompts: list[str],
    options: argparse.Namespace,
) -> tuple[report.Watched, float]:
    with ExitStack() as stack:
        with screen.console.status(f"{name}: starting the server"), screen.timed(phases, f"start of {name}"):
            server = stack.enter_context(serving(settings, log))
        warm = WARM_TOKENS if settings.cpu else min(options.tokens, options.window + options.tail + options.block_size)
        drive(server, prompts, warm)
        with screen.phase(phases, name, len(prompts) * options.tokens) as advance:
            return drive(server, prompts, options.tokens, advance), server.start_seconds


def blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def prompt_lengths(model: str, prompts: list[str]) -> list[int]:
    """Tokens of every prompt in the model's chat template, as the server will count them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) for chat in chats]
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise DemoError(f"cannot load the tokenizer and chat template of {model}: {first}") from error
