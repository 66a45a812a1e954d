"""Kara's counters are sent along with other statistics and do not change them."""

import copy
import importlib
import sys

import pytest
from harness import KARA, engine, greedy, no_block_once, prompts
from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kara_kernels.integrations.vllm.stats import KaraOutputs, Report, with_report

# What a connector may report: anything, under any key.
FOREIGN = {"SomeConnector": {"bytes": [1, 2, 3]}, "kara": {"theirs": 0.5}}

PLUGIN = f"""
import copy, functools, multiprocessing

def report(scheduler):
    make_stats = scheduler.make_stats

    @functools.wraps(make_stats)
    def with_foreign(self, *args, **kwargs):
        stats = make_stats(self, *args, **kwargs)
        stats.kv_connector_stats = copy.deepcopy({FOREIGN!r})
        return stats

    return with_foreign

def register():
    if multiprocessing.parent_process() is not None:  # the process of the tests is patched for one test only
        from vllm.v1.core.sched.scheduler import Scheduler
        Scheduler.make_stats = report(Scheduler)
"""


@pytest.fixture
def reporting_connector(tmp_path, monkeypatch):
    """Simulates a connector, because none is configured. A plugin inserts its reports at the scheduler, also in
    separate processes. They are intercepted where vLLM would pass them to the connector's logging and metrics."""
    (tmp_path / "foreign_stats.py").write_text(PLUGIN)
    installed = tmp_path / "foreign_stats-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-stats\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[vllm.general_plugins]\nforeign = foreign_stats:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Scheduler, "make_stats", importlib.import_module("foreign_stats").report(Scheduler))
    monkeypatch.delitem(sys.modules, "foreign_stats")
    arrived = []

    def observe(self, given, *args):
        arrived.append((type(self), copy.deepcopy(given)))

    for end in (KVConnectorLogging, KVConnectorProm):
        monkeypatch.setattr(end, "observe", observe)
    return arrived


def shown(model):
    """Kara's metrics on /metrics."""
    labels = {"model_name": model, "engine": "0"}
    names = (
        "compressions_total", "tokens_dropped_total", "blocks_freed_total", "compress_seconds_total", "retention",
        "recomputed_tokens_total", "query_ring_bytes", "request_retention_count", "request_retention_sum",
        "request_lost_count", "request_lost_sum",
    )  # fmt: skip
    found = {name: REGISTRY.get_sample_value(f"kara:{name}", labels) or 0.0 for name in names}
    for reason in ("request", "default", "short"):
        value = REGISTRY.get_sample_value("kara:opted_out_total", {**labels, "reason": reason})
        found[reason] = value or 0.0
    return found


def counted(model, before):
    return {name: value - before[name] for name, value in shown(model).items()}


@pytest.mark.parametrize("process", ["0", "1"], ids=["in process", "engine core in a process of its own"])
def test_statistics_of_connectors_arrive_untouched_and_ours_beside_them(
    model, trace, monkeypatch, reporting_connector, process
):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", process)
    before = shown(model)
    with engine(model, trace=trace, disable_log_stats=False) as kara:
        assert (kara.scheduler is None) == (process == "1")
        kara.generate(prompts(5, 40, 77), greedy(200))
        events = kara.events()
    assert {end for end, _ in reporting_connector} == {KVConnectorLogging, KVConnectorProm}
    assert len(reporting_connector) >= 2 * 200  # one a step, at both ends
    assert all(given == FOREIGN for _, given in reporting_connector)
    found = counted(model, before)
    assert len(events) >= 3
    assert found["compressions_total"] == len(events)
    assert found["tokens_dropped_total"] == 32 * len(events)
    assert found["blocks_freed_total"] == sum(event["freed_blocks"] for event in events)
    assert found["compress_seconds_total"] > 0


def test_who_was_left_alone_and_why(model, trace):
    for default, reasons in (("on", (2, 0, 1)), ("off", (2, 2, 0))):
        before = shown(model)
        asks = [{"kara": False}, None, {"kara": 0}, None, {"kara": True}]
        sampling = [greedy(n, extra_args=ask) for n, ask in zip((200, 200, 20, 20, 20), asks, strict=True)]
        with engine(model, {**KARA, "default": default}, trace=trace, disable_log_stats=False) as kara:
            kara.generate(prompts(5, 40, 77, 20, 9), sampling)
        found = counted(model, before)
        assert tuple(found[reason] for reason in ("request", "default", "short")) == reasons
        assert found["request_retention_count"] == 5 - sum(reasons)


