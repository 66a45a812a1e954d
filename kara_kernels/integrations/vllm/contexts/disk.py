"""The disk tier: vLLM's own file-system tier, one file for each grain of a packet.

vLLM's tier writes and reads files in its threads. It has no capacity and deletes nothing: the directory of contexts
knows what lies there, so it says what to delete. A file is written under another name first, never overwritten, and
named by the number of its copy, which no other copy ever has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import OffloadingSpec, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from kara_kernels.contexts.directory import Copy, read_snapshot
from kara_kernels.contexts.folder import DIRECTORY, DISK, PACKETS, Slot, grain_name, own_folder, packet_files
from kara_kernels.contexts.tiers import measure_tier
from kara_kernels.contexts.utility import Tier

from .manager import ContextManager
from .settings import GIB

THREADS = 4  # for reading first, and as many for writing first
SIZE = 16 << 20  # bytes that are read to measure a disk
SECONDS = 10.0  # from one saved directory to the next

logger = init_logger("vllm.kara")


class _Spec(OffloadingSpec):
    """What vLLM's tiers ask of a spec."""

    def get_manager(self) -> Any:
        raise NotImplementedError

    def get_worker(self, kv_caches: Any) -> Any:
        raise NotImplementedError


def open_tier(options: dict[str, Any], view: memoryview) -> Any:
    """A tier of vLLM's, below the memory ``view``, which has a row for each value."""
    config = OffloadingConfig(
        groups=(), worker_kv_bytes_per_block=0, enable_kv_cache_events=False, extra_config={}, engine_id="kara",
        model=OffloadingModelConfig("packets", "uint8"), cache=OffloadingCacheConfig(1, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
    )  # fmt: skip
    return SecondaryTierFactory.create_secondary_tier(options, view, _Spec(config))


class DiskTier:
    """Grains of copies as files; see :class:`~.transfers.LowerTier`.

    Args:
        folder: of this server alone.
        view: the shared memory, a row for each grain.
    """

    name, resting = DISK, False

    def __init__(self, folder: Path, view: memoryview) -> None:
        options = {
            "type": "fs", "root_dir": str(folder / PACKETS), "n_read_threads": THREADS, "n_write_threads": THREADS,
        }  # fmt: skip
        self._tier: Any = open_tier(options, view)
        assert view.shape is not None
        self._view = view
        self._folder, self._row = folder, view.shape[1]
        self._context = ReqContext(req_id="kara")
        self._writing: dict[int, tuple[int, int]] = {}  # job -> copy and grains
        self._deleting = ThreadPoolExecutor(1, thread_name_prefix="kara-disk")

    def has(self, copy: Copy) -> bool:
        return False

    def write(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        self._writing[job] = copy.number, len(grains)
        self._tier.submit_store(self._job(job, copy.number, grains, False))

    def read(self, job: int, copy: Copy, grains: Sequence[int]) -> None:
        self._tier.submit_load(self._job(job, copy.number, grains, True))

    def ended(self) -> Iterable[tuple[int, bool, float]]:
        for result in self._tier.get_finished_jobs():
            if (written := self._writing.pop(result.job_id, None)) is not None:
                self._deleting.submit(_close_to_others, [self.path(written[0], i) for i in range(written[1])])
            yield result.job_id, result.success, result.transfer_time or 0.0

    def erase(self, copy: Copy, grains: Sequence[int]) -> None:
        self._deleting.submit(_delete, [self.path(copy.number, i) for i in grains])

    def spoiled(self, copy: Copy) -> None: ...

    def is_whole(self, copy: int, grains: int) -> bool:
        """Whether files of the right size are there. Packets have checksums for the rest."""
        with suppress(OSError):
            return all(os.stat(self.path(copy, i)).st_size == self._row for i in range(grains))
        return False

    def clear(self, kept: Mapping[int, int]) -> int:
        """Deletes all files but those of some copies, of which the grains are given. Returns how many it deleted."""
        expected = {self.path(copy, i) for copy, count in kept.items() for i in range(count)}
        strays = [path for path in map(str, packet_files(self._folder)) if path not in expected]
        _delete(strays)
        return len(strays)

    def shutdown(self) -> None:
        self._tier.shutdown()
        self._deleting.shutdown(wait=True)
        self._view.release()  # the shared memory can be unmapped only when nothing refers to it

    def path(self, copy: int, grain: int) -> str:
        """The file of a grain."""
        return self._tier.file_mapper.get_file_name(self._key(copy, grain))

    def _job(self, job: int, copy: int, grains: Sequence[int], promotion: bool) -> TransferJob:
        keys = [self._key(copy, i) for i in range(len(grains))]
        return TransferJob(job, keys, np.array(grains, np.int64), promotion, self._context)

    def _key(self, copy: int, grain: int) -> Any:
        return make_offload_key(grain_name(copy, grain), 0)


def _close_to_others(paths: Sequence[str]) -> None:
    for path in paths:
        if os.path.exists(path):
            os.chmod(path, 0o600)


def _delete(paths: Sequence[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def _speed(folder: Path, share: float) -> tuple[float, float]:
    """Bytes per second, of those that one worker uses, and seconds of latency. Loads are measured again later."""
    try:
        tier = measure_tier(DISK, str(folder), size=SIZE)
    except ValueError as error:  # full, perhaps of our own packets
        logger.warning("Kara could not time its disk tier, and takes it for one of 1 GB/s: %s", error)
        return 1e9 * share, 1e-3
    return tier.bandwidth * share, tier.latency


class DiskStore:
    """What one server has on a disk: a tier of packets, and a file that says what they are.

    The file is written now and then, and when the server ends, but never after a :meth:`reset`. What it does not name
    is deleted at the next start.

    Args:
        given: the setting ``disk``: ``path`` and ``gib``.
        model: names what makes rows differ.
        view: the shared memory, a row for each grain.
        grain: bytes of a row that one worker uses, by which packets are counted.
        workers: that use a part of each row.
        name: of the model, for people who look at the folder.
        rows: names the weights and the configuration. What others left here is deleted.
    """

    def __init__(
        self, given: Mapping[str, Any], model: str, view: memoryview, grain: int, workers: int, name: str, rows: str
    ) -> None:
        assert view.shape is not None
        self._slot = Slot(own_folder(Path(given["path"])) / model[:16])
        self.disk = DiskTier(self._slot.path, view)
        capacity = int(given["gib"] * GIB) // view.shape[1] * grain
        self.tier = Tier(DISK, capacity, *_speed(self._slot.path, grain / view.shape[1]))
        self._file = self._slot.path / DIRECTORY
        self._about = {"model": name, "grain": grain, "row": view.shape[1], "workers": workers, "rows": rows}
        self._saved, self._next = -1, 0.0  # the first is saved at once
        self._was_reset = False

    def restore(self, manager: ContextManager) -> None:
        """Takes over what an earlier server left here."""
        try:
            if read_snapshot(self._file).about.get("rows") != self._about["rows"]:
                raise ValueError("they are of other weights, or of another configuration")
            manager.restore(self._file, self.disk.is_whole)
        except FileNotFoundError:
            pass
        except ValueError as error:
            logger.error("Kara's contexts on disk are lost: %s", error)
        copies = manager.keeper.directory.copies()
        strays = self.disk.clear({copy.number: manager.grains.needed(copy.option.nbytes) for copy in copies})
        logger.info("Kara's disk tier has %d contexts; %d stray files are deleted", len(copies), strays)

    def save(self, manager: ContextManager, at_once: bool = False) -> None:
        """Saves what has changed, at most every few seconds."""
        now, changes = time.monotonic(), sum(manager.keeper.counts.values())
        if self._was_reset or changes == self._saved or not (at_once or now >= self._next):
            return
        try:
            manager.keeper.save(self._file, self._about)
        except OSError as error:
            manager.counts["saves_failed",] += 1
            logger.error("Kara's directory of contexts is not saved: %s", error)
        self._saved, self._next = changes, now + SECONDS

    def reset(self, manager: ContextManager) -> None:
        """The model's weights may be others from now on. A later server, which has those of the model's files, must not
        find contexts of theirs. So the file is deleted, and not written any more."""
        self._was_reset = True
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            manager.counts["saves_failed",] += 1
            logger.error("Kara's directory of contexts is not deleted: %s", error)

    def close(self, manager: ContextManager) -> None:
        self.disk.shutdown()
        self.save(manager, at_once=True)
        self._slot.close()
