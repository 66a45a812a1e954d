"""Command lines of the demos: shared options, exit codes, and one line on standard error for every error."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import DemoError

PICTURE_TYPES = (".png", ".svg", ".pdf")
ON_OFF = {"on": True, "off": False}
# One line for each option. Names, choices and defaults come from kara_kernels.options, which imports no torch.
MEANINGS = {
    "attention": "causal, an ablation, hides later keys from every query",
    "reduction": "root mean square or mean over the queries",
    "value_norm": "on multiplies every score by the norm of the value",
    "redundancy": "above 0, keys that resemble other keys score lower",
    "pool": "who shares a list of kept tokens: nobody (each KV head has its own), the heads of a layer, or the whole "
    "model",
    "chunk_fraction": "share of the kept tokens that may fill gaps between other kept tokens, 0 to 1",
    "max_chunk": "longest span that counts as a chunk, in tokens",
}


class Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str, epilog: str, usage: str = "%(prog)s [options]") -> None:
        super().__init__(prog=prog, usage=usage, allow_abbrev=False, description=description, epilog=epilog)

    def error(self, message: str) -> NoReturn:
        """One line, without argparse's usage block."""
        raise DemoError(f"{message} (--help lists the options)", 2)


def flag(name: str) -> str:
    """``block_size`` as an option: ``--block-size``."""
    return f"--{name.replace('_', '-')}"


def add_policy(parser: argparse.ArgumentParser) -> Any:
    """Window, keep and tail. An option that is not given stays None, and the library's default holds."""
    from kara_kernels.windows.policy import Policy

    usual = Policy()
    group = parser.add_argument_group("how the cache is compressed")
    group.add_argument(
        "--window", metavar="W", type=int, help=f"tokens scored in one compression (default: {usual.window})"
    )
    group.add_argument(
        "--keep", metavar="K", type=int, help="tokens kept of each window, 1 to W-1 (default: half of the window)"
    )
    group.add_argument(
        "--tail",
        metavar="N",
        type=int,
        help=f"newest tokens, left uncompressed; their queries help to score the window (default: {usual.tail})",
    )
    return group


def add_options(group: Any) -> None:
    """Every option of scoring and selection, as :mod:`kara_kernels.options` lists them."""
    from kara_kernels import options

    choices = {"attention": options.ATTENTIONS, "reduction": options.REDUCTIONS, "pool": options.POOLS}
    for name, field in options.OPTIONS.items():
        meaning, default = MEANINGS[name], field.default
        if default is None:
            group.add_argument(flag(name), choices=ON_OFF, help=f"{meaning} (default: on)")
        elif name in choices:
            group.add_argument(flag(name), choices=choices[name], help=f"{meaning} (default: {default})")
        else:
            kind = type(default)
            metavar = "N" if kind is int else "X"
            group.add_argument(flag(name), metavar=metavar, type=kind, help=f"{meaning} (default: {default})")


def told(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that were given."""
    given = {name: getattr(options, name) for name in names}
    return {name: ON_OFF.get(value, value) for name, value in given.items() if value is not None}


def fill_policy(options: argparse.Namespace) -> None:
    """Set window, keep and tail to their defaults where they were not given."""
    from kara_kernels.windows.policy import Policy

    usual = Policy()
    options.window = usual.window if options.window is None else options.window
    options.keep = max(1, options.window // 2) if options.keep is None else options.keep
    options.tail = usual.tail if options.tail is None else options.tail


@contextlib.contextmanager
def library_checks() -> Iterator[None]:
    """Turn an error of the library, which begins with an argument's name, into an error about the option."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        name, colon, rest = str(error).partition(":")
        raise DemoError(f"{flag(name)}: {rest.strip()}" if colon and name.isidentifier() else str(error), 2) from error


def check_least(options: argparse.Namespace, **least: float) -> None:
    """Reject a number below its minimum, infinity and NaN."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not low <= value < float("inf"):
            raise DemoError(f"{flag(name)} must be at least {low}, got {value}", 2)


def add_outputs(parser: argparse.ArgumentParser, picture: Path) -> Any:
    """The options for picture and figures, the same in every demo. Returns their group."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--picture",
        metavar="FILE",
        type=Path,
        default=picture,
        help="path of the picture, PNG, SVG or PDF (default: %(default)s)",
    )
    group.add_argument("--no-picture", action="store_true", help="draw no picture")
    group.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file as JSON")
    return group


def check_outputs(options: argparse.Namespace) -> None:
    """Raise DemoError (code 2) if an output cannot be written. Resolves --no-picture."""
    if options.no_picture:
        options.picture = None
    elif options.picture.suffix.lower() not in PICTURE_TYPES:
        raise DemoError(f"--picture must end in {', '.join(PICTURE_TYPES)}, got {options.picture}", 2)
    check_output("--picture", options.picture)
    check_output("--json", options.json)


def check_output(option: str, path: Path | None) -> None:
    """Fail now rather than after minutes of decoding. Creates the parent directories."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        was_there = path.exists()
        with open(path, "ab"):  # the only check that works for root and on read-only mounts
            pass
        if not was_there:
            path.unlink()
    except OSError as error:
        raise DemoError(f"{option} {path}: {error.strerror}", 2) from error


def check_model(name: str | None) -> None:
    """Reject a string that is neither a model directory nor a possible name on the Hub."""
    if name is None:
        return
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DemoError(f"--model {name} holds no config.json, so it is not a model directory", 2)
    # Anything that looks like a path is a path. Only "name" and "owner/name" can be Hub names.
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise DemoError(f"--model {name or repr(name)}: there is no such directory", 2)


def require(packages: Sequence[str], advice: str) -> None:
    """Raise DemoError with the missing `packages` and `advice` on how to get them."""
    if lacking := ", ".join(name for name in packages if importlib.util.find_spec(name) is None):
        raise DemoError(f"the demo needs {lacking} in this Python: {advice}")


@contextlib.contextmanager
def imports(prog: str) -> Iterator[None]:
    """Exit cleanly on Ctrl-C while torch is being imported, which would turn it into an ImportError."""

    def leave(*_: object) -> NoReturn:
        os.write(2, f"{prog}: interrupted\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def served(prog: str, parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], object]) -> int:
    """:func:`concluded` for a demo that starts servers. None of them outlives it: SIGTERM is treated like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return concluded(prog, lambda: run(parse()))


def concluded(prog: str, body: Callable[[], object]) -> int:
    """Run `body` and return the exit code: 0, that of a DemoError (2: bad option, 1: later failure), 130 for Ctrl-C."""
    try:
        body()
    except DemoError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        # The terminal has echoed ^C, so start a new line.
        print("\n" * sys.stderr.isatty() + f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) closed the pipe. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
