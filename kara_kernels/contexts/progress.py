"""How far a long command is."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line: which context, what of it, and an estimate of the time left."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.begun, self.skipped = total, 0, time.monotonic(), 0
        self.live = sys.stderr.isatty()

    def __call__(self, what: str, done: float) -> None:
        finished = self.number - self.skipped + done
        left = ""
        if finished > 0.1:
            seconds = (time.monotonic() - self.begun) / finished * (self.total - self.number - done)
            left = f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
        text = f"context {self.number + 1} of {self.total}: {what}{left}"
        if self.live:
            print(f"\r{text:<100.100}", end="", file=sys.stderr, flush=True)
        elif what == "prefill":
            print(text, file=sys.stderr, flush=True)

    def passed(self) -> None:
        self.skipped += 1

    def end(self, text: str) -> None:
        print(("\r" + " " * 100 + "\r" if self.live else "") + text, file=sys.stderr)
