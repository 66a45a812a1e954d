"""`make codegen`: parsing of machine code, computed values, the page, and a real build for each target."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import INTERPRETED

from bench import tables
from bench.codegen import __main__ as command
from bench.codegen.goals import EXCEPTIONS, Excuse, judge
from bench.codegen.inspect import facts, occupancy, read_gcn, read_sass
from bench.codegen.report import page
from bench.codegen.shapes import PAYLOADS, SHAPES, Shape
from bench.compile_only import TARGETS, compiling_for

SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P1 LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0030*/                   LDG.E.U16 R4, [R2.64] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0060*/                   REDUX.SUM.S32 UR4, R5 ;
        /*0070*/                   STG.E.64 [R2.64], R4 ;
        /*0080*/                   ATOMS.OR RZ, [R3], R4 ;
        /*0090*/                   RED.E.ADD.STRONG.GPU [R2.64], R4 ;
        /*00a0*/                   EXIT ;
"""

GCN = """
kernel:
	buffer_load_dword v1, v0, s[0:3], 0 offen
	global_load_dwordx4 v[4:7], v[0:1], off
	global_load_lds_dwordx2 v[4:5], off
	s_barrier
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	ds_bpermute_b32 v0, v1, v2
	global_store_short v[0:1], v2, off
	global_atomic_add v[0:1], v2, off
	ds_add_u32 v0, v1
	; codeLenInByte = 1234
"""


def test_sass_is_read() -> None:
    assert read_sass(SASS) == {
        "load_bytes": 16, "store_bytes": 8, "tensor": 1, "barriers": 1, "atomics": 1, "shared_atomics": 1,
        "code_bytes": 0xB0,
    }  # fmt: skip


def test_gcn_is_read() -> None:
    assert read_gcn(GCN) == {
        "load_bytes": 16, "store_bytes": 2, "tensor": 1, "barriers": 1, "atomics": 1, "shared_atomics": 1,
        "code_bytes": 1234,
    }  # fmt: skip
    with pytest.raises(ValueError, match="width"):
        read_gcn("\tglobal_load_tensor v0, off\n; codeLenInByte = 4")


