"""Servers that share a store. One engine runs at a time in this process, so the second server comes after the first."""

import random
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from contexts_harness import ON, serving
from harness import ON_GPU, engine, greedy, make_model, prompts
from redis_server import PASSWORD, RedisServer, needs_a_store
from test_contexts_engines import random_days, shown
from vllm.engine.arg_utils import EngineArgs

from kara_kernels.integrations.vllm.contexts.store import TIMEOUT, RedisStore, StoreError

pytestmark = needs_a_store
PACKET = 110_000  # bytes of 256 tokens, and a little more


@pytest.fixture
def store():
    some = RedisServer()
    yield some
    some.kill()


@pytest.fixture(autouse=True)
def only_threads_of_its_own_wait_for_the_store(monkeypatch):
    """Nothing that blocks runs in the engine's thread, once it has started."""
    for name in ("get", "write", "refresh", "delete", "drop"):
        command = getattr(RedisStore, name)

        def guarded(self, *args, command=command):
            own = threading.current_thread().name.startswith(("kara-remote", "kara-lookup"))
            assert own or not hasattr(self, "started")
            return command(self, *args)

        monkeypatch.setattr(RedisStore, name, guarded)


@contextmanager
def sharing(model, store, more=None, **options):
    """``more``: settings of the tier."""
    remote = {"url": store.url, "wait": 20.0, **(more or {})}
    contexts = {**ON, "grain_kib": 4, "remote": remote, **options.pop("contexts", {})}
    with serving(model, contexts, **options) as some:
        some.connector._remote._store.started = True
        yield some


def after_a_while(some):
    """The tier has been left alone for long enough."""
    some.manager.closed.until["remote"] = 0.0
    some.connector._remote._rests_until = 0.0


def left_by_another(model, store, *documents, question=(1, 2, 3), **options):
    """What a first server says with its own packets."""
    with sharing(model, store, **options) as some:
        for document in documents:
            some.ask([*document, *question], context_tokens=len(document))
            some.rest()
        assert not some.manager.counts["jobs", "write", "failed"]


def test_two_servers_share(model, store):
    document, *questions = prompts(256, 9, 12, 31, seed=70)
    with sharing(model, store) as first:
        exact = [first.ask(document + q, contexts=False) for q in questions]
        first.forget()
        first.ask(document + questions[0], context_tokens=256)
        first.rest()
        rows = first.rows_of(document + questions[0], 256)
        first.assert_nothing_leaks()
    with sharing(model, store) as second:
        for at, question in enumerate(questions):
            params = {"context_tokens": 256} if at else {}  # what nobody marks is found, too
            assert second.ask(document + question, **params) == [second.judge(document + question, 256)]
            second.forget()
        assert second.manager.counts["hits", "remote"] >= 1
        assert second.manager.counts["hits", "remote"] + second.manager.counts["hits", "ram"] == 3
        assert second.manager.counts["jobs", "store", "ok"] == 0
        assert second.manager.counts["lookups", "found"] == 1
        for mine, its in zip(second.rows_of(document + questions[0], 256), rows, strict=True):
            assert (mine == its).all()
        assert [second.ask(document + q, contexts=False) for q in questions] == exact
        second.assert_nothing_leaks()


def test_a_server_in_another_process_finds_what_this_one_stored(model, store, monkeypatch):
    """Hashes of blocks are equal in all processes, whatever the seed of Python's own."""
    document, question = prompts(256, 9, seed=69)
    with sharing(model, store) as first:
        first.ask(document + question, context_tokens=256)
        first.forget()
        said = first.ask(document + question, context_tokens=256)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    before = shown()
    contexts = {**ON, "grain_kib": 4, "remote": {"url": store.url, "wait": 20.0}}
    with engine(model, None, additional_config={"contexts": contexts}, disable_log_stats=False) as second:
        assert second.scheduler is None
        sampling = greedy(12, extra_args={"kv_transfer_params": {"context_tokens": 256}})
        (answer,) = second.generate([document + question], sampling)
        assert [answer.tokens] == said
        second.generate([question], greedy(1))  # metrics are told with the next step
    found = {name: value - before.get(name, 0) for name, value in shown().items()}
    assert found["hits_total", "remote"] == 1
    assert found["lookups_total", "found"] == 1
    assert found.get(("jobs_total", "store", "ok"), 0) == 0


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_share_with_as_many_ranks(model, store):
    document, question = prompts(256, 9, seed=68)
    with sharing(model, store, tensor_parallel_size=2) as first:
        first.ask(document + question, context_tokens=256)
        first.forget()
        said = first.ask(document + question, context_tokens=256)
    with sharing(model, store) as other:
        other.ask(document + question, context_tokens=256)
        assert other.manager.counts["lookups", "none"] == 1
        other.rest()
    with sharing(model, store, tensor_parallel_size=2) as second:
        assert second.ask(document + question, context_tokens=256) == said
        assert second.manager.counts["hits", "remote"] == 1
        second.assert_nothing_leaks()


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_many_requests_at_once_wait_for_one_answer(model, store, mode):
    documents, questions = prompts(*[224] * 3, seed=71), prompts(3, 17, seed=72)
    left_by_another(model, store, *documents)
    given = [document + question for document in documents for question in questions]
    with sharing(model, store, mode=mode) as second:
        for prompt, said in zip(given, second.ask(*given, context_tokens=224), strict=True):
            assert said == second.judge(prompt, 224)
        assert second.manager.counts["jobs", "store", "ok"] == 0
        second.assert_nothing_leaks()


