"""The settings under ``--additional-config '{"contexts": ...}'``."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kara_kernels.values import check_choice, check_count, check_flag, check_number

from ..unsupported import FP8, cache_dtype_of

GIB = 2**30
SCORERS = ("kara_sampled", "keydiff", "knorm")
"""Those by which rows are dropped."""
METHODS = tuple(f"{scorer}/{form}" for scorer in ("none", *SCORERS) for form in ("int8", "int4", "fp8", "exact"))
"""What the plugin can store: all rows in their order (``"none"``) or the best of them, in a form."""


CONVERSATION = "kara/exact"
"""The rows that windows left of a whole text, as they are. Nobody asks for it: see :mod:`.conversations`."""


def may_drop(method: str) -> bool:
    """Whether packets of a method hold the best rows first, so that they may be cut to fewer rows than tokens."""
    return not method.startswith(("none/", "kara/"))


def needs_queries(method: str) -> bool:
    """Whether rows are ordered by queries that were recorded when they were computed."""
    return method.startswith("kara_sampled/")


SAFEST, EXACT = "none/int8", "none/exact"
SAFE = {SAFEST: 0.9999, EXACT: 1.0}
"""Methods that need no profile, and their qualities. Eight bits lose 0.00002 nats (contexts-frontier.md)."""


@dataclass(frozen=True)
class RemoteSettings:
    """A store that servers share. Its URL may hold a password, so no text of this, and no error, has it.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    url: str = field(repr=False)
    """``redis://``, ``rediss://``, ``unix://``, ``s3+http://`` or ``s3+https://``; ``$NAME``: what this environment
    variable holds."""
    ttl: float = 86_400.0
    """Seconds that packets live after their last use."""
    wait: float = 0.1
    """Seconds that a request waits at most until it is known what the store has for it."""
    weights: str | None = None
    """Names the model's weights, if neither a folder nor a commit says which they are."""

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            raise TypeError(f"remote: url: expected a str, got {type(self.url).__name__}")
        check_number("remote: ttl", self.ttl, 1, 1e9)
        check_number("remote: wait", self.wait, 0, 60)
        if self.weights is not None and (not isinstance(self.weights, str) or not self.weights):
            raise TypeError(f"remote: weights: expected a name, got {self.weights!r}")
        if not self.url.startswith("$"):
            _check_address(self.url)

    def address(self) -> str:
        """The URL, which is checked to be of use on this machine. Raises ValueError."""
        url = self.url
        if url.startswith("$"):
            if url[1:] not in os.environ:
                raise ValueError(f"remote: url: expected an environment variable that is set, got {url}")
            url = _check_address(os.environ[url[1:]])
        needed = "nixl" if url.startswith("s3+") else "redis"
        if importlib.util.find_spec(needed) is None:
            raise ValueError(
                f"remote: expected the package {needed} (pip install {needed}), got an installation without it"
            )
        return url


def _check_address(url: str) -> str:
    """Returns it. Raises ValueError, also for a password that is cut by a "/", "?" or "#" in it."""
    try:
        found = urlsplit(url)
        _ = found.port  # raises ValueError for what is no number
        as_expected = found.scheme == "unix" and found.path != ""
        if found.scheme in ("redis", "rediss"):
            rest_is_one = re.fullmatch(r"/?\d*", found.path) and "@" not in found.query and not found.fragment
            as_expected = found.hostname is not None and bool(rest_is_one)
        elif found.scheme in ("s3+http", "s3+https"):
            only_host = bool(found.hostname) and "@" not in found.netloc and not found.query and not found.fragment
            as_expected = only_host and re.fullmatch(r"/[a-z0-9.-]{3,63}/?", found.path) is not None
    except ValueError:
        as_expected = False
    if not as_expected:
        raise ValueError(
            "remote: url: expected redis://[[user]:password@]host[:port][/database] or s3+https://host[:port]/bucket, "
            "got another form"
        )
    return url


