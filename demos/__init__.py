"""The demos and their shared code. They are not part of the package: run them from a checkout.

generate/       python -m demos.generate: one prompt, decoded with the full cache and with KaraCache
serve/          python -m demos.serve: the same load for vLLM, with and without Kara
environment.py  python -m demos.environment FOLDER: creates a Python that runs vLLM on a CPU

model.py        loads the model: a directory, a name, or the small packaged one
screen.py       progress and time left, on a terminal or in a log
command.py      command lines: shared options, exit codes, one line per error
style.py        colours of the pictures
"""

from __future__ import annotations


class DemoError(Exception):
    """A problem the user can act on. The command line prints it as one line and exits with `code`."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
