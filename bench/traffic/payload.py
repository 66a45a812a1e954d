"""Bytes that payloads of contexts move, from compiled code in the emulator, beside the least.

The floor of writing is each row of the pool once, each array of the payload once, and the lists of rows and channels
and the block table once. Reading has no lists beside those in the payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kara_kernels import PagedCache, ops
from kara_kernels.payload import PayloadLayout

from .measure import aligned, counts_of, emulating


@dataclass(frozen=True)
class Case:
    """One layer of a context, all rows in a random order."""

    name: str
    dim: int
    v_dim: int
    form: str
    heads: int = 2
    page: int = 16
    tokens: int = 256
    dtype: torch.dtype = torch.bfloat16
    channels: int | None = None


CASES = (
    Case("Llama-3.1-8B, exact", 128, 128, "exact"),
    Case("Llama-3.1-8B, int8", 128, 128, "int8"),
    Case("Llama-3.1-8B, int4", 128, 128, "int4"),
    Case("Llama-3.1-8B, fp8", 128, 128, "fp8"),
    Case("Llama-3.1-8B, fp8 cache, int8", 128, 128, "int8", dtype=torch.float8_e4m3fn),
    Case("Llama-3.1-8B, int8 of 80 channels", 128, 128, "int8", channels=80),
    Case("SmolLM2, int4", 64, 64, "int4"),
    Case("DeepSeek-V3, latent, int8", 576, 0, "int8", heads=1, page=64),
)


def floor(case: Case, layout: PayloadLayout, lists: int) -> dict[str, int]:
    """``lists``: bytes of the lists and the table that writing reads."""
    arrays = sum(array.nbytes for section in layout.sections for array in section.arrays.values())
    table = -(-case.tokens // case.page) * 4
    pool = case.tokens * case.heads * (case.dim + case.v_dim) * case.dtype.itemsize
    return {"writing": pool + arrays + lists + table, "reading": pool + arrays + table}


def measure(case: Case) -> dict[str, Any]:
    """Writes a payload and reads it back, as a row of the table."""
    draw = torch.Generator().manual_seed(0)
    blocks = -(-case.tokens // case.page) + 1
    k, v = (aligned(torch.randn(1, blocks, case.page, case.heads, width, generator=draw).to(case.dtype))
            for width in (case.dim, case.v_dim or 1))  # fmt: skip
    cache = PagedCache(k, v if case.v_dim else None)
    layout = PayloadLayout(**PayloadLayout.shape_of(cache), tokens=case.tokens, rows=case.tokens, form=case.form,
                           channels=case.channels)  # fmt: skip

    def lists(below: int, count: int) -> torch.Tensor:
        return torch.stack([torch.randperm(below, generator=draw)[:count].int() for _ in range(case.heads)])[None]

    rows = lists(case.tokens, case.tokens)
    channels = None if case.channels is None else lists(case.dim, case.channels)
    table = torch.randperm(blocks, generator=draw).int()
    payload = aligned(torch.zeros(layout.nbytes, dtype=torch.uint8))
    write, read = (ops.gather_rows, ops.scatter_rows) if case.form == "exact" else (
        ops.quantize_rows, ops.dequantize_rows
    )  # fmt: skip
    with emulating("together", [*cache.k, *(cache.v or ())]) as writing:
        write(cache.k, cache.v, table, rows, layout, channels=channels, out=payload, backend="triton")
    with emulating("together", [*cache.k, *(cache.v or ())]) as reading:
        read(payload, layout, cache.k, cache.v, table, backend="triton")
    problems = [str(problem) for launch in (*writing, *reading) for problem in launch.problems]
    if problems:
        raise RuntimeError(f"{case.name}: {problems[0]}")
    given = rows.nbytes + (0 if channels is None else channels.nbytes)
    least = floor(case, layout, given)
    return {"case": case.name, "steps": {"writing": counts_of(writing, least["writing"]),
                                         "reading": counts_of(reading, least["reading"])}}  # fmt: skip


def goals(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Goals as name -> (ratio, limit)."""
    return {f"{step}, compulsory": (row["steps"][step]["compulsory_ratio"], 1.05) for step in ("writing", "reading")}
