"""Settings that may change while the server runs, read from a watched file.

vLLM's plugins may add HTTP routes, but these reach workers and not the scheduler, which alone uses these settings. A
file reaches the schedulers of all data-parallel engines, and opens nothing to the network.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger

from .settings import LIVE, Settings, settings_in

logger = init_logger("vllm.kara")

SECONDS = 1.0  # from one look at the file to the next


class LiveFile:
    """The settings of the command line, overridden by those in a JSON file. A file that does not exist overrides none.

    Args:
        additional: vLLM's additional settings.
        path: the file: an object with settings of :data:`.settings.LIVE`.
    """

    def __init__(self, additional: Mapping[str, Any], path: str) -> None:
        self._given, self._path = additional["kara"], path
        self._seen: tuple[int, int] | None = None
        self._next = 0.0

    def changed(self) -> Settings | None:
        """The settings, if the file has changed since the last call. None if not, or if its contents are refused, which
        is logged. It looks at most once a second."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + SECONDS
        try:
            stat = os.stat(self._path)
            seen = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            seen = None
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            return self._read() if seen else settings_in({"kara": self._given})
        except (OSError, ValueError, RecursionError) as error:
            logger.error("Kara's settings stay as they are: %s: %s", self._path, error)
            return None

    def _read(self) -> Settings:
        with open(self._path, encoding="utf-8") as file:
            given = json.load(file)
        if not isinstance(given, dict):
            raise ValueError(f"expected an object of settings, got {type(given).__name__}")
        if unknown := ", ".join(sorted(set(given) - set(LIVE))):
            raise ValueError(f"{unknown}: expected one of {', '.join(LIVE)}, got {unknown}")
        return settings_in({"kara": {**self._given, **given}})
