"""The demo: four servers in turn, with the same requests and the same memory."""

from __future__ import annotations

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kara_kernels.contexts.profile import Profile
from kara_kernels.integrations.vllm.contexts.settings import SAFEST

from ..machine import share_of_others, usable_cores
from ..model import packaged_model, row_bytes
from ..screen import Screen
from ..serve.report import write_json
from ..serve.server import Settings, serving
from . import report
from .chosen import chosen
from .documents import Asked, Document, asked, documents, requests
from .load import Client
from .profiling import METHOD, described, fixed_step, only, profiled

SHARE = 1 / 6  # of all contexts, uncompressed: what fits in memory
STAGING = 3 / 4  # of the memory holds contexts; the rest is for those that pass between disk and GPU
RECENT = 1.0  # half-life of uses, in seconds, with which the least recently used goes first
POOLED = 3  # contexts that the engine's own cache can hold
ANSWER_TOKENS = 16
GIB = 2**30


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the demo. Prints progress and returns what ``--json`` writes."""
    from transformers import AutoConfig, AutoTokenizer

    screen = Screen()
    phases: dict[str, float] = {}
    model = options.model or str(packaged_model(screen.say))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with screen.waiting(phases, "documents"):
        held = documents(tokenizer, options.contexts, options.tokens, options.seed)
        asks = requests(tokenizer, held, options.requests, options.seed)
    whole = row_bytes(AutoConfig.from_pretrained(model), 4) * options.tokens
    threads = options.threads or usable_cores()
    screen.say(
        f"{options.contexts} documents of {options.tokens:,} tokens take {options.contexts * whole / GIB:.2f} GiB as "
        f"they are; memory holds a sixth of them, the disk all; {threads} threads"
    )
    with screen.phase(phases, "profile", options.contexts, "documents") as advance:
        profile = profiled(model, held, options.work, ANSWER_TOKENS, threads, advance)
    step = fixed_step(profile, options.floor)
    only(profile, step).save(options.work / "fixed.json")
    fixed = described(step, options.tokens)
    shared = {
        "ram_gib": SHARE * options.contexts * whole / STAGING / GIB, "alpha": options.alpha,
        "disk": {"path": str(options.work / "store"), "gib": 1.25 * options.contexts * whole / GIB},
    }  # fmt: skip
    sides: dict[str, dict[str, Any] | None] = {
        "computed": None,
        "whole": shared | {"methods": ["none/exact"], "half_life": RECENT},
        "fixed": shared
        | {"profile": str(options.work / "fixed.json"), "methods": [METHOD], "half_life": RECENT, "floor": 0.0},
        "kara": shared
        | {"profile": str(options.work / "profile.json"), "methods": [SAFEST, METHOD], "floor": options.floor},
    }
    found = {}
    for side, contexts in sides.items():
        settings = _settings(options, model, threads, contexts)
        found[side] = _measure(screen, phases, side, settings, tokenizer, held, asks, options, profile)
    result = report.collect(options, model, held, asks, profile, fixed, found, phases)
    if options.picture is not None:
        from .picture import draw

        with screen.timed(phases, "picture"):
            draw(result, options.picture)
    report.show(screen, result)
    if options.json is not None:
        write_json(options.json, result)
        screen.say(f"figures: {options.json}")
    return result


def _settings(options: argparse.Namespace, model: str, threads: int, contexts: dict[str, Any] | None) -> Settings:
    import torch

    longest = options.tokens + 128
    return Settings(
        model=model, blocks=POOLED * -(-longest // options.block_size) + 1, block_size=options.block_size,
        max_model_len=longest, max_requests=2, dtype="float32", eager=True, cpu=not torch.cuda.is_available(),
        threads=threads, contexts=contexts, kara={"default": "off"} if contexts and "profile" in contexts else None,
    )  # fmt: skip


def _measure(
    screen: Screen, phases: dict[str, float], side: str, settings: Settings, tokenizer: Any, held: list[Document],
    asks: list[Asked], options: argparse.Namespace, profile: Profile,
) -> report.Side:  # fmt: skip
    name, store = report.NAMES[side], options.work / "store"
    shutil.rmtree(store, ignore_errors=True)
    warm = [asked(tokenizer, held, number, 1) for number in reversed(range(len(held)))]
    warm = warm if settings.contexts is not None else warm[-POOLED:]
    with ExitStack() as stack:
        with screen.waiting(phases, f"{name}: starting the server"):
            server = stack.enter_context(serving(settings, options.logs / f"contexts-{side}.log"))
        client = Client(server, store, options.tokens, ANSWER_TOKENS)
        with screen.phase(phases, f"{name}: first time", len(warm), "documents") as advance:
            client.ask_all(warm, advance, tokens=1)
        before = server.cpu_seconds()
        with screen.phase(phases, f"{name}: asked", len(asks), "requests") as advance:
            answers = client.ask_all(asks, advance)
        others = share_of_others(before, server.cpu_seconds())
    measured = next(iter(profile.contexts.values())).measured
    kept = chosen(store, held, settings.block_size, measured) if settings.contexts is not None else []
    shutil.rmtree(store, ignore_errors=True)
    return report.Side(answers, others, kept)


def work_folder(path: Path) -> Path:
    """A folder of the demo's own, for the profile and the store."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
