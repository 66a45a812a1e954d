"""The calls whose launches make every kernel in every shape class, each once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kara_kernels import LookAhead, PackedQueries, PagedCache, compress_window
from kara_kernels.arguments import CompactArguments
from kara_kernels.ops import (
    compact,
    crc32_of_ranges,
    expand_chunks,
    gather,
    pack_queries,
    quantize,
    rank_channels,
    rank_rows,
    select_topk,
)
from kara_kernels.options import PAPER, RECOMMENDED
from kara_kernels.payload import PayloadLayout
from kara_kernels.payload_arguments import PayloadArguments

BF16, FP16, FP8, FP32 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32


@dataclass(frozen=True)
class Shape:
    """One call of compress_window: two layers in pools of their own, so that kernels take addresses from a table.

    Options are the recommended ones but for ``options``, or those ``published``. Queries are those of every token and
    head. ``recorded``: as the engine shim has them, in four bits in a ring whose rows are read in place, looking ahead.
    ``fp8``: the same as fp8. ``means``: those of GQA groups in 16 bits. ``ahead``: looking ahead, with pairs as said.
    """

    window: int = 256
    dim: int = 128
    v_dim: int | None = None  # as dim; 0: one latent cache
    group: int = 4
    page: int = 16
    dtype: torch.dtype = BF16
    options: dict[str, Any] = field(default_factory=dict)
    published: bool = False
    recorded: bool = False
    fp8: bool = False
    means: bool = False
    ahead: str = ""  # "neox", "interleaved", or "partial" for half of the dimensions

    @property
    def label(self) -> str:
        values = "" if self.v_dim is None else ", latent" if self.v_dim == 0 else f"/{self.v_dim}"
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        options += ", published" * self.published + ", recorded" * self.recorded + ", fp8 queries" * self.fp8
        options += ", group means" * self.means + f", ahead {self.ahead}" * bool(self.ahead)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"W {self.window}, D {self.dim}{values}, G {self.group}, P {self.page}, {dtype}{options}"

    def launch(self) -> None:
        given = {**(PAPER if self.published else RECOMMENDED), **self.options}
        compress_window(**arguments(self), keep=self.window // 2, backend="triton", **given)


def arguments(shape: Shape) -> dict[str, Any]:
    """Zeros of the right shape: compiling looks at dtypes, strides and alignment."""
    sequences, heads = 1, 2
    blocks = -(-shape.window // shape.page) + 1
    v_dim = shape.dim if shape.v_dim is None else shape.v_dim
    wide = shape.dtype if shape.dtype.itemsize > 1 else BF16

    def pool(width: int) -> list[torch.Tensor]:
        return [torch.zeros(blocks * sequences, shape.page, heads, width, dtype=shape.dtype) for _ in range(2)]

    queries: Any = torch.zeros(2, sequences, shape.window, heads * shape.group, shape.dim, dtype=wide)
    in_place = shape.recorded or shape.fp8 or shape.means
    if in_place:
        queries = queries[:, 0]
    if shape.means:
        queries = queries[:, :, :heads].contiguous()
    if shape.fp8:
        queries = queries.to(FP8)
    ahead = None
    if shape.recorded:
        queries = PackedQueries.empty(*queries.shape)
        queries.scales.zero_()
    if (shape.recorded and v_dim) or shape.ahead:
        angles = torch.zeros(shape.dim // (4 if shape.ahead == "partial" else 2))
        ahead = LookAhead(angles, angles, shape.ahead == "interleaved")
    return {
        "query": queries,
        "query_rows": torch.zeros(sequences, shape.window, dtype=torch.int32) if in_place else None,
        "look_ahead": ahead,
        "k_cache": pool(shape.dim),
        "v_cache": pool(v_dim) if v_dim else None,
        "block_tables": torch.arange(blocks * sequences, dtype=torch.int32).view(sequences, -1),
        "seq_lens": torch.full((sequences,), shape.window, dtype=torch.int32),
        "window": shape.window,
    }


WINDOWS = (128, 256, 512, 1024, 2048, 4096)

# Head dimension by window; then the group, the dtype, the page and the options around W 256, D 128, and at W 2048.
SHAPES = [Shape(window, dim) for dim in (64, 128, 256) for window in WINDOWS]
SHAPES += [Shape(window, 192, 128) for window in (128, 256, 512, 2048)]
SHAPES += [Shape(window, 576, 0, 16, 64) for window in (128, 256, 512, 2048)]
SHAPES += [Shape(window, group=group) for group in (1, 8) for window in (256, 2048)]
SHAPES += [Shape(window, dim, dtype=dtype) for dtype in (FP16, FP8) for dim in (64, 128) for window in (256, 2048)]
SHAPES += [Shape(page=page) for page in (1, 32, 64, 256)]
SHAPES += [Shape(window, dim, recorded=True) for window in (128, 256, 512, 2048) for dim in (64, 128)]
SHAPES += [Shape(256, 256, recorded=True), Shape(256, 192, 128, recorded=True), Shape(dtype=FP8, recorded=True)]
SHAPES += [Shape(256, 576, 0, 16, 64, recorded=True)]
SHAPES += [Shape(window, fp8=True, dtype=dtype) for window in (256, 2048) for dtype in (BF16, FP8)]
SHAPES += [Shape(window, means=True) for window in (256, 2048)]
SHAPES += [Shape(window, ahead=ahead) for window in (256, 2048) for ahead in ("neox", "interleaved", "partial")]
SHAPES += [Shape(dtype=dtype, ahead="neox") for dtype in (FP16, FP32)]
SHAPES += [Shape(window, dim, published=True) for window in (256, 2048) for dim in (64, 128)]
SHAPES += [Shape(options={"redundancy": 1.0}), Shape(2048, options={"redundancy": 1.0})]
SHAPES += [Shape(options={"attention": "causal"}), Shape(options={"chunk_fraction": 0.0})]
SHAPES += [Shape(window, options={"pool": pool}) for window in (256, 4096) for pool in ("layer", "model")]
SHAPES += [Shape(dtype=FP32)]

QUICK = [Shape(), Shape(2048), Shape(256, 64, recorded=True), Shape(256, 576, 0, 16, 64), Shape(published=True)]


@dataclass(frozen=True)
class PayloadShape:
    """Rows of two layers to a payload and back, with their places."""

    dim: int = 128
    v_dim: int | None = None  # as dim; 0: one latent cache
    dtype: torch.dtype = BF16
    form: str = "int8"
    channels: int | None = None

    @property
    def label(self) -> str:
        values = "" if self.v_dim is None else ", latent"
        channels = "" if self.channels is None else f", {self.channels} channels"
        return f"D {self.dim}{values}, {str(self.dtype).removeprefix('torch.')}, {self.form}{channels}"

    def launch(self) -> None:
        """Launches unchecked, because nothing was written that could be read."""
        v_dim = self.dim if self.v_dim is None else self.v_dim
        k, v = ([torch.zeros(16, 16, 2, width, dtype=self.dtype) for _ in range(2)] for width in (self.dim, v_dim))
        cache = PagedCache(k, v if v_dim else None)
        layout = PayloadLayout(
            **PayloadLayout.shape_of(cache), tokens=200, rows=200, form=self.form, channels=self.channels
        )
        lists = torch.zeros(2, 2, max(200, layout.k_dim), dtype=torch.int32)
        given = PayloadArguments(
            cache=cache, block_table=torch.arange(16, dtype=torch.int32), layout=layout, sections=len(layout.sections),
            payload=torch.zeros(layout.nbytes, dtype=torch.uint8), rows=lists[..., :200],
            channels=None if self.channels is None else lists[..., : self.channels],
        )  # fmt: skip
        exact = self.form == "exact"
        for launcher in (gather.launch_gather, gather.launch_scatter) if exact else (
            quantize.launch_quantize, quantize.launch_dequantize
        ):  # fmt: skip
            launcher(given)


PAYLOADS = [PayloadShape(), PayloadShape(64), PayloadShape(256), PayloadShape(576, 0), PayloadShape(dtype=FP8)]
PAYLOADS += [PayloadShape(dtype=FP32), PayloadShape(channels=80), PayloadShape(form="int4"), PayloadShape(form="fp8")]


def launch_packing(dim: int) -> None:
    """Queries of one decoding step, packed."""
    pack_queries(torch.zeros(4, 8, dim, dtype=BF16), backend="triton")


HEADS = 64  # of two layers: as many programs as whole rows are moved with; the shapes above have fewer


def launch_moves(dim: int, v_dim: int, dtype: torch.dtype) -> None:
    k, v = (torch.zeros(2, 17, 16, HEADS, width, dtype=dtype) for width in (dim, v_dim))
    zeros = torch.zeros(2, 1, HEADS, 128, dtype=torch.int32)
    first = torch.zeros(1, dtype=torch.int32)
    given = CompactArguments(
        cache=PagedCache(k, v), block_tables=torch.zeros(1, 17, dtype=torch.int32), window=256, many=True,
        window_starts=first, seq_lens=first, keep_indices=zeros,
    )  # fmt: skip
    compact.launch_compact(torch.empty_like(first), None, given, zeros)


MOVES = [(64, 64, BF16), (128, 128, BF16), (256, 256, BF16), (192, 128, BF16), (128, 128, FP8), (128, 128, FP32)]


def launch_rows(window: int) -> None:
    """The operations on rows of scores alone."""
    scores = torch.zeros(2, window)
    select_topk(scores, window // 2, backend="triton")
    expand_chunks(scores, window // 2, window // 8, 8, backend="triton")


def launch_ranking() -> None:
    """The order of a context's rows: one of a single tile, and one whose runs merge twice."""
    for length in (1024, 4096):
        rank_rows(torch.zeros(2, length), backend="triton")


def launch_checksums() -> None:
    """Checksums of a packet's sections."""
    crc32_of_ranges(torch.zeros(1024, dtype=torch.uint8), [(0, 1024)], backend="triton")


def launch_channels(dim: int) -> None:
    """The channels of K that queries use."""
    table = torch.arange(4, dtype=torch.int32)
    query, keys = torch.zeros(32, 8, dim, dtype=BF16), torch.zeros(4, 16, 2, dim, dtype=BF16)
    rank_channels(query, keys, table, 64, 8, backend="triton")
