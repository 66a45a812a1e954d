"""The demonstration behind ``python -m demos.generate``.

It decodes the same prompt with the full cache and with :class:`KaraCache`, then measures how close the
compressed cache stays to the full one. One module per question:

    __main__.py   what may be asked: options, checks, exit codes; nothing slow is imported before they passed
    model.py      which model: a directory, a name, or the small one that a package ships
    run.py        what happens: generation with both caches, teacher forcing of one text through all of them
    report.py     what came out: tables, texts and the JSON file
    picture.py    the same as one picture
"""

from __future__ import annotations


class DemoError(Exception):
    """A problem the user can act on. The command line prints it as one line and exits with `code`."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
