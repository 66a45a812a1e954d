"""The bytes of a payload: sections, prefixes, and what is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import payload_oracle
import pytest
import torch
from payload_worlds import Case, Context

from kara_kernels import PagedCache, ops, reference
from kara_kernels.payload import EXACT_ROWS, MOST_GRADES, PayloadLayout

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def layout(**fields: Any) -> PayloadLayout:
    good = {"layers": 2, "heads": 3, "dim": 8, "v_dim": 4, "dtype": BF16, "tokens": 1000, "rows": 300}
    return PayloadLayout(**{**good, **fields})


def plain(a: PayloadLayout) -> payload_oracle.Payload:
    return payload_oracle.Payload(
        a.layers, a.heads, a.dim, a.v_dim, str(a.dtype).removeprefix("torch."), a.dtype.itemsize, a.tokens, a.rows,
        a.form, a.places, a.channels, a.exact_rows, bool(a.rotate), a.grade_rows,
    )  # fmt: skip


LAYOUTS = (
    {}, {"form": "int4"}, {"form": "fp8"}, {"form": "exact"}, {"v_dim": 0}, {"channels": 6}, {"places": False},
    {"rows": 1}, {"rows": 5}, {"rows": 64}, {"rows": 68}, {"rows": 69}, {"rows": 132, "exact_rows": 0},
    {"tokens": 65536}, {"tokens": 65537, "rows": 70}, {"dtype": FP8}, {"dtype": torch.float32, "form": "fp8"},
    {"form": "exact", "dtype": torch.float64, "channels": 1}, {"grade_rows": 64}, {"grade_rows": 128, "exact_rows": 64},
    {"dim": 576, "v_dim": 0, "heads": 1, "rotate": False},
)  # fmt: skip


@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
def test_sections_are_those_of_the_oracle(fields: dict[str, Any]) -> None:
    made = layout(**fields)
    parts = plain(made).parts()
    assert [(s.kind, s.first, s.rows, s.offset, s.nbytes) for s in made.sections] == [part[:5] for part in parts]
    for section, part in zip(made.sections, parts, strict=True):
        placed = {name: (section.offset + a.offset, a.dtype.itemsize, a.nbytes // a.dtype.itemsize)
                  for name, a in section.arrays.items()}  # fmt: skip
        assert placed == part.arrays
        assert section.offset % 64 == section.nbytes % 64 == 0
        end = max(a.offset + a.nbytes for a in section.arrays.values())
        assert 8 <= section.nbytes - end < 8 + 64
        assert all(a.offset % 16 == 0 for a in section.arrays.values())
    assert made.nbytes == parts[-1].offset + parts[-1].nbytes


def test_what_is_stored_of_a_row() -> None:
    """Llama-3.1-8B: 32 layers of 8 heads of 128, by hand."""
    made = layout(layers=32, heads=8, dim=128, v_dim=128, tokens=8192, rows=8192)
    assert (made.exact_rows, made.grade_rows, made.grades, made.run) == (EXACT_ROWS, 1024, 8, 64)
    first = made.sections[1]
    heads, rows = 32 * 8, 1024
    assert {name: array.nbytes for name, array in first.arrays.items()} == {
        "k": heads * rows * 64, "v": heads * rows * 64, "k_bounds": heads * 16 * 2 * 128 * 2,
        "v_bounds": heads * rows * 2 * 2, "index": heads * rows * 2,
    }  # fmt: skip
    four = replace(made, form="int4", rotate=None)
    assert four.nbytes / (heads * 8192 * 256 * 2) == pytest.approx(0.278, abs=5e-4)
    assert made.nbytes / (heads * 8192 * 256 * 2) == pytest.approx(0.528, abs=5e-4)


@pytest.mark.parametrize(("kept", "run"), [(2, 2), (6, 2), (8, 8), (64, 64), (80, 16), (96, 32), (128, 64), (576, 64)])
def test_runs_of_rotated_channels(kept: int, run: int) -> None:
    assert layout(dim=kept).run == run
    assert layout(dim=600, channels=kept).run == run


@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
def test_prefixes_that_end_with_a_section(fields: dict[str, Any]) -> None:
    made = layout(**fields)
    ends = [section.offset + section.nbytes for section in made.sections]
    least = [section.kind for section in made.sections].index("rows")
    for number, end in enumerate(ends):
        for nbytes in (end - 64, end - 1, end + 1):
            if nbytes not in ends[least:]:
                with pytest.raises(ValueError, match=rf"nbytes: .* at least {ends[least]}, got {nbytes}$"):
                    made.held(nbytes)
        if number < least:
            with pytest.raises(ValueError, match="nbytes: expected the end of a section"):
                made.held(end)
        else:
            assert made.held(end) == number + 1
    with pytest.raises(ValueError, match="nbytes: "):
        made.held(0)


def test_rows_in_a_prefix() -> None:
    made = layout(rows=300, grade_rows=128)  # 4 exact, then 128, 128 and 40
    kinds = [section.kind for section in made.sections]
    assert kinds == ["exact"] + 3 * ["rows"] + 3 * ["residual"]
    assert [made.rows_in(n) for n in range(2, 8)] == [132, 260, 300, 300, 300, 300]
    assert [made.rows_in(n, "residual") for n in range(2, 8)] == [4, 4, 4, 132, 260, 300]


def test_the_fields_that_a_pool_determines() -> None:
    k, v = torch.zeros(3, 2, 4, 2, 8, dtype=BF16), torch.zeros(3, 2, 4, 2, 6, dtype=BF16)
    found = PayloadLayout.shape_of(PagedCache(k, v))
    assert found == {"layers": 3, "heads": 2, "dim": 8, "v_dim": 6, "dtype": BF16}
    assert PayloadLayout.shape_of(PagedCache(k))["v_dim"] == 0
    with pytest.raises(TypeError, match=r"v_cache: expected dtype torch.bfloat16 as in k_cache, got torch.float16"):
        PayloadLayout.shape_of(PagedCache(k, v.half()))


BAD_FIELDS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layers": ({"layers": 0}, ValueError, r"layers: expected 1\.\..*, got 0"),
    "heads": ({"heads": 2.0}, TypeError, "heads: expected an int, got float"),
    "dim": ({"dim": -1}, ValueError, "dim: expected .* got -1"),
    "v_dim": ({"v_dim": -1}, ValueError, "v_dim: expected 0.* got -1"),
    "tokens": ({"tokens": 0, "rows": 1}, ValueError, "tokens: .* got 0"),
    "no rows": ({"rows": 0}, ValueError, r"rows: expected 1\.\.1000, got 0"),
    "rows": ({"rows": 1001}, ValueError, r"rows: expected 1\.\.1000, got 1001"),
    "form": ({"form": "int2"}, ValueError, "form: expected one of 'exact', 'fp8', 'int8', 'int4', got 'int2'"),
    "places": ({"places": 1}, TypeError, "places: expected a bool, got int"),
    "dtype": ({"dtype": "bfloat16"}, TypeError, "dtype: expected a torch.dtype, got str"),
    "integers": ({"dtype": torch.int8}, TypeError, "dtype: expected torch.float16 or .*'int8', got torch.int8"),
    "fp8 of fp8": ({"dtype": FP8, "form": "fp8"}, TypeError, "dtype: expected .* with 'fp8', got torch.float8_e4m3fn"),
    "double": ({"dtype": torch.float64}, TypeError, "dtype: expected .* got torch.float64"),
    "16 bytes": ({"dtype": torch.complex128, "form": "exact"}, TypeError, "dtype: expected 1, 2, 4 or 8 bytes, got"),
    "channels": ({"channels": 9}, ValueError, r"channels: expected 1\.\.8, got 9"),
    "no channels": ({"channels": 0}, ValueError, r"channels: expected 1\.\.8, got 0"),
    "exact rows": ({"exact_rows": 65}, ValueError, r"exact_rows: expected 0\.\.64, got 65"),
    "all rows exact": ({"rows": 3, "exact_rows": 3}, ValueError, r"exact_rows: expected 0\.\.2, got 3"),
    "exact of exact": ({"form": "exact", "exact_rows": 1}, ValueError, r"exact_rows: expected 0\.\.0, got 1"),
    "rotate": ({"rotate": 1}, TypeError, "rotate: expected a bool, got int"),
    "fp8 rotated": ({"form": "fp8", "rotate": True}, ValueError, "rotate: expected False with 'fp8', got True"),
    "odd": ({"dim": 7}, ValueError, "dim, v_dim, channels: expected even numbers with 'int8', got K 7 and V 4"),
    "odd channels": ({"channels": 5}, ValueError, "dim, v_dim, channels: expected even .* K 5 and V 4"),
    "odd values": ({"v_dim": 3, "form": "int4"}, ValueError, "expected even numbers with 'int4', got K 8 and V 3"),
    "grades": ({"grade_rows": 100}, ValueError, "grade_rows: expected a multiple of 64, got 100"),
    "small grades": ({"grade_rows": 32}, ValueError, r"grade_rows: expected 64\.\..*, got 32"),
    "many grades": ({"tokens": 64 * MOST_GRADES + 5, "rows": 64 * MOST_GRADES + 5, "grade_rows": 64}, ValueError,
                    f"grade_rows: expected at most {MOST_GRADES} grades, got {MOST_GRADES + 1} of 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields_are_refused(case: str) -> None:
    fields, error, message = BAD_FIELDS[case]
    with pytest.raises(error, match=message):
        layout(**fields)


# ------------------------------------------------------------------------------------------- arguments of operations

GOOD = Case(tokens=20, rows=18, channels=6)


def arguments(form: str, write: bool) -> tuple[Context, dict[str, Any]]:
    """Good arguments of gather_rows and quantize_rows (``write``), or of their inverses."""
    context = Context(replace(GOOD, form=form))
    _, payload = context.payload()
    context.encode("torch", payload)
    k, v = context.caches()
    given = {"k_cache": k, "v_cache": v, "block_table": context.world.block_tables[0], "layout": context.layout}
    if write:
        return context, given | {"rows": context.rows, "channels": context.channels, "out": payload}
    return context, given | {"payload": payload}


def changed(tensor: torch.Tensor, index: tuple[int, ...], value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": (lambda g: {"k_cache": 3}, TypeError, "k_cache: expected a tensor or a sequence of tensors, got int"),
    "v of another shape": (lambda g: {"v_cache": [v[:1] for v in g["v_cache"]]}, ValueError, "v_cache: expected"),
    "v of another dtype": (lambda g: {"v_cache": [v.half() for v in g["v_cache"]]}, TypeError,
                           "v_cache: expected dtype torch.bfloat16 as in k_cache, got torch.float16"),
    "no layout": (lambda g: {"layout": None}, TypeError, "layout: expected a PayloadLayout, got NoneType"),
    "fewer layers": (lambda g: {"layout": replace(g["layout"], layers=1)}, ValueError,
                     "layout.layers: expected 2 as in the caches, got 1"),
    "another head dimension": (lambda g: {"layout": replace(g["layout"], dim=16)}, ValueError,
                               "layout.dim: expected 8 as in the caches, got 16"),
    "another dtype": (lambda g: {"layout": replace(g["layout"], dtype=torch.float16)}, ValueError,
                      "layout.dtype: expected torch.bfloat16 as in the caches, got torch.float16"),
    "another form": (lambda g: {"layout": replace(g["layout"], form="exact", exact_rows=0, rotate=False)
                                if g["layout"].form != "exact" else replace(g["layout"], form="fp8")}, ValueError,
                     "layout.form: expected .*, got '(exact|fp8)'"),
    "a table of two dimensions": (lambda g: {"block_table": g["block_table"][None]}, ValueError,
                                  r"block_table: expected shape \[any\], got \[1, "),
    "a table of int64": (lambda g: {"block_table": g["block_table"].long()}, TypeError, "block_table: expected dtype"),
    "a strided table": (lambda g: {"block_table": g["block_table"].repeat_interleave(2)[::2]}, ValueError,
                        "block_table: expected stride 1, got 2"),
    "a short table": (lambda g: {"block_table": g["block_table"][:4]}, ValueError,
                      "block_table: expected blocks for (20|18) tokens, got 4 blocks of 4"),
    "a block outside": (lambda g: {"block_table": changed(g["block_table"], (1,), 99)}, ValueError,
                        r"block_table\[1\]: expected a block id in 0\.\.\d+, got 99"),
}  # fmt: skip
BAD_WRITES: dict[str, tuple[Any, type[Exception], str]] = {
    "no rows": (lambda g: {"rows": None}, TypeError, "rows: expected a tensor with a layout of places, got NoneType"),
    "no channels": (lambda g: {"channels": None}, TypeError,
                    "channels: expected a tensor with a layout of dropped channels, got NoneType"),
    "rows without places": (lambda g: {"layout": replace(g["layout"], places=False)}, TypeError,
                            "rows: expected None without a layout of places, got Tensor"),
    "channels kept": (lambda g: {"layout": replace(g["layout"], channels=None)}, TypeError,
                      "channels: expected None without a layout of dropped channels, got Tensor"),
    "fewer rows": (lambda g: {"rows": g["rows"][..., 1:]}, ValueError, r"rows: expected shape \[2, 2, 18\], got"),
    "rows of int64": (lambda g: {"rows": g["rows"].long()}, TypeError, "rows: expected dtype torch.int32, got"),
    "strided rows": (lambda g: {"rows": g["rows"].repeat_interleave(2, -1)[..., ::2]}, ValueError,
                     "rows: expected stride 1 in the last dimension, got 2"),
    "a row outside": (lambda g: {"rows": changed(g["rows"], (1, 0, 2), 20)}, ValueError,
                      r"rows\[1, 0, 2\]: expected a value in 0\.\.19, got 20"),
    "a negative row": (lambda g: {"rows": changed(g["rows"], (0, 1, 0), -1)}, ValueError, r"rows\[0, 1, 0\].* got -1"),
    "a row twice": (lambda g: {"rows": changed(g["rows"], (0, 0, 3), int(g["rows"][0, 0, 0]))}, ValueError,
                    r"rows, sorted\[0, 0, \d+\]: expected distinct values"),
    "a channel outside": (lambda g: {"channels": changed(g["channels"], (0, 1, 2), 8)}, ValueError,
                          r"channels\[0, 1, 2\]: expected a value in 0\.\.7, got 8"),
    "a channel twice": (lambda g: {"channels": changed(g["channels"], (0, 0, 3), int(g["channels"][0, 0, 0]))},
                        ValueError, r"channels, sorted.*: expected distinct values"),
    "a short payload": (lambda g: {"out": g["out"][:-64]}, ValueError, r"out: expected shape \[\d+\], got"),
    "a payload of int8": (lambda g: {"out": g["out"].view(torch.int8)}, TypeError, "out: expected dtype torch.uint8"),
    "an odd address": (lambda g: {"out": torch.zeros(len(g["out"]) + 8, dtype=torch.uint8)[8:]}, ValueError,
                       "out: expected an address that is a multiple of 16, got 0x"),
    "a strided payload": (lambda g: {"out": torch.zeros(2 * len(g["out"]), dtype=torch.uint8)[::2]}, ValueError,
                          "out: expected stride 1, got 2"),
}  # fmt: skip
BAD_READS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": (lambda g: {"payload": [1]}, TypeError, "payload: expected a tensor, got list"),
    "half a section": (lambda g: {"payload": g["payload"][:-1]}, ValueError,
                       r"payload: expected the end of a section, at least \d+, got \d+"),
    "an odd address": (lambda g: {"payload": torch.zeros(len(g["payload"]) + 1, dtype=torch.uint8)[1:]}, ValueError,
                       "payload: expected an address that is a multiple of 16"),
    "to": (lambda g: {"to": "back"}, ValueError, "to: expected one of 'places', 'front', got 'back'"),
    "a block twice": (lambda g: {"block_table": changed(g["block_table"], (1,), int(g["block_table"][0]))}, ValueError,
                      "block_table: expected every block once, got one twice"),
}  # fmt: skip


def damaged(given: dict[str, Any], name: str, value: int) -> dict[str, Any]:
    """A payload whose first element of an array is wrong."""
    payload = given["payload"].clone()
    section = next(s for s in given["layout"].sections if name in s.arrays)
    section.of(payload)[name].view(-1)[0] = value
    return {"payload": payload}


BAD_READS |= {
    "a place outside": (lambda g: damaged(g, "index", 20), ValueError,
                        r"payload.index\[0, 0, 0\]: expected a value in 0\.\.19, got 20"),
    "a large place": (lambda g: damaged(g, "index", -1), ValueError, "payload.index.*got 65535"),
    "a channel outside": (lambda g: damaged(g, "channels", 8), ValueError,
                          r"payload.channels\[0, 0, 0\]: expected a value in 0\.\.7, got 8"),
}  # fmt: skip
FORMS = ("exact", "int8", "fp8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD | BAD_WRITES)
def test_bad_arguments_of_writing_are_refused(case: str, form: str, backend: str) -> None:
    refused(case, BAD | BAD_WRITES, "gather_rows" if form == "exact" else "quantize_rows", form, backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD | BAD_READS)
def test_bad_arguments_of_reading_are_refused(case: str, form: str, backend: str) -> None:
    refused(case, BAD | BAD_READS, "scatter_rows" if form == "exact" else "dequantize_rows", form, backend)


def refused(case: str, cases: dict[str, Any], name: str, form: str, backend: str) -> None:
    change, error, message = cases[case]
    write = name in ("gather_rows", "quantize_rows")
    context, given = arguments(form, write)
    given = given | change(given)
    before, held = context.world.snapshot(), given["out" if write else "payload"]
    own = held.clone() if isinstance(held, torch.Tensor) else None
    for operation, more in ((getattr(ops, name), {"backend": backend}), (getattr(reference, name), {})):
        with pytest.raises(error, match=message):
            operation(**given, **more)
        context.world.assert_untouched(before)
        assert own is None or torch.equal(held, own)


@pytest.mark.parametrize("form", FORMS)
def test_a_pool_that_kernels_cannot_read_is_refused(form: str) -> None:
    _, given = arguments(form, write=True)
    given["k_cache"] = [k.transpose(2, 3).contiguous().transpose(2, 3) for k in given["k_cache"]]
    operation = ops.gather_rows if form == "exact" else ops.quantize_rows
    expected = given["out"].clone()
    operation(**given, backend="torch")
    assert torch.equal(given["out"], expected)
    given["out"].zero_()
    with pytest.raises(ValueError, match=r"(k_cache: expected stride 1 in the last dimension)|(backend: expected)"):
        operation(**given, backend="triton")
    assert not given["out"].any()


def test_new_memory_is_made_if_none_is_given() -> None:
    for form in FORMS:
        context, given = arguments(form, write=True)
        held = given.pop("out")
        operation = ops.gather_rows if form == "exact" else ops.quantize_rows
        new = operation(**given)
        assert new.shape == held.shape
        for section in context.layout.sections:
            for name, array in section.of(new).items():
                assert torch.equal(array.view(torch.uint8), section.of(held)[name].view(torch.uint8)), name
