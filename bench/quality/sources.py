"""Hashes of what a measurement depends on, so that only changed scorers are measured again.

Every file of the library counts unless it is known to be unused in a measurement. New files therefore count too.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from bench.store import ROOT, code_of, digest, digest_of_files

from .methods import Method

BENCH = {"fidelity": ("measure", "replay"), "recall": ("measure", "replay"), "decoding": ("decode", "replay")}
# No measurement uses these, or :func:`of_method` hashes what it uses of them.
OTHERS = (
    "integrations/vllm/*", "integrations/__init__.py", "integrations/[ef]*.py", "*/rank.py", "scorers/__init__.py",
    "scorers/published.py", "contexts/*", "payload*.py", "*/gather.py", "*/quantize.py", "*/channels.py",
    "ops/_payload.py", "ops/_codes.py",
)  # fmt: skip
KERNELS = ("ops/[!_]*.py", "ops/_[knqr]*.py", "ops/_tiles.py")  # unused on CPUs; ops/_triton.py chooses the path
SCORES = ("*/score.py", "ops/_norms.py", "ops/_tiles.py", "scorers/own.py")  # unused if another scorer is used
# Unused if another scorer is used and no engine runs.
RING = (
    "ops/pack.py", "reference/pack.py", "windows/ledger.py", "windows/plan.py", "windows/policy.py",
    "windows/queries.py",
)  # fmt: skip
# Unused if no engine runs, because replays call compress_window themselves.
SHIM = (
    "__main__.py", "engine/*", "windows/events.py", "windows/execute.py",
    "integrations/transformers/[!r]*",  # all but rotary.py
)  # fmt: skip


def of_files(task: str, own_scores: bool, device: str, root: Path = ROOT) -> str:
    """A hash of the files that records of ``task`` depend on, on this type of device. ``own_scores``: the library's
    scores are used."""
    idle = OTHERS + (() if own_scores else SCORES) + (() if task == "decoding" else SHIM)
    idle += () if own_scores or task == "decoding" else RING
    idle += KERNELS if device == "cpu" else ()
    library = root / "kara_kernels"
    files = [root / "bench/quality" / f"{name}.py" for name in BENCH[task]]
    for path in sorted(library.rglob("*.py")):
        if not any(fnmatch(path.relative_to(library).as_posix(), pattern) for pattern in idle):
            files.append(path)
    return digest_of_files(files, root)


def of_method(method: Method) -> str:
    """A hash of a method's settings and the code of its scorer."""
    budgets = [] if method.layer_budgets is None else of_callable(method.layer_budgets)
    return digest(method.name, method.window, method.tail, dict(method.selection), budgets, of_callable(method.scorer))


def of_callable(thing: Any) -> list[str]:
    """The code of a function, or of an object's class and its fields, and what it uses from its module."""
    if isinstance(thing, partial):
        return [repr((thing.args, thing.keywords)), *of_callable(thing.func)]
    if isinstance(thing, FunctionType):
        return sorted(_reached(thing, {}).values())
    return [repr(thing), *sorted(_reached(type(thing), {}).values())]


def _reached(thing: Any, found: dict[str, str]) -> dict[str, str]:
    """Code or value by name, for ``thing`` and the functions, classes and constants of its module that it uses."""
    found[thing.__qualname__] = code_of(textwrap.dedent(inspect.getsource(thing)))
    functions = [thing] if isinstance(thing, FunctionType) else filter(inspect.isfunction, vars(thing).values())
    for function in map(inspect.unwrap, functions):
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if name in found:
                continue
            if isinstance(value, FunctionType | type) and value.__module__ == thing.__module__:
                _reached(value, found)
            elif isinstance(value, str | int | float | tuple):
                found[name] = f"{name} = {value!r}"
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
