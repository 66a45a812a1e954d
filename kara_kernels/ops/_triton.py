"""Shared by all kernels: Triton if it is installed, compilation and launch, and properties of GPUs."""

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..values import check_choice

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # macOS and Windows: kernels can be imported, and the PyTorch path runs

    class _Absent:
        """Replaces ``triton`` and ``triton.language`` in decorators and annotations."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton = tl = libdevice = _Absent()

    HAS_TRITON = False
else:
    HAS_TRITON = True


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` without specialisation on values: kernels are compiled only for types and constexprs.

    By default Triton recompiles for pointers aligned to 16 bytes, for integers that are multiples of 16, and for ones.
    A batch of four would then stall a server that was warmed up with a batch of one. Instead, the width of loads
    depends on the alignment of rows, a constexpr that the launcher knows. Arguments are passed one by one, because
    Triton specialises on everything inside a tuple.
    """
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])(function)


@triton.jit
def layer_pointer(ptr, table_ptr, stride_layer, layer):
    """Base of a layer, from the address table if there is one, otherwise ``layer`` strides after the first layer."""
    if table_ptr is None:
        return ptr + layer * stride_layer
    else:
        return tl.load(table_ptr + layer).to(ptr.dtype)


@triton.jit
def window_of(seq, starts_ptr, seq_lens_ptr, protected_ptr, W: tl.constexpr):
    """(physical start of the window, whether it fits). Absent starts mean the newest ``W`` tokens."""
    if starts_ptr is None:
        start = tl.load(seq_lens_ptr + seq) - W
    else:
        start = tl.load(starts_ptr + seq)
    fits = start >= 0
    if protected_ptr is not None:
        fits = fits & (start >= tl.load(protected_ptr + seq))
    if seq_lens_ptr is not None:
        length = tl.load(seq_lens_ptr + seq)
        fits = fits & (length >= W) & (start <= length - W)  # start + W could wrap around
    return start, fits


