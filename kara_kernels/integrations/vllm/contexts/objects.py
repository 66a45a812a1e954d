"""An S3-compatible bucket, as the remote tier uses it: vLLM's own object tier, one object for each value.

vLLM's tier moves rows of one size, by NIXL. Here they are a few rows of this store's own, each a length and a value,
because a transfer that hangs cannot be ended, and may write for as long as it runs. The tier deletes nothing, and
objects have no time to live: a rule of the bucket drops them by age.
"""

from __future__ import annotations

import functools
import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import TransferJob

from .disk import open_tier
from .store import TIMEOUT, StoreError

ROWS = 8  # transfers at a time, those that hang among them
LENGTH = 8  # bytes before a value


class ObjectStore:
    """See :class:`~.store.ValueStore`. It connects when it is first used.

    Args:
        url: ``s3+http://host[:port]/bucket``, or ``s3+https``. Credentials and region are those of AWS's environment.
        most: bytes of a value.
        slowest: bytes per second. A transfer that is slower has failed.
    """

    def __init__(self, url: str, most: int, slowest: float) -> None:
        place = urlsplit(url)
        scheme = place.scheme.removeprefix("s3+")
        endpoint = {"endpoint_override": f"{scheme}://{place.netloc}", "scheme": scheme}
        self._options = {
            "type": "obj", "prefix": "kara", "io_threads": ROWS,
            "store_config": {"bucket": place.path.strip("/"), **endpoint},
        }  # fmt: skip
        self._rows = np.zeros((ROWS, LENGTH + most), np.uint8)
        self._longest = TIMEOUT + most / slowest
        self._lock, self._context = threading.Lock(), ReqContext(req_id="kara")
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for row in range(ROWS):
            self._free.put(row)
        self._jobs: dict[int, int] = {}  # the row of each that runs
        self._done: dict[int, bool] = {}
        self._late: set[int] = set()  # jobs for which nobody waits
        self._next, self._closed = 0, False

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        there = zip(names, self._there(names), strict=True)
        return [self._move(name, None) if is_there else None for name, is_there in there]

    def write(self, name: str, value: bytes | memoryview, seconds: int) -> None:
        self._move(name, value)

    def refresh(self, names: Sequence[str], seconds: int) -> bool:
        return all(self._there(names))

    def delete(self, names: Sequence[str]) -> None: ...

    def drop(self, name: str, value: bytes) -> None:
        if self.get([name]) == [value]:
            self.write(name, b"", 0)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if "_tier" in self.__dict__:
                self._tier.shutdown()

    @functools.cached_property
    def _tier(self) -> Any:
        """Raises RuntimeError while there is no such bucket. Used under the lock."""
        os.environ.setdefault("NIXL_TELEMETRY_ENABLE", "1")  # without, vLLM's tier raises when a transfer has ended
        return open_tier(self._options, self._rows.data)

    def _there(self, names: Sequence[str]) -> list[bool]:
        with _told():
            with self._lock:
                self._check_open()
                manager = self._tier._lookup_manager
            return list(manager.batch_lookup([_key(name) for name in names], self._context))

    def _move(self, name: str, value: bytes | memoryview | None) -> bytes | None:
        """Writes a value. None: reads one instead, and returns it, or None for one that was dropped."""
        try:
            row = self._free.get_nowait()
        except queue.Empty:
            raise StoreError("slow", f"{ROWS} transfers run") from None
        data = self._rows[row]
        if value is not None:
            data[:LENGTH] = np.frombuffer(len(value).to_bytes(LENGTH, "little"), np.uint8)
            data[LENGTH : LENGTH + len(value)] = np.frombuffer(value, np.uint8)
        try:
            job = self._begin(name, row, value is None)
        except StoreError:
            self._free.put(row)
            raise
        until = time.monotonic() + self._longest
        while (succeeded := self._outcome(job, time.monotonic() > until)) is None:
            time.sleep(1e-3)
        length = int.from_bytes(data[:LENGTH], "little")
        found = bytes(data[LENGTH : LENGTH + length]) if length else None
        self._free.put(row)
        if not succeeded:
            raise StoreError("gone", "a transfer failed")
        return found

    def _begin(self, name: str, row: int, reads: bool) -> int:
        with self._lock, _told():
            self._check_open()
            self._next += 1
            job = TransferJob(self._next, [_key(name)], np.array([row], np.int32), reads, self._context)
            (self._tier.submit_load if reads else self._tier.submit_store)(job)
            self._jobs[self._next] = row
            return self._next

    def _outcome(self, job: int, late: bool) -> bool | None:
        """Whether a job has succeeded. None: it runs. One that is ``late`` keeps its row until it ends."""
        with self._lock, _told():
            self._check_open()
            for result in self._tier.get_finished_jobs():
                row = self._jobs.pop(result.job_id)
                if result.job_id in self._late:
                    self._late.remove(result.job_id)
                    self._free.put(row)
                else:
                    self._done[result.job_id] = result.success
            if job not in self._done and late:
                self._late.add(job)
                raise StoreError("slow", f"a transfer took more than {self._longest:.1f} seconds")
            return self._done.pop(job, None)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("gone", "closed")


@contextmanager
def _told() -> Iterator[None]:
    """NIXL's errors, which are no RuntimeErrors, as StoreError."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreError("gone", str(error)) from None


def _key(name: str) -> Any:
    return make_offload_key(hashlib.sha256(name.encode()).digest(), 0)
