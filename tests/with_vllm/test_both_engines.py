"""Windows and contexts in engines of their own: two ranks, and random days compared with the dense model."""

import random

import pytest
import torch
from both_harness import allow, serving_both
from contexts_harness import ON, Server
from harness import KARA, MODES, ON_GPU, engine, greedy, prompts


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", ["none/int8", "keydiff/int8"])
def test_two_tensor_parallel_ranks(model, trace, method):
    """Every rank stores, loads, records and moves its own heads."""
    document, question = prompts(256, 9, seed=41)
    contexts = {**ON, "methods": [method], "profile": str(trace.with_name("profile.json"))}
    settings = {"additional_config": {"kara": {**KARA, "trace": str(trace)}, "contexts": contexts}}
    sampling = greedy(180, extra_args={"kv_transfer_params": {"context_tokens": 256}})
    said = []
    for ranks in (1, 2):
        with engine(model, None, tensor_parallel_size=ranks, **settings) as some:
            some.trace, server = trace, Server(some.llm, model)
            if method != "none/int8":
                allow(server, [document], lambda: method, lambda steps: steps[:1])
            server.ask(document + question, context_tokens=256)
            server.forget()
            (served,) = some.generate([document + question], sampling)
            assert server.manager.counts["hits", "ram"] == 1
            assert len(some.events_of(served.request_id)) == 2 * ranks  # of both engines: they number requests alike
            said.append(served.tokens)
            server.assert_nothing_leaks()
            some.assert_nothing_leaks()
    assert said[0] == said[1]


def drawn(seed):
    draw = random.Random(seed)
    window = draw.choice([33, 48, 64])
    policy = {
        "window": window,
        "keep": draw.randrange(1, window),
        "tail": draw.choice([0, 16, 50]),
        "period": draw.choice([1, 3]),
        "max_sequences": draw.choice([1, 4]),
        "query_stride": draw.choice([1, 2]),
        "pool": draw.choice(["head", "layer"]),
        "protected": draw.choice([0, 0, 300]),
    }
    options = {
        "max_model_len": 512,
        "num_gpu_blocks_override": 18 + draw.randrange(14),
        "max_num_batched_tokens": draw.choice([32, 100, 2048]),
        "max_num_seqs": draw.choice([3, 6]),
    }
    return draw, policy, options


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", MODES)
def test_a_random_day(model, dense, trace, seed, mode, monkeypatch):
    """Blocks for two requests, room for three packets of four, transfers of many steps. Requests arrive, also with a
    second turn, are preempted, and aborted in the middle of loads. Some are left alone by one or both. On every second
    day contexts lose rows."""
    draw, policy, options = drawn(seed)
    documents, questions = prompts(*[128, 192, 192, 224], seed=seed), prompts(7, 12, 30, seed=seed + 100)
    little = {**ON, "ram_gib": 3.3 * 96_000 / 2**30, "grain_kib": 4}
    if seed % 2:
        little |= {"methods": ["keydiff/int8", "knorm/int4"], "profile": str(trace.with_name("profile.json"))}
        little["ram_gib"] /= 2

    def arrive(name):
        def event(both):
            document = draw.choice(documents[:2] + documents)
            prompt, tokens = document + draw.choice(questions), draw.randrange(20, 200)
            if both.engine.said and draw.random() < 0.2:  # continues another request's text
                other = draw.choice(sorted(both.engine.said))
                prompt = (both.engine.prompts[other] + both.engine.said[other])[:400]
            params = draw.choice([{"context_tokens": len(document)}] * 4 + [{}, {"contexts": False}])
            own = draw.choice([..., ..., True, False, {"keep": draw.randrange(1, policy["window"])}])
            both.add(str(name), prompt, min(tokens, 512 - len(prompt)), own, **params)

        return event

    events, step = {}, 0
    for name in range(24):
        step += draw.randrange(30)
        events[step] = arrive(name)
        if draw.random() < 0.3:
            events[step + 1] = lambda both: both.abort_some(draw)
        if draw.random() < 0.3:
            events[step + 2] = lambda both: both.server.llm.reset_prefix_cache()
    with serving_both(model, trace, policy, little, mode=mode, **options) as both:
        drops = []
        if seed % 2:
            other = random.Random(seed)
            allow(
                both, documents, lambda: other.choice(little["methods"]), lambda steps: steps[: other.randrange(1, 5)]
            )
        admit = both.scheduler._ledger.admit
        both.scheduler._ledger.admit = lambda name, dropped: (drops.append(dropped), admit(name, dropped))
        both.take_longer(monkeypatch, store=0.4, load=0.05)
        served = both.drive(events)
        both.assert_nothing_leaks()
        counts = both.manager.counts
        assert len(served) >= 12
        assert counts["hits", "ram"] + counts["hits", "gpu"] >= 2
        dense.assert_equal(both.engine, served.values(), compressions=0)
        assert both.engine.events()
        assert any(drops) == bool(seed % 2)
