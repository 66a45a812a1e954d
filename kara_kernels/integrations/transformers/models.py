"""Supported models: every layer must be plain causal softmax attention over all tokens."""

from __future__ import annotations

from typing import Any

HOW_TO_LOAD = (
    'load the model with attn_implementation="kara" or call model.set_attn_implementation("kara"), '
    "after importing kara_kernels.integrations.transformers"
)
_NOT_PLAIN = ("sliding_window", "softcap", "s_aux", "position_bias")  # arguments of other kinds of attention


def check_model(model_or_config: Any) -> int:
    """Rejects models that KaraCache does not support, before a request runs. Returns the number of layers ``L``.

    Raises:
        ValueError: a model whose attention implementation is not "kara".
        NotImplementedError: see :func:`check_config`.
    """
    config = getattr(model_or_config, "config", model_or_config)
    used = getattr(config, "_attn_implementation", None)
    if config is not model_or_config and used != "kara":
        raise ValueError(f'model: expected attention implementation "kara", got {used!r}: {HOW_TO_LOAD}')
    return check_config(config, "KaraCache")


def check_config(config: Any, who: str) -> int:
    """Rejects models whose layers are not plain causal softmax attention. Returns ``L``.

    Raises NotImplementedError. The message begins with ``who``.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{who} does not support encoder-decoder models")
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise NotImplementedError(f"{who} needs full attention in every layer, got {', '.join(others)}")
    if not getattr(config, "is_causal", True):
        raise NotImplementedError(f"{who} does not support attention that is not causal")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(f"{who} does not support soft-capped attention (attn_logit_softcapping)")
    return config.num_hidden_layers


def not_plain(kwargs: dict[str, Any]) -> list[str]:
    """Arguments of an attention call that ask for more than causal softmax attention."""
    return [name for name in _NOT_PLAIN if kwargs.get(name) is not None]
