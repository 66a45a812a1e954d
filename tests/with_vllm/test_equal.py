"""vLLM with Kara gives the same tokens as a dense model with the same tokens dropped (float32, greedy)."""

from itertools import pairwise

import pytest
import torch
from harness import KARA, MODES, ON_GPU, asking, engine, greedy, no_block_once, prompts, short_of_best
from vllm import SamplingParams

import kara_kernels.integrations.vllm.layout as layout
from kara_kernels.engine import Ledger, PackedCache

both = pytest.mark.parametrize("mode", MODES)
WHOLE = {"pressure_window": 64, "pressure_keep": 32}  # short of blocks, windows stay as they are, and survivors too


@pytest.mark.parametrize(
    ("changes", "options", "compressions"),
    [
        pytest.param({}, {}, 3, id="defaults"),
        pytest.param({"pool": "layer"}, {}, 3, id="one list per layer"),
        pytest.param({"pool": "model", "tail": 0}, {}, 3, id="one list, no tail"),
        pytest.param({"query_heads": "mean", "query_stride": 8}, {}, 3, id="means of few queries"),
        pytest.param({"query_dtype": "fp8"}, {}, 3, id="queries in fp8"),
        pytest.param({"look_ahead": 0, "query_dtype": "auto"}, {}, 3, id="not ahead, queries as they are"),
        pytest.param({"attention": "causal", "query_stride": 1}, {}, 3, id="causal"),
        pytest.param(
            {"window": 40, "keep": 9, "tail": 3, "period": 5, "max_sequences": 1}, {}, 3, id="odd lengths, period, cap"
        ),
        pytest.param({"min_freed_blocks": 1, "keep": 50, "protected": 60}, {}, 2, id="little gain, protected"),
        pytest.param({}, {"max_num_batched_tokens": 16, "max_num_seqs": 8}, 3, id="chunked prefill"),
        pytest.param({}, {"enable_prefix_caching": False}, 3, id="no prefix cache"),
        pytest.param({}, {"block_size": 64}, 3, id="larger blocks"),
        pytest.param({}, {"enforce_eager": False}, 3, id="compiled"),
    ],
)  # fmt: skip
def test_mixed_lengths_and_several_compressions(model, dense, trace, changes, options, compressions):
    with engine(model, {**KARA, **changes}, trace=trace, **options) as kara:
        served = kara.generate(prompts(5, 40, 77, 64, 1), greedy(280))
        dense.assert_equal(kara, served, compressions=compressions)
        kara.assert_nothing_leaks()
        for event in kara.events():
            assert event["physical_len_after"] == event["physical_len_before"] - event["window"] + event["keep"]
            assert len(event["keep_indices"]) == 3
            assert [len(heads) for heads in event["keep_indices"]] == [2] * 3
            for row in (row for heads in event["keep_indices"] for row in heads):
                assert row == sorted(set(row))
                assert len(row) == event["keep"]
                assert 0 <= row[0] <= row[-1] < event["window"]


@pytest.mark.parametrize("chunk", [2048, 16])
@both
def test_preemption_in_a_tiny_pool(model, dense, trace, chunk, mode):
    tiny = {"max_model_len": 416, "num_gpu_blocks_override": 15, "max_num_batched_tokens": chunk}
    with engine(model, {**KARA, **WHOLE}, trace=trace, mode=mode, **tiny) as kara:
        served = kara.generate(prompts(5, 40, 77, 30, 51), greedy(300))
        assert sum(len(request.recomputed) for request in served) >= 3
        dense.assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()
        # A preempted text is compressed while it is recomputed, so that it never takes more room than before.
        assert any(event["logical_len"] < event["recomputed_len"] for event in kara.events())
        most = KARA["window"] + KARA["tail"] + 2 * 32
        for event in kara.events():
            [request] = [r for r in served if r.request_id == event["request_id"]]
            held = event["physical_len_before"] - event["window_start"]
            assert held <= most, (request.request_id, event["logical_len"], event["window_start"])


def test_requests_are_compressed_early_before_one_is_preempted(model, dense, trace, monkeypatch):
    """Blocks are short because four windows fall due together. With tails of 16 nobody needs to be preempted."""
    settings, recomputed = {**KARA, "tail": 96, "pressure_tail": 16}, []
    for relieved in (False, True):
        with monkeypatch.context() as patch:
            if not relieved:
                patch.setattr(Ledger, "relieve", lambda *args: [])
            told = trace if relieved else None
            with engine(model, settings, trace=told, num_gpu_blocks_override=19, max_model_len=416) as kara:
                served = kara.generate(prompts(5, 40, 20, 30), greedy(200))
                recomputed.append(sum(sum(request.recomputed) for request in served))
                if relieved:
                    early = [e for e in kara.events() if e["physical_len_before"] - e["window_start"] < 64 + 96]
                    assert early
                    dense.assert_equal(kara, served, compressions=1)
                    kara.assert_nothing_leaks()
    assert recomputed[1] <= recomputed[0] / 3, recomputed


