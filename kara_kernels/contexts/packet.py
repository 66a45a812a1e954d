"""Progressive packets: a context's payload behind a versioned header, checked section by section.

A packet is a header and then the sections of a :class:`~kara_kernels.PayloadLayout`. A prefix of a packet that ends
with a section is a packet too, of a harder compression. So a packet shrinks by cutting bytes off its end: nothing is
read and nothing is encoded again. The header describes the whole payload and does not change when a packet is cut.

    bytes 0..7     magic, b"KARAKV\\r\\n"
    bytes 8..9     version, little-endian as all numbers
    bytes 10..11   0
    bytes 12..15   length of the description
    bytes 16..19   CRC-32 of the description
    bytes 20..23   0
    from 24 on     the description: JSON in UTF-8 with sorted keys and no spaces, then zeros up to a multiple of 64
    then           sections; the last 8 bytes of each are a checksum and the section's number

A section's checksum is the CRC-32 of its other bytes, begun with the description's. A section therefore belongs to one
packet and one place in it. Bytes between arrays are zero. Checksums find damage. They do not stop a forger.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import crc32_of_ranges
from ..payload import ALIGNMENT, TRAILER, PayloadLayout, Section

MAGIC, VERSION = b"KARAKV\r\n", 1
_FIXED = struct.Struct("<8sHHIII")
_TRAILER = struct.Struct("<II")
MOST_DESCRIPTION = 1 << 16
"""Bytes of the longest description that is read."""


class PacketError(ValueError):
    """A packet that cannot be used. Its context has to be computed again."""


class NotAPacket(PacketError):
    """Other bytes than a packet's."""


class UnknownVersion(PacketError):
    """A packet of another version of this format."""


class TruncatedPacket(PacketError):
    """A packet that does not end with a section, or lacks its first rows."""


class DamagedPacket(PacketError):
    """A header or a section whose checksum does not fit, or a description that contradicts itself."""


class ForeignPacket(PacketError):
    """An intact packet of another model, context or cache."""


