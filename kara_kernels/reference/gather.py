"""Moves rows of a context between a paged cache and a payload, bit by bit. See Payload in ``docs/method.md``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..paged import WORDS, Layers
from ..payload import PayloadLayout, Section
from ..payload_arguments import Caches, PayloadArguments, check_gather, check_scatter, stored_channels, unsigned


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
    gather_kind(a, "rows")
    write_lists(a)


def gather_kind(a: PayloadArguments, kind: str) -> None:
    """Copies the rows of the sections of ``kind``."""
    for section, arrays in of_kind(a, kind):
        for layer, half, pool in halves(a):
            arrays[half][layer] = rows_of(a, section, layer, half, pool)


@torch.no_grad()
def scatter(a: PayloadArguments) -> None:
    """Writes the rows of an exact payload by checked arguments."""
    scatter_kind(a, "rows")


def scatter_kind(a: PayloadArguments, kind: str) -> None:
    """Writes the rows of the sections of ``kind`` into the pool."""
    for section, arrays in of_kind(a, kind):
        for half, _ in pools_of(a):
            put_rows(a, section, half, slice(None), arrays[half])


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


def rows_of(a: PayloadArguments, section: Section, layer: int, half: str, pool: Tensor) -> Tensor:
    """The rows of a section out of ``pool``, ``[H, r, D]``, with the kept channels of K."""
    places = None if a.rows is None else a.rows[layer, :, section.first : section.first + section.rows]
    found = _words(pool)[_cells(a, section, places)]
    if half == "k" and a.channels is not None:
        found = found.gather(-1, a.channels[layer].long()[:, None].expand(-1, section.rows, -1))
    return found.view(pool.dtype)


def put_rows(a: PayloadArguments, section: Section, half: str, layers: slice, found: Tensor) -> None:
    """Writes ``found [L, H, r, D]`` into the pools of some layers. Dropped channels of K become zero."""
    words = _words(found)
    if half == "k" and a.layout.channels is not None:
        kept = stored_channels(a)[layers].long()[:, :, None].expand(-1, -1, section.rows, -1)
        words = words.new_zeros(*words.shape[:3], a.layout.dim).scatter_(-1, kept, words)
    places = None if a.to_front else unsigned(section.of(a.payload)["index"][layers])
    block, row, head = _cells(a, section, places)
    for i, pool in enumerate(dict(pools_of(a))[half].tensors[layers]):
        _words(pool)[(block, row, head) if places is None else (block[i], row[i], head)] = words[i]


def _words(x: Tensor) -> Tensor:
    """The same memory as integers, which every dtype can be moved as."""
    return x.view(WORDS[x.element_size()])


def _cells(a: PayloadArguments, section: Section, places: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Block, row in it and head of each row of a section, to index a pool with; they broadcast to
    ``[H, r]``, or to ``[L, H, r]`` as ``places`` do: of the rows in the context; None: in the payload's order."""
    if places is None:
        token = torch.arange(section.first, section.first + section.rows, device=a.block_table.device)[None]
    else:
        token = places.long()
    page = a.cache.shape[1]
    head = torch.arange(a.layout.heads, device=token.device)[:, None]
    return a.block_table[token // page].long(), token % page, head


def write_lists(a: PayloadArguments) -> None:
    """Writes places and channels into the payload."""
    for section, arrays in (*of_kind(a, "exact"), *of_kind(a, "rows")):
        if a.rows is not None:
            arrays["index"].copy_(a.rows[..., section.first : section.first + section.rows])
    for _, arrays in of_kind(a, "channels"):
        assert a.channels is not None
        arrays["channels"].copy_(a.channels)
