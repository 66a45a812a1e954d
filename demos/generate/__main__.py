"""Command line of the demo: ``python -m demos.generate``.

Options are checked before transformers and matplotlib are imported, so ``--help`` and mistakes answer soon.
Whatever goes wrong is one line on standard error: exit code 2 for a bad option, 1 for what failed later, 130
for Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import DemoError

PROG = "python -m demos.generate"
PROMPT = "Describe a day in the life of a baker, hour by hour, from two in the morning to nine at night."
PICTURE_TYPES = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line like every other error, without argparse's usage block in front of it."""
        raise DemoError(f"{message} (--help lists the options)", 2)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description="Decode one prompt twice, with the full KV cache and with a cache that Kara compresses "
        "while decoding, and measure how close the second stays to the first.",
        epilog="Without options: a small packaged model (fetched once, 93 MB), 1,024 new tokens, about three "
        "minutes on two cores. Results go to the terminal and a picture, with --json to a file too.",
    )

    group = parser.add_argument_group("what is decoded")
    group.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="a Llama- or Qwen-like model: a directory, or a Hugging Face name "
        "(default: the packaged SmolLM2-135M-Instruct)",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument("--prompt", metavar="TEXT", help="what to ask the model (default: a day of a baker)")
    which.add_argument("--prompt-file", metavar="FILE", type=Path, help="read the prompt from a UTF-8 file")
    group.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=1024,
        help="new tokens; the model is not allowed to stop earlier (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.6,
        help="0 takes the best token, more samples with top-p 0.95 (default: %(default)s)",
    )
    group.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=1.08,
        help="over 1 keeps a small model from repeating itself, 1 is off; it shapes the text "
        "only, closeness is measured without it (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=2,
        help="seed of sampling and of the random baseline (default: %(default)s)",
    )

    group = parser.add_argument_group("how the cache is compressed")
    group.add_argument(
        "--window",
        metavar="W",
        type=int,
        default=128,
        help="tokens looked at in one compression (default: %(default)s)",
    )
    group.add_argument(
        "--keep", metavar="K", type=int, help="tokens kept of each window, 1 to W (default: half of the window)"
    )
    group.add_argument(
        "--tail",
        metavar="N",
        type=int,
        default=32,
        help="newest tokens, left alone; they help to judge the window (default: %(default)s)",
    )
    group.add_argument(
        "--block-size", metavar="P", type=int, default=16, help="tokens per cache block (default: %(default)s)"
    )
    group.add_argument(
        "--chunk-fraction",
        metavar="F",
        type=float,
        default=0.3,
        help="share of K reserved for the insides of chunks, 0 to 1; 0 keeps the best single "
        "tokens only (default: %(default)s)",
    )
    group.add_argument(
        "--max-chunk",
        metavar="N",
        type=int,
        default=8,
        help="longest gap-free stretch bought in one piece, end points included (default: %(default)s)",
    )
    group.add_argument(
        "--pool",
        choices=("head", "layer", "model"),
        default="head",
        help="who shares a list of kept tokens: every KV head has its own, the heads of a "
        "layer share one, or the whole model does (default: %(default)s)",
    )
    group.add_argument(
        "--redundancy",
        metavar="RHO",
        type=float,
        default=0.0,
        help="over 0 also marks down keys that resemble the others (default: %(default)s)",
    )

    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one (default: %(default)s)",
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
        help="who compresses: the Triton kernels or the PyTorch reference; auto picks Triton "
        "on a GPU (default: %(default)s)",
    )
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: what PyTorch picks)")

    group = add_outputs(parser, Path("demo-out/kara.png"))
    group.add_argument("--no-baseline", action="store_true", help="leave out the comparison with randomly kept tokens")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise DemoError (code 2) for the first option that makes no sense. Fills in --keep and the prompt."""
    if options.keep is None:
        options.keep = max(1, options.window // 2)
    for name, least in (
        ("tokens", 1),
        ("window", 1),
        ("tail", 0),
        ("block_size", 1),
        ("max_chunk", 1),
        ("temperature", 0),
        ("redundancy", 0),
        ("seed", 0),
    ):
        value = getattr(options, name)
        if not least <= value < float("inf"):  # NaN is refused too
            raise DemoError(f"--{name.replace('_', '-')} must be at least {least}, got {value}", 2)
    if options.window > 4096:
        raise DemoError(f"--window must be at most 4096, got {options.window}", 2)
    if not 1 <= options.keep <= options.window:
        raise DemoError(f"--keep must be in 1..{options.window} (--window), got {options.keep}", 2)
    if not 0 <= options.chunk_fraction <= 1:
        raise DemoError(f"--chunk-fraction must be in 0..1, got {options.chunk_fraction}", 2)
    if not 0 < options.repetition_penalty < float("inf"):
        raise DemoError(f"--repetition-penalty must be over 0, got {options.repetition_penalty}", 2)
    if options.threads is not None and options.threads < 1:
        raise DemoError(f"--threads must be at least 1, got {options.threads}", 2)
    if options.model is not None:
        check_model(options.model)
    options.prompt = _prompt(options)
    check_outputs(options)


def add_outputs(parser: argparse.ArgumentParser, picture: Path) -> Any:
    """The options of picture and figures, the same for every demo; returns their group."""
    group = parser.add_argument_group("what comes out")
    group.add_argument(
        "--picture",
        metavar="FILE",
        type=Path,
        default=picture,
        help="where the picture goes, PNG, SVG or PDF (default: %(default)s)",
    )
    group.add_argument("--no-picture", action="store_true", help="draw no picture")
    group.add_argument("--json", metavar="FILE", type=Path, help="write every figure to this file as JSON")
    return group


def check_outputs(options: argparse.Namespace) -> None:
    """Raise DemoError (code 2) where :func:`add_outputs`' options cannot be followed. Resolves --no-picture."""
    if options.no_picture:
        options.picture = None
    elif options.picture.suffix.lower() not in PICTURE_TYPES:
        raise DemoError(f"--picture must end in {', '.join(PICTURE_TYPES)}, got {options.picture}", 2)
    check_output("--picture", options.picture)
    check_output("--json", options.json)


def check_model(name: str) -> None:
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DemoError(f"--model {name} holds no config.json, so it is not a model directory", 2)
    # What looks like a path is one; only "name" and "owner/name" can be names.
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise DemoError(f"--model {name or repr(name)}: there is no such directory", 2)


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


def check_output(option: str, path: Path | None) -> None:
    """Fail now rather than after minutes of decoding. Makes the parent directories."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        with open(path, "ab"):  # the only test that also holds for root and for read-only mounts
            pass
        if not was_there:
            path.unlink()
    except OSError as error:
        raise DemoError(f"{option} {path}: {error.strerror}", 2) from error


def _check_extras(options: argparse.Namespace) -> None:
    needed = ["torch", "transformers", "rich"] + ([] if options.picture is None else ["matplotlib"])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}: pip install 'kara-kernels[demo]'")


def _import_run() -> Callable[[argparse.Namespace], object]:
    """Import torch and transformers: seconds in which a KeyboardInterrupt comes out as some ImportError."""

    def leave(*_: object) -> NoReturn:
        os.write(2, f"{PROG}: interrupted\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        from .run import run
    finally:
        signal.signal(signal.SIGINT, before)
    return run


def main(argv: list[str] | None = None) -> int:
    try:
        options = _parser().parse_args(argv)
        _check(options)
        _check_extras(options)
        _import_run()(options)
    except DemoError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        # A terminal has echoed ^C, which deserves a line of its own.
        print("\n" * sys.stderr.isatty() + f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
