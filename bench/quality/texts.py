"""Texts for measurements: files shipped with Python and its packages, and text written by the model.

Nothing is downloaded. Every text is read from the installation at run time, and none is copied into this repository.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

QUESTIONS = (
    "Why does bread rise, and what can go wrong?",
    "Explain how a sailing boat can go against the wind.",
    "What should I look at when I buy a used bicycle?",
    "Tell me about the history of the lighthouse.",
    "How do I plan a vegetable garden for a small family?",
    "What is the difference between a virus and a bacterium?",
    "Write a short story about a clockmaker who loses a wheel.",
    "How does a bank decide whether to give a loan?",
    "Give me a plan for learning to play the piano in a year.",
    "Why is the sky blue and the sunset red?",
    "Which sights would you show a friend in Rome, and why?",
    "How do I find out why my computer is slow?",
    "Describe the water cycle to a child.",
    "What makes a good team, in your opinion?",
)
ESSAYS = (
    "Write a very long story about a ship's cook who finds an island that is on no map.",
    "Think step by step, at length: how would you organise a library of ten thousand books from nothing?",
    "Write a long travel report about a journey by train across a continent, with all the people you meet.",
)


@dataclass(frozen=True)
class Text:
    name: str
    kind: str
    text: str


def shipped() -> list[Text]:
    """Manual, code, licences and prose found in any installation of Python and torch."""
    from pydoc_data.topics import topics

    manual = "\n\n".join(topics[key] for key in sorted(topics))
    return [
        Text("manual-1", "manual", manual[40_000:70_000]),
        Text("manual-2", "manual", manual[250_000:280_000]),
        Text("argparse", "code", _source("argparse", 20_000)),
        Text("ipaddress", "code", _source("ipaddress", 15_000)),
        Text("decimal", "code", _source("_pydecimal", 90_000)),
        Text("licence-torch", "licence", _licence("torch")),
        Text("licence-python", "licence", _licence("matplotlib")),
        Text("readme-torch", "prose", importlib.metadata.metadata("torch")["Description"] or ""),
        Text("readme-transformers", "prose", importlib.metadata.metadata("transformers")["Description"] or ""),
    ]


def _source(module: str, first: int) -> str:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8")[first:] if spec and spec.origin else ""


def _licence(package: str) -> str:
    files = [f for f in importlib.metadata.files(package) or () if "LICENSE" in f.name.upper()]
    return "\n\n".join(Path(f.locate()).read_text(encoding="utf-8", errors="replace") for f in sorted(files))


def own(model: Any, tokenizer: Any, tokens: int, seed: int = 0) -> list[Text]:
    """Text written by the model: long generations and long conversations. Takes minutes on a CPU."""
    essays = _sample(model, tokenizer, ESSAYS, tokens, seed, stop=False)
    texts = [Text(f"generation-{i + 1}", "generation", text) for i, text in enumerate(essays)]
    answers = _sample(model, tokenizer, QUESTIONS, 240, seed, stop=True)
    turns = [{"role": role, "content": text} for pair in zip(QUESTIONS, answers, strict=True)
             for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    texts.append(Text("dialogue", "dialogue", tokenizer.apply_chat_template(turns, tokenize=False)))
    return texts


@torch.inference_mode()
def _sample(model: Any, tokenizer: Any, prompts: tuple[str, ...], tokens: int, seed: int, stop: bool) -> list[str]:
    """Samples at temperature 1 with top-p 0.95 and a light repetition penalty. Long greedy texts of a small model fall
    into loops, which any method preserves."""
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                           add_generation_prompt=True) for prompt in prompts]  # fmt: skip
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    torch.manual_seed(seed)
    out = model.generate(
        **batch, do_sample=True, temperature=1.0, top_p=0.95, top_k=0, repetition_penalty=1.05,
        min_new_tokens=1 if stop else tokens, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
