"""Command line of the demo of contexts: ``python -m demos.contexts``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import DemoError
from ..command import Parser, add_outputs, check_least, check_model, check_output, check_outputs, require, served

PROG = "python -m demos.contexts"
LEAST = 18  # a sixth of fewer would leave too little memory for one of them to pass through
ADVICE = "`make demo-contexts` makes one that has it, for CPUs"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description="Ask questions about the same documents again and again, and compare servers that compute a "
        "document each time, keep it as it is, keep it in one fixed compression, or let Kara choose.",
        epilog="Without options the demo takes eleven minutes on two cores. It serves a small packaged model, "
        "which is downloaded once (93 MB). It prints its results and draws a picture; --json writes the figures to a "
        "file.",
    )
    group = parser.add_argument_group("load")
    group.add_argument("--model", metavar="DIR_OR_NAME", help="an instruct model that vLLM supports "
                       "(default: the packaged SmolLM2-135M-Instruct)")  # fmt: skip
    group.add_argument("--contexts", metavar="N", type=int, default=24, help="documents (default: %(default)s)")
    group.add_argument("--tokens", metavar="N", type=int, default=1536, help="of each (default: %(default)s)")
    group.add_argument("--requests", metavar="N", type=int, default=32, help="measured (default: %(default)s)")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of documents and requests")
    group = parser.add_argument_group("server")
    group.add_argument("--floor", metavar="Q", type=float, default=0.97, help="least quality (default: %(default)s)")
    group.add_argument("--alpha", metavar="S", type=float, default=10.0,
                       help="seconds that one unit of quality is worth (default: %(default)s)")  # fmt: skip
    group.add_argument("--block-size", metavar="P", type=int, default=32, help="tokens per block (%(default)s)")
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one per core)")
    group = add_outputs(parser, Path("demo-out/contexts.png"))
    group.add_argument(
        "--logs", metavar="DIR", type=Path, default=Path("demo-out"), help="folder for the servers' logs"
    )
    group.add_argument("--work", metavar="DIR", type=Path, default=Path("demo-out/contexts"),
                       help="folder for profile and store, on the disk to measure (default: %(default)s)")  # fmt: skip
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options. DemoError (code 2) names the first bad one."""
    options = _parser().parse_args(argv)
    check_least(options, contexts=LEAST, tokens=256, requests=1, block_size=1, threads=1, alpha=0)
    if options.tokens % options.block_size or options.tokens % 16:
        raise DemoError(f"--tokens must be whole blocks of {options.block_size}, got {options.tokens}", 2)
    if not 0 <= options.floor <= 1:
        raise DemoError(f"--floor must be 0 to 1, got {options.floor}", 2)
    check_model(options.model)
    check_outputs(options)
    check_output("--logs", options.logs / "contexts-kara.log")
    check_output("--work", options.work / "profile.json")
    return options


def main(argv: list[str] | None = None) -> int:
    return served(PROG, lambda: parse(argv), _run)


def _run(options: argparse.Namespace) -> None:
    require(["vllm", "openai", "rich"] + ([] if options.picture is None else ["matplotlib"]), ADVICE)
    from .run import run

    run(options)


if __name__ == "__main__":
    sys.exit(main())
