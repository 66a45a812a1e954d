"""A Triton driver whose device is the emulator: unchanged launchers run on CPU tensors.

Kernels are compiled for sm_80, whose matrix and copy instructions the emulator has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime import driver

from bench.compile_only import Build, compiling_for

from .machine import Kernel, Launch, run

Rewrite = Callable[[str, str], str]  # (kernel's name, its PTX) -> PTX


@contextmanager
def emulating(
    order: str = "together", memory: Iterable[torch.Tensor] = (), rewrite: Rewrite | None = None, timed: bool = False
) -> Iterator[list[Launch]]:
    """Runs every kernel launched inside in the emulator and appends its report to the list.

    A launch may touch its tensor arguments and ``memory``: tensors that it reaches through a table of addresses or by
    the stride between layers. ``rewrite`` changes the code before it runs, to plant a bug.
    ``timed``: round trips to memory are counted. Needs TRITON_INTERPRET=0.
    """
    launches: list[Launch] = []
    memory = tuple(memory)
    with compiling_for("sm_80") as builds:

        def launcher(source: Any, metadata: Any) -> Callable[..., None]:
            kinds = [source.signature[name] for name in source.fn.arg_names]

            def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, meta: Any, enter: Any,
                       leave: Any, *arguments: Any) -> None:  # fmt: skip
                given = [value for value, kind in zip(arguments, kinds, strict=True) if kind != "constexpr"]
                (build,) = [build for build in builds if build.kernel._run is launch]
                launches.append(_run(build, (x, y, z), given, memory, order, rewrite, timed))

            return launch

        driver.active.launcher_cls = launcher
        yield launches


def _run(build: Build, grid: tuple[int, int, int], given: list[Any], memory: Iterable[torch.Tensor], order: str,
         rewrite: Rewrite | None, timed: bool) -> Launch:  # fmt: skip
    ptx = build.assembly if rewrite is None else rewrite(build.name, build.assembly)
    tensors = [*memory, *(value for value in given if isinstance(value, torch.Tensor))]
    return run(
        _kernel(ptx), grid, [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given],
        spans=[span for tensor in tensors for span in _spans(tensor)],
        warps=build.kernel.metadata.num_warps, shared=build.shared, order=order, timed=timed,
    )  # fmt: skip


@functools.lru_cache(64)
def _kernel(ptx: str) -> Kernel:
    return Kernel(ptx)


GAP = 1 << 20  # larger gaps between parts of a tensor are not part of it


def _spans(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Address ranges of a tensor's elements, including small gaps between them."""
    if not tensor.numel():
        return
    extents = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    widest = max(range(tensor.dim()), key=lambda dim: extents[dim], default=0)
    inner = (sum(extents) - extents[widest] + 1 if extents else 1) * tensor.element_size()
    if extents and tensor.stride(widest) * tensor.element_size() > inner + GAP and tensor.shape[widest] > 1:
        for part in tensor.unbind(widest):
            yield from _spans(part)
    else:
        yield tensor.data_ptr(), tensor.data_ptr() + (sum(extents) + 1) * tensor.element_size()
