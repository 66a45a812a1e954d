"""What happens to contexts, on vLLM's own ``/metrics`` and in its log, by the channel that connectors have for it.

Counters grow by what happened since the last step. Gauges hold the newest value.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "hits": (("source",), "Requests admitted with rows of a packet: its tier, or gpu if they were there already."),
    "hit_tokens": (("source",), "Prompt tokens that were not computed for these requests."),
    "resumed": (("source",), "Preempted requests that went on with the rows that windows had left of them."),
    "saves_failed": ((), "Times the directory of contexts on disk could not be written."),
    "closed": (("tier",), "Times a tier could not be written and was given nothing for a while."),
    "refused": ((), "Contexts that were not stored: one may not take so much memory, or nothing may be stored of it."),
    "below_floor": ((), "Times a new profile found a stored context below the floor."),
    "lookups": (("outcome",), "Questions to the remote tier: found, none, late, unfit for this server, failed."),
    "store_errors": (("what",), "Errors of the remote tier's store: slow, gone, refused, failed."),
    "resets": ((), "Times everything stored was forgotten, because vLLM's caches were reset."),
    "slower": ((), "Times a stored context was computed because that was expected to be faster."),
    "jobs": (("job", "outcome"), "Stores and loads that ended, by outcome: ok, failed, damaged."),
    "job_seconds": (("job",), "Seconds that workers spent on stores and loads."),
    "stored": (("method", "ratio"), "Stores that began, by what they store."),
    "moves": (("move",), "Contexts dropped, compressed harder, or left because nothing made room."),
    "first_tokens": (("source",), "Requests that got a first token, by what the rows of their contexts came from."),
    "first_token_seconds": (("source", "what"), "Their seconds since arrival: observed, and predicted without queues."),
}
"""Labels and help of each counter, by the names in :attr:`.manager.ContextManager.counts`."""
GAUGES = {
    "bytes": (("tier",), "Bytes of packets, and of those that are being written."),
    "capacity_bytes": (("tier",), "Bytes that packets may take."),
    "utility": (("tier",), "Of all contexts on a tier: (alpha * quality - seconds to the first token) * uses."),
    "stored_now": ((), "Contexts that are stored."),
    "prefill_token_seconds": ((), "Seconds to compute a token, measured."),
    "load_row_seconds": (("form",), "Seconds to load a row of all layers and heads out of a packet, measured."),
    "profile_contexts": ((), "Contexts in the profile."),
    "profile_age_seconds": ((), "Seconds since the profile was written."),
    "profile_failures": ((), "Times the profile had changed and could not be read."),
}


class ContextStats(KVConnectorStats):
    """``data``: counts and gauges as lists of names, labels and a value, because it travels between processes."""

    @classmethod
    def of(cls, counts: Mapping[tuple[str, ...], float], gauges: Mapping[tuple[str, ...], float]) -> ContextStats:
        return cls({"counts": [[*key, n] for key, n in counts.items()], "gauges": [[*k, n] for k, n in gauges.items()]})

    def counts(self) -> dict[tuple[str, ...], float]:
        return {tuple(key): n for *key, n in self.data.get("counts", ())}

    def gauges(self) -> dict[tuple[str, ...], float]:
        return {tuple(key): n for *key, n in self.data.get("gauges", ())}

    def is_empty(self) -> bool:
        return not self.data.get("counts")

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> ContextStats:
        newer, counts = ContextStats(other.data), self.counts()
        for key, n in newer.counts().items():
            counts[key] = counts.get(key, 0) + n
        self.data = self.of(counts, self.gauges() | newer.gauges()).data
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line of the log."""
        counts, gauges = self.counts(), self.gauges()
        said: dict[str, int | float] = {" ".join(key): round(n, 3) for key, n in sorted(counts.items())}
        return said | {" ".join(key): n for key, n in gauges.items() if key[0] in ("bytes", "stored_now")}


@functools.cache
def _metrics(counter: Any, gauge: Any, labels: tuple[str, ...]) -> dict[str, Any]:
    """Created once per process, because Prometheus rejects duplicate names."""
    made = {
        name: counter(name=f"kara:context_{name}", documentation=text, labelnames=[*labels, *own])
        for name, (own, text) in COUNTERS.items()
    }
    for name, (own, text) in GAUGES.items():
        made[name] = gauge(
            name=f"kara:context_{name}", documentation=text, labelnames=[*labels, *own], multiprocess_mode="mostrecent"
        )
    return made


class ContextMetrics(KVConnectorPromMetrics):
    """The same for Prometheus: ``kara:context_`` and a name."""

    def __init__(self, config: Any, types: Any, labels: list[str], engines: dict[int, list[object]]) -> None:
        super().__init__(config, types, labels, engines)
        self._made = _metrics(self._counter_cls, self._gauge_cls, tuple(labels))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        stats, engine = ContextStats(transfer_stats_data), self.per_engine_labelvalues[engine_idx]
        for (name, *labels), n in stats.counts().items():
            self._made[name].labels(*engine, *labels).inc(n)
        for (name, *labels), n in stats.gauges().items():
            self._made[name].labels(*engine, *labels).set(n)
