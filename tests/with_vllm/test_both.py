"""Windows and contexts in one engine: running requests are compressed, also those that were admitted out of packets.

The dense model is fed the rows of the packets that a request was admitted with, and the keep lists of its windows."""

import threading
from contextlib import nullcontext

import pytest
import torch
from both_harness import serving_both
from contexts_harness import ON
from harness import KARA, MODES, ON_GPU, asynchronous, configure, prompts
from prometheus_client import REGISTRY
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from kara_kernels.integrations.vllm import hook
from kara_kernels.integrations.vllm.contexts.configure import CONNECTOR
from kara_kernels.integrations.vllm.windows.configure import WORKERS


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def served_both(model, mode, tmp_path_factory):
    with serving_both(
        model, tmp_path_factory.mktemp("both") / "trace.jsonl", mode=mode, max_num_batched_tokens=64
    ) as x:
        yield x


def test_vllm_is_given_what_does_both(model, mode):
    with asynchronous() if mode == "asynchronous" else nullcontext():
        options = {"async_scheduling": mode == "asynchronous"} if ON_GPU else {}
        config = configure(model, None, additional_config={"kara": KARA, "contexts": ON}, **options)
        for _ in range(2):
            name = config.scheduler_config.scheduler_cls
            assert name == hook.SCHEDULERS_OF_BOTH[mode == "asynchronous"]
            assert issubclass(resolve_obj_by_qualname(name), AsyncScheduler) == (mode == "asynchronous")
            assert config.parallel_config.worker_cls in WORKERS.values()
            assert config.kv_transfer_config.kv_connector == CONNECTOR
            config.__post_init__()  # vLLM completes some configurations again


def asking(*lengths, seed):
    """Prompts that begin with the same 256 tokens, and end with so many of their own."""
    document, *questions = prompts(256, *lengths, seed=seed)
    return [document + question for question in questions]


def test_requests_admitted_out_of_packets_are_compressed_while_they_decode(both, dense):
    """In chunks of 64 tokens, beside others that are not admitted or left alone by either."""
    asked = asking(9, 5, 31, 17, seed=3)
    both.store("stored", asked[0], 256)
    hits = dict(both.manager.counts)

    def arrive(both):
        for i, prompt in enumerate(asked[:3]):
            both.add(f"admitted-{i}", prompt, 230, context_tokens=256)
        both.add("exact", prompts(296, seed=4)[0], 230, contexts=False)
        both.add("whole", asked[3], 230, False, context_tokens=256)
        both.add("other", prompts(50, seed=4)[0], 230)

    served = both.drive({0: arrive})
    assert both.manager.counts["hits", "ram"] == hits.get(("hits", "ram"), 0) + 1
    assert both.manager.counts["hits", "gpu"] == hits.get(("hits", "gpu"), 0) + 3
    assert {name for name, x in served.items() if x.rows[0] is not None} == {
        "admitted-0", "admitted-1", "admitted-2", "whole",
    }  # fmt: skip
    assert both.engine.events_of("whole") == []
    dense.assert_equal(both.engine, [x for name, x in served.items() if name != "whole"], compressions=2)
    dense.assert_equal(both.engine, [served["whole"]], compressions=0)
    both.assert_nothing_leaks()


def test_compressed_rows_are_never_a_prefix(both, dense):
    """A second turn begins with the first one's text. It finds rows of the prompt, and none of a compressed block."""
    (prompt,) = asking(20, seed=5)
    both.store("stored", prompt, 256)
    for name, params in (("lossy", {"context_tokens": 256}), ("exact", {"contexts": False})):
        first = both.ask(f"{name}-first", prompt, 200, **params)
        turn = prompt + first.tokens + [1, 2, 3]
        second = both.ask(f"{name}-second", turn, 100, **params)
        assert (second.rows[0] is not None) == (name == "lossy")
        dense.assert_equal(both.engine, [first, second], compressions=1)
        both.server.forget()
    both.assert_nothing_leaks()


@pytest.mark.parametrize("params", [{"context_tokens": 256}, {"contexts": False}], ids=["lossy", "exact"])
def test_a_block_that_was_filled_after_a_compression_has_no_hash(both, dense, params):
    """The first request drops 16 rows, and then fills the place of a block in its text. The second one hashes all
    blocks before that. So the third one would find it."""
    (prompt,) = asking(20, seed=15)
    name = "filled-lossy" if "context_tokens" in params else "filled-exact"
    both.store("stored", prompt, 256)
    first = both.ask(f"{name}-first", prompt, 120, {"keep": 48}, **params)
    (event,) = both.engine.events_of(first.request_id)
    assert event["logical_len"] <= 12 * 32 < len(prompt) + 120
    text = prompt + first.tokens
    second = both.ask(f"{name}-second", text[: 11 * 32 + 8], 8, False, **params)
    third = both.ask(f"{name}-third", text, 20, False, **params)
    dense.assert_equal(both.engine, [first, second, third], compressions=0)
    both.assert_nothing_leaks()


