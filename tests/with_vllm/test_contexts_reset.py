"""vLLM's caches are reset, as after new weights: nothing of what was stored before may be admitted afterwards."""

import threading

import pytest
from both_harness import TAILED, TALKING, serving_both, stored, turn
from harness import MODES, greedy, prompts
from reset_harness import computed_anew, hits, is_stored, other_weights, reset


@pytest.fixture(scope="module", params=MODES)
def both(model, dense, request, tmp_path_factory):
    trace = tmp_path_factory.mktemp("reset") / "trace.jsonl"
    with serving_both(model, trace, TAILED, TALKING, mode=request.param) as some:
        some.dense = dense
        yield some


@pytest.fixture
def server(both):
    """The same engine. Answers are too short for windows."""
    return both.server


def held_back(monkeypatch, server, job):
    """Jobs of the worker wait for this event."""
    gate, body = threading.Event(), getattr(server.worker, job)
    monkeypatch.setattr(server.worker, job, lambda job: body(job) if gate.wait(60) else None)
    return gate


def add(server, name, prompt, tokens=12):
    sampling = greedy(tokens, extra_args={"kv_transfer_params": {"context_tokens": 256}})
    server.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def finish(server):
    while server.llm.llm_engine.has_unfinished_requests():
        server.llm.llm_engine.step()
    server.rest()


def test_rows_of_the_old_weights_are_never_admitted(server):
    document, question = prompts(256, 9, seed=400)
    prompt, resets = document + question, server.manager.counts["resets",]
    (old,) = server.ask(prompt, context_tokens=256)
    server.forget()
    assert is_stored(server, prompt)
    with other_weights(server):
        assert reset(server)
        assert server.manager.grains.free == server.manager.grains.count
        assert computed_anew(server, prompt) != old
        before = server.manager.counts["hits", "ram"]
        server.ask(prompt, context_tokens=256)  # it was stored again
        assert server.manager.counts["hits", "ram"] == before + 1
    assert reset(server)
    assert server.manager.counts["resets",] == resets + 2
    server.assert_nothing_leaks()


def test_what_is_being_stored_is_dropped(server, monkeypatch):
    """Of a request that runs, and loses its blocks by the reset."""
    if server.core.batch_queue is not None:
        pytest.skip("a step is always in flight while a store runs, and vLLM then resets nothing")
    (prompt,) = prompts(265, seed=401)
    gate, ended = held_back(monkeypatch, server, "_store"), server.manager.counts["jobs", "store", "ok"]
    add(server, "running", prompt, 20)
    while not server.manager.transfers.busy:
        server.llm.llm_engine.step()
    assert reset(server, running=True)
    threading.Timer(0.5, gate.set).start()
    finish(server)
    assert server.manager.counts["jobs", "store", "ok"] == ended + 1
    assert not is_stored(server, prompt)
    assert server.manager.grains.free == server.manager.grains.count
    computed_anew(server, prompt)
    server.assert_nothing_leaks()


def test_a_store_of_a_request_that_has_ended_is_dropped_too(server, monkeypatch):
    """Its blocks are held, so vLLM says that the reset has failed. What was stored is forgotten all the same."""
    (prompt,) = prompts(265, seed=402)
    gate = held_back(monkeypatch, server, "_store")
    server.ask(prompt, tokens=1, context_tokens=256)
    assert not reset(server)
    gate.set()
    server.rest()
    assert not is_stored(server, prompt)
    assert reset(server)
    server.assert_nothing_leaks()


def test_while_rows_are_loaded_a_reset_fails(server, monkeypatch):
    (prompt,) = prompts(265, seed=403)
    server.ask(prompt, context_tokens=256)
    server.forget()
    gate = held_back(monkeypatch, server, "_load")
    add(server, "loading", prompt)
    while not server.manager.transfers.loading:
        server.llm.llm_engine.step()
    assert server.connector.reset_cache() is False
    assert not reset(server)
    if server.core.batch_queue is None:
        with pytest.raises(RuntimeError, match="waiting for remote KV transfer"):
            reset(server, running=True)
    gate.set()
    finish(server)
    assert not is_stored(server, prompt)
    assert reset(server)
    computed_anew(server, prompt)
    server.assert_nothing_leaks()


def test_a_request_in_the_queue_finds_nothing_after_a_reset(server):
    """It was to be admitted, and no block was free."""
    (prompt,) = prompts(265, seed=404)
    (said,) = server.ask(prompt, context_tokens=256)
    server.forget()
    manager = server.scheduler.kv_cache_manager
    before, allocate, manager.allocate_slots = hits(server), manager.allocate_slots, lambda *args, **kwargs: None
    add(server, "queued", prompt)
    server.llm.llm_engine.step()
    del manager.allocate_slots
    assert manager.allocate_slots == allocate
    assert server.connector.contexts._admitted
    assert reset(server)
    finish(server)
    assert hits(server) == before
    assert computed_anew(server, prompt) == said
    server.assert_nothing_leaks()


def test_a_conversation_that_waits_for_room_is_given_up(both, monkeypatch):
    (first,) = prompts(80, seed=405)
    with monkeypatch.context() as patch:
        patch.setattr(both.manager.keeper.directory, "_has_room", lambda *args, **kwargs: False)
        patch.setattr(both.manager.keeper, "_running", 1)  # it may free some
        both.ask("room", first, 200)
        assert both.engine.held_blocks
        assert not reset(both.server)
        both.server.rest()
        assert both.engine.held_blocks == 0
    assert stored(both) == []
    assert reset(both.server)
    both.assert_nothing_leaks()


def test_the_next_turn_finds_no_conversation_of_old_weights(both):
    first, question = prompts(80, 9, seed=406)
    _, text = turn(both, "turn-0", [], first, 200)
    assert len(stored(both)) == 1
    assert reset(both.server)
    after, _ = turn(both, "turn-1", text, question, 12)
    assert after.rows == {0: None}
    both.assert_nothing_leaks()


def test_a_request_that_the_reset_preempts_computes_all_of_its_rows_again(both, dense):
    """Those that windows left of it, too."""
    (prompt,) = prompts(80, seed=407)
    served = both.drive(
        {
            0: lambda both: both.add("preempted", prompt, 260),
            160: lambda both: reset(both.server, running=True),
        }
    )["preempted"]
    (start,) = served.recomputed
    assert served.rows == {0: None, start: None}
    dense.assert_equal(both.engine, [served], compressions=3)
    both.server.rest()
    assert reset(both.server)
    both.assert_nothing_leaks()