@pytest.mark.parametrize(("target", "registers", "shared", "warps", "expected"), [
    ("sm_80", 32, 0, 4, 1.0),  # 64 warps of 32 registers are all there are
    ("sm_80", 33, 0, 4, 0.75),  # 40 registers: 12 warps a quarter
    ("sm_80", 255, 0, 8, 0.125),  # 2 warps a quarter
    ("sm_80", 168, 0, 8, 0.125),  # 3 warps a quarter: 12, of which 8 make a program
    ("sm_80", 128, 99328, 8, 0.125),  # one program's shared memory leaves no room for a second
    ("sm_80", 128, 82000, 8, 0.25),
    ("sm_90", 32, 0, 1, 0.5),  # 32 programs of one warp
    ("sm_120", 32, 0, 4, 1.0),  # 48 warps
    ("gfx942", 64, 65536, 8, 0.25),
    ("gfx942", 512, 0, 4, 0.125),
])  # fmt: skip
def test_occupancy(target: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert occupancy(target, registers, shared, warps) == expected


def row(**changes: object) -> dict:
    return {
        "triton": "3.9.0", "shape": "W 256", "kernel": "score_kernel", "target": "sm_90", "warps": 8, "registers": 100,
        "spills": 0, "shared": 1024, "shared_limit": 2048, "occupancy": 0.25, "load_bytes": 16, "store_bytes": 16,
        "tensor": 8, "barriers": 2, "atomics": 0, "shared_atomics": 0, "code_bytes": 100, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(("goal", "broken"), [
    ("no spills", {"spills": 8}), ("16-byte loads", {"load_bytes": 8}), ("tensor cores", {"tensor": 0}),
    ("16-byte stores", {"kernel": "compact_kernel", "store_bytes": 4}), ("no atomics", {"atomics": 1}),
    ("no atomics", {"shared_atomics": 1}), ("shared memory within the limit", {"shared": 4096}),
    ("occupancy of 12.5 %", {"occupancy": 0.1}), ("occupancy of 25 %", {"kernel": "quantize_kernel", "occupancy": 0.2}),
    ("16-byte loads", {"kernel": "gather_kernel", "load_bytes": 8}),
    ("16-byte loads", {"kernel": "quantize_kernel", "load_bytes": 8}),
    ("16-byte stores", {"kernel": "dequantize_kernel", "store_bytes": 8}),
])  # fmt: skip
def test_a_missed_goal_is_told(goal: str, broken: dict[str, object]) -> None:
    assert not any(verdict.missed for verdict in judge([row()], ()))
    verdicts = judge([row(), row(**broken)], ())
    assert [(verdict.goal, len(verdict.missed)) for verdict in verdicts if verdict.missed] == [(goal, 1)]
    assert f"**{goal}**, missed: " in page([row(), row(**broken)], verdicts)
    excuse = Excuse(goal, lambda found: True, "because")
    verdicts = judge([row(), row(**broken)], [excuse])
    assert not any(verdict.missed for verdict in verdicts)
    assert f"**{goal}**, 1 excused: because" in page([row(), row(**broken)], verdicts)


def test_a_reason_that_excuses_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="excuses no row"):
        judge([row()], [Excuse("no spills", lambda found: True, "because")])


@pytest.mark.parametrize("some", [["--quick"], ["--targets", "sm_100"]])
def test_reasons_excuse_in_a_run_of_some_kernels(
    some: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not all of them do there, and those that excuse nothing are no error."""
    atomics = row(target="sm_100", shared_atomics=2)
    monkeypatch.setattr(command, "_run_children", lambda options: [atomics])
    assert command.main([*some, "--out", str(tmp_path)]) == 0
    assert "tensor memory" in (tmp_path / "codegen.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="excuses no row"):
        command.main(["--out", str(tmp_path)])
    monkeypatch.setattr(command, "_run_children", lambda options: [atomics, row(spills=8)])
    assert command.main([*some, "--out", str(tmp_path)]) == 1
    assert "missed: no spills, 1 of 2" in capsys.readouterr().err


def test_the_stored_table_meets_the_goals_and_is_of_these_shapes() -> None:
    _, stored = tables.read(command.RESULTS / "codegen.csv")
    verdicts = judge(stored, EXCEPTIONS)
    assert not [verdict for verdict in verdicts if verdict.missed]
    assert (command.RESULTS / "codegen.md").read_text(encoding="utf-8") == page(stored, verdicts)
    kernels = {
        "score_kernel", "pool_kernel", "keep_kernel", "topk_kernel", "compact_kernel", "pack_kernel", "gather_kernel",
        "scatter_kernel", "quantize_kernel", "dequantize_kernel", "sort_kernel", "merge_kernel", "channel_kernel",
        "checksum_kernel",
    }  # fmt: skip
    assert {found["kernel"] for found in stored} == kernels
    assert {found["target"] for found in stored} == set(TARGETS) == set(command.TARGETS)
    assert len({found["triton"] for found in stored}) == 2
    labels = {found["shape"] for found in stored if found["kernel"] == "score_kernel"}
    assert labels <= {shape.label for shape in SHAPES}
    for found in stored:
        assert found["occupancy"] == occupancy(found["target"], found["registers"], found["shared"], found["warps"])
    labels = {found["shape"] for found in stored if found["kernel"] == "quantize_kernel"}
    assert labels == {shape.label for shape in PAYLOADS}


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--workers", "0"], ["--targets", "sm_1"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("python -m bench.codegen: error: ")


@pytest.mark.skipif(INTERPRETED, reason="compiles kernels: TRITON_INTERPRET=0")
@pytest.mark.parametrize("target", TARGETS)
def test_the_stored_figures_are_those_of_a_build_made_now(target: str) -> None:
    import triton

    _, stored = tables.read(command.RESULTS / "codegen.csv")
    if triton.__version__ not in {found["triton"] for found in stored}:
        pytest.skip(f"the stored table is of other versions than {triton.__version__}")
    shape = Shape()
    with compiling_for(target) as builds:
        shape.launch()
    for build in builds:
        if build.name == "keep_kernel":
            continue  # knows nothing of head dimensions: stored with the first shape of its window
        key = (triton.__version__, shape.label, build.name, target)
        [found] = [r for r in stored if (r["triton"], r["shape"], r["kernel"], r["target"]) == key]
        assert facts(build).items() <= found.items()
