"""``python -m bench.traffic``: runs compiled kernels in the emulator and compares their traffic with the minimum."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # the emulator runs compiled code; Triton reads this when kernels are decorated

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import triton

from bench import tables
from bench.store import concluded, digest_of_folders, make_folder, measure_all

from . import measure, payload, report

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for traffic.md and its tables")
    parser.add_argument("--quick", action="store_true", help="the smallest cases only")
    options = parser.parse_args(arguments)
    return concluded("traffic", partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    make_folder(options.out)
    torch.set_num_threads(1)
    cases = [case for case in measure.CASES if not options.quick or case.name == "SmolLM2"]
    code = digest_of_folders("kara_kernels", "bench/traffic", "tests/ptx")
    jobs = {case.name: partial(measure.measure, case) for case in cases}
    stored = [case for case in payload.CASES if not options.quick or case.name.startswith("SmolLM2")]
    more = {case.name: partial(payload.measure, case) for case in stored}
    rows = measure_all("counting", jobs, code, triton.__version__, torch.__version__)
    payloads = measure_all("counting payloads", more, code, triton.__version__, torch.__version__)
    kind = "counted in an emulator of sm_80 code, not timed"
    tables.write(options.out / "traffic.csv", rows, kind=kind)
    tables.write(options.out / "traffic_payload.csv", payloads, kind=kind)
    (options.out / "traffic.md").write_text(report.page(rows, payloads), encoding="utf-8")
    print(options.out / "traffic.md")
    missed = [(row, name, *measure.goals(row)[name]) for row in rows for name in measure.missed(row)]
    missed += [(row, name, *goal) for row in payloads for name, goal in payload.goals(row).items() if goal[0] > goal[1]]
    for row, name, ratio, limit in missed:
        print(f"missed: {row['case']}, {name}: {ratio:.3f}, at most {limit}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
