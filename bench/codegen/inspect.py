"""Facts of one compiled kernel, read from its machine code: SASS on NVIDIA, the assembly of the code object on AMD."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from bench.compile_only import SHARED, Build

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Chip:
    """What limits how many warps a multiprocessor (AMD: compute unit) holds at a time."""

    warps: int
    blocks: int
    shared: int  # bytes of a multiprocessor
    reserved: int  # bytes of shared memory that each block takes beside its own
    registers: int  # of one of the four parts of a multiprocessor, in units of a warp: 32-bit words / 32 lanes
    granule: int  # registers of a thread are allocated in steps of so many


# CUDA C++ Programming Guide, table of technical specifications per compute capability; registers of a thread come in
# steps of 8 (256 a warp), 512 in each quarter. AMD: CDNA3 and CDNA4 instruction set guides: 512 vector registers a
# lane, accumulators among them, in steps of 8, at most 8 waves for each of four SIMDs.
CHIPS = {
    "sm_80": Chip(64, 32, 164 << 10, 1024, 512, 8),
    "sm_90": Chip(64, 32, 228 << 10, 1024, 512, 8),
    "sm_100": Chip(64, 32, 228 << 10, 1024, 512, 8),
    "sm_120": Chip(48, 24, 100 << 10, 1024, 512, 8),
    "gfx942": Chip(32, 16, 64 << 10, 0, 512, 8),
    "gfx950": Chip(32, 16, 160 << 10, 0, 512, 8),
}


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warp slots that programs of ``warps`` warps can fill."""
    chip = CHIPS[target]
    of_thread = -(-max(registers, 1) // chip.granule) * chip.granule
    by_registers = chip.registers // of_thread * 4 // warps
    by_shared = chip.shared // (shared + chip.reserved) if shared + chip.reserved else chip.blocks
    blocks = min(chip.warps // warps, chip.blocks, by_registers, by_shared)
    return blocks * warps / chip.warps


def facts(build: Build) -> dict[str, float | int | str]:
    """One row of the table, without the shape."""
    warps = build.kernel.metadata.num_warps
    resources = build.resources()
    code = sass(build.kernel.asm["cubin"]) if build.target.startswith("sm") else build.assembly
    of_code = read_sass(code) if build.target.startswith("sm") else read_gcn(code)
    return {
        "kernel": build.name, "target": build.target, "warps": warps, **resources, "shared": build.shared,
        "shared_limit": SHARED[build.target],
        "occupancy": occupancy(build.target, resources["registers"], build.shared, warps), **of_code,
    }  # fmt: skip


def sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout


def read_sass(text: str) -> dict[str, int]:
    """Counts and widths; accesses in bytes of a thread."""
    found = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
    opcodes = Counter(opcode for _, opcode in found)

    def count(pattern: str) -> int:
        return sum(times for opcode, times in opcodes.items() if re.match(pattern, opcode))

    def widest(pattern: str) -> int:
        return max((_width(opcode) for opcode in opcodes if re.match(pattern, opcode)), default=0)

    return {
        "load_bytes": widest(r"(LDG|LDGSTS)\."),
        "store_bytes": widest(r"STG\."),
        "tensor": count(r"(HMMA|HGMMA|QGMMA|UTC\w*MMA)\b"),
        "barriers": count(r"BAR\."),
        "atomics": count(r"(ATOM|ATOMG|RED|REDG)\."),  # REDUX is a sum over lanes, not one of memory
        "shared_atomics": count(r"ATOMS\."),
        "code_bytes": int(found[-1][0], 16) + 16 if found else 0,
    }


def sass_loops(text: str) -> list[list[str]]:
    """The opcodes of every loop, from a label to a branch back to it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcodes.append(found[1])
            back = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            if back and back[0] in labels:
                loops.append(opcodes[labels[back[0]] :])
    return loops


def _width(opcode: str) -> int:
    parts = opcode.split(".")
    return next((int(bits) // 8 for bits in ("256", "128", "64") if bits in parts),
                next((int(part[1:]) // 8 for part in parts if part in ("U8", "S8", "U16", "S16")), 4))  # fmt: skip


def read_gcn(text: str) -> dict[str, int]:
    opcodes = Counter(re.findall(r"^\s+([a-z]+_[\w]+)", text, re.M))

    def count(pattern: str) -> int:
        return sum(times for opcode, times in opcodes.items() if re.match(pattern, opcode))

    def widest(access: str) -> int:
        pattern = rf"(?:global|buffer|flat)_{access}_(\w+)"
        kinds = [found[1] for opcode in opcodes if (found := re.match(pattern, opcode))]
        return max((_gcn_width(kind) for kind in kinds), default=0)

    size = re.search(r"codeLenInByte = (\d+)", text)
    if size is None:
        raise ValueError("no code size in the AMD assembly")
    return {
        "load_bytes": widest("load"),
        "store_bytes": widest("store"),
        "tensor": count(r"v_mfma_"),
        "barriers": count(r"s_barrier"),
        "atomics": count(r"(global|buffer|flat)_atomic_"),
        "shared_atomics": count(r"ds_(add|sub|inc|dec|min|max|and|or|xor|cmpst)_"),
        "code_bytes": int(size[1]),
    }


def _gcn_width(kind: str) -> int:
    found = re.match(r"(?:lds_)?(?:(?:dword|b32)(?:x(\d))?|b(64|96|128)|[us]?(byte|short))", kind)
    if found is None:
        raise ValueError(f"access of unknown width {kind!r}")
    if found[2]:
        return int(found[2]) // 8
    return {"byte": 1, "short": 2}.get(found[3], 4 * int(found[1] or 1))
