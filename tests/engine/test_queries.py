"""The query ring: which queries it keeps, where, and what recording costs host and device."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from recorded import as_recorded, held
from shim import DIM, GROUP, HEADS, LAYERS, asks, aten, batch_of, make_ring, no_waiting, query_of, small
from torch.utils._python_dispatch import TorchDispatchMode

from kara_kernels.engine import Policy, QueryRing, Span, fit_queries, ring_bytes
from kara_kernels.values import CONTEXT_QUERIES
from kara_kernels.windows import queries as queries_module

FORMS = ["auto", "fp8", "int4"]


def run_step(ring: QueryRing, spans: Sequence[Span], padding: int = 0) -> bool:
    anything = ring.prepare(spans)
    for layer in range(LAYERS):
        ring.record(layer, batch_of(spans, layer, padding))
    return anything


def assert_selected(ring: QueryRing, name: str, positions: Sequence[int]) -> None:
    """The ring returns exactly the queries at these positions, oldest first."""
    _, [rows] = ring.select([asks(name, positions[-1] // ring.policy.query_stride, len(positions))])
    for layer in range(LAYERS):
        want = torch.stack([query_of(name, position, layer) for position in positions])
        assert torch.equal(held(ring, layer, rows), as_recorded(want, ring.policy, HEADS))


class Graph(TorchDispatchMode):
    """A minimal captured CUDA graph: records every operation with its tensors and can run them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            result = func(*args, **kwargs)
            if result.data_ptr() != before.data_ptr():  # its outputs live at fixed addresses as well
                before.copy_(result)


