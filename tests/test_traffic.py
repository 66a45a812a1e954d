"""`make traffic`: floor and baselines against results by hand, missed goals, and two cases actually counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("counts in compiled kernels: TRITON_INTERPRET=0", allow_module_level=True)

from bench import tables
from bench.traffic import __main__ as command
from bench.traffic import payload
from bench.traffic.measure import CASES, Case, floor, goals, measure, missed, others, tensors
from bench.traffic.report import page
from kara_kernels.options import PAPER, RECOMMENDED
from kara_kernels.payload import PayloadLayout

TINY = Case("tiny", window=8, dim=4, group=3, heads=2, tail=5, published=True, most_queries=6)


def test_the_floor_of_a_tiny_event() -> None:
    least = floor(TINY, tiles=1, moving=10)
    assert least.scoring == 2 * (6 * 3 * 4 * 2 + 8 * 4 * 2) + 2 * 1 * 8 * 4
    assert least.selection == 2 * 8 * 4 + 2 * (8 + 4) * 4
    assert least.compaction == 2 * 10 * (4 + 4) * 2
    assert least.matrix_operations == 2 * 2 * 6 * 3 * 8 * 4
    recorded = floor(replace(TINY, published=False), tiles=1, moving=10)  # in four bits, with a scale of two bytes
    assert recorded.scoring == 2 * (6 * 3 * (2 + 2) + 8 * (4 + 4) * 2) + 2 * 1 * 8 * 4
    assert recorded.matrix_operations == least.matrix_operations
    latent = floor(Case("latent", 8, 4, 3, v_dim=0, dtype=torch.float8_e4m3fn, published=True), tiles=2, moving=10)
    assert latent.compaction == 2 * 10 * 4
    assert latent.scoring == 2 * (8 * 3 * 4 * 2 + 8 * 4) + 2 * 2 * 8 * 4  # queries in two bytes, keys in one


def test_what_others_move() -> None:
    moved = others(TINY)
    logits = 2 * 6 * 3 * 8 * 4
    keys, queries, scores = 2 * 8 * 4 * 2, 2 * 6 * 3 * 4 * 2, 2 * 8 * 4
    assert moved["scoring"] == 3 * keys + queries + 6 * logits + scores
    assert moved["selection"] == scores + 2 * 4 * (12 + 24)
    assert moved["compaction"] == 6 * 2 * (4 + 5) * 8 * 2


def test_what_is_counted_first_is_what_the_shim_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    first, published = CASES[0], next(case for case in CASES if case.published)
    assert replace(first, most_queries=1000).queries == 256 + 128
    assert first.options == dict(RECOMMENDED)
    given = tensors(first)
    assert given["query_rows"].shape == (1, first.queries)
    assert given["query"][0].codes.shape == (first.queries, 4 * first.heads, 128 // 2)
    assert len(given["look_ahead"].cos) == 128 // 2
    assert published.queries == 256
    assert tensors(published)["query"][0].shape == (1, 256, 4 * published.heads, 128)
    assert published.options == dict(PAPER)
    assert not any(case.published for case in CASES[: CASES.index(published)])


def test_an_excuse_that_excuses_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(ratio: float) -> dict[str, Any]:
        step = dict.fromkeys(("compulsory_ratio", "requested_ratio", "sector_ratio"), 1.0)
        return {"case": "c", "steps": {"scoring": step, "compaction": step}, "matrix_ratio": ratio, "one_pass": True}

    assert missed(row(1.0)) == []
    assert missed(row(1.2)) == ["matrix operations"]
    monkeypatch.setattr(command.measure, "EXCUSES", {("c", "matrix operations"): "because"})
    assert missed(row(1.2)) == []
    with pytest.raises(ValueError, match="excuse of 'c' for matrix operations"):
        missed(row(1.0))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5]], ids=lambda case: case.name)
def test_goals_hold(case: Case) -> None:
    row = measure(case)
    for name, (ratio, limit) in goals(row).items():
        assert 0.5 < ratio <= limit, name
    assert "missed" not in page([row], [])
    worse = copy.deepcopy(row)
    worse["steps"]["compaction"]["requested_ratio"] = 1.4
    assert page([row, worse], []).count("**missed**") == 1


@pytest.mark.parametrize("case", payload.CASES[1:3], ids=lambda case: case.name)
def test_goals_of_payloads_hold(case: payload.Case) -> None:
    row = payload.measure(case)
    for name, (ratio, limit) in payload.goals(row).items():
        assert 0.9 < ratio <= limit, name
    text = page([], [row])
    assert f"| {case.name} | writing |" in text
    assert "missed" not in text
    row["steps"]["reading"]["compulsory_ratio"] = 1.06
    assert page([], [row]).count("**missed**") == 1


def test_the_floor_of_a_tiny_payload() -> None:
    """Two heads of 4 rows: by hand, of K and V, bounds of a group and of rows, and places; nothing of the gaps."""
    case = payload.Case("tiny", 8, 4, "int4", tokens=4, page=2)
    layout = PayloadLayout(layers=1, heads=2, dim=8, v_dim=4, dtype=torch.bfloat16, tokens=4, rows=4, form="int4",
                           exact_rows=0)  # fmt: skip
    pool = 2 * 4 * (8 + 4) * 2
    arrays = 2 * (4 * (4 + 2) + 2 * 8 * 2 + 4 * 2 * 2 + 4 * 2)
    assert payload.floor(case, layout, 32) == {"writing": pool + arrays + 32 + 8, "reading": pool + arrays + 8}


def test_the_committed_page_is_that_of_its_table() -> None:
    _, rows = tables.read(command.RESULTS / "traffic.csv")
    if [row["case"] for row in rows] != [case.name for case in CASES]:
        pytest.skip("the committed table is of an earlier bench: make traffic")
    _, payloads = tables.read(command.RESULTS / "traffic_payload.csv")
    assert [row["case"] for row in payloads] == [case.name for case in payload.CASES]
    assert (command.RESULTS / "traffic.md").read_text() == page(rows, payloads)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    head, rows = tables.read(tmp_path / "traffic.csv")
    assert "not timed" in head["kind"]
    assert [row["case"] for row in rows] == ["SmolLM2"]
    _, payloads = tables.read(tmp_path / "traffic_payload.csv")
    assert [row["case"] for row in payloads] == ["SmolLM2, int4"]
    assert (tmp_path / "traffic.md").read_text() == page(rows, payloads)
    monkeypatch.setattr(command.measure, "goals", lambda row: {"anything": (2.0, 1.0)})
    assert command.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "missed: SmolLM2, anything: 2.000, at most 1.0" in capsys.readouterr().err
