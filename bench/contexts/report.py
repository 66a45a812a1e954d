"""contexts.md and its picture, from the rows of all runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.tables import Row, markdown

from .compare import FIXED, LEVELS, OURS, PAPER, UNLIMITED, cheapest, frontier, of, their_fixed

FIXED_GOAL, LRU_GOAL, PAPER_GOAL, BYTES_GOAL, LOSS = 2.0, 1.6, 1.8, 1 / 3, 0.97
CACHES = ("LRU", "ARC", "LFU")
ALL_METHODS = "Algorithm 1, all methods"
POLICIES = (
    "prefill",
    *CACHES,
    FIXED,
    "IMPRESS-like",
    PAPER,
    ALL_METHODS,
    "priced, its methods",
    "placement, per_byte",
    OURS,
    UNLIMITED,
)
COLOURS = {
    "prefill": "#444444", "LRU": "#b8b8b8", FIXED: "#d98c3f", "IMPRESS-like": "#8a6fae", PAPER: "#c0504d",
    ALL_METHODS: "#e3a7a5", "placement, per_byte": "#6fb2cf", OURS: "#0b6e99",
    UNLIMITED: "#8aa861",
}  # fmt: skip

INTRODUCTION = """# Contexts in tiers: quality against time to the first token

**Simulated** by `make contexts`; the curves of quality against bytes are measured, of {profiled} contexts in {model}
({judge}). On this machine sizes, prefill, questions, decoding and tiers are measured too. **Everything of an H100 is
a model.**

- Requests: Gamma gaps of shape {shape} (coefficient of variation 1.41) at the rate that keeps the GPU busy {busy:.0%}
  of the time if everything is recomputed; Zipf popularity, exponent {exponent}; after every {drift} requests the
  least popular context becomes the most popular. {requests} requests, of which the first {first} warm up. Formulas:
  `bench/contexts/trace.py`.
- Lengths on an H100: log-uniform from 4,096 to 20,480 tokens, drawn with the seed. The curve of a context of 768
  tokens in a small model stands for a longer one in a larger model: an assumption. Prefill takes (2 x parameters x
  tokens + 2 x layers x hidden x tokens^2) / (half of 989 TFLOP/s), a question of 100 tokens at least one read of the
  weights at 3.35 TB/s. Decoding of 500 GB/s is an assumption. Formulas: `bench/contexts/scenario.py`.
- Each tier's link and the GPU serve one request at a time, first come, first served, so times contain waiting. Writes
  and moves take no time; their bytes are counted. Generating answers is left out.
- A policy's row at a quality is its fastest setting whose mean quality over all requests is at least that.
  Recomputed: quality 1.
- Settings: prefill, LRU, ARC, LFU have none; {fixed} has every option of the profile; placements have {alphas} values
  of alpha.
- Caches also run in a form that recomputes what takes longer to load, and Algorithm 1 in a form that does so too and
  promotes what is used. Each comparison takes whichever form is faster, so nothing is won against what a paper leaves
  open.
- Algorithm 1 is EVICPRESS's (arXiv 2512.14946), *its methods* are KeyDiff, Knorm and SnapKV on 16-bit rows.
- {unlimited}: the placement, if the fastest tier had no end. No policy with the same options is faster at its quality,
  but for the order of queues and the steps of alpha.
