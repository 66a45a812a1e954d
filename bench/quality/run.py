"""Runs the measurements of a plan in order."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import transformers

import kara_kernels
from bench.store import Store, digest
from demos.screen import Screen
from kara_kernels.contexts.profile import digest_of

from . import sources, texts
from .decode import decoding, write
from .measure import AHEAD, PROMPT, Record, fidelity, recall
from .methods import (
    ABLATION_RETENTION,
    DEFAULT,
    FULL,
    GUARDED_RETENTIONS,
    METHODS,
    RETENTIONS,
    SERVED_RETENTIONS,
    TAIL,
    WINDOW,
    Cell,
    Method,
    ablations,
    guards,
    served,
)
from .tasks import haystacks

WINDOWS, HAYSTACK_WINDOWS = 8, 6
OWN_TOKENS, GREEDY_TOKENS = 2560, 600
GREEDY_PROMPTS = (
    "Explain step by step how a steam engine turns heat into motion.",
    "Write a story about two brothers who build a boat.",
    "A farmer has 17 sheep, 9 cows and 12 hens. Work out, in detail, what they need to eat in a month.",
    "Write a Python class for a bank account, with tests, and explain every line.",
)
DECODED = (
    DEFAULT, "kara, not ahead", "straight", "Compactor", "KeyDiff", "H2O", "R-KV", "SnapKV", "StreamingLLM", "random",
)  # fmt: skip
QUICK_METHODS = (DEFAULT, "straight", "random", "StreamingLLM", "Compactor", "KeyDiff", "H2O", "R-KV", "SnapKV")
QUICK_TEXTS = ("manual-1", "argparse", "licence-python", "readme-transformers")


@dataclass(frozen=True)
class Plan:
    """The options of a run."""

    model: str
    quick: bool
    seed: int
    backwards: bool = False  # from the last text to the first
    dtype: str = "float32"


@dataclass(frozen=True)
class Item:
    """One text or haystack, the cells wanted of it, and how to measure missing ones."""

    task: str
    name: str
    content: Any  # the text, for the key
    cells: list[Cell]
    measure: Callable[[list[Cell]], Iterator[Record]]


def facts(plan: Plan, model: Any) -> dict[str, Any]:
    """Facts about the run, the versions and the machine for readers of the figures."""
    return {
        "plan": {"model": plan.model, "quick": plan.quick, "seed": plan.seed, "dtype": plan.dtype},
        "kara_kernels": kara_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device}",
        "window": WINDOW,
        "tail": TAIL,
    }


def cells_of(methods: Iterable[Method], retentions: Iterable[float]) -> list[Cell]:
    """All cells, with methods that share their scores next to each other."""
    alike: dict[Any, list[Method]] = {}
    for method in methods:
        alike.setdefault(method.scored_as, []).append(method)
    return [(method, retention) for some in alike.values() for method in some for retention in retentions]


class Run:
    """Measures what is not in the store yet."""

    def __init__(self, model: Any, tokenizer: Any, plan: Plan, store: Store, screen: Screen) -> None:
        self.model, self.tokenizer, self.plan, self.store, self.screen = model, tokenizer, plan, store, screen
        self.phases: dict[str, float] = {}
        self.methods = [method for method in METHODS if not plan.quick or method.name in QUICK_METHODS]
        self.cells = cells_of(self.methods, (0.3, 0.5) if plan.quick else RETENTIONS)
        versions = platform.python_version(), torch.__version__, transformers.__version__
        self._writer = digest(digest_of(model), plan.seed, *versions)
        self._reader = digest(self._writer, platform.machine(), torch.get_num_threads(), str(model.device))
        # Read all code now. If a file is edited during the run, the run still measures the earlier code.
        self._files = {
            (task, own): sources.of_files(task, own, model.device.type)
            for task in sources.BENCH
            for own in (False, True)
        }  # fmt: skip
        every = [FULL, *METHODS, *served(), *guards(), *ablations()]
        self._methods = {method.name: sources.of_method(method) for method in every}
        self._texts_by, self._greedy_by = sources.of_callable(texts.own), sources.of_callable(write)

    def records(self) -> list[Record]:
        """Every record of the plan, in order."""
        written = self._texts()
        found = self._measured("fidelity", list(self._documents(written)))
        found += self._measured("recall", list(self._haystacks(written)))
        if not self.plan.quick:
            found += self._measured("decoding", list(self._generations()))
        return found

    def key(self, item: Item, cell: Cell) -> str:
        """A key of everything a record depends on: code, model, versions, processors, the text and the method."""
        method, retention = cell
        code = self._files[item.task, method.own_scores], self._methods[method.name]
        return digest(self._reader, code, item.task, item.name, item.content, retention)

    def _measured(self, task: str, items: list[Item]) -> list[Record]:
        wanted = [[(self.key(item, cell), cell) for cell in item.cells] for item in items]
        missing = [[(key, cell) for key, cell in own if self.store.get(key) is None] for own in wanted]
        total = sum(map(len, missing))
        held = sum(map(len, wanted)) - total
        if held:
            self.screen.say(f"{task}: {held:,} measurements of an earlier run still hold, {total:,} are missing")
        if total:
            with self.screen.phase(self.phases, task, total, "measurements") as advance:
                for item, some in list(zip(items, missing, strict=True))[:: -1 if self.plan.backwards else 1]:
                    left = [(key, cell) for key, cell in some if self.store.get(key) is None]
                    advance(len(some) - len(left))  # another process has measured these since
                    found = item.measure([cell for _, cell in left]) if left else ()
                    for (key, _), record in zip(left, found, strict=True):
                        self.store.put(key, record)
                        advance(1, item.name)
        records = [self.store.get(key) for own in wanted for key, _ in own]
        return [record for record in records if record is not None]

    def _texts(self) -> list[texts.Text]:
        if self.plan.quick:
            return [text for text in texts.shipped() if text.name in QUICK_TEXTS]

        def make() -> list[dict[str, str]]:
            self.model.set_attn_implementation("sdpa")
            with self.screen.waiting(self.phases, "the model writes its own texts (once, 15 minutes on two cores)"):
                return [asdict(text) for text in texts.own(self.model, self.tokenizer, OWN_TOKENS, self.plan.seed)]

        key = digest("own", self._writer, OWN_TOKENS, self._texts_by)
        return texts.shipped() + [texts.Text(**text) for text in self.store.kept(key, make)]

    def _documents(self, written: list[texts.Text]) -> Iterator[Item]:
        cells = self.cells + cells_of(served()[:1] if self.plan.quick else served(), SERVED_RETENTIONS)
        cells += [] if self.plan.quick else cells_of(guards(), GUARDED_RETENTIONS)
        extra = [] if self.plan.quick else cells_of(ablations(), [ABLATION_RETENTION])
        length, read = PROMPT + WINDOWS * WINDOW + TAIL + AHEAD, 0
        for text in written:
            ids = self.tokenizer(text.text, add_special_tokens=False).input_ids[:length]
            if len(ids) < length:
                self.screen.say(f"left out {text.name}: {len(ids)} tokens, {length} are needed")
                continue
            # Ablations use every other text, to keep the whole run within an hour.
            own, read = cells if read % 2 else cells + extra, read + 1
            name, given = f"{text.name} ({text.kind})", torch.tensor(ids, device=self.model.device)
            yield Item("fidelity", name, ids, own, partial(fidelity, self.model, name, given, seed=self.plan.seed))

    def _haystacks(self, written: list[texts.Text]) -> Iterator[Item]:
        filler = [text.text for text in written if text.kind in ("manual", "prose")]
        size, count = PROMPT + HAYSTACK_WINDOWS * WINDOW + TAIL, 2 if self.plan.quick else 4
        for stack in haystacks(self.tokenizer, filler, count, size, TAIL, self.plan.seed):
            content = stack.ids, [asdict(case) for case in stack.cases]
            measure = partial(recall, self.model, self.tokenizer, stack, seed=self.plan.seed)
            yield Item("recall", stack.name, content, [(FULL, 1.0), *self.cells], measure)

    def _generations(self) -> Iterator[Item]:
        cells = cells_of([method for method in METHODS if method.name in DECODED], (0.2, 0.3, 0.5))
        chats = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in GREEDY_PROMPTS
        ]
        prompts = [self.tokenizer(chat, add_special_tokens=False).input_ids for chat in chats]

        def tensors(rows: list[list[int]]) -> list[torch.Tensor]:
            return [torch.tensor(row, device=self.model.device) for row in rows]

        def make() -> list[list[int]]:
            self.model.set_attn_implementation("sdpa")
            with self.screen.waiting(self.phases, "the model writes greedily (once, 4 minutes on two cores)"):
                return [text.tolist() for text in write(self.model, tensors(prompts), GREEDY_TOKENS)]

        key = digest("greedy", self._writer, GREEDY_TOKENS, prompts, self._greedy_by)
        found = self.store.kept(key, make)
        for i, (prompt, text) in enumerate(zip(tensors(prompts), tensors(found), strict=True)):
            name, content = f"greedy-{i + 1}", [prompts[i], found[i]]
            yield Item("decoding", name, content, cells, partial(decoding, self.model, name, prompt, text))