@both
def test_survivors_are_compressed_once_more_before_one_is_preempted(model, dense, trace, mode):
    """To half as many. If all must stay, a request is preempted."""
    recomputed = []
    for keep in (32, 16):
        told, settings = (trace if keep < 32 else None), {**KARA, "pressure_window": 32, "pressure_keep": keep}
        with engine(model, settings, trace=told, mode=mode, num_gpu_blocks_override=20, max_model_len=416) as kara:
            served = kara.generate(prompts(5, 40, 20, 30), greedy(300))
            recomputed.append(sum(sum(request.recomputed) for request in served))
            if told:
                starts = [[e["window_start"] for e in kara.events_of(request.request_id)] for request in served]
                assert sum(later < start for of in starts for start, later in pairwise(of)) >= 4
                dense.assert_equal(kara, served, compressions=4)
                kara.assert_nothing_leaks()
    assert recomputed[0] > 0
    assert recomputed[1] == 0


WINDOWS = {"windows": [96, 40]}
OWN = [False, ..., {"keep": 8}, {"window": 96, "keep": 70}, {"window": 40}, True]  # ...: nothing is asked for
SIZES = [None, (64, 32), (64, 8), (96, 70), (40, 32), (64, 32)]


def assert_sizes(kara, served, compressions):
    """Checks that every request was compressed as it asked for, and not at all if it asked for that."""
    for request, size in zip(served, SIZES, strict=True):
        events = kara.events_of(request.request_id)
        assert {(event["window"], event["keep"]) for event in events} == ({size} if size else set())
        assert len(events) >= (compressions if size else 0)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16}], ids=["whole", "chunked"])
def test_requests_with_settings_of_their_own_side_by_side(model, dense, trace, options):
    with engine(model, {**KARA, **WINDOWS}, trace=trace, **options) as kara:
        served = kara.generate(prompts(33, 5, 40, 77, 20, 64), [asking(own, 300) for own in OWN])
        assert_sizes(kara, served, compressions=2)
        dense.assert_equal(kara, served, compressions=0)
        kara.assert_nothing_leaks()


@both
def test_a_preempted_request_keeps_its_own_settings(model, dense, trace, mode):
    tiny = {"max_model_len": 416, "num_gpu_blocks_override": 15}
    with engine(model, {**KARA, **WINDOWS, **WHOLE}, trace=trace, mode=mode, **tiny) as kara:
        served = kara.generate(prompts(33, 5, 40, 77, 20, 64), [asking(own, 300) for own in OWN])
        # Recomputed in full, each was compressed before and after.
        again = [
            i for i, x in enumerate(served) if {e["recomputed_len"] > 0 for e in kara.events_of(x.request_id)} > {0}
        ]
        assert sum(len(request.recomputed) for request in served) >= 3
        assert {2, 3, 4} & set(again)
        assert_sizes(kara, served, compressions=2)
        dense.assert_equal(kara, served, compressions=0)
        kara.assert_nothing_leaks()


def test_packed_blocks_and_settings_of_their_own(model, dense, trace, monkeypatch):
    monkeypatch.setattr(layout, "_strides", lambda where: None)
    with engine(model, {**KARA, **WINDOWS}, trace=trace) as kara:
        served = kara.generate(prompts(33, 5, 40, 77, 20, 64), [asking(own, 300) for own in OWN])
        assert_sizes(kara, served, compressions=2)
        dense.assert_equal(kara, served, compressions=0)


@both
def test_preemption_in_the_very_step_of_a_plan(model, dense, trace, mode):
    (prompt,) = prompts(20)
    with engine(model, trace=trace, mode=mode) as kara:
        # Before step 81 it has 20 + 80 tokens, a window and a tail behind its prompt.
        served = kara.drive({0: lambda kara: kara.add("A", prompt, 250), 81: no_block_once})
        assert served["A"].recomputed == [101]
        assert {event["recomputed_len"] for event in kara.events()} == {101}  # that plan left no trace
        dense.assert_equal(kara, served.values(), compressions=2)
        kara.assert_nothing_leaks()


@both
def test_decoded_tokens_from_the_prefix_cache_are_watched_before_they_are_judged(model, dense, trace, mode):
    """A request preempted just before it is due finds 96 of its tokens in the prefix cache. Their queries were recorded
    only before the preemption. It waits for a quarter of a ring, 10 queries of every 2nd token."""
    (prompt,) = prompts(20)
    with engine(model, trace=trace, mode=mode) as kara:
        served = kara.drive({0: lambda kara: kara.add("A", prompt, 250), 79: no_block_once})
        assert served["A"].recomputed == [99]
        assert kara.events()[0]["logical_len"] == 115
        dense.assert_equal(kara, served.values(), compressions=2)


