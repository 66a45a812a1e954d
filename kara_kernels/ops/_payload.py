"""Where a program's rows are in a payload and in the pool, for kernels that move rows between the two."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..paged import WORDS
from ..payload import GROUP, Section
from ..payload_arguments import PayloadArguments
from ._rows import PagedRows, row_pointer
from ._triton import layer_pointer, tl, triton


class Tile(NamedTuple):
    """Rows of one grade, one layer and one head that a program moves, in a kernel."""

    first: Any  # its first row in the payload
    offset: Any  # and in the grade
    count: Any  # rows of the grade
    grade: Any
    last: Any  # whether the grade is the last one
    heads: Any  # layer * H + head


@triton.jit
def pool_rows(ptr, table_ptr, stride_layer, stride_block, stride_token, stride_head, block_table_ptr, heads,
              H: tl.constexpr):  # fmt: skip
    """The rows of a layer and head; ``heads`` is ``layer * H + head``."""
    base = layer_pointer(ptr, table_ptr, stride_layer, heads // H) + heads % H * stride_head
    return PagedRows(base, block_table_ptr, 0, stride_block, stride_token)


@triton.jit
def list_of(ptr, stride_layer, stride_head, heads, H: tl.constexpr):
    """The list of a layer and head."""
    return ptr + heads // H * stride_layer + heads % H * stride_head


@triton.jit
def tile_of(place, heads, EXACT: tl.constexpr, rows, grade_rows):
    """The tile at row ``place`` after ``EXACT`` exact rows, of ``rows`` in all."""
    grade = place // grade_rows
    left = rows - EXACT - grade * grade_rows
    offset = place - grade * grade_rows
    return Tile(EXACT + place, offset, tl.minimum(grade_rows, left), grade.to(tl.int64), left <= grade_rows, heads)


@triton.jit
def array_of(tile, sections, stride_section, array, shift):
    """Byte offset in the payload of the array at ``array`` in a section, in the last grade ``shift`` further on."""
    # A sum, because a choice between two arguments is compiled into a load through a pointer.
    return sections + tile.grade * stride_section + array + tl.where(tile.last, shift, 0)


@triton.jit
def given_places(places, tile, offs, inside):
    """Places in the context of rows that go to the payload; without lists, where they are in the payload."""
    place = tile.first + offs
    if places is not None:
        place = tl.load(places + place, mask=inside, other=0)
    return place


@triton.jit
def line_of(tile, offs):
    """Rows ``offs`` of the tile among those of all layers and heads in an array of the grade."""
    return tile.heads * tile.count + tile.offset + offs


@triton.jit
def cells(pool, place, inside, FORMAT: tl.constexpr):
    """Addresses of the rows at ``place`` of a context; ``pool`` are PagedRows."""
    block = tl.load(pool.table + place // FORMAT.page, mask=inside, other=0)
    return row_pointer(pool, block, place % FORMAT.page, FORMAT)


@triton.jit
def write_lists(tile, place, inside, offs, index_ptr, array, channels, kept_ptr, WIDTH: tl.constexpr):
    """Writes the places of the tile's rows into the payload, and with the first tile of K the kept channels."""
    if index_ptr is not None:
        BYTES: tl.constexpr = index_ptr.dtype.element_ty.primitive_bitwidth // 8
        target = index_ptr + (array // BYTES + line_of(tile, offs))
        tl.store(target, place.to(index_ptr.dtype.element_ty), mask=inside)
    if channels is not None:
        for i in range(0, WIDTH, 64):
            offs_c = i + tl.arange(0, 64)
            mask = offs_c < tl.where(tile.first == 0, WIDTH, 0)
            kept = tl.load(channels + offs_c, mask=mask, other=0)
            tl.store(kept_ptr + (tile.heads * WIDTH + offs_c), kept.to(tl.int16), mask=mask)


@triton.jit
def stored_places(tile, inside, offs, index_ptr, array):
    """Where the tile's rows stood, as the payload says; without an index, where they are in the payload."""
    place = tile.first + offs
    if index_ptr is not None:
        BYTES: tl.constexpr = index_ptr.dtype.element_ty.primitive_bitwidth // 8
        place = tl.load(index_ptr + (array // BYTES + line_of(tile, offs)), mask=inside, other=0).to(tl.int32)
        if BYTES == 2:
            place = place & 0xFFFF
    return place


@triton.jit
def put_row(row, offs_d, words, inside, channels, WIDTH: tl.constexpr):
    """Stores ``words [rows, dims]`` into rows of a pool, or into the kept channels of them."""
    column = offs_d
    if channels is not None:
        column = tl.load(channels + offs_d, mask=offs_d < WIDTH, other=0).to(tl.int32) & 0xFFFF
    tl.store(row[:, None] + column[None, :], words, mask=inside[:, None] & (offs_d < WIDTH)[None, :])


@triton.jit
def clear(row, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeroes rows whose kept channels are stored next, after a barrier."""
    for slice_ in range(0, DIM, BLOCK_D):
        offs_d = slice_ + tl.arange(0, BLOCK_D)
        zeros = tl.zeros([inside.shape[0], BLOCK_D], row.dtype.element_ty)
        tl.store(row[:, None] + offs_d[None, :], zeros, mask=inside[:, None] & (offs_d < DIM)[None, :])
    tl.debug_barrier()  # another warp may store the kept channels of a row


@triton.jit
def copy_to_payload(tile, pool, place, inside, offs, words_ptr, array, channels, WIDTH: tl.constexpr,
                    FORMAT: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Copies ``WIDTH`` elements of each row of the tile into the payload."""
    BYTES: tl.constexpr = words_ptr.dtype.element_ty.primitive_bitwidth // 8
    source = cells(pool, place, inside, FORMAT)
    target = tl.multiple_of(words_ptr + array // BYTES, 16) + line_of(tile, offs) * WIDTH
    for slice_ in range(0, WIDTH, BLOCK_D):
        offs_d = slice_ + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (offs_d < WIDTH)[None, :]
        column = offs_d
        if channels is not None:
            column = tl.load(channels + offs_d, mask=offs_d < WIDTH, other=0)
        words = tl.load(source[:, None] + column[None, :], mask=mask)
        tl.store(target[:, None] + offs_d[None, :], words, mask=mask)


@triton.jit
def copy_to_pool(tile, pool, place, inside, offs, words_ptr, array, channels, WIDTH: tl.constexpr, FORMAT: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """Copies the tile's rows of the payload into the pool."""
    BYTES: tl.constexpr = words_ptr.dtype.element_ty.primitive_bitwidth // 8
    target = cells(pool, place, inside, FORMAT)
    source = tl.multiple_of(words_ptr + array // BYTES, 16) + line_of(tile, offs) * WIDTH
    if channels is not None:
        clear(target, inside, FORMAT.dim, BLOCK_D)
    for slice_ in range(0, WIDTH, BLOCK_D):
        offs_d = slice_ + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (offs_d < WIDTH)[None, :]
        words = tl.load(source[:, None] + offs_d[None, :], mask=mask)
        put_row(target, offs_d, words, inside, channels, WIDTH)


def payload_arguments(a: PayloadArguments, index: bool, kind: str = "rows") -> dict[str, Any]:
    """A kernel's arguments that describe the payload: the sections of ``kind``, ``"exact"`` or ``"rows"``. Offsets are
    in bytes. ``index``: places are read or written."""
    plan = a.layout
    of_kind = [section for section in plan.sections if section.kind == kind]
    found: dict[str, Any] = {
        "index_ptr": a.payload.view(plan.index_dtype) if index else None, "block_table_ptr": a.block_table,
        "kept_ptr": None if plan.channels is None else a.payload.view(torch.int16),  # it begins with kept channels
        "rows": plan.exact_rows if kind == "exact" else plan.rows, "grade_rows": plan.grade_rows,
        "sections": of_kind[0].offset, "stride_section": of_kind[0].nbytes, "H": plan.heads, "KEPT": plan.k_dim,
        "TILE": GROUP,
    }  # fmt: skip
    return found | _offsets(of_kind, "k", "v", "index")


def _offsets(rows: list[Section], *names: str) -> dict[str, int]:
    """Where arrays are in a section, and how much further on in the last one."""
    found = {}
    for name in names:
        first, last = (section.arrays[name].offset if name in section.arrays else 0 for section in (rows[0], rows[-1]))
        found[f"{name}_array"], found[f"{name}_shift"] = first, last - first
    return found


def code_arguments(a: PayloadArguments) -> dict[str, Any]:
    """What kernels need further for payloads of fewer bits."""
    rows = [section for section in a.layout.sections if section.kind == "rows"]
    found: dict[str, Any] = {
        "codes_ptr": a.payload, "bounds_ptr": a.payload.view(WORDS[a.layout.bounds_dtype.itemsize]),
        **_offsets(rows, "k_bounds", "v_bounds"),
    }  # fmt: skip
    residuals = [section for section in a.layout.sections if section.kind == "residual"]
    found["residuals"], found["stride_residual"] = (residuals[0].offset, residuals[0].nbytes) if residuals else (0, 0)
    arrays = _offsets(residuals, "v") if residuals else {"v_array": 0, "v_shift": 0}
    return found | {f"v_residual_{name[2:]}": offset for name, offset in arrays.items()}


def list_arguments(name: str, lists: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments for lists per layer and head."""
    layer, head = (0, 0) if lists is None else lists.stride()[:2]
    return {f"{name}_ptr": lists, f"stride_{name}_l": layer, f"stride_{name}_h": head}