def test_blocks_that_requests_share_under_a_packet_are_not_compressed(both, dense):
    """The second request finds decoded rows of the first one, which is compressed only behind them."""
    (prompt,) = asking(30, seed=6)
    both.store("stored", prompt, 256)
    said = both.ask("alone", prompt, 60, False, context_tokens=256).tokens
    both.server.forget()
    served = both.drive(
        {
            0: lambda both: both.add("first", prompt, 300, context_tokens=256),
            70: lambda both: both.add("second", prompt + said, 230, context_tokens=256),
        }
    )
    dense.assert_equal(both.engine, served.values(), compressions=2)
    starts = [event["window_start"] for event in both.engine.events_of("first")]
    assert starts[0] > len(prompt)
    both.assert_nothing_leaks()


@pytest.mark.parametrize("before", [False, True], ids=["computed first", "admitted first"])
def test_a_preempted_request_is_admitted_and_compressed_again(both, dense, before, monkeypatch):
    both.lose_rows(monkeypatch)
    (prompt,) = asking(9, seed=7 + before)
    if before:
        both.store("stored", prompt, 256)

    name = f"preempted-{before}"
    arrive = {0: lambda both: both.add(name, prompt, 260, context_tokens=256), 160: lambda both: both.preempt()}
    served = both.drive(arrive)[name]
    (start,) = served.recomputed
    assert [served.rows[when] is not None for when in (0, start)] == [before, True]
    assert {event["recomputed_len"] for event in both.engine.events_of(name)} == {0, start}
    dense.assert_equal(both.engine, [served], compressions=3)
    both.assert_nothing_leaks()


def test_a_request_is_compressed_and_ends_while_its_context_waits_to_be_stored(both, dense, monkeypatch):
    """The store begins only then, and finds every row of the context as it was computed."""
    (prompt,) = asking(9, seed=11)
    both.ask("undisturbed", prompt, own=False, context_tokens=256)
    both.server.forget()
    undisturbed = both.server.rows_of(prompt, 256)
    both.manager.forget(both.server.place_of(prompt, 256))
    gate, store, met = threading.Event(), both.server.worker._store, both.met
    monkeypatch.setattr(both.server.worker, "_store", lambda job: store(job) if gate.wait(60) else None)
    served = both.ask("stored-late", prompt, 200, context_tokens=256)
    assert both.met >= met + 2
    assert both.half._ended
    gate.set()
    both.server.rest()
    for rows, expected in zip(both.server.rows_of(prompt, 256), undisturbed, strict=True):
        assert torch.equal(rows, expected)
    dense.assert_equal(both.engine, [served], compressions=2)
    both.assert_nothing_leaks()


@pytest.mark.parametrize("after", ["arriving", "preemption"])
def test_a_request_may_be_aborted_while_its_rows_are_loaded(both, monkeypatch, after):
    (prompt,) = asking(9, seed=12)
    both.lose_rows(monkeypatch)
    both.store("stored", prompt, 256)
    gate, load, name = threading.Event(), both.server.worker._load, f"aborted-{after}"
    monkeypatch.setattr(both.server.worker, "_load", lambda job: load(job) if gate.wait(60) else None)

    def abort(both):
        assert both.manager.transfers.busy
        both.engine.abort(name)
        gate.set()

    events = {0: lambda both: both.add(name, prompt, 200, context_tokens=256), 2: abort}
    if after == "preemption":
        events = {
            0: lambda both: (gate.set(), both.add(name, prompt, 200, context_tokens=256)),
            120: lambda both: (gate.clear(), both.preempt()),
            124: abort,
        }
    both.drive(events)
    both.assert_nothing_leaks()


def test_a_text_that_is_recomputed_reserves_the_blocks_that_it_will_need(both, monkeypatch):
    """Loads are given only blocks that nobody whose text is computed will need."""
    both.lose_rows(monkeypatch)
    scheduler, held, reserved = both.scheduler, [], []
    schedule = scheduler.schedule

    def scheduled(*args, **kwargs):
        output = schedule(*args, **kwargs)
        if scheduler._inflight_prefills or len(held) == len(reserved) > 0:  # and the step that computes the last of it
            held.append(both.engine.held_blocks)
        for request in scheduler._inflight_prefills:
            reserved.append(held[-1] + scheduler._request_remaining_blocks(request))
        return output

    def preempt(both):
        scheduler.schedule = scheduled
        both.preempt()

    prompt = prompts(20, seed=13)[0]
    both.drive({0: lambda both: both.add("recomputed", prompt, 780), 760: preempt})
    scheduler.schedule = schedule
    assert len(both.engine.recomputed["recomputed"]) == 1
    assert len(reserved) == len(held) - 1 > 8
    for i, blocks in enumerate(reserved):
        assert blocks >= max(held[i:])
    both.assert_nothing_leaks()


def test_the_metrics_of_both_arrive(both, model):
    def shown(name, **labels):
        labels = {"model_name": model, "engine": "0", **labels}
        return REGISTRY.get_sample_value(f"kara:{name}", labels) or 0.0

    (prompt,) = asking(9, seed=14)
    watched = [
        ("compressions_total", {}),
        ("context_hits_total", {"source": "ram"}),
        ("opted_out_total", {"reason": "short"}),
    ]
    before = [shown(name, **labels) for name, labels in watched]
    both.store("stored", prompt, 256)
    both.ask("measured", prompt, 200, context_tokens=256)
    both.ask("another", prompt[:20], 20)
    compressions = len(both.engine.events_of("measured"))
    after = [shown(name, **labels) for name, labels in watched]
    assert [b - a for a, b in zip(before, after, strict=True)] == [compressions, 1, 2]
