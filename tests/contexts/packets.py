"""Small packets of random rows, and a fuzzer of their reader: ``python tests/contexts/packets.py 1000000``."""

from __future__ import annotations

import json
import random
import struct
import sys
import time
import zlib
from dataclasses import dataclass

import torch

from kara_kernels import reference
from kara_kernels.contexts.packet import Header, Packet, PacketError, read_packet, seal
from kara_kernels.payload import PayloadLayout


@dataclass
class Context:
    """A paged cache with one context in it."""

    k: list[torch.Tensor]
    v: list[torch.Tensor] | None
    table: torch.Tensor
    rows: torch.Tensor
    channels: torch.Tensor | None

    @staticmethod
    def random(tokens: int, *, layers: int = 2, heads: int = 2, dim: int = 8, v_dim: int = 6, page: int = 16,
               dtype: torch.dtype = torch.bfloat16, channels: int | None = None, seed: int = 0) -> Context:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-tokens // page)

        def pool(width: int) -> list[torch.Tensor]:
            shape = (blocks + 2, page, heads, width)
            return [torch.randn(shape, generator=generator).to(dtype) for _ in range(layers)]

        def lists(count: int, of: int) -> torch.Tensor:
            orders = [torch.randperm(of, generator=generator)[:count] for _ in range(layers * heads)]
            return torch.stack(orders).view(layers, heads, count).int()

        return Context(
            pool(dim), pool(v_dim) if v_dim else None, torch.randperm(blocks + 2, generator=generator)[:blocks].int(),
            lists(tokens, tokens), None if channels is None else lists(channels, dim),
        )  # fmt: skip

    def empty(self) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Pools of ones, of the same shapes."""
        return [torch.ones_like(x) for x in self.k], None if self.v is None else [torch.ones_like(x) for x in self.v]

    def layout(self, form: str = "int8", **fields: object) -> PayloadLayout:
        tokens = self.rows.shape[-1]
        return PayloadLayout(
            layers=len(self.k), heads=self.k[0].shape[2], dim=self.k[0].shape[3],
            v_dim=0 if self.v is None else self.v[0].shape[3], dtype=self.k[0].dtype, tokens=tokens, form=form,
            **{"rows": tokens, "channels": None if self.channels is None else self.channels.shape[-1], **fields},
        )  # fmt: skip

    def packet(self, form: str = "int8", **fields: object) -> Packet:
        """Made with the reference, from the ops' own parts rather than through the codec."""
        layout = self.layout(form, **fields)
        gather = reference.gather_rows if form == "exact" else reference.quantize_rows
        rows = self.rows[..., : layout.rows].contiguous() if layout.places else None
        payload = gather(self.k, self.v, self.table, rows, layout, channels=self.channels)
        return seal(Header("model", "context", layout, "scorer"), payload)


def described(text: bytes) -> bytes:
    """A header around a description, with its right checksum and length."""
    fixed = struct.pack("<8sHHIII", b"KARAKV\r\n", 1, 0, len(text), zlib.crc32(text), 0)
    return fixed + text + bytes(-(len(fixed) + len(text)) % 64)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """``data`` with one kind of damage. Half of the time the description changes and its checksum is made right."""
    kind = draw.randrange(8)
    if kind < 4:
        length = struct.unpack_from("<I", data, 12)[0]
        text = bytearray(data[24 : 24 + length])
        if kind < 2:
            fields = json.loads(bytes(text))
            name = draw.choice(list(fields))
            fields[name] = draw.choice([
                None, 0, 1, -1, 2, 63, 64, 2**31 - 1, 2**31, 2**63, 1e300, True, "", "x", "float8_e5m2", "float32", [],
                {}, [[]], "exact", "int4", "fp8", 10**draw.randrange(400), fields[draw.choice(list(fields))],
            ])  # fmt: skip
            text = bytearray(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
        elif kind == 2:
            for _ in range(draw.randrange(1, 4)):
                text[draw.randrange(len(text))] = draw.randrange(256)
        else:
            text = bytearray(draw.choice([b"[" * 60_000, b"{}", b"", b"null", b"NaN", b"9" * 5000, b'{"a":' * 9000]))
        return described(bytes(text)) + data[24 + length + -(24 + length) % 64 :]
    changed = bytearray(data)
    if kind == 4:
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif kind == 5:
        del changed[draw.randrange(len(changed)) :]
    elif kind == 6:
        changed[draw.randrange(len(changed)) :] = draw.randbytes(draw.randrange(200))
    else:
        start, size = draw.randrange(len(changed)), draw.randrange(1, 300)
        changed[start : start + size] = changed[draw.randrange(len(changed)) :][:size]
    return bytes(changed)


def valid() -> list[Packet]:
    """Packets of each form, small enough to read ten thousand times a second."""
    small = Context.random(130, layers=1, heads=1)
    narrow = Context.random(70, layers=1, heads=1, v_dim=0, channels=4)
    return [small.packet(form) for form in ("int8", "int4", "fp8", "exact")] + [narrow.packet("int8", rows=66)]


def fuzz(count: int, seed: int, packets: list[Packet]) -> dict[str, int]:
    """Reads ``count`` damaged packets. Returns how many gave which error, or none (``"equal"``).

    Whatever is read without an error must be a prefix of the undamaged packet or, where only the description changed
    into another valid one, fail at a section. Anything else raises AssertionError here.
    """
    draw, found = random.Random(seed), {}
    whole = [packet.to_bytes() for packet in packets]
    for _ in range(count):
        data = draw.choice(whole)
        damaged = mutated(data, draw)
        try:
            packet = read_packet(damaged)
        except PacketError as error:
            name = type(error).__name__
        else:
            name = "equal"
            assert packet.to_bytes() == damaged, "something else was read"
            assert any(good.startswith(damaged) for good in whole), "damage was not found"
        found[name] = found.get(name, 0) + 1
    return found


if __name__ == "__main__":
    wanted, begun, total = int(sys.argv[1]), time.time(), {}
    good = valid()
    for batch in range(0, wanted, 10_000):
        for kind, times in fuzz(min(10_000, wanted - batch), batch, good).items():
            total[kind] = total.get(kind, 0) + times
        done = batch + 10_000
        left = (time.time() - begun) * (wanted - done) / done
        print(f"\r{done:,} of {wanted:,}, {left:.0f} s left", end="", file=sys.stderr)
    print(f"\n{wanted:,} inputs in {time.time() - begun:.0f} s: {dict(sorted(total.items()))}")
