"""Kara's counters are sent along with other statistics and do not change them."""

import copy
import importlib
import sys

import pytest
from harness import engine, greedy, prompts
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
    names = ("compressions_total", "tokens_dropped_total", "blocks_freed_total", "compress_seconds_total", "retention")
    return {name: REGISTRY.get_sample_value(f"kara:{name}", labels) or 0.0 for name in names}


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
    counted = {name: value - before[name] for name, value in shown(model).items()}
    assert len(events) >= 3
    assert counted["compressions_total"] == len(events)
    assert counted["tokens_dropped_total"] == 32 * len(events)
    assert counted["blocks_freed_total"] == sum(event["freed_blocks"] for event in events)
    assert counted["compress_seconds_total"] > 0


def test_who_expects_no_report_reads_all_the_others():
    """vLLM's coordinator of data-parallel engines ignores our field. A front end with Kara also decodes engines without
    Kara."""
    outputs = EngineCoreOutputs(engine_index=3, scheduler_stats=SchedulerStats(kv_connector_stats=FOREIGN))
    report = Report({"compressions": 2.0, "compress_seconds": 0.25}, {"cap": 1}, 0.75)
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
