"""Sixty texts of six kinds, read from the installed packages at run time. None is copied into this repository.

Every text is a slice of something that Python or a dependency of the extra ``demo`` ships. Slices of one source start
evenly spaced, so the texts do not overlap. Other versions of a package give other texts: the stored measurements are
keyed by what was read.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bench.quality.texts import Text

LENGTH = 12_000  # characters; tables of numbers have hardly more than one a token
CODE = "argparse ipaddress _pydecimal tarfile subprocess typing inspect difflib mailbox statistics".split()
READMES = "torch transformers tqdm regex rich accelerate psutil sympy fonttools huggingface_hub".split()
LICENCES = {"torch": 5, "numpy": 1, "matplotlib": 2, "pillow": 2}
TABLES = {
    "torchgen/packaged/ATen/native/native_functions.yaml": 3,
    "torchgen/packaged/autograd/derivatives.yaml": 2,
    "torch/_dynamo/graph_break_registry.json": 2,
    "torch/_export/serde/schema.yaml": 1,
    "matplotlib/mpl-data/sample_data/Stocks.csv": 1,
    "matplotlib/mpl-data/fonts/afm/phvr8a.afm": 1,
}
ASKED = (
    "abc array asyncio base64 bisect calendar cmd codecs collections configparser contextlib copy csv ctypes "
    "dataclasses datetime dis email enum fractions functools getopt getpass gettext glob graphlib gzip hashlib heapq "
    "hmac html http imaplib inspect io json keyword linecache locale logging mimetypes netrc numbers operator "
    "optparse os pathlib pickle pkgutil platform poplib pprint profile queue random reprlib sched secrets selectors "
    "shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl string stringprep struct sysconfig tempfile "
    "textwrap threading timeit token trace traceback types unittest urllib uuid warnings wave weakref xml zipapp "
    "zipfile zipimport"
).split()  # fmt: skip
KINDS = ("manual", "code", "licence", "prose", "table", "dialogue")


def shipped() -> list[Text]:
    """The texts, kinds in turn, so that the first few are of all kinds. Missing ones are left out."""
    by_kind = [_slices("manual", "topics", _topics(), 10), *map(list, (_code(), _licences(), _readmes(), _tables()))]
    by_kind.append(_slices("dialogue", "asked", _dialogue(), 10))
    longest = max(map(len, by_kind))
    return [texts[i] for i in range(longest) for texts in by_kind if i < len(texts)]


def _slices(kind: str, name: str, text: str, count: int) -> list[Text]:
    step = len(text) // count
    return [Text(f"{name}-{i + 1}", kind, text[i * step :][: min(step, LENGTH)]) for i in range(count)]


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _code() -> Iterator[Text]:
    for name in CODE:
        path = _found(f"{name}.py")
        if path:
            source = path.read_text(encoding="utf-8")
            yield Text(name, "code", source[len(source) // 3 :][:LENGTH])


def _licences() -> Iterator[Text]:
    for package, count in LICENCES.items():
        files = [file for file in _files(package) if "LICENSE" in file.name.upper()]
        text = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        yield from _slices("licence", package, text, count)


def _readmes() -> Iterator[Text]:
    for package in READMES:
        if _files(package):
            described = importlib.metadata.metadata(package)["Description"] or ""
            yield Text(package, "prose", described[:LENGTH])


def _tables() -> Iterator[Text]:
    for name, count in TABLES.items():
        path = _found(name)
        if path:
            text = path.read_text(encoding="utf-8")
            yield from _slices("table", path.stem, text, count)


def _dialogue() -> str:
    """A user asks what modules are for, and their docstrings answer."""
    turns = []
    for name in ASKED:
        path = _found(f"{name}.py") or _found(f"{name}/__init__.py")
        doc = inspect.cleandoc(_docstring(path) or "") if path else ""
        if doc:
            turns += [
                f"User: What is Python's module {name} for?",
                f"Assistant: {doc}",
            ]
    return "\n\n".join(turns)


def _docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def _found(name: str) -> Path | None:
    """The path of a file of the standard library or of a package, None if it is not installed."""
    for scheme in ("stdlib", "purelib", "platlib"):
        path = Path(sysconfig.get_path(scheme)) / name
        if path.is_file():
            return path
    return None


def _files(package: str) -> list[Path]:
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted(Path(str(file.locate())) for file in files)


if __name__ == "__main__":  # as contexts that `python -m kara_kernels.contexts profile` takes
    for text in shipped():
        print(json.dumps({"name": f"{text.kind}/{text.name}", "text": text.text}))
