"""The one method of vLLM that is hooked: the end of its configuration, where all settings meet.

Every process of vLLM loads this module, configured or not, so it imports nothing before it has something to do.
"""

from __future__ import annotations

import functools
import logging
from typing import Any


def install() -> None:
    """Wraps ``VllmConfig.__post_init__``; a second call changes nothing."""
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
        before(self)
        finish(self, *args, **kwargs)
        after(self)

    __post_init__.kara = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = __post_init__


def before(config: Any) -> None:
    """While vLLM has resolved nothing yet: checks versions and settings, and names what vLLM resolves by name."""
    from .settings import check_version, settings_of
    from .windows import configure

    check_version()
    settings = settings_of(config)
    configure.before(config)
    settings.check_trace()


def after(config: Any) -> None:
    """With everything resolved: names what depends on it, and opens the channel of the counters."""
    from .stats import observe_with_vllm
    from .windows import configure

    configure.after(config)
    observe_with_vllm(config)
