"""Configures vLLM to store and admit contexts, and rejects features that cannot be combined with that."""

from __future__ import annotations

from typing import Any

from kara_kernels.contexts.profile import Profile, ProfileError

from ..hook import CONNECTOR
from ..settings import settings_of
from ..traces import check_trace
from ..unsupported import FP8, UNSUPPORTED, cache_dtype_of, found_in
from .settings import ContextSettings, context_settings_of, may_drop, needs_queries

_ROOM = __name__.rpartition(".")[0]
MODULE = f"{_ROOM}.connector"
SCHEDULERS = (f"{_ROOM}.scheduler.ContextScheduler", f"{_ROOM}.scheduler.ContextAsyncScheduler")
"""Our schedulers, synchronous and asynchronous."""
ADAPTERS = "LoRA adapters (--enable-lora), which are known by their paths,"


def take_over(config: Any) -> None:
    """Takes over what vLLM's own ``--kv-transfer-config`` says of our connector, as if the additional settings had said
    it. Raises ValueError in one line for what cannot be, or for other settings there."""
    transfer = config.kv_transfer_config
    module = transfer.kv_connector_module_path or (MODULE if transfer.kv_connector == CONNECTOR else "vLLM")
    if (transfer.kv_connector, module) != (CONNECTOR, MODULE):
        raise ValueError(
            f"contexts: kv_connector: expected {CONNECTOR} of {MODULE}, got {transfer.kv_connector} of {module}"
        )
    if transfer.kv_role != "kv_both":
        raise ValueError(f"contexts: kv_role: expected kv_both, got {transfer.kv_role}")
    transfer.kv_connector_module_path, transfer.kv_load_failure_policy = MODULE, "recompute"
    given = transfer.kv_connector_extra_config
    elsewhere = config.additional_config.get("contexts", given)
    if given and isinstance(elsewhere, dict) and given != elsewhere:
        # Names only, because the URL of a store may hold a password.
        names = [name for name in sorted({*given, *elsewhere}) if given.get(name) != elsewhere.get(name)]
        raise ValueError(
            "contexts: expected the same settings in --additional-config (contexts) and --kv-transfer-config "
            f"(kv_connector_extra_config), got others of {', '.join(names)}"
        )
    config.additional_config = {**config.additional_config, "contexts": elsewhere}


def before(config: Any) -> None:
    """Before vLLM completes its configuration: rejects unsupported features and names our connector."""
    from vllm.config import KVTransferConfig

    settings = context_settings_of(config)
    _refuse(config)
    _check_profile(settings)
    _check_remote(settings)
    _check_trace(settings)
    if config.kv_transfer_config is None:
        config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR, kv_connector_module_path=MODULE, kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )  # fmt: skip


def after(config: Any) -> None:
    """After vLLM has completed its configuration: sets its scheduler, and logs the settings."""
    from vllm.logger import init_logger

    _refuse(config)
    config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
    settings = context_settings_of(config)
    said = ", ".join(f"{name}={getattr(settings, name)!r}" for name in settings.__dataclass_fields__)
    init_logger("vllm.kara").info_once(f"Contexts are stored as packets: {said}")


def _check_profile(settings: ContextSettings) -> None:
    """Raises ValueError for a profile that exists and cannot be read, before weights are read."""
    try:
        if settings.profile is not None:
            Profile.load(settings.profile)
    except FileNotFoundError:  # it may be written later
        pass
    except (OSError, ProfileError) as error:
        raise ValueError(f"contexts: profile: {error}") from None


def _check_remote(settings: ContextSettings) -> None:
    """Raises ValueError for a store that this machine cannot speak to. It may still be down."""
    try:
        if settings.remote is not None:
            settings.remote.address()
    except ValueError as error:
        raise ValueError(f"contexts: {error}") from None


def _check_trace(settings: ContextSettings) -> None:
    try:
        check_trace(settings.trace)
    except ValueError as error:
        raise ValueError(f"contexts: {error}") from None


def can_begin_without(config: Any) -> bool:
    """Whether requests may begin with fewer rows than tokens: windows keep the two lengths."""
    return "kara" in config.additional_config and not settings_of(config).shadow


def _refuse(config: Any) -> None:
    refused, settings = found_in(config, UNSUPPORTED), context_settings_of(config)
    if (dropping := [method for method in settings.methods if may_drop(method)]) and not can_begin_without(config):
        refused.append(f'{", ".join(dropping)} without windows that move rows ("kara": {{"default": "off"}})')
    if cache_dtype_of(config) in FP8 and (twice := [name for name in settings.methods if name.endswith("/fp8")]):
        refused.append(f"{', '.join(twice)} of a cache that is fp8")
    judged = [method for method in settings.methods if needs_queries(method)]
    if judged and can_begin_without(config) and not (policy := settings_of(config).policy).query_rows:
        refused.append(f"{', '.join(judged)} beside windows that record no queries (scorer {policy.scorer!r})")
    for name in ("preempted", "conversations"):
        if getattr(settings, name) and not can_begin_without(config):
            refused.append(f'{name} without windows that move rows ("kara": {{...}}, and not "shadow")')
    if settings.remote is not None:
        refused += [f"{what} beside a remote tier" for what in _found_ambiguous(config)]
    if settings.disk is not None and config.lora_config is not None:
        refused.append(f"{ADAPTERS} beside a disk")
    if not config.cache_config.enable_prefix_caching:
        refused.append("no prefix cache (--no-enable-prefix-caching)")
    if refused:
        raise ValueError(f"contexts: expected only supported features, got {'; '.join(refused)}")


def _found_ambiguous(config: Any) -> list[str]:
    """What could give contexts with other rows the same name on another server."""
    found, algorithm = [], config.cache_config.prefix_caching_hash_algo
    if not algorithm.startswith("sha256"):
        found.append(f"hashes that may collide (--prefix-caching-hash-algo {algorithm})")
    if config.lora_config is not None:
        found.append(ADAPTERS)
    return found