@dataclass(frozen=True)
class ContextSettings:
    """What an operator may set.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    ram_gib: float = 4.0
    """Memory of packets, of all workers of an engine together."""
    alpha: float = 100.0
    """Seconds of delay that one unit of quality is worth."""
    floor: float = 0.97
    """The least quality that a context may be stored with, 0..1."""
    half_life: float = 3600.0
    """Seconds after which a use counts half."""
    min_tokens: int = 256
    """Shorter contexts are left alone."""
    default: str = "on"
    """For requests that say nothing: ``"on"`` or ``"off"``."""
    grain_kib: int = 256
    """Packets take whole grains of this size, of each worker."""
    methods: Sequence[str] = (SAFEST,)
    """What contexts may be stored as; see :data:`METHODS`."""
    profile: str | None = None
    """A file of ``python -m kara_kernels.contexts profile``, read again when it changes."""
    disk: Mapping[str, Any] | None = None
    """A tier below: ``path`` of a folder, and ``gib``, the most it may hold."""
    remote: RemoteSettings | None = None
    """The lowest tier, a store that servers share. May be given as a mapping."""
    trace: str | None = None
    """A file that gets a line of JSON for each event of a context."""
    conversations: bool = False
    """Whether the next turn goes on with the rows that windows left of a request."""
    preempted: bool = False
    """Whether a preempted request goes on with the rows that windows left of it."""

    @property
    def keeps_left(self) -> bool:
        """Whether what windows left is stored."""
        return self.conversations or self.preempted

    def __post_init__(self) -> None:
        check_number("ram_gib", self.ram_gib, 1e-6, 2**20)
        check_number("alpha", self.alpha, 0, 1e9)
        check_number("floor", self.floor, 0, 1)
        check_number("half_life", self.half_life, 1e-3, 1e9)
        check_count("min_tokens", self.min_tokens, 1, 2**31 - 1)
        check_choice("default", self.default, ("on", "off"))
        check_count("grain_kib", self.grain_kib, 4, 2**20)
        _check_methods(self.methods, self.profile)
        if self.trace is not None and (not isinstance(self.trace, str) or not self.trace):
            raise TypeError(f"trace: expected a file name, got {self.trace!r}")
        check_flag("conversations", self.conversations)
        check_flag("preempted", self.preempted)
        if self.disk is not None:
            _check_disk(self.disk)
        if self.remote is not None and not isinstance(self.remote, RemoteSettings):
            object.__setattr__(self, "remote", _remote(self.remote))


def _remote(given: Any) -> RemoteSettings:
    known = RemoteSettings.__dataclass_fields__
    if not isinstance(given, Mapping):
        raise TypeError(f"remote: expected an object of {', '.join(known)}, got {type(given).__name__}")
    if "url" not in given or set(given) - set(known):
        raise ValueError(f"remote: expected url and some of {', '.join(known)}, got {', '.join(map(str, given))}")
    return RemoteSettings(**given)


def _check_methods(given: Any, profile: Any) -> None:
    if profile is not None and (not isinstance(profile, str) or not profile):
        raise TypeError(f"profile: expected a path, got {profile!r}")
    if not isinstance(given, list | tuple) or not given:
        raise TypeError(f"methods: expected a list of one or more, got {given!r}")
    for method in given:
        check_choice("methods", method, METHODS)
    if profile is None and (dropping := [method for method in given if may_drop(method)]):
        raise ValueError(f"methods: expected a profile beside methods that drop rows, got {', '.join(dropping)}")
    if profile is None and not set(given) & set(SAFE):
        raise ValueError(f"methods: expected {' or '.join(SAFE)} among them without a profile, got {', '.join(given)}")


def _check_disk(given: Any) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"disk: expected an object of path and gib, got {type(given).__name__}")
    if set(given) != {"path", "gib"}:
        raise ValueError(f"disk: expected path and gib, got {', '.join(sorted(map(str, given))) or 'nothing'}")
    if not isinstance(given["path"], str) or not given["path"]:
        raise TypeError(f"disk: path: expected a path, got {given['path']!r}")
    check_number("disk: gib", given["gib"], 1e-6, 2**30)


def context_settings_of(config: Any) -> ContextSettings:
    """The settings in a VllmConfig. Raises ValueError in one line."""
    if "contexts" not in config.additional_config:  # vLLM has imported the connector by the path that it was given
        raise ValueError("contexts: expected vLLM's plugin kara to be loaded, got VLLM_PLUGINS without it")
    given = config.additional_config["contexts"]
    try:
        if not isinstance(given, dict):
            raise TypeError(f"expected an object of settings, got {type(given).__name__}")
        known = ContextSettings.__dataclass_fields__
        if unknown := ", ".join(sorted(set(given) - set(known))):
            raise ValueError(f"{unknown}: expected one of {', '.join(known)}, got {unknown}")
        if cache_dtype_of(config) in FP8:  # eight bits as they are take no more room, and lose nothing
            given = {"methods": [EXACT], **given}
        return ContextSettings(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"contexts: {error}") from None
