"""Measures storage tiers: bandwidth and latency of reading a packet back. Nothing is assumed."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .utility import MAX_BYTES, Tier

SIZE = 64 << 20  # bytes of a large object, read for the bandwidth
SMALL = 4096  # and of a small one, read for the latency
TIMES = 5


def measure_tier(name: str, where: str, *, size: int = SIZE, device: str = "cpu") -> Tier:
    """Times reads of objects that were just written, without the page cache where there is one.

    Args:
        name: of the tier.
        where: ``"ram"``; ``redis://host:port/0`` (also Valkey; needs the package ``redis``); or a directory.
        size: bytes of the large object, a multiple of 4096 and at least twice that.
        device: where rows are needed. RAM is read by it: by this process, or by a GPU from pinned memory.

    Returns:
        A tier of the free capacity (RAM: what is available now; Redis: ``maxmemory``, or the largest number if none is
        set). Latency is the median of reading 4 KB. Bandwidth is that of the rest of ``size`` bytes.

    Raises:
        ValueError: a place that cannot be used, and why.
    """
    if size < 2 * SMALL or size % SMALL:
        raise ValueError(f"size: expected a multiple of {SMALL}, at least {2 * SMALL}, got {size}")
    try:
        if where == "ram":
            return _ram(name, size, device)
        if where.startswith(("redis://", "rediss://", "unix://")):
            return _redis(name, where, size)
        if "://" in where:
            raise ValueError("expected 'ram', a directory or redis://, got another kind of address")
        return _directory(name, Path(where), size)
    except (OSError, ImportError, ValueError) as error:
        shown = re.sub(r"(://[^/@]*:).*@", r"\1***@", where)  # without a password
        raise ValueError(f"tier {name!r} at {shown}: {error}") from None


def _seconds(read: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        read()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _tier(name: str, capacity: int, size: int, read: Callable[[int], object]) -> Tier:
    """``read(n)`` reads an object of ``n`` bytes."""
    latency = _seconds(lambda: read(SMALL))
    seconds = max(_seconds(lambda: read(size)) - latency, 1e-9)
    return Tier(name, min(capacity, MAX_BYTES), (size - SMALL) / seconds, latency)


def _ram(name: str, size: int, device: str) -> Tier:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device != "cpu":
        return _tier(name, free, size, _to_device(size, device))
    source, target = memoryview(os.urandom(SMALL) * (size // SMALL)), memoryview(bytearray(size))

    def read(count: int) -> None:
        target[:count] = source[:count]

    return _tier(name, free, size, read)


def _to_device(size: int, device: str) -> Callable[[int], None]:
    """Copies from pinned memory, waited for."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def read(count: int) -> None:
        target[:count].copy_(source[:count], non_blocking=True)
        torch.cuda.synchronize(device)

    return read


def _directory(name: str, folder: Path, size: int) -> Tier:
    with tempfile.TemporaryDirectory(prefix=".measure-", dir=folder) as work:
        paths = {count: Path(work) / str(count) for count in (SMALL, size)}
        for count, path in paths.items():
            with path.open("wb") as file:
                file.write(os.urandom(count))
                file.flush()
                os.fsync(file.fileno())

        def read(count: int) -> None:
            with paths[count].open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):  # out of the page cache, for the next time too
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                held = 0
                while part := file.read(1 << 20):
                    held += len(part)

        return _tier(name, shutil.disk_usage(folder).free, size, read)


def _redis(name: str, where: str, size: int) -> Tier:
    import redis

    client = redis.Redis.from_url(where, socket_timeout=60, socket_connect_timeout=5)
    keys = {count: f"kara-measure-{os.getpid()}-{count}" for count in (SMALL, size)}
    try:
        for count, key in keys.items():
            client.set(key, os.urandom(count), ex=600)
        limit = int(client.config_get("maxmemory").get("maxmemory", 0))
        return _tier(name, limit or MAX_BYTES, size, lambda count: client.get(keys[count]))
    except redis.RedisError as error:
        raise ValueError(str(error)) from None
    finally:
        with suppress(redis.RedisError):  # the keys expire
            client.delete(*keys.values())
        client.close()
