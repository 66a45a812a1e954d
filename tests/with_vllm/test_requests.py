"""What a request may ask of Kara, which of it is refused, and what happens if it asks for nothing."""

import json

import pytest
from harness import KARA, asking, configure, engine, greedy, prompts
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from kara_kernels.integrations.vllm import requests, settings
from kara_kernels.integrations.vllm.windows import runner


def chosen(kara, tokens=280, **more):
    """What becomes of a request that asks for `kara`, or for nothing (...), with more settings of the server."""
    of_server = settings.settings_in({"kara": {**KARA, **more}})
    return requests.choose(asking(kara, tokens), of_server, 32)


WINDOWS = {"windows": [96, 40]}


@pytest.mark.parametrize(
    ("kara", "more", "own"),
    [
        (..., {}, {}),
        (True, {}, {}),
        (1, {}, {}),  # what vLLM's server makes of true
        ("true", {}, {}),
        ({}, {}, {}),
        ({"keep": 8}, {}, {"keep": 8}),
        ('{"keep": 8}', {}, {"keep": 8}),
        ({"window": 64}, {}, {"window": 64}),
        ({"window": 96}, WINDOWS, {"window": 96}),
        ({"window": 40, "keep": 39}, WINDOWS, {"window": 40, "keep": 39}),
        (True, {"default": "off"}, {}),
        ({"keep": 8}, {"default": "off"}, {"keep": 8}),
        ({"keep": 60}, {"max_loss": 0.1, "max_keep": 40}, {"keep": 60}),
    ],
)
def test_who_is_compressed_and_how(kara, more, own):
    assert chosen(kara, **more) == (own, "")


@pytest.mark.parametrize("default", ["on", "off"])
@pytest.mark.parametrize("no", [False, 0, "false"])
def test_who_says_no_is_left_alone(no, default):
    assert chosen(no, default=default) == (None, "request")


def test_compression_may_be_asked_for_instead():
    assert chosen(..., default="off") == (None, "default")


@pytest.mark.parametrize(
    ("least", "more"), [(80, {}), (80, {"min_output_tokens": None}), (5, {"min_output_tokens": 5})]
)
def test_short_answers_are_left_alone_unless_they_ask(least, more):
    """By default, those that cannot fill the window of 64 and the tail of 16."""
    assert chosen(..., least - 1, **more) == (None, "short")
    assert chosen(..., least, **more) == ({}, "")
    assert chosen(True, least - 1, **more) == ({}, "")
    assert chosen({"keep": 8}, least - 1, **more) == ({"keep": 8}, "")
    assert chosen(False, least, **more) == (None, "request")
    assert chosen(..., least - 1, default="off", **more) == (None, "default")


REFUSED = [
    ("yes", "kara: expected true, false or an object such as {\"keep\": 32}, got 'yes'"),
    ("[1]", 'kara: expected true, false or an object such as {"keep": 32}, got [1]'),
    ("[" * 10**6, "kara: expected true, false or an object such as {\"keep\": 32}, got '[[[[[[[[[[[[...[[[[[[[[[[[[['"),
    (None, 'kara: expected true, false or an object such as {"keep": 32}, got None'),
    (2, 'kara: expected true, false or an object such as {"keep": 32}, got 2'),
    (1.0, 'kara: expected true, false or an object such as {"keep": 32}, got 1.0'),
    ({"kep": 8}, "kara: kep: expected one of keep, window, got kep"),
    ('{"\\ud800\\n": 8}', "kara: \\ud800\\n: expected one of keep, window, got \\ud800\\n"),
    ({"tail": 8, "keep": 8}, "kara: tail: expected one of keep, window, got tail"),
    ({"keep": 0}, "kara: keep: expected 1..63, got 0"),
    ({"keep": 64}, "kara: keep: expected 1..63, got 64"),
    ('{"keep": 64}', "kara: keep: expected 1..63, got 64"),
    ({"keep": "8"}, "kara: keep: expected an int, got str"),
    ({"keep": True}, "kara: keep: expected an int, got bool"),
    ({"keep": None}, "kara: keep: expected an int, got NoneType"),
    ({"window": 65}, "kara: window: expected one of 64, as the server's setting windows lists them, got 65"),
]


