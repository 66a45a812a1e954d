"""Which weights a server has: what must make a difference, and what must not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kara_kernels.integrations.vllm.contexts.weights import SAMPLE, SAMPLES, fingerprint, shared_name, weights_of

GIVEN: dict[str, Any] = {
    "weights": "commit 1", "model": "a model", "text_config": {"layers": 3, "rope": {"theta": 1.0}}, "grain": 4096,
}  # fmt: skip


def files(folder: Path, *contents: bytes) -> list[Path]:
    folder.mkdir(exist_ok=True)
    found = [folder / f"model-{i}.safetensors" for i in range(len(contents))]
    for path, content in zip(found, contents, strict=True):
        path.write_bytes(content)
    return found


def test_every_byte_of_small_files_counts(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 * SAMPLE + 100)
    alone = fingerprint(files(tmp_path / "a", content, b"x"))
    assert fingerprint(files(tmp_path / "b", content, b"x")) == alone  # wherever the folder is
    assert fingerprint(files(tmp_path / "b", content, b"x")[::-1]) == alone
    for at in (0, SAMPLE, 2 * SAMPLE + 7, len(content) - 1):
        other = bytearray(content)
        other[at] ^= 1
        assert fingerprint(files(tmp_path / "b", bytes(other), b"x")) != alone
    assert fingerprint(files(tmp_path / "b", b"x", content)) != alone
    assert fingerprint(files(tmp_path / "b", content + b"x", b"")) != alone


def test_a_matrix_of_large_files_counts(tmp_path: Path) -> None:
    size = 8 * SAMPLES * SAMPLE  # of which an eighth is read
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(size)
    before = fingerprint([path])
    for at in (0, size // 3, size - 16 * SAMPLE):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\1" * 9 * SAMPLE)  # 36 KB
        after = fingerprint([path])
        assert after != before
        before = after


def test_a_name_comes_before_files_and_those_before_a_commit(tmp_path: Path) -> None:
    found = files(tmp_path / "model", b"weights")
    folder = str(tmp_path / "model")
    assert weights_of(folder, "123", "mine") == "named mine"
    assert weights_of(folder, "123", None) == f"files {fingerprint(found)}"
    assert weights_of("someone/model", "123", None) == "commit 123"
    one = tmp_path / "model.gguf"
    one.write_bytes(b"quantised")
    assert weights_of(str(one), None, None) == f"files {fingerprint([one])}"
    (tmp_path / "empty").mkdir()
    for model in ("someone/model", "s3://bucket/model", str(tmp_path / "empty")):
        with pytest.raises(ValueError, match="remote: weights: expected a name that servers"):
            weights_of(model, None, None)


def test_what_makes_rows_differ_makes_names_differ() -> None:
    name = shared_name(**GIVEN)
    assert shared_name(**GIVEN) == name
    changes: list[dict[str, Any]] = [
        {"weights": "commit 2"},
        {"model": "another"},
        {"text_config": {"layers": 3, "rope": {"theta": 2.0}}},
        {"grain": 8192},
        {"quantization": "fp8"},
    ]
    names = {shared_name(**{**GIVEN, **change}) for change in changes}
    assert len(names | {name}) == 1 + len(changes)
    config = {"rope": {"theta": 1.0}, "transformers_version": "9", "_name_or_path": "/here", "layers": 3}
    assert shared_name(**{**GIVEN, "text_config": config}) == name
    assert len(name) == 32