def test_the_ring_reports_what_it_takes() -> None:
    policy = small()
    ring = make_ring(policy, max_sequences=3)
    assert ring.nbytes == LAYERS * (3 * 12 + 1) * HEADS * GROUP * DIM * 4
    assert ring.queries.untyped_storage().nbytes() == ring.nbytes
    assert make_ring(small(query_heads="mean")).nbytes == ring.nbytes // GROUP
    assert make_ring(policy, dtype=torch.bfloat16).nbytes == ring.nbytes // 2
    strided = make_ring(small(query_stride=4)).nbytes
    assert strided == LAYERS * (3 * 3 + 1) * HEADS * GROUP * DIM * 4
    larger = make_ring(small(query_stride=4), rows=5)
    assert larger.nbytes == larger.queries.nbytes == LAYERS * (3 * 5 + 1) * HEADS * GROUP * DIM * 4
    for form, size in (("fp8", DIM), ("int4", DIM // 2 + 2)):
        smaller = make_ring(small(query_dtype=form))
        assert smaller.nbytes == smaller.queries.nbytes == LAYERS * 37 * HEADS * GROUP * size
    # A token of the cache takes 2 * HEADS * DIM elements per layer.
    assert ring.kv_tokens == pytest.approx(12 * GROUP / 2, rel=0.1)
    with pytest.raises(ValueError, match=r"rows: expected 12\.\.2147483647, got 11"):
        make_ring(policy, rows=11)


def test_the_memory_of_the_ring_is_bounded() -> None:
    needed = make_ring(small()).nbytes
    make_ring(small(max_query_gib=needed / 2**30))
    with pytest.raises(
        ValueError,
        match=r"max_query_gib: expected a query .* for 3 sequences .*: raise query_stride or",
    ):
        make_ring(small(max_query_gib=(needed - 1) / 2**30))
    with pytest.raises(
        ValueError, match=r"at most 1 GiB, got 1\.14 .* \(12 queries of 4 heads of 4 in 2 layers each\)"
    ):
        make_ring(small(max_query_gib=1), max_sequences=800_000, device="meta")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_a_ring_keeps_the_newest_of_every_nth_query(stride: int, form: str) -> None:
    policy = small(query_stride=stride, query_dtype=form)
    ring = make_ring(policy)
    first = 7
    recorded: list[int] = []
    for position in range(first, 60):
        anything = run_step(ring, [Span("a", first, position, 1)], padding=2)
        assert anything == (position % stride == 0)
        recorded += [position] * anything
        if recorded:
            assert_selected(ring, "a", recorded[-policy.query_rows :])
            assert_selected(ring, "a", recorded[-1:])


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("first", [5, 11])
def test_a_chunk_longer_than_the_ring_leaves_its_newest_queries(stride: int, first: int) -> None:
    policy = small(query_stride=stride)
    ring = make_ring(policy)
    chunk = [Span("b", 2, 2, 3), Span("a", 6, first, 30)]
    with Graph() as written:
        assert run_step(ring, chunk, padding=4)
    # A GPU does not define which of two writes to a row comes last.
    for func, args, _, _ in written.calls:
        if func is aten.index_copy_.default:
            rows, times = args[2].unique(return_counts=True)
            assert set(times[rows < len(args[0]) - 1].tolist()) == {1}
    recorded = [position for position in range(max(6, first), first + 30) if position % stride == 0]
    assert len(recorded) > policy.query_rows
    assert_selected(ring, "a", recorded[-policy.query_rows :])


@pytest.mark.parametrize("drafts", [1, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_rejected_drafts_take_the_rows_of_no_query_that_scores(stride: int, drafts: int) -> None:
    policy, draw = small(query_stride=stride), random.Random(drafts)
    ring = make_ring(policy, rows=policy.query_rows + policy.spare_rows(drafts))
    first, recorded = 7, list[int]()
    while first < 150:
        accepted = draw.choice([0, 0, drafts, draw.randint(0, drafts)])
        ring.prepare([Span("a", 7, first, 1 + drafts)])
        computed = [Span("a", 7, first, 1 + accepted), Span("other", 7, first + 1 + accepted, drafts - accepted)]
        for layer in range(LAYERS):
            ring.record(layer, batch_of(computed, layer, 0))
        recorded += [position for position in range(first, first + 1 + accepted) if position % stride == 0]
        first += 1 + accepted
        if recorded:
            assert_selected(ring, "a", recorded[-policy.query_rows :])


def test_prompts_take_no_room() -> None:
    ring = make_ring(small(), max_sequences=1)
    assert not run_step(ring, [Span("a", 9, 0, 4), Span("b", 20, 16, 4)])
    assert ring.sequences == 0
    assert run_step(ring, [Span("b", 20, 12, 8), Span("a", 9, 4, 7)], padding=3)
    assert ring.sequences == 1
    assert_selected(ring, "a", [9, 10])


def test_an_odd_head_dimension_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="query_dtype: expected 'fp8' or 'auto' for an odd head dimension, got D = 5"):
        make_ring(small(query_dtype="int4"), head_dim=5)


def test_what_is_recorded_falls_back_by_loss() -> None:
    """To the first form whose ring fits. Memory falls with every step."""
    shape = {"layers": 2, "query_heads": 12, "kv_heads": 3, "head_dim": 64, "max_sequences": 5, "dtype": torch.bfloat16}

    def needed(policy: Policy) -> int:
        heads = 12 if policy.query_heads == "all" else 3
        return ring_bytes(policy, 2, heads, 64, 5, torch.bfloat16)

    forms = [("all", 1), ("all", 2), ("mean", 1), ("mean", 2), ("mean", 4), ("mean", 8)]
    sizes = [needed(Policy(query_heads=heads, query_stride=stride)) for heads, stride in forms]
    assert sizes == sorted(sizes, reverse=True)
    for (heads, stride), size in zip(forms, sizes, strict=True):
        for spare in (0, 1):
            found = fit_queries(Policy(max_query_gib=(size + spare) / 2**30), **shape)
            assert (found.query_heads, found.query_stride, found.query_dtype) == (heads, stride, "int4")
    fits = Policy(max_query_gib=sizes[0] / 2**30)
    assert fit_queries(fits, **shape, drafts=1).query_stride == 2  # whose rows for a rejected draft do not fit
    nothing = Policy(max_query_gib=(sizes[-1] - 1) / 2**30)
    assert fit_queries(nothing, **shape) == nothing


@pytest.mark.parametrize("form", FORMS)
def test_means_of_groups(form: str) -> None:
    policy = small(query_heads="mean", query_dtype=form)
    ring = make_ring(policy)
    run_step(ring, [Span("a", 3, 3, 20)], padding=1)
    assert_selected(ring, "a", range(11, 23))
    # With as many KV heads as query heads there is nothing to average.
    alone = make_ring(policy, kv_heads=HEADS * GROUP)
    run_step(alone, [Span("a", 0, 0, 3)])
    assert alone.nbytes == GROUP * ring.nbytes


def test_a_long_step_leaves_no_targets_to_a_short_one() -> None:
    ring = make_ring(small())
    run_step(ring, [Span("a", 0, 0, 6), Span("b", 0, 0, 6)])
    for spans in ([Span("a", 0, 6, 1)], []):  # the rest is padding, as in a batch of fixed size
        run_step(ring, spans, padding=30)
        assert_selected(ring, "a", range(7))
        assert_selected(ring, "b", range(6))


def test_padding_behind_a_step_of_prompts_only_is_not_recorded() -> None:
    ring = make_ring(small())
    run_step(ring, [Span("a", 0, 0, 6)])
    run_step(ring, [Span("b", 8, 0, 3)], padding=5)
    run_step(ring, [Span("b", 8, 3, 4)], padding=5)
    assert_selected(ring, "a", range(6))


def test_rings_go_from_one_sequence_to_the_next() -> None:
    ring = make_ring(small(), max_sequences=2)
    run_step(ring, [Span("a", 0, 0, 5), Span("b", 0, 0, 5)])
    with pytest.raises(RuntimeError, match="query ring: expected at most 2 sequences at once, got c as one more"):
        ring.prepare([Span("c", 0, 0, 1)])
    ring.release("a")
    ring.release("a")
    ring.release("nobody")
    assert ring.sequences == 1
    run_step(ring, [Span("c", 0, 0, 7), Span("b", 0, 5, 1)])
    assert ring.sequences == 2
    assert_selected(ring, "c", range(7))
    assert_selected(ring, "b", range(6))
    with pytest.raises(RuntimeError, match="got a as one more"):
        ring.prepare([Span("a", 0, 5, 1)])


def test_a_step_of_too_many_tokens_is_refused() -> None:
    ring = make_ring(small(), max_tokens=8)
    run_step(ring, [Span("a", 0, 0, 4), Span("b", 9, 0, 4)])
    with pytest.raises(ValueError, match="spans: expected at most 8 tokens in one step, got 9"):
        ring.prepare([Span("a", 0, 4, 1), Span("b", 9, 4, 8)])


def test_queries_of_several_sequences_are_selected_at_once() -> None:
    ring = make_ring(small())
    run_step(ring, [Span("a", 0, 0, 20), Span("b", 4, 0, 16)])
    run_step(ring, [Span("c", 1, 0, 14), Span("a", 0, 20, 3)])
    for count in (1, 5, 12):
        plans = [asks("c", 13, count), asks("a", 22, count), asks("b", 15, count)]
        queries, rows = ring.select(plans)
        assert queries is ring.queries, "no query is copied"
        assert (rows.shape, rows.dtype) == ((3, count), torch.int32)
        for plan, of_plan in zip(plans, rows, strict=True):
            assert torch.equal(of_plan, ring.select([plan])[1][0])
            assert_selected(ring, plan.request_id, range(plan.last_query - count + 1, plan.last_query + 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 3])
def test_a_larger_ring_takes_over_what_a_smaller_one_holds(stride: int, form: str) -> None:
    policy = small(query_stride=stride, query_dtype=form)
    ring, larger = make_ring(policy), make_ring(policy, rows=31, max_sequences=4)
    run_step(ring, [Span("a", 0, 0, 33), Span("b", 4, 0, 7)])
    last = 32 // stride
    larger.copy(ring, "a", last, policy.query_rows)
    larger.copy(ring, "c", 5, 0)  # of whom nothing is recorded
    assert larger.sequences == 1
    run_step(larger, [Span("a", 0, 33, 19), Span("c", 0, 0, 2)])
    newest = [position for position in range(52) if position % stride == 0]
    assert_selected(larger, "a", newest[-(policy.query_rows + 19 // stride) :])
    assert_selected(ring, "b", [p for p in range(4, 7) if p % stride == 0])


def test_recomputation_writes_the_same_rows_again() -> None:
    ring = make_ring(small(query_stride=2))
    for first, count in ((4, 20), (4, 8), (12, 12)):
        run_step(ring, [Span("a", 4, first, count)])
    assert_selected(ring, "a", range(12, 24, 2))


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_recording_survives_cuda_graph_replay(heads: str) -> None:
    """`record` runs once, at capture. Afterwards only `prepare` and the replay run."""
    ring = make_ring(small(query_heads=heads), max_tokens=16)
    batch = [torch.full((16, HEADS * GROUP, DIM), math.nan) for _ in range(LAYERS)]
    ring.prepare([])
    with Graph() as graph:
        for layer in range(LAYERS):
            ring.record(layer, batch[layer])
    [address] = {args[2].data_ptr() for func, args, _, _ in graph.calls if func is aten.index_copy_.default}

    def replay(spans: list[Span]) -> None:
        ring.prepare(spans)
        used = sum(span.num_tokens for span in spans)
        for layer in range(LAYERS):
            batch[layer].copy_(batch_of(spans, layer, 16 - used))
        graph.replay()

    replay([Span("a", 3, 0, 9), Span("b", 0, 0, 4)])
    replay([Span("b", 0, 4, 1), Span("a", 3, 9, 1)])
    replay([])
    replay([Span("a", 3, 10, 1)])
    assert_selected(ring, "a", range(3, 11))
    assert_selected(ring, "b", range(5))
    with Graph() as later:
        ring.record(0, batch[0])
    assert {args[2].data_ptr() for func, args, _, _ in later.calls if func is aten.index_copy_.default} == {address}


class Stream(TorchDispatchMode):
    """A device that lags behind. Asynchronous copies happen when the stream reaches them."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.copy_.default and args[2:] == (True,):
            self.late.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def test_async_scheduling_may_prepare_the_next_step_before_this_one_runs() -> None:
    ring = make_ring(small())
    steps = [[Span("a", 0, 0, 4), Span("b", 0, 0, 4)], [Span("b", 0, 4, 1), Span("a", 0, 4, 1)], [Span("b", 0, 5, 1)]]
    with Stream() as stream:
        for spans in steps:
            ring.prepare(spans)
    assert len(stream.late) == len(steps)
    for spans, (target, source) in zip(steps, stream.late, strict=True):
        target.copy_(source)
        for layer in range(LAYERS):
            ring.record(layer, batch_of(spans, layer, padding=10))
    assert_selected(ring, "a", range(5))
    assert_selected(ring, "b", range(6))


def test_causal_scoring_needs_every_query_even_if_memory_is_scarce() -> None:
    policy = Policy(attention="causal", max_query_gib=1e-9)
    assert fit_queries(policy, 2, 12, 3, 64, 5, torch.bfloat16) == policy


def test_a_step_without_queries_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = make_ring(small(query_stride=4), device="meta")
    with no_waiting(monkeypatch) as mode:
        uploads = []
        for position in range(4, 10):
            ring.prepare([Span("a", 1, position, 1)])
            uploads.append(mode.uploads)
    # At position 4 a target, at 5 it is taken back.
    assert uploads == [1, 2, 2, 2, 3, 4]


def test_other_devices_pack_each_layer_as_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call per layer, into its own rows; a CPU packs all layers of a step together."""
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(queries_module, "pack_queries", lambda query, *, out, rows: calls.append((out, rows)))
    ring = make_ring(small(query_dtype="int4"), device="meta")
    ring.prepare([Span("a", 0, 0, 3)])
    for layer in range(LAYERS):
        ring.record(layer, torch.empty(5, HEADS * GROUP, DIM, device="meta"))
    size = ring.queries[0][0].numel()  # of a layer's codes
    assert [out.codes.storage_offset() for out, _ in calls] == [layer * size for layer in range(LAYERS)]
    assert [rows.shape for _, rows in calls] == [(5,)] * LAYERS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_records_in_a_graph_and_never_waits() -> None:
    ring = make_ring(small(), max_tokens=16, device="cuda")
    batch = [torch.zeros(16, HEADS * GROUP, DIM, device="cuda") for _ in range(LAYERS)]
    steps = [[Span("a", 3, 0, 9), Span("b", 0, 0, 4)], [Span("b", 0, 4, 1), Span("a", 3, 9, 1)]]
    given = [[batch_of(s, layer, 16 - sum(x.num_tokens for x in s)).cuda() for layer in range(LAYERS)] for s in steps]
    ring.prepare([])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            ring.record(layer, batch[layer])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for spans, queries in zip(steps, given, strict=True):
            ring.prepare(spans)
            for static, new in zip(batch, queries, strict=True):
                static.copy_(new)
            graph.replay()
        queries, rows = ring.select([asks("a", 9, 7)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chosen = queries[0].cpu()[rows[0].cpu()]
    assert chosen[:, 0, 0].tolist() == [query_of("a", p, 0)[0, 0].item() for p in range(3, 10)]


def of_context(ring: QueryRing, name: str, context: int, computed: int = 0) -> None:
    """Checks that the ring has the queries of a context that it should have, and no others."""
    stride = -(-context // min(ring.rows, CONTEXT_QUERIES))
    positions = [p for p in range(stride - 1, context, stride) if p >= computed // stride * stride]
    found = ring.of_context(name, context, computed)
    assert found is not None
    for layer in range(LAYERS):
        want = torch.stack([query_of(name, position, layer) for position in positions])
        assert torch.equal(found[layer], as_recorded(want, ring.policy, HEADS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 30])
@pytest.mark.parametrize("computed", [0, 8, 17])
def test_queries_of_a_context_are_recorded_before_decoded_ones(form: str, chunk: int, computed: int) -> None:
    """In chunks, of which the last goes beyond the context, beside a sequence that decodes."""
    ring = make_ring(small(query_dtype=form))
    other = 3
    for context, prompt in ((40, 44), (24, 25), (5, 44)):
        name, at = f"{context}", min(computed, context // 2)
        begun = at
        while at < prompt:
            count = min(chunk, prompt - at)
            run_step(ring, [Span("other", 3, other, 1), Span(name, prompt, at, count, context)], padding=2)
            at, other = at + count, other + 1
        of_context(ring, name, context, begun)
        assert ring.of_context(name, context + 1, begun) is None
        assert_selected(ring, "other", list(range(max(3, other - 12), other)))
        run_step(ring, [Span(name, prompt, prompt, 1)])
        assert ring.of_context(name, context, begun) is None  # decoded queries take their rows
        assert_selected(ring, name, [prompt])
        ring.release(name)


def test_a_released_ring_has_no_queries_of_a_context() -> None:
    ring = make_ring(small(query_heads="mean"))
    run_step(ring, [Span("a", 30, 0, 26, 24)])
    of_context(ring, "a", 24)
    assert ring.of_context("a", 24, 24) is None  # none of them was computed
    assert ring.blank.shape == ring.of_context("a", 24, 0)[:, :1].shape  # type: ignore[index]
    ring.release("a")
    assert ring.of_context("a", 24, 0) is None
