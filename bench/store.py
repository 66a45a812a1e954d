"""What was measured, by key, in the user's cache and never in the repository: a run that was stopped goes on.

A key is a hash of all that a value depends on. Code counts without comments, docstrings and layout.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from demos import DemoError
from demos.model import cache_root
from demos.screen import Screen

ROOT = Path(__file__).resolve().parents[1]


class Store:
    """JSON values that outlive the process. Each is kept for good once :meth:`put` returns; checkouts and processes
    may share a store, for a key says all that its value depends on."""

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
        """The value of ``key``, made where missing."""
        if self.get(key) is None:
            self.put(key, make())
        return self.get(key)

    def forget(self, keys: Iterable[str]) -> None:
        """Of a run that came to its end: the next one measures anew."""
        with self._base:
            self._base.executemany("delete from measured where key = ?", [(key,) for key in keys])


def measure_all(what: str, cases: Mapping[str, Callable[[], Any]], *depends: Any) -> list[Any]:
    """What every case gives, by its label and in order, with progress. A run that was stopped goes on where it was, if
    ``depends`` is the same; one that came to its end measures anew the next time."""
    store, values = Store(), []
    keys = {label: digest(what, label, *depends) for label in cases}
    with Screen().phase({}, what, len(cases), "cases") as advance:
        for label, make in cases.items():
            values.append(store.kept(keys[label], make))
            advance(1, label)
    store.forget(keys.values())
    return values


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_of_files(files: Iterable[Path], root: Path = ROOT) -> str:
    return digest([(path.relative_to(root).as_posix(), code_of(path.read_text(encoding="utf-8"))) for path in files])


def digest_of_folders(*names: str) -> str:
    """Of all code in folders, or in single files, of the repository."""
    paths = [ROOT / name for name in names]
    return digest_of_files(file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path]))


@functools.cache
def code_of(source: str) -> str:
    """Without what does not run."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return ast.unparse(tree)
