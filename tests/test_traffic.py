"""`make traffic`: the floor and the others' bytes by hand, goals that can be missed, and two cases counted for real."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("counts in compiled kernels: TRITON_INTERPRET=0", allow_module_level=True)

from bench import tables
from bench.traffic import __main__ as command
from bench.traffic.measure import CASES, Case, floor, goals, measure, others
from bench.traffic.report import page

TINY = Case("tiny", window=8, dim=4, group=3, heads=2, tail=5, queries=6)


def test_the_floor_of_a_tiny_event() -> None:
    least = floor(TINY, tiles=1, moving=10)
    assert least.scoring == 2 * (6 * 3 * 4 * 2 + 8 * 4 * 2) + 2 * 1 * 8 * 4
    assert least.selection == 2 * 8 * 4 + 2 * (8 + 4) * 4
    assert least.compaction == 2 * 10 * (4 + 4) * 2
    assert least.matrix_operations == 2 * 2 * 6 * 3 * 8 * 4
    latent = floor(Case("latent", 8, 4, 3, v_dim=0, dtype=torch.float8_e4m3fn), tiles=2, moving=10)
    assert latent.compaction == 2 * 10 * 4
    assert latent.scoring == 2 * (8 * 3 * 4 * 2 + 8 * 4) + 2 * 2 * 8 * 4  # queries in two bytes, keys in one


def test_what_others_move() -> None:
    moved = others(TINY)
    logits = 2 * 6 * 3 * 8 * 4
    keys, queries, scores = 2 * 8 * 4 * 2, 2 * 6 * 3 * 4 * 2, 2 * 8 * 4
    assert moved["scoring"] == 3 * keys + queries + 6 * logits + scores
    assert moved["selection"] == scores + 2 * 4 * (12 + 24)
    assert moved["compaction"] == 6 * 2 * (4 + 5) * 8 * 2


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_goals_hold(case: Case) -> None:
    row = measure(case)
    for name, (ratio, limit) in goals(row).items():
        assert 0.5 < ratio <= limit, name
    assert "missed" not in page([row])
    worse = copy.deepcopy(row)
    worse["steps"]["compaction"]["requested_ratio"] = 1.4
    assert page([row, worse]).count("**missed**") == 1


def test_the_command(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    head, rows = tables.read(tmp_path / "traffic.csv")
    assert "not timed" in head["kind"]
    assert [row["case"] for row in rows] == ["SmolLM2"]
    assert (tmp_path / "traffic.md").read_text() == page(rows)
    monkeypatch.setattr(command.measure, "goals", lambda row: {"anything": (2.0, 1.0)})
    assert command.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "missed: SmolLM2, anything: 2.000, at most 1.0" in capsys.readouterr().err