def test_each_request_leaves_its_retention(model, trace):
    before = shown(model)
    with engine(model, trace=trace, disable_log_stats=False) as kara:
        served = kara.generate(prompts(5, 40, 77), [greedy(n) for n in (200, 100, 90)])
        want = [
            1 - 32 * len(kara.events_of(request.request_id)) / (len(request.prompt) + len(request.tokens) - 1)
            for request in served
        ]
        assert len(kara.events()) >= 4
        lost = [[event["lost"] for event in kara.events_of(request.request_id)] for request in served]
    found = counted(model, before)
    assert found["request_lost_count"] == sum(map(bool, lost))
    assert found["request_lost_sum"] == pytest.approx(sum(sum(x) / len(x) for x in lost if x))
    assert found["request_retention_count"] == 3
    assert found["request_retention_sum"] == pytest.approx(sum(want))


def test_aborted_requests_count_and_nothing_piles_up_without_metrics(model):
    with engine(model) as kara:
        kara.generate(prompts(5, 40), greedy(100))
        assert not kara.scheduler._ended
        assert not kara.scheduler._lost
    before = shown(model)
    with engine(model, disable_log_stats=False) as kara:
        kara.drive(
            {
                0: lambda kara: (kara.add("A", prompts(5)[0], 200), kara.add("B", prompts(9)[0], 120)),
                50: lambda kara: kara.abort("A"),
            }
        )
    assert counted(model, before)["request_retention_count"] == 2


def test_memory_and_what_is_lost_to_preemption(model):
    before = shown(model)
    lost = []
    tiny = {"max_model_len": 416, "num_gpu_blocks_override": 15, "enable_prefix_caching": False}
    with engine(model, disable_log_stats=False, **tiny) as kara:
        preempt = kara.scheduler._preempt_request

        def preempted(request, *args, **kwargs):
            lost.append(request.num_computed_tokens)
            return preempt(request, *args, **kwargs)

        kara.scheduler._preempt_request = preempted
        kara.generate(prompts(5, 40, 77, 30, 51, 20), greedy(300))
        assert shown(model)["query_ring_bytes"] == kara.runner.kara_ring.nbytes
    assert len(lost) >= 3
    assert counted(model, before)["recomputed_tokens_total"] == sum(lost)


def test_tokens_that_the_prefix_cache_still_has_are_not_recomputed(model):
    before = shown(model)
    (prompt,) = prompts(20)
    with engine(model, disable_log_stats=False) as kara:
        # Preempted with 20 + 78 computed tokens, of which three blocks of 32 are found again.
        kara.drive({0: lambda kara: kara.add("A", prompt, 250), 79: no_block_once})
    assert counted(model, before)["recomputed_tokens_total"] == 98 - 96


def test_who_expects_no_report_reads_all_the_others():
    """vLLM's coordinator of data-parallel engines ignores our field. A front end with Kara also decodes engines without
    Kara."""
    outputs = EngineCoreOutputs(engine_index=3, scheduler_stats=SchedulerStats(kv_connector_stats=FOREIGN))
    counts = {"compressions": 2.0, "compress_seconds": 0.25}
    report = Report(counts, {"cap": 1}, {"short": 2}, [0.5, 1.0], [0.25], 0.75, 99, 96)
    sent = MsgpackEncoder().encode(with_report(outputs, report))
    there = MsgpackDecoder(EngineCoreOutputs).decode(sent)
    assert type(there) is EngineCoreOutputs
    assert there == outputs
    here = MsgpackDecoder(KaraOutputs).decode(sent)
    assert here.kara == here.scheduler_stats.kara == report
    assert here.scheduler_stats == outputs.scheduler_stats
    plain = MsgpackDecoder(KaraOutputs).decode(MsgpackEncoder().encode(outputs))
    assert plain.kara is None
    assert not hasattr(plain.scheduler_stats, "kara")


def test_vllm_encodes_no_attribute_that_is_no_field():
    """The reason why a report is not part of SchedulerStats. If this fails, vLLM has a simpler channel."""
    stats = SchedulerStats()
    stats.kara = {"compressions": 1}
    assert "kara" not in MsgpackDecoder().decode(MsgpackEncoder().encode(stats))
