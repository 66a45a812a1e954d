"""Preempted requests go on with the rows that windows left of them.

The dense model is fed these rows at the places that the trace says, and the keep lists before and after."""

import pytest
from both_harness import TAILED, resumed, serving_both, stored
from contexts_harness import ON
from harness import MODES, prompts
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kara_kernels.paged import PackedCache

KEPT = {**ON, "preempted": True}


@pytest.fixture(scope="module", params=MODES)
def served_both(model, dense, request, tmp_path_factory):
    trace = tmp_path_factory.mktemp("preempted") / "trace.jsonl"
    with serving_both(model, trace, TAILED, KEPT, mode=request.param, max_num_batched_tokens=64) as both:
        both.dense = dense
        yield both


@pytest.fixture
def both(served_both):
    served_both.server.forget()
    return served_both


def preempted(both, name, *steps, tokens=260, seed=0, before=lambda both: None, **params):
    """Serves a request that is preempted before some steps. ``before``: called first."""
    (prompt,) = prompts(80, seed=seed)
    events = {0: lambda both: both.add(name, prompt, tokens, **params)}

    def lose(both):
        before(both)
        both.preempt()

    events |= dict.fromkeys(steps, lose)
    count = resumed(both)
    served = both.drive(events)[name]
    assert len(served.recomputed) == len(steps)
    return served, resumed(both) - count


@pytest.mark.parametrize(
    ("steps", "own"),
    [((160,), ...), ((130, 210), ...), ((100, 112), ...), ((160,), {"keep": 20})],
    ids=["once", "twice", "soon", "a part of a block"],
)
def test_a_preempted_request_goes_on_with_its_rows(both, dense, steps, own):
    served, count = preempted(both, f"on {steps} {own}", *steps, seed=400 + len(steps), own=own)
    assert count == len(steps)
    for start in served.recomputed:
        keys, _, places = served.rows[start]
        assert places.shape[2] < keys.shape[2] <= start  # windows had dropped some
    dense.assert_equal(both.engine, [served], compressions=1)
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_what_a_window_leaves_in_the_step_of_the_preemption_counts(both, dense):
    shrink, met = both.scheduler._manager.shrink, []

    def watched(plan):
        shrink(plan)
        both.scheduler._manager.shrink = shrink
        both.preempt()
        met.append(plan)

    def watch(both):
        both.scheduler._manager.shrink = watched

    (prompt,) = prompts(80, seed=410)
    served = both.drive({0: lambda both: both.add("planned", prompt, 260), 150: watch})["planned"]
    (start,) = served.recomputed
    events = [event for event in both.engine.events_of("planned") if event["logical_len"] <= start]
    assert events[-1]["physical_len_before"] == met[0].physical_len  # it was executed
    dropped = served.rows[start][0].shape[2] - served.rows[start][2].shape[2]
    assert dropped == sum(event["window"] - len(event["keep_indices"][0][0]) for event in events)
    dense.assert_equal(both.engine, [served], compressions=2)
    both.assert_nothing_leaks()


def test_rows_are_stored_before_the_step_that_overwrites_their_blocks(both, dense, monkeypatch):
    """All of them, and at once."""
    both.take_longer(monkeypatch, store=0.2)
    worker, cache = get_kv_transfer_group()._worker, both.server.worker._cache
    load = worker.load

    def overwritten(step):  # called in the step, and before what it would store after its forward pass
        for job in step.leaving:
            for pool in cache.pools if isinstance(cache, PackedCache) else [*cache.k, *cache.v]:
                pool[list(job.blocks)] = 0
        load(step)

    monkeypatch.setattr(worker, "load", overwritten)
    served, count = preempted(both, "overwritten", 160, seed=427)
    assert count == 1
    dense.assert_equal(both.engine, [served], compressions=1)
    both.assert_nothing_leaks()


def computes_again(both, dense, name, served, count):
    (start,) = served.recomputed
    assert (count, served.rows[start]) == (0, None)
    dense.assert_equal(both.engine, [served], compressions=2)
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_whoever_reads_no_packets_computes_again(both, dense):
    params = {"contexts": False}
    served, count = preempted(both, "refuses", 160, seed=420, **params)
    computes_again(both, dense, "refuses", served, count)


def test_rows_that_find_no_room_are_computed_again(both, dense, monkeypatch):
    monkeypatch.setattr(both.manager.keeper.directory, "_has_room", lambda *args, **kwargs: False)
    computes_again(both, dense, "no room", *preempted(both, "no room", 160, seed=421))


def test_what_loads_longer_than_it_is_computed_is_computed(both, dense, monkeypatch):
    monkeypatch.setattr(both.manager.rates, "to_load", lambda form, rows: 1e9)
    computes_again(both, dense, "slow", *preempted(both, "slow", 160, seed=422))


def test_rows_are_not_kept_when_an_engine_is_reset(both):
    """Its weights may have changed."""
    if both.scheduler.defer_block_free:
        pytest.skip("vLLM resets no engine while a step is in flight")
    (prompt,) = prompts(80, seed=423)

    def reset(both):
        assert both.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert both.half._preempted.leaving == {}

    count = resumed(both)
    served = both.drive({0: lambda both: both.add("reset", prompt, 260), 160: reset})["reset"]
    assert len(served.recomputed) == 1
    assert resumed(both) == count
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_damaged_rows_are_computed_again(both, dense, monkeypatch):
    worker = both.server.worker
    load = worker._load

    def spoiled(job):
        worker._region[job.grains[-1], 0] ^= 1
        load(job)

    monkeypatch.setattr(worker, "_load", spoiled)
    served, count = preempted(both, "damaged", 160, seed=424)
    assert count == 1  # it began to load
    assert both.manager.counts["jobs", "load", "damaged"]
    (start,) = served.recomputed
    served.rows[start] = None
    dense.assert_equal(both.engine, [served], compressions=2)
    assert stored(both) == []
    both.assert_nothing_leaks()


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_preempted_request_may_be_aborted(both, after, monkeypatch):
    both.take_longer(monkeypatch, load=0.3)
    (prompt,) = prompts(80, seed=430 + after)
    both.drive(
        {
            0: lambda both: both.add("aborted", prompt, 260),
            150: lambda both: both.preempt(),
            151 + after: lambda both: both.engine.abort("aborted"),
        }
    )
    both.server.rest()
    both.ask("next", prompt, 4)  # bytes that nobody needs are erased with the next step
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_nobody_else_is_given_the_rows(both, dense):
    """No hash of the text leads to them."""
    (prompt,), looked = prompts(80, seed=426), []

    def look(both):
        for place in both.half._preempted._places.values():
            (request,) = both.scheduler.requests.values()
            assert both.manager._known.place(place.block_hash) == place
            assert all(both.manager._known.place(block_hash) is None for block_hash in request.block_hashes)
            looked.append(place)

    arrive = {0: lambda both: both.add("own", prompt, 200), 130: lambda both: both.preempt()}
    served = both.drive(arrive | dict.fromkeys(range(131, 136), look))
    assert looked
    dense.assert_equal(both.engine, served.values(), compressions=1)
    both.assert_nothing_leaks()
