"""``python -m kara_kernels.contexts ls | show | verify | drop``: what an operator may do to a :mod:`.store`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..values import check_number
from .progress import Progress
from .store import Fault, InUse, Part, Stored, parts_of

SHORT = 12  # digits of a context's name in tables
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_to(commands: Any) -> None:
    """Adds the commands to those of a parser. Each sets ``run``, which returns the exit code."""
    ls = commands.add_parser("ls", help="list the contexts in the folder of a disk tier")
    ls.add_argument("--json", action="store_true", help="for machines")
    ls.set_defaults(run=_ls)
    show = commands.add_parser("show", help="say everything about one of them")
    show.set_defaults(run=_show)
    verify = commands.add_parser("verify", help="read all of them and check their checksums; 1 if anything is wrong")
    verify.add_argument(
        "--delete", action="store_true", help="delete what is wrong, and files of no context, where no server runs"
    )
    verify.set_defaults(run=_verify)
    drop = commands.add_parser("drop", help="delete contexts, and files of no context, where no server runs")
    drop.set_defaults(run=_drop)
    for each in (ls, show, verify, drop):
        each.add_argument("path", metavar="PATH", type=Path, help="the folder of the disk tier")
    show.add_argument("context", metavar="CONTEXT", help="the first digits of its name")
    drop.add_argument("contexts", metavar="CONTEXT", nargs="*", help="the first digits of its name")
    drop.add_argument("--all", action="store_true", help="every context, and snapshots that cannot be read")
    drop.add_argument("--older-than", metavar="AGE", help="contexts written before, for example 90m, 12h or 7d")


# ------------------------------------------------------------------------------------------------------------ commands


def _ls(options: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    servers: list[dict[str, Any]] = []
    for part in parts_of(options.path):
        contexts, error = _contexts(part)
        used, name = part.in_use, "" if error else str(part.snapshot.about.get("model", ""))
        servers.append({"model": part.model, "model_name": name, "server": part.server, "in_use": used, "error": error})
        for each in contexts:
            option = each.copy.option
            rows.append({
                "model": part.model, "server": part.server, "in_use": used, "context": each.copy.key,
                "tokens": _tokens(each), "method": option.method, "ratio": option.ratio, "bytes": each.nbytes,
                "saved": each.saved,
            })  # fmt: skip
    if options.json:
        print(json.dumps({"servers": servers, "contexts": rows}))
        return 0
    table = [("MODEL", "SERVER", "CONTEXT", "TOKENS", "METHOD", "RATIO", "SIZE", "SAVED")]
    for row in rows:
        tokens, server = row["tokens"], f"{row['server']}{' *' if row['in_use'] else ''}"
        table.append((
            str(row["model"])[:8], server, str(row["context"])[:SHORT], "?" if tokens is None else str(tokens),
            str(row["method"]), f"{row['ratio']:.2f}", _size(row["bytes"]), _date(row["saved"]),
        ))  # fmt: skip
    print("\n".join([*_columns(table), *_totals(rows, servers)]))
    return 0


def _show(options: argparse.Namespace) -> int:
    found = [(part, each) for part in parts_of(options.path) for each in _contexts(part)[0]]
    key = _named(options.context, [each.copy.key for _, each in found])
    faults = []
    for part, each in found:
        if each.copy.key == key:
            faults.append(each.fault())
            print("\n".join(_facts(part, each, faults[-1])))
    return int(any(faults))


def _verify(options: argparse.Namespace) -> int:
    held = [(part, *_contexts(part)) for part in parts_of(options.path)]
    say, counts, lines, nbytes = Progress(sum(len(contexts) for _, contexts, _ in held)), Counter[str](), [], 0
    begun = time.monotonic()
    for part, contexts, error in held:
        wrong, strays = set(), []
        for each in contexts:
            say("reading", 0.0)
            fault = each.fault()
            say.number += 1
            nbytes += each.nbytes
            kind = "whole" if fault is None else fault.kind
            if kind == "missing" and part.in_use:
                kind = "moved"  # since the server saved its snapshot
            counts[kind] += 1
            if fault is not None and kind != "moved":
                wrong.add(each.copy.number)
                lines.append(f"{_place(part)} {each.copy.key[:SHORT]}: {kind}: {fault.what}")
        if error is not None:
            counts["unreadable snapshots"] += 1
            lines.append(f"{_place(part)}: {error}")
        elif not part.in_use:  # a server may be writing them
            strays = part.strays(contexts)
            counts["of no context"] += len(strays)
            lines += [f"{_place(part)}: of no context: {file.relative_to(part.path)}" for file in strays]
        if options.delete and (wrong or strays):
            lines.append(_deleted(part, wrong))
    say.end(f"{say.total} contexts, {_size(nbytes)} in {time.monotonic() - begun:.1f} s")
    print("\n".join([*lines, ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing is stored"]))
    return int(any(n for name, n in counts.items() if name not in ("whole", "moved")))


def _drop(options: argparse.Namespace) -> int:
    given = [bool(options.contexts), options.all, options.older_than is not None]
    if sum(given) != 1:
        got = "two" if any(given) else "none"
        raise ValueError(f"drop: expected contexts, --all or --older-than, got {got}")
    parts = parts_of(options.path)
    chosen = _chosen(options, parts)
    gone: list[Stored] = []
    refused = 0
    for part in parts:
        contexts, error = _contexts(part)
        try:
            if error is not None and options.all:
                part.clear()
            elif error is not None:
                raise ValueError(f"{_place(part)}: {error}")
            elif options.all or any(map(chosen, contexts)):
                gone += part.drop(chosen)
        except (InUse, ValueError) as refusal:
            refused += 1
            print(f"error: {refusal}", file=sys.stderr)
    print(f"{len(gone)} contexts deleted, {_size(sum(each.nbytes for each in gone))}")
    return 2 if refused else 0


# --------------------------------------------------------------------------------------------------------------- parts


def _contexts(part: Part) -> tuple[list[Stored], str | None]:
    """Those of a part, or what is wrong with its snapshot."""
    try:
        return part.contexts(), None
    except ValueError as error:
        return [], str(error)


def _named(prefix: str, keys: Sequence[str]) -> str:
    found = sorted({key for key in keys if key.startswith(prefix)})
    if len(found) != 1:
        raise ValueError(f"CONTEXT: expected the first digits of one context, got {prefix!r} of {len(found)}")
    return found[0]


def _chosen(options: argparse.Namespace, parts: Sequence[Part]) -> Callable[[Stored], bool]:
    if options.all:
        return lambda each: True
    if options.older_than is not None:
        before = time.time() - _age(options.older_than)
        return lambda each: each.saved is not None and each.saved < before
    known = [each.copy.key for part in parts for each in _contexts(part)[0]]
    keys = {_named(prefix, known) for prefix in options.contexts}
    return lambda each: each.copy.key in keys


def _age(given: str) -> float:
    """Seconds."""
    try:
        age = float(given[:-1]) * SECONDS[given[-1:]]
    except (ValueError, KeyError):
        raise ValueError(f"--older-than: expected a number and one of s, m, h, d, got {given!r}") from None
    return check_number("--older-than", age, 0, 1e12)


def _deleted(part: Part, numbers: set[int]) -> str:
    try:
        gone = part.drop(lambda each: each.copy.number in numbers)
    except InUse as error:
        return f"not deleted: {error}"
    return f"{_place(part)}: {len(gone)} contexts deleted, and files of no context"


# ------------------------------------------------------------------------------------------------------ what is printed


def _place(part: Part) -> str:
    return f"{part.model[:8]}/{part.server}"


def _tokens(each: Stored) -> int | None:
    """None: its header cannot be read."""
    try:
        return each.header().layout.tokens
    except (ValueError, OSError):
        return None


def _facts(part: Part, each: Stored, fault: Fault | None) -> Iterator[str]:
    option, shape = each.copy.option, each.shape
    facts = [
        ("context", each.copy.key),
        ("model", f"{part.model} {part.snapshot.about.get('model', '')}".rstrip()),
        ("server", part.server + (", running" if part.in_use else "")),
        ("stored as", f"{option.method}, {option.ratio:.3f} of the rows' bytes, quality {option.quality}"),
        ("saved", _date(each.saved)),
        ("size", f"{each.nbytes} bytes: {each.grains} files of {shape.row}"),
        ("workers", f"{shape.workers}, {shape.grain} bytes of a file for each"),
        ("state", "whole: every checksum fits" if fault is None else f"{fault.kind}: {fault.what}"),
        *_header(each),
        *((f"file {i}", str(file or "missing")) for i, file in enumerate(each.files)),
    ]
    yield from (f"{name:<11} {what}" for name, what in facts)


def _header(each: Stored) -> Iterator[tuple[str, str]]:
    """What the packet of the first worker says, if it can be read."""
    try:
        header = each.header()
        stored = each.step(header)
    except (ValueError, OSError):
        return
    layout = header.layout
    dtype = str(layout.dtype).removeprefix("torch.")
    yield (
        "rows",
        f"{layout.rows} of {layout.tokens} tokens, in {layout.layers} layers and {layout.heads} heads of a worker",
    )
    yield "a row", f"{layout.dim} + {layout.v_dim} values of {dtype}"
    yield "form", layout.form
    yield "scorer", header.scorer or "none: rows lie in order"
    for number, section in enumerate(layout.sections[: stored.sections]):
        yield f"section {number}", f"{section.kind}, grade {section.grade}: {section.rows} rows, {section.nbytes} bytes"
    for step in header.steps:
        if step.sections <= stored.sections:
            what = f"{step.sections} sections: {step.ratio:.3f} of the bytes, {step.rows} rows"
            yield ("as it is" if step == stored else "can be cut"), what


def _totals(rows: Sequence[Any], servers: Sequence[Any]) -> Iterator[str]:
    used, size = sum(server["in_use"] for server in servers), _size(sum(row["bytes"] for row in rows))
    yield f"{len(rows)} contexts, {size}, of {len(servers)} servers, {used} running (*)"
    for model, name in {server["model"]: server["model_name"] for server in servers if server["model_name"]}.items():
        yield f"{model[:8]}: {name}"
    yield from (f"{x['model'][:8]}/{x['server']}: {x['error']}" for x in servers if x["error"])


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _size(nbytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def _date(seconds: float | None) -> str:
    return "?" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
