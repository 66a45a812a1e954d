"""Documents out of what Python ships, with facts hidden in them that only they tell, and requests about them."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from kara_kernels.contexts.profile import ASK

from .. import DemoError

MODULES = (
    "argparse ipaddress tarfile subprocess typing inspect difflib mailbox statistics zipfile pathlib logging pickle "
    "textwrap calendar configparser"
).split()
NAMES = (
    "Alder Birch Cedar Dogwood Elder Fir Gorse Hazel Ivy Juniper Larch Maple Nettle Oak Poplar Quince Rowan Spruce "
    "Tamarisk Viburnum Willow Yew"
).split()
FACTS = 4  # of each document; the profile is judged by the first, requests ask for the others
LONG = 12  # characters of source or prose per token, more than enough


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    ids: list[int]
    queries: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """One request."""

    document: int
    prompt: list[int]
    answer: str


def documents(tokenizer: Any, count: int, tokens: int, seed: int) -> list[Document]:
    """Documents of exactly ``tokens`` tokens."""
    draw = random.Random(seed)
    sources = [*_manuals(draw, count, tokens * LONG), *_code(tokens * LONG)]
    if len(sources) < count:
        raise DemoError(f"--contexts must be at most {len(sources)} with this Python, got {count}", 2)
    draw.shuffle(sources)
    return [_document(tokenizer, name, text, tokens, draw) for name, text in sources[:count]]


def requests(tokenizer: Any, held: Sequence[Document], count: int, seed: int) -> list[Asked]:
    """Requests in the order of a Zipf law: the document of rank ``r`` is asked for ``1/r`` as often as the first."""
    draw = random.Random(f"requests {seed}")
    weights = list(accumulate(1 / rank for rank in range(1, len(held) + 1)))
    chosen = draw.choices(range(len(held)), cum_weights=weights, k=count)
    return [asked(tokenizer, held, number, draw.randrange(1, FACTS)) for number in chosen]


def asked(tokenizer: Any, held: Sequence[Document], number: int, fact: int) -> Asked:
    document = held[number]
    question = tokenizer(ASK.format(query=document.queries[fact]), add_special_tokens=False).input_ids
    return Asked(number, document.ids + question, document.answers[fact])


def _document(tokenizer: Any, name: str, text: str, tokens: int, draw: random.Random) -> Document:
    """A text with facts between its lines, cut to the number of tokens."""
    names = draw.sample(NAMES, FACTS)
    codes = [str(draw.randrange(1000, 10000)) for _ in names]
    facts = [f"The code of station {name} is {code}.\n" for name, code in zip(names, codes, strict=True)]
    lines = text.splitlines(keepends=True)
    at = _line_at(tokenizer, lines, tokens)
    for share, fact in zip((0.2, 0.4, 0.6, 0.8), facts, strict=True):
        lines.insert(int(share * at), fact)
    ids = tokenizer("".join(lines)).input_ids[:tokens]
    if len(ids) < tokens:
        raise DemoError(f"--tokens: expected at most {len(ids)}, which {name} has, got {tokens}", 2)
    queries = tuple(f"What is the code of station {name}?" for name in names)
    return Document(name, "".join(lines), ids, queries, tuple(codes))


def _line_at(tokenizer: Any, lines: Sequence[str], tokens: int) -> int:
    """The first line behind so many tokens."""
    counted = accumulate(len(tokenizer(line, add_special_tokens=False).input_ids) for line in lines)
    return next((i for i, total in enumerate(counted) if total >= tokens), len(lines))


def _manuals(draw: random.Random, count: int, length: int) -> list[tuple[str, str]]:
    """Parts of Python's manual."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    parts = len(text) // length
    return [(f"manual {i + 1}", text[i * length :][:length]) for i in draw.sample(range(parts), min(count, parts))]


def _code(length: int) -> list[tuple[str, str]]:
    found = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            source = Path(spec.origin).read_text(encoding="utf-8")
            found.append((name, source[len(source) // 4 :][:length]))
    return found
