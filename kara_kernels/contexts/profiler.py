"""Measures the profile of contexts in a transformers model: every method at every ratio, judged by queries."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import rank_rows
from ..paged import PagedCache
from ..payload import FORMS
from ..scorers import NAMED
from ..values import check_choice, check_count
from .codec import decode, encode
from .packet import Packet, Step
from .profile import ASK, Measured, ProfiledContext, Source, keys_of
from .replay import Replay, cache_of

BLOCK = 16
METHODS = (
    "none/int8", "kara_mean/int8", "compactor/int8", "snapkv/int8", "keydiff/exact", "knorm/exact", "snapkv/exact",
)  # fmt: skip
ROWS, FINER = (0.25, 0.5, 0.75, 1.0), (0.125, 0.25, 0.5, 1.0)  # shares of a context's rows; with 8 bits
MAKE = "{passage}\n\nA short question about the text above, ending with a question mark.\nQuestion:"
REPEAT = "\n\nRepeat the previous context exactly.\n\n"
PASSAGE = 120  # tokens
SLOW = 0.1  # seconds: what takes longer to decode is timed once


@dataclass(frozen=True)
class Settings:
    """What a profile depends on besides model and contexts."""

    methods: tuple[str, ...] = METHODS
    """``"scorer/form"`` each."""
    tokens: int = 768
    """Of a context at most; the rest is cut off. Whole blocks of 16."""
    queries: int = 3
    """Made by the model where a context brings none."""
    answer_tokens: int = 24
    judge_answers: bool = False
    """Also lets each compression answer: for cosines of embeddings, and for given answers. Much slower."""
    cache_dtype: str = "bfloat16"
    """Of the cache in serving: ``"bfloat16"``, ``"float16"`` or ``"float32"``. Rows are rounded to it first."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2 * BLOCK), ("queries", 1), ("answer_tokens", 1)):
            check_count(name, getattr(self, name), least, 2**31 - 1)
        check_choice("cache_dtype", self.cache_dtype, ("bfloat16", "float16", "float32"))
        for method in self.methods:
            scorer, _, form = method.partition("/")
            check_choice(f"method {method!r}: scorer", scorer, ("none", *NAMED))
            check_choice(f"method {method!r}: form", form, FORMS)


@dataclass
class _Query:
    text: str
    ids: Tensor
    answer: Tensor  # of the full cache
    truth: str | None
    log_probs: Tensor = field(default_factory=lambda: torch.empty(0))  # [answer, vocabulary]


