"""Demonstrations and what they share. They live beside the package, not in it: run them from a checkout.

generate/       python -m demos.generate: one prompt, decoded with the full cache and with KaraCache
serve/          python -m demos.serve: the same load for vLLM without Kara and with it
environment.py  python -m demos.environment FOLDER: a Python that runs vLLM on a CPU

model.py        which model: a directory, a name, or the small one that a package ships
screen.py       progress and the time left, on a terminal or in a log
command.py      command lines: options of every demo, exit codes, one line for every error
style.py        colours of the pictures
"""

from __future__ import annotations


class DemoError(Exception):
    """A problem the user can act on. The command line prints it as one line and exits with `code`."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
