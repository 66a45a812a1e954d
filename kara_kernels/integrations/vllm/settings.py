"""The settings under ``--additional-config '{"kara": ...}'``, and the versions of vLLM that they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kara_kernels.engine import Policy

SUPPORTED = ("0.32",)
"""Minor versions of vLLM that this plugin was written against and is tested with."""


@dataclass(frozen=True)
class Settings:
    """A policy, and where to write what was done."""

    policy: Policy
    trace: str | None = None
    """File to which one JSON line per compression and request is appended."""

    def check_trace(self) -> None:
        """Raises a ValueError now for a file that cannot be written; the first compression would fail later."""
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
        ValueError: unknown keys, ill-typed or impossible values; one line that names key, expected and got.
    """
    given = config.additional_config["kara"]
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
        raise ValueError(f"kara: {error}") from None


def is_supported(version: str) -> bool:
    """Whether this version of vLLM is one of those that the plugin is tested with."""
    return version.startswith(tuple(f"{minor}." for minor in SUPPORTED))


def check_version() -> None:
    """One ValueError for a vLLM that the plugin was not written against."""
    import vllm

    if not is_supported(vllm.__version__):
        expected = " or ".join(f"{minor}.*" for minor in SUPPORTED)
        raise ValueError(f"kara: expected vLLM {expected}, got {vllm.__version__}")
