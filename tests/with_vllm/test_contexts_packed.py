"""Contexts in caches whose rows strides cannot describe, as vLLM's of bfloat16 on processors with AMX.

No machine of ours has AMX. vLLM's writer of such caches runs without it, its attention does not. So rows are moved in
real packed blocks, and answers are judged with packing forced on float32.
"""

from types import SimpleNamespace

import pytest
import torch
from contexts_harness import serving
from harness import MODES, ON_GPU, prompts
from vllm.platforms import current_platform

from kara_kernels import PagedCache
from kara_kernels.contexts.codec import decode, encode
from kara_kernels.contexts.packet import read_packet
from kara_kernels.contexts.ranking import ranked
from kara_kernels.integrations.vllm import layout
from kara_kernels.integrations.vllm.contexts.jobs import Load, Store
from kara_kernels.integrations.vllm.contexts.worker import ContextWorker
from kara_kernels.paged import PackedCache


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_packet_answer_as_a_dense_model_with_them(model, mode, monkeypatch):
    monkeypatch.setattr(layout, "_strides", lambda where: None)
    documents, questions = prompts(256, 224, seed=3), prompts(9, 5, 31, seed=4)
    with serving(model, mode=mode) as some:
        assert isinstance(some.worker._cache, PackedCache)
        for document in documents:
            count = len(document)
            exact = some.ask(document + questions[0], context_tokens=count)
            some.forget()
            for question in questions:
                prompt = document + question
                assert some.ask(prompt, context_tokens=count) == [some.judge(prompt, count)]
            some.forget()
            assert some.ask(document + questions[0], contexts=False) == exact
        assert some.manager.counts["hits", "ram"] == 2
        assert some.manager.counts["hits", "gpu"] == 4
        some.assert_nothing_leaks()


def test_bfloat16_packed_or_not_is_answered_alike(model, monkeypatch):
    """The default of most models. Rounding decides between close tokens, but the same way twice."""
    document, *questions = prompts(256, 9, 31, seed=6)
    said, packets = [], []
    for kind in (PagedCache, PackedCache):
        if kind is PackedCache:
            monkeypatch.setattr(layout, "_strides", lambda where: None)
        with serving(model, dtype="bfloat16") as some:
            assert isinstance(some.worker._cache, kind)
            some.ask(document + questions[0], context_tokens=256)
            some.forget()
            said.append(some.ask(*(document + question for question in questions), context_tokens=256))
            assert some.manager.counts["hits", "ram"] == 1
            assert some.manager.counts["hits", "gpu"] == 1
            copy = some.manager.keeper.get(some.place_of(document + questions[0], 256).key)
            held = some.manager.transfers._held[copy.number]
            packets.append(some.worker._read(held, copy.option.nbytes).numpy().tobytes())
    assert said[0] == said[1]
    assert packets[0] == packets[1]


BLOCKS, PAGE, HEADS, DIM, LAYERS = 11, 32, 2, 64, 3

writes_packed = pytest.mark.skipif(
    ON_GPU or not torch.cpu._is_avx512_supported(), reason="needs vLLM's code for such processors"
)


class Layer:
    """An attention layer whose cache is written as vLLM does it on processors with AMX."""

    def __init__(self):
        self.num_kv_heads, self.head_size = HEADS, DIM
        self.kv_cache = torch.randn(BLOCKS, HEADS, PAGE, 2 * DIM).bfloat16()
        self.impl = SimpleNamespace(do_kv_cache_update=self.write)

    @staticmethod
    def write(_, key, value, cache, slots):
        blocks, heads, page, _ = cache.shape
        halves = cache.view(blocks, heads, 2 * page, -1).chunk(2, dim=2)
        torch.ops._C.cpu_attn_reshape_and_cache(key, value, *halves, slots, "amx", 1.0, 1.0, "auto")


