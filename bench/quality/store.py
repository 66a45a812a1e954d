"""What was measured, by key, in the user's cache and never in the repository: a run that was stopped goes on."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demos import DemoError
from demos.model import cache_root


class Store:
    """JSON values that outlive the process. Each is kept for good once :meth:`put` returns; checkouts and processes
    may share a store, for a key says all that its value depends on."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_root() / "quality" / "measured.sqlite"
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
