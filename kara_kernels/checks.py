"""Checks of tensors. Nothing here depends on caches.

Every check raises before anything is written. The message names the argument, what was expected and what it got.
Contents of tensors (block ids, lengths) are checked on the CPU, where reading them is free. On a GPU that would stall
the stream, so the caller must guarantee them unless ``KARA_KERNELS_DEBUG=1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .values import MAX_WINDOW, check_count

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
SCORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_window(window: int) -> int:
    return check_count("window", window, 1, MAX_WINDOW)


def check_tensor(
    name: str, value: object, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device | None
) -> Tensor:
    """Checks shape (None: any extent), dtype and device (None: any) of a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.dim() != len(shape) or any(want not in (None, n) for want, n in zip(shape, value.shape, strict=True)):
        want_text = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{want_text}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return value


def check_alike(name: str, tensors: Sequence[Tensor]) -> None:
    """Checks for at least one tensor, all of one shape, dtype and device."""
    if not tensors:
        raise ValueError(f"{name}: expected at least one layer, got an empty sequence")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(tensor).__name__}")
        for what in ("shape", "dtype", "device"):
            if (got := getattr(tensor, what)) != (want := getattr(tensors[0], what)):
                raise ValueError(f"{name}[{i}]: expected {what} {want} as in {name}[0], got {got}")


def check_unit_stride(name: str, tensor: Tensor, where: str = " in the last dimension") -> None:
    """Checks for stride 1 in the last dimension. Empty tensors may have any stride, because NumPy's have stride 0."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
        raise ValueError(f"{name}: expected stride 1{where}, got {tensor.stride(-1)}")


def check_block_tables(block_tables: object, device: torch.device) -> Tensor:
    """Checks int32 ``[S, max_blocks]`` with stride 1 along blocks."""
    table = check_tensor("block_tables", block_tables, (None, None), (torch.int32,), device)
    check_unit_stride("block_tables", table, " along blocks")
    return table


def check_lengths(name: str, value: object, sequences: int, device: torch.device) -> Tensor:
    """Checks int32 ``[S]`` with stride 1."""
    lengths = check_tensor(name, value, (sequences,), (torch.int32,), device)
    check_unit_stride(name, lengths, "")
    return lengths


def check_scores(scores: object, most: int = MAX_WINDOW) -> Tensor:
    """Checks float32 ``[..., W]`` with ``1 <= W <= most``."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: expected a tensor, got {type(scores).__name__}")
    if scores.dtype != torch.float32:
        raise TypeError(f"scores: expected dtype torch.float32, got {scores.dtype}")
    if scores.dim() == 0 or not 1 <= scores.shape[-1] <= most:
        raise ValueError(f"scores: expected [..., W] with W in 1..{most}, got shape {list(scores.shape)}")
    return scores


def require_rows(name: str, scores: Tensor) -> Tensor:
    """``scores [..., W]`` as a view ``[rows, W]`` whose last dimension has stride 1."""
    try:
        rows = scores.view(-1, scores.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or (rows.stride(1) != 1 and rows.shape[1] > 1 and rows.numel()):
        raise ValueError(
            f"{name}: expected rows at one stride and the last dimension at stride 1, got shape "
            f"{list(scores.shape)} with strides {scores.stride()}"
        )
    return rows


def check_chunks(window: int, keep: int, chunk_budget: int, max_chunk: int) -> None:
    check_count("keep", keep, 1, window)
    check_count("chunk_budget", chunk_budget, 0, keep - 1)
    check_count("max_chunk", max_chunk, 1, 2**31 - 1)


def slices(total: int, size: int) -> Iterator[slice]:
    """Splits ``0..total`` into slices of ``size``, which bounds the memory of the PyTorch path."""
    return (slice(i, min(i + size, total)) for i in range(0, total, size))


def refuse(bad: Tensor, name: str, expected: str | Callable[..., str], got: Tensor) -> None:
    """Raises ValueError for the first element where ``bad`` is true. ``expected`` may be a function of its indices."""
    if bool(bad.any()):
        place: list[Any] = bad.nonzero()[0].tolist()
        told = expected if isinstance(expected, str) else expected(*place)
        raise ValueError(f"{name}{place}: expected {told}, got {got[tuple(place)].tolist()}")


def contents_are_checked(device: torch.device) -> bool:
    """True on the CPU. Elsewhere, where it costs a stream synchronisation, true only with KARA_KERNELS_DEBUG=1."""
    return device.type == "cpu" or os.environ.get("KARA_KERNELS_DEBUG", "0") == "1"
