"""Estimates the memory of the caches before they are allocated."""

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

SPARE = 0.9  # share of free memory for caches; activations and other programs need some too


@dataclass(frozen=True)
class Rows:
    """Bytes per token in the caches of a model."""

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
    """Bytes of all caches that exist at once: the full one, Kara's and, if requested, the random baseline's."""
    tokens = prompt_tokens + options.tokens
    compressions = max(0, (options.tokens - options.tail) // options.window)
    most = min(tokens, prompt_tokens + compressions * options.keep + options.window + options.tail)
    blocks = -(-most // options.block_size)
    pool = max(1, 2 * blocks - 1) * options.block_size * rows.kv  # KaraCache doubles a full pool
    queries = (options.window + options.tail + 1) * rows.queries
    compressed = 1 if options.no_baseline else 2
    return tokens * rows.kv + compressed * (pool + queries) + 3 * SLICE * rows.logits


def check_memory(
    rows: Rows, options: argparse.Namespace, usual: argparse.Namespace, prompt_tokens: int, free: int | None
) -> None:
    """Raise an error if the caches exceed `free` bytes. It names the option that exceeds its `usual` value."""
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
    """The largest of low..high - 1 that fits, by bisection. `low` must fit."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
