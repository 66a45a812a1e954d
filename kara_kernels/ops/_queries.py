"""Query rows of a sequence and KV head, wherever a caller keeps them, unpacked if they are packed."""

from typing import Any, NamedTuple

from torch import Tensor

from ..checks import FP8_DTYPES
from ..paged import Layers
from ._rows import fp8_to_float
from ._triton import tl, triton


class QueryRows(NamedTuple):
    """Where the query rows of one sequence and KV head are, in a kernel."""

    base: Any
    stride_query: Any
    stride_head: Any
    scales: Any  # of packed queries; else None
    stride_scale_query: Any
    stride_scale_head: Any
    places: Any  # rows of the queries; None: they are consecutive
    count: Any  # of queries


def query_arguments(query: Layers, query_rows: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments of queries: addresses, scales of packed ones, rows and strides."""
    layer, sequence, token, head = query.strides
    scales = query.scales
    first, table = (None, None) if scales is None else (scales[0], scales.table)
    s_layer, s_sequence, s_token, s_head = (0, 0, 0, 0) if scales is None else scales.strides
    rows = query.words if query[0].dtype in FP8_DTYPES else query[0]
    in_order = query_rows is None
    return {
        "q_ptr": rows, "q_table": query.table, "query_rows_ptr": query_rows, "q_scales_ptr": first,
        "q_scales_table": table, "stride_q_l": layer, "stride_q_s": sequence if in_order else 0, "stride_q_n": token,
        "stride_q_h": head, "stride_qr_s": 0 if query_rows is None else query_rows.stride(0), "stride_qs_l": s_layer,
        "stride_qs_s": s_sequence if in_order else 0, "stride_qs_n": s_token, "stride_qs_h": s_head,
    }  # fmt: skip


@triton.jit
def row_factors(queries, scale, offs_m, row_last, FORM: tl.constexpr):
    """What :func:`load_queries` multiplies rows ``offs_m`` by, and what is left for their products with keys, so that
    these are logits.

    Codes of packed queries carry only the sign. Float32 queries are scaled before, so that products stay within
    float32's range if the logits do. Scaling the keys instead spilled on sm_120.
    """
    one = tl.full(offs_m.shape, 1.0, tl.float32)
    if queries.scales is not None:
        query, member, inside = _query_of(queries, offs_m, row_last, FORM)
        step = queries.scales + (query * queries.stride_scale_query + member * queries.stride_scale_head)
        factor = tl.load(step, mask=inside, other=0.0).to(tl.float32) * scale
        return tl.where(factor < 0, -one, one), tl.abs(factor)
    elif FORM.scale_first:
        return one * scale, one
    else:
        return one, one * scale


@triton.jit
def load_queries(queries, factor, offs_m, first, row_last,
                 SIZE: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """``SIZE`` dimensions from ``first`` on of query rows ``offs_m``, as ``[rows, dims]`` of ``FORM.dtype``, times the
    first of :func:`row_factors`.

    Row ``m`` is query ``m // group``, member ``m % group`` of it. With ``HALF``, dimensions are two halves of so many,
    each padded to ``SIZE / 2``. Packed queries are loaded as their codes.
    """
    ALIGN: tl.constexpr = FORM.align
    FP8: tl.constexpr = FORM.query_fp8
    query, member, inside = _query_of(queries, offs_m, row_last, FORM)
    row = tl.multiple_of(queries.base + (query * queries.stride_query + member * queries.stride_head), ALIGN)
    if queries.scales is None:
        offs_d, there = _dimensions(SIZE, HALF, DIM, first)
        rows = tl.load(row[:, None] + offs_d[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        if FP8 is not None:
            rows = fp8_to_float(rows, FP8, FORM.dtype)
        rows = rows.to(FORM.dtype)
        return rows * factor[:, None] if FORM.scale_first else rows
    elif SIZE > 16:
        offs_b, there = _dimensions(SIZE // 2, HALF // 2, DIM // 2, first // 2)
        codes = tl.load(row[:, None] + offs_b[None, :], mask=inside[:, None] & there[None, :], other=0).to(tl.int32)
        rows = tl.join(_signed(codes & 15, factor), _signed(codes >> 4, factor))
        return tl.reshape(rows, [offs_m.shape[0], SIZE]).to(FORM.dtype)
    else:  # Triton 3.6 multiplies 16 joined dimensions wrongly, so each loads its own byte
        offs_d, there = _dimensions(SIZE, HALF, DIM, first)
        mask = inside[:, None] & there[None, :]
        codes = tl.load(row[:, None] + (offs_d // 2)[None, :], mask=mask, other=0).to(tl.int32)
        rows = _signed((codes >> (offs_d % 2 * 4)[None, :]) & 15, factor)
        return tl.where(there[None, :], rows, 0.0).to(FORM.dtype)


@triton.jit
def _query_of(queries, offs_m, row_last, FORM: tl.constexpr):
    """Of rows ``offs_m``: where their queries are, which member of the group they are, and whether they exist."""
    inside = offs_m < row_last
    query, member = (offs_m // FORM.group).to(tl.int64), (offs_m % FORM.group).to(tl.int64)
    if queries.places is not None:
        query = tl.load(queries.places + query, mask=inside, other=0).to(tl.int64)
    return query, member, inside


@triton.jit
def _dimensions(SIZE: tl.constexpr, HALF: tl.constexpr, DIM: tl.constexpr, first):
    """``SIZE`` dimensions from ``first`` on, and whether they exist. With ``HALF``, those of two padded halves."""
    offs = tl.arange(0, SIZE)
    if 2 * HALF == SIZE or HALF == 0:
        return first + offs, first + offs < DIM
    else:
        place = offs % (SIZE // 2)
        return offs // (SIZE // 2) * HALF + place, place < HALF


@triton.jit
def _signed(code, sign):
    """float32 of four bits in two's complement, times the sign of its row. 2^23 has room for them behind its exponent,
    which takes an addition; converting integers is four times slower."""
    bits = ((code ^ 8) | 0x4B000000).to(tl.float32, bitcast=True)  # 2^23 + 8 + code
    sign = tl.broadcast_to(sign[:, None], code.shape)
    return tl.fma(bits, sign, -8388616.0 * sign)
