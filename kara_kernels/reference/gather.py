"""Moves rows of a context between a paged cache and a payload, bit by bit. See Payload in ``docs/method.md``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import slices
from ..paged import WORDS, Layers
from ..payload import PayloadLayout, Section
from ..payload_arguments import Caches, PayloadArguments, check_gather, check_scatter, stored_channels, stored_places

TOGETHER = 2**18  # elements that are moved together: enough for few calls, and few enough for a core's cache


def gather_rows(
    k_cache: Caches, v_cache: Caches | None, block_table: Tensor, rows: Tensor | None, layout: PayloadLayout, *,
    channels: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of a context as an exact payload. See :func:`kara_kernels.ops.gather_rows`."""
    given = check_gather(k_cache, v_cache, block_table, rows, layout, channels, out, ("exact",))
    gather(given)
    return given.payload


def scatter_rows(
    payload: Tensor, layout: PayloadLayout, k_cache: Caches, v_cache: Caches | None, block_table: Tensor, *,
    to: str = "places",
) -> None:  # fmt: skip
    """Rows of an exact payload into a paged cache. See :func:`kara_kernels.ops.scatter_rows`."""
    scatter(check_scatter(payload, layout, k_cache, v_cache, block_table, to, ("exact",)))


@torch.no_grad()
def gather(a: PayloadArguments) -> None:
    """Writes an exact payload by checked arguments."""
    grades = list(of_kind(a, "rows"))
    for layer, half, pool in halves(a):
        rows = rows_of(a, layer, half, pool)
        for section, arrays in grades:
            arrays[half][layer] = rows[:, section.first : section.first + section.rows]
    write_lists(a)


@torch.no_grad()
def scatter(a: PayloadArguments) -> None:
    """Writes the rows of an exact payload by checked arguments."""
    target = Target(a)
    for half, _ in pools_of(a):
        rows = grades_of(a, "rows", half)
        for lanes in target.lanes:
            target.put(half, lanes, target.ordered(joined(rows, lanes), 0, lanes))


def of_kind(a: PayloadArguments, kind: str) -> Iterator[tuple[Section, dict[str, Tensor]]]:
    """The sections of a kind that the payload has, and their arrays."""
    for section in a.layout.sections[: a.sections]:
        if section.kind == kind:
            yield section, section.of(a.payload)


def halves(a: PayloadArguments) -> Iterator[tuple[int, str, Tensor]]:
    """Layer, ``"k"`` or ``"v"``, and pool."""
    for half, pools in pools_of(a):
        yield from ((layer, half, pool) for layer, pool in enumerate(pools))


def pools_of(a: PayloadArguments) -> Iterator[tuple[str, Layers]]:
    """``"k"`` or ``"v"``, and the pools of all layers."""
    yield "k", a.cache.k
    if a.cache.v is not None:
        yield "v", a.cache.v


