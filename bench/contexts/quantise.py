"""Codecs of contexts, simulated in plain PyTorch: the rows that a reader gets back, and the bytes that are stored.

A codec takes a :class:`Context` and returns :class:`Kept`. Rows are float32 tensors with the values of a 16-bit cache.
The bytes are those of a packet's body: codes, bounds, indices of rows, rows kept as they are. A header is left out.

The packet's code of a number, between the bounds ``lo`` and ``hi`` of its group, is ``u = 8 + round(240 (x - lo) /
(hi - lo))``, 8..248. Its high four bits are a code of four bits whose ends are ``lo`` and ``hi``, and every bit more
halves the cell. So a packet with fewer bits is a part of one with more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kara_kernels.scorers import Rows

SINKS, NEWEST = 4, 32  # rows that every order puts first
BOUNDS = 2 * 2  # bytes of a group's bounds
INDEX = 2  # bytes of a row's index, of every layer and head
TOP = 240  # steps of the packet's code

Scorer = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Kept:
    """What a reader gets back: ``keys``, ``values`` float32 ``[L, H, n, D]``; ``nbytes`` are stored for it."""

    keys: Tensor
    values: Tensor
    nbytes: int


class Context:
    """The rows of one context, with what is needed to rank them."""

    def __init__(self, window: Rows, scorers: dict[str, Scorer]) -> None:
        self.window, self.scorers = window, scorers
        self.keys, self.values = window.keys, window.values  # [L, H, C, D]
        self._orders: dict[str, Tensor] = {}

    def order(self, name: str) -> Tensor:
        """Rows best first, int64 ``[L, H, C]``: sinks, newest rows, then by score. ``"position"``: as they are."""
        if name not in self._orders:
            if name == "position":
                order = torch.arange(self.keys.shape[2]).expand(self.keys.shape[:3])
            else:
                order = ranked(self.scorers[name](self.window))
            self._orders[name] = order
        return self._orders[name]

    @cached_property
    def full_bytes(self) -> int:
        return 2 * (self.keys.numel() + self.values.numel())


Codec = Callable[[Context], Kept]


def ranked(scores: Tensor) -> Tensor:
    """Indices ``[..., C]`` of ``scores [..., C]``, best first. Ties go to the lowest index."""
    scores = scores.clone()
    scores[..., :SINKS] = scores[..., -NEWEST:] = math.inf
    return scores.sort(dim=-1, descending=True, stable=True).indices


def take(rows: Tensor, order: Tensor) -> Tensor:
    """``rows [L, H, C, D]`` in the order ``[L, H, n]``."""
    return rows.gather(2, order[..., None].expand(*order.shape, rows.shape[-1]))


def rotated(rows: Tensor) -> Tensor:
    """``rows [..., D]`` times the Hadamard matrix of D, a power of two, scaled so that twice is the identity."""
    dim = rows.shape[-1]
    if dim & (dim - 1):
        raise ValueError(f"rows: expected a power of two of channels, got {dim}")
    out = rows
    for half in (1 << i for i in range(dim.bit_length() - 1)):
        a, b = out.unflatten(-1, (-1, 2, half)).unbind(-2)
        out = torch.stack((a + b, a - b), -2).flatten(-3)
    return out * dim**-0.5


def coded(rows: Tensor, dim: int, bits: int) -> Tensor:
    """``rows`` after the code of ``bits`` bits between the bounds over ``dim``. Bounds are bfloat16, rounded outward.

    4 to 8 bits: the first bits of the packet's code. Fewer: evenly spaced values that include both bounds.
    """
    code, low, width = packet_code(rows, dim)
    if bits < 4:
        steps = (1 << bits) - 1
        return low + width * ((rows - low) / width * steps).round() / steps
    cell = 1 << (8 - bits)
    return low + width * (code.div(cell, rounding_mode="floor") * cell + cell // 2 - 8) / TOP


def packet_code(rows: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The packet's code 8..248 of every number, as float32, and its bounds' ``low`` and ``high - low``."""
    low, high = _bound(rows.amin(dim, True), -math.inf), _bound(rows.amax(dim, True), math.inf)
    width = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return 8 + ((rows - low) / width * TOP).round(), low, width


