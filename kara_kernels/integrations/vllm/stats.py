"""Sends Kara's counters from the scheduler's process to the front end and adds them to vLLM's own ``/metrics``.

| metric | |
|---|---|
| ``kara:compressions_total`` | windows compressed |
| ``kara:tokens_dropped_total``, ``kara:blocks_freed_total`` | tokens and blocks that saved |
| ``kara:compress_seconds_total`` | host seconds that workers spent compressing |
| ``kara:skipped_total{reason}`` | windows that had to wait: ``cap``, ``gain``, ``shared``, ``queries`` |
| ``kara:opted_out_total{reason}`` | requests left alone by ``request``, by ``default``, or as too ``short`` |
| ``kara:recomputed_tokens_total`` | tokens computed again after preemptions |
| ``kara:retention`` | physical divided by logical tokens of the running requests |
| ``kara:request_retention`` | the same of each request when it ends, without those left alone: a histogram |
| ``kara:request_lost`` | share of its windows' scores that dropped tokens had, of each request: a histogram |
| ``kara:shadow_...`` | compressions, tokens and blocks of a server that only watches |
| ``kara:query_ring_bytes`` | memory of recorded queries, per worker |
| ``kara:keep`` | tokens of a window that are kept |

They travel in a separate field, :attr:`KaraOutputs.kara`, after the fields of vLLM's step outputs. vLLM encodes these
outputs as an array and appends fields at the end, so a decoder that expects fewer fields ignores ours. The coordinator
of data-parallel engines is such a decoder. ``SchedulerStats`` has no room for the counters: every field there is used,
and attributes that are not fields are not encoded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.engine import EngineCoreOutputs


@dataclass
class Report:
    """Counts and ended requests since the last report, and current values."""

    counts: dict[str, float] = field(default_factory=dict)
    """Counts by the names in :data:`_COUNTERS`."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Windows that had to wait, by reason."""
    opted_out: dict[str, int] = field(default_factory=dict)
    """Requests left alone, by reason."""
    ended: list[float] = field(default_factory=list)
    """Physical divided by logical tokens of each request that ended."""
    lost: list[float] = field(default_factory=list)
    """Share of the scores that dropped tokens had, the mean of its windows, of each request that ended."""
    retention: float = 1.0
    """The same of the running requests together."""
    query_ring_bytes: int = 0
    """Memory of recorded queries, per worker."""
    keep: int = 0
    """Tokens of a window that are kept, unless a request or the guard says otherwise."""


class KaraOutputs(EngineCoreOutputs):  # encoded as an array without defaults, like its base class
    """vLLM's outputs of one step, with a report after its own fields."""

    kara: Report | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # vLLM passes only the scheduler's statistics to loggers, so the report is attached to them as an attribute.
        if self.kara is not None and self.scheduler_stats is not None:
            self.scheduler_stats.kara = self.kara


def with_report(outputs: EngineCoreOutputs, report: Report) -> KaraOutputs:
    """The same outputs, with a report."""
    return KaraOutputs(**{name: getattr(outputs, name) for name in EngineCoreOutputs.__struct_fields__}, kara=report)


_LABELS = ("model_name", "engine")
_COUNTERS = {
    "compressions": "Windows that were compressed.",
    "urgent_compressions": "Windows of them that were compressed early, because blocks were short.",
    "tokens_dropped": "Tokens dropped from the KV cache.",
    "blocks_freed": "KV cache blocks freed by compressions.",
    "shadow_compressions": "Windows that would have been compressed.",
    "shadow_tokens_dropped": "Tokens that would have been dropped.",
    "shadow_blocks_freed": "Blocks that would have been freed.",
    "compress_seconds": "Host seconds that workers spent on compressions.",
    "recomputed_tokens": "Tokens computed again after preemptions.",
}
_BY_REASON = {"skipped": "Windows that had to wait, by reason.", "opted_out": "Requests left alone, by reason."}
_GAUGES = {
    "retention": "Physical by logical tokens of the running requests.",
    "query_ring_bytes": "Memory of recorded queries, per worker.",
    "keep": "Tokens of a window that are kept, unless a request or the guard says otherwise.",
}
_HISTOGRAMS = {
    "ended": ("request_retention", "Physical by logical tokens of requests that ended."),
    "lost": ("request_lost", "Share of its windows' scores that dropped tokens had, of requests that ended."),
}
_SHARES = [0.01, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 11))]


@functools.cache
def _metrics() -> dict[str, Any]:
    """Created once per process, because Prometheus rejects duplicate names."""
    made: dict[str, Any] = {name: Counter(f"kara:{name}", text, _LABELS) for name, text in _COUNTERS.items()}
    made |= {name: Counter(f"kara:{name}", text, (*_LABELS, "reason")) for name, text in _BY_REASON.items()}
    made |= {
        name: Gauge(f"kara:{name}", text, _LABELS, multiprocess_mode="mostrecent") for name, text in _GAUGES.items()
    }
    made |= {name: Histogram(f"kara:{name}", text, _LABELS, buckets=_SHARES) for name, text in _HISTOGRAMS.values()}
    return made


def observe_with_vllm(config: Any) -> None:
    """Receives and exposes the reports of schedulers, in processes that serve ``/metrics``. Idempotent."""
    from vllm.v1.engine import core_client
    from vllm.v1.metrics.loggers import StatLoggerManager

    core_client.EngineCoreOutputs = KaraOutputs  # clients build their decoders from it
    record = StatLoggerManager.record
    if hasattr(record, "kara"):
        return
    model = config.model_config.served_model_name or config.model_config.model
    model = model[0] if isinstance(model, list) else model

    @functools.wraps(record)
    def record_with_kara(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        report = getattr(scheduler_stats, "kara", None)
        if report is not None:
            _observe(report, (model, str(kwargs.get("engine_idx") or 0)))
        record(self, scheduler_stats, *args, **kwargs)

    record_with_kara.kara = True  # type: ignore[attr-defined]
    StatLoggerManager.record = record_with_kara


def _observe(report: Report, labels: tuple[str, str]) -> None:
    metrics = _metrics()
    for name in _COUNTERS:
        metrics[name].labels(*labels).inc(report.counts.get(name, 0))
    for name in _BY_REASON:
        for reason, count in getattr(report, name).items():
            metrics[name].labels(*labels, reason).inc(count)
    for name in _GAUGES:
        metrics[name].labels(*labels).set(getattr(report, name))
    for of_report, (name, _) in _HISTOGRAMS.items():
        for share in getattr(report, of_report):
            metrics[name].labels(*labels).observe(share)
