"""Compiles the library's launches for a GPU that is not present.

A driver reports a target and launches nothing. Every launcher runs unchanged on CPU tensors, and the compiled kernels
are collected. Used by tests and benches that inspect compiled code.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from kara_kernels.ops import _triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
SHARED = {
    "sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip


@dataclass
class Build:
    """One compiled kernel: its name, target and code."""

    name: str
    target: str
    kernel: CompiledKernel
    _resources: dict[str, int] = field(default_factory=dict)

    @property
    def shared(self) -> int:
        return self.kernel.metadata.shared

    @property
    def assembly(self) -> str:
        """PTX on NVIDIA targets, GCN on AMD."""
        return self.kernel.asm["ptx" if "ptx" in self.kernel.asm else "amdgcn"]

    def resources(self) -> dict[str, int]:
        """Registers and spilled bytes, as reported by the assembler or the code object."""
        if not self._resources:
            if "ptx" in self.kernel.asm:
                self._resources = _cuda_resources(self.kernel)
            else:
                text = self.assembly
                scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
                registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
                spills = [int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)]
                if scratch is None or registers is None or not spills:
                    raise AssertionError("no resource metadata in the AMD assembly")
                self._resources = {"registers": int(registers[1]), "spills": int(scratch[1]) + sum(spills)}
        return self._resources


def _cuda_resources(kernel: CompiledKernel) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "spills": int(usage["STACK"]) + int(usage["LOCAL"])}


_numbers = itertools.count(1000)  # larger than any index of a torch.device


class CompileOnly(DriverBase):
    """A driver that reports a target and launches nothing."""

    def __init__(self, name: str):
        self.target = TARGETS[name]
        self.number = next(_numbers)  # kernels are cached per device, so a new device compiles again
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED[name],
                "multiprocessor_count": 100,
                "warpSize": self.target.warp_size,
            },
            load_binary=lambda *args: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = lambda src, metadata: lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return types.SimpleNamespace(current_device=lambda: self.number, synchronize=lambda: None)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError("nothing runs here")

    def clear_cache(self, cache: Any) -> None: ...

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def compiling_for(name: str) -> Iterator[list[Build]]:
    """Compiles every kernel launched inside for target ``name`` and appends it to the list. Nothing runs."""
    builds: list[Build] = []
    original = CompiledKernel.__init__

    def record(self: CompiledKernel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        builds.append(Build(self.metadata.name, name, self))

    CompiledKernel.__init__ = record
    try:
        with driving(CompileOnly(name)):
            yield builds
    finally:
        CompiledKernel.__init__ = original


@contextmanager
def driving(instead: CompileOnly) -> Iterator[None]:
    """Replaces Triton's driver inside. Clears the library's cached targets of devices."""
    before = driver._active
    _triton.architecture.cache_clear()
    driver.set_active(instead)
    try:
        yield
    finally:
        driver._active = before
        _triton.architecture.cache_clear()
