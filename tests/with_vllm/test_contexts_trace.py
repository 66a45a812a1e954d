"""The trace of contexts in engines: requests as their clients know them, and numbers as metrics have them."""

import json
from collections import Counter, defaultdict

import pytest
from contexts_harness import ON, serving
from harness import MODES, prompts
from test_contexts_engines import with_disk
from vllm.engine.arg_utils import EngineArgs

from kara_kernels.integrations.vllm.contexts.trace import EVENTS, Event


def lines(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(tuple(line) == Event._fields for line in found)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_hit_and_every_place_is_told(model, tmp_path, mode):
    path = tmp_path / "trace"
    documents, (question,) = prompts(*[256] * 7, seed=61), prompts(9, seed=62)
    with serving(model, with_disk(tmp_path / "store", trace=str(path)), mode=mode) as some:
        names, generate = defaultdict(set), some.llm.generate

        def named(given, *args, **kwargs):
            outputs = generate(given, *args, **kwargs)
            for prompt, output in zip(given, outputs, strict=True):
                names[some.place_of(prompt["prompt_token_ids"], 256).key].add(output.request_id)
            return outputs

        some.llm.generate = named
        for _ in range(3):
            for document in documents:
                some.ask(document + question, context_tokens=256)
                some.ask(document + question, context_tokens=256)
                some.forget()
        counts = dict(some.manager.counts)
        some.ask(documents[0] + question, context={"method": "none/int8", "ratio": 0.5})  # it measures
        some.rest()
        told = lines(path)
        copies = {copy.key: (copy.tier, copy.option.nbytes) for copy in some.manager.keeper.directory.copies()}
    held = {}
    for line in told:
        if line["event"] == "dropped":
            del held[line["context"]]
        elif line["event"] != "hit":
            held[line["context"]] = line["tier"], line["nbytes"]
        if line["event"] in ("stored", "hit"):
            assert line["request_id"] in names[line["context"]]
        else:
            assert line["request_id"] is None
        assert line["tokens"] == 256
        assert line["time"] == pytest.approx(told[0]["time"], abs=600)
    assert held == copies
    hits = [line for line in told if line["event"] == "hit"]
    assert Counter(line["tier"] for line in hits) == {x: n for (name, x, *_), n in counts.items() if name == "hits"}
    assert {line["tier"] for line in hits} >= {"ram", "disk", "gpu"}
    for tier in ("ram", "disk", "gpu"):
        predicted = sum(line["predicted_seconds"] for line in hits if line["tier"] == tier)
        assert predicted == pytest.approx(counts["first_token_seconds", tier, "predicted"])
        assert all((line["nbytes"] == 0) == (tier == "gpu") for line in hits if line["tier"] == tier)
    assert {"stored", "hit", "moved"} <= {line["event"] for line in told} <= set(EVENTS)
    path.unlink()
    with serving(model, with_disk(tmp_path / "store", trace=str(path)), mode=mode):  # a restart
        found = [(line["event"], line["context"], (line["tier"], line["nbytes"])) for line in lines(path)]
    assert sorted(found) == sorted(("found", key, where) for key, where in held.items() if where[0] == "disk")


def test_damage_is_told(model, tmp_path):
    path = tmp_path / "trace"
    document, question = prompts(256, 9, seed=21)
    with serving(model, {**ON, "trace": str(path)}) as some:
        some.ask(document + question, context_tokens=256)
        some.forget()
        copy = some.manager.keeper.get(some.place_of(document + question, 256).key)
        some.worker._region[some.manager.transfers._held[copy.number][-1], 5] ^= 1
        some.ask(document + question, context_tokens=256)
        some.rest()
    told = [(line["event"], line["request_id"], line["context"]) for line in lines(path)]
    assert told == [
        ("stored", "0", copy.key), ("hit", "1", copy.key), ("damaged", "1", copy.key), ("dropped", None, copy.key),
        ("stored", "1", copy.key),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (7, "contexts: trace: expected a file name, got 7"),
        ("", "contexts: trace: expected a file name, got ''"),
        ("/nowhere/trace", "contexts: trace: expected a file that can be written, got /nowhere/trace: No such file"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_at_start_up(model, given, expected):
    with pytest.raises(ValueError, match=expected):
        EngineArgs(model=model, additional_config={"contexts": {"trace": given}}).create_engine_config()
