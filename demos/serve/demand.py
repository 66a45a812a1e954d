"""The load: prompts, and the blocks they need. Raises an error if there is no room for them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

from .. import DemoError
from ..machine import available_bytes, size
from ..model import row_bytes
from .prompts import PROMPTS, about_documents

CPU_BLOCK = 32  # on CPUs vLLM 0.32 needs multiples of this; a server takes a minute to report that


@dataclass(frozen=True)
class Load:
    """The load of the servers, and how many blocks it needs."""

    model: str
    prompts: list[str]
    lengths: list[int]  # tokens per prompt
    demand: int  # blocks of all requests if nothing is dropped
    limit: int  # blocks of the limited server
    longest: int  # tokens of the longest request

    def stages(self, plentiful: bool) -> dict[str, int]:
        """Blocks of the server in each comparison."""
        return {"limited": self.limit} | ({"plentiful": self.demand + len(self.prompts)} if plentiful else {})


def prepare(options: argparse.Namespace, model: str) -> Load:
    """Compute prompts and blocks. Raises an error before any server starts if model or memory have too little room."""
    prompts = about_documents(options.documents, options.document_tokens) if options.documents else PROMPTS
    lengths = prompt_lengths(model, prompts)
    needs = [blocks(length + options.tokens, options.block_size) for length in lengths]
    rounds, rest = divmod(options.requests, len(prompts))
    demand = rounds * sum(needs) + sum(needs[:rest])
    used = lengths[: options.requests]
    longest, least = max(used) + options.tokens, max(needs[: options.requests])
    limit = round(demand * options.budget)
    if limit < least:
        raise DemoError(f"--budget {options.budget:g} is {limit} blocks, but one request alone needs {least}", 2)
    most = demand + options.requests if not options.no_plentiful else limit
    _check_room(options, model, longest, most)
    asked = list(islice(cycle(prompts), options.requests))
    return Load(model, asked, list(islice(cycle(lengths), options.requests)), demand, limit, longest)


def _check_room(options: argparse.Namespace, model: str, longest: int, count: int) -> None:
    """`longest`: tokens of the longest request. `count`: blocks in total."""
    import torch
    from transformers import AutoConfig

    with _loading(f"the configuration of {model}"):
        config = AutoConfig.from_pretrained(model)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and longest + options.block_size > limit:
        most = limit - options.block_size - (longest - options.tokens)
        raise DemoError(f"--tokens: expected at most {most:,} with this model, got {options.tokens:,}", 2)
    cpu = not torch.cuda.is_available()
    if cpu and options.block_size % CPU_BLOCK:
        raise DemoError(f"--block-size: expected a multiple of {CPU_BLOCK} on a CPU, got {options.block_size}", 2)
    free = available_bytes() if cpu else None  # on a GPU vLLM plans its memory itself
    dtype = getattr(torch, options.dtype, None) or config.dtype or torch.float32
    each = row_bytes(config, dtype.itemsize) * options.block_size
    if free is not None and count * each > free:
        raise DemoError(
            f"--requests, --tokens: expected at most {free // each:,} blocks in all, got {count:,}, which would take "
            f"{size(count * each)}; {size(free)} of memory are free",
            2,
        )


def blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def prompt_lengths(model: str, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt in the model's chat template, as the server will count them."""
    from transformers import AutoTokenizer

    with _loading(f"the tokenizer and chat template of {model}"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) for chat in chats]


@contextmanager
def _loading(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise DemoError(f"cannot load {what}: {first}") from error
