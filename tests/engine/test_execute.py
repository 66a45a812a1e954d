"""Executing plans: rows move as planned, in plain and packed pools, and the host never waits."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from shim import DIM, GROUP, HEADS, LAYERS, make_ring, no_waiting, small

from kara_kernels import CompressedWindow, LookAhead, PagedCache, compress_window
from kara_kernels.engine import (
    Held,
    Ledger,
    Losses,
    PackedCache,
    Plan,
    Policy,
    QueryRing,
    Span,
    execute,
    lost_share,
    needed_tokens,
    warm_up,
)
from kara_kernels.reference import pack_queries
from kara_kernels.reference.pack import unpacked

V_DIM = 3


class Worker:
    """Sequences that are due, with random rows in pools and recorded queries, and copies of both for comparison.

    `unseen` decoded tokens of a sequence came from the prefix cache, so their queries are missing. `own` are settings
    of single sequences.
    """

    def __init__(
        self,
        policy: Policy,
        decoded: Sequence[int] = (12, 17),
        unseen: Sequence[int] = (),
        page: int = 4,
        dtype: torch.dtype = torch.float32,
        own: Sequence[dict[str, int]] = (),
    ) -> None:
        self.policy, self.page = policy, page
        torch.manual_seed(len(decoded) + page)
        ledger = Ledger(policy, page)
        lengths = [3 + i + n for i, n in enumerate(decoded)]
        used = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(used) + 3).tolist()
        self.blocks = len(order)
        self.k = [self._rows(DIM).to(dtype) for _ in range(LAYERS)]
        self.v = [self._rows(V_DIM).to(dtype) for _ in range(LAYERS)]
        self.ring = make_ring(policy, len(decoded), sum(lengths) + 5, dtype=dtype)
        self.queries: dict[str, torch.Tensor] = {}
        self.every: dict[str, torch.Tensor] = {}
        spans, held, steps = [], [], []
        for i, length in enumerate(lengths):
            name, prompt, first = str(i), 3 + i, 3 + i + (unseen[i] if unseen else 0)
            ledger.start(name, prompt, first, **(own[i] if own else {}))
            spans.append(Span(name, prompt, first, length - first))
            held.append(Held(name, length, [order.pop() for _ in range(used[i])], 0))
            every = torch.randn(LAYERS, length, HEADS * GROUP, DIM).to(dtype)
            recorded = [p for p in range(first, length) if p % policy.query_stride == 0]
            self.queries[name] = every[:, recorded[-policy.query_rows :]]
            self.every[name] = every
            steps.append(every[:, first:])
        self.ring.prepare(spans)
        for layer in range(LAYERS):
            self.ring.record(layer, torch.cat([step[layer] for step in steps]))
        self.plans = ledger.plan(held)
        assert len(self.plans) == len(decoded)

    def _rows(self, dim: int) -> torch.Tensor:
        return torch.randn(self.blocks, self.page, HEADS, dim)

    @property
    def cache(self) -> PagedCache:
        return PagedCache(self.k, self.v)

    def packed(self) -> PackedCache:
        """The same rows at random offsets, with a few unused elements between them."""
        size = self.page * HEADS * (DIM + V_DIM)
        places = torch.randperm(size + 7)[:size]
        k_at = places[: self.page * HEADS * DIM].view(self.page, HEADS, DIM)
        v_at = places[self.page * HEADS * DIM :].view(self.page, HEADS, V_DIM)
        pools = [torch.full((self.blocks, size + 7), 9.0, dtype=self.k[0].dtype) for _ in range(LAYERS)]
        for pool, k, v in zip(pools, self.k, self.v, strict=True):
            pool[:, k_at], pool[:, v_at] = k, v
        self.at = k_at, v_at
        return PackedCache(pools, k_at, v_at)

    def queries_of(self, plan: Plan) -> torch.Tensor:
        """The queries `[L, N, H*G, D]` of a plan, oldest first. For a causal plan, those of the window's own tokens."""
        if self.policy.attention == "causal":
            return self.every[plan.request_id][:, plan.window_start : plan.window_start + plan.window]
        recorded = self.queries[plan.request_id]
        end = recorded.shape[1] - (plan.logical_len - 1) // self.policy.query_stride + plan.last_query
        return recorded[:, end - plan.num_queries : end]

    def expected(self, **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Keep lists and caches after `compress_window` on each sequence in turn, with queries in order."""
        ks, vs = [k.clone() for k in self.k], [v.clone() for v in self.v]
        keeps = []
        for plan in self.plans:
            done = compress_window(
                self.queries_of(plan)[:, None], ks, vs,
                torch.tensor([plan.blocks], dtype=torch.int32), torch.tensor([plan.physical_len], dtype=torch.int32),
                window=plan.window, keep=plan.keep, backend="torch",
                window_starts=torch.tensor([plan.window_start], dtype=torch.int32),
                **self.policy.selection, **options,
            )  # fmt: skip
            assert done.seq_lens.tolist() == [plan.new_len]
            keeps.append(done.keep_indices[:, 0])
        return keeps, ks, vs


def equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("page", [1, 3, 4])
@pytest.mark.parametrize(("pool", "attention"), [("head", "bidirectional"), ("model", "causal"), ("head", "causal")])
def test_every_plan_of_a_step_is_executed(page: int, pool: str, attention: str) -> None:
    worker = Worker(small(pool=pool, attention=attention, chunk_fraction=0.0), decoded=(12, 17, 15), page=page)
    keeps, ks, vs = worker.expected(scale=0.7, k_scale=1.5)
    kept = execute(worker.plans, worker.cache, worker.ring, worker.policy, scale=0.7, k_scale=1.5)
    assert equal(kept, keeps)
    assert equal(worker.k, ks)
    assert equal(worker.v, vs)


class Spied:
    """Records what `execute` passes to `compress_window`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        module = sys.modules["kara_kernels.windows.execute"]
        inner = module.compress_window  # type: ignore[attr-defined]

        def spy(query: Any, k: Any, v: Any, tables: Any, lengths: Any, **options: Any) -> CompressedWindow:
            self.calls.append((query, tables, lengths, options))
            return inner(query, k, v, tables, lengths, **options)

        monkeypatch.setattr(module, "compress_window", spy)


def test_only_blocks_that_are_rewritten_or_freed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, lengths and starts begin at the first written block, however long the sequence is before it."""
    worker, spied = Worker(small(), decoded=(12, 17), page=2), Spied(monkeypatch)
    assert all(plan.first_written > 0 for plan in worker.plans)
    execute(worker.plans, worker.cache, worker.ring, worker.policy)
    [(_, tables, lengths, options)] = spied.calls
    for s, plan in enumerate(worker.plans):
        touched = len(plan.touched)
        assert tables[s, :touched].tolist() == list(plan.touched)
        assert set(tables[s].tolist()) == set(plan.touched), "what fills a shorter table up is its own"
        assert lengths[s] == plan.physical_len - 2 * plan.first_written
        assert options["window_starts"][s] == plan.window_start - 2 * plan.first_written


@pytest.mark.parametrize("packed", [False, True])
def test_queries_are_read_where_the_ring_has_them(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    worker, spied = Worker(small()), Spied(monkeypatch)
    execute(worker.plans, worker.packed() if packed else worker.cache, worker.ring, worker.policy)
    assert len(spied.calls) == (len(worker.plans) if packed else 1)
    rows = torch.cat([options["query_rows"] for _, _, _, options in spied.calls])
    assert torch.equal(rows, worker.ring.select(worker.plans)[1])
    assert all(query is worker.ring.queries for query, _, _, _ in spied.calls)


@pytest.mark.parametrize("packed", [False, True])
def test_queries_score_further_on(packed: bool) -> None:
    """A half turn of the first two dimensions changes the signs of both, with no rounding."""
    worker = Worker(small(chunk_fraction=0.0), decoded=(12, 17, 15), unseen=(0, 0, 9))
    ahead = LookAhead(torch.tensor([-1.0]), torch.tensor([0.0]))
    for name, queries in worker.queries.items():
        worker.queries[name] = queries * torch.tensor([-1, -1, 1, 1])
    keeps, ks, vs = worker.expected()
    cache = worker.packed() if packed else worker.cache
    assert equal(execute(worker.plans, cache, worker.ring, worker.policy, look_ahead=ahead), keeps)
    assert packed or equal(worker.k + worker.v, ks + vs)


@pytest.mark.parametrize("heads", ["all", "mean"])
@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_queries_score_as_they_were_recorded(form: str, heads: str) -> None:
    worker = Worker(small(chunk_fraction=0.0, query_dtype=form, query_heads=heads), decoded=(12, 17, 15))
    for name, queries in worker.queries.items():
        if heads == "mean":
            queries = queries.unflatten(2, (HEADS, GROUP)).mean(3)
        rounded = unpacked(pack_queries(queries)) if form == "int4" else queries.to(torch.float8_e4m3fn).float()
        worker.queries[name] = rounded
    keeps, ks, vs = worker.expected()
    assert equal(execute(worker.plans, worker.cache, worker.ring, worker.policy), keeps)
    assert equal(worker.k + worker.v, ks + vs)


@pytest.mark.parametrize("packed", [False, True])
def test_given_scores_select_in_the_order_of_the_plans(packed: bool) -> None:
    worker = Worker(small(max_sequences=8, chunk_fraction=0.0), decoded=(12, 17, 13, 30), unseen=(0, 13, 9, 26))
    scores = torch.rand(LAYERS, 4, HEADS, 8)
    order = [2, 0, 3, 1]
    cache = worker.packed() if packed else worker.cache
    kept = execute([worker.plans[i] for i in order], cache, worker.ring, worker.policy, scores=scores)
    for s, keep in enumerate(kept):
        assert torch.equal(keep.long(), scores[:, s].topk(4).indices.sort(-1).values)


def test_plans_with_different_numbers_of_queries_are_mixed() -> None:
    """Results are in the order of the plans, whatever groups they were compressed in."""
    worker = Worker(small(max_sequences=8), decoded=(12, 17, 13, 30), unseen=(0, 13, 9, 26))
    assert len({plan.num_queries for plan in worker.plans}) == 2
    keeps, ks, vs = worker.expected()
    assert equal(execute(worker.plans, worker.cache, worker.ring, worker.policy), keeps)
    assert equal(worker.k + worker.v, ks + vs)
    worker = Worker(small(max_sequences=8), decoded=(12, 17, 13, 30), unseen=(0, 13, 9, 26))
    order = [0, 3, 1, 2]
    assert [worker.plans[i].num_queries for i in order] == [4, 12, 4, 4]
    kept = execute([worker.plans[i] for i in order], worker.cache, worker.ring, worker.policy)
    assert equal(kept, [keeps[i] for i in order])


OWN: list[dict[str, int]] = [{"keep": 3}, {}, {"window": 6}, {"window": 6, "keep": 3}, {"keep": 3}]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_sequences_with_settings_of_their_own_are_mixed(attention: str) -> None:
    policy = small(max_sequences=8, chunk_fraction=0.0, attention=attention)
    for packed in (False, True):
        worker = Worker(policy, decoded=(12, 17, 13, 30, 15), own=OWN)
        assert sorted((plan.window, plan.keep) for plan in worker.plans) == [(6, 3), (6, 4), (8, 3), (8, 3), (8, 4)]
        keeps, ks, vs = worker.expected()
        cache = worker.packed() if packed else worker.cache
        assert equal(execute(worker.plans, cache, worker.ring, policy), keeps)
        assert packed or equal(worker.k + worker.v, ks + vs)


@pytest.mark.parametrize("packed", [False, True])
def test_given_scores_select_as_many_as_each_sequence_keeps(packed: bool) -> None:
    own: list[dict[str, int]] = [{}, {"keep": 3}, {}, {"keep": 1}]
    worker = Worker(small(max_sequences=8, chunk_fraction=0.0), decoded=(12, 17, 13, 30), own=own)
    scores = torch.rand(LAYERS, 4, HEADS, 8)
    cache = worker.packed() if packed else worker.cache
    kept = execute(worker.plans, cache, worker.ring, worker.policy, scores=scores)
    for s, (plan, keep) in enumerate(zip(worker.plans, kept, strict=True)):
        assert torch.equal(keep.long(), scores[:, s].topk(plan.keep).indices.sort(-1).values)


def test_slot_tables_are_block_tables_of_single_rows() -> None:
    worker = Worker(small(), page=1)
    assert all(plan.first_written == plan.window_start for plan in worker.plans)
    before = worker.k[0].clone()
    kept = execute(worker.plans, worker.cache, worker.ring, worker.policy)
    for plan, keep in zip(worker.plans, kept, strict=True):
        for head in range(HEADS):
            chosen = [plan.window_start + j for j in keep[0, head].tolist()]
            sources = chosen + list(range(plan.window_start + 8, plan.physical_len))
            got = worker.k[0][list(plan.blocks[plan.window_start : plan.new_len]), 0, head]
            assert torch.equal(got, before[[plan.blocks[source] for source in sources], 0, head])


def test_tail_rows_move_through_the_block_table() -> None:
    """Adjacent tokens are not adjacent in the pool. Rows of other sequences keep their bits."""
    worker = Worker(small(tail=7), decoded=(20,), page=2)
    [plan] = worker.plans
    before = [pool.clone() for pool in worker.k + worker.v]
    [keep] = execute(worker.plans, worker.cache, worker.ring, worker.policy)
    own = {cell: cell for cell in (oracle.cell_of(plan.blocks, 2, row) for row in range(plan.physical_len))}
    for pool, old, layer in zip(worker.k + worker.v, before, [0, 1, 0, 1], strict=True):
        for head in range(HEADS):
            kept = keep[layer, head].tolist()
            sources, _ = oracle.compact(own, plan.blocks, 2, plan.window_start, plan.physical_len, kept, 8)
            want = old[:, :, head].clone()
            for to, source in sources.items():
                want[to] = old[source][head]
            assert torch.equal(pool[:, :, head], want)


def test_no_row_is_kept_twice_when_all_are_worth_the_same() -> None:
    worker = Worker(small(chunk_fraction=0.9, max_chunk=3))
    for k in worker.k:
        k.zero_()
    for keep in execute(worker.plans, worker.cache, worker.ring, worker.policy):
        assert keep.shape == (LAYERS, HEADS, 4)
        assert bool((keep.diff(dim=-1) > 0).all())
        assert 0 <= int(keep.min()) <= int(keep.max()) < 8


@pytest.mark.parametrize("page", [1, 4])
def test_packed_caches_give_the_same_bits(page: int, backend: str) -> None:
    dtype = torch.bfloat16 if page == 4 else torch.float32
    worker = Worker(small(max_sequences=8), decoded=(12, 17, 14), unseen=(0, 0, 11), page=page, dtype=dtype)
    packed = worker.packed()
    want = execute(worker.plans, worker.cache, worker.ring, worker.policy, backend=backend)
    got = execute(worker.plans, packed, worker.ring, worker.policy, backend=backend)
    assert equal(got, want)
    k_at, v_at = worker.at
    unused = torch.ones(packed.pools[0].shape[1], dtype=torch.bool)
    unused[torch.cat([k_at.flatten(), v_at.flatten()])] = False
    for pool, k, v in zip(packed.pools, worker.k, worker.v, strict=True):
        assert torch.equal(pool[:, k_at], k)
        assert torch.equal(pool[:, v_at], v)
        assert bool((pool[:, unused] == 9).all())


def test_the_ranks_agree_through_the_hook() -> None:
    """`reduce_scores` sees the pooled scores, and its result decides what is kept."""
    worker = Worker(small(pool="layer", chunk_fraction=0.0))
    shapes = []

    def last_four(scores: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(scores.shape))
        return torch.arange(8.0).expand(scores.shape).contiguous()

    kept = execute(worker.plans, worker.cache, worker.ring, worker.policy, reduce_scores=last_four)
    assert shapes == [(LAYERS, 2, 1, 8)]
    assert all(keep.tolist() == [[[4, 5, 6, 7]] * HEADS] * LAYERS for keep in kept)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("packed", [False, True])
def test_warming_up_calls_everything_and_changes_nothing(backend: str, packed: bool, attention: str) -> None:
    policy, pools = (
        small(pool="layer", attention=attention),
        torch.randn(2, 2, 5, 4, 2, 16),
    )
    before, called = pools.clone(), []  # two layers, K and V, 5 blocks of 4 rows
    if packed:
        offsets = torch.randperm(4 * 2 * 16).view(4, 2, 16)
        both = [torch.cat([k.flatten(1), v.flatten(1)], 1) for k, v in pools]
        cache: Any = PackedCache(both, offsets, offsets + 4 * 2 * 16)
    else:
        cache = PagedCache(list(pools[:, 0]), list(pools[:, 1]))
    ring = QueryRing(
        policy, layers=2, query_heads=4, kv_heads=2, head_dim=16, max_sequences=3, max_tokens=8,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    warm_up(cache, ring, policy, reduce_scores=lambda scores: called.append(scores.shape), backend=backend)
    assert called == ([] if attention == "causal" else [(2, 1, 1, 2)]) + [(2, 1, 1, 8)]
    assert torch.equal(pools, before)
    if packed:
        assert torch.equal(torch.stack(both), torch.cat([before[:, 0].flatten(2), before[:, 1].flatten(2)], 2))


@pytest.mark.parametrize("packed", [False, True])
def test_a_dry_run_is_watched_and_moves_nothing(packed: bool) -> None:
    worker = Worker(small(), decoded=(12, 17, 15), own=({}, {"keep": 2}, {}))
    keeps, _, _ = worker.expected()
    cache: Any = worker.packed() if packed else worker.cache
    pools = cache.pools if packed else [*worker.k, *worker.v]
    before = [pool.clone() for pool in pools]
    losses = Losses(0.3, reduce=lambda found: found.div_(2))
    kept = execute(worker.plans, cache, worker.ring, worker.policy, dry_run=True, watch=losses.watch)
    assert equal(pools, before)
    assert equal(kept, keeps)
    found = {loss.request_id: loss for loss in losses.arrived()}
    assert not losses.arrived()
    for plan, keep in zip(worker.plans, keeps, strict=True):
        scores = compress_window(
            worker.queries_of(plan)[:, None], worker.k, worker.v, torch.tensor([plan.blocks], dtype=torch.int32),
            torch.tensor([plan.physical_len], dtype=torch.int32), window=plan.window, keep=plan.keep, dry_run=True,
            window_starts=torch.tensor([plan.window_start], dtype=torch.int32), **worker.policy.selection,
        ).scores  # fmt: skip
        loss = found[plan.request_id]
        assert loss.lost == pytest.approx(float(lost_share(scores, keep[:, None])) / 2)
        assert loss.needed == math.ceil(int(needed_tokens(scores, 0.3)) / 2)


def test_a_step_without_plans_does_nothing() -> None:
    worker = Worker(small())
    before = [k.clone() for k in worker.k]
    assert execute([], worker.cache, worker.ring, worker.policy) == []
    assert execute([], worker.packed(), worker.ring, worker.policy) == []
    assert equal(worker.k, before)


def flat(low: int, *shape: int) -> torch.Tensor:
    return torch.arange(low, low + math.prod(shape)).view(shape)


ROWS = torch.zeros(3, 20)
BAD_PACKED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layer": ({"pools": []}, ValueError, "pools: expected at least one layer, got an empty sequence"),
    "a vector": ({"pools": [ROWS[0]]}, ValueError, r"pools\[0\]: expected shape \[B, E\], got \[20\]"),
    "stride": ({"pools": [ROWS.t()]}, ValueError, r"pools\[0\]: expected stride 1 .*, got 20"),
    "shape": ({"pools": [ROWS, ROWS[1:]]}, ValueError, r"pools\[1\]: expected shape .*\[3, 20.* got .*\[2, 20"),
    "dtype": ({"pools": [ROWS, ROWS.half()]}, ValueError, r"pools\[1\]: expected dtype torch.float32 .*torch.float16"),
    "device": ({"pools": [ROWS, ROWS.to("meta")]}, ValueError, r"pools\[1\]: expected device cpu as .*, got meta"),
    "int32": (
        {"k_offsets": flat(0, 2, 2, 3).int()},
        TypeError,
        "k_offsets: expected dtype torch.int64, got torch.int32",
    ),
    "flat": ({"v_offsets": flat(12, 8)}, ValueError, r"v_offsets: expected \[P, H, D\].*, got \[8\]"),
    "pages": ({"v_offsets": flat(12, 4, 1, 2)}, ValueError, r"v_offsets: expected \[P, H, D\], .* got \[4, 1, 2\]"),
    "empty": ({"k_offsets": flat(0, 2, 2, 0)}, ValueError, r"k_offsets: .* got \[2, 2, 0\]"),
    "outside": ({"v_offsets": flat(13, 2, 2, 2)}, ValueError, r"offsets: expected 0\.\.19, got 0\.\.20"),
    "negative": ({"k_offsets": flat(-1, 2, 2, 3)}, ValueError, r"offsets: expected 0\.\.19, got -1\.\.19"),
    "twice": ({"v_offsets": flat(11, 2, 2, 2)}, ValueError, "offset of its own, got one twice"),
}


@pytest.mark.parametrize("case", BAD_PACKED)
def test_packed_layouts_that_cannot_be_are_refused(case: str) -> None:
    given, error, message = BAD_PACKED[case]
    good = {"pools": [ROWS, ROWS.clone()], "k_offsets": flat(0, 2, 2, 3), "v_offsets": flat(12, 2, 2, 2)}
    PackedCache(**good)
    with pytest.raises(error, match=message):
        PackedCache(**(good | given))


def test_no_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing, recording, selecting and executing never read the device, and uploads do not grow with the batch."""
    uploads = []
    for sequences in (1, 5):
        worker = Worker(small(max_sequences=8), decoded=[12] * sequences, unseen=[9] * sequences)
        pools = [torch.empty(50, 60, device="meta") for _ in range(LAYERS)]
        offsets = torch.arange(4 * HEADS * (DIM + V_DIM))
        k_at, v_at = (x.view(4, HEADS, -1) for x in offsets.split([4 * HEADS * DIM, 4 * HEADS * V_DIM]))
        packed = PackedCache(pools, k_at, v_at)
        with no_waiting(monkeypatch) as mode:
            ring = make_ring(worker.policy, max_sequences=sequences, max_tokens=60, device="meta")
            cache = PagedCache(*(torch.empty(LAYERS, 50, 4, HEADS, d, device="meta") for d in (DIM, V_DIM)))
            assert ring.prepare([Span(plan.request_id, 3, 3, 9) for plan in worker.plans])
            for layer in range(LAYERS):
                ring.record(layer, torch.empty(60, HEADS * GROUP, DIM, device="meta"))
            execute(worker.plans, cache, ring, worker.policy, watch=Losses(0.1).watch)
            uploads.append(mode.uploads)
            kept = execute(worker.plans, packed, ring, worker.policy)
            assert [keep.shape for keep in kept] == [(LAYERS, HEADS, 4)] * sequences
    assert uploads[0] == uploads[1] == 2  # targets, and one for lengths, starts, rows and tables
