"""The one hooked method of vLLM: the end of its configuration, where all settings are known.

Every vLLM process loads this module, whether Kara is configured or not, so it imports nothing until it is needed.
"""

from __future__ import annotations

import functools
import logging
from typing import Any


def install() -> None:
    """Wraps ``VllmConfig.__post_init__``. A second call changes nothing."""
    from vllm.config import VllmConfig

    finish = getattr(VllmConfig, "__post_init__", None)
    if finish is None:  # vLLM must start anyway
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
        before(self)
        finish(self, *args, **kwargs)
        after(self)

    __post_init__.kara = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = __post_init__


def before(config: Any) -> None:
    """Before vLLM resolves anything: checks versions and settings, and sets the class names that vLLM resolves."""
    from .settings import check_version, settings_of
    from .windows import configure

    check_version()
    settings = settings_of(config)
    configure.before(config)
    settings.check_trace()


def after(config: Any) -> None:
    """After everything is resolved: sets what depends on it, and opens the channel for counters."""
    from .stats import observe_with_vllm
    from .windows import configure

    configure.after(config)
    observe_with_vllm(config)
