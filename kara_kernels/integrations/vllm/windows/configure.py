"""Configures vLLM to compress running requests, and rejects features that cannot be combined with that.

Nothing of vLLM is imported at module level, because the environment report reads the tables below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kara_kernels.engine import Policy, fit_queries

from ..settings import settings_of

_ROOM = __name__.rpartition(".")[0]
SCHEDULER = f"{_ROOM}.scheduler.KaraScheduler"
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{_ROOM}.worker.KaraCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": f"{_ROOM}.worker.KaraGPUWorker",
}
"""vLLM's workers, and the workers that replace them."""


def _other_scheduler(config: Any) -> Any:
    given = config.scheduler_config.scheduler_cls
    return given not in (None, SCHEDULER) and given


def _other_cache_dtype(config: Any) -> Any:
    given = config.cache_config.cache_dtype
    return given not in ("auto", "float16", "bfloat16", "float32") and given


def _multi_modal(config: Any) -> Any:
    model = config.model_config
    return model.is_multimodal_model and not (model.multimodal_config and model.multimodal_config.language_model_only)


UNSUPPORTED: dict[str, Callable[[Any], Any]] = {
    "speculative decoding (--speculative-config)": lambda c: c.speculative_config is not None,
    "pipeline parallelism (--pipeline-parallel-size)": lambda c: c.parallel_config.pipeline_parallel_size > 1,
    "decode context parallelism (--decode-context-parallel-size)": lambda c: (
        (c.parallel_config.decode_context_parallel_size or 1) > 1
    ),
    "prefill context parallelism": lambda c: (getattr(c.parallel_config, "prefill_context_parallel_size", 1) or 1) > 1,
    "dual-batch overlap (--enable-dbo)": lambda c: c.parallel_config.enable_dbo,
    "KV connectors (--kv-transfer-config)": lambda c: c.kv_transfer_config is not None,
    "encoder cache connectors (--ec-transfer-config)": lambda c: getattr(c, "ec_transfer_config", None) is not None,
    "asynchronous scheduling (--async-scheduling)": lambda c: c.scheduler_config.async_scheduling is True,
    "another scheduler (--scheduler-cls)": _other_scheduler,
    "a quantised KV cache (--kv-cache-dtype)": _other_cache_dtype,
    "fast prefill of shared KV (--kv-sharing-fast-prefill)": lambda c: c.cache_config.kv_sharing_fast_prefill,
    "diffusion models": lambda c: getattr(c, "diffusion_config", None) is not None,
    "pooling models": lambda c: c.model_config.runner_type == "pooling",
    "encoder-decoder models": lambda c: c.model_config.is_encoder_decoder,
    "multi-modal inputs (--language-model-only allows text)": _multi_modal,
    "multi-head latent attention": lambda c: c.model_config.use_mla,
    "hybrid or attention-free models": lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
}
"""Features of a configuration that are rejected at start-up, named as an operator knows them. The error also shows the
result of a test that is not a bool."""


def _value_size(layer: Any) -> Any:
    size = getattr(layer, "head_size_v", layer.head_size)
    return size != layer.head_size and f"{size} and {layer.head_size}"


UNSUPPORTED_LAYERS: dict[str, Callable[[Any], Any]] = {
    "sliding windows": lambda x: getattr(x, "sliding_window", None) is not None,
    "ALiBi": lambda x: getattr(x.impl, "alibi_slopes", None) is not None,
    "attention sinks": lambda x: getattr(x.impl, "sinks", None) is not None,
    "cross-layer KV sharing": lambda x: getattr(x, "kv_sharing_target_layer_name", None) is not None,
    "soft-capped logits": lambda x: bool(getattr(x.impl, "logits_soft_cap", 0)),
    "attention other than a decoder's": lambda x: x.attn_type != "decoder" and x.attn_type,
    "values of another size than keys": _value_size,
}
"""The same for an attention layer, checked when its model is loaded."""


def before(config: Any) -> None:
    """Before vLLM completes its configuration: rejects unsupported features and sets the scheduler."""
    _refuse(config)
    # The scheduler plans with computed tokens. Those of an asynchronous step in flight are not computed yet.
    config.scheduler_config.async_scheduling = False
    config.scheduler_config.scheduler_cls = SCHEDULER


def after(config: Any) -> None:
    """After vLLM has completed its configuration: sets the worker and logs the settings."""
    from vllm.logger import init_logger

    _refuse(config)  # again, because --kv-offloading-size becomes a KV connector only now
    _fit_queries(config)
    settings = settings_of(config)
    parallel = config.parallel_config
    if parallel.worker_cls not in WORKERS.values():
        if parallel.worker_cls not in WORKERS:
            raise ValueError(f"kara: expected one of the workers {', '.join(WORKERS)}, got {parallel.worker_cls}")
        parallel.worker_cls = WORKERS[parallel.worker_cls]
    if config.cache_config.block_size is not None:
        check_block_size(settings.policy, config.cache_config.block_size)
    said = ", ".join(f"{key}={value!r}" for key, value in dataclasses.asdict(settings.policy).items())
    # A child of vLLM's logger, so that its handlers and levels apply.
    init_logger("vllm.kara").info_once(f"Kara compresses the KV cache while decoding: {said}, trace={settings.trace!r}")


def check_block_size(policy: Policy, block_size: int) -> None:
    """Raises a ValueError for settings that could never free a block of this size."""
    try:
        policy.check_page_size(block_size)
    except ValueError as error:
        raise ValueError(f"kara: {error} (set --block-size to change the block)") from None


def found_in(thing: Any, unsupported: dict[str, Callable[[Any], Any]]) -> list[str]:
    """The entries of a table that apply to a configuration or a layer, in words."""
    found = ((what, test(thing)) for what, test in unsupported.items())
    return [what if isinstance(value, bool) else f"{what}: {value}" for what, value in found if value]


def _refuse(config: Any) -> None:
    if refused := found_in(config, UNSUPPORTED):
        raise ValueError(f"kara: expected only supported features, got {'; '.join(refused)}")


def _fit_queries(config: Any) -> None:
    """Unless the operator chose what is recorded, picks what loses least among the forms that fit ``max_query_gib``.

    vLLM runs up to 1,024 requests at once, and their queries may take too much memory. The form is part of the plan, so
    it is fixed here, once for all processes.
    """
    from vllm.logger import init_logger

    kara, model = config.additional_config["kara"], config.model_config
    if "query_stride" in kara or "query_heads" in kara:
        return
    policy, parallel = settings_of(config).policy, config.parallel_config
    fitted = fit_queries(
        policy, model.get_num_layers(parallel), model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel), model.get_head_size(), config.scheduler_config.max_num_seqs, model.dtype,
    )  # fmt: skip
    form = {"query_heads": fitted.query_heads, "query_stride": fitted.query_stride}
    if fitted != policy:
        init_logger("vllm.kara").warning_once(
            f"Kara records fewer queries, to stay within max_query_gib={policy.max_query_gib}: {form}. Scores are less "
            f"accurate. Raise max_query_gib, or let fewer sequences run at once (--max-num-seqs)"
        )
    config.additional_config = {**config.additional_config, "kara": {**kara, **form}}
