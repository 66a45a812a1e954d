"""codegen.md: goals first, then a summary by kernel, then every kernel in every shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.tables import Row, markdown

from .goals import Verdict

INTRODUCTION = """# The machine code of every kernel

Made by `make codegen`, without a GPU: the library's own launches, compiled for six targets by the oldest Triton that
the package allows and by the newest. Registers, spills and sizes are the assembler's; widths, tensor-core instructions,
barriers and atomics are read from the machine code (SASS, GCN). Nothing here was run and nothing here is a time. sm_90
builds that use `wgmma`, and sm_100 builds that use `tcgen05`, are compiled and inspected only; what runs in the
emulator of `make test` is the sm_80 code.

Occupancy is the share of a multiprocessor's warp slots that programs can fill, by registers (in steps of 8 a thread),
shared memory, and slots for warps and blocks; the constants and their sources are in `bench/codegen/inspect.py`. Spills
are bytes of stack and local memory a thread (AMD: scratch bytes and spilled registers).
"""


def name(row: Row) -> str:
    return f"{row['kernel']} {row['shape']} on {row['target']} with Triton {row['triton']}"


def page(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> str:
    return "\n".join([INTRODUCTION, _goals(verdicts), _summary(rows), _everything(rows)])


def _goals(verdicts: Sequence[Verdict]) -> str:
    parts = ["## Goals\n"]
    parts.append(markdown(
        ("goal", "kernels", "met", "excused", "missed"),
        ((v.goal, v.rows, v.rows - len(v.missed) - sum(n for _, n in v.excused), sum(n for _, n in v.excused),
          len(v.missed)) for v in verdicts),
    ))  # fmt: skip
    for verdict in verdicts:
        parts += [f"- **{verdict.goal}**, {count} excused: {exception.reason}" for exception, count in verdict.excused]
        parts += [f"- **{verdict.goal}**, missed: {name(row)}" for row in verdict.missed]
    return "\n".join(parts) + "\n"


def _summary(rows: Sequence[Row]) -> str:
    def span(group: Sequence[Row], key: str, show: str = "{}") -> str:
        low, high = min(row[key] for row in group), max(row[key] for row in group)
        return show.format(low) if low == high else f"{show.format(low)}-{show.format(high)}"

    lines = []
    for kernel in _unique(row["kernel"] for row in rows):
        for target in _unique(row["target"] for row in rows):
            group = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
            if group:
                lines.append((
                    kernel, target, len(group), span(group, "registers"), span(group, "spills"),
                    f"{max(row['shared'] for row in group) / 1024:.0f} of {group[0]['shared_limit'] / 1024:.0f} KiB",
                    span([{"o": 100 * row["occupancy"]} for row in group], "o", "{:.0f}"),
                    span(group, "load_bytes"), span(group, "store_bytes"), span(group, "tensor"),
                    span(group, "barriers"),
                    span([{"a": row["atomics"] + row["shared_atomics"]} for row in group], "a"),
                    span([{"s": row["code_bytes"] / 1024} for row in group], "s", "{:.0f}"),
                ))  # fmt: skip
    header = ("kernel", "target", "builds", "registers", "spills", "shared, at most", "occupancy %",
              "widest load, bytes", "widest store", "tensor-core instructions", "barriers", "atomics",
              "code, KiB")  # fmt: skip
    note = "Scoring stores 4 bytes a thread: one float32 row of column sums per program, behind megabytes of loads.\n"
    return f"## Summary, both versions of Triton\n\n{markdown(header, lines)}\n{note}"


def _everything(rows: Sequence[Row]) -> str:
    """One line a shape, one column a target."""
    parts = [
        "## Every kernel in every shape\n\nRegisters a thread / KiB of shared memory / % occupancy; **+n** bytes of "
        "spills. All other columns are in codegen.csv.\n"
    ]
    targets = _unique(row["target"] for row in rows)
    for version in _unique(row["triton"] for row in rows):
        parts.append(f"<details><summary>Triton {version}</summary>\n")
        for kernel in _unique(row["kernel"] for row in rows):
            own = [row for row in rows if (row["kernel"], row["triton"]) == (kernel, version)]
            cells = {(row["shape"], row["target"]): _cell(row) for row in own}
            shapes = _unique(row["shape"] for row in own)
            parts.append(f"### {kernel}\n")
            parts.append(
                markdown(("shape", *targets), ((s, *(cells.get((s, t), "") for t in targets)) for s in shapes))
            )
        parts.append("</details>\n")
    return "\n".join(parts)


def _cell(row: Row) -> str:
    spills = f" **+{row['spills']}**" if row["spills"] else ""
    return f"{row['registers']} / {row['shared'] / 1024:.0f} / {100 * row['occupancy']:.0f}{spills}"


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
