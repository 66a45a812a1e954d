"""The page and the picture of the results. Every figure comes from the records, none is written by hand."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kara_kernels.engine import Policy

from . import picture
from .measure import DISTANCES
from .methods import (
    ABLATION_RETENTION,
    BASE,
    DEFAULT,
    GUARDED_RETENTIONS,
    METHODS,
    SERVED_RETENTIONS,
    Served,
    ablations,
    guards,
    served,
)
from .models import PEERS, Others, best_peer, model_of, name_of, retentions_of, shown, side_by_side
from .statistics import Table, by_text, difference, mean, ratio, recall_by_kind, recall_tables

SERVED_GROUP = 4
WHAT = {method.name: method.what for method in METHODS}


def write(result: Mapping[str, Any], folder: Path, beside: Others) -> list[Path]:
    """The page and the picture in ``folder``. The page also has the models ``beside``."""
    name = name_of(result["plan"]["model"])
    page, drawn = folder / f"{name}.md", folder / f"{name}.png"
    page.write_text("\n".join(_page(result, beside)) + "\n", encoding="utf-8")
    picture.draw(result, drawn)
    return [page, drawn]


class _Tables(NamedTuple):
    """By method and retention, then by text or haystack."""

    kl: Table
    top1: Table
    above: Table
    exact: Table


def _page(result: Mapping[str, Any], beside: Others) -> list[str]:
    records = result["records"]
    found = _Tables(by_text(records, "fidelity", "kl"), by_text(records, "fidelity", "top1"), *recall_tables(records))
    kl, above, exact = found.kl, found.above, found.exact
    retentions = retentions_of(kl)
    parts = [
        _head(result),
        ["## In short", "", *_short(kl, above, exact, retentions)],
        side_by_side(result, beside),
        _fidelity(records, found, retentions),
        _served(kl),
        _guarded(kl, by_text(records, "fidelity", "held")),
        _recall(records, found, retentions),
        _decoding(records),
        _ablations(kl, by_text(records, "fidelity", "held")),
        ["## Where Kara loses", "", *_losses(kl, above, exact, retentions), *_losses_decoding(records)],
        LIMITS,
    ]
    return list(itertools.chain.from_iterable([*part, ""] for part in parts if part))[:-1]


def _head(result: Mapping[str, Any]) -> list[str]:
    plan = result["plan"]
    model, name, dtype = model_of(result), name_of(plan["model"]), plan.get("dtype", "float32")
    best = picture.best_peers(result["records"])
    return [
        "# Does it keep the meaning?",
        "",
        f"Written by `make quality`{' --quick' if plan['quick'] else ''} with {model} in {dtype} "
        f"(kara_kernels {result['kara_kernels']}, torch {result['torch']}, transformers {result['transformers']}; "
        f"{result['machine']}; seed {plan['seed']}).",
        f"All methods: window {result['window']}, tail {result['tail']}, the first 64 tokens of every text protected.",
        "Retention is what is kept of a window. Intervals: 95 % of bootstrap resamples over texts, paired.",
        "",
        f"![KL divergence and recall by retention]({name}.png)",
        "",
        "The picture names the peers that rank best, over its three panels and all retentions: "
        + ", ".join(f"{name} (mean rank {rank:.1f})" for name, rank in best.items())
        + ".",
    ]


def _fidelity(records: Sequence[Mapping[str, Any]], found: _Tables, retentions: Sequence[float]) -> list[str]:
    kl, top1 = found.kl, found.top1
    return [
        f"## Fidelity: KL to the full cache, nats per token, over {len(kl[DEFAULT, retentions[0]])} texts",
        "",
        "Every window of a text is compressed, then the next 192 tokens are read. In brackets: how often the most",
        "likely token is the full cache's. *Score* is the time of scoring one window in all layers, medians, of plain",
        "PyTorch on this CPU; peers were written for clearness, not speed.",
        "",
        *_grid(
            kl,
            retentions,
            lambda m, r: f"{mean(kl[m, r]):.4f} ({100 * mean(top1[m, r]):.0f} %)",
            _milliseconds(records),
        ),
        "",
        *_kinds(kl, retentions),
        "",
        *_distances(records, retentions),
    ]


def _recall(records: Sequence[Mapping[str, Any]], found: _Tables, retentions: Sequence[float]) -> list[str]:
    above, exact = found.above, found.exact
    return [
        f"## Recall, over {len(above.get((DEFAULT, retentions[0]), {}))} haystacks",
        "",
        "Nats per answer token above the full cache's. In brackets: share of the answers said exactly, of those that",
        "the full cache says exactly.",
        "",
        *_grid(above, retentions, lambda m, r: f"{mean(above[m, r]):.2f} ({100 * mean(exact[m, r]):.0f} %)"),
        "",
        *_recall_kinds(records, retentions),
    ]


LIMITS = [
    "## What this does not say",
    "",
    "One small model, texts of some 2,400 tokens, one seed. Fidelity and recall compress what a model with its",
    "full cache left (see `bench/quality/replay.py`); only *Decoding* lets errors build up. Nothing is said about",
    "answers of reasoning models to hard questions, which this model could not give. PyramidKV has a budget for",
    "every layer, which a paged cache with one block table for all layers cannot hold. KVzip needs a second pass",
    "over the text and was left out. What was tried on the way and not kept: [tried.md](tried.md).",
]


def _short(kl: Table, above: Table, exact: Table, retentions: Sequence[float]) -> list[str]:
    rows = [
        "| retention | KL, default | best peer | default by peer | recall: default - best peer | exact answers |",
        "|---|---|---|---|---|---|",
    ]
    for r in retentions:
        peer, ours = best_peer(kl, r), kl[DEFAULT, r]
        cells = [f"{r:.0%}", f"{mean(ours):.4f}", f"{peer} {mean(kl[peer, r]):.4f}", shown(ratio(ours, kl[peer, r]))]
        if (DEFAULT, r) in above:
            other = best_peer(above, r)
            most = max((p for p in PEERS if (p, r) in exact), key=lambda p: mean(exact[p, r]))
            cells += [
                f"{shown(difference(above[DEFAULT, r], above[other, r]), sign=True)} ({other})",
                f"{mean(exact[DEFAULT, r]):.0%}; {most} {mean(exact[most, r]):.0%}",
            ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _grid(
    table: Table, retentions: Sequence[float], cell: Callable[[str, float], str], last: Mapping[str, str] | None = None
) -> list[str]:
    """One row per method, best first at the middle retention."""
    middle = retentions[len(retentions) // 2]
    names = sorted((m for m in WHAT if (m, middle) in table), key=lambda m: mean(table[m, middle]))
    head = ["method", "", *(f"{r:.0%}" for r in retentions), *(["score"] if last else [])]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        shown = f"**{name}**" if name == DEFAULT else name
        cells = [shown, WHAT[name], *(cell(name, r) for r in retentions), *([last[name]] if last else [])]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _milliseconds(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    seconds: dict[str, list[float]] = {}
    for record in records:
        if record["task"] == "fidelity":
            seconds.setdefault(record["method"], []).append(record["score_seconds"])
    return {method: f"{1000 * statistics.median(times):.0f} ms" for method, times in seconds.items()}


def _kinds(kl: Table, retentions: Sequence[float]) -> list[str]:
    texts = sorted(kl[DEFAULT, retentions[0]], key=lambda text: text.split("(")[-1])
    rows = [
        "The default's KL by that of the best peer over all texts, text by text:",
        "",
        "| text | " + " | ".join(f"{r:.0%} ({best_peer(kl, r)})" for r in retentions) + " |",
        "|---|" + "---|" * len(retentions),
    ]
    for text in texts:
        cells = (f"{kl[DEFAULT, r][text] / kl[best_peer(kl, r), r][text]:.2f}" for r in retentions)
        rows.append(f"| {text} | " + " | ".join(cells) + " |")
    return rows


def _distances(records: Sequence[Mapping[str, Any]], retentions: Sequence[float]) -> list[str]:
    r = retentions[len(retentions) // 2]
    spans = [f"{a}-{b}" for a, b in itertools.pairwise(DISTANCES)]
    rows = [
        f"KL by distance since the compression, in tokens, at {r:.0%}:",
        "",
        "| method | " + " | ".join(spans) + " |",
        "|---|" + "---|" * len(spans),
    ]
    for name in WHAT:
        found = [
            x["kl_by_distance"] for x in records if (x["task"], x["method"], x["retention"]) == ("fidelity", name, r)
        ]
        if found:
            means = [statistics.fmean(column) for column in zip(*found, strict=True)]
            rows.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in means) + " |")
    return rows


def _recall_kinds(records: Sequence[Mapping[str, Any]], retentions: Sequence[float]) -> list[str]:
    r = 0.5 if 0.5 in retentions else retentions[-1]
    full = recall_by_kind(records, "full", 1.0)
    kinds = sorted(full)
    rows = [
        f"By kind of question at {r:.0%}: nats per answer token (share said exactly, of all cases):",
        "",
        "| method | " + " | ".join(kinds) + " |",
        "|---|" + "---|" * len(kinds),
        "| full cache | " + " | ".join(f"{full[kind][0]:.2f} ({full[kind][1]:.0%})" for kind in kinds) + " |",
    ]
    for name in WHAT:
        found = recall_by_kind(records, name, r)
        if found:
            rows.append(f"| {name} | " + " | ".join(f"{found[k][0]:.2f} ({found[k][1]:.0%})" for k in kinds) + " |")
    return rows


def _decoding(records: Sequence[Mapping[str, Any]]) -> list[str]:
    kl, until = by_text(records, "decoding", "kl"), by_text(records, "decoding", "until")
    if not kl:
        return []
    retentions = sorted({r for _, r in kl})
    length = next(x["of"] for x in records if x["task"] == "decoding")
    rows = [
        f"## Decoding with KaraCache: {len(next(iter(kl.values())))} greedy generations of {length} tokens",
        "",
        "KL behind the first compression, errors building up; in brackets the tokens until greedy decoding would first",
        "say something else than with the full cache (means; the first compression comes after 320 tokens).",
        "",
        "| method | " + " | ".join(f"{r:.0%}" for r in retentions) + " |",
        "|---|" + "---|" * len(retentions),
    ]
    for name in WHAT:
        if (name, retentions[0]) in kl:
            cells = (f"{mean(kl[name, r]):.4f} ({mean(until[name, r]):.0f})" for r in retentions)
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _served(kl: Table) -> list[str]:
    """What engines record, by what it loses."""
    policies = {method.name: method.scorer.policy for method in served() if isinstance(method.scorer, Served)}
    first = next(iter(policies))
    if (first, SERVED_RETENTIONS[0]) not in kl:
        return []
    rows = [
        f"## As served: what engines record, over {len(kl[first, SERVED_RETENTIONS[0]])} texts",
        "",
        "KL by that of the default with all queries in float32, same texts. The first row is what vLLM and",
        "KaraBatching record by default. If it does not fit `max_query_gib`, vLLM falls back to the forms below",
        f"*not ahead*, in this order. *Bits* are those of a token, KV head and dimension, with {SERVED_GROUP} query",
        "heads per KV head of dimension 128.",
        "",
        "| recorded | bits | " + " | ".join(f"{r:.0%}" for r in SERVED_RETENTIONS) + " |",
        "|---|---|" + "---|" * len(SERVED_RETENTIONS),
    ]
    for name, policy in policies.items():
        if (name, SERVED_RETENTIONS[0]) in kl:
            cells = (shown(ratio(kl[name, r], kl[DEFAULT, r])) for r in SERVED_RETENTIONS)
            rows.append(f"| {name} | {_bits(policy):.2g} | " + " | ".join(cells) + " |")
    return rows


def _guarded(kl: Table, held: Table) -> list[str]:
    """What the guard buys at the same memory."""
    methods = [method for method in guards() if (method.name, GUARDED_RETENTIONS[0]) in kl]
    if not methods:
        return []
    rows = [
        f"## The guard, over {len(kl[methods[0].name, GUARDED_RETENTIONS[0]])} texts",
        "",
        "KL by that of the default, which keeps as many tokens of every window. Each text has the limit with which the",
        "guard keeps as many on average; in brackets what the caches hold, by the default's.",
        "",
        "| | | " + " | ".join(f"{r:.0%}" for r in GUARDED_RETENTIONS) + " |",
        "|---|---|" + "---|" * len(GUARDED_RETENTIONS),
    ]
    for method in methods:
        cells = (
            f"{shown(ratio(kl[method.name, r], kl[DEFAULT, r]))} "
            f"[{ratio(held[method.name, r], held[DEFAULT, r]).value:.3f}]"
            for r in GUARDED_RETENTIONS
        )
        rows.append(f"| {method.name} | {method.what} | " + " | ".join(cells) + " |")
    return rows


def _bits(policy: Policy) -> float:
    per_element = {"int4": 4 + 16 / 128, "fp8": 8, "auto": 16}[policy.query_dtype]
    return per_element * policy.recorded_heads(SERVED_GROUP, 1) / policy.query_stride


def _ablations(kl: Table, held: Table) -> list[str]:
    r = ABLATION_RETENTION
    names = [method.name for method in ablations() if (method.name, r) in kl and (BASE, r) in kl]
    if not names:
        return []
    rows = [
        f"## One setting at a time, at {r:.0%}, over {len(kl[names[0], r])} texts",
        "",
        f"KL by that of *{BASE}*, same texts. *Held* is the share of the text's tokens that the cache still holds:",
        "another tail changes that too.",
        "",
        "| setting | KL | held |",
        "|---|---|---|",
        *(
            f"| {name} | {shown(ratio(kl[name, r], kl[BASE, r]))} | {mean(held[name, r]):.1%} |"
            for name in (BASE, *names)
        ),
    ]
    return rows


def _losses(kl: Table, above: Table, exact: Table, retentions: Sequence[float]) -> list[str]:
    """Every peer and every variant of Kara that is significantly better than the default."""
    lines = []
    for r in retentions:
        for name in WHAT:
            if name == DEFAULT:
                continue
            if (name, r) in kl and (by := ratio(kl[DEFAULT, r], kl[name, r])).low > 1:
                lines.append(f"- {r:.0%}, KL: *{name}*, by {shown(by)}")
            if (name, r) in above and (by := difference(above[DEFAULT, r], above[name, r])).low > 0:
                lines.append(f"- {r:.0%}, recall: *{name}*, by {shown(by, sign=True)} nats")
            if (name, r) in exact and (by := difference(exact[DEFAULT, r], exact[name, r])).high < 0:
                lines.append(f"- {r:.0%}, exact answers: *{name}*, by {shown(by, sign=True)}")
    single = sum(
        kl[DEFAULT, r][text] > kl[name, r][text]
        for r in retentions for name in PEERS if (name, r) in kl for text in kl[DEFAULT, r]
    )  # fmt: skip
    pairs = sum(len(kl[DEFAULT, r]) for r in retentions for name in PEERS if (name, r) in kl)
    lines = lines or ["Against no method of the tables beyond the intervals."]
    for text in sorted(kl[DEFAULT, retentions[0]]):
        worse = [f"{r:.0%}" for r in retentions if kl[DEFAULT, r][text] > kl[best_peer(kl, r), r][text]]
        if worse:
            lines.append(f"- *{text}*: more KL than the best peer over all texts at {', '.join(worse)}")
    return [*lines, "", f"Of {pairs} comparisons with a peer on a single text (KL), the default lost {single}."]


def _losses_decoding(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compares means only, because there are too few texts for intervals."""
    kl, until = by_text(records, "decoding", "kl"), by_text(records, "decoding", "until")
    lines = []
    for r in sorted({r for _, r in kl}):
        closer = [m for m in WHAT if m != DEFAULT and (m, r) in kl and mean(kl[m, r]) < mean(kl[DEFAULT, r])]
        longer = [m for m in WHAT if m != DEFAULT and (m, r) in until and mean(until[m, r]) > mean(until[DEFAULT, r])]
        if closer or longer:
            lines.append(
                f"- {r:.0%}, decoding, means: lower KL: {', '.join(closer) or 'none'}; "
                f"longer the same text: {', '.join(longer) or 'none'}"
            )
    return ["", *lines] if lines else []
