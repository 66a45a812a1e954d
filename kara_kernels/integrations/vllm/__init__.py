"""Kara in vLLM: `vllm serve MODEL --additional-config '{"kara": {"window": 256, "keep": 128}}'`, nothing else.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in every process. It
hooks one method, the end of vLLM's own configuration, and does nothing there unless the key ``kara`` is set. Then

- :mod:`.settings` checks the settings and what else is configured, and names scheduler and worker to vLLM;
- :mod:`.windows.scheduler` plans and commits, keeps the books of blocks, before vLLM's scheduler runs;
- :mod:`.windows.runner` records queries, executes the plans before the step, and shifts lengths and slots, inside of
  :mod:`.windows.worker`'s workers;
- :mod:`.layout` finds out where a cache's rows lie;
- :mod:`.stats` shows it on vLLM's own ``/metrics``.

No file of vLLM is changed. Supported versions: see :data:`.settings.SUPPORTED`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

__all__ = ["register"]


def register() -> None:
    """Entry point of vLLM's plugin system; may be called any number of times."""
    from vllm.config import VllmConfig

    finish = getattr(VllmConfig, "__post_init__", None)
    if finish is None:  # vLLM must start all the same
        logging.getLogger(__name__).warning("Kara stays off: this vLLM's configuration cannot be hooked")
        return
    if hasattr(finish, "kara"):
        return

    @functools.wraps(finish)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = self.additional_config
        if not isinstance(given, dict) or "kara" not in given:
            finish(self, *args, **kwargs)
            return
        from .settings import apply, prepare

        prepare(self)
        finish(self, *args, **kwargs)
        apply(self)

    __post_init__.kara = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = __post_init__
