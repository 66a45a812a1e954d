"""The worker's thread without vLLM: from blocks through grains in any order, and back."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from on_gpu import ON_GPU
from packets import Context

from kara_kernels import PagedCache, PayloadLayout
from kara_kernels.contexts.packet import Header
from kara_kernels.contexts.ranking import Judges, ranked
from kara_kernels.integrations.vllm.contexts.jobs import Ended, Load, Store
from kara_kernels.integrations.vllm.contexts.worker import ContextWorker
from kara_kernels.ops import _triton, rank, score
from kara_kernels.ops import pool as pooling


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def until_ended(worker: ContextWorker) -> Ended:
    until = time.monotonic() + 30
    while not (ended := worker.ended()):
        assert time.monotonic() < until
        time.sleep(0.001)
    return ended[0][1]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if ON_GPU else [])])
def test_a_context_comes_back_from_grains(device: str) -> None:
    context = Context.random(200, dim=64, v_dim=64, dtype=torch.float32)
    cache = PagedCache([x.to(device) for x in context.k], [x.to(device) for x in context.v or ()])
    region = torch.zeros(1600, 3 * 256, dtype=torch.uint8)
    region = (region.pin_memory() if ON_GPU else region)[:, :256]  # this worker's part of what three share
    worker = ContextWorker(cache, region, "a model")
    layout = PayloadLayout(**PayloadLayout.shape_of(cache), tokens=96, rows=96, form="exact", places=False)
    step = Header("a model", "a context", layout).steps[-1]
    table, grains = context.table.tolist(), range(1599, 0, -1)
    blocks, others = table[:6], table[6:12]
    worker.submit(Store(0, "first", "a context", 96, blocks, grains, "exact", "", step.sections))
    assert until_ended(worker).ok
    worker.submit(Load(1, "second", "a context", 96, others, grains, step.nbytes, "exact", 96))
    assert until_ended(worker).ok
    for pool in (*cache.k, *(cache.v or ())):
        assert torch.equal(pool[blocks], pool[others])
    worker.shutdown()


@pytest.mark.parametrize("of_one", [True, False])
@pytest.mark.parametrize("nbytes", [1, 256, 257, 1000, 5 * 256])
def test_a_gpu_reads_neighbouring_grains_at_once(of_one: bool, nbytes: int) -> None:
    """A CPU in its place takes the same copies, in order. Memory that several workers share is never contiguous."""
    grains, wanted = [7, 2, 3, 4, 0], torch.randint(0, 256, (5 * 256,)).to(torch.uint8)
    room = torch.zeros(9, 256 if of_one else 3 * 256, dtype=torch.uint8)
    context = Context.random(20)
    worker = ContextWorker(PagedCache(context.k, context.v), room[:, :256], "a model")
    for number, grain in enumerate(grains):
        room[grain, :256] = wanted[256 * number : 256 * (number + 1)]
    parts = list(worker._parts(grains, nbytes))
    assert torch.equal(torch.cat([part for part, _ in parts]), wanted[:nbytes])
    assert [at for _, at in parts] == [0, 256, 1024][: len(parts)] if of_one else len(parts) == -(-nbytes // 256)
    assert torch.equal(worker._read(grains, nbytes), wanted[:nbytes])
    worker._stream = object()  # type: ignore[assignment]
    assert torch.equal(worker._read(grains, nbytes), wanted[:nbytes])
    worker._stream = None
    worker.shutdown()


def test_a_job_that_fails_waits_for_the_copies_that_it_began() -> None:
    """Else they would go on into grains that belong to others by then."""
    waited = []

    class Stream:
        def synchronize(self) -> None:
            waited.append(True)

    context = Context.random(20)
    worker = ContextWorker(PagedCache(context.k, context.v), torch.zeros(1, 64, dtype=torch.uint8), "a model")
    worker._stream = Stream()  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        worker._timed(None, lambda job: 1 / job, 0)
    assert waited == [True]
    worker.shutdown()


@pytest.mark.skipif(not INTERPRETED, reason="needs no GPU, and describes one as the interpreter does")
@pytest.mark.parametrize("page", [16, 48])
def test_no_context_waits_for_kernels_that_rank(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of every length launch kernels with constants, dtypes and absent arguments that the warm-up knew."""
    seen: set[Any] = set()

    def launch(kernel: Any, *_: Any, **arguments: Any) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        constants = {name for name, x in parameters.items() if x.annotation is _triton.tl.constexpr}
        constants |= {*arguments} - {*parameters}  # warps and fusion
        compiled = {name: x if name in constants else getattr(x, "dtype", type(x)) for name, x in arguments.items()}
        seen.add((kernel, *compiled.items()))

    for module in (score, pooling, rank):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(score, "resolve_backend", lambda *_: "triton")
    monkeypatch.setattr(rank, "resolve_backend", lambda *_: "triton")
    context = Context.random(page, dim=16, v_dim=16, layers=1, page=page)
    cache, table = PagedCache(context.k, context.v), context.table
    worker = ContextWorker(cache, torch.zeros(4, 256, dtype=torch.uint8), "a model")
    judges = Judges(lambda *_: None, torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16), None, 0.25)
    worker._stream = object()  # type: ignore[assignment]
    worker.judge_by(judges, ["none/int8", "kara_sampled/int8"], 12_000)
    worker.shutdown()
    known = set(seen)
    assert len({kernel for kernel, *_ in known}) == 4
    for blocks in {*range(1, 9), *range(9, 12_000 // page, 7), 12_000 // page}:
        queries = torch.zeros(1, min(128, blocks * page), 4, 16, dtype=torch.bfloat16)
        ranked(cache, table.repeat(blocks), "kara_sampled", queries, judges)
        assert not seen - known, blocks * page
    ranked(cache, table.repeat(3), "kara_mean", queries[:, :page], judges)
    assert seen > known  # that one asks for a window as long as the context


def test_the_thread_computes_on_one_core_and_the_others_as_before(two_threads: None) -> None:
    context = Context.random(20)
    worker = ContextWorker(PagedCache(context.k, context.v), torch.zeros(1, 64, dtype=torch.uint8), "a model")
    assert worker._thread.submit(torch.get_num_threads).result() == 1
    found = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2, 2]
    worker.shutdown()