def test_tenants_stay_apart(model, store):
    (document,) = prompts(256, seed=73)
    prompt = [*document, 1, 2, 3]
    left_by_another(model, store, document)
    with sharing(model, store) as second:
        given = {"prompt_token_ids": prompt, "cache_salt": "another tenant"}
        second.llm.generate([given], use_tqdm=False)
        assert second.manager.counts["hits", "remote"] == 0
        second.rest()


def test_servers_of_other_weights_share_nothing(model, store, tmp_path):
    """Although the folders have one name, as in containers."""
    (document,) = prompts(256, seed=74)
    folder = tmp_path / "model"
    make_model(folder)
    left_by_another(str(folder), store, document)
    make_model(folder, initializer_range=0.19)
    with sharing(str(folder), store) as second:
        (exact,) = second.ask([*document, 1, 2, 3], contexts=False)
        second.forget()
        assert second.ask([*document, 1, 2, 3], context_tokens=256) == [exact]
        assert second.manager.counts["lookups", "none"] == 1
        assert second.manager.counts["hits", "remote"] == 0


@pytest.mark.parametrize("fault", ["deleted", "swapped", "flipped", "short", "another type", "no manifest"])
def test_what_is_damaged_in_the_store_is_computed_again(model, store, fault):
    documents = prompts(256, 256, seed=75)
    left_by_another(model, store, *documents)
    client = store.client()
    with sharing(model, store) as second:
        prompt = [*documents[0], 1, 2, 3]
        (exact,) = second.ask(prompt, contexts=False)
        second.forget()
        tier, place = second.connector._remote, second.place_of(prompt, 256)
        name = tier._name(place.key)
        grains = tier._grains(tier._manifest(client.get(name)))
        other = tier._grains(tier._manifest(client.get(tier._name(second.place_of([*documents[1], 1], 256).key))))
        value = bytearray(client.get(grains[1]))
        if fault == "deleted":
            client.delete(grains[1])
        elif fault == "swapped":
            for mine, its in zip(grains, other, strict=True):  # a whole packet, of another context
                client.set(mine, client.get(its))
        elif fault == "flipped":
            value[77] ^= 4
            client.set(grains[1], bytes(value))
        elif fault == "short":
            client.set(grains[1], bytes(value[:-1]))
        elif fault == "another type":
            client.delete(grains[1])
            client.lpush(grains[1], b"x")
        else:
            client.set(name, b"\x00no manifest")
        assert second.ask(prompt, context_tokens=256) == [exact]
        second.forget()
        assert second.manager.counts["jobs", "load", "damaged"] == (fault != "no manifest")
        assert second.ask(prompt, context_tokens=256) == [second.judge(prompt, 256)]  # it was stored again
        assert client.get(name) is not None  # and offered again
        second.assert_nothing_leaks()
    with sharing(model, store) as third:
        assert third.ask(prompt, context_tokens=256) == [third.judge(prompt, 256)]
        assert third.manager.counts["hits", "remote"] == 1


