"""Means over texts and their confidence intervals, from a bootstrap over texts. Comparisons are paired."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

DRAWS, LEVEL = 4000, 0.95

Table = dict[tuple[str, float], dict[str, float]]  # (method, retention) -> text -> value


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def by_text(records: Sequence[Mapping[str, Any]], task: str, metric: str) -> Table:
    """One metric of all records of ``task``, by method and retention, then by text."""
    table: Table = {}
    for record in records:
        if record["task"] == task and metric in record:
            table.setdefault((record["method"], record["retention"]), {})[record["item"]] = record[metric]
    return table


def mean(values: Mapping[str, float]) -> float:
    return statistics.fmean(values.values())


def ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Interval:
    """The ratio of means over the texts that both have, and the interval with 95 % of the resampled ratios."""
    return _interval(ours, theirs, lambda a, b: a / b if b else float("nan"))


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Interval:
    """The mean of ours - theirs over the texts that both have, and its interval."""
    return _interval(ours, theirs, lambda a, b: a - b)


def _interval(ours: Mapping[str, float], theirs: Mapping[str, float], compare: Any) -> Interval:
    texts = sorted(set(ours) & set(theirs))
    if not texts:
        raise ValueError("expected a text that both methods have read, got none")
    a, b = [ours[text] for text in texts], [theirs[text] for text in texts]
    draw = random.Random(0)
    picks = [draw.choices(range(len(texts)), k=len(texts)) for _ in range(DRAWS)]
    n = len(texts)
    seen = sorted(compare(sum(a[i] for i in pick) / n, sum(b[i] for i in pick) / n) for pick in picks)
    edge = round((1 - LEVEL) / 2 * (DRAWS - 1))
    return Interval(compare(sum(a) / n, sum(b) / n), seen[edge], seen[-1 - edge])


def ranks(tables: Sequence[tuple[Table, int]], names: Iterable[str]) -> dict[str, float]:
    """Mean rank of every method in ``names`` over all tables and retentions, best first. Ties share the better rank.

    Each table comes with 1 if lower is better and -1 if higher is better. Methods with missing values are left out.
    """
    places = [(table, sign, r) for table, sign in tables for r in sorted({r for _, r in table if r < 1})]
    found = [name for name in names if all((name, r) in table for table, _, r in places)]
    sums = dict.fromkeys(found, 0.0)
    for table, sign, r in places:
        values = {name: sign * mean(table[name, r]) for name in found}
        for name in found:
            sums[name] += 1 + sum(value < values[name] for value in values.values())
    return {name: sums[name] / len(places) for name in sorted(found, key=lambda name: sums[name])}


def recall_tables(records: Sequence[Mapping[str, Any]]) -> tuple[Table, Table]:
    """For each haystack: nats per answer token above the full cache's, over all cases, and the share of answers given
    exactly among those that the full cache gives exactly."""
    full = {r["item"]: r for r in records if r["task"] == "recall" and r["method"] == "full"}
    above: Table = {}
    exact: Table = {}
    for record in records:
        if record["task"] != "recall" or record["method"] == "full":
            continue
        base, key, item = full[record["item"]], (record["method"], record["retention"]), record["item"]
        above.setdefault(key, {})[item] = statistics.fmean(
            nll - least for nll, least in zip(record["nll"], base["nll"], strict=True)
        )
        known = [said for said, can in zip(record["exact"], base["exact"], strict=True) if can]
        exact.setdefault(key, {})[item] = statistics.fmean(known) if known else 0.0
    return above, exact


def recall_by_kind(
    records: Sequence[Mapping[str, Any]], method: str, retention: float
) -> dict[str, tuple[float, float]]:
    """Nats per answer token and share of exact answers over all cases, by kind of question."""
    nll: dict[str, list[float]] = {}
    exact: dict[str, list[bool]] = {}
    for record in records:
        if record["task"] == "recall" and (record["method"], record["retention"]) == (method, retention):
            for kind, value, said in zip(record["kinds"], record["nll"], record["exact"], strict=True):
                nll.setdefault(kind, []).append(value)
                exact.setdefault(kind, []).append(said)
    return {kind: (statistics.fmean(nll[kind]), statistics.fmean(exact[kind])) for kind in nll}
