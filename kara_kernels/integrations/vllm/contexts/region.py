"""vLLM's shared memory of offloaded blocks, cut into grains: a row for each, with a part for each worker."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.kv_offload.cpu.gpu_worker import pin_mmap_region
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from .settings import GIB, ContextSettings


def shape(settings: ContextSettings, workers: int) -> tuple[int, int, int]:
    """Grains, bytes of one of each worker, and bytes of a row."""
    grain, page = settings.grain_kib * 1024, SharedOffloadRegion.BLOCK_SIZE_ALIGNMENT
    row = -(-grain * workers // page) * page
    return max(1, int(settings.ram_gib * GIB) // row), grain, row


def open_region(config: Any, settings: ContextSettings, rank: int | None) -> Any:
    """The region, mapped by one worker, or by the scheduler (None), which comes last. Then its name in the file system
    goes, so that its memory is free when the last process has ended, however that happens."""
    count, grain, row = shape(settings, config.parallel_config.world_size)
    region = SharedOffloadRegion(
        engine_id=config.kv_transfer_config.engine_id, num_chunks=count, rank=rank, kv_bytes_per_chunk=row,
        cpu_page_size=grain,
    )  # fmt: skip
    region._creator = False  # else its clean-up would complain that the name has gone
    if rank is None:
        os.unlink(region.mmap_path)
    elif current_platform.is_cuda_alike():
        pin_mmap_region(region)  # else a GPU copies ten times more slowly
    return region


def part_of(region: Any, settings: ContextSettings) -> Tensor:
    """uint8 ``[grains, bytes]``: what one worker may touch."""
    return region.create_next_worker_view(settings.grain_kib * 1024).view(torch.uint8)
