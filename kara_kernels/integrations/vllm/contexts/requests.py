"""What a request asks of contexts, in ``kv_transfer_params``, and what it is told.

``{"contexts": false}``: exact rows only, and nothing is stored. ``{"context_tokens": n}``: the first ``n`` tokens of
the prompt are a context, rounded down to whole blocks. ``{"context": {"method": m, "ratio": r}}``: rows of that
compression only, as far as it is stored, whatever is faster. This is how profiles are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

from kara_kernels.values import check_choice, check_count, check_number

from .settings import METHODS

KEYS = ("contexts", "context_tokens", "context")


class Forced(NamedTuple):
    """The compression that a request wants."""

    method: str
    ratio: float
    """Stored bytes relative to the rows in the cache. The nearest one is taken."""


class Asked(NamedTuple):
    on: bool
    """Whether rows may come out of packets, and go into them."""
    tokens: int | None
    """Of the context; None: found by what requests share."""
    forced: Forced | None = None
    told: bool = False
    """Whether the answer says where the context's rows came from: the request has asked for something."""


def asked_of(params: Mapping[str, Any] | None, default: str) -> Asked:
    """What ``kv_transfer_params`` ask for. Raises ValueError for what nobody may ask: key, expected and got."""
    given = params or {}
    on = given.get("contexts", default == "on")
    if not isinstance(on, bool):
        raise ValueError(f"contexts: expected true or false, got {short(on)}")
    tokens = given.get("context_tokens")
    try:
        if tokens is not None:
            check_count("context_tokens", tokens, 1, 2**31 - 1)
        forced = _forced(given.get("context"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"contexts: {error}") from None
    return Asked(on, tokens, forced, any(key in given for key in KEYS))


def _forced(given: Any) -> Forced | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or set(given) != {"method", "ratio"}:
        raise ValueError(f"context: expected an object of method and ratio, got {short(given)}")
    check_choice("context: method", given["method"], METHODS)
    return Forced(given["method"], check_number("context: ratio", given["ratio"], 1e-9, 1e9))
