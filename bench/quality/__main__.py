"""``python -m bench.quality``: measures, then writes the report. Errors are one line, not a traceback."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.store import concluded, make_folder

RESULTS = Path(__file__).resolve().parents[1] / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Compare Kara with other methods.")
    parser.add_argument("--quick", action="store_true", help="five minutes: fewer texts, methods and retentions")
    parser.add_argument("--model", help="a directory or a Hugging Face name (default: the small packaged model)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the model; scores are float32 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="seed for texts, needles and random selection (default: 0)")
    parser.add_argument(
        "--backwards",
        action="store_true",
        help="start with the last text: a second process shares the work of a first",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default: 2)")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results (default: {RESULTS.parent.name}/{RESULTS.name})"
    )
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    if options.out is None:  # a quick run never replaces the figures of a full one
        options.out = RESULTS / "quick" if options.quick else RESULTS
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return concluded("quality", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    import torch

    import kara_kernels.integrations.transformers  # noqa: F401, registers the attention that models are loaded with
    from bench import tables
    from bench.store import Store
    from demos.model import load
    from demos.screen import Screen

    from . import models, report
    from .run import Plan, Run, facts

    make_folder(options.out)
    torch.set_num_threads(options.threads)
    screen, store = Screen(), Store()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(options.model, dtype=options.dtype, device=device, say=screen.say)
    plan = Plan(options.model or "packaged", options.quick, options.seed, options.backwards, options.dtype)
    head = facts(plan, model)
    records = Run(model, tokenizer, plan, store, screen).records()
    name = models.name_of(plan.model)
    tables.write(options.out / f"{name}.csv", records, **head)
    for written in report.write({**head, "records": records}, options.out, models.others(options.out, name)):
        print(written)


if __name__ == "__main__":
    raise SystemExit(main())
