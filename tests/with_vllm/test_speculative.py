"""Speculative decoding by n-grams: rejected drafts are never scored or kept, and every token is the dense model's."""

from types import SimpleNamespace

import pytest
from harness import KARA, Dense, asking, configure, engine, greedy, make_model, prompts, short_of_best

from kara_kernels.integrations.vllm.windows.configure import ring_rows
from kara_kernels.integrations.vllm.windows.scheduler import KaraScheduler

TOKENS = 8
NGRAMS = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SPECULATIVE = {"speculative_config": NGRAMS}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A random model of so few tokens that some drafts are accepted."""
    return make_model(tmp_path_factory.mktemp("few"), vocab_size=TOKENS)


@pytest.fixture(scope="module")
def dense(few):
    return Dense(few)


def texts(*lengths, seed=1):
    return [[token % TOKENS for token in prompt] for prompt in prompts(*lengths, seed=seed)]


def counting(kara):
    """Counts of the engine's drafts, and of those accepted."""
    found = {"drafts": 0, "accepted": 0}
    make = kara.scheduler.make_spec_decoding_stats

    def counted(stats, num_draft_tokens, num_accepted_tokens, **kwargs):
        found["drafts"] += num_draft_tokens
        found["accepted"] += num_accepted_tokens
        return make(stats, num_draft_tokens, num_accepted_tokens, **kwargs)

    kara.scheduler.make_spec_decoding_stats = counted
    return found


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"pool": "model", "query_stride": 3, "tail": 0}, {"max_num_batched_tokens": 48}),
        ({"scorer": "snapkv", "query_stride": 1}, {"enable_prefix_caching": False}),
    ],
    ids=["defaults", "one list, no tail, chunked prefill", "SnapKV, no prefix cache"],
)
def test_every_token_is_the_dense_models(few, dense, trace, changes, options):
    with engine(few, {**KARA, **changes}, trace=trace, **SPECULATIVE, **options) as kara:
        said = counting(kara)
        served = kara.generate(texts(5, 40, 77, 64, 1), [asking(own) for own in (..., ..., {"keep": 8}, ..., ...)])
        dense.assert_equal(kara, served, compressions=3)
        assert said["accepted"] > 100
        assert said["drafts"] - said["accepted"] > 1000
        kara.assert_nothing_leaks()


@pytest.mark.parametrize("stride", [1, 2])
def test_lists_are_the_best_by_queries_of_accepted_tokens(few, dense, trace, stride):
    """A window and its tail are scored by all of their own queries, though rejected drafts were recorded after them."""
    policy = {**KARA, "query_stride": stride, "query_dtype": "auto", "chunk_fraction": 0.0, "reduction": "mean",
              "value_norm": False}  # fmt: skip
    with engine(few, policy, trace=trace, **SPECULATIVE) as kara:
        for served in kara.generate(texts(5, 77), greedy(320)):
            events = kara.events_of(served.request_id)
            assert len(events) >= 3
            scores = dense.scores(served, events, stride, ahead=KARA["window"])
            for event, of_window in zip(events, scores, strict=True):
                assert short_of_best(event, of_window) < 1e-5


def test_preemption_in_a_tiny_pool(few, dense, trace):
    """Drafts need blocks before their tokens exist, and a recomputed text ends with a step of drafts."""
    tiny = {"max_model_len": 416, "num_gpu_blocks_override": 18}
    whole = {"pressure_window": 64, "pressure_keep": 32}
    with engine(few, {**KARA, **whole}, trace=trace, **SPECULATIVE, **tiny) as kara:
        served = kara.generate(texts(5, 40, 77, 30, 51), greedy(300))
        assert sum(len(request.recomputed) for request in served) >= 2
        dense.assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()


def test_a_block_is_shared_after_drafts_were_rejected_in_it(few, dense, trace):
    with engine(few, KARA, trace=trace, **SPECULATIVE) as kara:
        first = kara.generate(texts(40), asking(False, 100))[0]
        again = kara.generate([[*first.prompt, *first.tokens]], greedy(150))
        assert again[0].cached == 128
        dense.assert_equal(kara, again, compressions=1)


def scheduler_of(request, blocks):
    """A scheduler with one running request of that many blocks, and no free block."""
    made = object.__new__(KaraScheduler)
    pool = SimpleNamespace(get_num_free_blocks=lambda: 0)
    made._manager = SimpleNamespace(block_size=32, req_to_blocks={"a": range(blocks)}, block_pool=pool, in_chunks=True)
    made._others, made.running, made.num_prefill_lookahead = [], [request], 1
    made._ledger = SimpleNamespace(dropped=lambda name: 0, chunk=lambda *given, **own: 2)
    return made


@pytest.mark.parametrize(("computed", "drafts", "lacking"), [(30, 1, 0), (30, 2, 1), (31, 0, 0), (32, 0, 1)])
def test_blocks_that_drafts_need_are_lacking(computed, drafts, lacking):
    request = SimpleNamespace(request_id="a", num_computed_tokens=computed, spec_token_ids=[1] * drafts)
    assert scheduler_of(request, 1)._lacking_blocks() == lacking


@pytest.mark.parametrize(("computed", "scheduled", "most"), [(50, 6, 6), (60, 6, 2), (99, 6, 6)])
def test_drafts_of_the_newest_token_are_never_cut_off(computed, scheduled, most):
    """A preempted request of 100 tokens, 56 of them its prompt, that is recomputed: the rest of its text in chunks."""
    own = SimpleNamespace(own={})
    request = SimpleNamespace(
        request_id="a", num_tokens=100, num_prompt_tokens=56, num_preemptions=1, kara=own, spec_token_ids=[]
    )
    assert scheduler_of(request, 2)._reserve_prefill_lookahead(request, computed, scheduled) == most


def test_the_ring_has_rows_for_rejected_drafts(few):
    def rows(kara, **options):
        return ring_rows(configure(few, {**KARA, **kara}, **options))

    assert (rows({}), rows({}, **SPECULATIVE)) == (40, 43)
    assert rows({"query_stride": 1}, **SPECULATIVE) == 80 + 5
    assert rows({"scorer": "knorm", "query_stride": 1}, **SPECULATIVE) == 0


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"method": "ngram_gpu"}, {}, "ngram_gpu"),
        ({}, {"additional_config": {"kara": KARA, "contexts": {}}}, "ngram"),
    ],
    ids=["asynchronous drafts", "contexts"],
)
def test_what_cannot_be_combined_is_refused(few, changes, options, words):
    with pytest.raises(
        ValueError, match=rf"got speculative decoding other than by n-grams, or with contexts .*: {words} "
    ):
        configure(few, KARA, speculative_config={**NGRAMS, **changes}, **options)
