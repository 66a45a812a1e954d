"""The settings under ``--additional-config '{"kara": ...}'``, and the supported versions of vLLM."""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kara_kernels.engine import Policy
from kara_kernels.values import check_choice, check_count, check_flag

from .traces import check_trace

RUN = "run"
SUPPORTED = {"0.32": RUN, "0.33": "read, not run"}
"""Minor versions of vLLM that this plugin is written for, and how that was proved."""


@dataclass(frozen=True)
class Settings:
    """A policy, and what only this plugin has.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    policy: Policy
    trace: str | None = None
    """File to which one JSON line is appended per compressed request."""
    windows: Sequence[int] = ()
    """Windows that requests may ask for besides the policy's."""
    default: str = "on"
    """Whether a request that asks for nothing is compressed: ``"on"`` or ``"off"``."""
    min_output_tokens: int | None = None
    """Requests with a smaller ``max_tokens`` are left alone unless they ask. None: those that cannot fill a window and
    its tail."""
    shadow: bool = False
    """Score and select, but move and free nothing. Metrics report what would have been freed and lost."""
    live: str | None = None
    """File with settings that may change while the server runs, as :data:`LIVE` lists them."""

    def __post_init__(self) -> None:
        for name in ("trace", "live"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: expected a file name, got {type(value).__name__}")
        check_flag("shadow", self.shadow)
        if not isinstance(self.windows, (list, tuple)):
            raise TypeError(f"windows: expected a list, got {type(self.windows).__name__}")
        check_choice("default", self.default, ("on", "off"))
        if self.min_output_tokens is not None:
            check_count("min_output_tokens", self.min_output_tokens, 0, 2**31 - 1)
        _ = self.policies

    @property
    def values(self) -> dict[str, Any]:
        """All settings by name, those of the policy too."""
        return asdict(self.policy) | {name: getattr(self, name) for name in BESIDE}

    @property
    def policies(self) -> list[Policy]:
        """The policy, and one for each other window. Their ``keep`` is the request's."""
        try:
            return [self.policy, *(self.policy.resized(window, 1) for window in self.windows)]
        except (TypeError, ValueError) as error:
            raise type(error)(f"windows: {error}") from None

    @property
    def query_rows(self) -> int:
        """Queries that may score a window of a request."""
        return max(policy.query_rows for policy in self.policies)

    @property
    def least_output(self) -> int:
        """Requests with a smaller ``max_tokens`` are left alone unless they ask for compression."""
        if self.min_output_tokens is not None:
            return self.min_output_tokens
        return self.policy.window + self.policy.tail

    def check_page_size(self, page_size: int) -> None:
        """Raises a ValueError for a window that could never free a block of ``page_size`` tokens."""
        self.policy.check_page_size(page_size)
        for policy in self.policies[1:]:
            try:
                policy.check_page_size(page_size)
            except ValueError as error:
                raise ValueError(f"windows: {error}") from None

    def check_trace(self) -> None:
        """Raises a ValueError if the file cannot be written, instead of failing at the first compression."""
        try:
            check_trace(self.trace)
        except ValueError as error:
            raise ValueError(f"kara: {error}") from None


BESIDE = tuple(name for name in Settings.__dataclass_fields__ if name != "policy")
"""Keys under ``kara`` that are no fields of the policy."""

LIVE = (
    "keep", "pressure_tail", "pressure_keep", "min_keep", "max_keep", "period", "max_sequences", "min_freed_blocks",
    "default", "min_output_tokens",
)  # fmt: skip
"""Settings that only schedulers use, so they may change while serving."""


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
        beside = {name: given[name] for name in BESIDE if name in given}
        rest = {name: value for name, value in given.items() if name not in BESIDE}
        return Settings(Policy.from_settings(rest, beside=BESIDE), **beside)
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
        settings = settings_in(self)
        ring = [settings.query_rows, settings.policy.query_heads, settings.policy.query_dtype]
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