def rows_of(a: PayloadArguments, layer: int, half: str, pool: Tensor) -> Tensor:
    """The payload's rows out of ``pool``, ``[H, R, D]``, with the kept channels of K."""
    words, (_, page, heads, _), rows = _words(pool), pool.shape, a.layout.rows
    if a.rows is not None and rows < a.layout.tokens:
        found = words[_cells(a, heads, a.rows[layer].long())]
    else:  # whole blocks, in half the time
        found = words.index_select(0, a.block_table[: -(-rows // page)]).permute(2, 0, 1, 3).flatten(1, 2)
        found = found[:, :rows] if a.rows is None else in_order(found, 0, a.rows[layer])
    if half == "k" and a.channels is not None:
        found = found.gather(-1, a.channels[layer].long()[:, None].expand(-1, rows, -1))
    return found.view(pool.dtype)


def in_order(x: Tensor, dim: int, order: Tensor) -> Tensor:
    """``x [..., n, r, ...]`` with rows ``order [n, R]`` of ``dim + 1`` for each index of ``dim``."""
    index = order + x.shape[dim + 1] * torch.arange(len(order), device=x.device)[:, None]
    return x.flatten(dim, dim + 1).index_select(dim, index.flatten()).unflatten(dim, index.shape)


def grades_of(a: PayloadArguments, kind: str, name: str) -> list[Tensor]:
    """An array of every section of a kind that the payload has, each ``[L*H, ...]``."""
    return [arrays[name].flatten(0, 1) for _, arrays in of_kind(a, kind) if name in arrays]


def joined(grades: list[Tensor], lanes: slice) -> Tensor:
    """An array of all grades, ``[lanes, rows, ...]``."""
    return torch.cat([grade[lanes] for grade in grades], 1)


class Target:
    """Where the rows of a payload go. A lane is one head of one layer.

    If the context's rows are all there, or go to the front, they are put in the context's order and then fill blocks:
    on a CPU, rows one by one take four times as long, and pools may have the tokens of a channel side by side.
    """

    def __init__(self, a: PayloadArguments) -> None:
        plan, self._a, self._rows = a.layout, a, a.layout.rows_in(a.sections)
        self.lanes = list(slices(plan.layers * plan.heads, max(1, TOGETHER // (self._rows * plan.dim))))
        self._places = None if a.to_front else stored_places(a).flatten(0, 1).long()
        self._order = None
        if self._places is not None and self._rows == plan.tokens:
            rows = torch.arange(plan.tokens, device=a.payload.device).expand_as(self._places)
            self._order = torch.empty_like(self._places).scatter_(1, self._places, rows)

    def ordered(self, x: Tensor, dim: int, lanes: slice) -> Tensor:
        """The payload's rows ``dim + 1`` of the lanes ``dim``, in the context's order if all are there. ``x`` may have
        room behind its rows."""
        if self._order is None:
            return x.narrow(dim + 1, 0, self._rows)
        return in_order(x, dim, self._order[lanes])

    def put(self, half: str, lanes: slice, found: Tensor) -> None:
        """Writes ``found [lanes, r, D]``, the first rows of the payload or what ``ordered`` returned. Dropped channels
        of K become zero."""
        a, words, (count, rows, _) = self._a, _words(found), found.shape
        if half == "k" and a.layout.channels is not None:
            kept = stored_channels(a).flatten(0, 1)[lanes].long()[:, None].expand(-1, rows, -1)
            words = words.new_zeros(count, rows, a.layout.dim).scatter_(-1, kept, words)
        places = None if self._order is not None and rows == a.layout.tokens else self._places
        pools, heads, first = dict(pools_of(a))[half], a.layout.heads, lanes.start
        while first < lanes.stop:
            layer, head = divmod(first, heads)
            of_layer = slice(first, min(lanes.stop, first - head + heads))
            pool = _words(pools[layer])[:, :, head : head + of_layer.stop - first]
            some = words[first - lanes.start : of_layer.stop - lanes.start]
            if places is None:
                self._fill(pool, some)
            else:
                pool[_cells(a, pool.shape[2], places[of_layer, :rows])] = some
            first = of_layer.stop

    def _fill(self, pool: Tensor, words: Tensor) -> None:
        """Writes ``words [H, r, D]`` into the first blocks of the context in ``pool [B, P, H, D]``."""
        page, rows = pool.shape[1], words.shape[1]
        full, blocks = rows // page, self._a.block_table[: -(-rows // page)].long()
        whole, rest = words.split([full * page, rows % page], 1)
        pool.index_copy_(0, blocks[:full], whole.unflatten(1, (full, page)).permute(1, 2, 0, 3))
        if rows % page:
            pool[:, : rows % page].index_copy_(0, blocks[full:], rest.transpose(0, 1)[None])


def _words(x: Tensor) -> Tensor:
    """The same memory as integers, which every dtype can be moved as."""
    return x.view(WORDS[x.element_size()])


def _cells(a: PayloadArguments, heads: int, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block, row in it and head of the context's rows ``places [H, r]``, or ``[1, r]``, to index a pool with."""
    page = a.cache.shape[1]
    return a.block_table[places // page].long(), places % page, torch.arange(heads, device=places.device)[:, None]


def write_lists(a: PayloadArguments) -> None:
    """Writes places and channels into the payload."""
    for section, arrays in (*of_kind(a, "exact"), *of_kind(a, "rows")):
        if a.rows is not None:
            arrays["index"].copy_(a.rows[..., section.first : section.first + section.rows])
    for _, arrays in of_kind(a, "channels"):
        assert a.channels is not None
        arrays["channels"].copy_(a.channels)
