"""Tables of benches, in Markdown and as CSV files.

A file starts with the values common to all rows, as ``# name: value``. Then comes one line per row. Values are strings,
integers, floats, ``True`` and ``False``. An empty cell is a missing value. Rows may nest: ``times.event.median`` is the
column of ``row["times"]["event"]["median"]``. A column whose name ends in ``[]`` holds lists, separated by ``;``.
:func:`read` returns exactly what :func:`write` wrote, to the last digit.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def write(path: Path, rows: Iterable[Mapping[str, Any]], **head: Any) -> None:
    """Replaces ``path`` atomically. Raises ValueError for values that would be read back differently."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8", newline="") as file:
        for name, value in _flat(head).items():
            file.write(f"# {name}: {value}\n")
        table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(flat)
    os.replace(beside, path)


def read(path: Path) -> tuple[Row, list[Row]]:
    """Returns (common values, rows). Raises ValueError, with the file name, if the file is not such a table."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        first = next(index for index, line in enumerate(lines) if not line.startswith("# "))
        head = _nested(tuple(line[2:].split(": ", 1)) for line in lines[:first])
        rows = [_nested(row.items()) for row in csv.DictReader(lines[first:], strict=True, restkey="")]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a table of a bench: {error}") from error
    return head, rows


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    cells: dict[str, str] = {}
    for name, value in row.items():
        if any(mark in name for mark in ".[]\n") or ": " in name:
            raise ValueError(f"column: expected a name without . [] and colon, got {name!r}")
        if isinstance(value, Mapping):
            cells |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value:
            cells[f"{prefix}{name}[]"] = ";".join(_written(one) for one in value)
        elif value is not None:
            cells[prefix + name] = _written(value)
    return cells


def _written(value: Any) -> str:
    text = str(value)
    simple = isinstance(value, str | int | float | bool) and text and not set("\n;") & set(text)
    if not simple or repr(_value(text)) != repr(value):
        raise ValueError(f"value: expected one that a table gives back, got {value!r}")
    return text


def _nested(cells: Iterable[tuple[str, ...]]) -> Row:
    row: Row = {}
    for name, text in cells:
        if text == "":
            continue
        *path, last = name.split(".")
        inner = row
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last.removesuffix("[]")] = (
            [_value(one) for one in text.split(";")] if last.endswith("[]") else _value(text)
        )
    return row


def _value(text: str) -> str | int | float | bool:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
