"""``python -m bench.contexts``: serves traces of requests from storage tiers, with every policy, and compares them."""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import tables
from bench.store import concluded, digest_of_folders, make_folder, measure_all
from bench.tables import Row
from kara_kernels.contexts.profile import QUALITIES, Measured, Profile, ProfileError

from . import compare, report, trace
from .fleet import Fleet, engine
from .scenario import BUSY, MODELS, WHOLE, Scenario, here, on_h100
from .simulate import simulate, summary

RESULTS = Path(__file__).parents[1] / "results"
FLEET = ("placement", "fixed + LRU", "LRU")


@dataclass(frozen=True)
class Size:
    """Of a run. ``contexts``: the paper has 555. ``many``: another scenario with more than the tiers hold."""

    contexts: int = 555
    many: int = 2000
    requests: int = 6000
    alphas: tuple[float, ...] = compare.ALPHAS
    fleet: Fleet = field(default_factory=Fleet)

    @property
    def first(self) -> int:
        """Requests before it warm up."""
        return self.requests * 3 // 8


QUICK = Size(30, 60, 240, (1.6, 25), Fleet(10, 2_000, 10, 2e12, 1.0, 200))


def losses(profile: Profile, judge: str) -> list[Row]:
    """What every compression of the profile costs, over its contexts."""
    found: dict[tuple[str, int], list[tuple[Measured, int]]] = {}
    for context in profile.contexts.values():
        for one in context.measured:
            found.setdefault((one.method, one.sections), []).append((one, context.tokens))
    return [
        {"table": "loss", "method": method, "sections": sections, "contexts": len(all_of),
         "ratio": statistics.fmean(one.ratio for one, _ in all_of),
         "rows": statistics.fmean(one.rows / tokens for one, tokens in all_of),
         "kl": statistics.fmean(one.kl for one, _ in all_of),
         "kept": [sum(one.quality(judge) >= level for one, _ in all_of) for level in compare.LEVELS]}
        for (method, sections), all_of in sorted(found.items())
    ]  # fmt: skip


def scenarios(profile: Profile, judge: str, size: Size, seed: int) -> list[Scenario]:
    found = [on_h100(model, profile, judge, size.contexts, seed) for model in MODELS]
    many = on_h100(MODELS[0], profile, judge, size.many, seed)
    found.append(replace(many, name=f"{many.name}, {size.many:,} contexts"))
    if profile.tiers:
        found.append(here(profile, judge, size.contexts))
    return found


def facts(scenario: Scenario, seed: int) -> list[Row]:
    contexts = scenario.contexts
    return [{
        "table": "scenario", "scenario": scenario.name, "seed": seed, "model": scenario.model,
        "contexts": len(contexts),
        "bytes": sum(option.nbytes for context in contexts for option in context.options if option.method == WHOLE),
        "prefill": statistics.fmean(context.prefill_seconds for context in contexts), "rate": scenario.rate,
        "tiers": {tier.name: {"capacity": tier.capacity, "bandwidth": tier.bandwidth} for tier in scenario.tiers},
    }]  # fmt: skip


def serve(scenario: Scenario, seed: int, size: Size, policy: str) -> list[Row]:
    """One policy with all its settings."""
    asked = trace.make_trace(len(scenario.contexts), size.requests, rate=scenario.rate, seed=seed)
    rows = []
    for entry in compare.entries(scenario, size.alphas):
        if entry.policy == policy:
            run = simulate(scenario.tiers, scenario.contexts, asked, entry.make(scenario.tiers))
            found = summary(run, scenario.tiers, size.first)
            if policy not in compare.PLACEMENTS:
                del found["chosen"]
            rows.append({"table": "run", "scenario": scenario.name, "seed": seed, "policy": policy,
                         "setting": entry.setting or None, "alpha": entry.alpha, **short(found)})  # fmt: skip
    return rows


def short(value: Any) -> Any:
    """Floats with seven digits, so that tables are readable and files small."""
    if isinstance(value, dict):
        return {name: short(one) for name, one in value.items()}
    return float(f"{value:.7g}") if isinstance(value, float) else value


def fleet_row(fleet: Fleet, profile: Profile, judge: str, policy: str, seed: int) -> list[Row]:
    return [{"table": "fleet", **short(engine(fleet, profile, judge, policy, seed))}]


def jobs(profile: Profile, judge: str, size: Size, seeds: list[int]) -> dict[str, Callable[[], list[Row]]]:
    found: dict[str, Callable[[], list[Row]]] = {}
    for seed in seeds:
        for scenario in scenarios(profile, judge, size, seed):
            found[f"{scenario.name}, seed {seed}"] = partial(facts, scenario, seed)
            for policy in dict.fromkeys(entry.policy for entry in compare.entries(scenario, size.alphas)):
                found[f"{scenario.name}, seed {seed}: {policy}"] = partial(serve, scenario, seed, size, policy)
    for policy in FLEET:
        for homes in (size.fleet.engines, max(1, size.fleet.engines // 100)):
            one = replace(size.fleet, homes=homes)
            found[f"fleet: {policy}, {homes}"] = partial(fleet_row, one, profile, judge, policy, seeds[0])
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.contexts", description=__doc__)
    parser.add_argument("--profile", type=Path, default=RESULTS / "profile.json",
                        help="what `python -m kara_kernels.contexts profile` wrote (%(default)s)")  # fmt: skip
    parser.add_argument("--judge", default="likelihood", choices=QUALITIES, help="of quality (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for contexts.md, .csv and .png")
    parser.add_argument("--seed", type=int, default=0, help="runs this seed and the next (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few contexts, few requests, one seed")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    seeds = [options.seed] if options.quick else [options.seed, options.seed + 1]
    try:
        profile = Profile.load(options.profile)
        work = jobs(profile, options.judge, size, seeds)
    except (OSError, ProfileError, ValueError) as error:
        parser.error(f"--profile: {error}; make profile writes one")
    return concluded("contexts", partial(_run, options, size, profile, work))


def _run(options: argparse.Namespace, size: Size, profile: Profile, work: dict[str, Callable[[], list[Row]]]) -> None:
    make_folder(options.out)
    held = hashlib.sha256(options.profile.read_bytes()).hexdigest()
    code = digest_of_folders("kara_kernels/contexts", "bench/contexts")
    rows = [short(row) for row in losses(profile, options.judge)]
    rows += [row for found in measure_all("policies", work, held, options.judge, code, repr(size)) for row in found]
    head = {
        "kind": "simulated", "profiled": len(profile.contexts),
        "model": Path(str(profile.about.get("model", "an unknown model"))).name,
        "judge": options.judge, "requests": size.requests, "first": size.first, "alphas": len(size.alphas),
        "busy": BUSY,
        "shape": trace.SHAPE, "exponent": trace.EXPONENT, "drift": trace.DRIFT,
    }  # fmt: skip
    tables.write(options.out / "contexts.csv", rows, **head)
    head, rows = tables.read(options.out / "contexts.csv")
    (options.out / "contexts.md").write_text(report.page(head, rows), encoding="utf-8")
    report.draw(rows, options.out / "contexts.png")
    print(options.out / "contexts.md")
    worlds = [row for row in rows if row["table"] == "scenario"]
    for line in report.missed([row for row in rows if row["table"] == "run"], worlds):
        print(f"missed: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
