"""Configures vLLM to compress running requests, and rejects features that cannot be combined with that.

Nothing of vLLM is imported at module level, because the environment report reads the tables below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kara_kernels.engine import Held, Ledger, Policy, check_ring, fit_queries

from ..settings import Additional, refusal, settings_of

_ROOM = __name__.rpartition(".")[0]
SCHEDULERS = (f"{_ROOM}.scheduler.KaraScheduler", f"{_ROOM}.scheduler.KaraAsyncScheduler")
"""Our schedulers, synchronous and asynchronous."""
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{_ROOM}.worker.KaraCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": f"{_ROOM}.worker.KaraGPUWorker",
}
"""vLLM's workers, and the workers that replace them."""


def _other_scheduler(config: Any) -> Any:
    given = config.scheduler_config.scheduler_cls
    return given not in (None, *SCHEDULERS) and given


def _quantised(cache_dtype: str) -> bool:
    return cache_dtype not in ("auto", "float16", "bfloat16", "float32")


def _quantised_cache(config: Any) -> Any:
    given = config.cache_config.cache_dtype
    if given == "auto" and getattr(config.quant_config, "kv_cache_scheme", None) is not None:
        given = "fp8"  # what vLLM's attention layers will make of it
    return _quantised(given) and given


def _sliding_window(config: Any) -> Any:
    model = config.model_config.hf_text_config
    kinds = getattr(model, "layer_types", None)
    return (kinds is None or "sliding_attention" in kinds) and getattr(model, "sliding_window", None)


def _unequal_heads(config: Any) -> Any:
    """Fields that vLLM keeps for each layer, because they differ."""
    layers = config.model_config.model_arch_config.per_layer_overrides or []
    differing = {name for layer in layers for name in layer}
    return ", ".join(sorted(differing & {"total_num_attention_heads", "total_num_kv_heads", "head_size"}))


def _more_ranks_than_heads(config: Any) -> Any:
    heads, ranks = config.model_config.get_total_num_kv_heads(), config.parallel_config.tensor_parallel_size
    return heads < ranks and f"{heads} and {ranks}"


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
    "KV connectors (--kv-transfer-config, --kv-offloading-size)": lambda c: c.kv_transfer_config is not None,
    "encoder cache connectors (--ec-transfer-config)": lambda c: getattr(c, "ec_transfer_config", None) is not None,
    "another scheduler (--scheduler-cls)": _other_scheduler,
    "a quantised KV cache (of the checkpoint, or --kv-cache-dtype, which overrides it)": _quantised_cache,
    "fast prefill of shared KV (--kv-sharing-fast-prefill)": lambda c: c.cache_config.kv_sharing_fast_prefill,
    "diffusion models": lambda c: getattr(c, "diffusion_config", None) is not None,
    "pooling models": lambda c: c.model_config.runner_type == "pooling",
    "encoder-decoder models": lambda c: c.model_config.is_encoder_decoder,
    "multi-modal inputs (--language-model-only allows text)": _multi_modal,
    "multi-head latent attention": lambda c: c.model_config.use_mla,
    "hybrid or attention-free models": lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
    "sliding windows": _sliding_window,
    "chunked attention": lambda c: getattr(c.model_config.hf_text_config, "attention_chunk_size", None),
    "ALiBi": lambda c: c.model_config.uses_alibi,
    "attention sinks": lambda c: getattr(c.model_config.hf_text_config, "attention_sinks", False),
    "soft-capped logits": lambda c: getattr(c.model_config.hf_text_config, "attn_logit_softcapping", None),
    "layers of unequal heads": _unequal_heads,
    "fewer KV heads than tensor-parallel ranks (--tensor-parallel-size)": _more_ranks_than_heads,
}
"""Features of a configuration that are rejected at start-up, before weights are read, named as an operator knows them.
The error also shows the result of a test that is not a bool."""


def _value_size(layer: Any) -> Any:
    size = getattr(layer, "head_size_v", layer.head_size)
    return size != layer.head_size and f"{size} and {layer.head_size}"


UNSUPPORTED_LAYERS: dict[str, Callable[[Any], Any]] = {
    "a quantised KV cache": lambda x: _quantised(x.kv_cache_dtype) and x.kv_cache_dtype,
    "sliding windows": lambda x: getattr(x, "sliding_window", None) is not None,
    "ALiBi": lambda x: getattr(x.impl, "alibi_slopes", None) is not None,
    "attention sinks": lambda x: getattr(x.impl, "sinks", None) is not None,
    "cross-layer KV sharing": lambda x: getattr(x, "kv_sharing_target_layer_name", None) is not None,
    "soft-capped logits": lambda x: bool(getattr(x.impl, "logits_soft_cap", 0)),
    "attention other than a decoder's": lambda x: x.attn_type != "decoder" and x.attn_type,
    "values of another size than keys": _value_size,
}
"""The same for an attention layer, checked when its model is loaded, for what the configuration does not show."""


