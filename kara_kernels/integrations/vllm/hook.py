"""The one hooked method of vLLM: the end of its configuration, where all settings are known.

Every vLLM process loads this module, whether Kara is configured or not, so it imports nothing until it is needed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

KEYS = ("kara", "contexts")
"""Of the additional settings: windows of running requests, and reusable contexts."""
SCHEDULERS_OF_BOTH = tuple(
    f"{__name__.rpartition('.')[0]}.both.{name}" for name in ("BothScheduler", "BothAsyncScheduler")
)
"""Synchronous and asynchronous."""
CONNECTOR = "ContextConnector"
"""The name by which ``--kv-transfer-config`` enables contexts, too."""


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
        enabled = isinstance(given, Mapping) and bool(set(KEYS) & set(given))
        if not enabled and not names_our_connector(self):
            if given and isinstance(given, Mapping):
                warn_of_misspelt_key(given)
            finish(self, *args, **kwargs)
            return
        before(self)
        finish(self, *args, **kwargs)
        after(self)

    __post_init__.kara = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = __post_init__


def warn_of_misspelt_key(given: Mapping) -> None:
    """Warns once about a key that was probably meant to be one of ours. vLLM ignores keys that nobody knows."""
    from difflib import get_close_matches

    from vllm.logger import init_logger

    for key in given:
        name = str(key).casefold()
        meant = ["kara"] if name.startswith("kara") else get_close_matches(name, KEYS, n=1, cutoff=0.75)
        if key not in KEYS and meant:
            init_logger("vllm.kara").warning_once(
                f"Kara stays off: --additional-config has the key {key!r}, expected {meant[0]!r}"
            )


def names_our_connector(config: Any) -> bool:
    """Whether ``--kv-transfer-config`` names it, alone or among others."""
    given = getattr(config, "kv_transfer_config", None)
    if given is None:
        return False
    has_connector = getattr(given, "has_connector", given.kv_connector.__eq__)
    return has_connector(CONNECTOR) or str(given.kv_connector_module_path).startswith("kara_kernels.")


def before(config: Any) -> None:
    """Before vLLM resolves anything: checks versions and settings, and sets the class names that vLLM resolves."""
    from .settings import check_version, settings_of

    check_version()
    if names_our_connector(config):
        from .contexts import configure as of_contexts

        of_contexts.take_over(config)
    if "kara" in config.additional_config:
        from .windows import configure

        settings = settings_of(config)
        configure.before(config)
        settings.check_trace()
    if "contexts" in config.additional_config:
        from .contexts import configure as of_contexts

        of_contexts.before(config)


def after(config: Any) -> None:
    """After everything is resolved: sets what depends on it, opens the channel for counters, and checks requests."""
    from .requests import check_requests

    check_requests()
    if "kara" in config.additional_config:
        from .stats import observe_with_vllm
        from .windows import configure

        configure.after(config)
        observe_with_vllm(config)
    if "contexts" in config.additional_config:
        from .contexts import configure as of_contexts

        of_contexts.after(config)
    if set(KEYS) <= set(config.additional_config):
        config.scheduler_config.scheduler_cls = SCHEDULERS_OF_BOTH[bool(config.scheduler_config.async_scheduling)]
