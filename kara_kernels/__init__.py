"""Shrink the paged KV cache of a reasoning LLM while it decodes. Start at :func:`compress_window`.

Names are imported on first use, so that ``python -m kara_kernels`` works without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ahead import LookAhead
    from .integrations.flashinfer import block_tables_from_csr
    from .packed import PackedQueries
    from .paged import PagedCache
    from .payload import PayloadLayout
    from .windows.compress import CompressedWindow, compress_window

__all__ = [
    "CompressedWindow", "LookAhead", "PackedQueries", "PagedCache", "PayloadLayout", "block_tables_from_csr",
    "compress_window",
]  # fmt: skip
__version__ = "0.1.0"

_ROOMS = {
    "CompressedWindow": "windows.compress",
    "LookAhead": "ahead",
    "PackedQueries": "packed",
    "PagedCache": "paged",
    "PayloadLayout": "payload",
    "block_tables_from_csr": "integrations.flashinfer",
    "compress_window": "windows.compress",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
