"""The profile of the documents, by the library's own command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kara_kernels.contexts.profile import Profile

from .. import DemoError
from ..screen import Advance
from .documents import Document

METHODS = ("none/int8", "none/int4")


def profiled(
    model: str, held: Sequence[Document], folder: Path, answer_tokens: int, threads: int, advance: Advance
) -> Profile:
    """Measures what fewer bits cost each document. Only the fact that no request asks for is asked for."""
    lines = [{"text": each.text, "name": each.name, "queries": each.queries[:1]} for each in held]
    (folder / "contexts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = folder / "profile.json"
    path.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "kara_kernels.contexts", "profile", model, str(folder / "contexts.jsonl"),
        "-o", str(path), "--methods", ",".join(METHODS), "--tokens", str(len(held[0].ids)),
        "--answer-tokens", str(answer_tokens), "--cache-dtype", "float32", "--threads", str(threads),
    ]  # fmt: skip
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            said.append(line.strip())
            if re.match(r"context \d+ of ", line):
                advance(1)
    if process.returncode:
        raise DemoError(f"the profile was not measured: {said[-1] if said else 'no output'}")
    return Profile.load(path)


def fixed_method(profile: Profile, floor: float) -> str:
    """The hardest method whose quality is at least ``floor`` in the mean over documents."""
    for method in reversed(METHODS):
        measured = [[m for m in context.measured if m.method == method] for context in profile.contexts.values()]
        qualities = [max(some, key=lambda m: m.nbytes).quality("likelihood") for some in measured]
        if sum(qualities) / len(qualities) >= floor:
            return method
    return METHODS[0]
