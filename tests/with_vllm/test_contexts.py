"""Contexts in vLLM: what is admitted out of packets, against a dense model that is fed the rows of the same packets."""

import random
import time

import pytest
from contexts_harness import serving
from harness import MODES, prompts

from kara_kernels.integrations.vllm.contexts.halves import PAUSE


@pytest.fixture(scope="module", params=MODES)
def server(model, request):
    with serving(model, mode=request.param) as some:
        yield some


def test_rows_of_a_packet_answer_as_a_dense_model_with_them(server):
    document, *questions = prompts(256, 9, 5, 31, seed=3)
    exact = server.ask(document + questions[0], context_tokens=256)
    server.forget()
    for question in questions:
        prompt = document + question
        assert server.ask(prompt, context_tokens=256) == [server.judge(prompt, 256)]
    assert server.manager.counts["hits", "ram"] == 1
    assert server.manager.counts["hits", "gpu"] == 2
    assert server.ask(document + questions[0], contexts=False) == exact
    server.assert_nothing_leaks()


def test_an_engine_that_computes_nothing_lets_a_load_run(server, monkeypatch):
    """Instead of asking for its end all the time, on the core that it needs."""
    (document,) = prompts(137, seed=5)
    server.ask(document, context_tokens=128)
    server.forget()
    load, build, steps = server.worker._load, server.connector.contexts.build, []
    monkeypatch.setattr(server.worker, "_load", lambda job: (time.sleep(0.5), load(job)))
    monkeypatch.setattr(server.connector.contexts, "build", lambda output: (steps.append(output), build(output))[1])
    began = time.perf_counter()
    assert server.ask(document, context_tokens=128) == [server.judge(document, 128)]
    idle = sum(not output.total_num_scheduled_tokens for output in steps)
    assert 10 < idle < (time.perf_counter() - began) / PAUSE + 5
    server.assert_nothing_leaks()


def test_lossy_rows_never_reach_who_asks_for_exact_ones(server):
    """Whatever order requests come in, those that opted out are answered as by vLLM alone."""
    draw = random.Random(0)
    documents = prompts(*[192] * 4, seed=7)
    asked = [(d, q) for d in documents for q in prompts(7, 12, seed=8)]
    server.forget()
    alone = {}
    for document, question in asked:
        alone[tuple(document + question)] = server.ask(document + question, contexts=False)
        server.forget()
    for _ in range(60):
        document, question = draw.choice(asked)
        prompt = document + question
        opted_out = draw.random() < 0.4
        said = server.ask(prompt, **({"contexts": False} if opted_out else {"context_tokens": 192}))
        if opted_out:
            assert said == alone[tuple(prompt)]
        if draw.random() < 0.3:
            server.forget()
    assert server.manager.counts["hits", "ram"] > 5
    assert server.manager.counts["hits", "gpu"] > 1
    server.assert_nothing_leaks()


def test_many_at_once_in_chunks(server):
    documents = prompts(*[224] * 3, seed=11)
    given = [document + question for document in documents for question in prompts(3, 17, 40, seed=12)]
    server.ask(*given, context_tokens=224)
    server.forget()
    for prompt, said in zip(given, server.ask(*given, context_tokens=224), strict=True):
        assert len(said) == 12, prompt
    server.assert_nothing_leaks()


def test_rows_that_lost_something_are_not_stored_again(server):
    document, question = prompts(256, 9, seed=57)
    server.ask(document + question, context_tokens=128)
    server.forget()
    stored = server.manager.counts["jobs", "store", "ok"]
    server.ask(document + question, context_tokens=256)  # admitted with the half that is stored
    server.rest()
    assert server.manager.counts["jobs", "store", "ok"] == stored
    assert server.manager.keeper.get(server.place_of(document + question, 256).key) is None
    server.assert_nothing_leaks()


