"""The settings under ``--additional-config '{"kara": ...}'``, and what Kara cannot be combined with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import vllm
from vllm.logger import init_logger

from kara_kernels.engine import Policy, ring_bytes

logger = init_logger("vllm.kara")  # below vLLM's own logger, so that its handlers and levels hold

SUPPORTED = ("0.32",)
"""Minor versions of vLLM that this plugin was written against and is tested with."""

_SCHEDULER = "kara_kernels.integrations.vllm.windows.scheduler.KaraScheduler"
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "kara_kernels.integrations.vllm.windows.worker.KaraCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "kara_kernels.integrations.vllm.windows.worker.KaraGPUWorker",
}


@dataclass(frozen=True)
class Settings:
    """A policy, and where to write what was done."""

    policy: Policy
    trace: str | None = None
    """File to which one JSON line per compression and request is appended."""


def settings_of(config: Any) -> Settings:
    """The settings in a VllmConfig.

    Raises:
        ValueError: unknown keys, ill-typed or impossible values; one line that names key, expected and got.
    """
    given = config.additional_config["kara"]
    # vLLM reports a ValueError of its configuration in one place; a TypeError would be a traceback.
    try:
        if not isinstance(given, dict):
            raise TypeError(f"expected an object of settings, got {type(given).__name__}")
        rest = dict(given)
        trace = rest.pop("trace", None)
        if trace is not None and not isinstance(trace, str):
            raise TypeError(f"trace: expected a file name, got {type(trace).__name__}")
        return Settings(Policy.from_settings(rest, beside=("trace",)), trace)
    except (TypeError, ValueError) as error:
        raise ValueError(f"kara: {error}") from None


def prepare(config: Any) -> None:
    """Before vLLM completes its configuration: checks the settings, refuses what cannot work, names the scheduler."""
    version = vllm.__version__
    if not version.startswith(tuple(f"{minor}." for minor in SUPPORTED)):
        raise ValueError(f"kara: expected vLLM {' or '.join(f'{minor}.*' for minor in SUPPORTED)}, got {version}")
    trace = settings_of(config).trace
    refused = [what for what, used in _unsupported(config).items() if used]
    if refused:
        raise ValueError(f"kara: not supported together with {'; '.join(refused)}")
    if trace is not None:
        try:
            open(trace, "a", encoding="utf-8").close()  # now, not at the first compression
        except OSError as error:
            raise ValueError(
                f"kara: trace: expected a file that can be written, got {trace}: {error.strerror}"
            ) from None
    # The scheduler plans on tokens that are computed; those in flight of an asynchronous step are not.
    config.scheduler_config.async_scheduling = False
    config.scheduler_config.scheduler_cls = _SCHEDULER


def apply(config: Any) -> None:
    """After vLLM has completed its configuration: names the worker, says what is set."""
    _resolve_query_stride(config)
    settings = settings_of(config)
    parallel = config.parallel_config
    if parallel.worker_cls not in _WORKERS.values():
        if parallel.worker_cls not in _WORKERS:
            raise ValueError(f"kara: expected one of the workers {', '.join(_WORKERS)}, got {parallel.worker_cls}")
        parallel.worker_cls = _WORKERS[parallel.worker_cls]
    if config.cache_config.block_size is not None:
        check_block_size(settings.policy, config.cache_config.block_size)
    from .stats import observe_with_vllm

    observe_with_vllm(config)
    said = ", ".join(f"{key}={value!r}" for key, value in dataclasses.asdict(settings.policy).items())
    logger.info_once(f"Kara compresses the KV cache while decoding: {said}, trace={settings.trace!r}")


def _resolve_query_stride(config: Any) -> None:
    """Where the operator has not set it: the first of 2, 4, 8, ... whose query ring fits ``max_query_gib``.

    vLLM lets up to 1,024 requests run at once, and their queries by the default stride may be more memory than anybody
    wants to give. The stride is part of the plan, so it is settled here, once for all processes.
    """
    kara, model = config.additional_config["kara"], config.model_config
    if "query_stride" in kara:
        return
    policy, parallel = settings_of(config).policy, config.parallel_config
    heads = model.get_num_kv_heads(parallel)
    if policy.query_heads == "all":
        heads = model.get_num_attention_heads(parallel)
    shape = model.get_num_layers(parallel), heads, model.get_head_size(), config.scheduler_config.max_num_seqs
    while policy.query_stride * 2 <= policy.window and (
        ring_bytes(policy, *shape, model.dtype) > policy.max_query_gib * 2**30
    ):
        policy = dataclasses.replace(policy, query_stride=policy.query_stride * 2)
    config.additional_config = {**config.additional_config, "kara": {**kara, "query_stride": policy.query_stride}}


def check_block_size(policy: Policy, block_size: int) -> None:
    """One ValueError for settings that could not free a block of this size."""
    try:
        policy.check_page_size(block_size)
    except ValueError as error:
        raise ValueError(f"kara: {error} (set --block-size to change the block)") from None


def _unsupported(config: Any) -> dict[str, Any]:
    """What is configured that Kara does not support (yet), by the name an operator knows."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    scheduler_cls = config.scheduler_config.scheduler_cls
    return {
        "speculative decoding (--speculative-config)": config.speculative_config is not None,
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "decode context parallelism (--decode-context-parallel-size)": (parallel.decode_context_parallel_size or 1) > 1,
        "prefill context parallelism": (getattr(parallel, "prefill_context_parallel_size", 1) or 1) > 1,
        "dual-batch overlap (--enable-dbo)": parallel.enable_dbo,
        "KV connectors (--kv-transfer-config)": config.kv_transfer_config is not None,
        "encoder cache connectors (--ec-transfer-config)": getattr(config, "ec_transfer_config", None) is not None,
        "asynchronous scheduling (--async-scheduling)": config.scheduler_config.async_scheduling is True,
        f"the scheduler {scheduler_cls}": scheduler_cls not in (None, _SCHEDULER),
        f"a KV cache of {cache.cache_dtype} (--kv-cache-dtype)": cache.cache_dtype
        not in ("auto", "float16", "bfloat16", "float32"),
        "fast prefill of shared KV (--kv-sharing-fast-prefill)": cache.kv_sharing_fast_prefill,
        "diffusion models": getattr(config, "diffusion_config", None) is not None,
        "pooling models": model.runner_type == "pooling",
        "encoder-decoder models": model.is_encoder_decoder,
        "multi-modal inputs (--language-model-only allows text)": model.is_multimodal_model
        and not (model.multimodal_config and model.multimodal_config.language_model_only),
        "multi-head latent attention": model.use_mla,
        "hybrid or attention-free models": model.is_hybrid or model.is_attention_free,
    }
