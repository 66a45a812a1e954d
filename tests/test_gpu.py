"""Tests that need a GPU: the kernels run there as designed. Skipped without one. Run with TRITON_INTERPRET=0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from kara_kernels import CompressedWindow, LookAhead, PackedQueries, PagedCache, compress_window, ops
from kara_kernels.engine import Held, Ledger, Plan, Policy, QueryRing, Span, execute, warm_up
from kara_kernels.ops import rank_rows
from kara_kernels.options import RECOMMENDED
from kara_kernels.payload import PayloadLayout
from kara_kernels.reference import pack_queries
from kara_kernels.reference import rank_rows as reference_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(INTERPRETED, reason="compiled kernels: run with TRITON_INTERPRET=0"),
]

LAYERS, SEQUENCES, HEADS, GROUP, WINDOW, PAGE = 4, 3, 2, 4, 256, 16


class Engine:
    """Pools, tables and queries of a small engine on the GPU. Small integers make products exact."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> None:
        blocks = 32 * SEQUENCES

        def pools() -> list[torch.Tensor]:
            return [torch.randint(-2, 3, (blocks, PAGE, HEADS, dim), device="cuda").to(dtype) for _ in range(LAYERS)]

        self.cache = PagedCache(pools(), pools())
        self.query = torch.randint(-2, 3, (LAYERS, SEQUENCES, WINDOW, HEADS * GROUP, dim), device="cuda").to(dtype)
        self.tables = torch.randperm(blocks, device="cuda").int().view(SEQUENCES, -1)
        self.lengths = torch.tensor([WINDOW + 150, WINDOW, WINDOW - 1], dtype=torch.int32, device="cuda")
        self.starts = torch.tensor([100, 0, 0], dtype=torch.int32, device="cuda")

    def compress(self, **options: Any) -> CompressedWindow:
        return compress_window(
            self.query, self.cache.k, self.cache.v, self.tables, self.lengths,
            window=WINDOW, keep=100, window_starts=self.starts, **options,
        )  # fmt: skip

    def contents(self) -> list[torch.Tensor]:
        assert self.cache.v is not None
        return [tensor.clone() for tensor in (*self.cache.k, *self.cache.v)]

    def restore(self, contents: list[torch.Tensor]) -> None:
        assert self.cache.v is not None
        for tensor, before in zip((*self.cache.k, *self.cache.v), contents, strict=True):
            tensor.copy_(before)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pool", ["head", "layer", "model"])
def test_gpu_and_reference_agree(dtype: torch.dtype, pool: str) -> None:
    engine = Engine(dtype)
    before = engine.contents()
    gpu = engine.compress(pool=pool)
    moved = engine.contents()
    engine.restore(before)
    twin = engine.compress(pool=pool, scores=gpu.scores.contiguous(), backend="torch")
    assert torch.equal(gpu.keep_indices, twin.keep_indices)
    assert torch.equal(gpu.seq_lens, twin.seq_lens)
    assert all(torch.equal(a, b) for a, b in zip(moved, engine.contents(), strict=True))
    engine.restore(before)
    assert torch.allclose(gpu.scores, engine.compress(pool=pool, backend="torch").scores, atol=1e-6)


def test_the_same_bits_every_time() -> None:
    engine = Engine()
    before = engine.contents()
    first = engine.compress(redundancy=1.0)
    for _ in range(20):
        engine.restore(before)
        assert all(torch.equal(a, b) for a, b in zip(first, engine.compress(redundancy=1.0), strict=True))