class Profiler:
    """Profiles contexts one by one.

    Args:
        model, tokenizer: of transformers.
        ahead: angles for looking ahead; see :class:`~kara_kernels.scorers.Rows`.
        embed: texts to unit vectors ``[n, d]``, for cosines; None without them.
        say: called with what is being done now, and the share of the context that is done.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, *, ahead: Any = None,
        embed: Callable[[Sequence[str]], Tensor] | None = None,
        say: Callable[[str, float], None] = lambda text, done: None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.ahead, self.embed, self.say = ahead, embed, say
        self.dtype: torch.dtype = getattr(torch, settings.cache_dtype)
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        # A line's end ends an answer too.
        self.ends |= {token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])}

    def ids(self, text: str, special: bool = False) -> Tensor:
        found = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids[0]
        return found.to(self.model.device)

    def tokens_of(self, source: Source) -> Tensor:
        """The tokens that are profiled: whole blocks.

        Raises ValueError for a context of less than two blocks.
        """
        ids = self.ids(source.text, special=True)[: self.settings.tokens]
        ids = ids[: len(ids) // BLOCK * BLOCK]
        if len(ids) < 2 * BLOCK:
            raise ValueError(f"context {source.name!r}: expected at least {2 * BLOCK} tokens, got {len(ids)}")
        return ids

    @staticmethod
    def key_of(ids: Tensor) -> str:
        return next(keys_of(ids.tolist(), [len(ids)]))

    def profile(self, source: Source) -> ProfiledContext:
        """All methods on one context. Raises ValueError as :meth:`tokens_of` does."""
        ids = self.tokens_of(source)
        self.say("prefill", 0.0)
        begun = time.perf_counter()
        replay = Replay(self.model, ids, dtype=self.dtype, ahead=self.ahead)
        prefill = time.perf_counter() - begun
        self.say("questions", 0.05)
        queries = self._queries(source, replay)
        asked = self._judge(replay, replay.full(), queries)
        for query, log_probs in zip(queries, asked, strict=True):
            query.log_probs = log_probs
        measured: list[Measured] = []
        for number, method in enumerate(self.settings.methods):
            self.say(method, 0.2 + 0.8 * number / len(self.settings.methods))
            measured += self._method(method, replay, queries)
        return ProfiledContext(
            self.key_of(ids), source.name, len(ids), prefill, self._question_seconds(replay, queries),
            tuple(query.text for query in queries), tuple(measured),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- queries

    def _queries(self, source: Source, replay: Replay) -> list[_Query]:
        texts = source.queries or self._made(replay)
        truths = source.answers or (None,) * len(texts)
        found = []
        for text, truth in zip(texts, truths, strict=True):
            ids = self.ids(ASK.format(query=text))
            answer = replay.answer(replay.full(), ids, self.settings.answer_tokens, tuple(self.ends))
            found.append(_Query(text, ids, answer, truth))
        return found

    def _made(self, replay: Replay) -> tuple[str, ...]:
        """Questions that the model asks about passages of the context, drawn with the seed."""
        draw, made = random.Random(f"{self.settings.seed} {self.key_of(replay.ids)}"), []
        for _ in range(self.settings.queries):
            start = draw.randrange(max(1, len(replay.ids) - PASSAGE))
            passage = self.tokenizer.decode(replay.ids[start : start + PASSAGE], skip_special_tokens=True)
            prompt = self.ids(MAKE.format(passage=passage), special=True)
            behind = Replay(self.model, prompt[:-1])
            said = behind.answer(behind.full(), prompt[-1:], 32, tuple(self.ends))
            text = " ".join(self.tokenizer.decode(said, skip_special_tokens=True).split())
            made.append(re.split(r"(?<=\?)", text)[0].strip() or "What is the text above about?")
        return tuple(made)

    def _question_seconds(self, replay: Replay, queries: Sequence[_Query]) -> float:
        question = min((query.ids for query in queries), key=len)
        cache = replay.full()
        begun = time.perf_counter()
        replay.ask(cache, [question], [1])
        return time.perf_counter() - begun

    # ------------------------------------------------------------------------------------------------- methods

    def _method(self, method: str, replay: Replay, queries: Sequence[_Query]) -> list[Measured]:
        scorer, _, form = method.partition("/")
        order = None if scorer == "none" else self._order(scorer, replay)
        pool, table = _paged(replay.keys, replay.values, self.dtype)
        packet = encode(
            pool.k, pool.v, table, len(replay.ids), model="", context="", rows=order, form=form, scorer=scorer
        )
        return [self._step(method, packet.cut(step.sections), replay, queries) for step in self._steps(packet)]

    def _order(self, scorer: str, replay: Replay) -> Tensor:
        repeat = self.ids(REPEAT).tolist() if scorer == "kvzip" else None
        return rank_rows(NAMED[scorer](replay.rows(self.settings.seed, repeat)))

    @staticmethod
    def _steps(packet: Packet) -> list[Step]:
        """Those nearest to the shares of rows and of rows with 8 bits. Rows in the order of their tokens are never
        dropped: these would be the newest."""
        steps, tokens = packet.header.steps, packet.header.layout.tokens
        if not packet.header.layout.places:
            steps = tuple(step for step in steps if step.rows == tokens)
        coded = packet.header.layout.form == "int8"
        least = min(step.finer for step in steps)
        rows = [step for step in steps if not coded or step.finer == least]
        wanted = [_nearest(rows, "rows", share * tokens) for share in ROWS]
        if coded:
            finer = [step for step in steps if step.finer > least]
            wanted += [_nearest(finer, "finer", share * tokens) for share in FINER]
        return sorted(set(wanted), key=lambda step: step.nbytes)

    def _step(self, method: str, packet: Packet, replay: Replay, queries: Sequence[_Query]) -> Measured:
        step = packet.step
        keys, values = (torch.zeros_like(rows[:, :, : step.rows]) for rows in (replay.keys, replay.values))
        pool, table = _paged(keys, values, self.dtype)
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            decode(packet, pool.k, pool.v, table, to="front")
            times.append(time.perf_counter() - begun)
            if times[0] > SLOW:
                break
        found = [_rows(layers, step.rows).to(keys.dtype) for layers in (pool.k, pool.v or ())]
        kls, same = [], []
        for query, log_probs in zip(queries, self._judge(replay, cache_of(*found), queries), strict=True):
            full = query.log_probs
            kls.append((full.exp() * (full - log_probs)).sum(-1).clamp(min=0))
            same.append((full.argmax(-1) == log_probs.argmax(-1)).float())
        cosine, exact = self._answers(replay, found, queries) if self.settings.judge_answers else (None, None)
        return Measured(
            method, step.sections, step.ratio, step.nbytes, statistics.median(times), step.rows,
            float(torch.cat(kls).mean()), float(torch.cat(same).mean()), cosine, exact,
        )  # fmt: skip

    def _judge(self, replay: Replay, cache: Any, queries: Sequence[_Query]) -> list[Tensor]:
        """Log-probabilities of the full cache's answers, token by token, ``[answer, vocabulary]`` each."""
        said = [torch.cat((query.ids, query.answer[:-1])) for query in queries]
        return replay.ask(cache, said, [len(query.answer) for query in queries])

    def _answers(
        self, replay: Replay, found: Sequence[Tensor], queries: Sequence[_Query]
    ) -> tuple[float | None, float | None]:
        """Mean cosine to the full cache's answers, and the share of given answers that are met."""
        most, ends = self.settings.answer_tokens, tuple(self.ends)
        said = [self._text(replay.answer(cache_of(*found), query.ids, most, ends)) for query in queries]
        truths = [(query.truth, text) for query, text in zip(queries, said, strict=True) if query.truth is not None]
        exact = statistics.fmean(_meets(truth, text) for truth, text in truths) if truths else None
        if self.embed is None:
            return None, exact
        both = self.embed([*said, *(self._text(query.answer) for query in queries)])
        cosines = (both[: len(said)] * both[len(said) :]).sum(-1).clamp(0, 1)
        return float(cosines.mean()), exact

    def _text(self, answer: Tensor) -> str:
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()


