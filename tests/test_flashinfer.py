"""`block_tables_from_csr` against loops over lists, in use, and without reading anything back."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from worlds import Plan, World, plans

from kara_kernels import block_tables_from_csr, compress_window


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def csr(tables: list[list[int]], behind: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    ends = [0]
    for table in tables:
        ends.append(ends[-1] + len(table))
    return int32(ends), int32([*(block for table in tables for block in table), *(behind or [])])


@settings(max_examples=100)
@given(data=st.data(), page=st.integers(1, 16))
def test_tables_and_lengths_are_those_of_the_lists(data: st.DataObject, page: int) -> None:
    ids = st.integers(0, 2**31 - 1)
    tables = data.draw(st.lists(st.lists(ids, max_size=5), max_size=5))
    last = [data.draw(st.integers(1, page)) if table else data.draw(st.integers(-3, page + 3)) for table in tables]
    width = max([1, *map(len, tables)]) + data.draw(st.integers(0, 2))
    indptr, indices = csr(tables, behind=data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3)))
    found, lengths = block_tables_from_csr(indptr, indices, int32(last), page_size=page, max_blocks=width)
    assert found.dtype == lengths.dtype == torch.int32
    assert found.shape == (len(tables), width)
    assert found.tolist() == [table + [0] * (width - len(table)) for table in tables]
    expected = [(len(table) - 1) * page + end if table else 0 for table, end in zip(tables, last, strict=True)]
    assert lengths.tolist() == expected


@settings(max_examples=20)
@given(plan=plans(explicit_starts=False))
def test_a_window_is_compressed_through_them(plan: Plan) -> None:
    listed, by_csr = World(plan), World(plan)
    last = int32([(length - 1) % plan.page + 1 for length in plan.lengths])
    indptr, indices = csr(by_csr.tables)
    tables, lengths = block_tables_from_csr(
        indptr, indices, last, page_size=plan.page, max_blocks=max(map(len, by_csr.tables))
    )
    results = [
        compress_window(
            world.query[0], world.k_caches[0], (world.v_caches or [None])[0], tables_, lengths_, window=plan.window,
            keep=1, value_norm=False,
        )
        for world, tables_, lengths_ in (
            (listed, listed.block_tables, listed.seq_lens), (by_csr, tables, lengths),
        )
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    by_csr.assert_untouched(listed.snapshot())


@pytest.mark.parametrize("pages", [0, 7])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_nothing_is_read_back(device: str, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses tensors without contents, so the host can read only their shape."""
    monkeypatch.setattr("kara_kernels.integrations.flashinfer.contents_are_checked", lambda device: False)
    with FakeTensorMode():
        indptr, indices, last = (torch.empty(n, dtype=torch.int32, device=device) for n in (4, pages, 3))
        with pytest.raises(DataDependentOutputException):
            int(last[0])
        tables, lengths = block_tables_from_csr(indptr, indices, last, page_size=16, max_blocks=5)
    assert (tables.shape, lengths.shape) == ((3, 5), (3,))
    assert tables.dtype == lengths.dtype == torch.int32
    assert tables.device.type == lengths.device.type == device
    assert tables.is_contiguous()


def test_unchecked_contents_read_no_memory_but_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kara_kernels.integrations.flashinfer.contents_are_checked", lambda device: False)
    tables, _ = block_tables_from_csr(
        int32([-5, 2, 2**30]), int32([3, 4]), int32([1, 1]), page_size=4, max_blocks=8
    )  # fmt: skip
    assert set(tables.flatten().tolist()) <= {0, 3, 4}


GOOD = {
    "indptr": int32([0, 2, 2, 5]), "indices": int32([7, 3, 1, 0, 2]), "last_page_len": int32([4, 0, 1]),
    "page_size": 4, "max_blocks": 3,
}  # fmt: skip
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"indptr": [0, 1]}, TypeError, "indptr: expected a tensor, got list"),
    "int64": ({"indices": GOOD["indices"].long()}, TypeError, "indices: expected dtype torch.int32, got torch.int64"),  # type: ignore[attr-defined]
    "no begin": ({"indptr": int32([])}, ValueError, r"indptr: expected shape \[S \+ 1\], got \[0\]"),
    "another batch": ({"last_page_len": int32([4, 1])}, ValueError, r"last_page_len: expected shape \[3\], got \[2\]"),
    "elsewhere": ({"indices": GOOD["indices"].to("meta")}, ValueError, "indices: expected device cpu, got meta"),  # type: ignore[attr-defined]
    "no page size": ({"page_size": 0}, ValueError, r"page_size: expected 1\.\.\d+, got 0"),
    "a width that is a tensor": ({"max_blocks": int32([3])}, TypeError, "max_blocks: expected an int, got Tensor"),
    "begins late": ({"indptr": int32([1, 2, 2, 5])}, ValueError, r"indptr\[0\]: expected 0, got 1"),
    "falls": ({"indptr": int32([0, 2, 1, 5])}, ValueError, r"indptr\[2\]: expected at least .*, got 1 after 2"),
    "beyond": ({"indptr": int32([0, 2, 3, 6])}, ValueError, r"indptr\[3\]: expected at most 5, .*, got 6"),
    "too wide": (
        {"max_blocks": 2},
        ValueError,
        r"indptr\[3\]: expected at most max_blocks = 2 pages .*, got 5 after 2",
    ),
    "no tokens": ({"last_page_len": int32([4, 0, 0])}, ValueError, r"last_page_len\[2\]: expected 1\.\.4, got 0"),
    "more tokens": ({"last_page_len": int32([5, 0, 1])}, ValueError, r"last_page_len\[0\]: expected 1\.\.4, got 5"),
    "no block": ({"indices": int32([7, 3, 1, -1, 2])}, ValueError, r"indices\[3\]: expected a block id .*, got -1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str) -> None:
    change, error, words = WRONG[wrong]
    block_tables_from_csr(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        block_tables_from_csr(**GOOD | change)  # type: ignore[arg-type]
