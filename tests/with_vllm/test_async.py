"""What only asynchronous scheduling can break. The tests of equality and the random days run with it, too."""

import pytest
from harness import KARA, ON_GPU, asynchronous, configure, engine, greedy, no_block_once, prompts
from prometheus_client import REGISTRY
from vllm import SamplingParams

from kara_kernels.engine import Ledger
from kara_kernels.integrations.vllm.windows.configure import SCHEDULERS
from kara_kernels.integrations.vllm.windows.runners import KaraRunnerV1

ASYNCHRONOUS = {"mode": "asynchronous"}


@pytest.mark.skipif(ON_GPU, reason="vLLM chooses asynchronous scheduling on GPUs, and the tests there choose")
def test_vllms_own_choice_stands(model):
    assert configure(model, KARA).scheduler_config.scheduler_cls == SCHEDULERS[False]
    with asynchronous():
        config = configure(model, KARA)
        assert config.scheduler_config.scheduler_cls == SCHEDULERS[True]
        assert config.max_concurrent_batches == 2
        config.__post_init__()  # vLLM completes some configurations again
        assert config.scheduler_config.scheduler_cls == SCHEDULERS[True]


def test_windows_are_compressed_while_a_token_is_in_flight(model, dense, trace, monkeypatch):
    in_flight = []
    with engine(model, trace=trace, **ASYNCHRONOUS) as kara:

        def commit(ledger, plan):
            in_flight.append(kara.scheduler.requests[plan.request_id].num_in_flight_tokens)
            committed(ledger, plan)

        committed = Ledger.commit
        monkeypatch.setattr(Ledger, "commit", commit)
        served = kara.generate(prompts(5, 40, 77), greedy(280))
        assert len(in_flight) >= 9
        assert set(in_flight) == {1}
        dense.assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()


def test_a_token_in_flight_is_delivered_after_its_request_is_preempted(model, dense, trace):
    (prompt,) = prompts(20)
    with engine(model, trace=trace, **ASYNCHRONOUS) as kara:
        said = {}
        served = kara.drive(
            {
                0: lambda kara: kara.add("A", prompt, 250),
                100: no_block_once,
                101: lambda kara: said.update(kara.said),
            }
        )
        assert served["A"].recomputed == [120]
        assert len(prompt) + len(said["A"]) == 120  # step 100 delivered what step 99 computed
        assert {event["recomputed_len"] for event in kara.events()} == {0, 120}
        dense.assert_equal(kara, served.values(), compressions=2)
        kara.assert_nothing_leaks()


@pytest.mark.parametrize("windows", [1, 2])
def test_a_request_may_stop_while_its_next_step_is_planned(model, dense, trace, windows):
    """It stops with the token before the step that compresses it, which is seen only after that step was sent."""
    (prompt,) = prompts(20)
    with engine(model, trace=trace, **ASYNCHRONOUS) as kara:
        (whole,) = kara.generate([prompt], greedy(250))
        planned = kara.events()[windows - 1]["logical_len"] - len(prompt)
        told = len(kara.events())
        stop = whole.tokens[planned]
        assert whole.tokens.index(stop) == planned
        sampling = SamplingParams(temperature=0, max_tokens=250, stop_token_ids=[stop], ignore_eos=True)
        short, other = kara.generate([prompt, prompts(30, seed=5)[0]], [sampling, greedy(250)])
        assert short.tokens == whole.tokens[: planned + 1]
        assert len(kara.events_of(short.request_id)) == windows
        assert len(kara.events()) > told
        dense.assert_equal(kara, [other], compressions=2)
        kara.assert_nothing_leaks()
        assert kara.runner.kara_ring.sequences <= 1


def test_block_tables_change_only_after_their_last_copy_is_done(model, dense, trace, monkeypatch):
    """A GPU copies them while the host goes on. vLLM waits for that before it prepares the inputs of a step."""
    waited, seen = [], []
    forget = KaraRunnerV1._kara_forget_blocks

    def watched(runner, *args):
        seen.append(bool(waited))
        forget(runner, *args)

    monkeypatch.setattr(KaraRunnerV1, "_kara_forget_blocks", watched)
    with engine(model, trace=trace, **ASYNCHRONOUS) as kara:
        if not isinstance(kara.runner, KaraRunnerV1):
            pytest.skip("vLLM's V2 model runner copies no block table that the host still changes")
        event = kara.runner.prepare_inputs_event
        wait, record = event.synchronize, event.record
        monkeypatch.setattr(event, "synchronize", lambda: (waited.append(1), wait()), raising=False)
        monkeypatch.setattr(event, "record", lambda: (waited.clear(), record()), raising=False)
        served = kara.generate(prompts(5, 40), greedy(200))
        dense.assert_equal(kara, served, compressions=2)
    assert len(seen) >= 4
    assert all(seen)


def test_the_workers_seconds_reach_the_scheduler(model, trace):
    labels = {"model_name": model, "engine": "0"}

    def seconds():
        return REGISTRY.get_sample_value("kara:compress_seconds_total", labels) or 0.0

    before = seconds()
    with engine(model, trace=trace, disable_log_stats=False, **ASYNCHRONOUS) as kara:
        kara.generate(prompts(5), greedy(200))
        assert seconds() - before == pytest.approx(sum(event["seconds"] for event in kara.events()), rel=1e-3)