def test_overlapping_kernels_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With programmatic dependent launch: launched one by one, repeated without a pause, and from a graph."""
    engine = Engine()
    before = engine.contents()
    expected = [engine.compress(redundancy=1.0) for _ in range(3)]
    moved = engine.contents()
    monkeypatch.setenv("KARA_KERNELS_PDL", "1")
    engine.cache.events.clear()
    engine.compress(redundancy=1.0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [engine.compress(redundancy=1.0) for _ in range(3)]
    for _ in range(20):
        engine.restore(before)
        repeated = [engine.compress(redundancy=1.0) for _ in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(moved, engine.contents(), strict=True))
        engine.restore(before)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(moved, engine.contents(), strict=True))
        for results in (repeated, captured):
            for found, same in zip(results, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_no_synchronisation() -> None:
    engine = Engine()
    engine.compress()  # compiles
    with no_synchronisation():
        engine.compress()


@pytest.mark.parametrize("pool", ["head", "model"])
def test_a_cuda_graph_replays_it(pool: str) -> None:
    engine = Engine()
    before = engine.contents()
    expected = engine.compress(pool=pool)  # also compiles and uploads the address tables
    moved = engine.contents()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = engine.compress(pool=pool)
    engine.restore(before)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moved, engine.contents(), strict=True))


def test_nothing_compiles_after_a_warm_up_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call has lengths of zero, so it skips every sequence and compiles every kernel."""
    from triton.compiler.compiler import CompiledKernel

    engine = Engine()
    lengths, starts = engine.lengths.clone(), engine.starts.clone()
    engine.lengths.zero_()
    engine.starts.zero_()
    engine.compress()
    torch.cuda.synchronize()
    monkeypatch.setattr(CompiledKernel, "__init__", lambda *arguments: pytest.fail("compiled after the warm-up"))
    engine.lengths.copy_(lengths)
    engine.starts.copy_(starts)
    engine.compress()
    engine.query = engine.query[:, :, :200].contiguous()
    engine.compress()


def test_torch_compile_makes_one_graph_of_it() -> None:
    engine = Engine()
    cache = [torch.stack(list(half)) for half in (engine.cache.k, engine.cache.v or ())]
    twin = [half.clone() for half in cache]

    def step(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> CompressedWindow:
        return compress_window(
            query * 1, k, v, engine.tables, engine.lengths, window=WINDOW, keep=100, window_starts=engine.starts
        )

    expected = step(engine.query, *cache)
    result = torch.compile(step, fullgraph=True)(engine.query, *twin)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cache, twin, strict=True))


