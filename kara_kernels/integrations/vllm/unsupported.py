"""Features of vLLM that cannot be combined with Kara, by the names that operators know them by.

Nothing of vLLM is imported at module level, because the environment report reads the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _other_scheduler(config: Any) -> Any:
    given = config.scheduler_config.scheduler_cls
    return given is not None and not str(given).startswith("kara_kernels.") and given


def _other_connector(config: Any) -> bool:
    given = config.kv_transfer_config
    offloads = config.cache_config.kv_offloading_size is not None  # vLLM makes it a connector, even out of ours
    return offloads or (given is not None and not str(given.kv_connector_module_path).startswith("kara_kernels."))


def _drafts(config: Any) -> Any:
    """Drafts of models are refused: they have caches of their own, and their steps overlap."""
    given = config.speculative_config
    return given is not None and (given.method != "ngram" or "contexts" in config.additional_config) and given.method


FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""Caches of eight-bit floats with one factor for a layer or a head."""


def cache_dtype_of(config: Any) -> str:
    """vLLM's name for what its KV cache holds, also where only attention layers will see the checkpoint's wish."""
    given: str = config.cache_config.cache_dtype
    quantised = given == "auto" and getattr(config.quant_config, "kv_cache_scheme", None) is not None
    return "fp8" if quantised else given


def _quantised(cache_dtype: str) -> Any:
    return cache_dtype not in ("auto", "float16", "bfloat16", "float32", *FP8) and cache_dtype


def _unequal_caches(config: Any) -> Any:
    return ", ".join(getattr(config.cache_config, "kv_cache_dtype_skip_layers", None) or ())


def full_layers(config: Any) -> int | None:
    """The number of layers with full attention, if the others slide and have caches of their own; None without any."""
    kinds = getattr(config.model_config.hf_text_config, "layer_types", None) or ()
    own = not config.scheduler_config.disable_hybrid_kv_cache_manager and "contexts" not in config.additional_config
    return kinds.count("full_attention") if own and set(kinds) == {"full_attention", "sliding_attention"} else None


def _sliding_window(config: Any) -> Any:
    model = config.model_config.hf_text_config
    kinds = getattr(model, "layer_types", None)
    slides = full_layers(config) is None and (kinds is None or "sliding_attention" in kinds)
    return slides and getattr(model, "sliding_window", None)


def _latent(config: Any) -> Any:
    return config.model_config.use_mla and ("contexts" in config.additional_config or cache_dtype_of(config) in FP8)


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
    "speculative decoding other than by n-grams, or with contexts (--speculative-config)": _drafts,
    "pipeline parallelism (--pipeline-parallel-size)": lambda c: c.parallel_config.pipeline_parallel_size > 1,
    "decode context parallelism (--decode-context-parallel-size)": lambda c: (
        (c.parallel_config.decode_context_parallel_size or 1) > 1
    ),
    "prefill context parallelism": lambda c: (getattr(c.parallel_config, "prefill_context_parallel_size", 1) or 1) > 1,
    "dual-batch overlap (--enable-dbo)": lambda c: c.parallel_config.enable_dbo,
    "other KV connectors (--kv-transfer-config, --kv-offloading-size)": _other_connector,
    "encoder cache connectors (--ec-transfer-config)": lambda c: getattr(c, "ec_transfer_config", None) is not None,
    "another scheduler (--scheduler-cls)": _other_scheduler,
    "a KV cache quantised to other than fp8 (--kv-cache-dtype)": lambda c: _quantised(cache_dtype_of(c)),
    "layers of unequal caches (--kv-cache-dtype-skip-layers)": _unequal_caches,
    "fast prefill of shared KV (--kv-sharing-fast-prefill)": lambda c: c.cache_config.kv_sharing_fast_prefill,
    "diffusion models": lambda c: getattr(c, "diffusion_config", None) is not None,
    "pooling models": lambda c: c.model_config.runner_type == "pooling",
    "encoder-decoder models": lambda c: c.model_config.is_encoder_decoder,
    "multi-modal inputs (--language-model-only allows text)": _multi_modal,
    "multi-head latent attention with contexts, or with a quantised KV cache": _latent,
    "sparse attention (index_topk)": lambda c: getattr(c.model_config.hf_text_config, "index_topk", None),
    "hybrid or attention-free models": lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
    "sliding windows (in all layers, with contexts, or with --disable-hybrid-kv-cache-manager)": _sliding_window,
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
    "a KV cache quantised to other than fp8": lambda x: _quantised(x.kv_cache_dtype),
    "sliding windows": lambda x: getattr(x, "sliding_window", None) is not None,
    "ALiBi": lambda x: getattr(x.impl, "alibi_slopes", None) is not None,
    "attention sinks": lambda x: getattr(x.impl, "sinks", None) is not None,
    "cross-layer KV sharing": lambda x: getattr(x, "kv_sharing_target_layer_name", None) is not None,
    "soft-capped logits": lambda x: bool(getattr(x.impl, "logits_soft_cap", 0)),
    "attention other than a decoder's": lambda x: getattr(x, "attn_type", "decoder") != "decoder" and x.attn_type,
    "values of another size than keys": _value_size,
    "latent attention with packed weights (AMX, ROCm)": lambda x: (
        hasattr(x, "kv_lora_rank") and not hasattr(x, "W_UK_T")
    ),
}
"""The same for an attention layer, checked when its model is loaded, for what the configuration does not show."""


def found_in(thing: Any, unsupported: dict[str, Callable[[Any], Any]]) -> list[str]:
    """The entries of a table that apply to a configuration or a layer, in words."""
    found = ((what, test(thing)) for what, test in unsupported.items())
    return [what if isinstance(value, bool) else f"{what}: {value}" for what, value in found if value]