def nibbles(context: Context) -> dict[str, bytes]:
    """The codes of a packet K4V4, two a byte, rows one after the other. Bounds and exact rows are left out."""
    order = context.order("ours")[..., SINKS:]
    keys = rotated(take(context.keys, order))
    parts = {"K": torch.cat([packet_code(some, 2)[0] for some in keys.split(64, 2)], 2)}
    parts["V"] = packet_code(take(context.values, order), -1)[0]
    found = {}
    for name, code in parts.items():
        high = code.to(torch.uint8) >> 4
        found[name] = (high[..., ::2] | high[..., 1::2] << 4).contiguous().numpy().tobytes()
    return found


def _bound(values: Tensor, towards: float) -> Tensor:
    near = values.bfloat16()
    away = torch.nextafter(near, torch.tensor(towards, dtype=torch.bfloat16))
    inside = near.float() > values if towards < 0 else near.float() < values
    return torch.where(inside, away, near).float()


def by_channel(rows: Tensor, bits: int, group: int) -> Tensor:
    """Bounds per channel and group of ``group`` rows, in their order; the last group may be shorter."""
    return torch.cat([coded(some, 2, bits) for some in rows.split(group, 2)], 2) if rows.shape[2] else rows


def by_row(rows: Tensor, bits: int) -> Tensor:
    """Bounds per row of one head."""
    return coded(rows, -1, bits)


