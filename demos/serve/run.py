"""The demo: a server without Kara and one with it, with the same blocks and the same load."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..machine import usable_cores
from ..model import packaged_model
from ..screen import Screen
from . import report
from .demand import Load, prepare
from .load import drive
from .server import Settings, serving

SIDES = {"vllm": "vLLM", "kara": "vLLM + Kara"}
# Of documents, if there are any: without Kara they are kept as they are.
CONTEXTS: dict[str, dict[str, Any]] = {"vllm": {"ram_gib": 1.0, "methods": ["none/exact"]}, "kara": {"ram_gib": 1.0}}
WARM_TOKENS = 8  # fills buffers and starts threads; on a GPU the kernels compile at the first compression


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the demo. Prints progress and returns what ``--json`` writes."""
    screen = Screen()
    phases: dict[str, float] = {}
    load = prepare(options, options.model or str(packaged_model(screen.say)))
    settings = _settings(options, load)
    screen.say(
        f"{options.requests} requests of {options.tokens:,} new tokens each need {load.demand:,} blocks of "
        f"{options.block_size} tokens if nothing is dropped"
    )
    if settings.cpu:
        screen.say(f"threads: {settings.threads or usable_cores()} (--threads N sets them)")
    found: dict[str, dict[str, Any]] = {}
    for stage, count in load.stages(not options.no_plentiful).items():
        screen.say(f"{stage} memory: {count:,} blocks")
        found[stage] = {"blocks": count}
        for side, name in SIDES.items():
            kara, contexts = options.given if side == "kara" else None, CONTEXTS[side] if options.documents else None
            chosen = replace(settings, blocks=count + 1, kara=kara, contexts=contexts)
            log = options.logs / f"{stage}-{side}.log"
            watched, start = _measure(screen, phases, f"{name}, {stage}", chosen, log, load.prompts, options)
            found[stage][side] = report.figures(watched, count, start)

    result = report.collect(options, load.model, settings, load.lengths, load.demand, found, phases)
    if options.picture is not None:
        from .picture import draw

        with screen.timed(phases, "picture"):
            draw(result, options.picture)
    report.show(screen, result)
    if options.json is not None:
        report.write_json(options.json, result)
        screen.say(f"figures: {options.json}")
    return result


def _settings(options: argparse.Namespace, load: Load) -> Settings:
    import torch

    return Settings(
        model=load.model,
        blocks=load.limit + 1,  # vLLM reserves one block that is never used
        block_size=options.block_size,
        max_model_len=load.longest + options.block_size,
        max_requests=options.requests,
        dtype=options.dtype,
        eager=not options.compile,
        cpu=not torch.cuda.is_available(),
        threads=options.threads,
    )


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
        with screen.waiting(phases, f"{name}: starting the server"):
            server = stack.enter_context(serving(settings, log))
        due = options.policy["window"] + options.policy["tail"] + options.block_size
        warm = WARM_TOKENS if settings.cpu else min(options.tokens, due)
        drive(server, prompts, warm)
        with screen.phase(phases, name, len(prompts) * options.tokens) as advance:
            return drive(server, prompts, options.tokens, advance), server.start_seconds
