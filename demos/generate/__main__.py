"""Command line of the demo: ``python -m demos.generate``.

``--help`` imports nothing slow. Options are checked before transformers and matplotlib are imported, so mistakes are
reported quickly.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import DemoError
from ..command import (
    Parser,
    add_options,
    add_outputs,
    add_policy,
    check_least,
    check_model,
    check_outputs,
    concluded,
    fill_policy,
    imports,
    library_checks,
    require,
    told,
)

PROG = "python -m demos.generate"
ADVICE = "pip install 'kara-kernels[demo]'"
PROMPT = "Describe a day in the life of a baker, hour by hour, from two in the morning to nine at night."


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description="Decode one prompt twice, with the full KV cache and with a cache that Kara compresses while "
        "decoding, and measure how close the second stays to the first.",
        epilog="Without options the demo takes about three minutes on two cores: it decodes 1,280 new tokens with a "
        "small packaged model, which is downloaded once (93 MB). It prints its results and draws a picture; --json "
        "writes the figures to a file.",
    )
    _add_text(parser)
    group = add_policy(parser)
    group.add_argument(
        "--block-size", metavar="P", type=int, default=16, help="tokens per cache block (default: %(default)s)"
    )
    add_options(group)
    _add_place(parser)
    group = add_outputs(parser, Path("demo-out/kara.png"))
    group.add_argument("--no-baseline", action="store_true", help="leave out the comparison with randomly kept tokens")
    return parser


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and text")
    group.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="a directory or a Hugging Face name of a model like Llama or Qwen "
        "(default: the packaged SmolLM2-135M-Instruct)",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument("--prompt", metavar="TEXT", help="the prompt (default: a day in the life of a baker)")
    which.add_argument("--prompt-file", metavar="FILE", type=Path, help="read the prompt from a UTF-8 file")
    group.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=1280,
        help="new tokens; the model is not allowed to stop earlier (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.6,
        help="0 takes the most likely token; above 0 samples with top-p 0.95 (default: %(default)s)",
    )
    group.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=1.08,
        help="above 1 keeps a small model from repeating itself; 1 is off. It affects only the text; closeness is "
        "measured without it (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=2,
        help="seed of sampling and of the random baseline (default: %(default)s)",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto uses a GPU if there is one (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of weights and cache (default: %(default)s)",
    )
    group.add_argument(
        "--backend",
        choices=("auto", "triton", "torch"),
        default="auto",
        help="compress with the Triton kernels or the PyTorch reference; auto uses the kernels on a GPU "
        "(default: %(default)s)",
    )
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: a short trial decides)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options. DemoError (code 2) names the first bad one.

    Adds ``policy``, the scoring and selection options that were given, and ``usual``, the options of a bare call.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    require(["torch"], ADVICE)  # not needed for --help
    options.usual = parser.parse_args([])
    for each in (options, options.usual):
        fill_policy(each)
    options.policy = _policy(options)
    check_least(options, tokens=1, block_size=1, temperature=0, seed=0, threads=1)
    if not 0 < options.repetition_penalty < float("inf"):
        raise DemoError(f"--repetition-penalty must be over 0, got {options.repetition_penalty}", 2)
    check_model(options.model)
    options.prompt = _prompt(options)
    check_outputs(options)
    return options


def _policy(options: argparse.Namespace) -> dict[str, Any]:
    """The options of scoring and selection that were given. The library checks them, and window, keep and tail."""
    from kara_kernels.engine import Policy
    from kara_kernels.options import OPTIONS

    given = told(options, list(OPTIONS))
    with library_checks():
        Policy(window=options.window, keep=options.keep, tail=options.tail, query_stride=1, **given)
    return given


def _prompt(options: argparse.Namespace) -> str:
    text = PROMPT if options.prompt is None else options.prompt
    if options.prompt_file is not None:
        try:
            text = options.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise DemoError(f"--prompt-file {options.prompt_file}: {reason}", 2) from error
    if not text.strip():
        raise DemoError("the prompt is empty", 2)
    return text.strip()


def main(argv: list[str] | None = None) -> int:
    def body() -> None:
        with imports(PROG):
            options = parse(argv)
            require(["transformers", "rich"] + ([] if options.picture is None else ["matplotlib"]), ADVICE)
            from .run import run
        run(options)

    return concluded(PROG, body)


if __name__ == "__main__":
    sys.exit(main())
