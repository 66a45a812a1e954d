"""What the caches will take, asked before they take it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import DemoError
from ..command import flag
from ..machine import size
from ..model import row_bytes
from .closeness import SLICE

SPARE = 0.9  # share of the free memory that caches may take; activations and other programs need some, too


@dataclass(frozen=True)
class Rows:
    """What a token takes in the caches of a model, in bytes."""

    kv: int  # keys and values of all layers
    queries: int  # queries of all layers
    logits: int  # float32

    @classmethod
    def of(cls, model: Any) -> Rows:
        config, itemsize = model.config.get_text_config(decoder=True), model.dtype.itemsize
        kv, heads = row_bytes(config, itemsize), config.num_attention_heads
        queries = kv // 2 * heads // (getattr(config, "num_key_value_heads", None) or heads)
        return cls(kv, queries, 4 * config.vocab_size)


def needed(rows: Rows, options: argparse.Namespace, prompt_tokens: int) -> int:
    """Bytes of all caches that live at once: the full one, Kara's and, where asked for, the random baseline's."""
    tokens = prompt_tokens + options.tokens
    compressions = max(0, (options.tokens - options.tail) // options.window)
    most = min(tokens, prompt_tokens + compressions * options.keep + options.window + options.tail)
    blocks = -(-most // options.block_size)
    pool = max(1, 2 * blocks - 1) * options.block_size * rows.kv  # KaraCache doubles its pool when it is full
    queries = (options.window + options.tail + 1) * rows.queries
    compressed = 1 if options.no_baseline else 2
    return tokens * rows.kv + compressed * (pool + queries) + 3 * SLICE * rows.logits


def check_memory(
    rows: Rows, options: argparse.Namespace, usual: argparse.Namespace, prompt_tokens: int, free: int | None
) -> None:
    """Refuse what would not fit into `free` bytes, in the name of the option that asks for more than is `usual`."""
    if free is None:
        return

    room = int(free * SPARE)
    takes = needed(rows, options, prompt_tokens)
    if takes <= room:
        return
    told = f"the caches would take {size(takes)} of memory, {size(free)} are free"
    for name in ("block_size", "tail", "tokens"):
        value, least = getattr(options, name), min(getattr(options, name), getattr(usual, name))

        def fits(count: int, name: str = name) -> bool:
            return needed(rows, argparse.Namespace(**(vars(options) | {name: count})), prompt_tokens) <= room

        if fits(least):
            most = _largest(fits, least, value)
            raise DemoError(f"{flag(name)}: expected at most {most:,} here, got {value:,}: {told}", 2)
    raise DemoError(f"--model, --tokens: expected caches that fit into {size(room)}, but {told}", 2)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest of low..high - 1 that fits, `low` being one that does, found by halving."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
