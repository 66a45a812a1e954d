"""Where the rows of a compressed context lie in its payload, byte by byte.

A payload is one contiguous run of bytes, cut into sections. It holds ``R`` rows of all ``L`` layers and ``H`` KV heads,
best first. A few of the best may be exact. The others are in *grades* of equally many rows, a multiple of ``GROUP``;
the last may have fewer. Sections follow each other in this order:

1. ``channels``, if channels of K were dropped: which remain.
2. ``exact``, if rows are exact: their bits.
3. ``rows``, one section per grade from the best on: rows in the form's first precision, and their places.
4. ``residual``, one section per grade, of the form ``"int8"`` only: what makes four bits eight. More bits serve best in
   the best rows, K and V together.

So every prefix that ends with a section is the payload of a harder compression.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import FP8_DTYPES, SCORED_DTYPES
from .paged import WORDS, PagedCache
from .values import check_choice, check_count, check_flag

FORMS = ("exact", "fp8", "int8", "int4")
GROUP = 64
"""Rows that share the range of a K channel."""
GRADES = 8
"""The most grades that a payload is divided into by default."""
MOST_GRADES = 256
EXACT_ROWS = 4
"""Rows kept exact by default where others lose bits: attention sinks, whose keys are unlike all others."""
LEVELS = 240
"""Steps of a range: fifteen of four bits, each divided into sixteen."""
TRAILER = 8
"""Bytes at the end of each section that operations leave alone. A packet keeps a checksum there."""
ALIGNMENT = 64


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class Array:
    """One array of a section."""

    offset: int
    """Bytes from the section's start, a multiple of 16."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class Section:
    """A part of the payload that is stored and checked as a whole."""

    kind: str
    """``"channels"``, ``"exact"``, ``"rows"`` or ``"residual"``."""
    grade: int
    first: int
    """The first of its rows, counted from the best."""
    rows: int
    """Rows of the grade, of each layer and KV head; 0 for ``"channels"``."""
    offset: int
    """Bytes from the payload's start, a multiple of 64."""
    nbytes: int
    """A multiple of 64, at least the arrays' bytes and ``TRAILER``."""
    arrays: dict[str, Array]

    def of(self, payload: Tensor) -> dict[str, Tensor]:
        """Typed views of the section's arrays in ``payload``, uint8 ``[nbytes]``."""
        views = {}
        for name, array in self.arrays.items():
            first = self.offset + array.offset
            views[name] = payload[first : first + array.nbytes].view(array.dtype).view(array.shape)
        return views


