"""The kernels of payloads as compiled for sm_80, run in the emulator. They write the reference's bytes in every order
of warps, without problems. Bugs that are planted in the code are reported."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("runs compiled kernels: TRITON_INTERPRET=0", allow_module_level=True)

from payload_worlds import BF16, FP8, FP16, FP32, Case, Context
from ptx import ORDERS, Launch, emulating
from worlds import bits

from kara_kernels import ops
from kara_kernels.payload import PayloadLayout

CASES = {
    "llama": Case(128, 128, tokens=140, page=16, layers=2, heads=2),
    "llama, four bits": Case(128, 128, form="int4", tokens=70, page=16, layers=1),
    "llama, exact": Case(128, 128, form="exact", tokens=140, page=16),
    "small heads, fewer rows": Case(64, 64, FP16, tokens=150, rows=132, layout="HND", page=16, layers=1),
    "latent": Case(576, 0, tokens=70, page=64, layers=1, heads=1),
    "channels dropped": Case(80, 64, FP16, tokens=70, channels=50, page=16, layers=1),
    "channels dropped, exact": Case(80, 64, form="exact", tokens=70, channels=50, page=16, layers=1),
    "fp8 cache": Case(128, 128, FP8[0], tokens=70, page=16, layers=1, heads=1),
    "float32, no rotation": Case(64, 40, FP32, tokens=70, rotate=False, page=16, layers=1),
    "by value": Case(128, 64, form="fp8", tokens=70, page=16, layers=1, channels=100),
    "misaligned": Case(24, 20, tokens=70, page=4, pad=3, guard=61, places=False, heads=1),
}
# Lockstep for every case. Every order for those whose warps share memory or store into one row.
ORDERED = ("llama", "small heads, fewer rows", "channels dropped", "channels dropped, exact", "by value")
RUNS = [(name, "together") for name in CASES] + [(name, order) for name in ORDERED for order in ORDERS[1:]]


def clean(launches: list[Launch]) -> None:
    found = [f"{launch.name}: {problem}" for launch in launches for problem in launch.problems]
    assert not found, "\n".join(found)


def memory(context: Context) -> list[torch.Tensor]:
    return [*context.world.k_caches, *(context.world.v_caches or [])]


@pytest.mark.parametrize(("name", "order"), RUNS)
def test_payloads_agree_with_the_reference(name: str, order: str) -> None:
    case = CASES[name]
    context = Context(case)
    before = context.world.snapshot()
    rooms = []
    for backend in ("torch", "triton"):
        room, payload = context.payload()
        with emulating(order, memory(context)) as launches:
            context.encode(backend, payload)
        clean(launches)
        rooms.append(room)
    assert torch.equal(*rooms)
    context.world.assert_untouched(before)
    coded = case.form != "exact"
    assert [launch.name for launch in launches] == ["gather_kernel"] + ["quantize_kernel"] * coded
    ends = [section.offset + section.nbytes for section in context.layout.sections]
    for to, nbytes in (("places", ends[-1]), ("front", ends[-2] if case.form == "int8" else ends[-1])):
        worlds = []
        for backend in ("torch", "triton"):
            target = Context(replace(case, seed=1))
            with emulating(order, memory(target)) as launches:
                target.decode(backend, payload[:nbytes], to)
            clean(launches)
            worlds.append(target.world)
        worlds[1]._assert_equal(worlds[0].buffers)


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_memory_beyond_two_to_the_31_elements(form: str) -> None:
    """Block ids times strides that only 64 bits hold."""
    pages, stride = 3, 2**31 + 64  # elements between pages
    room = torch.empty(2 * stride + 16 * 128, dtype=BF16)  # 8 GB of addresses; memory only where it is touched
    pool = room.as_strided((pages, 16, 2, 64), (stride, 128, 64, 1))
    pool.copy_(torch.randn(pages, 16, 2, 64))
    small, table = pool.clone(), torch.tensor([2, 0, 1], dtype=torch.int32)
    layout = PayloadLayout(layers=1, heads=2, dim=64, v_dim=0, dtype=BF16, tokens=45, rows=45, form=form, places=False)
    write, read = (getattr(ops, name) for name in (
        ("gather_rows", "scatter_rows") if form == "exact" else ("quantize_rows", "dequantize_rows")
    ))  # fmt: skip
    payloads = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2)]
    write(small, None, table, None, layout, out=payloads[0], backend="torch")
    with emulating("together", [pool]) as launches:
        write(pool, None, table, None, layout, out=payloads[1], backend="triton")
        pool.zero_()
        read(payloads[1], layout, pool, None, table, backend="triton")
    clean(launches)
    assert torch.equal(*payloads)
    small.zero_()
    read(payloads[0], layout, small, None, table, backend="torch")
    assert torch.equal(bits(pool.contiguous()), bits(small))
    del room


# ------------------------------------------------------------------------------------------------ planted bugs


def problems(name: str, kernel: str, rewrite: Callable[[str], str], order: str = "together") -> set[str]:
    """What is reported of all launches when one kernel's code is changed."""
    context = Context(CASES[name])
    _, payload = context.payload()
    context.encode("torch", payload)

    def of_kernel(found: str, ptx: str) -> str:
        if found != kernel:
            return ptx
        changed = rewrite(ptx)
        assert changed != ptx
        return changed

    with emulating(order, memory(context), of_kernel) as launches:
        if kernel in ("gather_kernel", "quantize_kernel"):
            context.encode("triton", payload)
        else:
            context.decode("triton", payload)
    return {problem.kind for launch in launches for problem in launch.problems}


def without_barriers(ptx: str) -> str:
    return re.sub(r"^\s*bar\.sync.*$", "", ptx, flags=re.M)


@pytest.mark.parametrize(("name", "kernel", "order"), [
    *(("by value", "dequantize_kernel", order) for order in ORDERS),
    ("channels dropped, exact", "scatter_kernel", "together"),  # in other orders it loses the ids of its blocks too
])  # fmt: skip
def test_clearing_rows_without_its_barrier_is_reported(name: str, kernel: str, order: str) -> None:
    assert "write races in global memory" in problems(name, kernel, without_barriers, order)


def test_lost_barriers_of_codes_are_reported() -> None:
    found = problems("llama", "quantize_kernel", without_barriers)
    assert found & {"read races with a write of shared memory", "write races in shared memory"}


@pytest.mark.parametrize(("kernel", "instruction"), [
    ("gather_kernel", r"ld\.global"), ("gather_kernel", r"st\.global"), ("quantize_kernel", r"st\.global"),
    ("scatter_kernel", r"ld\.global"), ("dequantize_kernel", r"st\.global"),
])  # fmt: skip
def test_a_lost_mask_is_reported(kernel: str, instruction: str) -> None:
    """The second tile has 6 rows of 64, whose addresses are past the payload's end or have no block."""
    name = "llama, exact" if kernel in ("gather_kernel", "scatter_kernel") else "llama"
    assert problems(name, kernel, lambda ptx: re.sub(rf"@%p\d+ ({instruction})", r"\1", ptx))
