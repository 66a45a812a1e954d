"""Conversations in engines of their own: windows without a tail, restarts, ranks, and random days."""

import random

import pytest
import torch
from both_harness import TAILED, TALKING, serving_both, stored, turn
from contexts_harness import Server
from harness import KARA, MODES, ON_GPU, engine, greedy, prompts


@pytest.mark.parametrize("mode", MODES)
def test_a_window_that_reaches_the_last_block_leaves_nothing(model, dense, trace, mode):
    """Without a tail, windows may end behind the last whole block. Its rows are then no longer those of its tokens."""
    first, question = prompts(60, 9, seed=316)
    with serving_both(model, trace, {**KARA, "tail": 0}, TALKING, mode=mode) as both:
        both.dense, lengths, whole = dense, (120, 129, 130, 132, 134, 150, 196), set()
        for length in lengths:
            for known in list(both.manager._known._known.values()):
                both.manager.forget(known.place)
            served, text = turn(both, f"length-{length}", [], first, length)
            end = max(event["logical_len"] for event in both.engine.events_of(served.request_id))
            tokens = (len(text) - 1) // 32 * 32
            assert [place.tokens for place in stored(both)] == [tokens] * (end <= tokens), length
            two, _ = turn(both, f"next-{length}", text, question, 20)
            assert (two.rows[0] is not None) == (end <= tokens)
            dense.assert_equal(both.engine, [two], compressions=0)
            whole.add(end <= tokens)
        assert whole == {True, False}
        both.assert_nothing_leaks()


def test_a_restarted_server_goes_on_from_its_disk(model, dense, trace, tmp_path):
    first, question = prompts(80, 9, seed=317)
    contexts = {**TALKING, "disk": {"path": str(tmp_path / "disk"), "gib": 0.1}}
    with serving_both(model, trace, TAILED, contexts) as both:
        both.dense = dense
        _, text = turn(both, "disk-0", [], first, 200)
        (place,) = stored(both)
        both.manager.keeper.placement.resize("ram", 0)
        both.scheduler.schedule()
        both.server.rest()
        assert both.manager.keeper.get(place.key).tier == "disk"
        both.assert_nothing_leaks()
        earlier = both.served, both.left_by
    with serving_both(model, trace, TAILED, contexts) as both:
        both.dense, (both.served, both.left_by) = dense, earlier
        assert stored(both) == [place]
        two, _ = turn(both, "disk-1", text, question, 150)
        assert both.manager.counts["hits", "disk"] == 1
        assert two.rows[0][2].shape[2] == place.rows
        dense.assert_equal(both.engine, [two], compressions=1)
        both.server.rest()
        both.manager.keeper.placement.resize("ram", 0)
        both.scheduler.schedule()
        both.server.rest()
        assert both.manager.keeper.get(place.key).tier == "disk"
        both.assert_nothing_leaks()
    with serving_both(model, trace, TAILED, {**contexts, "conversations": False}) as both:
        assert stored(both) == []
        alone, _ = turn(both, "disk-2", text, question, 12)
        assert alone.rows[0] is None


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_tensor_parallel_ranks(model, trace):
    """Every rank stores and loads its own heads."""
    first, question = prompts(60, 9, seed=318)
    settings = {"additional_config": {"kara": {**TAILED, "trace": str(trace)}, "contexts": TALKING}}
    said = []
    for ranks in (1, 2):
        with engine(model, None, tensor_parallel_size=ranks, **settings) as some:
            server = Server(some.llm, model)
            (one,) = some.generate([first], greedy(200))
            server.forget()
            (two,) = some.generate([one.prompt + one.tokens + question], greedy(60))
            assert server.manager.counts["hits", "ram"] == 1
            said.append(two.tokens)
            server.assert_nothing_leaks()
            some.assert_nothing_leaks()
    assert said[0] == said[1]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_random_day_of_conversations(model, dense, trace, seed, mode, monkeypatch):
    """Several conversations, interleaved and branched, in blocks for two requests and with room for few packets.
    Transfers take many steps. Some turns opt out, are preempted or aborted, and windows have any tail."""
    draw = random.Random(seed)
    window = draw.choice([33, 48, 64])
    policy = {
        "window": window, "keep": draw.randrange(1, window), "tail": draw.choice([0, 16, 40]),
        "query_stride": draw.choice([1, 2]), "max_sequences": draw.choice([1, 4]),
    }  # fmt: skip
    options = {
        "max_model_len": 640, "num_gpu_blocks_override": 22 + draw.randrange(10),
        "max_num_batched_tokens": draw.choice([48, 100, 2048]), "max_num_seqs": draw.choice([3, 6]),
    }  # fmt: skip
    little = {**TALKING, "ram_gib": (4 + 4 * draw.random()) * 400_000 / 2**30, "grain_kib": 4}
    texts, turns, opted_out = {i: prompts(90, seed=seed * 10 + i)[0] for i in range(3)}, dict.fromkeys(range(3)), {}

    def arrive(name):
        def event(both):
            talk = draw.choice(sorted(texts))
            if turns[talk] in both.engine.said and draw.random() < 0.9:  # else it says something else
                texts[talk] = (both.engine.prompts[turns[talk]] + both.engine.said[turns[talk]])[:480]
            turns[talk] = f"{talk}.{name:02}"
            prompt = texts[talk] + prompts(draw.randrange(1, 40), seed=1000 + name)[0]
            own = draw.choice([..., ..., ..., ..., True, False, {"keep": draw.randrange(1, window)}])
            params = draw.choice([{}, {}, {}, {}, {"contexts": False}])
            both.add(turns[talk], prompt, draw.randrange(60, min(240, 640 - len(prompt))), own, **params)
            opted_out[turns[talk]] = own is False or bool(params)

        return event

    events, step = {}, 0
    for name in range(28):
        step += draw.randrange(120)
        events[step] = arrive(name)
        if draw.random() < 0.15:
            events[step + 1] = lambda both: both.abort_some(draw)
        if draw.random() < 0.5:
            events[step + 2] = lambda both: both.server.llm.reset_prefix_cache()
    with serving_both(model, trace, policy, little, mode=mode, **options) as both:
        both.dense = dense
        both.take_longer(monkeypatch, store=0.05, load=0.02)
        served = both.drive(events)
        both.assert_nothing_leaks()
        dense.assert_equal(both.engine, served.values(), compressions=0)
        went_on = {name for name, x in served.items() if both.went_on(name)}
        assert went_on
        assert not any(opted_out[name] for name in went_on)