@dataclass(frozen=True, kw_only=True)
class PayloadLayout:
    """The bytes of ``rows`` rows of every layer and KV head.

    With ``r`` rows in a grade, a section ``rows`` holds

    - ``"exact"``: ``k [L, H, r, k_dim]`` and ``v [L, H, r, v_dim]`` of ``dtype``;
    - ``"fp8"``: the same as float8_e4m3fn, by value, saturated at 448;
    - ``"int8"`` and ``"int4"``: ``k uint8 [L, H, r, k_dim/2]`` and ``v [L, H, r, v_dim/2]``, two codes a byte, the
      lower dimension in the low half; ``k_bounds [L, H, groups, 2, k_dim]``, least and greatest element of each channel
      in each ``GROUP`` rows; ``v_bounds [L, H, r, 2]``, those of each row; both of ``bounds_dtype``;
    - and, with ``places``, ``index [L, H, r]``: where the rows stood in the context, int16 that is read as unsigned if
      the context has at most 65,536 tokens, else int32.

    The section ``exact`` holds the same as ``"exact"``. Sections ``residual`` hold ``k`` and ``v``, codes of the same
    shapes in ``-8..7``, as two's complement. A value is ``low + (high - low) / 240 * (16 * code + residual)``. With
    ``rotate`` the values of K are those of each ``run`` channels times a Hadamard matrix.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    layers: int
    heads: int
    """KV heads."""
    dim: int
    """Head dimension of K in the cache."""
    v_dim: int
    """Head dimension of V; 0 for caches with one latent tensor (MLA)."""
    dtype: torch.dtype
    """Of the cache: float16, bfloat16, float32 or a float8; with ``"exact"`` any dtype of 1, 2, 4 or 8 bytes."""
    tokens: int
    """Of the context, ``C``."""
    rows: int
    """Rows stored of each layer and head, at most ``tokens``."""
    form: str = "int8"
    """``"exact"``, ``"fp8"``, ``"int8"`` or ``"int4"``."""
    places: bool = True
    """Whether rows are stored with their places. Without, row ``i`` is token ``i``."""
    channels: int | None = None
    """K channels kept, of ``dim``; None: all of them."""
    exact_rows: int = -1
    """How many of the best rows are exact. -1: ``EXACT_ROWS``, but not all rows; 0 with the form ``"exact"``."""
    rotate: bool | None = None
    """Whether K is rotated before codes are taken, so that no channel is an outlier. None: with ``"int8"`` and
    ``"int4"``."""
    grade_rows: int = 0
    """Rows of a grade, a multiple of ``GROUP``. 0: as many as divide ``tokens`` into at most ``GRADES`` grades."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "dim", "tokens"):
            check_count(name, getattr(self, name), 1, 2**31 - 1)
        check_count("v_dim", self.v_dim, 0, 2**31 - 1)
        check_count("rows", self.rows, 1, self.tokens)
        check_choice("form", self.form, FORMS)
        check_flag("places", self.places)
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype, got {type(self.dtype).__name__}")
        allowed = SCORED_DTYPES + (() if self.form == "fp8" else FP8_DTYPES)
        if self.form != "exact" and self.dtype not in allowed:
            raise TypeError(f"dtype: expected {' or '.join(map(str, allowed))} with {self.form!r}, got {self.dtype}")
        if self.dtype.itemsize not in WORDS:
            raise TypeError(f"dtype: expected 1, 2, 4 or 8 bytes, got {self.dtype}")
        if self.channels is not None:
            check_count("channels", self.channels, 1, min(self.dim, 2**16))
        coded = self.form in ("int8", "int4")
        if self.exact_rows == -1:
            object.__setattr__(self, "exact_rows", 0 if self.form == "exact" else min(EXACT_ROWS, self.rows - 1))
        check_count("exact_rows", self.exact_rows, 0, 0 if self.form == "exact" else min(GROUP, self.rows - 1))
        if self.rotate is None:
            object.__setattr__(self, "rotate", coded)
        check_flag("rotate", self.rotate)
        if self.rotate and not coded:
            raise ValueError(f"rotate: expected False with {self.form!r}, got True")
        if coded and (self.k_dim % 2 or self.v_dim % 2):
            raise ValueError(
                f"dim, v_dim, channels: expected even numbers with {self.form!r}, got K {self.k_dim} and V {self.v_dim}"
            )
        if self.grade_rows == 0:
            object.__setattr__(self, "grade_rows", _up(-(-self.tokens // GRADES), GROUP))
        check_count("grade_rows", self.grade_rows, GROUP, 2**31 - 1)
        if self.grades > MOST_GRADES:
            raise ValueError(
                f"grade_rows: expected at most {MOST_GRADES} grades, got {self.grades} of {self.grade_rows}"
            )
        if self.grade_rows % GROUP:
            raise ValueError(f"grade_rows: expected a multiple of {GROUP}, got {self.grade_rows}")

    @staticmethod
    def shape_of(cache: PagedCache) -> dict[str, Any]:
        """The fields that a pool determines."""
        v_dim = 0 if cache.v is None else cache.v[0].shape[3]
        _, _, heads, dim = cache.shape
        if cache.v is not None and cache.v[0].dtype != cache.k[0].dtype:
            raise TypeError(f"v_cache: expected dtype {cache.k[0].dtype} as in k_cache, got {cache.v[0].dtype}")
        return {"layers": len(cache.k), "heads": heads, "dim": dim, "v_dim": v_dim, "dtype": cache.k[0].dtype}

    @property
    def k_dim(self) -> int:
        """Channels of K that are stored."""
        return self.dim if self.channels is None else self.channels

    @property
    def run(self) -> int:
        """Channels of K that are rotated together: the largest power of two, up to 64, that divides ``k_dim``."""
        return min(self.k_dim & -self.k_dim, 64)

    @property
    def bounds_dtype(self) -> torch.dtype:
        """``dtype``, or bfloat16 for a float8, whose numbers it holds."""
        return torch.bfloat16 if self.dtype.itemsize == 1 else self.dtype

    @property
    def grades(self) -> int:
        return -(-(self.rows - self.exact_rows) // self.grade_rows)

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.int16 if self.tokens <= 2**16 else torch.int32

    @functools.cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections, in order."""
        wanted = [("channels", 0)] if self.channels is not None else []
        wanted += [("exact", 0)] if self.exact_rows else []
        wanted += [("rows", grade) for grade in range(self.grades)]
        if self.form == "int8":
            wanted += [("residual", grade) for grade in range(self.grades)]
        held, offset = [], 0
        for kind, grade in wanted:
            first = 0 if kind in ("channels", "exact") else self.exact_rows + grade * self.grade_rows
            rows = {"channels": 0, "exact": self.exact_rows}.get(kind, min(self.grade_rows, self.rows - first))
            arrays, end = self._arrays(kind, rows)
            held.append(Section(kind, grade, first, rows, offset, _up(end + TRAILER, ALIGNMENT), arrays))
            offset += held[-1].nbytes
        return tuple(held)

    def _arrays(self, kind: str, rows: int) -> tuple[dict[str, Array], int]:
        """The arrays of a section by name, and where the last ends."""
        all_, coded = (self.layers, self.heads), self.form in ("int8", "int4") and kind != "exact"
        stored = {"exact": self.dtype, "fp8": torch.float8_e4m3fn}.get(
            kind if kind == "exact" else self.form, torch.uint8
        )
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if kind == "channels":
            wanted["channels"] = (*all_, self.k_dim), torch.int16
        for half, width in (("k", self.k_dim), ("v", self.v_dim)):
            if width and kind != "channels":
                wanted[half] = (*all_, rows, width // 2 if coded else width), stored
        if kind == "rows" and coded:
            wanted["k_bounds"] = (*all_, -(-rows // GROUP), 2, self.k_dim), self.bounds_dtype
            if self.v_dim:
                wanted["v_bounds"] = (*all_, rows, 2), self.bounds_dtype
        if kind in ("exact", "rows") and self.places:
            wanted["index"] = (*all_, rows), self.index_dtype
        arrays, end = {}, 0
        for name, (shape, dtype) in wanted.items():
            arrays[name] = Array(_up(end, 16), shape, dtype)
            end = arrays[name].offset + arrays[name].nbytes
        return arrays, end

    @property
    def nbytes(self) -> int:
        """Bytes of the whole payload."""
        return self.sections[-1].offset + self.sections[-1].nbytes

    def held(self, nbytes: int) -> int:
        """The number of whole sections in the first ``nbytes`` bytes.

        Raises ValueError if they do not end with a section, or end before the first grade.
        """
        ends = [section.offset + section.nbytes for section in self.sections]
        least = next(i for i, section in enumerate(self.sections) if section.kind == "rows")
        if nbytes not in ends[least:]:
            raise ValueError(f"nbytes: expected the end of a section, at least {ends[least]}, got {nbytes}")
        return ends.index(nbytes) + 1

    def rows_in(self, sections: int, kind: str = "rows") -> int:
        """Rows that the first ``sections`` sections hold, or that have 8 bits or more in them (``"residual"``)."""
        grades = sum(section.kind == kind for section in self.sections[:sections])
        return min(self.rows, self.exact_rows + grades * self.grade_rows)
