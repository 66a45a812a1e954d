"""The profile: quality, size and decoding time of each context in each compression, and measured tiers. Pure Python.

``python -m kara_kernels.contexts profile`` writes it. A file belongs to one model and one set of settings, whose hash
is its ``key``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..values import check_choice, check_count, check_number
from .utility import Context, Option, Tier

FORMAT = 1
ASK = "\n\nQuestion: {query}\nAnswer:"
"""How a query follows its context, wherever profiles are measured."""
QUALITIES = ("agreement", "likelihood", "cosine", "exact")


class ProfileError(ValueError):
    """A file that is no profile, or is one of something else."""


@dataclass(frozen=True)
class Source:
    """A context as the caller gives it."""

    name: str
    text: str
    queries: tuple[str, ...] = ()
    answers: tuple[str | None, ...] = ()
    """Given answers by query, for exact matches."""


@dataclass(frozen=True)
class Measured:
    """One compression of one context, judged by all its queries."""

    method: str
    """``"scorer/form"``, for example ``"compactor/int8"``: all of one method are prefixes of one packet."""
    sections: int
    """What :meth:`~kara_kernels.contexts.packet.Packet.cut` takes."""
    ratio: float
    """Stored bytes relative to the rows in the cache's dtype."""
    nbytes: int
    decode_seconds: float
    rows: int
    kl: float
    """Mean divergence of the next token from the full cache's, in nats, over the tokens of the full cache's answers."""
    agreement: float
    """Share of those tokens that stay the most probable."""
    cosine: float | None = None
    """Mean cosine of MiniLM embeddings of the answer and the full cache's, at least 0. None: not judged."""
    exact: float | None = None
    """Share of queries with a given answer that the answer contains it. None: not judged."""

    def quality(self, judge: str) -> float:
        """In 0..1. ``"likelihood"`` is ``exp(-kl)``. Raises ValueError for a judge that was not asked."""
        check_choice("judge", judge, QUALITIES)
        value = math.exp(-self.kl) if judge == "likelihood" else getattr(self, judge)
        if value is None:
            raise ValueError(f"judge: expected one that the profile has, got {judge!r}")
        return min(1.0, max(0.0, value))


@dataclass(frozen=True)
class ProfiledContext:
    key: str
    """Hash of the context's tokens."""
    name: str
    tokens: int
    prefill_seconds: float
    question_seconds: float
    """Of a query of mean length behind the context."""
    queries: tuple[str, ...]
    measured: tuple[Measured, ...]

    def context(self, judge: str = "agreement", floor: float = 0.0, methods: tuple[str, ...] | None = None) -> Context:
        """What placement needs. ``methods``: only these."""
        options = [
            Option(m.method, m.ratio, m.nbytes, m.quality(judge), m.decode_seconds)
            for m in self.measured
            if methods is None or m.method in methods
        ]
        return Context(self.key, tuple(options), self.prefill_seconds, self.question_seconds, floor)


@dataclass(frozen=True)
class Profile:
    key: str
    about: Mapping[str, Any]
    """Model, settings, versions and device, for people."""
    tiers: tuple[Tier, ...] = ()
    """Bandwidth and latency as measured."""
    contexts: Mapping[str, ProfiledContext] = field(default_factory=dict)
    """By their keys."""

    def save(self, path: Path | str) -> None:
        """Writes to a temporary name beside ``path`` and renames it."""
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        held = {
            "format": FORMAT, "key": self.key, "about": dict(self.about),
            "tiers": [asdict(tier) for tier in self.tiers],
            "contexts": [asdict(context) for context in self.contexts.values()],
        }  # fmt: skip
        try:
            part.write_text(json.dumps(held, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            part.replace(path)
        finally:
            with suppress(FileNotFoundError):
                part.unlink()

    @staticmethod
    def load(path: Path | str) -> Profile:
        """Raises OSError, and ProfileError that says what is wrong with the file."""
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            if held["format"] != FORMAT:
                raise ValueError(f"format: expected {FORMAT}, got {held['format']!r}")
            contexts = [_context(context) for context in held["contexts"]]
            tiers = tuple(Tier(**tier) for tier in held["tiers"])
            return Profile(str(held["key"]), held["about"], tiers, {context.key: context for context in contexts})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ProfileError(f"{path}: expected a profile, got {type(error).__name__}: {error}") from None


def _context(held: dict[str, Any]) -> ProfiledContext:
    measured = tuple(_measured(Measured(**each)) for each in held.pop("measured"))
    found = ProfiledContext(measured=measured, **{**held, "queries": tuple(held["queries"])})
    check_count("tokens", found.tokens, 1, 2**31 - 1)
    found.context()  # checks times, sizes and agreements
    return found


def _measured(found: Measured) -> Measured:
    check_count("sections", found.sections, 1, 2**31 - 1)
    check_number("kl", found.kl, 0, 1e9)
    for name in ("agreement", "cosine", "exact"):
        if getattr(found, name) is not None:
            check_number(name, getattr(found, name), 0, 1)
    return found


def keys_of(ids: Sequence[int], lengths: Iterable[int]) -> Iterator[str]:
    """Keys of the contexts that are the first tokens of a text, for ascending ``lengths``."""
    held, done = hashlib.sha256(), 0
    for length in lengths:
        held.update(array("q", ids[done:length]).tobytes())
        done = length
        yield held.hexdigest()[:32]


def digest_of(model: Any) -> str:
    """A hash of configuration and weights, wherever they came from."""
    import torch

    held, config = hashlib.sha256(), model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    held.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        held.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        held.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return held.hexdigest()
