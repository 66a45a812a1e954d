"""Measurements of one text or haystack, for every method and retention."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .methods import Cell
from .replay import Replay
from .tasks import Haystack

PROMPT = 64  # protected tokens at the start of every text
AHEAD = 192  # tokens that are read with the compressed cache
DISTANCES = (0, 16, 64, 128, AHEAD)  # since the compression, in tokens

Record = dict[str, Any]


def fidelity(model: Any, name: str, ids: Tensor, cells: list[Cell], seed: int) -> Iterator[Record]:
    """KL to the full cache (nats per token) and agreement of the most likely token, over the last ``AHEAD`` tokens."""
    replay = Replay(model, ids[:-AHEAD], PROMPT)
    full = replay.go_on(replay.full(), ids[-AHEAD:])
    probabilities, best = full.exp(), full.argmax(-1)

    def judge(cache: DynamicCache) -> Record:
        seen = replay.go_on(cache, ids[-AHEAD:])
        kl = (probabilities * (full - seen)).sum(-1)
        spans = list(itertools.pairwise(DISTANCES))
        return {
            "kl": float(kl.mean()),
            "top1": float((seen.argmax(-1) == best).float().mean()),
            "kl_by_distance": [float(kl[first:last].mean()) for first, last in spans],
        }

    yield from _judged("fidelity", name, replay, cells, seed, judge)


def recall(model: Any, tokenizer: Any, haystack: Haystack, cells: list[Cell], seed: int) -> Iterator[Record]:
    """Negative log-likelihood per token of every answer (nats), and whether greedy decoding would produce it."""
    replay = Replay(model, torch.tensor(haystack.ids, device=model.device), PROMPT)

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, device=model.device)

    asked = [(ids(case.question), ids(case.answer)) for case in haystack.cases]

    def judge(cache: DynamicCache) -> Record:
        texts = [torch.cat((question, answer[:-1])) for question, answer in asked]
        seen = replay.ask(cache, texts, [len(answer) for _, answer in asked])
        nll, exact = [], []
        for (_, answer), logits in zip(asked, seen, strict=True):
            nll.append(float(-logits.gather(-1, answer[:, None]).mean()))
            exact.append(bool((logits.argmax(-1) == answer).all()))
        return {"kinds": [case.kind for case in haystack.cases], "nll": nll, "exact": exact}

    yield from _judged("recall", haystack.name, replay, cells, seed, judge)


def _judged(
    task: str, item: str, replay: Replay, cells: list[Cell], seed: int, judge: Callable[[DynamicCache], Record]
) -> Iterator[Record]:
    """One record per cell. Methods with equal scores are scored once."""
    scored_as: Any = None
    scores: list[Tensor] = []
    seconds = 0.0
    for method, retention in cells:
        if method.scored_as != scored_as:
            windows = range(replay.windows(method.window, method.tail))
            began = time.perf_counter()
            scores = [method.scorer(replay.window(i, method.window, method.tail, seed)) for i in windows]
            seconds = (time.perf_counter() - began) / max(1, len(windows))
            scored_as = method.scored_as
        keep = method.keep(retention, scores)
        cache = replay.compressed(scores, keep, method.tail, **method.selection)
        held = sum(cache.get_seq_length(layer) for layer in range(len(replay.keys))) / len(replay.keys)
        yield {
            "task": task, "item": item, "method": method.name, "retention": retention,
            "held": held / replay.length, "score_seconds": seconds, **judge(cache),
        }  # fmt: skip
