"""``python -m bench.reasoning``: serves and asks, then writes page and picture. Errors are one line.

It needs a Python that has vLLM, unless a server runs already.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path

from bench.store import Store, concluded, make_folder
from demos import DemoError
from demos.screen import Screen

RESULTS = Path(__file__).resolve().parents[1] / "results"
METHODS = ("kara", "snapkv", "h2o", "tova", "rkv", "compactor", "keydiff", "knorm", "newest", "random")
RETENTIONS = (0.3, 0.5, 0.2)
ADVICE = "run `make reasoning`, which prepares a Python with vLLM"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reasoning", description="Does a compressed cache keep the reasoning?"
    )
    parser.add_argument("--model", help="a directory or a Hugging Face name (default: Qwen2.5-Coder-1.5B-Instruct, "
                        "which packages ship)")  # fmt: skip
    parser.add_argument("--server", metavar="URL", help="ask this OpenAI-compatible server, which serves --model, as "
                        "the method --label, instead of starting servers")  # fmt: skip
    parser.add_argument("--label", default="full", help="with --server: NAME or NAME:RETENTION of what it does, "
                        "such as kara:0.3 (default: full)")  # fmt: skip
    parser.add_argument(
        "--problems", type=int, default=205, help="how many, the families in turn (default: %(default)s)"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="scorers by name, comma-separated (default: all)")
    parser.add_argument("--retentions", default=",".join(map(str, RETENTIONS)), help="(default: %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--tail", type=int, default=64, help="tokens after a window (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=900, help="most tokens of a reply (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=24, help="requests that run at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: %(default)s)")
    parser.add_argument("--dtype", help="of the model (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--drafts", type=int, default=0, help="tokens that n-grams propose for each step, as "
                        "speculative decoding (default: none)")  # fmt: skip
    parser.add_argument(
        "--untimed", action="store_true", help="leave out tokens/s, because other work runs on this machine"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of a server (default: one per core)")
    parser.add_argument(
        "--quick", action="store_true", help="12 problems, three methods at 30 %%: half an hour on a CPU"
    )
    parser.add_argument("--out", type=Path, help="folder of the results, which a later run goes on with (default: "
                        f"{RESULTS.parent.name}/{RESULTS.name})")  # fmt: skip
    options = parser.parse_args(argv)
    if options.quick:
        options.problems, options.methods, options.retentions = 12, "kara,snapkv,random", "0.3"
        options.out = options.out or RESULTS / "quick"  # never replaces the figures of a full run
    options.out = options.out or RESULTS
    for name in ("problems", "window", "limit", "at_once"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(options, name)}")
    if options.drafts < 0:
        parser.error(f"--drafts: expected 0 or more, got {options.drafts}")
    options.cells = _cells(parser, options)
    if options.server is not None and options.model is None:
        parser.error("--server: expected --model NAME, under which it serves the model")
    return options


def _cells(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[tuple[str, float]]:
    """Methods and retentions in the order of measuring: the full cache twice, then retention by retention."""
    if options.server is not None:
        method, _, retention = options.label.partition(":")
        return [(method, _share(parser, "--label", retention or "1"))]
    from kara_kernels.engine import Policy

    retentions = [_share(parser, "--retentions", given) for given in options.retentions.split(",")]
    cells = [("full", 1.0), ("full again", 1.0)]
    for retention in retentions:
        for method in options.methods.split(","):
            keep = round(retention * options.window)
            try:
                Policy(scorer=method, window=options.window, keep=keep, tail=options.tail)
            except (TypeError, ValueError) as error:
                parser.error(f"--methods, --retentions, --window or --tail: {error}")
            cells.append((method, retention))
    return cells


def _share(parser: argparse.ArgumentParser, name: str, given: str) -> float:
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        parser.error(f"{name}: expected shares over 0 and at most 1, got {given!r}")
    return share


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server outlives the command
    return concluded("reasoning", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    needed = ["matplotlib", *([] if options.server else ["vllm"])]
    if lacking := ", ".join(name for name in needed if importlib.util.find_spec(name) is None):
        raise DemoError(f"needs {lacking} in this Python: {ADVICE}")
    import torch

    from bench import tables

    from . import report
    from .model import packaged_coder
    from .run import Cell, Plan, Run

    make_folder(options.out)
    screen, cpu = Screen(), not torch.cuda.is_available()
    model = options.model or str(packaged_coder(screen.say))
    if options.server is None and options.model is not None and os.path.isdir(model):
        model = str(Path(model).resolve())
    plan = Plan(
        model=model, cells=[Cell(*cell) for cell in options.cells], count=options.problems, seed=options.seed,
        limit=options.limit, window=options.window, tail=options.tail, at_once=options.at_once,
        dtype=options.dtype or ("float32" if cpu else "bfloat16"), block_size=32 if cpu else 16, cpu=cpu,
        threads=options.threads, server=options.server, drafts=options.drafts, untimed=options.untimed,
    )  # fmt: skip
    path = options.out / "reasoning.csv"
    run = Run(plan, path, Store(), screen, Path("build") / "reasoning")
    try:
        run.measure()
    finally:
        if run.answers:
            run.write()
            head, rows = tables.read(path)
            report.draw(rows, options.out / "reasoning.png")
            (options.out / "reasoning.md").write_text(report.page(head, rows, "reasoning.png"), encoding="utf-8")
            print(options.out / "reasoning.md")


if __name__ == "__main__":
    sys.exit(main())
