"""Command line of the serving demo: ``python -m demos.serve``. Errors and exit codes as in ``demo``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Any

from .. import DemoError
from ..generate.__main__ import Parser, add_outputs, check_model, check_output, check_outputs

PROG = "python -m demos.serve"
POLICY = ("window", "keep", "tail")
OTHERS = ("trace",)  # settings of the plugin that are not of the policy


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description="Serve the same requests with vLLM without Kara and with it, first with so few cache blocks that "
        "memory is the limit, then with enough of them, and compare.",
        epilog="Without options: a small packaged model (fetched once, 93 MB), about ten minutes on two cores. "
        "Results go to the terminal and a picture, with --json to a file too.",
    )
    group = parser.add_argument_group("what is served")
    group.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="an instruct model that vLLM knows: a directory, or a Hugging Face name "
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
        help="new tokens of each; the model is not allowed to stop earlier (default: %(default)s)",
    )

    group = parser.add_argument_group("the server")
    group.add_argument(
        "--budget",
        metavar="F",
        type=float,
        default=1 / 3,
        help="share of all the blocks that the requests would need which the server has (default: a third)",
    )
    group.add_argument(
        "--no-plentiful", action="store_true", help="leave out the second comparison, with room for everything"
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
        "--compile", action="store_true", help="let vLLM compile the model and capture graphs: starts are slower"
    )
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one per core)")

    group = parser.add_argument_group("how the cache is compressed")
    group.add_argument(
        "--window",
        metavar="W",
        type=int,
        default=128,
        help="tokens looked at in one compression (default: %(default)s)",
    )
    group.add_argument(
        "--keep", metavar="K", type=int, help="tokens kept of each window, 1 to W-1 (default: half of the window)"
    )
    group.add_argument(
        "--tail", metavar="N", type=int, default=32, help="newest tokens, left alone (default: %(default)s)"
    )
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
        help="where the servers' logs go (default: %(default)s)",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise DemoError (code 2) for the first option that makes no sense. Fills in --keep and the policy."""
    if options.keep is None:
        options.keep = max(1, options.window // 2)
    for name, least in (("requests", 1), ("tokens", 2), ("block_size", 1), ("window", 2), ("keep", 1), ("tail", 0)):
        if getattr(options, name) < least:
            raise DemoError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}", 2)
    if not 0 < options.budget <= 1:
        raise DemoError(f"--budget must be over 0 and at most 1, got {options.budget}", 2)
    if options.threads is not None and options.threads < 1:
        raise DemoError(f"--threads must be at least 1, got {options.threads}", 2)
    options.policy = _policy(options)
    if options.model is not None:
        check_model(options.model)
    check_outputs(options)
    check_output("--logs", options.logs / "limited-vllm.log")


def _policy(options: argparse.Namespace) -> dict[str, Any]:
    """What the plugin is told. Its own check of it happens here: a server would take half a minute to refuse."""
    try:
        more = json.loads(options.policy)
    except ValueError as error:
        raise DemoError(f"--policy is not JSON: {error}", 2) from error
    if not isinstance(more, dict):
        raise DemoError(f"--policy must be a JSON object, got {options.policy}", 2)
    settings = {name: getattr(options, name) for name in POLICY} | more
    from kara_kernels.engine import Policy

    try:
        policy = Policy.from_settings({name: value for name, value in settings.items() if name not in OTHERS})
        policy.check_page_size(options.block_size)
    except (ValueError, TypeError) as error:
        raise DemoError(f"--window, --keep, --tail or --policy: {error}", 2) from error
    return settings


def _check_extras(options: argparse.Namespace) -> None:
    needed = ["vllm", "openai", "rich"] + ([] if options.picture is None else ["matplotlib"])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"this demo needs {', '.join(missing)} in this Python; `make demo-vllm` installs them for CPUs")


def main(argv: list[str] | None = None) -> int:
    # A terminated demo must not leave a server behind: let it end as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = _parser().parse_args(argv)
        _check(options)
        _check_extras(options)
        from .run import run

        run(options)
    except DemoError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\n" * sys.stderr.isatty() + f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
