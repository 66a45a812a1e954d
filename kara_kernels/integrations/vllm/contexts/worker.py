"""The workers' half: one thread that encodes contexts into shared memory and decodes packets out of it.

On a GPU the thread has a stream of its own. A job begins when everything that the engine had launched before it is
done, and the engine waits for no job, except before a step that overwrites the blocks of a store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kara_kernels.contexts.codec import decode, encode
from kara_kernels.contexts.packet import Packet, PacketError, read_packet
from kara_kernels.contexts.ranking import Judges, ranked
from kara_kernels.paged import PackedCache, PagedCache
from kara_kernels.values import MAX_WINDOW

from .jobs import Ended, Load, Store
from .settings import may_drop, needs_queries

logger = logging.getLogger("vllm.kara")  # a child of vLLM's logger: its handlers and levels apply


class ContextWorker:
    """Encodes and decodes for one worker.

    Args:
        cache: the KV cache's layers. Blocks of a packed one pass through a plain copy.
        region: uint8 ``[grains, bytes]``, this worker's part of the shared memory.
        model: names what makes rows differ; see :class:`~kara_kernels.contexts.packet.Header`.
    """

    def __init__(self, cache: PagedCache | PackedCache, region: Tensor, model: str) -> None:
        self._cache, self._model = cache, model
        self._region = region
        first = cache.k[0] if isinstance(cache, PagedCache) else cache.pools[0]
        self._blocks, self._device = first.shape[0], first.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kara-contexts")
        self._compute_on_one_core()
        self._running: dict[int, tuple[Store | Load, Future[float]]] = {}
        self._judges: Judges | None = None
        self._queries: dict[int, Tensor | None] = {}  # of stores that have not begun

    def warm_up(self, methods: Sequence[str]) -> None:
        """Encodes and decodes a few blocks that nobody uses yet. So no request waits for kernels to be compiled."""
        used = range(1, min(self._blocks, 5))
        cache, table = self._unpacked(used)
        _, page, heads, _ = cache.shape
        in_order = self._table(range(len(used) * page)).expand(len(cache.k), heads, -1).contiguous()
        for method in methods:
            rows, form = in_order if may_drop(method) else None, method.partition("/")[2]
            packet = encode(
                cache.k, cache.v, table, len(used) * page, model=self._model, context="warm", rows=rows, form=form,
                to_cpu=False,
            )  # fmt: skip
            decode(packet, cache.k, cache.v, table)
        self._pack(used, cache)

    def judge_by(self, judges: Judges, methods: Sequence[str], longest: int) -> None:
        """The engine records queries. Warms up what ranks contexts of up to ``longest`` tokens. Contexts are scored in
        windows of a power of two, and a GPU compiles each length. A CPU compiles nothing, so one length will do."""
        self._judges = judges
        cache, table = self._unpacked([1])
        page, scorers = cache.shape[1], {method.partition("/")[0] for method in filter(may_drop, methods)}
        window, last = 1 << page.bit_length() - 1, page if self._stream is None else min(longest, MAX_WINDOW)
        while window <= last:
            for scorer in scorers:
                ranked(cache, table.repeat(-(-window // page)), scorer, judges.blank, judges)
            window *= 2

    def submit(self, job: Store | Load) -> None:
        """Begins a job behind those that were submitted before it."""
        ready = None
        if isinstance(job, Store) and self._judges is not None and needs_queries(f"{job.scorer}/"):
            self._queries[job.number] = self._judges.of_context(job.request_id, job.tokens, job.computed)
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        body = self._store if isinstance(job, Store) else self._load
        self._running[job.number] = job, self._thread.submit(self._timed, ready, body, job)

    def flush(self, numbers: Sequence[int]) -> None:
        """Waits until these jobs have ended. Those that were never submitted here are left out."""
        wait([self._running[number][1] for number in numbers if number in self._running])

    def wait_for_load(self, seconds: float) -> None:
        """Waits until a load has ended, if any runs."""
        loads = [future for job, future in self._running.values() if isinstance(job, Load)]
        wait(loads, seconds, FIRST_COMPLETED)

    def ended(self) -> list[tuple[Store | Load, Ended]]:
        """Jobs that ended since the last call."""
        found = []
        for number, (job, future) in list(self._running.items()):
            if future.done():
                del self._running[number]
                found.append((job, _how(job, future)))
        return found

    def shutdown(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        # The shared memory can be unmapped only when nothing refers to it.
        self._region = torch.empty(0, 0, dtype=torch.uint8)

    def _compute_on_one_core(self) -> None:
        """On a CPU, the engine's threads have all cores. A call of this thread that were divided among several would
        wait until each of them has been given one."""
        set_threads = torch._C.set_num_threads  # in torch's own name vLLM leaves a function that does nothing
        self._thread.submit(torch.get_num_threads).result()  # a thread's first such call takes the process's number
        self._thread.submit(set_threads, 1).result()
        set_threads(torch.get_num_threads())  # else threads that begin later would have one, too

    # --------------------------------------------------------------------------------------------- in the thread

    def _timed(self, ready: Any, body: Callable[[Any], None], job: Any) -> float:
        begun = time.perf_counter()
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if ready is not None:
                ready.wait(self._stream)
            try:
                body(job)
            finally:
                if self._stream is not None:
                    self._stream.synchronize()  # also if it failed: no copy into grains goes on that others may take
        return time.perf_counter() - begun

    def _table(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int32, device=self._device)

    def _unpacked(self, blocks: Sequence[int]) -> tuple[PagedCache, Tensor]:
        """A cache whose rows lie at strides, and the table of these blocks in it: the KV cache itself, or a copy."""
        if isinstance(self._cache, PagedCache):
            return self._cache, self._table(blocks)
        return self._cache.load(self._table(blocks)), self._table(range(len(blocks)))

    def _pack(self, blocks: Sequence[int], cache: PagedCache) -> None:
        """Writes a copy of blocks back."""
        if isinstance(self._cache, PackedCache):
            self._cache.store(self._table(blocks), cache)

    def _store(self, job: Store) -> None:
        cache, table = self._unpacked(job.blocks)
        rows, queries = None, self._queries.pop(job.number, None)
        if job.scorer:
            rows = ranked(cache, table, job.scorer, queries, self._judges)
        packet = encode(
            cache.k, cache.v, table, job.tokens, model=self._model, context=job.context, rows=rows, form=job.form,
            scorer=job.scorer, sections=job.sections, to_cpu=False,
        )  # fmt: skip
        self._write(packet, job.grains)

    def _load(self, job: Load) -> None:
        """Puts rows where they stood, if there are all of them, because requests may share the first blocks of a
        context."""
        packet = read_packet(self._read(job.grains, job.nbytes))
        to = "front" if packet.step.rows < packet.header.layout.tokens else "places"
        cache, table = self._unpacked(job.blocks)
        decode(packet, cache.k, cache.v, table, model=self._model, context=job.context, to=to)
        self._pack(job.blocks, cache)

    def _write(self, packet: Packet, grains: Sequence[int]) -> None:
        size = self._region.shape[1]
        if packet.nbytes > size * len(grains):
            raise ValueError(f"packet: expected at most {size * len(grains)} bytes, got {packet.nbytes}")
        header = torch.frombuffer(bytearray(packet.header.to_bytes()), dtype=torch.uint8)
        for part, at in self._parts(grains, packet.nbytes):
            of_header = header[at : at + len(part)]
            part[: len(of_header)] = of_header
            first = at + len(of_header) - len(header)
            part = part[len(of_header) :]
            part.copy_(packet.payload[first : first + len(part)], non_blocking=True)

    def _read(self, grains: Sequence[int], nbytes: int) -> Tensor:
        """A packet's bytes where the cache is."""
        if self._stream is None:
            rows = self._region.numpy()[list(grains)]  # one call: each may wait for the engine
            return torch.from_numpy(rows).view(-1)[:nbytes]
        data = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        for part, at in self._parts(grains, nbytes):
            data[at : at + len(part)].copy_(part, non_blocking=True)
        return data

    def _parts(self, grains: Sequence[int], nbytes: int) -> Iterator[tuple[Tensor, int]]:
        """The grains that ``nbytes`` fill, neighbours in memory as one, each with the bytes before it."""
        grains = list(grains)
        size = self._region.shape[1]
        apart = not self._region.is_contiguous()  # other workers' parts lie between
        first = 0
        for i in range(1, len(grains) + 1):
            if i == len(grains) or apart or grains[i] != grains[i - 1] + 1:
                at, end = first * size, min(i * size, nbytes)
                if at < end:
                    yield self._region[grains[first] : grains[i - 1] + 1].view(-1)[: end - at], at
                first = i


def _how(job: Store | Load, future: Future[float]) -> Ended:
    error = future.exception()
    if error is None:
        return Ended(1, True, future.result())
    kind = "damaged" if isinstance(error, PacketError) else "failed"
    logger.error("Kara's %s of a context %s: %s", type(job).__name__.lower(), kind, error)
    return Ended(1, False, 0.0, kind)
