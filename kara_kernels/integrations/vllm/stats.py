"""Kara's counters on vLLM's own ``/metrics``: the scheduler reports through vLLM's statistics, the front end shows.

| metric | |
|---|---|
| ``kara:compressions_total`` | windows compressed |
| ``kara:tokens_dropped_total``, ``kara:blocks_freed_total`` | what that saved |
| ``kara:compress_seconds_total`` | host seconds that workers spent on it |
| ``kara:skipped_total{reason}`` | windows that had to wait: ``cap``, ``gain``, ``shared``, ``queries`` |
| ``kara:retention`` | physical by logical tokens of the running requests |
"""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Counter, Gauge

_LABELS = ("model_name", "engine")
_COUNTERS = {
    "compressions": "Windows that were compressed.",
    "tokens_dropped": "Tokens dropped from the KV cache.",
    "blocks_freed": "KV cache blocks freed by compressions.",
    "compress_seconds": "Host seconds that workers spent on compressions.",
}


@functools.cache
def _metrics() -> dict[str, Any]:
    """Made once per process: Prometheus refuses a name twice."""
    made: dict[str, Any] = {name: Counter(f"kara:{name}", text, _LABELS) for name, text in _COUNTERS.items()}
    made["skipped"] = Counter("kara:skipped", "Windows that had to wait, by reason.", (*_LABELS, "reason"))
    made["retention"] = Gauge(
        "kara:retention",
        "Physical by logical tokens of the running requests.",
        _LABELS,
        multiprocess_mode="mostrecent",
    )
    return made


def observe_with_vllm(config: Any) -> None:
    """Shows what schedulers report, in processes that serve ``/metrics``. Idempotent."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    record = StatLoggerManager.record
    if hasattr(record, "kara"):
        return
    model = config.model_config.served_model_name or config.model_config.model
    model = model[0] if isinstance(model, list) else model

    @functools.wraps(record)
    def record_with_kara(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        report = None
        if scheduler_stats is not None and scheduler_stats.kv_connector_stats:
            report = scheduler_stats.kv_connector_stats.pop("kara", None)
            scheduler_stats.kv_connector_stats = scheduler_stats.kv_connector_stats or None
        if report is not None:
            _observe(report, (model, str(kwargs.get("engine_idx") or 0)))
        record(self, scheduler_stats, *args, **kwargs)

    record_with_kara.kara = True  # type: ignore[attr-defined]
    StatLoggerManager.record = record_with_kara


def _observe(report: dict[str, Any], labels: tuple[str, str]) -> None:
    metrics = _metrics()
    for name in _COUNTERS:
        metrics[name].labels(*labels).inc(report["counts"].get(name, 0))
    for reason, count in report["skipped"].items():
        metrics["skipped"].labels(*labels, reason).inc(count)
    metrics["retention"].labels(*labels).set(report["retention"])
