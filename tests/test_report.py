"""``python -m kara_kernels`` with missing or broken parts: it reports them and exits with 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kara_kernels
from kara_kernels.integrations import environment as report
from kara_kernels.integrations.vllm import unsupported
from kara_kernels.integrations.vllm.windows import configure
from kara_kernels.ops import _triton

ROOT = Path(__file__).parents[1]
KEYS = ["kara_kernels", "python", "packages", "variables", "devices", "paths", "vllm"]

# Missing, or installed but broken, for both find_spec and import.
WITHOUT = """
import runpy, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise {error}
sys.meta_path.insert(0, Without())
sys.argv[1:] = {arguments!r}
runpy.run_module("kara_kernels", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    report._gpus_seen.cache_clear()
    yield
    report._gpus_seen.cache_clear()


def run(*command: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in report.VARIABLES} | environment
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def rows(text: str) -> dict[str, str]:
    """Label -> text. Continuation lines belong to the previous label."""
    found: dict[str, str] = {}
    wide = text.index(kara_kernels.__version__)
    for line in text.splitlines():
        assert len(line) <= report.WIDTH
        if label := line[:wide].strip():
            found[label] = line[wide:]
        else:
            found[list(found)[-1]] += f" {line[wide:]}"
    return found


def test_text_and_json_say_the_same() -> None:
    text = run("-m", "kara_kernels", TRITON_INTERPRET="1", KARA_KERNELS_DEBUG="1").rstrip("\n")
    said = json.loads(run("-m", "kara_kernels", "--json", TRITON_INTERPRET="1", KARA_KERNELS_DEBUG="1"))
    assert list(said) == KEYS
    assert report.render(said) == text
    assert len(text.splitlines()) <= 30
    found = rows(text)
    assert found["torch"].startswith(torch.__version__)
    assert found["variables"] == "TRITON_INTERPRET=1, KARA_KERNELS_DEBUG=1, KARA_KERNELS_PDL unset"
    assert found["CPU tensors"].startswith("PyTorch; backend='triton' works too (TRITON_INTERPRET=1")


def test_compiled_kernels_are_not_for_processors() -> None:
    found = rows(run("-m", "kara_kernels", TRITON_INTERPRET="0"))
    assert found["CPU tensors"] == "PyTorch; backend='triton' needs TRITON_INTERPRET=1 there"
    assert found["variables"] == "TRITON_INTERPRET=0, KARA_KERNELS_DEBUG unset, KARA_KERNELS_PDL unset"


def test_engines_are_not_imported() -> None:
    code = "import sys; from kara_kernels.integrations.environment import collect; collect(); print(*sys.modules)"
    imported = run("-c", code).split()
    assert "torch" in imported
    assert not {"transformers", "vllm"} & set(imported)


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_a_bare_python_gets_a_report(arguments: list[str]) -> None:
    """No packages at all, not even PyTorch. -S hides the installed ones."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + WITHOUT.format(
        names=set(), error="ImportError", arguments=arguments
    )
    text = run("-S", "-c", code)
    if arguments:
        assert json.loads(text)["packages"] == dict.fromkeys(["torch", "triton", "transformers", "vllm"])
        return
    found = rows(text)
    assert found["kara_kernels"].startswith(f"{kara_kernels.__version__} (checkout")
    assert [found[name] for name in ("torch", "triton", "transformers", "vllm")] == ["not installed"] * 4
    assert found["devices"] == found["vLLM plugin"] == "ModuleNotFoundError: No module named 'torch'"


def test_without_triton_transformers_and_vllm() -> None:
    error = "ModuleNotFoundError(f'No module named {name!r}', name=name)"
    code = WITHOUT.format(names={"triton", "transformers", "vllm"}, error=error, arguments=[])
    found = rows(run("-c", code))
    assert [found[name] for name in ("triton", "transformers", "vllm")] == ["not installed"] * 3
    assert found["CPU tensors"] == "PyTorch; triton cannot be imported"
    assert found["vLLM plugin"] == "idle: vLLM is not installed, expected 0.32.* or 0.33.*"


def test_a_broken_pytorch_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: not found\\nand more')")
    found = rows(run("-m", "kara_kernels", PYTHONPATH=str(tmp_path)))
    assert found["torch"] == metadata.version("torch")
    assert found["devices"] == found["paths"] == "OSError: libcudart.so.13: not found"


def test_a_folder_of_the_name_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm_of_mine").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert report._version("vllm_of_mine") is None
    (tmp_path / "vllm_of_mine" / "__init__.py").touch()
    assert report._version("vllm_of_mine") == "unknown"


@pytest.mark.parametrize(
    ("kind", "text", "version"),
    [
        ("cuda", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023", "535.104.05"),
        ("cuda", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("hip", "6.12.12\n", "6.12.12"),
        ("hip", "", None),
    ],
)  # fmt: skip
def test_versions_of_drivers(
    kind: str, text: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setitem(report.DRIVERS, kind, str(tmp_path / "version"))
    assert report._driver(kind) == version
    monkeypatch.setitem(report.DRIVERS, kind, str(tmp_path / "absent"))
    assert report._driver(kind) is None


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes PyTorch behave as with that many GPUs. Triton finds no driver."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85 * 10**9,
        shared_memory_per_block_optin=232448,
    )  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(report, "_driver", lambda kind: "580.65.06")


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    monkeypatch.setattr(report, "_target", lambda index: "cuda:90")
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    found = rows(report.render(report.collect()))
    assert found["torch"].endswith("built for cuda 13.0")
    assert found["GPU 1"] == (
        "NVIDIA H100 80GB HBM3, driver 580.65.06, capability 9.0, target cuda:90, 132 multiprocessors, 79.2 GiB, "
        "shared memory 232448 bytes"
    )
    assert found["GPU tensors"] == "Triton; kernels are compiled for the target"


def test_gpus_without_triton_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    monkeypatch.setattr(_triton, "HAS_TRITON", False)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(report, "_installed", lambda name: name == "torch")
    found = rows(report.render(report.collect()))
    assert "target none without triton" in found["GPU 0"]
    assert found["GPU tensors"].startswith("refused; backend: expected the triton package")


def test_a_target_that_triton_cannot_name_costs_only_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)

    def broken(index: int) -> str:
        raise RuntimeError("0 active drivers\nsecond line")

    monkeypatch.setattr(report, "_target", broken)
    assert "target RuntimeError: 0 active drivers, 132 multi" in rows(report.render(report.collect()))["GPU 0"]


def test_why_pytorch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert rows(report.render(report.collect()))["GPUs"] == "none: PyTorch finds none"
    report._gpus_seen.cache_clear()

    def too_old() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old.\nPlease update", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert rows(report.render(report.collect()))["GPUs"] == "none: The NVIDIA driver on your system is too old."


@pytest.mark.parametrize(
    ("version", "entries", "plugins", "words"),
    [
        (None, ["kara"], None, {"vLLM plugin": "idle: vLLM is not installed"}),
        ("0.32.1", [], None, {"vLLM plugin": "unknown to vLLM: install kara-kernels"}),
        ("0.32.1", ["kara"], "other,none", {"vLLM plugin": "registered, but VLLM_PLUGINS leaves it out"}),
        ("0.32.1", ["kara"], "other,kara", {"vLLM plugin": "registered, off until --additional-config"}),
        ("0.34.0", ["kara"], None, {"vLLM version": "0.34.0 is not supported, expected 0.32.* or 0.33.*"}),
        ("0.33.0", ["kara"], None, {"vLLM version": "0.33.0 is supported: read, not run"}),
        ("0.32.1", ["kara"], None, {"vLLM version": "0.32.1 is supported: run", "refused": "speculative decoding"}),
    ],
)
def test_what_vllm_would_do(
    version: str | None,
    entries: list[str],
    plugins: str | None,
    words: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = "vllm.general_plugins"
    given = [metadata.EntryPoint(name, report.PLUGIN, group) for name in entries]
    given.append(metadata.EntryPoint("other", "other:register", group))
    monkeypatch.setattr(metadata, "entry_points", lambda **which: given if which == {"group": group} else [])
    versions = {"vllm": version}
    monkeypatch.setattr(report, "_version", lambda name: versions.get(name, "1.0"))
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    found = rows(report.render(report.collect()))
    for label, start in words.items():
        assert found[label].startswith(start)
    if version == "0.32.1":
        for worker in configure.WORKERS:
            assert worker in found["with kara"]
        for what in (*unsupported.UNSUPPORTED, *unsupported.UNSUPPORTED_LAYERS):
            assert what in found["refused"]


def test_the_entry_point_is_the_one_that_is_declared() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"kara": report.PLUGIN}