def test_memory_is_saved_and_counted(model, trace):
    """A pool with room for the kept rows only. No request is preempted, unlike without Kara."""
    peaks, preemptions = [], []
    for settings in (None, KARA):
        with engine(model, settings, trace=trace, num_gpu_blocks_override=40) as kara:
            served = kara.generate(prompts(5, 5, 5), greedy(600))
            peaks.append(kara.peak)
            preemptions.append(sum(len(request.recomputed) for request in served))
    assert peaks[0] == 39
    assert peaks[1] < 0.65 * 3 * 19
    assert preemptions[0] > 0
    assert preemptions[1] == 0


@both
def test_prefix_cache_before_and_after_compression(model, dense, trace, mode):
    prompt, other = prompts(70, 33)
    with engine(model, trace=trace, mode=mode) as kara:
        (first,) = kara.generate([prompt], greedy(200))
        (again,) = kara.generate([prompt], greedy(200))
        assert again.tokens == first.tokens
        assert again.cached == 64  # two blocks of the prompt; the third was rewritten and is not found
        conversation = prompt + first.tokens + other
        (turn,) = kara.generate([conversation], greedy(200))
        assert turn.cached == 64
        # Side by side: shared blocks are in use by both while each is compressed.
        both = kara.generate([prompt, prompt, prompt[:64] + other], greedy(200))
        assert [request.cached for request in both] == [64, 64, 64]
        assert both[0].tokens == both[1].tokens == first.tokens
        dense.assert_equal(kara, [first, again, turn, *both], compressions=1)
        kara.assert_nothing_leaks()


@both
def test_only_what_was_never_compressed_is_offered_to_others(model, dense, trace, mode):
    """Only four of 64 tokens are dropped, so physical blocks could be mistaken for logical ones."""
    (prompt,) = prompts(70)
    with engine(model, {**KARA, "keep": 60}, trace=trace, mode=mode) as kara:
        (short,) = kara.generate([prompt], greedy(91))  # never compressed: its blocks are the cache's, up to token 160
        (long,) = kara.generate([prompt], greedy(130))  # compressed once, at 161 tokens, when that frees a block
        (turn,) = kara.generate([prompt + long.tokens], greedy(100))
        assert long.tokens[:91] == short.tokens
        assert turn.cached == 160
        assert [len(kara.events_of(x.request_id)) for x in (short, long)] == [0, 1]
        dense.assert_equal(kara, [short, long, turn], compressions=0)


@both
def test_blocks_that_another_request_reads_are_not_rewritten(model, dense, trace, mode):
    """B's prompt is A's text so far. It takes A's blocks, including decoded tokens, before A is due."""
    (prompt,) = prompts(70)
    with engine(model, trace=trace, mode=mode) as kara:
        served = kara.drive(
            {
                0: lambda kara: kara.add("A", prompt, 250),
                62: lambda kara: kara.add("B", prompt + kara.said["A"][:58], 250),
            }
        )
        first = kara.events_of("A")[0]
        assert first["window_start"] == 96  # the first token behind the blocks that B holds
        dense.assert_equal(kara, served.values(), compressions=2)
        kara.assert_nothing_leaks()


@both
def test_a_request_that_skips_a_step_comes_back_with_its_blocks(model, dense, trace, mode):
    """Workers remove it from their batch and restore it from their own record of its blocks."""
    hidden = []
    with engine(model, trace=trace, mode=mode) as kara:
        (p, q) = prompts(20, 70)
        served = kara.drive(
            {
                0: lambda kara: (kara.add("A", p, 250), kara.add("B", q, 250)),
                130: lambda kara: hidden.append(kara.scheduler.running.pop(0)),
                131: lambda kara: kara.scheduler.running.insert(0, hidden.pop()),
            }
        )
        dense.assert_equal(kara, served.values(), compressions=3)
        kara.assert_nothing_leaks()


