"""One client, one request after another: seconds to the first token, answers, and where contexts came from."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import openai

from .. import DemoError
from ..screen import Advance
from ..serve.server import MODEL, Server
from .documents import Asked
from .report import Answer, source_of

PAUSE_SECONDS = 0.3  # between requests, so that what an answer leaves to do is not measured with the next one
PATIENCE_SECONDS = 600


class Client:
    """Sends requests to a server.

    Args:
        store: the server's folder on the disk. It is read from the disk, not from the system's page cache, as it would
            be were it larger than memory.
        tokens: of an answer.
    """

    def __init__(self, server: Server, store: Path, context: int, tokens: int) -> None:
        self._server, self._store, self._context, self._tokens = server, store, context, tokens
        self._client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS
        )

    def ask_all(
        self, asked: Sequence[Asked], advance: Advance = lambda *_: None, tokens: int | None = None
    ) -> list[Answer]:
        """``tokens``: of an answer, if not as many as usual."""
        try:
            answers = []
            for each in asked:
                answers.append(self._ask(each, tokens or self._tokens))
                advance(1, f"{answers[-1].seconds:.2f} s")
            return answers
        except openai.OpenAIError as error:
            raise DemoError(f"a request failed: {error}") from error

    def _ask(self, asked: Asked, tokens: int) -> Answer:
        _empty_page_cache(self._store)
        time.sleep(PAUSE_SECONDS)
        before, parts, first = self._server.metrics(), [], None
        begun = time.perf_counter()
        stream = self._client.completions.create(
            model=MODEL, prompt=asked.prompt, max_tokens=tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "kv_transfer_params": {"context_tokens": self._context}},
        )  # fmt: skip
        for chunk in stream:
            first = first or time.perf_counter() - begun
            parts += [choice.text for choice in chunk.choices]
        after, text = self._server.metrics(), "".join(parts)
        bytes_ = {tier: after.get(f"kara:context_bytes{{{tier}}}", 0.0) for tier in ("ram", "disk")}
        return Answer(asked.document, first or 0.0, text, source_of(before, after), asked.answer in text, bytes_)


def _empty_page_cache(folder: Path) -> None:
    if not hasattr(os, "posix_fadvise") or not folder.exists():
        return
    os.sync()  # what is not yet written cannot be dropped
    for path in folder.rglob("*.bin"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
