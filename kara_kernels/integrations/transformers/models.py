"""Supported models: layers must be plain causal softmax attention, over all tokens or, beside such layers, sliding."""

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
    return check_config(config, "KaraCache", beside=("sliding_attention",))


def kinds_of(model_or_config: Any) -> list[int | None]:
    """For each layer the tokens that a query sees where layers slide, else None."""
    config = getattr(model_or_config, "config", model_or_config).get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def check_config(config: Any, who: str, beside: tuple[str, ...] = ()) -> int:
    """Rejects models whose layers are not plain causal softmax attention. Returns the number of all layers.

    Raises NotImplementedError. The message begins with ``who``. Kinds of layers ``beside`` those of full attention are
    allowed.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{who} does not support encoder-decoder models")
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    allowed = {"full_attention", *beside} if "full_attention" in kinds else {"full_attention"}
    if others := sorted(set(kinds) - allowed):
        where = "some layers" if beside else "every layer"
        raise NotImplementedError(f"{who} needs full attention in {where}, got {', '.join(others)}")
    if not getattr(config, "is_causal", True):
        raise NotImplementedError(f"{who} does not support attention that is not causal")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(f"{who} does not support soft-capped attention (attn_logit_softcapping)")
    return config.num_hidden_layers


def not_plain(kwargs: dict[str, Any]) -> list[str]:
    """Arguments of an attention call that ask for more than causal softmax attention."""
    return [name for name in _NOT_PLAIN if kwargs.get(name) is not None]
