"""Watching before anything is dropped, the guard of the loss, and settings that change while the server runs."""

import json
import os
from itertools import groupby

import pytest
import torch
from harness import KARA, MODES, asking, configure, engine, greedy, prompts
from prometheus_client import REGISTRY

from kara_kernels.integrations.vllm import live, watched

# Scores are then the attention that a token receives, which the dense model knows.
PLAIN = {
    **KARA,
    "query_stride": 1,
    "query_dtype": "auto",
    "look_ahead": 0,
    "reduction": "mean",
    "value_norm": False,
    "chunk_fraction": 0.0,
}


def counter(model, name):
    return REGISTRY.get_sample_value(f"kara:{name}", {"model_name": model, "engine": "0"}) or 0.0


def lost_by(scores, kept):
    """The mean over layers and heads of ``[L, H, W]`` scores, of the share of tokens that are not in the lists."""
    return float((1 - scores.gather(2, torch.tensor(kept)).sum(2) / scores.sum(2)).mean())


@pytest.mark.parametrize("mode", MODES)
def test_a_shadow_changes_nothing_and_says_what_would_be(model, dense, trace, mode):
    given, sampling = prompts(5, 40, 77), greedy(280)
    tight = {"num_gpu_blocks_override": 25, "max_model_len": 416}
    with engine(model, None, mode=mode, **tight) as plain:
        expected, peak = plain.generate(given, sampling), plain.peak
        again = plain.generate([given[0] + expected[0].tokens], sampling)
    names = "compressions_total", "shadow_compressions_total", "shadow_tokens_dropped_total", "request_lost_count"
    before = [counter(model, name) for name in names]
    with engine(model, {**PLAIN, "shadow": True}, trace=trace, mode=mode, disable_log_stats=False, **tight) as kara:
        served = kara.generate(given, sampling)
        assert [x.tokens for x in served] == [x.tokens for x in expected]
        assert [x.recomputed for x in served] == [x.recomputed for x in expected]
        assert kara.peak == peak
        events = kara.events()
        assert len(events) >= 9
        assert all(event["physical_len_before"] == event["logical_len"] for event in events)
        assert not any(event["moved"] for event in events)
        for request in served:
            mine = kara.events_of(request.request_id)
            windows = [event["window_start"] for event in mine if not event["recomputed_len"]]
            assert windows == [len(request.prompt) + 64 * i for i in range(len(windows))]
            for event, scores in zip(mine, dense.scores(request, mine, 1, moved=False), strict=True):
                assert event["lost"] == pytest.approx(lost_by(scores, event["keep_indices"]), abs=1e-4)
        # Nothing was compressed, so decoded text is found in the prefix cache as without Kara.
        found = kara.generate([given[0] + served[0].tokens], sampling)
        assert (found[0].cached, found[0].tokens) == (again[0].cached, again[0].tokens)
        kara.assert_nothing_leaks()
        told = len(kara.events())
    counts = [counter(model, name) - had for name, had in zip(names, before, strict=True)]
    assert counts == [0, told, 32 * told, 4]


@pytest.mark.parametrize("mode", MODES)
def test_the_guard_keeps_what_the_last_window_needed(model, dense, trace, mode):
    limit = 0.12
    bounds = {"min_keep": 20, "max_keep": 60}
    with engine(model, {**PLAIN, **bounds, "max_loss": limit}, trace=trace, mode=mode) as kara:
        served = kara.generate(prompts(5, 40, 77), [greedy(400), greedy(400), asking({"keep": 32}, 400)])
        dense.assert_equal(kara, served, compressions=3)
        keeps = set()
        for request in served[:2]:
            events = kara.events_of(request.request_id)
            assert events[0]["keep"] == 32
            found = dense.scores(request, events, 1)
            for event, scores, following in zip(events, found, events[1:], strict=False):
                assert event["lost"] == pytest.approx(lost_by(scores, event["keep_indices"]), abs=1e-4)
                best = scores.sort(2, descending=True).values.cumsum(2) / scores.sum(2, keepdim=True)
                lost = 1 - best.mean((0, 1))  # of the best 1, 2, ... tokens
                keep = following["keep"]
                assert lost[keep - 1] < limit + 1e-4 or keep == 60
                assert lost[keep - 2] > limit - 1e-4 or keep == 20
                keeps.add(keep)
        assert len(keeps) >= 3
        assert {event["keep"] for event in kara.events_of(served[2].request_id)} == {32}


def test_a_request_that_loses_too_much_is_left_whole(model, dense, trace):
    with engine(model, {**KARA, "max_loss": 0.0}, trace=trace) as kara:
        served = kara.generate(prompts(5, 40), greedy(300))
        assert [len(kara.events_of(request.request_id)) for request in served] == [1, 1]
        dense.assert_equal(kara, served, compressions=1)
        kara.assert_nothing_leaks()


def test_settings_change_while_requests_run(model, dense, trace, tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "SECONDS", 0.0)
    path = tmp_path / "kara.json"

    def write(text):
        def event(kara):
            (tmp_path / "new").write_text(text)
            os.replace(tmp_path / "new", path)

        return event

    errors = []
    monkeypatch.setattr(live.logger, "error", lambda text, *values: errors.append(text % values))
    with engine(model, {**KARA, "live": str(path)}, trace=trace) as kara:
        served = kara.drive(
            {
                0: lambda kara: (kara.add("A", prompts(20)[0], 600), kara.add("B", prompts(9)[0], 600, {"keep": 50})),
                100: write(json.dumps({"keep": 8})),
                200: write("{"),
                220: write(json.dumps({"keep": 64})),
                240: write(json.dumps({"window": 32})),
                260: write(json.dumps([8])),
                300: write(json.dumps({"keep": 40, "default": "off"})),
                301: lambda kara: kara.add("C", prompts(30)[0], 200),
                430: lambda kara: path.unlink(),
            }
        )
        assert {event["keep"] for event in kara.events_of("B")} == {50}
        assert not kara.events_of("C")
        assert [keep for keep, _ in groupby(event["keep"] for event in kara.events_of("A"))] == [32, 8, 40, 32]
        dense.assert_equal(kara, served.values(), compressions=0)
        kara.assert_nothing_leaks()
    assert len(errors) == 4
    for error, words in zip(
        errors, ("Expecting", "keep: expected 1..63", "window: expected one of", "list"), strict=True
    ):
        assert str(path) in error
        assert words in error


@pytest.mark.parametrize(("kara", "words"), [({"shadow": 1}, "shadow"), ({"live": 3}, "live")])
def test_wrong_settings_are_refused(model, kara, words):
    with pytest.raises(ValueError, match=f"kara: {words}: expected"):
        configure(model, {**KARA, **kara})
