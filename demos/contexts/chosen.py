"""What a server chose for each document: what its directory said when it ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kara_kernels.contexts.directory import Copy, read_snapshot
from kara_kernels.contexts.profile import Measured

from .documents import Document


def chosen(
    store: Path, held: Sequence[Document], block_size: int, measured: Sequence[Measured]
) -> list[dict[str, Any] | None]:
    """Tier, ratio, quality and rows for each document; None: not stored. ``measured``: of one of them, for all are as
    long. Other methods keep all rows."""
    found = {copy.key: copy for path in store.rglob("directory.json") for copy in read_snapshot(path)[1]}
    return [_described(found.get(_key(document, block_size)), len(document.ids), measured) for document in held]


def _described(copy: Copy | None, tokens: int, measured: Sequence[Measured]) -> dict[str, Any] | None:
    if copy is None:
        return None
    option = copy.option
    steps = [step for step in measured if step.method == option.method]  # headers differ by a few bytes
    rows = min(steps, key=lambda step: abs(step.nbytes - option.nbytes)).rows if steps else tokens
    return {"tier": copy.tier, "ratio": option.ratio, "quality": option.quality, "rows": rows}


def _key(document: Document, block_size: int) -> str:
    """The name that the server gives a context: the hash of its last block, and its tokens."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(block_size, sha256)
    request = Request("", document.ids, SamplingParams(max_tokens=1), None, block_hasher=hasher)
    return f"{request.block_hashes[-1].hex()}.{len(document.ids)}"
