"""Command line of the serving demo: ``python -m demos.serve``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from .. import DemoError
from ..command import (
    Parser,
    add_outputs,
    add_policy,
    check_least,
    check_model,
    check_output,
    check_outputs,
    fill_policy,
    require,
    served,
    told,
)

PROG = "python -m demos.serve"
ADVICE = "`make demo-vllm` makes one that has it, for CPUs"
POLICY = ("window", "keep", "tail")
OTHERS = ("trace",)  # settings of the plugin that are not fields of the policy


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description="Serve the same requests with vLLM twice, without Kara and with it. First the cache has too few "
        "blocks for all requests, then it has enough.",
        epilog="Without options the demo takes about ten minutes on two cores. It serves a small packaged model, which "
        "is downloaded once (93 MB). It prints its results and draws a picture; --json writes the figures to a file.",
    )
    _add_load(parser)
    _add_server(parser)
    group = add_policy(parser)
    group.add_argument(
        "--policy",
        metavar="JSON",
        default="{}",
        help="more settings of the plugin, as in vLLM's --additional-config '{\"kara\": ...}'",
    )
    group = add_outputs(parser, Path("demo-out/vllm.png"))
    group.add_argument(
        "--logs",
        metavar="DIR",
        type=Path,
        default=Path("demo-out"),
        help="folder for the servers' logs (default: %(default)s)",
    )
    return parser


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="a directory or a Hugging Face name of an instruct model that vLLM supports "
        "(default: the packaged SmolLM2-135M-Instruct)",
    )
    group.add_argument(
        "--requests", metavar="N", type=int, default=8, help="requests, all sent at once (default: %(default)s)"
    )
    group.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=1600,
        help="new tokens of each request; the model is not allowed to stop earlier (default: %(default)s)",
    )
    group.add_argument(
        "--documents",
        metavar="N",
        type=int,
        default=0,
        help="requests ask about one of N documents, which both servers keep as contexts (default: none)",
    )
    group.add_argument(
        "--document-tokens", metavar="N", type=int, default=500, help="of each, about (default: %(default)s)"
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--budget",
        metavar="F",
        type=float,
        default=1 / 3,
        help="blocks of the server, as a share of those that all requests together would need (default: a third)",
    )
    group.add_argument(
        "--no-plentiful", action="store_true", help="skip the second comparison, which has enough blocks"
    )
    group.add_argument(
        "--block-size", metavar="P", type=int, default=32, help="tokens per cache block (default: %(default)s)"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="type of weights and cache (default: %(default)s)",
    )
    group.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model and capture graphs; starts more slowly"
    )
    group.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="CPU threads; 1 is fastest if other programs are busy (default: one per core)",
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options. DemoError (code 2) names the first bad one.

    Adds ``given``, the settings passed to the plugin, and ``policy``, the resulting settings with all defaults.
    """
    options = _parser().parse_args(argv)
    require(["torch"], ADVICE)  # not needed for --help
    given = told(options, POLICY)
    fill_policy(options)
    if "window" in given:
        given["keep"] = options.keep
    check_least(
        options, requests=1, tokens=2, documents=0, document_tokens=1, block_size=1, window=2, keep=1, tail=0, threads=1
    )
    if not 0 < options.budget <= 1:
        raise DemoError(f"--budget must be over 0 and at most 1, got {options.budget}", 2)
    options.given, options.policy = _policy(options, given)
    check_model(options.model)
    check_outputs(options)
    check_output("--logs", options.logs / "limited-vllm.log")
    return options


def _policy(options: argparse.Namespace, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings as given and with defaults. Checked here, because a server takes half a minute to do so."""
    from kara_kernels.engine import Policy

    try:
        more = json.loads(options.policy)
    except ValueError as error:
        raise DemoError(f"--policy is not JSON: {error}", 2) from error
    if not isinstance(more, dict):
        raise DemoError(f"--policy must be a JSON object, got {options.policy}", 2)
    given = given | more
    try:
        policy = Policy.from_settings({name: value for name, value in given.items() if name not in OTHERS})
        policy.check_page_size(options.block_size)
    except (ValueError, TypeError) as error:
        raise DemoError(f"--window, --keep, --tail or --policy: {error}", 2) from error
    due = policy.window + policy.tail
    if options.tokens <= due:
        raise DemoError(f"--tokens: expected more than the {due:,} of --window plus --tail, got {options.tokens:,}", 2)
    return given, dataclasses.asdict(policy) | given


def main(argv: list[str] | None = None) -> int:
    return served(PROG, lambda: parse(argv), _run)


def _run(options: argparse.Namespace) -> None:
    require(["vllm", "openai", "rich"] + ([] if options.picture is None else ["matplotlib"]), ADVICE)
    from .run import run

    run(options)


if __name__ == "__main__":
    sys.exit(main())
