"""``python -m bench.codegen``: compile every kernel for GPUs that are not here and write what came out as a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from bench import tables
from bench.packages import package_of
from bench.tables import Row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
OLDEST = "3.6.0"  # of the Triton versions that the package allows
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for codegen.md and codegen.csv")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET", help=" ".join(TARGETS)
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--quick", action="store_true", help="a few shapes, the installed Triton only")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        for row in _compile(options.child, options.quick):
            print(json.dumps(row), flush=True)
        return 0
    if options.workers < 1:
        parser.error(f"--workers: expected 1 or more, got {options.workers}")
    from . import goals, report

    found = _run_children(options)
    options.out.mkdir(parents=True, exist_ok=True)
    tables.write(options.out / "codegen.csv", found, kind="compiled, not run")
    verdicts = goals.judge(found, every=not options.quick and set(options.targets) == set(TARGETS))
    (options.out / "codegen.md").write_text(report.page(found, verdicts), encoding="utf-8")
    print(f"{len(found)} kernels: {options.out / 'codegen.md'}")
    missed = [verdict for verdict in verdicts if verdict.missed]
    for verdict in missed:
        row = verdict.missed[0]
        print(f"missed: {verdict.goal}, {len(verdict.missed)} of {verdict.rows}, for example {report.name(row)}",
              file=sys.stderr)  # fmt: skip
    return int(bool(missed))


def _run_children(options: argparse.Namespace) -> list[Row]:
    """A process for each target and version: Triton compiles one launch at a time."""
    import triton

    from demos.screen import Screen

    versions = [triton.__version__] if options.quick else [OLDEST, triton.__version__]
    jobs = [(version, target) for target in options.targets for version in versions]
    found: dict[tuple[str, str], list[Row]] = {}
    with ThreadPoolExecutor(options.workers) as pool, Screen().phase({}, "compiling", len(jobs), "jobs") as advance:
        waiting = {pool.submit(_child, *job, options.quick, triton.__version__): job for job in jobs}
        for done in as_completed(waiting):
            job = waiting[done]
            found[job] = done.result()
            advance(1, f"Triton {job[0]} {job[1]}")
    return [row for job in jobs for row in found[job]]


def _child(version: str, target: str, quick: bool, installed: str) -> list[Row]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    if version != installed:
        environment["PYTHONPATH"] = str(package_of("triton", version))
    command = [sys.executable, "-m", "bench.codegen", "--child", target, *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"Triton {version}, {target}: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _compile(target: str, quick: bool) -> Iterator[Row]:
    import triton

    from bench.compile_only import compiling_for

    from . import shapes
    from .inspect import facts

    seen = 0
    with compiling_for(target) as builds:

        def fresh(label: str) -> Iterator[Row]:
            nonlocal seen
            for build in builds[seen:]:
                yield {"triton": triton.__version__, "shape": label, **facts(build)}
            seen = len(builds)

        for shape in shapes.QUICK if quick else shapes.SHAPES:
            shape.launch()
            yield from fresh(shape.label)
        for move in shapes.MOVES[:1] if quick else shapes.MOVES:
            shapes.launch_moves(*move)
            dtype = str(move[2]).removeprefix("torch.")
            yield from fresh(f"D {move[0]}/{move[1]}, {dtype}, {shapes.HEADS} heads")
        for window in shapes.WINDOWS[:1] if quick else shapes.WINDOWS:
            shapes.launch_rows(window)
            yield from fresh(f"W {window}")
        for dim in (64, 128, 576):
            shapes.launch_packing(dim)
            shapes.launch_channels(dim)
            yield from fresh(f"D {dim}")
        shapes.launch_ranking()
        yield from fresh("C 4096")
        shapes.launch_checksums()
        yield from fresh("bytes")
        for payload in shapes.PAYLOADS[:1] if quick else shapes.PAYLOADS:
            payload.launch()
            yield from fresh(payload.label)


if __name__ == "__main__":
    sys.exit(main())