def test_a_full_store_is_a_counter(model):
    """noeviction, and room for nothing."""
    some = RedisServer("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    try:
        (document,) = prompts(256, seed=76)
        with sharing(model, some) as server:
            server.ask([*document, 1, 2, 3], context_tokens=256)
            server.forget()
            assert server.manager.counts["store_errors", "refused"] == 1
            assert server.manager.counts["closed", "remote"] == 1
            assert not server.connector._remote.resting
            assert server.ask([*document, 1, 2], context_tokens=256) == [server.judge([*document, 1, 2], 256)]
            assert not [name for name in some.client().scan_iter() if not name.startswith(b"kara:speed")]
            server.assert_nothing_leaks()
    finally:
        some.kill()


@pytest.mark.parametrize("how", ["hangs", "is gone"])
def test_a_store_that_does_not_answer_delays_one_request_a_little(model, store, how):
    documents = prompts(256, 256, seed=77)
    left_by_another(model, store, *documents)
    with sharing(model, store, {"wait": 0.2}) as second:
        prompt, other = ([*document, 1, 2, 3] for document in documents)
        (exact,) = second.ask(prompt, contexts=False)
        (exact_other,) = second.ask(other, contexts=False)
        second.forget()
        store.send(signal.SIGSTOP) if how == "hangs" else store.kill()
        begun = time.monotonic()
        assert second.ask(prompt, context_tokens=256) == [exact]
        assert second.ask(other, context_tokens=256) == [exact_other]
        assert time.monotonic() - begun < 10
        counts = second.manager.counts
        assert counts["lookups", "late"] + counts["lookups", "failed"] == 1  # the other one did not ask
        second.rest()
        store.send(signal.SIGCONT) if how == "hangs" else store.start()
        after_a_while(second)
        second.forget()
        for question in ([1, 2, 3], [4, 5]):  # it was stored meanwhile
            prompt = [*documents[0], *question]
            assert second.ask(prompt, context_tokens=256) == [second.judge(prompt, 256)]
        assert sum(n for (name, *_), n in counts.items() if name == "store_errors") >= 1
        second.assert_nothing_leaks()


def test_a_store_that_hangs_in_the_middle_of_a_load_is_a_miss(model, store):
    (document,) = prompts(256, seed=78)
    left_by_another(model, store, document)
    with sharing(model, store) as second:
        prompt = [*document, 1, 2, 3]
        (exact,) = second.ask(prompt, contexts=False)
        second.forget()
        tier, read = second.connector._remote, second.connector._remote._read

        def hangs(*args):
            store.send(signal.SIGSTOP)
            return read(*args)

        tier._read = hangs
        begun = time.monotonic()
        assert second.ask(prompt, context_tokens=256) == [exact]
        assert TIMEOUT <= time.monotonic() - begun < TIMEOUT + 10
        store.send(signal.SIGCONT)
        assert second.manager.counts["jobs", "read", "failed"] >= 1
        assert second.manager.counts["store_errors", "slow"] >= 1
        second.assert_nothing_leaks()


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_random_days_with_a_store_that_is_killed_and_hangs(model, store, mode):
    """Room for three packets of six, and one that passes. The store ends, is empty, hangs, and forgets, at any time."""
    little = {"ram_gib": 5 * PACKET / 2**30}
    tight = {"num_gpu_blocks_override": 28, "max_model_len": 512, "mode": mode}
    with sharing(model, store, {"wait": 0.05}, contexts=little, **tight) as small:
        draw, step = random.Random(9), small.core.step_fn
        state = {"now": "well"}

        def chaos():
            chance = draw.random()
            if state["now"] == "well" and chance < 0.01:
                state["now"] = draw.choice(["dead", "hanging"])
                store.kill() if state["now"] == "dead" else store.send(signal.SIGSTOP)
            elif state["now"] != "well" and chance < 0.05:
                store.start() if state["now"] == "dead" else store.send(signal.SIGCONT)
                state["now"] = "well"
            elif chance < 0.1:
                after_a_while(small)
            return step()

        small.core.step_fn = chaos
        random_days(small)
        if state["now"] == "hanging":
            store.send(signal.SIGCONT)
        elif state["now"] == "dead":
            store.start()
        counts = small.manager.counts
        assert counts["hits", "remote"] > 5, counts
        assert counts["jobs", "write", "ok"] > 5
        assert sum(n for (name, *_), n in counts.items() if name == "store_errors") >= 1
        assert not counts["store_errors", "failed"]


def test_the_client_knows_what_went_wrong_and_tells_no_password(store):
    good = RedisStore(store.url)
    good.write("a", memoryview(b"x"), 100)
    assert good.get(["a", "b"]) == [b"x", None]
    assert good.refresh(["a"], 50)
    assert not good.refresh(["a", "b"], 50)
    good.delete(["a"])
    assert good.get(["a"]) == [None]

    def error(some, what):
        begun = time.monotonic()
        with pytest.raises(StoreError) as found:
            some.get(["a"])
        assert found.value.what == what, found.value
        assert PASSWORD not in str(found.value)
        assert "wr%40ng" not in str(found.value)
        assert "wr@ng" not in str(found.value)
        return time.monotonic() - begun

    error(RedisStore(store.url.replace("p%40ss", "wr%40ng")), "refused")
    error(RedisStore(store.url.replace(":p%40ss%2Fword@", "")), "refused")
    store.client().config_set("requirepass", "")
    assert good.get(["a"]) == [None]
    store.send(signal.SIGSTOP)
    assert TIMEOUT * 0.9 < error(RedisStore(store.url + "?socket_timeout=60"), "slow") < 5
    store.send(signal.SIGCONT)
    store.kill()
    assert error(good, "gone") < 1
    store.start()
    assert good.get(["a"]) == [None]


def test_a_server_starts_without_its_store_and_logs_no_password(model, store, capfd, caplog, monkeypatch):
    monkeypatch.setenv("KARA_STORE", store.url.replace("p%40ss", "wr%40ng"))
    (document,) = prompts(256, seed=79)
    with sharing(model, store, {"url": "$KARA_STORE"}) as some:
        assert some.ask([*document, 1, 2, 3], context_tokens=256)
        some.rest()
        assert some.manager.counts["store_errors", "refused"] >= 1
    written = "".join(capfd.readouterr()) + caplog.text
    assert "Kara's remote tier is left alone" in written
    for secret in ("wr%40ng", "wr@ng", store.url):
        assert secret not in written


@pytest.mark.parametrize(
    ("remote", "options", "expected"),
    [
        ({}, {}, "contexts: remote: expected url and some of url, ttl, wait, weights, got "),
        ({"url": "redis://h", "path": 1}, {}, "contexts: remote: expected url and some of "),
        ("redis://h", {}, "contexts: remote: expected an object of url, ttl, wait, weights, got str"),
        ({"url": 3}, {}, "contexts: remote: url: expected a str, got int"),
        ({"url": "http://h"}, {}, r"contexts: remote: url: expected redis://.* got another form"),
        ({"url": "s3+http://h"}, {}, r"contexts: remote: url: expected .* or s3\+https://host.* got another form"),
        ({"url": "s3+http://key:secret@h/bucket"}, {}, "got another form"),
        ({"url": "s3+http://h/a/b"}, {}, "got another form"),
        ({"url": "$NOBODY_SETS_THIS"}, {}, r"contexts: remote: url: expected an environment variable .* got \$NOBODY"),
        ({"url": "redis://h", "ttl": 0}, {}, "contexts: remote: ttl: expected 1..1000000000.0, got 0"),
        ({"url": "redis://h", "wait": -1}, {}, "contexts: remote: wait: expected 0..60, got -1"),
        ({"url": "redis://h", "weights": ""}, {}, "contexts: remote: weights: expected a name, got ''"),
        ({"url": "redis://h"}, {"prefix_caching_hash_algo": "xxhash"}, "hashes that may collide .* beside a remote"),
        ({"url": "redis://h"}, {"enable_lora": True}, "LoRA adapters .* beside a remote tier"),
    ],
)
def test_what_cannot_be_shared_is_refused_at_start_up(model, remote, options, expected):
    with pytest.raises(ValueError, match=expected):
        EngineArgs(
            model=model, additional_config={"contexts": {"remote": remote}}, max_model_len=512, **options
        ).create_engine_config()


@pytest.mark.parametrize("password", ["se/cret", "se?cret", "se#cret", "1/cret", "1?cret", "1#cret"])
@pytest.mark.parametrize("given", ["directly", "by its name"])
def test_a_url_that_cannot_be_read_is_not_shown(model, monkeypatch, password, given):
    url = f"redis://some:{password}@host:6379/0"
    monkeypatch.setenv("KARA_STORE", url)
    contexts = {"remote": {"url": url if given == "directly" else "$KARA_STORE"}}
    with pytest.raises(ValueError, match="got another form") as found:
        EngineArgs(model=model, additional_config={"contexts": contexts}).create_engine_config()
    assert "cret" not in str(found.value)


@pytest.mark.parametrize(("url", "package"), [("redis://h", "redis"), ("s3+http://h/bucket", "nixl")])
def test_a_client_that_is_missing_is_an_error_at_start_up(model, monkeypatch, url, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"contexts: remote: expected the package {package} "):
        EngineArgs(model=model, additional_config={"contexts": {"remote": {"url": url}}}).create_engine_config()
