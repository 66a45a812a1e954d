"""PTX text as basic blocks of instructions.

Triton emits a small, regular part of PTX: one entry, virtual registers, one dynamic shared array. Anything
else is an error.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """Bits of an integer or of a float, as an unsigned number of 64 bits."""

    bits: int


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; no base is an absolute address."""

    base: Register | None
    offset: int
    name: str = ""  # of a parameter


@dataclass(frozen=True)
class Label:
    name: str


Operand = Register | Immediate | Address | Label | tuple
DISCARD = Label("_")  # in place of a register of a vector: nothing is written


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    line: int  # in the PTX
    source: str  # "compact.py:45"


@dataclass
class Block:
    """A basic block. Only its last instruction may branch, wait or return."""

    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Program:
    name: str
    parameters: dict[str, str]  # name -> type, in order
    registers: dict[str, str]  # name -> type: pred, b16, b32 or b64
    blocks: list[Block]
    labels: dict[str, int]  # -> number of the block


class UnknownPTX(Exception):
    """Something that this emulator does not model."""


ENDS_BLOCK = ("bra", "bar", "barrier", "ret", "exit")


def parse(text: str) -> Program:
    name = re.search(r"\.entry\s+(\w+)\s*\(", text)
    if name is None:
        raise UnknownPTX("no entry in this PTX")
    header = text[name.end() : text.index(")", name.end())]
    parameters = {
        p[2]: p[1] for p in re.finditer(r"\.param\s+\.(\w+)(?:\s+\.ptr[^,]*?)?\s+(\w+)\s*(?:,|$)", header.strip())
    }
    if len(parameters) != header.count(".param"):
        raise UnknownPTX(f"parameters of {name[1]}: {header.strip()}")
    program = Program(name[1], parameters, {}, [Block()], {})
    source = "?"
    body = text.index("{", name.end())
    for line, raw in enumerate(text[body + 1 :].splitlines(), start=text.count("\n", 0, body) + 1):
        code, _, comment = raw.partition("//")
        code = code.strip()
        if code == "}":
            break
        if code.startswith(".loc"):
            where = re.search(r"(\w+\.py:\d+)", comment)
            source = where[1] if where else source
        elif code.startswith(".reg"):
            kind, prefix, count = re.fullmatch(r"\.reg \.(\w+)\s+(%[a-z]+)<(\d+)>;", code).groups()
            program.registers.update((f"{prefix}{number}", kind) for number in range(int(count)))
        elif label := re.fullmatch(r"(\$?\w+):", code):
            if program.blocks[-1].instructions:
                program.blocks.append(Block())
            program.labels[label[1]] = len(program.blocks) - 1
        elif code and not code.startswith((".pragma", "{", "}")):
            instruction = _instruction(code, line, source)
            program.blocks[-1].instructions.append(instruction)
            if instruction.opcode.split(".")[0] in ENDS_BLOCK:
                program.blocks.append(Block())
    return program


def _instruction(code: str, line: int, source: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);", code)
    if found is None:
        raise UnknownPTX(f"line {line}: {code}")
    negated, predicate, opcode, rest = found.groups()
    operands = tuple(_operand(part, line) for part in _split(rest))
    return Instruction(opcode, operands, Register(predicate) if predicate else None, negated == "!", line, source)


def _split(text: str) -> list[str]:
    """Splits at commas outside braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text) if part.strip()]


def _operand(text: str, line: int) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(part, line) for part in _split(text[1:-1]))
    if text.startswith("["):
        inside = text[1:-1].replace(" ", "")
        found = re.fullmatch(r"(%[a-z]+\d+|\w+)(?:\+(-?\w+))?", inside)
        if found is None:
            raise UnknownPTX(f"line {line}: address {text}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base.startswith("%"):
            return Address(Register(base), offset)
        if base == "global_smem":
            return Address(None, offset)
        if base.isdigit():
            return Address(None, int(base) + offset)
        return Address(None, offset, base)
    if text.startswith("%"):
        return Register(text)
    if text == "global_smem":
        return Immediate(0)
    if text.startswith("$"):
        return Label(text)
    if text == "_":
        return DISCARD
    if text.startswith(("0f", "0F")):
        return Immediate(int(text[2:], 16))
    if text.startswith(("0d", "0D")):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0) & (1 << 64) - 1)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return Immediate(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    if text in ("true", "false"):
        return Immediate(int(text == "true"))
    if parameter := re.fullmatch(r"\w+_param_(\d+)", text):  # its address, which a program chooses and then loads from
        return Immediate(8 * int(parameter[1]))
    raise UnknownPTX(f"line {line}: operand {text}")