@dataclass(frozen=True)
class Header:
    """What a packet says about itself.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    model: str
    """Names whatever makes rows differ: weights, revision, adapters, tensor-parallel rank."""
    context: str
    """Names the context, for example by the hash of its last full block."""
    layout: PayloadLayout
    scorer: str = ""
    """What ordered the rows."""

    def __post_init__(self) -> None:
        for name in ("model", "context", "scorer"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
            if len(value.encode("utf-8", "surrogatepass")) > 1024 or not value.isprintable():
                raise ValueError(f"{name}: expected printable text of at most 1024 bytes, got {value[:40]!r}")
        if not isinstance(self.layout, PayloadLayout):
            raise TypeError(f"layout: expected a PayloadLayout, got {type(self.layout).__name__}")

    @functools.cached_property
    def description(self) -> bytes:
        fields: dict[str, Any] = dataclasses.asdict(self.layout)
        fields["dtype"] = str(self.layout.dtype).removeprefix("torch.")
        fields.update(model=self.model, context=self.context, scorer=self.scorer)
        fields["sections"] = [[s.kind, s.grade, s.rows, s.nbytes] for s in self.layout.sections]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @functools.cached_property
    def checksum(self) -> int:
        return zlib.crc32(self.description)

    def to_bytes(self) -> bytes:
        """The header, whose length is a multiple of 64."""
        text = self.description
        fixed = _FIXED.pack(MAGIC, VERSION, 0, len(text), self.checksum, 0)
        return fixed + text + bytes(-(len(fixed) + len(text)) % ALIGNMENT)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the header."""
        return -(-(_FIXED.size + len(self.description)) // ALIGNMENT) * ALIGNMENT

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """Every compression that a packet with this header can be cut to, from the hardest on."""
        layout, found = self.layout, []
        for count, section in enumerate(layout.sections, start=1):
            if section.kind not in ("channels", "exact"):
                nbytes = self.nbytes + section.offset + section.nbytes
                exact = layout.layers * layout.heads * (layout.dim + layout.v_dim) * layout.dtype.itemsize
                rows, finer = layout.rows_in(count), layout.rows_in(count, "residual")
                found.append(Step(count, nbytes, nbytes / (exact * layout.tokens), rows, finer))
        return tuple(found)

    @staticmethod
    def read(data: bytes | memoryview) -> Header:
        """The header at the start of ``data``.

        Raises:
            NotAPacket, UnknownVersion, TruncatedPacket, DamagedPacket: saying what is wrong.
        """
        if len(data) < _FIXED.size:
            raise NotAPacket(f"header: expected at least {_FIXED.size} bytes, got {len(data)}")
        magic, version, zero, length, checksum, zero_too = _FIXED.unpack(data[: _FIXED.size])
        if magic != MAGIC:
            raise NotAPacket(f"magic: expected {MAGIC!r}, got {bytes(magic)!r}")
        if version != VERSION:
            raise UnknownVersion(f"version: expected {VERSION}, got {version}")
        end = _FIXED.size + length
        padded = -(-end // ALIGNMENT) * ALIGNMENT
        if length > MOST_DESCRIPTION:
            raise DamagedPacket(f"description: expected at most {MOST_DESCRIPTION} bytes, got {length}")
        if len(data) < padded:
            raise TruncatedPacket(f"header: expected {padded} bytes, got {len(data)}")
        text = bytes(data[_FIXED.size : end])
        if zlib.crc32(text) != checksum or zero or zero_too or any(data[end:padded]):
            raise DamagedPacket(f"description: expected checksum {checksum:#010x}, got {zlib.crc32(text):#010x}")
        try:
            header = _described(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedPacket(f"description: expected the fields of a header, got {error}") from None
        if header.description != text:
            raise DamagedPacket("description: expected one that agrees with itself, got other sections or fields")
        return header


@dataclass(frozen=True)
class Step:
    """One of the compressions that a packet can be cut to."""

    sections: int
    nbytes: int
    """Of the packet, with its header."""
    ratio: float
    """``nbytes`` relative to the context's rows in the cache's dtype."""
    rows: int
    """Rows of every layer and head."""
    finer: int
    """How many of them have 8 bits or more, with the forms ``"int8"`` and ``"int4"``; the others have 4."""


def _described(fields: dict[str, Any]) -> Header:
    names = [field.name for field in dataclasses.fields(PayloadLayout)]
    shape = {name: fields[name] for name in names}
    dtype = getattr(torch, shape["dtype"])
    layout = PayloadLayout(**{**shape, "dtype": dtype})
    return Header(fields["model"], fields["context"], layout, fields["scorer"])


@dataclass(frozen=True)
class Packet:
    """A header, and the payload or a prefix of it."""

    header: Header
    payload: Tensor
    """uint8 ``[n]``, sealed, on the CPU or on a GPU."""

    @functools.cached_property
    def sections(self) -> int:
        return self.header.layout.held(len(self.payload))

    @property
    def step(self) -> Step:
        return next(step for step in self.header.steps if step.sections == self.sections)

    @property
    def nbytes(self) -> int:
        return self.header.nbytes + len(self.payload)

    def to_bytes(self) -> bytes:
        return self.header.to_bytes() + self.payload.cpu().numpy().tobytes()

    def cut(self, sections: int) -> Packet:
        """The packet's first ``sections`` sections, as a view.

        Raises ValueError for a number that is not one of ``header.steps`` or that the packet does not have.
        """
        known = [step.sections for step in self.header.steps if step.sections <= self.sections]
        if sections not in known:
            raise ValueError(f"sections: expected one of {known}, got {sections}")
        last = self.header.layout.sections[sections - 1]
        return Packet(self.header, self.payload[: last.offset + last.nbytes])

    def require(
        self, *, model: str | None = None, context: str | None = None, cache: dict[str, Any] | None = None
    ) -> None:
        """Raises ForeignPacket unless the packet has this model, this context and these fields of its layout
        (:meth:`PayloadLayout.shape_of`)."""
        wanted = {"model": model, "context": context}
        for name, value in wanted.items():
            if value is not None and getattr(self.header, name) != value:
                raise ForeignPacket(f"{name}: expected {value!r}, got {getattr(self.header, name)!r}")
        for name, value in (cache or {}).items():
            if getattr(self.header.layout, name) != value:
                raise ForeignPacket(f"{name}: expected {value}, got {getattr(self.header.layout, name)}")


def seal(header: Header, payload: Tensor) -> Packet:
    """Completes a payload that an operation wrote: zeroes between arrays, and a checksum at each section's end.

    ``payload`` is uint8 ``[n]`` and contiguous, whole or a prefix; it is changed in place. A GPU is waited for.
    """
    sections = header.layout.sections[: header.layout.held(len(payload))]
    between, trailers = _outside(sections)
    payload[between.to(payload.device)] = 0
    checksums = _checksums(header, sections, payload)
    data = b"".join(_TRAILER.pack(checksum, number) for number, checksum in enumerate(checksums))
    payload[trailers.to(payload.device)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(payload.device)
    return Packet(header, payload)


def _outside(sections: Sequence[Section]) -> tuple[Tensor, Tensor]:
    """Places of all bytes that belong to no array, and places of the checksums and numbers."""
    between, trailers = [np.empty(0, np.int64)], []
    for section in sections:
        done, last = section.offset, section.offset + section.nbytes - TRAILER
        for array in section.arrays.values():
            between.append(np.arange(done, section.offset + array.offset))
            done = section.offset + array.offset + array.nbytes
        between.append(np.arange(done, last))
        trailers.append(np.arange(last, last + TRAILER))
    return torch.from_numpy(np.concatenate(between)), torch.from_numpy(np.concatenate(trailers))


def _checksums(header: Header, sections: Sequence[Section], payload: Tensor) -> list[int]:
    ranges = [(section.offset, section.offset + section.nbytes - TRAILER) for section in sections]
    return crc32_of_ranges(payload, ranges, header.checksum)


def read_packet(data: bytes | memoryview | Tensor, *, sections: int | None = None, keep: bool = False) -> Packet:
    """A packet from bytes, into memory of its own of at most their length.

    Args:
        data: a packet, whole or cut. A uint8 tensor ``[n]``, on a GPU perhaps, is verified where it lies and kept.
        sections: reads only so many, as :meth:`Packet.cut` would leave.
        keep: the packet keeps ``data`` instead of a copy. It must be writable, at an address that 16 divides, and
            nobody may change it any more.

    Raises:
        PacketError: one of its kinds, saying what is wrong. No row of a packet with an error is returned.
    """
    if not isinstance(data, Tensor):
        data = memoryview(data).cast("B")
        header = Header.read(data)
    else:
        header = Header.read(data[: _header_length(data[: _FIXED.size].cpu().numpy().data)].cpu().numpy().data)
    steps = {step.nbytes: step for step in header.steps}
    if sections is not None:
        wanted = next((step for step in header.steps if step.sections == sections and step.nbytes <= len(data)), None)
        if wanted is None:
            raise TruncatedPacket(f"sections: expected {sections}, got a packet of {len(data)} bytes")
        data = data[: wanted.nbytes]
    if len(data) not in steps:
        raise TruncatedPacket(f"packet: expected a length among {sorted(steps)}, got {len(data)}")
    data = data[header.nbytes :]
    if not isinstance(data, Tensor):
        data = torch.frombuffer(data if keep else bytearray(data), dtype=torch.uint8)
    _verify(header, data)
    return Packet(header, data)


def _header_length(start: bytes | memoryview) -> int:
    """Bytes of the header that begins with ``start``, or as many as it takes to refuse it."""
    length = min(_FIXED.unpack(start)[3], MOST_DESCRIPTION) if len(start) == _FIXED.size else 0
    return -(-(_FIXED.size + length) // ALIGNMENT) * ALIGNMENT


def _verify(header: Header, payload: Tensor) -> None:
    sections = header.layout.sections[: header.layout.held(len(payload))]
    between, trailers = _outside(sections)
    outside = payload[torch.cat((trailers, between)).to(payload.device)].cpu()
    said, wrong = outside[: len(trailers)].numpy().tobytes(), between[outside[len(trailers) :] != 0]
    found = _checksums(header, sections, payload)
    for number, (section, trailer) in enumerate(zip(sections, _TRAILER.iter_unpack(said), strict=True)):
        if trailer != (found[number], number):
            raise DamagedPacket(
                f"section {number} ({section.kind}, grade {section.grade}): expected checksum {trailer[0]:#010x} of "
                f"section {trailer[1]}, got {found[number]:#010x}"
            )
    if len(wrong):
        number = sum(section.offset <= int(wrong[0]) for section in sections) - 1
        raise DamagedPacket(f"section {number}: expected zeros between its arrays, got other bytes")


def write_file(path: Path | str, packet: Packet) -> None:
    """Writes a packet to a temporary name beside ``path`` and renames it, so that no reader sees a part of it."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(packet.header.to_bytes())
            file.write(packet.payload.cpu().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def read_file(path: Path | str, *, sections: int | None = None) -> Packet:
    """Reads a packet's file, or the first ``sections`` of it. Raises OSError, and what :func:`read_packet` raises."""
    with Path(path).open("rb") as file:
        data = file.read(_FIXED.size)
        if sections is not None and len(data) == _FIXED.size:
            file.seek(0)
            data = file.read(_header_length(data))
            step = next((step for step in Header.read(data).steps if step.sections == sections), None)
            return read_packet(data + file.read(0 if step is None else step.nbytes - len(data)), sections=sections)
        return read_packet(data + file.read(), sections=sections)


def cut_file(path: Path | str, sections: int) -> int:
    """Cuts a packet's file to its first ``sections`` sections, without reading them. Returns its bytes.

    Raises OSError; what :meth:`Header.read` raises; ValueError for a number that is not one of the header's steps or
    that the file does not have.
    """
    with Path(path).open("r+b") as file:
        data = file.read(_FIXED.size + MOST_DESCRIPTION + ALIGNMENT)
        steps = Header.read(data).steps
        held = os.fstat(file.fileno()).st_size
        step = next((step for step in steps if step.sections == sections and step.nbytes <= held), None)
        if step is None:
            known = [step.sections for step in steps if step.nbytes <= held]
            raise ValueError(f"sections: expected one of {known}, got {sections}")
        file.truncate(step.nbytes)
        os.fsync(file.fileno())
    return step.nbytes
