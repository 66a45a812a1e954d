"""KaraBatching: transformers' continuous batching against a dense model without a cache, and against itself."""

import functools
import threading
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dense import Ledger, best_for_later, best_of_window, dense_logits, replay  # noqa: E402
from transformers import (  # noqa: E402
    CompileConfig,
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.continuous_batching import initialization  # noqa: E402
from transformers.generation.continuous_batching.cache import PagedAttentionCache  # noqa: E402
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor  # noqa: E402
from transformers.generation.continuous_batching.distributed import DistributedHelper  # noqa: E402
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from kara_kernels.integrations.transformers import KaraBatching  # noqa: E402
from kara_kernels.ops._triton import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LAYERS, HEADS, PAGE = 61, 3, 2, 16
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": HEADS}
# Every decoded token's query scores, and the best of the window are kept, so an oracle needs no library code.
EXACT = {"query_stride": 1, "query_dtype": "auto", "chunk_fraction": 0.0}
PLAIN = {**EXACT, "look_ahead": 0, "reduction": "mean", "value_norm": False}
POLICY = {"window": 32, "keep": 10, "tail": 8, **PLAIN}
WINDOWS = (120 - 1 - 8) // 32  # compressions of a request of 120 tokens, of which the last is never computed on


def make_model(attention="sdpa", seed=7):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, head_dim=8, max_position_embeddings=1024,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
        initializer_range=0.3,  # large, so that attention is peaked and a wrong row changes the text
        **SMALL,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def llama():
    return make_model()


def prompt(length, seed=0):
    return torch.randint(
        1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(100 * seed + length)
    ).tolist()


def settings(tokens=120, generation=None, page_size=PAGE, **options):
    """Arguments of ``generate_batch``. ``max_batch_tokens`` splits longer prompts into chunks."""
    batching = {"page_size": page_size, "num_blocks": 1024 // page_size, "max_batch_tokens": 48, "seed": 5}
    batching |= {"return_logprobs": True}
    generation = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": -1} | (generation or {})
    return {
        "generation_config": GenerationConfig(**generation),
        "continuous_batching_config": ContinuousBatchingConfig(**batching | options),
    }


def serve(model, prompts, policy=None, **options):
    """Outputs in the order of ``prompts`` and, with a policy, the closed KaraBatching."""
    if policy is None:
        return list(model.generate_batch(prompts, **settings(**options)).values())
    with KaraBatching(model, **policy) as kara:
        outputs = list(model.generate_batch(prompts, **settings(**options)).values())
    return outputs, kara


def finish(manager, *request_ids):
    """Waits for these requests and returns their outputs in this order."""
    done = {}
    while not set(request_ids) <= set(done):
        output = manager.get_result(timeout=30)
        assert output is not None, f"waited for {request_ids}, got {list(done)}"
        if output.is_finished():
            done[output.request_id] = output
    return [done[request_id] for request_id in request_ids]


def assert_dense(model, output, events, greedy=True, since=0, until=None):
    """Every generated token of ``since..until`` (or all) and its log probability are the dense model's."""
    assert output.error is None
    assert output.status == RequestStatus.FINISHED
    ids = torch.tensor([output.prompt_ids + output.generated_tokens])[:, :-1]
    real = torch.ones_like(ids).bool()
    visible = replay(model, real, events).visible if events else causal(ids)
    scores = dense_logits(model, ids, real, visible)[0, len(output.prompt_ids) - 1 :].log_softmax(-1)[since:until]
    tokens = torch.tensor(output.generated_tokens)[since:until]
    if greedy:
        assert torch.equal(scores.argmax(-1), tokens)
    expected = scores.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(output.logprobs)[since:until], expected, rtol=1e-4, atol=1e-4)


def causal(ids):
    tokens = ids.shape[1]
    return torch.ones(tokens, tokens).tril().bool().expand(LAYERS, 1, HEADS, tokens, tokens)


def assert_best_kept(model, output, events, policy, recorded_from=0, best_of=best_of_window):
    """Windows follow the prompt and each other without gaps. In every layer and head, the kept tokens have the most
    attention in the dense model, from the recorded queries of the newest ``window + tail`` decoded tokens."""
    ids = torch.tensor([output.prompt_ids + output.generated_tokens])[:, :-1]
    real = torch.ones_like(ids).bool()
    window, tail, stride = (policy[name] for name in ("window", "tail", "query_stride"))
    dense_logits(model, ids, real, replay(model, real, events).visible)
    ledger, frontier = Ledger(LAYERS, HEADS, real), len(output.prompt_ids)
    for event in events:
        assert event.window_start == frontier
        frontier += event.keep
        ledger.read(event.logical_len)
        first = max(len(output.prompt_ids), recorded_from)
        decoded = [p for p in range(first, event.logical_len) if p % stride == 0]
        judges = decoded[-(window + tail) // stride :]
        for layer, attention in enumerate(module.self_attn for module in model.model.layers):
            tokens = ledger.held[layer][0][0][event.window_start :][:window]
            best = best_of(layer, 0, tokens, judges, event.keep, attention.scaling)
            assert torch.equal(event.keep_indices[layer].long(), best), (event.logical_len, layer)
        ledger.drop(0, event.window_start, window, event.keep_indices)


def of(kara, output):
    return [event for event in kara.events if event.request_id == output.request_id]


class Told(list):
    """A list whose ``append`` notifies the test about the manager's thread."""

    def __init__(self, listener):
        super().__init__()
        self.listener = listener

    def append(self, item):
        super().append(item)
        self.listener(item)


@pytest.fixture
def watch(monkeypatch):
    """Checks the blocks before every step. ``faults`` must stay empty."""
    seen = SimpleNamespace(peak=0, shared=0, free=0, total=0, faults=[], resets=[], served=[])
    prepare, update = ContinuousBatchProcessor.prepare_next_batch, ContinuousBatchProcessor.update_batch
    reset, match = RequestState.create_equivalent_initial_request, PagedAttentionCache.search_prefix_match

    def look(processor):
        (allocator,) = processor.cache.cache_allocators.values()
        pool, ledger = processor.cache.pool, allocator.ledger
        refs = Counter(block for table in allocator.block_table.values() for block in table)
        free = [leaf for tree in pool._free_blocks[0].trees.values() for leaf in tree]
        rest = len(pool.free_sectors) * allocator.blocks_per_sector
        known = [set(refs), set(free), set(ledger.cached_blocks)]
        if sum(map(len, known)) != len(set().union(*known)) or len(free) != len(set(free)):
            seen.faults.append("a block in two places")
        if sum(map(len, known)) + rest != allocator.num_blocks:
            seen.faults.append("a block is lost")
        if {b: n for b, n in refs.items() if n > 1} != ledger.shared_ref_counts:
            seen.faults.append("reference counts")
        if {h: b for b, h in ledger.block_to_hash.items()} != ledger.hash_to_block:
            seen.faults.append("hashes")
        if (run := getattr(processor.cache, "_kara", None)) is not None:
            if not set(run.ledger._states) == run.running <= set(allocator.block_table):
                seen.faults.append("state of a request that holds no blocks")
            if run.ring.sequences > len(run.running):
                seen.faults.append("queries of a request that holds no blocks")
        seen.peak, seen.shared = max(seen.peak, len(refs)), max(seen.shared, len(ledger.shared_ref_counts))
        seen.free, seen.total = allocator.num_blocks - len(refs), allocator.num_blocks
        for state in processor.scheduler.active_requests.values():
            blocks = len(allocator.block_table.get(state.request_id, []))
            if state.status == RequestStatus.DECODING and blocks != -(-state.position_offset // PAGE):
                seen.faults.append(f"{state.request_id} holds {blocks} blocks for {state.position_offset} rows")

    def prepare_next_batch(self):
        some = prepare(self)
        look(self)
        return some

    def update_batch(self):
        update(self)
        look(self)

    def create_equivalent_initial_request(self):
        seen.resets.append((self.request_id, len(self.initial_tokens) + len(self.generated_tokens)))
        return reset(self)

    def search_prefix_match(self, request_id, prompt_ids):
        seen.served.append(match(self, request_id, prompt_ids))
        return seen.served[-1]

    monkeypatch.setattr(ContinuousBatchProcessor, "prepare_next_batch", prepare_next_batch)
    monkeypatch.setattr(ContinuousBatchProcessor, "update_batch", update_batch)
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", create_equivalent_initial_request)
    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", search_prefix_match)
    yield seen
    assert seen.faults == []
    assert seen.free == seen.total > 0  # finished requests left nothing behind


PROMPTS = [prompt(n) for n in (5, 20, 37, 90)]  # 90 are computed in two chunks, next to decoding requests


# ------------------------------------------------------------------------------------------ the dense model


@pytest.mark.parametrize(
    ("attention", "policy", "page"),
    [
        ("sdpa", {}, 16),
        ("eager", {"keep": 24, "tail": 5, "query_stride": 3}, 16),
        ("sdpa", {"window": 48, "keep": 1, "tail": 0, "max_sequences": 1}, 32),
        ("sdpa", {"window": 21, "keep": 9, "tail": 20, "period": 3}, 7),
    ],
)
def test_text_is_that_of_the_dense_model(attention, policy, page):
    model, policy = make_model(attention), POLICY | policy
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5  # not the one that follows from the head dimension
    outputs, kara = serve(model, PROMPTS, policy, tokens=160, page_size=page)
    assert [output.prompt_ids for output in outputs] == PROMPTS
    full = serve(model, PROMPTS, tokens=160, page_size=page)
    for output, uncompressed in zip(outputs, full, strict=True):
        events = of(kara, output)
        assert len(events) >= 3
        assert_dense(model, output, events)
        assert_dense(model, uncompressed, [])
        assert output.generated_tokens != uncompressed.generated_tokens  # the oracle had something to tell
        assert_best_kept(model, output, events, policy)


def test_the_guard_sets_what_is_kept_of_the_next_window(llama):
    policy = POLICY | {"max_loss": 0.2, "min_keep": 4, "max_keep": 28}
    outputs, kara = serve(llama, PROMPTS, policy, tokens=160)
    keeps = []
    for output in outputs:
        events = of(kara, output)
        assert_dense(llama, output, events)
        assert events[0].keep == 10
        assert all(0 < event.lost < 0.8 for event in events)
        # More is kept after a window of which too much was dropped, and not more after others.
        for event, following in pairwise(events):
            assert (event.lost > 0.2) == (following.keep > event.keep)
            assert 4 <= following.keep <= 28
            keeps.append(following.keep)
    assert len(set(keeps)) >= 3


def test_what_is_kept_by_default_is_for_later_queries(llama):
    """Root mean squares, value norms, and queries moved ahead by a window, against the dense model."""
    policy = {"window": 32, "keep": 10, "tail": 8, **EXACT}
    outputs, kara = serve(llama, PROMPTS, policy)
    assert kara.policy.look_ahead == 32
    theta = llama.config.rope_parameters["rope_theta"]
    for output in outputs:
        best_of = functools.partial(best_for_later, ahead=32, theta=theta)
        assert_best_kept(llama, output, of(kara, output), policy, best_of=best_of)


def test_looking_ahead_needs_a_known_rotary_embedding():
    dynamic = make_model()
    dynamic.model.rotary_emb.rope_type = "dynamic"
    assert KaraBatching(dynamic, window=32, keep=10).policy.look_ahead == 0
    with pytest.raises(ValueError, match=r"look_ahead: expected 0 for LlamaForCausalLM, .*, got 8"):
        KaraBatching(dynamic, window=32, keep=10, look_ahead=8)


@pytest.mark.parametrize("form", [{}, {"query_dtype": "fp8"}, {"query_heads": "mean"}])
def test_default_scoring_and_records(llama, form):
    policy = {"window": 32, "keep": 10, "tail": 8, **form}
    outputs, kara = serve(llama, PROMPTS, policy)
    for output in outputs:
        assert len(of(kara, output)) >= 2
        assert_dense(llama, output, of(kara, output))
    first, second = of(kara, outputs[1])[:2]
    assert first[1:7] == (60, 60, 38, 20, 32, 10)
    assert second[1:7] == (92, 70, 48, 30, 32, 10)
    assert (first.freed_blocks, second.freed_blocks) == (4 - 3, 5 - 3)
    assert first.keep_indices.shape == (LAYERS, HEADS, 10)
    assert first.keep_indices.dtype == torch.int32
    assert kara.tokens == sum(len(p) + 120 - 1 for p in PROMPTS)
    assert kara.retention == pytest.approx(1 - 22 * len(kara.events) / kara.tokens)
    assert not kara.skipped


def test_bfloat16_runs():
    outputs, kara = serve(make_model().to(torch.bfloat16), PROMPTS[:2], POLICY)
    assert [output.error for output in outputs] == [None, None]
    assert len(kara.events) == 2 * WINDOWS


@pytest.mark.skipif(not INTERPRETED, reason="the kernels compile here")
def test_the_kernels_take_these_pages(llama):
    policy = POLICY | {"tail": 3, "query_stride": 8}
    (expected,), _ = serve(llama, PROMPTS[1:2], policy, tokens=40)
    with KaraBatching(llama, backend="triton", **policy) as kara:
        (output,) = llama.generate_batch(PROMPTS[1:2], **settings(40)).values()
    assert len(kara.events) == 1
    assert output.generated_tokens == expected.generated_tokens


# ------------------------------------------------------------------------------------------------- blocks


def test_blocks_are_fewer_and_accounted_for_in_every_step(llama, watch):
    serve(llama, PROMPTS)
    without, watch.peak = watch.peak, 0
    _, kara = serve(llama, PROMPTS, POLICY)
    assert watch.peak <= without - 10
    assert sum(event.freed_blocks for event in kara.events) >= 10


def test_a_pool_that_only_compression_makes_large_enough(llama, watch):
    """The text is longer than the whole pool, so the scheduler must count rows, not tokens."""
    (failed,) = serve(llama, [PROMPTS[1]], tokens=220, num_blocks=10, safety_margin=0.0)
    assert "No requests can be scheduled" in failed.error
    (output,), kara = serve(llama, [PROMPTS[1]], POLICY, tokens=220, num_blocks=10, safety_margin=0.0)
    assert len(kara.events) == 6
    assert_dense(llama, output, kara.events)


def test_preempted_requests_are_recomputed_and_compressed_anew(llama, watch):
    outputs, kara = serve(llama, PROMPTS[:3], POLICY, tokens=150, num_blocks=13)
    assert watch.resets
    ways = set()
    for output in outputs:
        length, events = len(output.prompt_ids), of(kara, output)
        resets = [tokens for request_id, tokens in watch.resets if request_id == output.request_id]
        bounds = [length, *resets, length + 150]
        for begin, end in pairwise(bounds):
            run = [event for event in events if (begin if begin > length else 0) <= event.logical_len < end]
            assert_dense(llama, output, run, since=begin - length, until=end - length)
            assert [event.window_start for event in run] == [length + 10 * n for n in range(len(run))]
            ways.add((begin > length, len(run) > 1))
    assert (True, True) in ways  # one was compressed several times after it resumed


def test_requests_that_share_a_prefix(llama, watch):
    shared = prompt(50, seed=1)
    prompts = [shared + prompt(n, seed=2) for n in (3, 20, 7)] + [shared]
    outputs, kara = serve(llama, prompts, POLICY)
    assert watch.shared == 3
    assert max(watch.served) == 48
    assert kara.tokens == sum(len(ids) + 120 - 1 for ids in prompts)
    for output in outputs:
        assert len(of(kara, output)) >= 2
        assert_dense(llama, output, of(kara, output))
        assert_best_kept(llama, output, of(kara, output), POLICY)


def test_shared_blocks_are_not_written(llama, watch):
    """Two requests with the same greedy text share full blocks. Their windows wait until one owner is left."""
    with KaraBatching(llama, **POLICY) as kara:
        manager = llama.init_continuous_batching(**settings())
        manager.add_request(PROMPTS[1], request_id="long", max_new_tokens=200)
        manager.add_request(PROMPTS[1], request_id="short", max_new_tokens=90)
        manager.start()
        long, short = finish(manager, "long", "short")
    assert watch.shared > 2
    assert kara.skipped["shared"] == 2
    assert not of(kara, short)
    assert len(of(kara, long)) >= 4
    assert min(event.logical_len for event in kara.events) >= 20 + 89
    assert_dense(llama, short, [])
    assert_dense(llama, long, of(kara, long))


def test_no_prompt_meets_a_block_that_was_rewritten(llama, watch):
    """A request's text is requested again while it runs and afterwards. Only its untouched prompt is served."""
    ids = prompt(35)
    with (
        KaraBatching(llama, **POLICY) as kara,
        llama.continuous_batching_context_manager(**settings()) as manager,
    ):
        manager.add_request(ids, request_id="first", max_new_tokens=120)
        (first,) = finish(manager, "first")
        del watch.served[:]
        again = ids + first.generated_tokens + [1]
        manager.add_request(again, request_id="again", max_new_tokens=80)
        (output,) = finish(manager, "again")
        assert watch.served == [32]
        manager.add_request(again, request_id="hit", max_new_tokens=80)
        (hit,) = finish(manager, "hit")
        assert watch.served == [32, (len(again) - 1) // PAGE * PAGE]
    for each in (first, output, hit):
        assert len(of(kara, each)) >= 2
        assert_dense(llama, each, of(kara, each))


def test_return_sequences_share_their_prompt(llama, watch):
    outputs, kara = serve(
        llama, PROMPTS[1:3], POLICY, generation={"num_return_sequences": 3, "do_sample": True, "top_k": 0}
    )
    assert len(outputs) == 6
    assert len({tuple(output.generated_tokens) for output in outputs}) == 6
    for output in outputs:
        assert len(of(kara, output)) >= 2
        assert_dense(llama, output, of(kara, output), greedy=False)


def test_a_cancelled_request_leaves_nothing_to_the_next_of_its_name(llama, watch):
    with (
        KaraBatching(llama, **POLICY) as kara,
        llama.continuous_batching_context_manager(**settings()) as manager,
    ):
        compressed = threading.Event()
        kara.events = Told(lambda event: event.request_id == "a" and compressed.set())
        manager.add_request(PROMPTS[0], request_id="a", max_new_tokens=5000)
        manager.add_request(PROMPTS[1], request_id="b", max_new_tokens=150)
        assert compressed.wait(30)
        manager.cancel_request("a")
        (b,) = finish(manager, "b")
        before = len(kara.events)
        manager.add_request(PROMPTS[2], request_id="a", max_new_tokens=120)
        (a,) = finish(manager, "a")
    assert_dense(llama, b, [event for event in kara.events if event.request_id == "b"])
    assert len(kara.events[before:]) >= 2
    assert_dense(llama, a, kara.events[before:])


def test_requests_beyond_the_ring_wait_for_room(llama, watch):
    with KaraBatching(llama, **POLICY) as kara:
        manager = llama.init_continuous_batching(**settings())
        manager.batch_processor.cache._kara.room = 1
        manager.add_request(PROMPTS[0], request_id="a", max_new_tokens=90)
        manager.add_request(PROMPTS[1], request_id="b", max_new_tokens=200)
        manager.start()
        a, b = finish(manager, "a", "b")
    begins = 20 + 89  # what b has computed when a is through
    assert len(of(kara, a)) == 2
    assert len(of(kara, b)) >= 4
    assert of(kara, b)[0].logical_len == begins + (32 + 8) // 4  # a quarter of the queries is there
    for output in (a, b):
        assert_dense(llama, output, of(kara, output))
    assert_best_kept(llama, b, of(kara, b), POLICY, recorded_from=begins)


# ---------------------------------------------------------------------------------- nothing leaks out of it


def test_everything_is_as_before_outside_of_it():
    model, attention = make_model("eager"), dict(ALL_ATTENTION_FUNCTIONS)
    before, names = serve(model, PROMPTS[:2]), set(vars(model))

    def fail():
        with KaraBatching(model, **POLICY):
            model.generate_batch(PROMPTS[:2], **settings())
            assert dict(ALL_ATTENTION_FUNCTIONS) != attention
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    _, kara = serve(model, PROMPTS[:2], POLICY)
    assert kara.events
    assert set(vars(model)) == names
    assert dict(ALL_ATTENTION_FUNCTIONS) == attention
    assert model.config._attn_implementation == "eager"
    events = list(kara.events)
    after = serve(model, PROMPTS[:2])
    assert [output.generated_tokens for output in after] == [output.generated_tokens for output in before]
    for a, b in zip(after, before, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert kara.events == events


def test_other_models_are_left_alone_and_contexts_may_overlap(llama):
    other, sdpa = make_model(seed=8), ALL_ATTENTION_FUNCTIONS["sdpa"]
    (expected,) = serve(other, PROMPTS[:1])
    one, two = KaraBatching(llama, **POLICY), KaraBatching(other, **POLICY)
    with one:
        serve_one = llama.generate_batch(PROMPTS[:1], **settings())
        (plain,) = serve(other, PROMPTS[:1])
        two.__enter__()
        (inside,) = other.generate_batch(PROMPTS[:1], **settings()).values()
    (output,) = other.generate_batch(PROMPTS[:1], **settings()).values()
    two.__exit__(None, None, None)
    assert (plain.generated_tokens, plain.logprobs) == (expected.generated_tokens, expected.logprobs)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    assert inside.generated_tokens == output.generated_tokens
    assert len(two.events) == 2 * len(one.events) == 2 * WINDOWS
    assert_dense(other, output, two.events[WINDOWS:])
    assert_dense(llama, *serve_one.values(), one.events)


def test_a_persistent_manager_lives_as_long_as_the_context(llama):
    with KaraBatching(llama, **POLICY) as kara:
        outputs = [
            *llama.generate_batch(PROMPTS[:2], **settings(), persistent_manager=True).values(),
            *llama.generate_batch(PROMPTS[:2], **settings(), persistent_manager=True).values(),
        ]
        assert llama._cached_continuous_batching_manager.batch_processor is not None
    assert not hasattr(llama, "_cached_continuous_batching_manager")
    assert len(kara.events) == 4 * WINDOWS
    for output in outputs:
        assert_dense(llama, output, of(kara, output))


@pytest.mark.parametrize("fails", [False, True])
def test_managers_that_still_run_are_stopped(llama, fails):
    """On a normal exit the context waits for open requests, on an exception it does not."""
    compressed, kara = threading.Event(), KaraBatching(llama, **POLICY)
    kara.events = Told(lambda event: compressed.set())
    with pytest.raises(KeyError) if fails else nullcontext(), kara:
        manager = llama.init_continuous_batching(**settings())
        manager.start()
        manager.add_request(PROMPTS[0], request_id="a", max_new_tokens=5000 if fails else 120)
        if fails:
            assert compressed.wait(30)
            raise KeyError
    assert not manager.is_running()
    output = manager.get_result()
    assert (output.status == RequestStatus.FAILED) == fails
    if not fails:
        assert len(kara.events) == WINDOWS
        assert_dense(llama, output, kara.events)


def test_a_restarted_manager_compresses(llama):
    with KaraBatching(llama, **POLICY) as kara:
        manager = llama.init_continuous_batching(**settings())
        for name in "ab":
            manager.start()
            manager.add_request(PROMPTS[0], request_id=name)
            (output,) = finish(manager, name)
            manager.stop()
            assert_dense(llama, output, of(kara, output))
    assert [event.request_id for event in kara.events] == ["a"] * WINDOWS + ["b"] * WINDOWS


# ------------------------------------------------------------------------------------------ what is refused


def model_with(kind):
    if kind == "sinks":
        model = make_model()
        model.model.layers[1].self_attn.sinks = torch.zeros(4)
        return model
    if kind == "linear_attention":
        model = make_model()
        model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
        return model
    if kind == "attn_logit_softcapping":
        config = Gemma2Config(num_hidden_layers=2, vocab_size=61, layer_types=["full_attention"] * 2, **SMALL)
        return Gemma2ForCausalLM(config)
    if kind == "encoder-decoder":
        return T5ForConditionalGeneration(T5Config(num_layers=1, d_model=16, d_ff=16, num_heads=2, vocab_size=61))
    return MistralForCausalLM(MistralConfig(num_hidden_layers=2, vocab_size=61, sliding_window=64, **SMALL))


@pytest.mark.parametrize(
    "kind", ["sliding_attention", "linear_attention", "sinks", "attn_logit_softcapping", "encoder-decoder"]
)
def test_unsupported_models_are_refused(kind):
    model = model_with(kind)
    with pytest.raises(NotImplementedError, match=kind), KaraBatching(model, **POLICY):
        raise AssertionError("entered")
    assert "init_continuous_batching" not in vars(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": 3}, "windows: expected one of .*window"),
        ({"window": 8, "keep": 9}, r"keep: expected 1\.\.7, got 9"),
        ({"backend": "cuda"}, "backend: expected"),
    ],
)
def test_settings_are_checked_at_once(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        KaraBatching(llama, **arguments)


def test_models_in_use_and_other_things_are_refused(llama):
    with pytest.raises(TypeError, match="model: expected one that has generate_batch, got Linear"):
        KaraBatching(torch.nn.Linear(2, 2)).__enter__()
    with KaraBatching(llama), pytest.raises(ValueError, match="got one that is in use"):
        KaraBatching(llama).__enter__()
    llama.generate_batch(PROMPTS[:1], **settings(3), persistent_manager=True)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        KaraBatching(llama).__enter__()
    llama.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_async_batching": True}, "use_async_batching=False"),
        ({"use_cuda_graph": True}, "use_cuda_graph=False"),
        ({"varlen_compile_config": CompileConfig()}, "varlen_compile_config"),
        ({"default_compile_level": 1}, "default_compile_level"),
        ({"cpu_offload_space": 0.01}, r"cpu_offload_space=0\.0"),
        ({"cpu_offload_space": None}, r"cpu_offload_space=0\.0"),
        ({"tensor": "parallel"}, "tensor parallelism"),
        ({"page_size": 64}, "window: expected at least one block of 64 tokens, got 32"),
        (
            {"max_requests_per_batch": 48, "max_query_gib": 1e-4},
            "max_query_gib: .* for 48 sequences",
        ),
    ],
)
def test_unsupported_batching_is_refused_at_the_start(monkeypatch, options, message):
    model, attention = make_model("eager"), dict(ALL_ATTENTION_FUNCTIONS)
    if "use_cuda_graph" in options:
        monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "CUDAGraph")
    if options.pop("tensor", None):
        monkeypatch.setattr(DistributedHelper, "infer_if_tp_driver", lambda self: setattr(self, "tp_size", 2) or True)
    policy = POLICY | {"max_query_gib": options.pop("max_query_gib", 1.0)}
    with KaraBatching(model, **policy) as kara:
        with pytest.raises((NotImplementedError, ValueError), match=message):
            model.generate_batch(PROMPTS[:1], **settings(**options))
        assert model.config._attn_implementation == "eager"
        monkeypatch.undo()
        model.generate_batch(PROMPTS[:1], **settings(60)) if policy["max_query_gib"] == 1.0 else None
    assert len(kara.events) == (policy["max_query_gib"] == 1.0)
    assert dict(ALL_ATTENTION_FUNCTIONS) == attention


@pytest.mark.parametrize(
    ("owner", "name"), [(PagedAttentionCache, "mark_complete_blocks"), (ContinuousBatchProcessor, "prepare_next_batch")]
)
def test_another_transformers_is_refused_by_version(llama, monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    expected = rf"transformers 5\.19, got {transformers.__version__} without .*{name}"
    with KaraBatching(llama, **POLICY), pytest.raises(RuntimeError, match=expected):
        llama.generate_batch(PROMPTS[:1], **settings())


def test_attention_that_is_not_plain_is_refused(llama):
    with KaraBatching(llama, **POLICY):
        manager = llama.init_continuous_batching(**settings())
        attention, (q, k, v) = ALL_ATTENTION_FUNCTIONS["sdpa"], torch.zeros(3, 1, 4, 3, 8)
        module = llama.model.layers[0].self_attn
        with pytest.raises(NotImplementedError, match=r"softcap \(LlamaAttention\)"):
            attention(module, q, k, v, None, scaling=1.0, cache=manager.batch_processor.cache, softcap=30.0)
        attention(module, q, k[:, :2], v[:, :2], None, scaling=1.0, softcap=30.0)  # not ours


def test_attention_out_of_reach_is_an_error_and_not_ignored(llama):
    ALL_ATTENTION_FUNCTIONS["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"]  # a local entry hides the registered one
    try:
        (output,), kara = serve(llama, PROMPTS[:1], POLICY)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert "KaraBatching saw queries of layers [] of 3" in output.error
    assert not kara.events
