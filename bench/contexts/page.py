"""The page of the frontier. Every figure comes from the records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench import tables
from bench.quality.statistics import Interval, ratio

BASE = "K4V4"
PACKAGED = "SmolLM2-135M-Instruct"  # what is measured without --model
BY_KIND = ("K8V8", "K4V4, K8V8 for the best quarter", BASE, "0.75 of the rows, K4V4", "0.5 of the rows, K4V4")
BUDGETS = {
    "1/2": 0.55,
    "3/8": 0.4,
    "1/4": 0.3,
    "3/16": 0.225,
    "1/8": 0.16,
    "1/16": 0.08,
}  # bytes, with bounds and indices

Record = Mapping[str, Any]
Values = dict[str, dict[str, float]]  # codec -> text -> value


def write(head: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The page, in Markdown."""
    judged = [record for record in records if "kl" in record]
    families = {record["codec"]: record["family"] for record in judged}
    kl, held = _values(judged, "kl"), _values(judged, "bytes")
    size = {codec: statistics.fmean(by_text.values()) for codec, by_text in held.items()}
    parts = [
        _head(head, judged, kl),
        ["## The best for the bytes", "", _budgets(kl, size, families)],
        ["## The frontier", "", "No codec here has less of both.", "", _table(_frontier(kl, size), judged, kl, size)],
    ]
    for family, title in TITLES.items():
        names = sorted((codec for codec in kl if families[codec] == family), key=lambda codec: -size[codec])
        if names:
            parts.append([f"## {title}", "", *EXPLAINED.get(family, ()), _table(names, judged, kl, size, family)])
    parts += [_coders(records), _kinds(judged, kl)]
    return "\n".join("\n".join(part) for part in parts if part)


TITLES = {
    "packet": "Packets",
    "change": f"{BASE} with one thing changed",
    "plain": "Bits only, as usually published",
    "rows": "Rows only, in 16 bits",
    "other": "Other codecs",
}
EXPLAINED = {
    "packet": [
        "Rows best first by this library's score, 4 sinks in 16 bits, K rotated and per channel, V per row.",
        "",
    ],
    "change": [f"*By {BASE}*: ratio of the mean KL, paired, with 95 % of bootstrap resamples over texts.", ""],
    "plain": ["Groups of 64 neighbouring rows, every row coded, no rotation.", ""],
    "other": ["Residuals and ThinK as described in `bench/contexts/quantise.py`; rows by position.", ""],
}


def _values(records: Sequence[Record], metric: str) -> Values:
    found: Values = {}
    for record in records:
        found.setdefault(record["codec"], {})[record["text"]] = record[metric]
    return found


def _mean(values: Mapping[str, float]) -> float:
    return statistics.fmean(values.values())


def _head(head: Mapping[str, Any], judged: Sequence[Record], kl: Values) -> list[str]:
    kinds = sorted({record["kind"] for record in judged})
    return [
        "# How to spend a context's bytes",
        "",
        f"Written by `python -m bench.contexts.frontier{_options(head, len(kl[BASE]))}` with {head['model']} "
        f"in float32 (kara_kernels {head['kara_kernels']}, torch {head['torch']}, "
        f"transformers {head['transformers']}; {head['machine']}).",
        f"{len(kl[BASE])} texts of {len(kinds)} kinds ({', '.join(kinds)}).",
        f"A model reads {head['context']} tokens. A codec replaces its cache. The model reads {head['ahead']} more.",
        "KL: to the cache in bfloat16, nats per token, mean over texts. Bytes: of the packet's body, with bounds and",
        "indices, relative to the cache in 16 bits. Rounding the float32 cache to bfloat16 alone costs a KL of",
        f"{_mean(kl['bfloat16']):.6f}.",
        "",
    ]


def _options(head: Mapping[str, Any], count: int) -> str:
    """What the command was given, as far as the records show it."""
    quick = " --quick" if head["quick"] else ""
    return quick if head["model"] == PACKAGED else f"{quick} --model MODEL --texts {count}"


def _frontier(kl: Values, size: Mapping[str, float]) -> list[str]:
    """Codecs that no other one beats in both bytes and KL, most bytes first."""
    names: list[str] = []
    for codec in sorted(
        (codec for codec in kl if codec != "bfloat16"), key=lambda codec: (size[codec], _mean(kl[codec]))
    ):
        if not names or _mean(kl[codec]) < _mean(kl[names[-1]]):
            names.append(codec)
    return names[::-1]


def _budgets(kl: Values, size: Mapping[str, float], families: Mapping[str, str]) -> str:
    rows = []
    for budget, most in BUDGETS.items():
        cells = [budget]
        for some in (("packet",), ("plain",), ("rows",), ("other", "change")):
            fitting = [codec for codec in kl if families[codec] in some and 0 < size[codec] <= most]
            best = min(fitting, key=lambda codec: _mean(kl[codec]), default=None)
            cells.append(f"{best}: {_mean(kl[best]):.5f} at {size[best]:.3f}" if best else "")
        rows.append(cells)
    return tables.markdown(["bytes", "packet", "bits only", "rows only", "others"], rows)


def _table(
    names: Sequence[str], judged: Sequence[Record], kl: Values, size: Mapping[str, float], family: str = ""
) -> str:
    top1 = _values([record for record in judged if "top1" in record], "top1")
    rows = []
    for codec in names:
        typical = statistics.median(kl[codec].values())
        cells = [
            codec,
            f"{size[codec]:.4f}",
            f"{_mean(kl[codec]):.5f}",
            f"{typical:.5f}",
            f"{100 * _mean(top1[codec]):.1f} %",
        ]
        if family == "change":
            cells.append(_shown(ratio(kl[codec], kl[BASE])))
        rows.append(cells)
    return tables.markdown(
        ["codec", "bytes", "KL", "median", "same token", *([f"by {BASE}"] * (family == "change"))], rows
    )


def _shown(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _coders(records: Sequence[Record]) -> list[str]:
    found = [record for record in records if record["family"] == "coder"]
    if not found:
        return []
    rows = []
    for part, coder in sorted({(record["part"], record["coder"]) for record in found}):
        some = [record for record in found if (record["part"], record["coder"]) == (part, coder)]
        speeds = [record["megabytes_per_second"] for record in some if "megabytes_per_second" in record]
        rows.append([
            part, coder, f"{statistics.fmean(record['squeezed'] for record in some):.3f}",
            f"{statistics.median(speeds):.0f}" if speeds else "",
        ])  # fmt: skip
    table = tables.markdown(["codes", "coder", "bytes kept", "MB/s"], rows)
    return [
        f"## Lossless coding of {BASE}'s codes",
        "",
        "The entropy is what an ideal coder of single codes would keep.",
        "",
        table,
    ]


def _kinds(judged: Sequence[Record], kl: Values) -> list[str]:
    names = [codec for codec in BY_KIND if codec in kl]
    kinds: dict[str, list[str]] = {}
    for record in judged:
        if record["codec"] == BASE:
            kinds.setdefault(record["kind"], []).append(record["text"])
    rows = [
        [kind, len(some), *(f"{statistics.fmean(kl[codec][text] for text in some):.5f}" for codec in names)]
        for kind, some in sorted(kinds.items())
    ]
    return ["## By kind of text", "", tables.markdown(["kind", "texts", *names], rows)]
