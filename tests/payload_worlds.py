"""One context in a poisoned world, lists of its rows, and a poisoned payload. Shared by the tests of payloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import payload_oracle
import torch
from on_gpu import lent
from payload_oracle import Payload
from worlds import Plan, Sequenced, World, bits

from kara_kernels import ops
from kara_kernels.payload import PayloadLayout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
CONTENTS = ("normal", "outliers", "tiny", "huge", "constant", "zeros", "few")
POISON = 256  # bytes around a payload


@dataclass(frozen=True)
class Case:
    """Fields of PayloadLayout, and where the context lies. ``rows`` None: all tokens."""

    dim: int = 8
    v_dim: int = 8
    dtype: torch.dtype = BF16
    form: str = "int8"
    tokens: int = 70
    rows: int | None = None
    places: bool = True
    channels: int | None = None
    exact_rows: int = -1
    rotate: bool | None = None
    grade_rows: int = 64
    layers: int = 2
    heads: int = 2
    page: int = 4
    layout: str = "NHD"
    content: str = "normal"
    pad: int = 0
    guard: int = 64
    seed: int = 0


class Context:
    """The world of a case. Rows that are not in the lists are NaN, like all memory around keys."""

    def __init__(self, case: Case) -> None:
        self.case = case
        plan = Plan((Sequenced(),), case.layers, case.heads, 1, case.tokens, 1, case.dim, case.v_dim, case.page,
                    case.layout, case.dtype, k_pad=case.pad, v_pad=case.pad, guard=case.guard,
                    seed=case.seed)  # fmt: skip
        self.world = World(plan)
        self.draw = torch.Generator().manual_seed(case.seed)
        rows = case.tokens if case.rows is None else case.rows
        self.layout = PayloadLayout(
            layers=case.layers, heads=case.heads, dim=case.dim, v_dim=case.v_dim, dtype=case.dtype, tokens=case.tokens,
            rows=rows, form=case.form, places=case.places, channels=case.channels, exact_rows=case.exact_rows,
            rotate=case.rotate, grade_rows=case.grade_rows,
        )  # fmt: skip
        self.rows = self._lists(case.tokens, rows) if case.places else None
        self.channels = None if case.channels is None else self._lists(case.dim, case.channels)
        for layer in range(case.layers):
            for cache in self.halves(layer):
                self._fill(cache, layer, rows)

    def halves(self, layer: int) -> list[torch.Tensor]:
        return self.world._caches_of(layer)

    def _lists(self, below: int, count: int) -> torch.Tensor:
        """Distinct numbers, in memory with other numbers around and between them."""
        shape = self.case.layers, self.case.heads
        room = torch.full((*shape, count + 3), -7, dtype=torch.int32)
        for layer in range(shape[0]):
            for head in range(shape[1]):
                room[layer, head, 1 : 1 + count] = torch.randperm(below, generator=self.draw)[:count].int()
        return room[..., 1 : 1 + count]

    def _fill(self, cache: torch.Tensor, layer: int, rows: int) -> None:
        blocks, places = self.world.window_cells(0)
        found = values(self.case, (self.case.tokens, *cache.shape[2:]), self.draw)
        for head in range(self.case.heads):
            read = range(rows) if self.rows is None else self.rows[layer, head].tolist()
            unread = sorted(set(range(self.case.tokens)) - set(read))
            bits(found)[unread, head] = bits(not_a_number(self.case.dtype))
        bits(cache)[blocks, places] = bits(found)

    # ---- what operations take ----------------------------------------------------------------------------

    def caches(self) -> tuple[Any, Any]:
        """One tensor for one layer, as a list may not be needed there."""
        k, v = self.world.k_caches, self.world.v_caches
        return (k, v) if self.case.layers > 1 else (k[0], v and v[0])

    def lists(self) -> dict[str, Any]:
        one = self.case.layers == 1
        named = {"rows": self.rows, "channels": self.channels}
        return {name: lists[0] if one and lists is not None else lists for name, lists in named.items()}

    def payload(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Poisoned memory, and the payload inside it."""
        draw = torch.Generator().manual_seed(1)
        room = torch.randint(256, (self.layout.nbytes + 2 * POISON,), dtype=torch.uint8, generator=draw)
        return room, room[POISON : POISON + self.layout.nbytes]

    def encode(self, backend: str, out: torch.Tensor) -> None:
        operation = ops.gather_rows if self.layout.form == "exact" else ops.quantize_rows
        lists = self.lists()
        lent(operation)(*self.caches(), self.world.block_tables[0], lists["rows"], self.layout,
                        channels=lists["channels"], out=out, backend=backend)  # fmt: skip

    def decode(self, backend: str, payload: torch.Tensor, to: str = "places") -> None:
        operation = ops.scatter_rows if self.layout.form == "exact" else ops.dequantize_rows
        lent(operation)(payload, self.layout, *self.caches(), self.world.block_tables[0], to=to, backend=backend)

    # ---- the oracle --------------------------------------------------------------------------------------

    @property
    def plain(self) -> Payload:
        a, dtype = self.layout, self.case.dtype
        return Payload(
            a.layers, a.heads, a.dim, a.v_dim, str(dtype).removeprefix("torch."), dtype.itemsize, a.tokens, a.rows,
            a.form, a.places, a.channels, a.exact_rows, bool(a.rotate), a.grade_rows,
        )  # fmt: skip

    def read(self, half: int) -> payload_oracle.Rows | None:
        """The rows of the lists, best first, as bits."""
        if half and not self.case.v_dim:
            return None
        out: payload_oracle.Rows = []
        blocks, places = self.world.window_cells(0)
        size = 1 << 8 * self.case.dtype.itemsize
        for layer in range(self.case.layers):
            found = bits(self.halves(layer)[half])[blocks, places]
            out.append([])
            for head in range(self.case.heads):
                rows = torch.arange(self.layout.rows) if self.rows is None else self.rows[layer, head].long()
                out[-1].append([[x % size for x in row] for row in found[rows, head].tolist()])
        return out

    def oracle(self) -> list[int | None]:
        lists = (None if some is None else some.tolist() for some in (self.rows, self.channels))
        k = self.read(0)
        assert k is not None
        return payload_oracle.encode(self.plain, k, self.read(1), *lists)

    def decoded(self, payload: bytes, to: str) -> list[torch.Tensor]:
        """The world's buffers after the oracle has decoded into it."""
        after = self.world.snapshot()
        *halves, places = payload_oracle.decode(self.plain, payload)
        cells = self.world.cells(0)
        for layer in range(self.case.layers):
            for cache, rows in zip(self.halves(layer), halves, strict=False):
                view = bits(self.world._moved_to(after, cache))
                top = 1 << (8 * self.case.dtype.itemsize - 1)
                signed = view.dtype != torch.uint8
                for head in range(self.case.heads):
                    for i, row in enumerate(rows[layer][head]):
                        token = places[layer][head][i] if to == "places" else i
                        numbers = [x - 2 * top if signed and x >= top else x for x in row]
                        view[(*cells[token], head)] = torch.tensor(numbers, dtype=view.dtype)
        return after


def not_a_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), torch.nan if dtype.is_floating_point else 77).to(dtype)


def values(case: Case, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """Numbers of a kind that the dtype has."""
    if not case.dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=draw).to(case.dtype)
    x = torch.randn(shape, generator=draw)
    small, large = {FP16: (-20, 10), FP32: (-130, 100), BF16: (-130, 100)}.get(case.dtype, (-9, 5))
    match case.content:
        case "outliers":
            x[..., torch.randint(shape[-1], (), generator=draw)] *= 50.0
        case "tiny":
            x = x * 2.0**small
        case "huge":
            x = x * 2.0**large
        case "constant":
            x = torch.full(shape, 0.7)
        case "zeros":
            x = torch.where(x > 0, 0.0, -0.0)
            x[..., 0] = -1.5
        case "few":
            x = x.round()
    limit = torch.finfo(case.dtype).max if case.dtype in FP8 else torch.inf
    return x.clamp(-limit, limit).to(case.dtype)