def _nearest(steps: Sequence[Step], name: str, wanted: float) -> Step:
    """The step whose field is nearest to ``wanted``, the hardest of them."""
    return min(steps, key=lambda step: abs(getattr(step, name) - wanted))


def _meets(truth: str, text: str) -> float:
    """1 if the words of ``truth`` follow each other in ``text``, whatever their case and punctuation."""
    wanted, said = (" ".join(re.findall(r"\w+", part.lower())) for part in (truth, text))
    return float(f" {wanted} " in f" {said} ")


def _paged(keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[PagedCache, Tensor]:
    """Copies of rows ``[L, H, R, D]`` in a pool of ``dtype``, and its block table."""
    blocks = -(-keys.shape[2] // BLOCK)
    pools = []
    for rows in (keys, values):
        layers, heads, count, dim = rows.shape
        pool = rows.new_zeros(layers, blocks * BLOCK, heads, dim, dtype=dtype)
        pool[:, :count] = rows.transpose(1, 2)
        pools.append(list(pool.view(layers, blocks, BLOCK, heads, dim)))
    return PagedCache(*pools), torch.arange(blocks, dtype=torch.int32, device=keys.device)


def _rows(layers: Sequence[Tensor], count: int) -> Tensor:
    """The first rows of a pool, ``[L, H, count, D]``."""
    return torch.stack([layer.flatten(0, 1)[:count].transpose(0, 1) for layer in layers])
