"""Decodes one prompt with several caches in turns, after a short trial that chooses the number of threads.

The caches take turns token by token, so other load on the machine slows all of them equally.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..screen import Advance

TRIAL_STEPS = 7  # tokens decoded with each number of threads; the first is not counted
TRIAL_SECONDS = 3.0  # limit for each number of threads, for models that are slow per token
TOP_P = 0.95


class Sampler:
    """Picks the next token with repetition penalty, temperature and its own random generator.

    Everything that affects the text is set here, so that a model's own defaults have no influence.
    """

    def __init__(self, options: argparse.Namespace, model: PreTrainedModel) -> None:
        ends = model.generation_config.eos_token_id
        steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
        if ends is not None:  # the model is not allowed to stop
            ends = ends if isinstance(ends, list) else [ends]
            steps.append(SuppressTokensLogitsProcessor(ends, device=model.device))
        self.drawn = options.temperature > 0
        if self.drawn:
            steps += [TemperatureLogitsWarper(options.temperature), TopPLogitsWarper(TOP_P)]
        self.steps = steps
        self.chance = torch.Generator(model.device).manual_seed(options.seed)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``ids [1, n]`` so far, ``logits [1, vocabulary]`` -> ``[1, 1]``."""
        scores = self.steps(ids, logits.float())
        if self.drawn:
            return torch.multinomial(scores.softmax(-1), 1, generator=self.chance)
        return scores.argmax(-1, keepdim=True)


class Decoding:
    """A text that grows token by token in one cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: torch.Tensor,
        cache: Any,
        sampler: Sampler,
        blocks_now: Callable[[], int],
        tokens: int,
    ) -> None:
        self.model, self.cache, self.sampler, self.blocks_now = model, cache, sampler, blocks_now
        self.seconds: list[float] = []  # of every new token; the first is computed with the prompt
        self.blocks: list[int] = []  # in use when new token i was known
        self.begun = self.length = prompt.shape[1]
        self.text = torch.cat([prompt, prompt.new_zeros(1, tokens)], 1)

    def step(self) -> None:
        """Decode one more token. The first step also computes the prompt."""
        started = time.perf_counter()
        end = self.length
        fed = self.text[:, end - 1 : end] if self.seconds else self.text[:, :end]
        logits = next_logits(self.model, fed, self.cache)
        token = self.sampler(self.text[:, :end], logits)
        self.text[:, end : end + 1] = token
        token.item()  # waits for the GPU, so that its time is included
        self.length += 1
        self.seconds.append(time.perf_counter() - started)
        self.blocks.append(self.blocks_now())

    @property
    def ids(self) -> list[int]:
        """The new tokens."""
        return self.text[0, self.begun : self.length].tolist()


def next_logits(model: PreTrainedModel, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Append ``tokens [1, q]`` to `cache` and return the logits of the next token, ``[1, vocabulary]``."""
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


@torch.inference_mode()
def take_turns(decodings: Mapping[str, Decoding], tokens: int, advance: Advance) -> None:
    """Decode `tokens` new tokens with each cache, one token at a time."""
    for _ in range(tokens):
        for decoding in decodings.values():
            decoding.step()
        counts = ", ".join(f"{name} {decoding.blocks[-1]}" for name, decoding in decodings.items())
        advance(1, f"blocks: {counts}")


def thread_counts(most: int) -> Iterator[int]:
    """1, 2, 4, ... and `most`."""
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


@torch.inference_mode()
def choose_threads(model: PreTrainedModel, prompt: torch.Tensor) -> dict[int, float]:
    """Set the fastest number of threads. Returns the seconds per token for each number tried.

    PyTorch's default is the maximum. It is too many when another program is busy: threads wait for each other at every
    layer, so one thread without a free core delays all the others.
    """
    most = torch.get_num_threads()
    cache = DynamicCache(config=model.config)
    next_logits(model, prompt, cache)  # also brings the weights into memory
    found: dict[int, float] = {}
    for count in thread_counts(most):
        torch.set_num_threads(count)
        found[count] = _token_seconds(lambda: next_logits(model, prompt[:, -1:], cache))
        if found[count] > min(found.values()):
            break  # more threads would be slower still
    torch.set_num_threads(min(found, key=found.__getitem__))
    return found


def _token_seconds(step: Callable[[], object]) -> float:
    """Median seconds per step, without the first."""
    step()
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < TRIAL_STEPS and time.perf_counter() - began < TRIAL_SECONDS:
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
