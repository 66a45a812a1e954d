"""Resets of vLLM's caches in engines of their own: one in a process of its own, tiers below memory, and restarts."""

import json
import shutil

import pytest
from contexts_harness import serving
from harness import engine, greedy, prompts
from redis_server import RedisServer, needs_a_store
from reset_harness import computed_anew, hits, is_stored, other_weights, reset
from safetensors.torch import load_file, save_file
from test_contexts_engines import shown, with_disk
from test_contexts_remote import sharing


def test_sleeping_is_a_reset(model, monkeypatch):
    """vLLM waits until stores have ended. On a CPU, the rest of its sleep does nothing."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    (prompt,) = prompts(969, seed=408)
    sampling = greedy(12, extra_args={"kv_transfer_params": {"context_tokens": 960}})
    before = shown()
    contexts = {"alpha": 1e-3, "min_tokens": 64, "ram_gib": 0.01, "grain_kib": 16}
    settings = {"additional_config": {"contexts": contexts}, "disable_log_stats": False, "max_model_len": 1024}
    with engine(model, None, **settings) as some:
        some.generate([prompt], sampling)
        some.llm.sleep(level=1)
        some.llm.wake_up()
        some.generate([prompt], sampling)
    found = {name: value - before.get(name, 0) for name, value in shown().items()}
    assert found["resets_total",] == 1
    assert found["first_tokens_total", "computed"] == 2
    assert not found.get(("hits_total", "ram"), 0)


def test_a_restart_finds_nothing_that_other_weights_left_on_the_disk(model, tmp_path):
    documents, (question,) = prompts(*[256] * 7, seed=409), prompts(9, seed=410)
    folder = tmp_path / "store"

    def store_all(server):
        for document in documents:
            while not is_stored(server, document + question):  # its rows may be gone before others have made room
                server.ask(document + question, context_tokens=256)
                server.forget()
        assert "disk" in [copy.tier for copy in server.manager.keeper.directory.copies()]

    with serving(model, with_disk(folder)) as some:
        store_all(some)
        some.connector._store.save(some.manager, at_once=True)
        assert list(folder.rglob("directory.json"))
        assert reset(some)
        assert not list(folder.rglob("directory.json"))
        for document in documents:
            computed_anew(some, document + question)
        store_all(some)
        before = some.manager.counts["hits", "disk"]
        for document in documents:
            assert some.ask(document + question, context_tokens=256) == [some.judge(document + question, 256)]
            some.forget()
        assert some.manager.counts["hits", "disk"] > before
        some.connector._store._next = 0.0
        some.ask(documents[0] + question, context_tokens=256)
        some.rest()
        some.assert_nothing_leaks()
    assert not list(folder.rglob("directory.json"))
    assert list(folder.rglob("*.bin"))
    with serving(model, with_disk(folder)) as again:
        assert not again.manager.keeper.directory.copies()
        assert not list(folder.rglob("*.bin"))
        again.ask(documents[0] + question, context_tokens=256)
        again.rest()
        assert list(folder.rglob("directory.json"))


def train(folder):
    weights = folder / "model.safetensors"
    trained = {name: x * 1.1 if name.endswith("k_proj.weight") else x for name, x in load_file(weights).items()}
    save_file(trained, weights, metadata={"format": "pt"})


def turn(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] /= 10
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [None, train, turn])
def test_a_restart_finds_nothing_of_a_model_that_was_replaced(model, tmp_path, change):
    """A folder keeps its name when another checkpoint is saved into it, or another rotary embedding."""
    documents, (question,) = prompts(*[256] * 6, seed=413), prompts(9, seed=414)
    folder, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(model, folder)
    with serving(str(folder), with_disk(store)) as some:
        for document in documents:
            some.ask(document + question, context_tokens=256)
            some.forget()
        left = [copy.tier for copy in some.manager.keeper.directory.copies()].count("disk")
        assert left
    if change is not None:
        change(folder)
    with serving(str(folder), with_disk(store)) as again:
        assert len(again.manager.keeper.directory) == (left if change is None else 0)


@needs_a_store
def test_a_server_of_other_weights_leaves_the_shared_tier(model):
    """What it had stored there stays, and others admit it."""
    old, new, question = prompts(256, 256, 9, seed=411)
    store = RedisServer()
    try:
        with sharing(model, store) as first:
            first.ask(old + question, context_tokens=256)
            first.forget()
            names = set(store.client().scan_iter())
            with other_weights(first):
                assert reset(first)
                looked = {key: n for key, n in first.manager.counts.items() if key[0] == "lookups"}
                computed_anew(first, old + question)
                first.ask(new + question, context_tokens=256)
                first.forget()
                for document in (old, new):  # in memory, both are stored and found
                    assert first.ask(document + question, context_tokens=256)
                    first.forget()
                assert hits(first) == {("hits", "ram"): 2}
            assert looked == {key: n for key, n in first.manager.counts.items() if key[0] == "lookups"}
            assert set(store.client().scan_iter()) == names
            assert not any(n for (name, *_), n in first.manager.counts.items() if name in ("closed", "store_errors"))
            first.assert_nothing_leaks()
        with sharing(model, store) as second:
            assert second.ask(old + question, context_tokens=256) == [second.judge(old + question, 256)]
            assert hits(second) == {("hits", "remote"): 1}
            second.forget()
            second.ask(new + question, context_tokens=256)
            assert second.manager.counts["lookups", "none"] == 1
            second.assert_nothing_leaks()
    finally:
        store.kill()
