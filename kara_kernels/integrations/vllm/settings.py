"""The settings under ``--additional-config '{"kara": ...}'``, and the supported versions of vLLM."""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kara_kernels.engine import Policy

RUN = "run"
SUPPORTED = {"0.32": RUN, "0.33": "read, not run"}
"""Minor versions of vLLM that this plugin is written for, and how that was proved."""


@dataclass(frozen=True)
class Settings:
    """A policy, and the file of the trace."""

    policy: Policy
    trace: str | None = None
    """File to which one JSON line is appended per compressed request."""

    def check_trace(self) -> None:
        """Raises a ValueError if the file cannot be written, instead of failing at the first compression."""
        if self.trace is None:
            return
        try:
            open(self.trace, "a", encoding="utf-8").close()
        except OSError as error:
            raise ValueError(
                f"kara: trace: expected a file that can be written, got {self.trace}: {error.strerror}"
            ) from None


def settings_of(config: Any) -> Settings:
    """The settings in a VllmConfig.

    Raises:
        ValueError: unknown keys, or values of the wrong type or range. One line names key, expected and got.
    """
    return settings_in(config.additional_config)


def settings_in(additional: Mapping[str, Any]) -> Settings:
    """Like :func:`settings_of`, in the additional settings themselves."""
    given = additional["kara"]
    # vLLM shows a ValueError of its configuration as one message, and a TypeError as a traceback.
    try:
        if not isinstance(given, dict):
            raise TypeError(f"expected an object of settings, got {type(given).__name__}")
        rest = dict(given)
        trace = rest.pop("trace", None)
        if trace is not None and not isinstance(trace, str):
            raise TypeError(f"trace: expected a file name, got {type(trace).__name__}")
        return Settings(Policy.from_settings(rest, beside=("trace",)), trace)
    except (TypeError, ValueError) as error:
        raise refusal(error, given) from None


def refusal(error: Exception, given: Any, advice: str = "") -> ValueError:
    """The error as an operator reads it: in one line, and without blame for a setting that was not set."""
    name = str(error).partition(":")[0]
    defaulted = f"{name} was not set" if name in Policy.__dataclass_fields__ and name not in given else ""
    notes = "; ".join(filter(None, (defaulted, advice)))
    return ValueError(f"kara: {error} ({notes})" if notes else f"kara: {error}")


class Additional(UserDict):
    """The additional settings, with a hash that changes only with what vLLM keeps from one start to the next.

    vLLM would hash a dict whole and, after every change, compile the model again. Nothing of Kara is compiled, because
    attention is an opaque operation to the compiler. But vLLM may also keep the memory that it measured
    (``VLLM_ENABLE_STARTUP_PLAN``), and the query ring is part of that.
    """

    def compute_hash(self) -> str:
        """The hash that vLLM asks for."""
        policy = settings_in(self).policy
        ring = [policy.query_rows, policy.query_heads, policy.query_dtype]
        return hashlib.sha256(json.dumps({**self, "kara": ring}, sort_keys=True).encode()).hexdigest()


def proof_for(version: str) -> str | None:
    """How it was proved that the plugin fits this version of vLLM, or None if it was not."""
    return next((proof for minor, proof in SUPPORTED.items() if version.startswith(f"{minor}.")), None)


def versions(proof: str | None = None) -> str:
    """The supported versions in words, or only those with this proof."""
    return " or ".join(f"{minor}.*" for minor, how in SUPPORTED.items() if proof in (None, how))


def check_version() -> None:
    """Raises a ValueError for an unsupported version of vLLM, and warns of one that was never run."""
    import vllm
    from vllm.logger import init_logger

    proof = proof_for(vllm.__version__)
    if proof is None:
        raise ValueError(f"kara: expected vLLM {versions()}, got {vllm.__version__}")
    if proof != RUN:
        init_logger("vllm.kara").warning_once(
            f"Kara was never run with vLLM {vllm.__version__}; its code was only read. It was run with vLLM "
            f"{versions(RUN)}"
        )
