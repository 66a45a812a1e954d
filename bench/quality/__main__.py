"""``python -m bench.quality``: measure, then write the report. Problems are one line, not a traceback."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from demos import DemoError

RESULTS = Path(__file__).resolve().parents[1] / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="five minutes: fewer texts, methods and retentions")
    parser.add_argument("--model", help="a directory or a Hugging Face name; the small packaged model by default")
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of texts, needles and chance (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results (default: {RESULTS.parent.name}/{RESULTS.name})"
    )
    parser.add_argument("--report", action="store_true", help="only write the report of what was measured before")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    if options.out is None:  # a quick run never replaces the figures of a full one
        options.out = RESULTS / "quick" if options.quick else RESULTS
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        _run(options)
    except DemoError as error:
        print(f"quality: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\nquality: stopped; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    import json

    import torch

    import kara_kernels.integrations.transformers  # noqa: F401, registers the attention that models are loaded with
    from demos.generate.report import Screen
    from demos.model import load

    from . import report
    from .run import Plan, Store, facts, measure_all

    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {options.out}: {error.strerror or error}") from error
    path = options.out / "quality.json"
    if not options.report:
        torch.set_num_threads(options.threads)
        screen = Screen()
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load(options.model, dtype="float32", device=device, say=screen.say)
        plan = Plan(options.model or "packaged", options.quick, options.seed)
        phases: dict[str, float] = {}

        def phase(name: str, total: int) -> AbstractContextManager[Any]:
            return screen.phase(phases, name, total)

        measure_all(model, tokenizer, plan, Store(path, plan, facts(model)), screen.say, phase)
    elif not path.exists():
        raise DemoError(f"--report: nothing was measured yet, {path} is missing")
    for written in report.write(json.loads(path.read_text(encoding="utf-8")), options.out):
        print(written)


if __name__ == "__main__":
    raise SystemExit(main())