@pytest.mark.parametrize(("kara", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_name_expected_and_got(kara, message):
    for error in (ValueError, VLLMValidationError):  # what vLLM's server shows to the client
        with pytest.raises(error) as caught:
            chosen(kara)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kara", "message"),
    [
        ({"window": 50}, "kara: window: expected one of 40, 64, 96, .*, got 50"),
        ({"window": 96, "keep": 96}, r"kara: keep: expected 1\.\.95, got 96"),
        ({"window": 40, "keep": 40}, r"kara: keep: expected 1\.\.39, got 40"),
    ],
)
def test_windows_of_requests_are_those_of_the_server(kara, message):
    with pytest.raises(ValueError, match=message):
        chosen(kara, **WINDOWS)


def test_a_keep_that_could_never_free_enough_blocks_is_refused():
    with pytest.raises(ValueError, match=r"kara: min_freed_blocks: expected at most 1, .* dropping 4 of 64 tokens"):
        chosen({"keep": 60}, min_freed_blocks=2, keep=16)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"default": "maybe"}, "kara: default: expected one of 'on', 'off', got 'maybe'"),
        ({"min_output_tokens": -1}, r"kara: min_output_tokens: expected 0\.\..*, got -1"),
        ({"windows": 96}, "kara: windows: expected a list, got int"),
        ({"windows": ["96"]}, "kara: windows: window: expected an int, got str"),
        ({"windows": [1]}, r"kara: windows: window: expected 2\.\.4096, got 1"),
        ({"windows": [16]}, "kara: windows: window: expected at least one block of 32 tokens, got 16"),
    ],
)
def test_settings_of_the_server_are_checked_at_start_up(model, more, message):
    with pytest.raises(ValueError, match=message):
        configure(model, {**KARA, **more})


def test_the_ring_is_sized_for_the_largest_window(model):
    def config(**more):
        return configure(model, {"window": 64, "keep": 32, "tail": 16, **more}, max_num_seqs=100)

    most = 216 * (256 + 16) * 100 / 2**30  # in four bits, 3 layers of 4 heads of 32 take 216 bytes per query
    fits = settings.settings_of(config(windows=[256], max_query_gib=1.01 * most))
    assert (fits.policy.query_stride, fits.query_rows) == (1, 272)
    assert settings.settings_of(config(windows=[256], max_query_gib=0.99 * most)).policy.query_stride == 2
    assert settings.settings_of(config(max_query_gib=0.99 * most)).query_rows == 80
    hashes = {config(**more).additional_config.compute_hash() for more in ({}, {"windows": [48]}, {"windows": [256]})}
    assert len(hashes) == 2


def test_every_window_is_compiled_at_the_start(model, monkeypatch):
    warmed = []
    monkeypatch.setattr(runner, "warm_up", lambda cache, ring, policy, **options: warmed.append(policy.window))
    with engine(model, {**KARA, **WINDOWS}):
        assert warmed == [64, 96, 40]


def test_bad_requests_are_refused_before_they_reach_the_engine(model, dense, trace):
    with engine(model, trace=trace) as kara:
        for bad, message in REFUSED:
            with pytest.raises(ValueError, match="kara: ") as caught:
                kara.generate(prompts(5, 40), [greedy(20), asking(bad, 20)])
            assert str(caught.value) == message
        kara.assert_nothing_leaks()
        served = kara.generate(prompts(5, 40), asking(True, 200))
        dense.assert_equal(kara, served, compressions=2)


def test_a_bad_request_that_no_front_end_checked_is_left_alone(model, dense, trace, monkeypatch):
    """vLLM's front end in Rust runs no plugins in Python."""
    monkeypatch.setattr(requests, "check", lambda params, config: None)
    with engine(model, trace=trace) as kara:
        served = kara.generate(prompts(5), asking({"keep": 64}))
        dense.assert_equal(kara, served, compressions=0)
        assert kara.events() == []
        dense.assert_equal(kara, kara.generate(prompts(5), greedy(280)), compressions=3)


def test_vllm_without_kara_does_not_look(model):
    with engine(model, KARA) as kara:
        kara.generate(prompts(5), greedy(3))
    with engine(model, None) as plain:
        (served,) = plain.generate(prompts(5), asking({"kep": "none"}, 20))
        assert len(served.tokens) == 20


def test_who_is_left_alone_records_nothing(model, trace):
    with engine(model, {**KARA, "default": "off"}, trace=trace) as kara:
        ring = kara.runner.kara_ring
        recorded = []
        prepare = ring.prepare
        ring.prepare = lambda spans: recorded.append(prepare(spans))
        kara.generate(prompts(5, 40), greedy(120))
        assert recorded
        assert not any(recorded)
        assert ring.sequences == 0


def test_several_samples_of_one_prompt_are_told_apart_in_the_trace(model, trace):
    """Of `n` samples, sample `i` has the client's id with `i_` before it."""
    sampling = SamplingParams(n=2, temperature=0.8, seed=1, max_tokens=120, ignore_eos=True)
    with engine(model, trace=trace) as kara:
        kara.llm.llm_engine.add_request("mine", {"prompt_token_ids": prompts(5)[0]}, sampling)
        while kara.llm.llm_engine.has_unfinished_requests():
            kara.llm.llm_engine.step()
        assert {json.loads(line)["request_id"] for line in trace.read_text().splitlines()} == {"0_mine", "1_mine"}
