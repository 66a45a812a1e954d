"""Which weights a server computes rows with. Servers with equal names for them may share packets, and so may a server
and the one before it.

A name of a model does not say it: folders of the same name hold different weights on different machines and after the
next training, and what a hub has under a name changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
SAMPLES, SAMPLE = 4096, 4096  # places in the files of a model that are read, and bytes at each


def weights_of(model: str, commit: str | None, named: str | None) -> str:
    """Names weights: as the operator does, or by a fingerprint of files, or by the commit of a hub.

    Raises:
        ValueError: nothing says which weights they are.
    """
    if named is not None:
        return f"named {named}"
    path = Path(model)
    inside = path.iterdir() if path.is_dir() else [path]
    if files := [x for x in inside if x.suffix in SUFFIXES and x.is_file()]:
        return f"files {fingerprint(files)}"
    if commit is not None:
        return f"commit {commit}"
    raise ValueError(
        f"remote: weights: expected a name that servers with the same weights share, because {model!r} is no folder of "
        "weights, and of no known commit; got none"
    )


def fingerprint(files: list[Path]) -> str:
    """Of names, sizes and what lies at places all over the files. Weights that were trained further differ in almost
    all values of whole matrices, so they differ there, too."""
    digest = hashlib.sha256()
    step = max(SAMPLE, sum(path.stat().st_size for path in files) // SAMPLES)
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb", buffering=0) as file:
            for at in range(0, size, step):
                file.seek(at)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def shared_name(*, weights: str, model: str, text_config: dict[str, Any], **others: Any) -> str:
    """Names what servers must have in common to share packets, always in as many characters.

    Args:
        model: as in the headers of packets; see :func:`.connector.model_of`.
        text_config: of Hugging Face, with what the operator overrode: a rotary embedding, for example.
    """
    known = {k: v for k, v in text_config.items() if not k.startswith("_") and k != "transformers_version"}
    what = json.dumps([weights, model, known, others], sort_keys=True, default=str)
    return hashlib.sha256(what.encode()).hexdigest()[:32]
