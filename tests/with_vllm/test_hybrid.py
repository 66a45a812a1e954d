"""Models in which only some layers have full attention: those are compressed, the sliding ones are left alone."""

import pytest
from harness import KARA, Dense, asking, configure, engine, greedy, make_model, prompts, short_of_best
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kara_kernels.integrations.vllm.windows.runners import KaraRunnerV2

KINDS = ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A random Gemma 3: 6 layers of which 2 have full attention, a sliding window of 48, two rotary embeddings."""
    shape = {"num_hidden_layers": 6, "layer_types": 2 * KINDS, "sliding_window": 48, "query_pre_attn_scalar": 32}
    # With tied embeddings of the usual size it repeats its last token, whatever attention says.
    return make_model(tmp_path_factory.mktemp("gemma"), Gemma3ForCausalLM, Gemma3TextConfig, embeddings=0.1, **shape)


@pytest.fixture(scope="module")
def dense(gemma):
    return Dense(gemma)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"pool": "model"}, {"max_num_batched_tokens": 16, "mode": "asynchronous"}),
        ({"scorer": "snapkv", "query_stride": 1}, {"enable_prefix_caching": False}),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}}),
    ],
    ids=["defaults", "one list, chunked prefill", "SnapKV, no prefix cache", "drafts by n-grams"],
)
def test_layers_of_full_attention_are_compressed_alone(gemma, dense, trace, changes, options):
    with engine(gemma, {**KARA, **changes}, trace=trace, **options) as kara:
        served = kara.generate(prompts(5, 40, 77, 64, 1), greedy(280))
        assert list(kara.runner.kara_layers) == [f"model.layers.{i}.self_attn.attn" for i in (2, 5)]
        dense.assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()


def test_preemption_in_a_tiny_pool(gemma, dense, trace):
    """Three groups of layers share the pool, so that it is empty three times as soon."""
    tiny = {"max_model_len": 416, "num_gpu_blocks_override": 44}
    whole = {"pressure_window": 64, "pressure_keep": 32}
    with engine(gemma, {**KARA, **whole}, trace=trace, mode="asynchronous", **tiny) as kara:
        served = kara.generate(prompts(5, 40, 77, 30, 51), greedy(300))
        assert sum(len(request.recomputed) for request in served) >= 2
        dense.assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()


def test_requests_with_and_without_compression_in_compiled_steps(gemma, dense, trace):
    with engine(gemma, KARA, trace=trace, enforce_eager=False) as kara:
        served = kara.generate(prompts(5, 40, 77, 64), [asking(own, 280) for own in (..., False, {"keep": 8}, False)])
        dense.assert_equal(kara, served, compressions=0)
        assert [bool(kara.events_of(request.request_id)) for request in served] == [True, False, True, False]
        again = kara.generate([[*served[1].prompt, 7]], greedy(150))
        assert again[0].cached == 32
        dense.assert_equal(kara, again, compressions=0)
        kara.assert_nothing_leaks()


def test_blocks_of_full_attention_are_freed(gemma):
    """A request of 440 tokens holds 14 blocks of full attention, and in each group of sliding layers two or three."""
    peaks = []
    for own in (False, True):
        with engine(gemma, KARA) as kara:
            kara.generate(prompts(40), [asking(own, 400)])
            peaks.append(kara.peak)
    assert peaks[0] >= 14 + 2 * 2
    assert peaks[1] <= peaks[0] - 5


def test_traced_lists_are_the_best_by_the_rotary_embedding_of_these_layers(gemma, dense, trace):
    """Sliding layers have another one. Queries are moved one window ahead."""
    policy = {**KARA, "query_dtype": "auto", "chunk_fraction": 0.0, "reduction": "mean", "value_norm": False}
    with engine(gemma, policy, trace=trace) as kara:
        for served in kara.generate(prompts(5, 77), greedy(320)):
            events = kara.events_of(served.request_id)
            assert len(events) >= 3
            for event, scores in zip(events, dense.scores(served, events, 2, ahead=KARA["window"]), strict=True):
                assert short_of_best(event, scores) < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"disable_hybrid_kv_cache_manager": True}, "sliding windows .*--disable-hybrid-kv-cache-manager.*: 48"),
        ({"additional_config": {"kara": KARA, "contexts": {}}}, "sliding windows .*with contexts.*: 48"),
        ({"hf_overrides": {"layer_types": ["sliding_attention"] * 6}}, "sliding windows .*in all layers.*: 48"),
    ],
    ids=["one group", "contexts", "all slide"],
)
def test_what_cannot_be_compressed_is_refused(gemma, options, words):
    with pytest.raises(ValueError, match=f"expected only supported features, got {words}"):
        configure(gemma, KARA, **options)


def test_the_second_runner_is_refused():
    with pytest.raises(ValueError, match=r"expected full attention in all layers .*VLLM_USE_V2_MODEL_RUNNER=0"):
        KaraRunnerV2()._kara_adopt(2, 3)