def test_sampled_tokens_have_the_dense_models_probabilities(model, dense, trace):
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=250, ignore_eos=True, logprobs=0)
    with engine(model, trace=trace) as kara:
        for served in kara.generate(prompts(9, 60), sampling):
            logits = dense.logits(served, kara.events_of(served.request_id))[len(served.prompt) - 1 :]
            want = logits.log_softmax(-1).gather(1, torch.tensor(served.tokens)[:, None])[:, 0]
            assert len(kara.events_of(served.request_id)) >= 2
            # Both are float32 over the same values in another order. A single wrong row changes this by whole units.
            assert (torch.tensor(served.logprobs) - want).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_caches(model, dense, trace, dtype):
    """Rounding decides between close tokens, so the error of log probabilities is compared with that of an engine that
    drops nothing and has only the rounding error."""
    errors = {}
    for name, settings in (("plain", None), ("kara", KARA)):
        with engine(model, settings, trace=trace if settings else None, dtype=dtype) as kara:
            served = kara.generate(prompts(5, 40, 77), greedy(280, logprobs=0))
            error = []
            for request in served:
                events = kara.events_of(request.request_id)
                assert len(events) >= 3 * (settings is not None)
                logits = dense.logits(request, events)[len(request.prompt) - 1 :]
                want = logits.log_softmax(-1).gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
                error.append((torch.tensor(request.logprobs) - want).abs())
            errors[name] = torch.cat(error).mean()
    assert errors["kara"] < 1.5 * errors["plain"]


def test_packed_blocks(model, dense, trace, monkeypatch):
    """As on processors with bfloat16 blocks that strides cannot describe: rows are moved by element offsets."""
    monkeypatch.setattr(layout, "_strides", lambda where: None)
    with engine(model, trace=trace) as kara:
        assert isinstance(kara.runner.kara_cache, PackedCache)
        served = kara.generate(prompts(5, 40, 77), greedy(280))
        dense.assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()


def test_engine_core_in_a_process_of_its_own(model, dense, trace, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(model, trace=trace) as kara:
        assert kara.scheduler is None
        served = kara.generate(prompts(5, 40, 77), greedy(280))
        dense.assert_equal(kara, served, compressions=3)


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("pool", ["head", "layer", "model"])
def test_two_tensor_parallel_ranks(model, dense, trace, pool):
    with engine(model, {**KARA, **WINDOWS, "pool": pool}, trace=trace, tensor_parallel_size=2) as kara:
        asks = [..., {"keep": 8}, {"window": 96}]
        served = kara.generate(prompts(5, 40, 77), [asking(own, 330) for own in asks])
        assert {(event["window"], event["keep"]) for event in kara.events()} == {(64, 32), (64, 8), (96, 32)}
        dense.assert_equal(kara, served, compressions=3)
        if pool != "head":
            lists = {tuple(row) for heads in kara.events()[0]["keep_indices"] for row in heads}
            assert len(lists) == {"layer": 3, "model": 1}[pool]


@both
def test_aborted_requests_leave_nothing(model, dense, trace, mode):
    with engine(model, trace=trace, mode=mode) as kara:
        core = kara.llm.llm_engine
        for name, prompt in enumerate(prompts(5, 40, 77, 20)):
            core.add_request(str(name), {"prompt_token_ids": prompt}, greedy(300))
        for step in range(130):
            core.step()
            if step in (60, 110):  # before and after the first compressions
                core.abort_request(["0" if step == 60 else "1"])
        assert {event["request_id"] for event in kara.events()} >= {"1", "2", "3"}
        core.abort_request(["2", "3"])
        kara.assert_nothing_leaks()
        served = kara.generate(prompts(30), greedy(200))
        dense.assert_equal(kara, served, compressions=2)
        assert kara.runner.kara_ring.sequences <= 1


@pytest.mark.parametrize(
    ("stride", "attention", "ahead", "own"),
    [
        (1, "bidirectional", 0, ...),
        (4, "bidirectional", 0, ...),
        (1, "bidirectional", None, ...),
        (1, "causal", None, ...),
        (4, "bidirectional", None, {"window": 96, "keep": 40}),
        (1, "causal", None, {"window": 96, "keep": 40}),
    ],
)
def test_the_traced_lists_are_the_best_of_the_window(model, dense, trace, stride, attention, ahead, own):
    """By the dense model's queries and keys, kept tokens have at least the attention of dropped ones. By default the
    queries are moved one window of the server ahead."""
    policy = {
        **KARA,
        "windows": [] if own is ... else [own["window"]],
        "attention": attention,
        "query_stride": stride,
        "query_dtype": "auto",
        "look_ahead": ahead,
        "chunk_fraction": 0.0,
        "reduction": "mean",
        "value_norm": False,
    }
    moved = KARA["window"] if (attention, ahead) == ("bidirectional", None) else 0
    with engine(model, policy, trace=trace) as kara:
        for served in kara.generate(prompts(5, 77), asking(own, 320)):
            events = kara.events_of(served.request_id)
            assert len(events) >= 3
            found = dense.scores(served, events, stride, attention, moved)
            for event, scores in zip(events, found, strict=True):
                # Float32 attention of an engine that batches differently; scores are around 1 / 64.
                assert short_of_best(event, scores) < 1e-5
