"""Settings that may change while the server runs, read from a watched file.

vLLM's plugins may add HTTP routes, but these reach workers and not the scheduler, which alone uses these settings. A
file reaches the schedulers of all data-parallel engines, and opens nothing to the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger

from .settings import LIVE, Settings, settings_in
from .watched import WatchedFile

logger = init_logger("vllm.kara")


class LiveFile:
    """The settings of the command line, overridden by those in a JSON file. A file that does not exist overrides none.

    Args:
        additional: vLLM's additional settings.
        path: the file: an object with settings of :data:`.settings.LIVE`.
    """

    def __init__(self, additional: Mapping[str, Any], path: str) -> None:
        self._given, self._file = additional["kara"], WatchedFile(path)

    def changed(self) -> Settings | None:
        """The settings, if the file has changed since the last call. None if not, or if its contents are refused, which
        is logged. It looks at most once a second."""
        if not self._file.changed():
            return None
        try:
            return self._read() if self._file.exists else settings_in({"kara": self._given})
        except (OSError, ValueError, RecursionError) as error:
            logger.error("Kara's settings stay as they are: %s: %s", self._file.path, error)
            return None

    def _read(self) -> Settings:
        with open(self._file.path, encoding="utf-8") as file:
            given = json.load(file)
        if not isinstance(given, dict):
            raise ValueError(f"expected an object of settings, got {type(given).__name__}")
        if unknown := ", ".join(sorted(set(given) - set(LIVE))):
            raise ValueError(f"{unknown}: expected one of {', '.join(LIVE)}, got {unknown}")
        return settings_in({"kara": {**self._given, **given}})
