"""Runs the kernels of a test on a GPU, if there is one and this process compiles: the tests themselves stay on the CPU.

``lent(function)`` copies the storages of all tensor arguments to the GPU, calls the function there, and copies back
what it wrote. Views of one storage stay views of one storage, with their offsets, strides and alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from conftest import INTERPRETED
from torch import Tensor

from kara_kernels import PagedCache

ON_GPU = not INTERPRETED and torch.cuda.is_available()


class _Loan:
    def __init__(self) -> None:
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}  # address -> bytes on the CPU, bytes on the GPU

    def there(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in self.storages:
                own = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.storages[storage.data_ptr()] = own, own.cuda()
            bytes_there = self.storages[storage.data_ptr()][1].untyped_storage()
            place = bytes_there, value.storage_offset(), value.size(), value.stride()
            return torch.empty(0, dtype=value.dtype, device="cuda").set_(*place)
        if isinstance(value, PagedCache):
            return PagedCache(*(half and self.there(list(half)) for half in (value.k, value.v)))
        return _mapped(self.there, value)

    def back(self, value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else _mapped(self.back, value)

    def write_back(self) -> None:
        for own, there in self.storages.values():
            own.copy_(there)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = map(function, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def lent(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose calls with ``backend="triton"`` run on the GPU; without one, ``function`` itself."""
    if not ON_GPU:
        return function

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if options.get("backend") != "triton":
            return function(*arguments, **options)
        loan = _Loan()
        result = function(*loan.there(arguments), **loan.there(options))
        loan.write_back()
        return loan.back(result)

    return run
