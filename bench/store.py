"""Stores measurements by key in the user's cache, not in the repository, so that an interrupted run can resume.

A key is a hash of everything a value depends on. Code is hashed without comments, docstrings and layout.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from demos import DemoError
from demos.model import cache_root
from demos.screen import Screen

ROOT = Path(__file__).resolve().parents[1]


class Store:
    """JSON values that outlive the process. A value is permanent once :meth:`put` returns. Checkouts and processes may
    share a store, because a key covers everything its value depends on."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_root() / "bench" / "measured.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self.path, timeout=60)
            self._base.execute("create table if not exists measured (key text primary key, value text not null)")
        except (OSError, sqlite3.Error) as error:
            raise DemoError(f"cannot keep measurements in {self.path}: {error}") from error

    def get(self, key: str) -> Any | None:
        found = self._base.execute("select value from measured where key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def put(self, key: str, value: Any) -> None:
        with self._base:
            self._base.execute("insert or replace into measured values (?, ?)", (key, json.dumps(value)))

    def kept(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of ``key``. Computes it if it is missing."""
        if self.get(key) is None:
            self.put(key, make())
        return self.get(key)

    def forget(self, keys: Iterable[str]) -> None:
        """Removes the values of a finished run, so that the next run measures again."""
        with self._base:
            self._base.executemany("delete from measured where key = ?", [(key,) for key in keys])


def measure_all(what: str, cases: Mapping[str, Callable[[], Any]], *depends: Any) -> list[Any]:
    """Measures every case in order, with progress. An interrupted run resumes if ``depends`` is the same. After a
    finished run, the next one measures again."""
    store, values = Store(), []
    keys = {label: digest(what, label, *depends) for label in cases}
    with Screen().phase({}, what, len(cases), "cases") as advance:
        for label, make in cases.items():
            values.append(store.kept(keys[label], make))
            advance(1, label)
    store.forget(keys.values())
    return values


def concluded(name: str, body: Callable[[], int | None]) -> int:
    """Runs a bench that keeps what it measured. Returns its exit code, which ``body`` may choose."""
    try:
        return body() or 0
    except DemoError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the next run goes on from here", file=sys.stderr)
        return 130


def make_folder(path: Path) -> None:
    """Makes the folder of ``--out``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {path}: {error.strerror or error}") from error


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_of_files(files: Iterable[Path], root: Path = ROOT) -> str:
    return digest([(path.relative_to(root).as_posix(), code_of(path.read_text(encoding="utf-8"))) for path in files])


def digest_of_folders(*names: str) -> str:
    """A hash of all code in folders or single files of the repository."""
    paths = [ROOT / name for name in names]
    return digest_of_files(file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path]))


@functools.cache
def code_of(source: str) -> str:
    """The source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A constant on a line of its own is a docstring, also below an attribute.
            node.body = [line for line in node.body if not _is_constant(line)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_constant(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