@dataclass(frozen=True)
class Packet:
    """The library's packet: rows best first, the first ``exact`` in 16 bits, K per channel after a rotation, V per row.

    The other fields change one thing at a time. ``kept``: share of the rows. 16 bits: as they are.
    ``better``: share of the kept rows, the best, that have ``better_bits`` (K, V) instead. ``grades``: if not 0, so
    many grades, best first, with rows by position inside each, because neighbours have closer bounds.
    """

    k_bits: int
    v_bits: int
    kept: float = 1.0
    order: str = "ours"
    exact: int = SINKS
    group: int = 64
    rotate: str = "k"  # any of "", "k", "v", "kv"
    k_per: str = "channel"  # or "row"
    better: float = 0.0
    better_bits: tuple[int, int] = (8, 8)
    grades: int = 0

    def __call__(self, context: Context) -> Kept:
        rows = max(self.exact, round(self.kept * context.keys.shape[2]))
        order = context.order(self.order)[..., :rows]
        if self.grades:
            first, rest = order.split((self.exact, rows - self.exact), -1)
            grades = rest.split(-(-rest.shape[-1] // self.grades), -1)
            order = torch.cat([first, *(grade.sort(-1).values for grade in grades)], -1)
        keys, values = take(context.keys, order), take(context.values, order)
        # Groups are never divided between two widths.
        split = self.exact + round(self.better * rows / self.group) * self.group
        parts = [(slice(self.exact, split), *self.better_bits), (slice(split, rows), self.k_bits, self.v_bits)]
        count, dim = math.prod(keys.shape[:2]), keys.shape[3]
        nbytes = rows * INDEX if self.order != "position" else 0
        nbytes += self.exact * 4 * dim
        for span, k_bits, v_bits in parts:
            length = len(range(rows)[span])
            keys[:, :, span] = self._keys(keys[:, :, span], k_bits)
            values[:, :, span] = self._values(values[:, :, span], v_bits)
            nbytes += length * dim * (k_bits + v_bits) // 8
            groups = length if self.k_per == "row" else -(-length // self.group) * dim
            nbytes += BOUNDS * (groups * (k_bits < 16) + length * (v_bits < 16))
        return Kept(keys, values, count * nbytes)

    def _keys(self, rows: Tensor, bits: int) -> Tensor:
        if bits == 16:
            return rows
        if "k" in self.rotate:
            return rotated(replace(self, rotate="")._keys(rotated(rows), bits))
        return by_row(rows, bits) if self.k_per == "row" else by_channel(rows, bits, self.group)

    def _values(self, rows: Tensor, bits: int) -> Tensor:
        if bits == 16:
            return rows
        return rotated(by_row(rotated(rows), bits)) if "v" in self.rotate else by_row(rows, bits)


@dataclass(frozen=True)
class Float8:
    """Every number as fp8 e4m3, without a scale, as engines store it."""

    def __call__(self, context: Context) -> Kept:
        keys, values = (rows.to(torch.float8_e4m3fn).float() for rows in (context.keys, context.values))
        return Kept(keys, values, keys.numel() + values.numel())


@dataclass(frozen=True)
class Channels:
    """ThinK (arXiv 2407.21018): only the best share ``kept`` of K's channels, by the product of the norms of the last
    32 queries' channel and the keys' channel. The rest reads as zero. ``bits`` below 16: both tensors as in a packet
    without rotation, 4 sinks as they are."""

    kept: float
    bits: int = 16

    def __call__(self, context: Context) -> Kept:
        keys, values = context.keys, context.values
        layers, heads, rows, dim = keys.shape
        queries = context.window.query[:, -32:].permute(0, 2, 3, 1, 4)  # [L, H, G, 32, D]
        norms = queries.norm(dim=3).mean(2) * keys.norm(dim=2)
        best = norms.topk(round(self.kept * dim), -1).indices
        held = torch.zeros_like(norms).scatter_(-1, best, 1.0)[:, :, None]
        kept = best.shape[-1]
        if self.bits == 16:
            nbytes = rows * 2 * (kept + dim)
        else:
            stored = Packet(self.bits, self.bits, order="position", rotate="")(context)
            keys, values = stored.keys, stored.values
            # Every byte of K is of one channel: those of the others are not stored.
            rest = rows - SINKS
            channel = SINKS * 2 + rest * self.bits // 8 + BOUNDS * -(-rest // 64)
            nbytes = stored.nbytes // (layers * heads) - (dim - kept) * channel
        return Kept(keys * held, values, layers * heads * (nbytes + dim // 8))


@dataclass(frozen=True)
class Residual:
    """The part of DeltaKV (arXiv 2602.08005) that needs no training: every ``stride``-th row is a reference in 8 bits,
    every other row its difference to the nearest reference of its head, in few bits. Nearest: least squared distance
    of K and V together. Differences are coded like rows of a packet; 4 sinks stay as they are."""

    stride: int
    k_bits: int
    v_bits: int

    def __call__(self, context: Context) -> Kept:
        keys, values = context.keys.clone(), context.values.clone()
        rows, dim = keys.shape[2:]
        place = torch.arange(SINKS, rows)
        refs, others = place[:: self.stride], place[(place - SINKS) % self.stride > 0]
        keys[:, :, refs] = by_channel(keys[:, :, refs], 8, 64)
        values[:, :, refs] = by_row(values[:, :, refs], 8)
        both = torch.cat((keys, values), -1)
        nearest = refs[torch.cdist(both[:, :, others], both[:, :, refs]).argmin(-1)]  # [L, H, n]
        for tensor, apart in (
            (keys, lambda some: by_channel(some, self.k_bits, 64)),
            (values, lambda some: by_row(some, self.v_bits)),
        ):
            base = take(tensor, nearest)
            tensor[:, :, others] = base + apart(tensor[:, :, others] - base)
        nbytes = SINKS * 4 * dim + len(refs) * (2 * dim + BOUNDS)
        nbytes += len(others) * (dim * (self.k_bits + self.v_bits) // 8 + BOUNDS + INDEX)
        nbytes += BOUNDS * dim * (-(-len(refs) // 64) - (-len(others) // 64))
        return Kept(keys, values, math.prod(keys.shape[:2]) * nbytes)
