"""Decides exactly whether strided views share bytes, in near-linear time for the pool layouts of engines.

Pools in one allocation interleave. Keys and values of a block are adjacent, often with all layers inside the block.
Comparing address ranges would reject such caches, and comparing all pairs of 160 views takes a second. Views that
repeat with the same stride overlap only if their offsets within that stride overlap. So each group is folded to its
outermost stride, and what still overlaps to the next one, until few pairs are left to compare.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Dims = tuple[tuple[int, int], ...]
"""``(stride, extent)`` in bytes, by ascending stride. The first is ``(1, n)``: ``n`` adjacent bytes."""


class View(NamedTuple):
    """Bytes ``base + sum(stride_i * k_i)`` for all ``0 <= k_i < extent_i``."""

    base: int
    dims: Dims


@functools.lru_cache(maxsize=64)
def dims_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Dims:
    """Dimensions in bytes, with contiguous ones merged."""
    dims = [(1, itemsize)]
    for stride, extent in sorted((s * itemsize, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        inner, count = dims[-1]
        if stride == inner * count:
            dims[-1] = (inner, count * extent)
        else:
            dims.append((stride, extent))
    return tuple(dims)


@functools.lru_cache(maxsize=64)
def reaches_twice(dims: Dims) -> bool:
    """Whether two elements of a view share a byte."""
    if _nested(dims):
        return False
    if any(stride == 0 for stride, _ in dims):
        return True
    # Two elements meet if a nonzero index difference has offset 0. Its outermost component can be taken as positive.
    steps = [(stride, 1 - extent, extent - 1) for stride, extent in dims]
    return any(_reachable([*steps[:i], (stride, 1, high)], 0) for i, (stride, _, high) in enumerate(steps))


def first_meeting(views: Sequence[View]) -> tuple[int, int] | None:
    """Two views that share a byte, lower address first, or None. No view may itself reach a byte twice."""
    order = sorted(range(len(views)), key=lambda i: views[i].base)
    for i, j in _candidates([(views[i].base, views[i].dims, place) for place, i in enumerate(order)]):
        a, b = order[min(i, j)], order[max(i, j)]
        if _share_bytes(views[a], views[b]):
            return a, b
    return None


_Part = tuple[int, Dims, int]  # (start, dimensions, owner)


def _candidates(parts: list[_Part]) -> Iterator[tuple[int, int]]:
    """Pairs of owners that may share bytes. Every pair that does is included."""
    for group in _groups(parts):
        stride = group[0][1][-1][0]
        if stride > 1 and all(dims[-1][0] == stride and _span(dims[:-1]) <= stride for _, dims, _ in group):
            yield from _candidates(list(_folded(group, stride)))
            continue
        for i, (begin, dims, owner) in enumerate(group):
            end = begin + _span(dims)
            for other_begin, _, other in group[i + 1 :]:
                if other_begin >= end:
                    break
                if other != owner:
                    yield owner, other


def _groups(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Groups of parts whose address ranges overlap, in address order. Groups of one are left out."""
    group: list[_Part] = []
    end = 0
    for part in sorted(parts):
        if group and part[0] >= end:
            if len(group) > 1:
                yield group
            group = []
        end = max(end, part[0] + _span(part[1])) if group else part[0] + _span(part[1])
        group.append(part)
    if len(group) > 1:
        yield group


def _folded(group: list[_Part], stride: int) -> Iterator[_Part]:
    """Offsets within the stride. A part that crosses the end of the stride appears again one stride earlier."""
    origin = group[0][0]
    for begin, dims, owner in group:
        place, inner = (begin - origin) % stride, dims[:-1]
        yield place, inner, owner
        if place + _span(inner) > stride:
            yield place - stride, inner, owner


@functools.lru_cache(maxsize=64)
def _span(dims: Dims) -> int:
    """Bytes from the first to the last, both included."""
    return 1 + sum((extent - 1) * stride for stride, extent in dims)


def _nested(dims: Dims) -> bool:
    """Whether every stride is at least the span of all smaller strides."""
    return all(stride >= _span(dims[:i]) for i, (stride, _) in enumerate(dims))


def _share_bytes(a: View, b: View) -> bool:
    """Whether ``a.base + sum(stride * i) == b.base + sum(stride * j)`` has a solution."""
    steps: dict[int, tuple[int, int]] = {}
    for dims, sign in ((a.dims, 1), (b.dims, -1)):
        for stride, extent in dims:
            low, high = steps.get(stride, (0, 0))
            steps[stride] = (low, high + extent - 1) if sign > 0 else (low + 1 - extent, high)
    return _reachable(sorted((stride, low, high) for stride, (low, high) in steps.items()), b.base - a.base)


def _reachable(steps: list[tuple[int, int, int]], distance: int) -> bool:
    """Whether ``sum(stride * k) == distance`` for some ``low <= k <= high`` of each ``(stride, low, high)``.

    ``steps`` are in ascending order of stride. Trying the largest first leaves two or three candidates per dimension.
    """
    reach = [(0, 0)]
    for stride, low, high in steps:
        reach.append((reach[-1][0] + stride * low, reach[-1][1] + stride * high))

    @functools.cache
    def solvable(i: int, remaining: int) -> bool:
        if i < 0:
            return remaining == 0
        (stride, low, high), (least, most) = steps[i], reach[i]
        first = max(low, -((most - remaining) // stride))
        last = min(high, (remaining - least) // stride)
        return any(solvable(i - 1, remaining - stride * step) for step in range(first, last + 1))

    return solvable(len(steps) - 1, distance)
