"""The profile of the documents, by the library's own command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext

from .. import DemoError
from ..screen import Advance
from .documents import Document

METHOD = "kara_sampled/int8"
"""Rows best first, so that it can be cut to fewer bits and to fewer rows."""


def profiled(
    model: str, held: Sequence[Document], folder: Path, answer_tokens: int, threads: int, advance: Advance
) -> Profile:
    """Measures what fewer bits and rows cost each document. Only the fact that no request asks for is asked for."""
    lines = [{"text": each.text, "name": each.name, "queries": each.queries[:1]} for each in held]
    (folder / "contexts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = folder / "profile.json"
    path.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "kara_kernels.contexts", "profile", model, str(folder / "contexts.jsonl"),
        "-o", str(path), "--methods", METHOD, "--tokens", str(len(held[0].ids)),
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


def fixed_step(profile: Profile, floor: float) -> Measured:
    """The hardest compression whose quality is at least ``floor`` in the mean over documents, as measured for one of
    them. All documents are as long."""
    contexts = list(profile.contexts.values())
    for step in sorted(contexts[0].measured, key=lambda measured: measured.nbytes):
        qualities = [_of(context, step).quality("likelihood") for context in contexts]
        if sum(qualities) / len(qualities) >= floor:
            break
    return step


def only(profile: Profile, step: Measured) -> Profile:
    """A profile that allows nothing else."""
    contexts = {
        key: replace(context, measured=(_of(context, step),)) for key, context in profile.contexts.items()
    }  # fmt: skip
    return replace(profile, contexts=contexts)


def described(step: Measured, tokens: int) -> str:
    """What a compression leaves of a context, in words."""
    return f"{step.rows / tokens:.0%} of the rows in {step.ratio:.0%} of the bytes"


def _of(context: ProfiledContext, step: Measured) -> Measured:
    return next(each for each in context.measured if each.sections == step.sections)
