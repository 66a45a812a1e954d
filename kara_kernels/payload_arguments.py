"""Checks the arguments of operations that move rows between a paged cache and a payload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_tensor, check_unit_stride, contents_are_checked, refuse
from .paged import PagedCache, per_layer
from .payload import PayloadLayout
from .values import check_choice

Caches = Tensor | Sequence[Tensor]
LOSSY = ("fp8", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class PayloadArguments:
    """A pool, one context in it, and a payload of its rows."""

    cache: PagedCache
    block_table: Tensor  # int32 [max_blocks]
    payload: Tensor  # uint8 [nbytes]
    layout: PayloadLayout
    sections: int  # whole sections that the payload has
    rows: Tensor | None = None  # int32 [L, H, R]; None: row i is token i
    channels: Tensor | None = None  # int32 [L, H, k_dim]
    to_front: bool = False  # row i goes to token i, instead of where it stood


def check_gather(
    k_cache: Any, v_cache: Any, block_table: object, rows: object, layout: object, channels: object, out: object,
    forms: tuple[str, ...],
) -> PayloadArguments:  # fmt: skip
    """Checks the arguments of ``gather_rows`` and ``quantize_rows``. The payload is ``out`` or new memory."""
    cache, table, many, plan = _check_place(k_cache, v_cache, block_table, layout, forms)
    for name, value, needed in (("rows", rows, plan.places), ("channels", channels, plan.channels is not None)):
        if (value is not None) != needed:
            expected = f"a tensor with a layout of {'places' if name == 'rows' else 'dropped channels'}"
            raise TypeError(f"{name}: expected {expected if needed else f'None without {expected[14:]}'}, got "
                            f"{type(value).__name__}")  # fmt: skip
    payload = torch.empty(plan.nbytes, dtype=torch.uint8, device=table.device) if out is None else out
    given = PayloadArguments(
        cache=cache, block_table=table, layout=plan, sections=len(plan.sections),
        payload=_check_payload("out", payload, table.device, plan.nbytes),
        rows=_check_lists("rows", rows, plan, plan.rows, many, table.device),
        channels=_check_lists("channels", channels, plan, plan.k_dim, many, table.device),
    )  # fmt: skip
    if contents_are_checked(table.device):
        _check_distinct("rows", given.rows, plan.tokens)
        _check_distinct("channels", given.channels, plan.dim)
        _check_blocks(given, given.rows, written=False)
    return given


def check_scatter(
    payload: object, layout: object, k_cache: Any, v_cache: Any, block_table: object, to: str, forms: tuple[str, ...]
) -> PayloadArguments:
    """Checks the arguments of ``scatter_rows`` and ``dequantize_rows``."""
    cache, table, _, plan = _check_place(k_cache, v_cache, block_table, layout, forms)
    check_choice("to", to, ("places", "front"))
    held = _check_payload("payload", payload, table.device, None)
    try:
        sections = plan.held(held.shape[0])
    except ValueError as error:
        raise ValueError(f"payload: {str(error).removeprefix('nbytes: ')}") from None
    given = PayloadArguments(
        cache=cache, block_table=table, layout=plan, payload=held, sections=sections,
        to_front=to == "front" or not plan.places,
    )  # fmt: skip
    if contents_are_checked(table.device):
        if plan.channels is not None:
            _check_distinct("payload.channels", stored_channels(given), plan.dim)
        places = None if given.to_front else stored_places(given)
        _check_distinct("payload.index", places, plan.tokens)
        _check_blocks(given, places, written=True)
    return given


def stored_places(a: PayloadArguments) -> Tensor:
    """Where the payload's rows stood in the context, int32 ``[L, H, R]``."""
    rows = [section for section in a.layout.sections[: a.sections] if section.kind in ("exact", "rows")]
    return unsigned(torch.cat([section.of(a.payload)["index"] for section in rows], -1))


def stored_channels(a: PayloadArguments) -> Tensor:
    """The channels of K that the payload has, int32 ``[L, H, k_dim]``."""
    return unsigned(a.layout.sections[0].of(a.payload)["channels"])


def unsigned(index: Tensor) -> Tensor:
    """Stored numbers of rows or channels as int32."""
    return index.int() & 0xFFFF if index.dtype == torch.int16 else index


def _check_place(
    k_cache: Any, v_cache: Any, block_table: object, layout: object, forms: tuple[str, ...]
) -> tuple[PagedCache, Tensor, bool, PayloadLayout]:
    _, cache, many = per_layer(None, k_cache, v_cache)
    if not isinstance(layout, PayloadLayout):
        raise TypeError(f"layout: expected a PayloadLayout, got {type(layout).__name__}")
    if layout.form not in forms:
        raise ValueError(f"layout.form: expected {' or '.join(map(repr, forms))}, got {layout.form!r}")
    for name, value in PayloadLayout.shape_of(cache).items():
        if getattr(layout, name) != value:
            raise ValueError(f"layout.{name}: expected {value} as in the caches, got {getattr(layout, name)}")
    table = check_tensor("block_table", block_table, (None,), (torch.int32,), cache.k[0].device)
    check_unit_stride("block_table", table, "")
    return cache, table, many, layout


def _check_lists(
    name: str, lists: object, plan: PayloadLayout, length: int, many: bool, device: torch.device
) -> Tensor | None:
    """int32 ``[H, length]``, or ``[L, H, length]`` for many layers, as ``[L, H, length]``."""
    if lists is None:
        return None
    shape = (plan.layers, plan.heads, length) if many else (plan.heads, length)
    checked = check_tensor(name, lists, shape, (torch.int32,), device)
    check_unit_stride(name, checked)
    return checked if many else checked[None]


def _check_payload(name: str, payload: object, device: torch.device, nbytes: int | None) -> Tensor:
    held = check_tensor(name, payload, (nbytes,), (torch.uint8,), device)
    check_unit_stride(name, held, "")
    if held.data_ptr() % 16:
        raise ValueError(f"{name}: expected an address that is a multiple of 16, got {held.data_ptr():#x}")
    return held


def _check_distinct(name: str, lists: Tensor | None, below: int) -> None:
    """Checks that each list has distinct values in ``0..below-1``."""
    if lists is not None:
        refuse((lists < 0) | (lists >= below), name, f"a value in 0..{below - 1}", lists)
        if lists.shape[-1] == below:  # all values are there if none is missing, which takes a tenth of the time
            found = torch.zeros_like(lists, dtype=torch.bool).scatter_(-1, lists.long(), True)
            if bool(found.all()):
                return
        ordered = lists.sort(-1).values
        refuse(ordered[..., 1:] == ordered[..., :-1], f"{name}, sorted", "distinct values", ordered[..., 1:])


def _check_blocks(a: PayloadArguments, places: Tensor | None, written: bool) -> None:
    """Checks the ids of the blocks that hold tokens ``places``, or the first tokens. Blocks to be ``written`` must be
    distinct."""
    (blocks, page, _, _), table = a.cache.shape, a.block_table
    count = a.layout.rows_in(a.sections)
    if count == a.layout.tokens:  # distinct places are all places
        places = None
    reached = count if places is None else int(places.max()) + 1
    if reached > len(table) * page:
        raise ValueError(f"block_table: expected blocks for {reached} tokens, got {len(table)} blocks of {page}")
    columns = torch.arange(-(-count // page)) if places is None else (places // page).unique()
    used = table[columns.to(table.device)]
    refuse((used < 0) | (used >= blocks), "block_table", f"a block id in 0..{blocks - 1}", used)
    if written and len(used.unique()) < len(used):
        raise ValueError("block_table: expected every block once, got one twice")
