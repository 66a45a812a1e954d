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
def load_queries(queries, scale, offs_m, first, row_last, SIZE: tl.constexpr, DIM: tl.constexpr, FORM: tl.constexpr):
    """``SIZE`` dimensions from ``first`` on of query rows ``offs_m``, as ``[rows, dims]`` of ``FORM.dtype``.

    Row ``m`` is query ``m // group``, member ``m % group`` of it. Float32 queries are scaled here, so that products
    stay within float32's range if the logits do. Scaling the keys instead spilled on sm_120.
    """
    ALIGN: tl.constexpr = FORM.align
    FP8: tl.constexpr = FORM.query_fp8
    inside = offs_m < row_last
    query, member = offs_m // FORM.group, (offs_m % FORM.group).to(tl.int64)
    if queries.places is not None:
        query = tl.load(queries.places + query, mask=inside, other=0)
    query = query.to(tl.int64)
    row = tl.multiple_of(queries.base + (query * queries.stride_query + member * queries.stride_head), ALIGN)
    if queries.scales is not None:
        step = queries.scales + (query * queries.stride_scale_query + member * queries.stride_scale_head)
        step = tl.load(step, mask=inside, other=0.0).to(tl.float32)
        if SIZE > 16:
            offs_b = first // 2 + tl.arange(0, SIZE // 2)
            mask = inside[:, None] & (offs_b < DIM // 2)[None, :]
            rows = unpack(tl.load(row[:, None] + offs_b[None, :], mask=mask, other=0))
        else:  # Triton 3.6 multiplies 16 joined dimensions wrongly, so each loads its own byte
            offs_d = first + tl.arange(0, SIZE)
            mask = inside[:, None] & (offs_d < DIM)[None, :]
            codes = tl.load(row[:, None] + (offs_d // 2)[None, :], mask=mask, other=0).to(tl.int32)
            rows = _signed((codes >> (offs_d % 2 * 4)[None, :]) & 15)
        rows = (rows * step[:, None]).to(FORM.dtype)  # exact, in float16 within its range
    else:
        offs_d = first + tl.arange(0, SIZE)
        mask = inside[:, None] & (offs_d < DIM)[None, :]
        rows = tl.load(row[:, None] + offs_d[None, :], mask=mask, other=0.0)
        if FP8 is not None:
            rows = fp8_to_float(rows, FP8, FORM.dtype)
        rows = rows.to(FORM.dtype)
    return rows * scale if FORM.scale_first else rows


@triton.jit
def unpack(codes):
    """float32 ``[rows, dims]`` from bytes ``[rows, dims / 2]``, whose low halves come first."""
    codes = codes.to(tl.int32)
    pairs = tl.join(_signed(codes & 15), _signed(codes >> 4))
    return tl.reshape(pairs, [codes.shape[0], 2 * codes.shape[1]])


@triton.jit
def _signed(code):
    """float32 of four bits in two's complement."""
    return ((code ^ 8) - 8).to(tl.float32)
