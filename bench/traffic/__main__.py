"""``python -m bench.traffic``: run compiled kernels in the emulator and compare what they move with the floor."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # the emulator runs compiled code; Triton reads this when kernels are decorated

import argparse
import sys
from pathlib import Path

import torch

from bench import tables
from demos.screen import Screen

from . import measure, report

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for traffic.md and traffic.csv")
    parser.add_argument("--quick", action="store_true", help="the smallest case only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [case for case in measure.CASES if not options.quick or case.name == "SmolLM2"]
    rows = []
    with Screen().phase({}, "counting", len(cases), "cases") as advance:
        for case in cases:
            rows.append(measure.measure(case))
            advance(1, case.name)
    options.out.mkdir(parents=True, exist_ok=True)
    tables.write(options.out / "traffic.csv", rows, kind="counted in an emulator of sm_80 code, not timed")
    (options.out / "traffic.md").write_text(report.page(rows), encoding="utf-8")
    print(options.out / "traffic.md")
    missed = [(row, name) for row in rows for name in measure.missed(row)]
    for row, name in missed:
        ratio, limit = measure.goals(row)[name]
        print(f"missed: {row['case']}, {name}: {ratio:.3f}, at most {limit}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