def before(config: Any) -> None:
    """Before vLLM completes its configuration: rejects unsupported features."""
    _refuse(config)


def after(config: Any) -> None:
    """After vLLM has completed its configuration: sets scheduler and worker, and logs the settings."""
    from vllm.logger import init_logger

    _refuse(config)  # again, because only now --kv-offloading-size is a KV connector and quantisation is known
    _fit_queries(config)
    config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
    settings = settings_of(config)
    parallel = config.parallel_config
    if parallel.worker_cls not in WORKERS.values():
        if parallel.worker_cls not in WORKERS:
            raise ValueError(f"kara: expected one of the workers {', '.join(WORKERS)}, got {parallel.worker_cls}")
        parallel.worker_cls = WORKERS[parallel.worker_cls]
    check_sizes(config, config.cache_config.block_size)
    said = ", ".join(f"{key}={value!r}" for key, value in settings.values.items())
    # A child of vLLM's logger, so that its handlers and levels apply.
    init_logger("vllm.kara").info_once(f"Kara compresses the KV cache while decoding: {said}")


def check_sizes(config: Any, block_size: int) -> None:
    """Raises a ValueError for settings that could never free a block, or never compress a request.

    vLLM may choose another block size or a shorter model length when it has measured its memory.
    """
    settings, given = settings_of(config), config.additional_config["kara"]
    policy = settings.policy
    longest = config.model_config.max_model_len
    try:
        settings.check_page_size(block_size)
    except ValueError as error:
        raise refusal(error, given, "--block-size changes the block") from None
    if not _ever_compresses(policy, block_size, longest):
        names = ("window", "tail", "protected")
        got = ", ".join(f"{x}={getattr(policy, x)}{'' if x in given else ' (default)'}" for x in names)
        raise ValueError(
            f"kara: window: expected a request to fill protected, window and tail before --max-model-len {longest}, "
            f"got {got}"
        )


def _ever_compresses(policy: Policy, block_size: int, longest: int) -> bool:
    """Whether a prompt of one token, to which most can be added, is compressed before it is ``longest`` tokens long."""
    ledger = Ledger(dataclasses.replace(policy, period=1), block_size)
    ledger.start("", 1, 0)
    due = max(1, policy.protected) + policy.window + policy.tail
    # Of `longest` tokens the last is never computed, and the one before only after the last plan. No window waits for
    # more than one block.
    lengths = range(due, min(due + block_size, longest - 2) + 1)
    return any(ledger.plan([Held("", length, range(-(-length // block_size)), 0)]) for length in lengths)


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

    kara = config.additional_config["kara"]
    policy = max(settings_of(config).policies, key=lambda policy: policy.window)
    form = {}
    if "query_stride" not in kara and "query_heads" not in kara:
        fitted = fit_queries(policy, *_recorded(config))
        form = {"query_heads": fitted.query_heads, "query_stride": fitted.query_stride}
        if fitted != policy:
            init_logger("vllm.kara").warning_once(
                f"Kara records fewer queries, to stay within max_query_gib={policy.max_query_gib}: {form}. Scores are "
                f"less accurate. Raise max_query_gib, or let fewer sequences run at once (--max-num-seqs)"
            )
    config.additional_config = Additional({**config.additional_config, "kara": {**kara, **form}})
    try:
        query_ring_bytes(config)
    except ValueError as error:
        raise refusal(error, kara, "--max-num-seqs sets how many run") from None


def query_ring_bytes(config: Any) -> int:
    """Bytes of the query ring of each worker. Raises ValueError if that is more than ``max_query_gib``."""
    settings = settings_of(config)
    layers, heads, kv_heads, size, most, dtype = _recorded(config)
    recorded = settings.policy.recorded_heads(heads, kv_heads)
    return check_ring(settings.policy, layers, recorded, size, most, dtype, settings.query_rows)


def _recorded(config: Any) -> tuple[int, int, int, int, int, Any]:
    """Layers, query heads and KV heads of a worker, size of a head, requests that run at once, and the dtype."""
    model, parallel = config.model_config, config.parallel_config
    return (
        model.get_num_layers(parallel), model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel),
        model.get_head_size(), config.scheduler_config.max_num_seqs, model.dtype,
    )  # fmt: skip
