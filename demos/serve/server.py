"""One vLLM server: environment, start, metrics and guaranteed shutdown."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import DemoError
from ..machine import Seconds, cpu_seconds, own_seconds, usable_cores

MODEL = "demo"  # the name under which the server offers the model
START_SECONDS = 900  # the first start compiles the model
STOP_SECONDS = 20

# name{label="value",...} number. Counter names end in "_total".
_SAMPLE = re.compile(r"^((?:vllm|kara):\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Settings:
    """Settings of a server. Servers of a comparison differ only in `kara` and `contexts`."""

    model: str
    blocks: int
    block_size: int
    max_model_len: int
    max_requests: int
    dtype: str
    eager: bool
    cpu: bool
    threads: int | None = None
    kara: dict[str, Any] | None = None
    contexts: dict[str, Any] | None = None
    drafts: int = 0
    """Tokens that n-grams of the text propose for each step."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    session: int
    start_seconds: float

    def metrics(self) -> dict[str, float]:
        """The Prometheus samples of vLLM and Kara, summed over engines and labels. {} if the server does not answer."""
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
                return samples(answer.read().decode())
        except (OSError, ValueError):
            return {}

    def cpu_seconds(self) -> Seconds | None:
        """CPU time so far. Counts this server's processes as ours."""
        return cpu_seconds(lambda: own_seconds() + session_seconds(self.session))


def session_seconds(session: int) -> float:
    """CPU time of a session's running processes and of their children that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = stat.read_text().rpartition(")")[2].split()  # the process name before it may contain anything
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def samples(text: str) -> dict[str, float]:
    """Samples of a Prometheus page by name, summed over labels.

    Samples with one of the labels `reason`, `source` and `tier` also appear separately, as ``name{waiting}``.
    """
    found: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        reason = re.search(r'(?:reason|source|tier)="([^"]*)"', labels)
        for key in [name] + ([f"{name}{{{reason[1]}}}"] if reason else []):
            found[key] = found.get(key, 0.0) + float(value)
    return found


def cpu_environment(threads: int | None = None) -> dict[str, str]:
    """Environment variables that must be set before vLLM's processes start on a CPU.

    By default vLLM pins its threads and reserves a core, which halves the speed on two cores.
    """
    found = {
        "OMP_NUM_THREADS": str(threads or usable_cores()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if library := _intel_openmp():
        found["LD_PRELOAD"] = ":".join(filter(None, (library, os.environ.get("LD_PRELOAD"))))
    return found


def _intel_openmp() -> str | None:
    """The OpenMP library that vLLM's CPU wheel depends on but does not load. Without it vLLM is three times slower."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("intel-openmp") or ():
            if file.name == "libiomp5.so":
                return str(Path(str(file.locate())).resolve())
    return None


def command(settings: Settings, port: int) -> list[str]:
    # Not "vllm serve": in the CPU wheel of 0.32 that command fails because no distribution is named vllm.
    arguments = {
        "model": settings.model,
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "dtype": settings.dtype,
        "block-size": settings.block_size,
        "num-gpu-blocks-override": settings.blocks,  # applies to any device, despite its name
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_requests,
        "disable-uvicorn-access-log": None,
    }
    if settings.eager:
        arguments["enforce-eager"] = None
    if settings.cpu:
        arguments["kv-cache-memory-bytes"] = 1 << 30  # otherwise vLLM measures free memory; blocks are set above
    additional = {"kara": settings.kara, "contexts": settings.contexts}
    if given := {key: value for key, value in additional.items() if value is not None}:
        arguments["additional-config"] = json.dumps(given)
    if settings.drafts:
        arguments["speculative-config"] = json.dumps({
            "method": "ngram", "num_speculative_tokens": settings.drafts, "prompt_lookup_min": 2, "prompt_lookup_max": 4
        })  # fmt: skip
    flags = [part for key, value in arguments.items() for part in (f"--{key}", value) if part is not None]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, flags)]


@contextmanager
def serving(settings: Settings, log: Path) -> Iterator[Server]:
    """A running server. Leaving the block for any reason ends it and all its processes."""
    port = _free_port()
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    if os.path.isdir(settings.model):
        quiet["HF_HUB_OFFLINE"] = "1"
    environment = os.environ | quiet | (cpu_environment(settings.threads) if settings.cpu else {})
    started = time.perf_counter()
    with open(log, "wb") as output:
        # In its own session, Ctrl-C reaches only us, and one signal reaches all of the server's processes.
        process = subprocess.Popen(
            command(settings, port),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        try:
            yield Server(url, process.pid, time.perf_counter() - started)
        except DemoError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # a server ends shortly after its engine dies and the requests fail
            if process.poll() is not None:
                raise DemoError(f"the server ended: {reason(log)}") from error
            raise
    finally:
        _stop(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise DemoError(f"the server did not start: {reason(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise DemoError(f"the server did not answer in {START_SECONDS} s: {reason(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate, wait, then kill the whole session, so that no worker outlives its server."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason(log: Path) -> str:
    """The most informative error line of a server's log, and the path of the log."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        lines = []
    # "(EngineCore pid=7) ERROR 11-22 06:13:00 [core.py:1] ValueError: ..."; the last one often only points to another.
    prefix = r"(\(\w+ pid=\d+\) )?(ERROR .*?\] )?"
    told = [line for line in lines if re.match(prefix + r"[\w.]*(Error|Exception|Interrupt): ", line)]
    causes = [line for line in told if "root cause" not in line] or [line for line in lines if line] or ["no output"]
    return f"{re.sub('^' + prefix, '', causes[-1])[:300]} (log: {log})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
