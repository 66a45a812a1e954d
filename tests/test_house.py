"""The code stays small: limits on the length of files, classes, functions and the core."""

from __future__ import annotations

import ast
import io
import tokenize
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kara_kernels"
FILES = sorted(path for room in ("kara_kernels", "demos", "bench") for path in (ROOT / room).rglob("*.py"))
MOST_LINES, MOST_OF_CLASS, MOST_OF_FUNCTION = 400, 250, 60
# Rooms of contexts. They share the ground with windows, and are counted apart.
OF_CONTEXTS = (
    "contexts/*", "scorers/*", "payload*.py", "*/gather.py", "*/quantize.py", "*/channels.py", "*/rank.py",
    "*/checksum.py", "ops/_payload.py", "ops/_codes.py",
)  # fmt: skip
# Only a new operation may raise this limit, by its own lines (operations and payloads 1,267, packets 250, the profile
# 897, placement 944, scorers 281, stores and their commands 456; decoding in fewer passes on a CPU: 18, and into
# whole blocks, and encoding out of them: 45; ranking the rows of a paged cache: 26; new contexts in the reserve of a
# full tier: 11; checksums where packets lie, and the packets that have them: 116; what scorers need, and those of other
# packages: 36; rows of fp8 caches times their scales: 5).
MOST_OF_CONTEXTS = 4353
# The code for windows had 2,436 lines after the rearrangement, whose goal was 2,200. Only a new operation may raise
# this limit, by its own lines (queries in four bits: 221; rings of them, fp8 queries and looking ahead: 215; windows
# and keeps of single sequences: 18; compressing early and while recomputing: 43; dry runs, losses and the guard: 129;
# around a defect of Triton 3.6: 9; smaller windows and survivors when blocks are short: 52; number formats that
# payloads share: 57; sequences that begin with fewer rows than tokens, and queries that rank them: 44; packed caches
# that contexts share: 3; the name of the checksum's operation: 1; column sums in registers, and packed queries a
# tile ahead: 97; repeated launches, which take a tenth of the host time: 117; rows that programs
# share, and block ids ahead: 37; limits of targets by name: 8; kernels that overlap, and repeated calls with pooled
# lists or hooks: 33; other methods by name: 100; rows of fp8 caches times their scales: 21;
# rows for queries of drafts that are rejected: 4).
MOST_OF_CORE = 3645


def code_lines(source: str) -> set[int]:
    """Numbers of the lines with code: not blank, comment or docstring."""
    held = set()
    passed = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    statement_begins = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING and statement_begins:  # a docstring, of a module or of a field
            continue
        if token.type in passed:
            statement_begins = statement_begins or token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            continue
        statement_begins = False
        held.update(range(token.start[0], token.end[0] + 1))
    return held


def test_lines_of_code_are_told_from_prose() -> None:
    source = '"""Prose."""\n\n# more\nx = 1  # one\n\n\ndef f():\n    """Prose\n    of two lines."""\n'
    source += '    return """a\nb"""\n'
    assert code_lines(source) == {4, 7, 10, 11}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_classes_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES
    code = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_OF_CLASS, node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert len(code & set(range(node.lineno, node.end_lineno + 1))) <= MOST_OF_FUNCTION, node.name


def test_the_core_is_small() -> None:
    held = {True: 0, False: 0}
    for path in PACKAGE.rglob("*.py"):
        if "integrations" not in path.parts:
            name = path.relative_to(PACKAGE).as_posix()
            held[any(fnmatch(name, room) for room in OF_CONTEXTS)] += len(code_lines(path.read_text(encoding="utf-8")))
    assert held[True] <= MOST_OF_CONTEXTS
    assert held[False] <= MOST_OF_CORE
