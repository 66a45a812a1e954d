"""What is measured, in which order, and where it is kept: one JSON file, written after every text, so that a run that
was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import kara_kernels
from demos.model import cache_root

from . import texts
from .decode import decoding, write
from .measure import AHEAD, PROMPT, Cell, Record, fidelity, recall
from .methods import ABLATION_RETENTION, DEFAULT, METHODS, RETENTIONS, TAIL, WINDOW, Method, ablations
from .tasks import haystacks

SCHEMA = 1
WINDOWS, HAYSTACK_WINDOWS = 8, 6
OWN_TOKENS, GREEDY_TOKENS = 2440, 600
GREEDY_PROMPTS = (
    "Explain step by step how a steam engine turns heat into motion.",
    "Write a story about two brothers who build a boat.",
    "A farmer has 17 sheep, 9 cows and 12 hens. Work out, in detail, what they need to eat in a month.",
    "Write a Python class for a bank account, with tests, and explain every line.",
)
DECODED = (DEFAULT, "kara, not ahead", "straight", "H2O", "R-KV", "SnapKV", "StreamingLLM", "random")
QUICK_METHODS = (DEFAULT, "straight", "random", "StreamingLLM", "H2O", "R-KV", "SnapKV")
QUICK_TEXTS = ("manual-1", "argparse", "licence-python", "readme-transformers")


@dataclass(frozen=True)
class Plan:
    """Everything that decides the figures."""

    model: str
    quick: bool
    seed: int

    @property
    def key(self) -> str:
        held = json.dumps([SCHEMA, asdict(self), kara_kernels.__version__, torch.__version__, transformers.__version__])
        return hashlib.sha256(held.encode()).hexdigest()[:16]


class Store:
    """The records of one plan. A file of another plan is put aside, never mixed in."""

    def __init__(self, path: Path, plan: Plan, facts: dict[str, Any]) -> None:
        self.path = path
        self.records: list[Record] = []
        self.head = {"schema": SCHEMA, "key": plan.key, "plan": asdict(plan), **facts}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("key") == plan.key:
                self.records = found["records"]
            else:
                path.rename(path.with_suffix(".other.json"))

    def missing(self, task: str, item: str, cells: Iterable[Cell]) -> list[Cell]:
        held = {(r["method"], r["retention"]) for r in self.records if (r["task"], r["item"]) == (task, item)}
        return [(method, retention) for method, retention in cells if (method.name, retention) not in held]

    def add(self, records: list[Record]) -> None:
        self.records += records
        beside = self.path.with_suffix(".part")
        lines = ",\n".join(json.dumps(record) for record in self.records)
        head = json.dumps({**self.head, "records": []}, indent=1)
        beside.write_text(head[: head.rindex("[]")] + "[\n" + lines + "\n]\n}\n", encoding="utf-8")
        os.replace(beside, self.path)


def facts(model: Any) -> dict[str, Any]:
    """What a reader of figures wants to know of the machine and the versions."""
    return {
        "kara_kernels": kara_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device}",
        "window": WINDOW,
        "tail": TAIL,
    }


def cells_of(methods: Iterable[Method], retentions: Iterable[float]) -> list[Cell]:
    """Methods that share their scores stand together."""
    ordered = sorted(methods, key=lambda method: str(method.scored_as))
    return [(method, retention) for method in ordered for retention in retentions]


def measure_all(
    model: Any, tokenizer: Any, plan: Plan, store: Store, say: Callable[[str], None], phase: Callable[..., Any]
) -> None:
    """Fills ``store``. ``phase(name, total)`` is a context manager that yields ``advance(count, note)``."""
    methods = [method for method in METHODS if not plan.quick or method.name in QUICK_METHODS]
    retentions = (0.3, 0.5) if plan.quick else RETENTIONS
    cells = cells_of(methods, retentions)
    extra = [] if plan.quick else cells_of(ablations(), [ABLATION_RETENTION])
    written = texts.shipped()
    if not plan.quick:
        written += _own(model, tokenizer, plan, say)
    length = PROMPT + WINDOWS * WINDOW + TAIL + AHEAD

    def keep(task: str, item: str, wanted: list[Cell], advance: Any, measure: Callable[..., Iterator[Record]]) -> None:
        """Measures of ``wanted`` what the store does not hold yet."""
        missing = store.missing(task, item, wanted)
        advance(len(wanted) - len(missing), item)
        found: list[Record] = []
        for record in measure(missing) if missing else ():
            found.append(record)
            if record["method"] != "full":
                advance(1, item)
        store.add(found)

    documents = []
    for text in written:
        ids = torch.tensor(tokenizer(text.text, add_special_tokens=False).input_ids[:length], device=model.device)
        if len(ids) == length and (not plan.quick or text.name in QUICK_TEXTS):
            documents.append((text, ids))
        elif len(ids) < length:
            say(f"left out {text.name}: {len(ids)} tokens, {length} are needed")
    # Ablations are read off every other text: they share the hour with everything else.
    asked = [cells if i % 2 else cells + extra for i in range(len(documents))]
    with phase("fidelity", sum(map(len, asked))) as advance:
        for (text, ids), some in zip(documents, asked, strict=True):
            name = f"{text.name} ({text.kind})"
            keep("fidelity", name, some, advance, partial(fidelity, model, name, ids, seed=plan.seed))

    filler = [text.text for text in written if text.kind in ("manual", "prose")]
    size = PROMPT + HAYSTACK_WINDOWS * WINDOW + TAIL
    stacks = haystacks(tokenizer, filler, 2 if plan.quick else 4, size, TAIL, plan.seed)
    with phase("recall", len(stacks) * len(cells)) as advance:
        for stack in stacks:
            keep("recall", stack.name, cells, advance, partial(recall, model, tokenizer, stack, seed=plan.seed))

    if not plan.quick:
        some = cells_of([method for method in METHODS if method.name in DECODED], (0.2, 0.3, 0.5))
        greedy = _greedy(model, tokenizer, plan, say)
        with phase("decoding", len(greedy) * len(some)) as advance:
            for i, (prompt, own) in enumerate(greedy):
                name = f"greedy-{i + 1}"
                keep("decoding", name, some, advance, partial(decoding, model, name, prompt, own))


def _kept(plan: Plan, what: str, make: Callable[[], Any]) -> Any:
    """JSON in the user's cache, made where missing."""
    key = hashlib.sha256(json.dumps([plan.model, plan.seed, what]).encode()).hexdigest()[:16]
    path = cache_root() / "quality" / f"{what.split()[0]}-{key}.json"
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(made), encoding="utf-8")
        os.replace(beside, path)
    return json.loads(path.read_text(encoding="utf-8"))


def _own(model: Any, tokenizer: Any, plan: Plan, say: Callable[[str], None]) -> list[texts.Text]:
    def make() -> list[dict[str, str]]:
        say("the model writes its own texts (once, about 15 minutes on two cores)")
        model.set_attn_implementation("sdpa")
        return [asdict(text) for text in texts.own(model, tokenizer, OWN_TOKENS, plan.seed)]

    return [texts.Text(**text) for text in _kept(plan, f"own {OWN_TOKENS}", make)]


def _greedy(
    model: Any, tokenizer: Any, plan: Plan, say: Callable[[str], None]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        for prompt in GREEDY_PROMPTS
    ]
    prompts = [tokenizer(chat, add_special_tokens=False).input_ids for chat in chats]
    given = [torch.tensor(prompt, device=model.device) for prompt in prompts]

    def make() -> list[list[int]]:
        say("the model writes greedily with its full cache (once, about 4 minutes on two cores)")
        model.set_attn_implementation("sdpa")
        return [text.tolist() for text in write(model, given, GREEDY_TOKENS)]

    found = _kept(plan, f"greedy {GREEDY_TOKENS}", make)
    return [(prompt, torch.tensor(text, device=model.device)) for prompt, text in zip(given, found, strict=True)]