# With TRITON_INTERPRET=1 at import time, the decorator turned kernels into Python functions.
INTERPRETED = HAS_TRITON and not isinstance(layer_pointer, triton.runtime.JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def reciprocal(x):
    """``1 / x`` for sizes up to 2^126. Division takes five more instructions for the others."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return libdevice.fast_dividef(1.0, x)


@dataclass(frozen=True)
class Architecture:
    """Properties of a GPU that launch configurations depend on.

    Sizes are vendors' figures. What a limit avoids was seen in code compiled for the six targets of `make codegen`, by
    Triton 3.6 and 3.9. Nothing was chosen by timing.
    """

    shared_memory: int
    """Bytes that one program may use: CUDA programming guide, table of compute capabilities (less the 1 KB that CUDA
    keeps), and AMD's LDS sizes."""
    amd: bool = False
    query_tiles: int = 2
    """Query tiles in shared memory beside the keys: two in flight with mma.sync; a third with wgmma and tcgen05, which
    read their operands there; none on AMD, which keeps queries in registers."""
    fold: int = 2
    """Rows of a product that a thread holds, eight apart: mma.sync and wgmma leave two, tcgen05 and AMD's one."""
    rows_of_256: int = 64
    """Query rows of a tile with 256 keys, at most. On sm_120, 64 spilled at D = 64 and G = 3, and do not fit at 128."""
    packed_rows: int = 64
    """Packed query rows of a tile with D > 64, at most. On sm_80, 64 spilled with fp8 keys and Triton 3.6."""
    norm_rows: int = 128
    """Values whose norms a program takes at once, at most. They are 32 KB at D = 128, as in compaction. On sm_120 they
    spilled, and halved the occupancy where keys turn."""
    slice_dims: int = 64
    """Head dimensions of a streamed key tile. On sm_120, slices of 64 spilled, because its assembler aims at 128
    registers."""
    overlaps: bool = False
    """Whether a kernel may be launched while the one before it runs, and wait for it (griddepcontrol, from sm_90)."""
    float32_products: str = "tf32x3"
    """How float32 is multiplied. AMD has an instruction for it. On NVIDIA, "ieee" is scalar code that spills at any
    tile size; three TF32 products have an error of about 2^-22."""

    def by_warps(self, rows: int) -> bool:
        """Whether mma.sync multiplies tiles of so many rows. wgmma and tcgen05 need 64."""
        return not self.amd and (self.query_tiles == 2 or rows < 64)


def _small(shared_memory: int, overlaps: bool = False) -> Architecture:
    return Architecture(shared_memory, rows_of_256=32, packed_rows=32, norm_rows=32, slice_dims=32, overlaps=overlaps)


def _amd(shared_memory: int) -> Architecture:
    return Architecture(shared_memory, amd=True, query_tiles=0, fold=1, float32_products="ieee")


# Keys are Triton's names of the targets. 86, 87, 89 and 103 were not compiled for. They are as the nearest of the six.
ARCHITECTURES: Mapping[int | str, Architecture] = MappingProxyType({
    80: Architecture(166912, packed_rows=32),
    86: _small(101376),
    87: Architecture(166912, packed_rows=32),
    89: _small(101376),
    90: Architecture(232448, query_tiles=3, overlaps=True),
    100: Architecture(232448, query_tiles=3, fold=1, overlaps=True),
    103: Architecture(232448, query_tiles=3, fold=1, overlaps=True),
    120: _small(101376, overlaps=True),
    "gfx942": _amd(65536),
    "gfx950": _amd(163840),
})  # fmt: skip
# Other targets get the minimum of any Triton target, 64 KB (sm_75, gfx90a). That may be slower, but it launches.
UNKNOWN, UNKNOWN_AMD = _small(65536), _amd(65536)
# Tiles as on sm_80, products as NumPy computes them.
INTERPRETER = Architecture(166912, packed_rows=32, float32_products="ieee")


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The architecture of ``device``, whichever device is current."""
    if INTERPRETED:
        return INTERPRETER
    with _current(device):
        target = triton.runtime.driver.active.get_current_target()
    return ARCHITECTURES.get(target.arch, UNKNOWN_AMD if target.backend == "hip" else UNKNOWN)


def overlaps(device: torch.device) -> bool:
    """Whether kernels of an event overlap. It is asked for by KARA_KERNELS_PDL=1, because no GPU has timed it yet."""
    return architecture(device).overlaps and os.environ.get("KARA_KERNELS_PDL", "0") == "1"


def dependent(follows: bool) -> dict[str, bool]:
    """Arguments of a launch that may begin while the kernel before it runs. The kernel begins with a wait for it."""
    return {"FOLLOWS": True, "launch_pdl": True} if follows else {"FOLLOWS": False}


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Makes ``device`` current inside the context. A device without an index is current already."""
    driver = triton.runtime.driver.active
    before = driver.get_current_device()
    if device.index is None or device.index == before:
        yield
        return
    driver.set_current_device(device.index)
    try:
        yield
    finally:
        driver.set_current_device(before)


Repetition = Callable[[Mapping[str, Any]], None]


class Launch(NamedTuple):
    """A launch that was made."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    compiled: Any
    """What Triton compiled. None if it was interpreted."""

    def again(self, varying: Collection[str]) -> Repetition:
        """The launch with other values for the parameters in ``varying``, of the same types. What was None stays None.

        Triton looks for a compiled kernel by all arguments, which takes 15 to 40 us. A compiled one launches in 2 us.
        """
        kernel, grid, arguments, compiled = self
        names, values = kernel.arg_names, [arguments[name] for name in kernel.arg_names]
        places = [(at, name) for at, name in enumerate(names) if name in varying and values[at] is not None]
        for at, _ in places:
            values[at] = None  # the memory is the caller's
        options = {name: value for name, value in arguments.items() if name not in names}
        run = functools.partial(kernel[grid], **options) if compiled is None else compiled[grid]

        def repeat(given: Mapping[str, Any]) -> None:
            passed = values.copy()
            for at, name in places:
                passed[at] = given[name]
            run(*passed)

        return repeat


def launch(kernel: Any, grid: tuple[int, int, int], device: torch.device, **arguments: Any) -> Launch:
    """Launches on ``device``, where the tensors are, and on its current stream. Every launch goes through here or
    :func:`launch_again`.

    Triton itself launches on the current device, wherever the tensors are.
    """
    if device.index is None or device.index == triton.runtime.driver.active.get_current_device():
        # The usual case; entering a context costs more than this comparison.
        return Launch(kernel, grid, arguments, kernel[grid](**arguments))
    with _current(device):
        return Launch(kernel, grid, arguments, kernel[grid](**arguments))


def launch_again(launches: Iterable[Repetition], device: torch.device, given: Mapping[str, Any]) -> None:
    """Repeats launches on ``device``, with those values that vary."""
    if device.index is None or device.index == triton.runtime.driver.active.get_current_device():
        for repeat in launches:
            repeat(given)
        return
    with _current(device):
        for repeat in launches:
            repeat(given)


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "triton" or "torch". ``"auto"``: CUDA and HIP tensors run Triton, all others PyTorch.

    Raises ValueError for a backend that cannot run on ``device``.
    """
    check_choice("backend", backend, ("auto", "triton", "torch"))
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    if not HAS_TRITON:
        raise ValueError("backend: expected the triton package for 'triton', got an installation without it")
    if device.type != "cuda" and not INTERPRETED:
        try:
            served = triton.runtime.driver.active.get_active_torch_device().type
        except RuntimeError:  # no driver at all
            served = "no device"
        if served != device.type:
            raise ValueError(
                f"backend: expected tensors on a device that Triton drives (here {served}; TRITON_INTERPRET=1 runs the "
                f"kernels on the CPU), got backend='triton' with tensors on {device}"
            )
    return "triton"
