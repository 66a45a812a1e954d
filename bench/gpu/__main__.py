"""``python -m bench.gpu``: checks the kernels on this GPU, then times them. ``--compare`` compares two runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench import tables
from demos.screen import Screen

from . import measure, packets, report

RESULTS = Path(__file__).parents[1] / "results"
REAL = "measured on this GPU"
REHEARSAL = "a rehearsal: tiny shapes by the PyTorch path on a CPU, not a GPU timing"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gpu.csv, gpu.md and gpu.png (default: bench/results)")
    parser.add_argument("--rounds", type=int, default=100, help="samples per job (default: %(default)s)")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="windows of 256 at batch 1 only")
    parser.add_argument("--packets", action="store_true", help="time packets of contexts instead, of the shape of "
                        "Llama-3.1-8B; writes packets.csv and .md")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: a trial run on the CPU, with tiny "
                        "shapes and the PyTorch path; writes rehearsal.* into --out")  # fmt: skip
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="CSV", help="print the ratios of two runs, the earlier one first"
    )
    options = parser.parse_args(arguments)
    if options.compare:
        try:
            print(report.compare(*map(report.read, options.compare)))
        except ValueError as error:
            parser.error(str(error))
        return 0
    if options.rounds < 2:
        parser.error(f"--rounds: expected 2 or more, got {options.rounds}")
    if options.rehearse and options.out is None:
        parser.error("--rehearse: expected --out FOLDER, for its figures are no results")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("needs a GPU that torch sees; without one, --rehearse and --compare work")
    device = "cpu" if options.rehearse else "cuda"
    cases = [
        case for case in (measure.REHEARSAL if options.rehearse else measure.CASES)
        if options.cases in case.label and (not options.quick or (case.window, case.batch) in ((256, 1), (64, 1)))
    ]  # fmt: skip
    if not cases:
        parser.error(f"--cases: expected a part of a case's name, got {options.cases!r}")
    if not options.rehearse:
        print("correctness first: tests/test_gpu.py", file=sys.stderr, flush=True)
        if wrong := measure.suite_is_green():
            print(f"no times from kernels that are not known to be right: {wrong}", file=sys.stderr)
            return 1
    torch.set_num_threads(1)
    head = {
        "schema": measure.SCHEMA, "kind": REHEARSAL if options.rehearse else REAL, "machine": measure.machine(device),
        "copy_bandwidth": measure.copy_bandwidth(device, options.rounds),
    }  # fmt: skip
    folder = options.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if options.packets:
        packets.run(folder, device, head, options.rounds)
        return 0
    return _events(folder / ("rehearsal" if options.rehearse else "gpu"), cases, device, head, options.rounds)


def _events(path: Path, cases: list[measure.Case], device: str, head: dict[str, Any], rounds: int) -> int:
    rows, l2 = [], measure.l2_bytes() if device == "cuda" else 0
    try:
        with Screen().phase({}, "events", len(cases), "cases") as advance:
            for case in cases:
                rows.append(measure.measure(case, device, rounds, l2))
                tables.write(path.with_suffix(".csv"), rows, **head)  # what is measured outlasts an interruption
                advance(1, case.label)
    except RuntimeError as error:
        print(f"stopped: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    path.with_suffix(".md").write_text(report.page((head, rows)), encoding="utf-8")
    report.draw((head, rows), path.with_suffix(".png"))
    print(path.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
