"""A file that people or tools may replace while the server runs."""

from __future__ import annotations

import os
import time

SECONDS = 1.0  # from one look at the file to the next


class WatchedFile:
    """Says when a file has changed, has appeared or has gone. The first look finds a file that exists changed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._next = 0.0

    @property
    def exists(self) -> bool:
        """Whether it did at the last look."""
        return self._seen is not None

    @property
    def age(self) -> float:
        """Seconds since it was written, as of the last look. 0 without a file."""
        return 0.0 if self._seen is None else max(0.0, time.time() - self._seen[0] / 1e9)

    def changed(self) -> bool:
        """Whether it has changed since the last call. It looks at most once a second."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + SECONDS
        try:
            stat = os.stat(self.path)
            seen = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            seen = None
        if seen == self._seen:
            return False
        self._seen = seen
        return True
