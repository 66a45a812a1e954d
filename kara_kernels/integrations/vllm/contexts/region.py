"""vLLM's shared memory of offloaded blocks, cut into grains: a row for each, with a part for each worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from .settings import GIB, ContextSettings


def shape(settings: ContextSettings, workers: int) -> tuple[int, int, int]:
    """Grains, bytes of one of each worker, and bytes of a row."""
    grain, page = settings.grain_kib * 1024, SharedOffloadRegion.BLOCK_SIZE_ALIGNMENT
    row = -(-grain * workers // page) * page
    return max(1, int(settings.ram_gib * GIB) // row), grain, row


def open_region(config: Any, settings: ContextSettings, rank: int, barrier: Callable[[], None]) -> Any:
    """The region, mapped by one worker. Its name in the file system is gone when all have mapped it."""
    count, grain, row = shape(settings, config.parallel_config.world_size)
    return SharedOffloadRegion(
        engine_id=config.kv_transfer_config.engine_id, num_chunks=count, rank=rank, kv_bytes_per_chunk=row,
        cpu_page_size=grain, barrier=barrier,
    )  # fmt: skip


def part_of(region: Any, settings: ContextSettings) -> Tensor:
    """uint8 ``[grains, bytes]``: what one worker may touch."""
    return region.create_next_worker_view(settings.grain_kib * 1024).view(torch.uint8)