@writes_packed
@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "exact"])
def test_a_context_passes_through_blocks_that_vllm_has_packed(form):
    current_platform.import_kernels()
    torch.manual_seed(0)
    layers = [Layer() for _ in range(LAYERS)]
    cache = layout.paged_view(layers, BLOCKS, PAGE)
    assert isinstance(cache, PackedCache)
    region = torch.zeros(128, 4096, dtype=torch.uint8)
    worker = ContextWorker(cache, region, "model")
    worker.warm_up([f"none/{form}"])

    old, new, tokens = (7, 2, 9, 4), (3, 8, 1, 10), 4 * PAGE
    rows = torch.randn(2, LAYERS, tokens, HEADS, DIM).bfloat16()
    for layer, key, value in zip(layers, *rows, strict=True):
        Layer.write(layer, key, value, layer.kv_cache, slots_of(old))
    before = [layer.kv_cache.clone() for layer in layers]
    # What the same rows become at strides.
    plain = PagedCache(*([x.view(4, PAGE, HEADS, DIM).clone() for x in of_layers] for of_layers in rows))
    table = torch.arange(4, dtype=torch.int32)
    packet = encode(plain.k, plain.v, table, tokens, model="model", context="c", form=form)
    grains, sections = tuple(range(0, 128, 2))[: -(-packet.nbytes // 4096)], packet.header.steps[-1].sections
    run(worker, Store(1, "r", "c", tokens, old, grains, form, "", sections))
    stored = b"".join(region[grain].numpy().tobytes() for grain in grains)[: packet.nbytes]
    assert read_packet(stored).payload.equal(packet.payload)
    assert all(layer.kv_cache.equal(left) for layer, left in zip(layers, before, strict=True))

    run(worker, Load(2, "r", "c", tokens, new, grains, packet.nbytes, form, tokens))
    decode(packet, plain.k, plain.v, table)
    for layer, left, key, value in zip(layers, before, plain.k, plain.v, strict=True):
        Layer.write(layer, key.flatten(0, 1), value.flatten(0, 1), left, slots_of(new))
        assert layer.kv_cache.equal(left)
    worker.shutdown()


@writes_packed
def test_fewer_rows_leave_the_rest_of_their_last_block_alone():
    current_platform.import_kernels()
    torch.manual_seed(1)
    layers = [Layer() for _ in range(LAYERS)]
    cache = layout.paged_view(layers, BLOCKS, PAGE)
    worker = ContextWorker(cache, torch.zeros(128, 4096, dtype=torch.uint8), "model")
    old, new, tokens = (7, 2, 9, 4), (3, 8, 1), 4 * PAGE
    for layer in layers:
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape))
    plain = cache.load(torch.tensor(old))
    table = torch.arange(4, dtype=torch.int32)
    packet = encode(
        plain.k, plain.v, table, tokens, model="model", context="c", form="int4", scorer="keydiff",
        rows=ranked(plain, table, "keydiff", None, None),
    )  # fmt: skip
    step = packet.header.steps[0]
    assert 2 * PAGE < step.rows < 3 * PAGE
    grains = tuple(range(-(-packet.nbytes // 4096)))
    run(worker, Store(1, "r", "c", tokens, old, grains, "int4", "keydiff", packet.sections))
    before = [layer.kv_cache.clone() for layer in layers]
    run(worker, Load(2, "r", "c", tokens, new, grains, step.nbytes, "int4", step.rows))
    decode(packet.cut(step.sections), plain.k, plain.v, table, to="front")
    for layer, left, key, value in zip(layers, before, plain.k, plain.v, strict=True):
        rows = (x.flatten(0, 1)[: step.rows] for x in (key, value))
        Layer.write(layer, *rows, left, slots_of(new)[: step.rows])
        assert layer.kv_cache.equal(left)
    worker.shutdown()


def slots_of(blocks):
    return torch.cat([torch.arange(PAGE) + block * PAGE for block in blocks])


def run(worker, job):
    worker.submit(job)
    worker.flush([job.number])
    ((ended, how),) = worker.ended()
    assert (ended, how.ok) == (job, True)
