"""What every kernel needs: Triton where it is installed, layer pointers, and the decision whether a window fits."""

import functools
from typing import Any

import torch

from ..checks import check_choice

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: kernels can be read and imported, the PyTorch path runs

    class _Absent:
        """Stands for ``triton`` and ``triton.language`` in decorators and annotations."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton = tl = _Absent()

    HAS_TRITON = False
else:
    HAS_TRITON = True


@triton.jit
def layer_pointer(ptr, table_ptr, stride_layer, layer, ALIGN: tl.constexpr):
    """Base of a layer: from the address table where there is one, else ``layer`` strides behind the first.

    ``ALIGN`` is what the launcher knows of all addresses in bytes; a loaded integer has no alignment of its own, and
    without it every access would be as narrow as one element.
    """
    if table_ptr is None:
        return ptr + layer * stride_layer
    else:
        return tl.multiple_of(tl.load(table_ptr + layer).to(ptr.dtype), ALIGN)


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


# With TRITON_INTERPRET=1 at import time the decorator made Python functions of the kernels.
INTERPRETED = HAS_TRITON and not isinstance(layer_pointer, triton.runtime.JITFunction)

# Shared memory that one program may use, in bytes: CUDA programming guide, table of compute capabilities (less the 1
# KB that CUDA keeps), and AMD's LDS sizes. Unknown targets get the smallest.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376,
                 "gfx942": 65536, "gfx950": 163840}  # fmt: skip


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may use on the target behind ``device``; as on sm_80 in the interpreter."""
    if INTERPRETED:
        return SHARED_MEMORY[80]
    return SHARED_MEMORY.get(triton.runtime.driver.active.get_current_target().arch, 65536)


@functools.cache
def is_amd(device: torch.device) -> bool:
    """Whether the target behind ``device`` is an AMD GPU."""
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "hip"


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