- IMPRESS-like: whole contexts on the slow tier, halves by SnapKV loaded and cached in RAM: a simplification.
"""


def page(head: Row, rows: Sequence[Row]) -> str:
    runs = [row for row in rows if row["table"] == "run"]
    worlds = [row for row in rows if row["table"] == "scenario"]
    parts = [
        INTRODUCTION.format(**head, fixed=FIXED, unlimited=UNLIMITED[0].upper() + UNLIMITED[1:]),
        _worlds(worlds),
        _goals(runs, worlds),
    ]
    parts.append("![Quality against mean time to the first token](contexts.png)\n")
    for world in worlds:
        if world["seed"] == worlds[0]["seed"]:
            parts.append(_scenario(world, _runs(runs, world)))
    parts.append(_fleet([row for row in rows if row["table"] == "fleet"]))
    parts.append(_losses([row for row in rows if row["table"] == "loss"]))
    return "\n".join(parts)


def _runs(runs: Sequence[Row], world: Row) -> list[Row]:
    return [row for row in runs if (row["scenario"], row["seed"]) == (world["scenario"], world["seed"])]


def _worlds(worlds: Sequence[Row]) -> str:
    def tiers(world: Row) -> str:
        parts = [
            f"{name} {tier['capacity'] / 1e9:,.1f}, {tier['bandwidth'] / 1e9:.2f}"
            for name, tier in world["tiers"].items()
        ]
        return "; ".join(parts)

    return "## Scenarios\n\n" + markdown(
        ("scenario", "seed", "contexts", "uncompressed, GB", "tiers: GB, GB/s", "prefill, s", "requests/s", "costs"),
        ((w["scenario"], w["seed"], w["contexts"], f"{w['bytes'] / 1e9:,.1f}", tiers(w), f"{w['prefill']:.3f}",
          f"{w['rate']:.2f}", "a model's" if w["model"] else "measured here") for w in worlds),
    )  # fmt: skip


Choose = Callable[[Sequence[Row]], list[Row]]


class Ratios(NamedTuple):
    time: float
    """Their mean time to the first token relative to ours."""
    most: float
    """The same relative to a RAM that holds everything."""
    size: float
    """Our bytes a hit relative to theirs."""


def ratios(runs: Sequence[Row], theirs: Choose, level: float) -> Ratios | None:
    """None: someone has no setting of this quality, or stores nothing."""
    mine, bound, other = (cheapest(rows, level) for rows in (of(runs, OURS), of(runs, UNLIMITED), theirs(runs)))
    if mine is None or bound is None or other is None:
        return None
    size = mine["hit_bytes"] / other["hit_bytes"] if other["hit_bytes"] else float("inf")
    return Ratios(other["ttft"] / mine["ttft"], other["ttft"] / bound["ttft"], size)


GOALS: dict[str, tuple[str, Choose, tuple[float, ...], float, float | None]] = {
    "fixed": (f"the best {FIXED}, of the published methods", their_fixed, LEVELS, FIXED_GOAL, None),
    "fixed, all": (f"the best {FIXED}, of all options, this library's included", lambda runs: of(runs, FIXED), LEVELS,
                   FIXED_GOAL, None),
    "lru": ("LRU, at most 3 % of quality lost", lambda runs: of(runs, "LRU"), (LOSS,), LRU_GOAL, None),
    "paper": ("Algorithm 1 with its own methods", lambda runs: of(runs, PAPER), LEVELS, PAPER_GOAL, BYTES_GOAL),
}  # fmt: skip


def missed(runs: Sequence[Row], worlds: Sequence[Row]) -> list[str]:
    """Goals that do not hold, one line each."""
    lines = []
    for name, (_, theirs, levels, least, most) in GOALS.items():
        for world in worlds:
            for level in levels:
                found, where = ratios(_runs(runs, world), theirs, level), f"{world['scenario']}, seed {world['seed']}"
                if found is not None and found.time < least:
                    line = f"{name}, {where}, quality {level}: {found.time:.2f}x, at least {least}x"
                    lines.append(f"{line}; {found.most:.2f}x if RAM held everything")
                if found is not None and most is not None and found.size > most:
                    lines.append(f"{name}, {where}, quality {level}: bytes {found.size:.2f}, at most {most:.2f}")
    return lines


def _goals(runs: Sequence[Row], worlds: Sequence[Row]) -> str:
    parts = [
        "## Goals\n\nTheir mean time to the first token, relative to that of the placement with all methods, where "
        "both keep at least the quality on top. Bold: missed; *of*: what a RAM that holds everything would reach. A "
        "dash: nobody compares.\n"
    ]
    for title, theirs, levels, least, most in GOALS.values():
        bytes_ = f"; bytes of a hit, relative to theirs: at most {most:.2f}" if most else ""
        parts.append(f"### {title[0].upper()}{title[1:]}: at least {least}x{bytes_}\n")
        lines = [
            (w["scenario"], w["seed"], *(_cell(ratios(_runs(runs, w), theirs, level), least, most) for level in levels))
            for w in worlds
        ]
        parts.append(markdown(("scenario", "seed", *map(str, levels)), lines))
    parts.append(_why(missed(runs, worlds)))
    return "\n".join(parts)


def _cell(found: Ratios | None, least: float, most: float | None) -> str:
    if found is None:
        return "-"
    cell = f"{found.time:.2f}x" if found.time >= least else f"**{found.time:.2f}x** of {found.most:.2f}x"
    if most is not None:
        cell += f", {found.size:.2f}" if found.size <= most else f", **{found.size:.2f}**"
    return cell


def _why(lines: Sequence[str]) -> str:
    """What explains the misses, for those that there are."""
    reasons = []
    if any(line.startswith("fixed, all") for line in lines):
        reasons.append(
            "Why not 2x against the best fixed option of all: most of the gain over published baselines is the "
            "packet's. Bits are cut before rows, so one packet for all contexts is nearly the best that each can have "
            "at its quality. Small packets lie in RAM whatever the policy, and the first use of a context is computed "
            "by everybody: where even a RAM that holds everything stays below 2x, no placement can reach it."
        )
    if any(not line.startswith("fixed, all") and "bytes" not in line for line in lines):
        reasons.append(
            "Why the others come close in places: there, loading is a small part of the time to the first token. What "
            "is left is decoding, the question, and recomputing what no policy could have stored. See the shares below."
        )
    if any("bytes" in line for line in lines):
        reasons.append(
            "Why not always a third of the bytes: room that is free is used. And at the highest quality 8 bits are the "
            "least that loses nothing: half."
        )
    return "\n\n".join(reasons) + "\n"


def _scenario(world: Row, runs: Sequence[Row]) -> str:
    names = [*world["tiers"], "recomputed"]
    parts = [
        f"## {world['scenario']}{': a model' if world['model'] else ''}\n",
        "Mean seconds to the first token, by quality at least; then what served requests, and bytes, at "
        f"quality {LOSS}: a hit's, all stored, and written per request.\n",
        markdown(
            ("policy", *map(str, LEVELS), *names, "hit, MB", "stored, GB", "written, MB"),
            (_levels(policy, names, of(runs, policy)) for policy in POLICIES),
        ),
        "Sensitivity to alpha, in multiples of the mean seconds of recomputing a context; every second value:\n",
        markdown(
            ("policy", "alpha", "quality", "mean, s", "median, s", "99th, s", *names, "hit, MB"),
            (
                _sensitivity(row, names)
                for policy in (OURS, PAPER)
                for row in [row for row in runs if row["policy"] == policy][::2]
            ),
        ),
        f"What hits are served from, at quality {LOSS}: options with at least 2 % of hits.\n",
        markdown(("policy", "options"), ((policy, _chosen(runs, policy)) for policy in (OURS, PAPER))),
    ]
    return "\n".join(parts)


def _levels(policy: str, names: Sequence[str], runs: Sequence[Row]) -> tuple[str, ...]:
    found = [cheapest(runs, level) for level in LEVELS]
    cells = [policy, *(f"{row['ttft']:.3f}" if row else "-" for row in found)]
    at = cheapest(runs, LOSS)
    if at is None:
        return (*cells, *["-"] * (len(names) + 3))
    size = (at["hit_bytes"] / 1e6, sum(at["used"].values()) / 1e9, at["moved"] / 1e6)
    return (*cells, *(f"{at['share'][name]:.0%}" for name in names), *(f"{one:,.1f}" for one in size))


def _sensitivity(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return (
        row["policy"], f"{row['alpha']:g}", f"{row['quality']:.4f}",
        *(f"{row[key]:.3f}" for key in ("ttft", "median", "p99")),
        *(f"{row['share'][name]:.0%}" for name in names), f"{row['hit_bytes'] / 1e6:,.1f}",
    )  # fmt: skip


def _chosen(runs: Sequence[Row], policy: str) -> str:
    at = cheapest(of(runs, policy), LOSS)
    found = sorted(at.get("chosen", {}).items(), key=lambda pair: -pair[1]) if at else []
    return ", ".join(f"{name} {share:.0%}" for name, share in found if share >= 0.02)


def _fleet(rows: Sequence[Row]) -> str:
    engines, contexts = rows[0]["engines"], rows[0]["contexts"]
    names = ("RAM", "SSD", "remote", "recomputed")
    header = (
        "policy", "engines that serve a context", *names, "quality", "mean, s", "remote reads of an engine, GB/s",
        "of all, GB/s", "remote writes of all, GB/s", "remote keeps, h", "deciding, us a request",
    )  # fmt: skip
    lines = [
        (row["policy"], f"{row['homes']:,}", *(f"{row['share'][name]:.0%}" for name in names), f"{row['quality']:.4f}",
         f"{row['ttft']:.3f}", f"{row['read'] / 1e9:.3f}", f"{row['read'] * engines / 1e9:,.0f}",
         f"{row['written'] * engines / 1e9:,.0f}", f"{row['kept'] / 3600:.1f}", f"{1e6 * row['placing']:,.0f}")
        for row in rows
    ]  # fmt: skip
    return "\n".join([
        "## A fleet: a model\n",
        f"{engines:,} engines of Llama-3.1-8B on an H100, {contexts:,} contexts, a remote tier of "
        f"{rows[0]['capacity'] / 1e12:,.0f} TB that each engine reads at 1 GB/s. One engine is simulated event by "
        "event; what the remote tier holds follows from all engines' uses by Che's approximation. Deciding is "
        "measured: CPU time of this engine's policy in Python on this machine. No engine asks another. Assumptions: "
        "`bench/contexts/fleet.py`.\n",
        markdown(header, lines),
    ])  # fmt: skip


def _losses(rows: Sequence[Row]) -> str:
    lines = [
        (row["method"], f"{row['ratio']:.3f}", f"{row['rows']:.0%}", f"{row['kl']:.5f}", *row["kept"]) for row in rows
    ]
    return "\n".join([
        "## What contexts may lose\n",
        f"The profile: every compression of {rows[0]['contexts']} contexts. Bytes relative to rows in 16 bits, rows "
        "kept, mean KL in nats per token of answers, and how many contexts keep at least the quality on top.\n",
        markdown(("method", "bytes", "rows", "KL", *map(str, LEVELS)), lines),
    ])  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worlds = [row for row in rows if row["table"] == "scenario"]
    worlds = [world for world in worlds if world["seed"] == worlds[0]["seed"]]
    figure, axes = plt.subplots(1, len(worlds), figsize=(4.6 * len(worlds), 4.4), layout="constrained", squeeze=False)
    for axis, world in zip(axes[0], worlds, strict=True):
        runs = _runs([row for row in rows if row["table"] == "run"], world)
        for policy, colour in COLOURS.items():
            points = [row for row in frontier(of(runs, policy)) if row["quality"] >= 0.8]
            seconds, quality = [row["ttft"] for row in points], [row["quality"] for row in points]
            axis.plot(seconds, quality, "o-", color=colour, label=policy, markersize=4, linewidth=1.2)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("mean seconds to the first token")
        axis.set_title(world["scenario"] + ("\na model" if world["model"] else "\nmeasured costs"), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("mean quality of answers")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)