def test_a_damaged_packet_is_computed_again(server):
    document, question = prompts(256, 9, seed=21)
    prompt = document + question
    exact = server.ask(prompt, context_tokens=256)
    server.forget()
    place = server.place_of(prompt, 256)
    copy = server.manager.keeper.get(place.key)
    server.worker._region[server.manager.transfers._held[copy.number][-1], 5] ^= 1
    before = server.manager.counts["jobs", "load", "damaged"]
    salts = server.salts()
    assert server.ask(prompt, context_tokens=256) == exact
    assert salts == [None]  # it was computed under its own hashes
    assert server.manager.counts["jobs", "load", "damaged"] == before + 1, (server.manager.counts, server.manager.rates)
    server.forget()
    assert server.ask(prompt, context_tokens=256) == [server.judge(prompt, 256)]  # it was stored again
    assert salts[1].startswith("\0kara\0none/int8 ")
    server.assert_nothing_leaks()


def test_a_prefix_that_two_requests_share_becomes_a_context(server):
    document, *questions = prompts(300, 20, 20, 20, seed=23)
    hits = server.manager.counts["hits", "ram"]
    for question in questions:
        server.ask(document + question)
        server.forget()
    assert server.manager.counts["hits", "ram"] == hits + 1  # seen, stored, admitted
    server.assert_nothing_leaks()


def test_a_request_gets_the_compression_that_it_wants_and_is_told(server):
    """For measuring profiles. Others get what is stored, whatever was measured meanwhile."""
    document, question = prompts(256, 9, seed=71)
    prompt = document + question
    told = server.ask_and_hear(prompt, context_tokens=256)[0][1]
    assert told == {"context": {"source": "computed"}}
    assert server.ask_and_hear(prompt)[0][1] is None  # it has asked for nothing
    server.forget()
    hits = dict(server.manager.counts)
    place = server.place_of(prompt, 256)
    steps = [step for step in server.manager.catalogue._header(place.key, 256, "none/int8").steps if step.rows == 256]
    assert len(steps) == 5
    for source in ("ram", "gpu"):
        for step in steps:
            wanted = {"method": "none/int8", "ratio": step.ratio + 1e-4}
            ((said, told),) = server.ask_and_hear(prompt, context_tokens=256, context=wanted)
            assert told["context"] == {
                "source": source, "tokens": 256, "method": "none/int8", "ratio": step.ratio,
                "sections": step.sections, "nbytes": step.nbytes,
            }  # fmt: skip
            assert said == server.judge(prompt, 256, sections=step.sections)
    ((said, told),) = server.ask_and_hear(prompt, context={"method": "none/int4", "ratio": 0.3})
    assert told == {"context": {"source": "computed"}}  # nothing of that kind is stored
    assert said == server.ask(prompt, contexts=False)[0]
    assert {key: n for key, n in server.manager.counts.items() if key[0] == "hits"} == {
        key: n for key, n in hits.items() if key[0] == "hits"
    }
    server.forget()
    ((said, told),) = server.ask_and_hear(prompt, context_tokens=256)
    assert (told["context"]["source"], told["context"]["ratio"]) == ("ram", steps[-1].ratio)
    assert said == server.judge(prompt, 256)
    server.assert_nothing_leaks()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"context": "none/int8"}, "contexts: context: expected an object of method and ratio, got 'none/int8'"),
        ({"context": {"method": "none/int8"}}, "contexts: context: expected an object of method and ratio, got "),
        ({"context": {"method": "zip", "ratio": 1}}, "contexts: context: method: expected one of 'none/int8', "),
        ({"context": {"method": "none/int8", "ratio": "a"}}, "contexts: context: ratio: expected a number, got str"),
        ({"contexts": 1}, "contexts: expected true or false, got 1"),
        ({"context_tokens": 0}, "contexts: context_tokens: expected 1..2147483647, got 0"),
        ({"context_tokens": "all"}, "contexts: context_tokens: expected an int, got str"),
    ],
)
def test_requests_that_ask_for_what_cannot_be_are_refused(server, params, expected):
    with pytest.raises(ValueError, match=expected):
        server.ask([1, 2, 3], **params)
    server.assert_nothing_leaks()
