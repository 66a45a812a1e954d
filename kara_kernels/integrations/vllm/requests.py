"""What a request asks of Kara, in ``SamplingParams.extra_args["kara"]``; over HTTP, in ``vllm_xargs``.

A client may ask for compression (true), against it (false), or for an own ``keep`` and ``window`` (an object). vLLM's
server turns booleans into 0 and 1 and refuses objects, so numbers and JSON in a string say the same.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from reprlib import repr as short
from typing import Any, NamedTuple

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from .contexts.requests import asked_of
from .settings import Settings, settings_of

OWN = ("keep", "window")


class RequestError(VLLMValidationError, ValueError):
    """A request asks for what cannot be. vLLM's server answers with status 400."""


class Choice(NamedTuple):
    """What becomes of a request."""

    own: dict[str, int] | None
    """Its own ``keep`` and ``window``, as far as it has any. None: it is left alone."""
    reason: str = ""
    """Why it is left alone: ``request``, ``default`` or ``short``."""


def choose(params: SamplingParams, settings: Settings, block_size: int) -> Choice:
    """What becomes of a request of these parameters.

    Raises:
        RequestError: it asks for what cannot be. One line names key, expected and got.
    """
    asked = _asked(params)
    if asked is not None:
        return Choice(None, "request") if asked is False else Choice(_checked(asked, settings, block_size))
    if settings.default == "off":
        return Choice(None, "default")
    if params.max_tokens is not None and params.max_tokens < settings.least_output:
        return Choice(None, "short")
    return Choice({})


def _asked(params: SamplingParams) -> bool | dict | None:
    """What a request asks for, or None if that is nothing."""
    extra = params.extra_args or {}
    if "kara" not in extra:
        return None
    asked = extra["kara"]
    if isinstance(asked, str):
        with contextlib.suppress(ValueError, RecursionError):
            asked = json.loads(asked)
    if isinstance(asked, int) and asked in (0, 1):
        return bool(asked)
    if not isinstance(asked, dict):
        raise RequestError(f'kara: expected true, false or an object such as {{"keep": 32}}, got {short(asked)}')
    return asked


def _checked(asked: bool | dict, settings: Settings, block_size: int) -> dict[str, int]:
    own = asked if isinstance(asked, dict) else {}
    windows = sorted({policy.window for policy in settings.policies})
    # Escaped, because a lone surrogate would fail when the server writes the message.
    if unknown := ", ".join(sorted(short(str(key))[1:-1] for key in set(own) - set(OWN))):
        raise RequestError(f"kara: {unknown}: expected one of {', '.join(OWN)}, got {unknown}")
    if "window" in own and own["window"] not in windows:
        raise RequestError(
            f"kara: window: expected one of {', '.join(map(str, windows))}, as the server's setting windows lists "
            f"them, got {short(own['window'])}"
        )
    try:
        unguarded = settings.policy.resized(settings.policy.window)
        replace(unguarded, **own).check_page_size(block_size)
    except (TypeError, ValueError) as error:
        raise RequestError(f"kara: {error}") from None
    return own


def check(params: Any, config: Any) -> None:
    """Raises a :class:`RequestError` if a request to an engine with Kara asks for what cannot be."""
    given = config.additional_config
    if not isinstance(params, SamplingParams) or not isinstance(given, Mapping):
        return
    extra = params.extra_args or {}
    if "kara" in extra and "kara" in given:
        choose(params, settings_of(config), config.cache_config.block_size)
    if "contexts" in given:
        try:
            asked_of(extra.get("kv_transfer_params"), "on")
        except ValueError as error:
            raise RequestError(str(error)) from None


def check_requests() -> None:
    """Checks requests in the front end, before they reach an engine. A second call changes nothing."""
    from vllm.v1.engine.input_processor import InputProcessor

    # All front ends in Python and LLM.generate pass here. vLLM's own extension for this, validate_params of a logits
    # processor, sees no settings, and the processor would then run in every step.
    process = InputProcessor.process_inputs
    if hasattr(process, "kara"):
        return

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        check(params, self.vllm_config)
        return process(self, request_id, prompt, params, *args, **kwargs)

    process_inputs.kara = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
