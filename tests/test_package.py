"""The package before any computation: imports, types, direction of dependencies."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kara_kernels"

WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
import kara_kernels, kara_kernels.ops as ops, kara_kernels.reference, kara_kernels.scorers
assert "triton" not in sys.modules
scores = torch.tensor([[1.0, 3.0, 2.0]])
assert ops.select_topk(scores, 2).tolist() == [[1, 2]]
k = torch.randn(1, 8, 1, 4)
result = kara_kernels.compress_window(
    torch.randn(1, 4, 1, 4), k, k.clone(), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([8], dtype=torch.int32),
    window=4, keep=2,
)
assert result.seq_lens.tolist() == [6]
try:
    ops.select_topk(scores, 2, backend="triton")
except ValueError as error:
    print(error)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_but_the_kernels_works_without_triton() -> None:
    assert "got an installation without it" in run(WITHOUT_TRITON)


def test_importing_asks_for_no_driver() -> None:
    """Compiled kernels need a driver only at launch."""
    code = "import kara_kernels.windows.compress, triton; print(triton.runtime.driver._active)"
    assert run(code, TRITON_INTERPRET="0").split() == ["None"]


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


PAYLOAD = {"payload", "payload_arguments"}
GROUND = {"ahead", "values", "checks", "overlap", "packed", "paged", "arguments", "options"}


@pytest.mark.parametrize(
    ("room", "may_import"),
    [
        ("values.py", set()),
        ("checks.py", {"values"}),
        ("overlap.py", set()),
        ("packed.py", {"checks"}),
        ("ahead.py", {"values", "checks"}),
        ("paged.py", {"checks", "overlap", "packed"}),
        ("arguments.py", {"values", "checks", "options", "paged", "ahead"}),
        ("options.py", {"values"}),
        ("payload.py", {"values", "checks", "paged"}),
        ("payload_arguments.py", {"values", "checks", "paged", "payload"}),
        ("reference", {*GROUND, *PAYLOAD, "reference"}),
        ("ops", {*GROUND, *PAYLOAD, "reference", "ops"}),
        ("scorers", {"ahead", "checks", "options", "values", "ops", "scorers"}),
        ("windows", {*GROUND, "reference", "ops", "scorers", "windows"}),
        ("contexts", {"values", "ahead", "paged", *PAYLOAD, "ops", "scorers", "contexts"}),
        ("contexts/__main__.py", {"contexts", "integrations"}),
        ("engine", {"paged", "windows"}),
        ("integrations/flashinfer.py", {"values", "checks"}),
        ("integrations/transformers", {*GROUND, "engine", "integrations", ""}),
        ("integrations/vllm", {*GROUND, "payload", "engine", "contexts", "integrations"}),
        ("integrations/vllm/windows", {*GROUND, "engine", "integrations"}),
        ("integrations/vllm/contexts", {*GROUND, "payload", "contexts", "integrations"}),
    ],
)
def test_imports_point_one_way(room: str, may_import: set[str]) -> None:
    files = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    if room == "contexts":  # its command has a line of its own
        files.remove(PACKAGE / room / "__main__.py")
    assert files
    for file in files:
        package = ["kara_kernels", *file.relative_to(PACKAGE).parts[:-1]]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in imported(node, package):
                if name[0] == "kara_kernels":
                    assert (name[1] if len(name) > 1 else "") in may_import, f"{file.name} imports {'.'.join(name)}"
                if room == "reference":
                    assert name[0] != "triton"


def imported(node: ast.AST, package: list[str]) -> list[list[str]]:
    """Dotted names of modules that an import statement in ``package`` reaches."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".") for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) - node.level + 1] if node.level else []
    base = base + (node.module.split(".") if node.module else [])
    if base == ["kara_kernels"]:  # from .. import reference: the names may be subpackages
        rooms = {path.stem for path in PACKAGE.iterdir()}
        return [[*base, alias.name] if alias.name in rooms else base for alias in node.names]
    return [base]
