"""What a request asks of contexts, in ``kv_transfer_params``.

``{"contexts": false}``: exact rows only, and nothing is stored. ``{"context_tokens": n}``: the first ``n`` tokens of
the prompt are a context, rounded down to whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

from kara_kernels.values import check_count


class Asked(NamedTuple):
    on: bool
    """Whether rows may come out of packets, and go into them."""
    tokens: int | None
    """Of the context; None: found by what requests share."""


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
    except (TypeError, ValueError) as error:
        raise ValueError(f"contexts: {error}") from None
    return Asked(on, tokens)