def test_the_operator_is_what_it_says() -> None:
    operator = torch.ops.kara_kernels.compress_window.default
    engine = Engine()
    k, v = (torch.stack(list(half)) for half in (engine.cache.k, engine.cache.v or ()))
    given: dict[str, Any] = {"window": WINDOW, "keep": 100, "window_starts": engine.starts, "backend": "auto"}
    options: dict[str, Any] = {"interleaved": False, **RECOMMENDED}
    names = [argument.name for argument in operator._schema.arguments if argument.kwarg_only]
    torch.library.opcheck(
        operator, (engine.query, k, v, engine.tables, engine.lengths),
        {name: (given | options).get(name) for name in names},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- the engine's shim


class Served:
    """Sequences of an engine on the GPU that are due, a ring for their queries, and their plans."""

    def __init__(self, policy: Policy, heads: int = 2, group: int = 4, dim: int = 64) -> None:
        self.policy, draw = policy, torch.Generator("cuda").manual_seed(0)
        decoded = [policy.window + policy.tail + i for i in range(5)]
        prompts = [7 + 16 * i for i in range(5)]
        lengths = [prompt + n for prompt, n in zip(prompts, decoded, strict=True)]
        counts = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()

        def pools() -> list[torch.Tensor]:
            shape = (sum(counts), PAGE, heads, dim)
            return [torch.randn(shape, generator=draw, device="cuda").bfloat16() for _ in range(LAYERS)]

        self.cache = PagedCache(pools(), pools())
        self.ring = QueryRing(
            policy, layers=LAYERS, query_heads=heads * group, kv_heads=heads, head_dim=dim,
            max_sequences=policy.max_sequences, max_tokens=sum(decoded), dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        self.steps = [torch.randn(sum(decoded), heads * group, dim, generator=draw, device="cuda").bfloat16()
                      for _ in range(LAYERS)]  # fmt: skip
        self.spans = [Span(str(i), prompts[i], prompts[i], n) for i, n in enumerate(decoded)]
        ledger = Ledger(policy, PAGE)
        for i, prompt in enumerate(prompts):
            ledger.start(str(i), prompt, prompt)
        held = [Held(str(i), n, [order.pop() for _ in range(count)], 0)
                for i, (n, count) in enumerate(zip(lengths, counts, strict=True))]  # fmt: skip
        self.plans: list[Plan] = ledger.plan(held)
        assert len(self.plans) == 5
        angle = torch.arange(dim // 2, device="cuda").float()
        self.ahead = LookAhead(angle.cos(), angle.sin())

    def record(self) -> None:
        self.ring.prepare(self.spans)
        for layer, step in enumerate(self.steps):
            self.ring.record(layer, step)

    @property
    def pools(self) -> list[torch.Tensor]:
        assert self.cache.v is not None
        return [*self.cache.k, *self.cache.v]


@pytest.mark.parametrize("form", ["int4", "fp8", "auto"])
def test_an_engine_records_and_compresses_without_waiting_or_compiling(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.compiler.compiler import CompiledKernel

    served = Served(Policy(query_dtype=form, max_sequences=8))
    before = [pool.clone() for pool in served.pools]
    seen: list[torch.Tensor] = []

    def executed(**options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        for pool, old in zip(served.pools, before, strict=True):
            pool.copy_(old)
        kept = execute(served.plans, served.cache, served.ring, served.policy, **options)
        return kept, [pool.clone() for pool in served.pools]

    def watch(scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    for reduce in (None, watch):
        warm_up(served.cache, served.ring, served.policy, look_ahead=served.ahead, reduce_scores=reduce)
    seen.clear()
    monkeypatch.setattr(CompiledKernel, "__init__", lambda *arguments: pytest.fail("compiled after the warm-up"))
    with no_synchronisation():
        served.record()
        fused = executed(look_ahead=served.ahead)
        result = executed(look_ahead=served.ahead, reduce_scores=watch)
    twin = executed(scores=seen[0], backend="torch")
    executed(look_ahead=served.ahead, reduce_scores=watch, backend="torch")
    for other in (fused, twin):
        for some, same in zip(result, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(some, same, strict=True))
    torch.testing.assert_close(*seen, rtol=0.02, atol=1e-3)  # the kernel rounds keys that it has turned
    if form == "int4":
        queries, rows = served.ring.select(served.plans)
        assert isinstance(queries, PackedQueries)
        for layer, step in enumerate(served.steps):
            pieces = step.split([span.num_tokens for span in served.spans])
            judges = torch.cat([pieces[int(plan.request_id)][-rows.shape[1] :] for plan in served.plans])
            for part, exact in zip(queries, pack_queries(judges), strict=True):
                assert torch.equal(part[layer, rows.flatten()], exact)


def test_the_current_stream_is_used() -> None:
    """It sees what was queued before it on its stream, and what is queued after it sees its result."""
    engine = Engine()
    before, query = engine.contents(), engine.query.clone()
    expected = engine.compress()
    moved = engine.contents()
    engine.restore(before)
    engine.query.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # the default stream would be ahead
        engine.query.copy_(query)
        again = engine.compress()
        contents = engine.contents()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moved, contents, strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_pools_beyond_4_gib(dim: int) -> None:
    """The last blocks of a pool whose offsets do not fit 32 bits, beside the same rows in a small one."""
    blocks = (2**31 + 2**24) // (PAGE * HEADS * dim)
    draw = torch.Generator("cuda").manual_seed(0)
    far = [torch.empty(blocks, PAGE, HEADS, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    near = [torch.randn(24, PAGE, HEADS, dim, generator=draw, device="cuda").bfloat16() for _ in range(2)]
    table = torch.randperm(24, generator=draw, device="cuda").int()[None]
    for pool, rows in zip(far, near, strict=True):
        pool[-24:] = rows
    query = torch.randn(1, WINDOW, HEADS * GROUP, dim, generator=draw, device="cuda").bfloat16()
    lengths = torch.tensor([WINDOW + 100], dtype=torch.int32, device="cuda")
    starts = torch.tensor([30], dtype=torch.int32, device="cuda")
    results = [
        compress_window(query, k, v, table + first, lengths, window=WINDOW, keep=100, window_starts=starts)
        for (k, v), first in ((far, blocks - 24), (near, 0))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(pool[-24:], rows) for pool, rows in zip(far, near, strict=True))


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_payloads_of_pools_beyond_4_gib(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as of a small pool, which are the reference's; the second call neither compiles nor waits."""
    from triton.compiler.compiler import CompiledKernel

    dim, draw = 128, torch.Generator("cuda").manual_seed(0)
    blocks = (2**31 + 2**24) // (PAGE * HEADS * dim)
    far = torch.empty(blocks, PAGE, HEADS, dim, dtype=torch.bfloat16, device="cuda")
    near = torch.randn(24, PAGE, HEADS, dim, generator=draw, device="cuda").bfloat16()
    far[-24:] = near
    table = torch.randperm(24, generator=draw, device="cuda").int()
    rows = torch.rand(HEADS, 300, generator=draw, device="cuda").argsort(-1).int()
    layout = PayloadLayout(
        layers=1, heads=HEADS, dim=dim, v_dim=0, dtype=torch.bfloat16, tokens=300, rows=300, form=form
    )
    write, read = (ops.gather_rows, ops.scatter_rows) if form == "exact" else (ops.quantize_rows, ops.dequantize_rows)
    own = near.cpu()
    expected = write(own, None, table.cpu(), rows.cpu(), layout, out=torch.zeros(layout.nbytes, dtype=torch.uint8))
    read(expected, layout, own.zero_(), None, table.cpu())
    payloads = torch.zeros(2, layout.nbytes, dtype=torch.uint8, device="cuda")
    tables = table, table + (blocks - 24)
    write(near, None, tables[0], rows, layout, out=payloads[0])
    read(payloads[0], layout, near.zero_(), None, tables[0])
    torch.cuda.synchronize()
    monkeypatch.setattr(CompiledKernel, "__init__", lambda *arguments: pytest.fail("compiled after the first call"))
    with no_synchronisation():
        write(far, None, tables[1], rows, layout, out=payloads[1])
        far[-24:].zero_()
        read(payloads[1], layout, far, None, tables[1])
    assert all(torch.equal(payload.cpu(), expected) for payload in payloads)
    assert torch.equal(near.cpu(), own)
    assert torch.equal(far[-24:].cpu(), own)


# --------------------------------------------------------------------------------------------- transformers


def test_a_transformers_model_decodes_as_with_the_pytorch_path() -> None:
    transformers = pytest.importorskip("transformers")
    from kara_kernels.integrations.transformers import KaraCache

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.1, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().cuda()
    model.set_attn_implementation("kara")
    ids = torch.randint(1, 97, (3, 40), device="cuda")
    texts, kept = [], []
    for backend in ("triton", "torch"):
        cache = KaraCache(model, window=64, keep=32, tail=16, backend=backend)
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=220,
                                    do_sample=False))  # fmt: skip
        kept.append([event.keep_indices.cpu() for event in cache.events])
        assert len(cache.events) == 3 * 3
    assert torch.equal(*texts)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_ranking_is_captured_and_never_synchronises() -> None:
    scores = torch.randn(3, 5000, device="cuda")
    expected = rank_rows(scores)  # compiles
    assert torch.equal(expected.cpu(), reference_rank(scores.cpu()))
    with no_synchronisation():
        rank_rows(scores)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rank_rows(scores)
    graph.replay()
    assert torch.equal(captured, expected)
