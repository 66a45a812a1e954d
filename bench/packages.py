"""Versions of packages beside the installed ones, for benches and tests that compare with them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def package_of(name: str, version: str) -> Path:
    """A folder with that version of a package, without what it requires. Fetched once per user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kara_kernels"
    held = hashlib.sha256(f"{version} {sys.version}".encode()).hexdigest()[:12]
    folder = cache / f"{name}-{version}-{held}"
    if not folder.exists():
        print(f"fetching {name} {version} into {folder}", file=sys.stderr)
        part = cache / f".{folder.name}.{os.getpid()}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(part), f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"could not install {name} {version}: {done.stderr.strip().splitlines()[-1]}")
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    return folder
