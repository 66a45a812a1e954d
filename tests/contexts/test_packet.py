"""Packets: every prefix at a section's border is a packet, and whatever is not one is an error that says why."""

from __future__ import annotations

import functools
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from packets import Context, described, fuzz, mutated, valid

from kara_kernels.contexts import packet as packet_module
from kara_kernels.contexts.packet import (
    DamagedPacket,
    ForeignPacket,
    Header,
    NotAPacket,
    Packet,
    PacketError,
    TruncatedPacket,
    UnknownVersion,
    cut_file,
    read_file,
    read_packet,
    seal,
    write_file,
)
from kara_kernels.ops import checksum

PACKET = Context.random(200, layers=1).packet()
DATA = PACKET.to_bytes()


@st.composite
def packets(draw: st.DrawFn) -> tuple[Context, Packet]:
    tokens = draw(st.integers(2, 260))
    form = draw(st.sampled_from(["exact", "fp8", "int8", "int4"]))
    dtypes = [torch.bfloat16, torch.float16, torch.float32] + ([] if form == "fp8" else [torch.float8_e4m3fn])
    context = Context.random(
        tokens, layers=draw(st.integers(1, 2)), heads=draw(st.integers(1, 2)), dim=draw(st.sampled_from([2, 8, 24])),
        v_dim=draw(st.sampled_from([0, 2, 10])), page=draw(st.sampled_from([1, 16])),
        dtype=draw(st.sampled_from(dtypes)), channels=draw(st.sampled_from([None, 2])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    fields: dict[str, Any] = {"rows": draw(st.integers(1, tokens)), "places": draw(st.booleans())}
    if form != "exact":
        fields["exact_rows"] = draw(st.integers(0, min(5, fields["rows"] - 1)))
    return context, context.packet(form, **fields)


@settings(max_examples=60)
@given(packets())
def test_what_is_read_is_what_was_written(drawn: tuple[Context, Packet]) -> None:
    """At every border, and the bytes are what the header promised."""
    _, packet = drawn
    data = packet.to_bytes()
    assert len(data) == packet.nbytes == packet.header.steps[-1].nbytes
    for step in packet.header.steps:
        read = read_packet(data, sections=step.sections)
        assert read.header == packet.header
        assert read.step == step
        assert read.to_bytes() == data[: step.nbytes] == packet.cut(step.sections).to_bytes()
        assert read_packet(data[: step.nbytes]).to_bytes() == data[: step.nbytes]


def test_a_packet_may_keep_the_memory_that_it_is_read_from() -> None:
    data = bytearray(DATA)
    address = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    kept, copied = read_packet(memoryview(data), keep=True), read_packet(memoryview(data))
    assert kept.to_bytes() == copied.to_bytes() == DATA
    assert kept.payload.data_ptr() == address + kept.header.nbytes
    data[-20] ^= 1
    assert kept.to_bytes() != copied.to_bytes() == DATA
    with pytest.raises(DamagedPacket):
        read_packet(memoryview(data), keep=True)


@settings(max_examples=40)
@given(packets(), st.data())
def test_other_lengths_are_truncated_packets(drawn: tuple[Context, Packet], data: st.DataObject) -> None:
    whole = drawn[1].to_bytes()
    borders = {step.nbytes for step in drawn[1].header.steps}
    length = data.draw(st.integers(0, len(whole) + 70).filter(lambda n: n not in borders))
    short = (whole + bytes(70))[:length]
    with pytest.raises(TruncatedPacket if length >= 24 else NotAPacket, match=f"got (a packet of )?{length}"):
        read_packet(short)


def test_every_flipped_bit_is_found() -> None:
    """One bit of each byte; there is no byte that does not count."""
    for place in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(PacketError):
            read_packet(bytes(damaged))


def _with(place: int, new: bytes) -> bytes:
    return DATA[:place] + new + DATA[place + len(new) :]


def _other_text(change: Callable[[bytes], bytes]) -> bytes:
    text = PACKET.header.description
    return described(change(text)) + DATA[PACKET.header.nbytes :]


SECOND = PACKET.header.layout.sections[2]
OTHER = Context.random(200, layers=1, seed=1).packet()
OTHER = seal(replace(OTHER.header, context="another"), OTHER.payload)
WRONG: dict[str, tuple[bytes, type[PacketError], str]] = {
    "nothing": (b"", NotAPacket, "header: expected at least 24 bytes, got 0"),
    "another file": (b"PK\3\4" + DATA[4:], NotAPacket, r"magic: expected b'KARAKV\\r\\n', got b'PK"),
    "line ends converted": (DATA.replace(b"\r\n", b"\n", 1), NotAPacket, "magic"),
    "version": (_with(8, b"\2\0"), UnknownVersion, "version: expected 1, got 2"),
    "reserved": (_with(10, b"\1"), DamagedPacket, "description: expected checksum"),
    "length": (_with(12, struct.pack("<I", 2**31)), DamagedPacket, "at most 65536 bytes, got 2147483648"),
    "description": (_with(30, b"?"), DamagedPacket, "description: expected checksum"),
    "padding": (_with(PACKET.header.nbytes - 1, b"x"), DamagedPacket, "description: expected checksum"),
    "no fields": (_other_text(lambda text: b"{}"), DamagedPacket, "expected the fields of a header"),
    "a list": (_other_text(lambda text: b"[1]"), DamagedPacket, "expected the fields of a header"),
    "deep": (_other_text(lambda text: b"[" * 50_000), DamagedPacket, "expected the fields of a header"),
    "spaces": (_other_text(lambda text: text.replace(b",", b", ", 1)), DamagedPacket, "agrees with itself"),
    "another section": (_other_text(lambda text: text.replace(b'["rows",0,64', b'["rows",0,65')), DamagedPacket,
                        "agrees with itself"),
    "another head count": (_other_text(lambda text: text.replace(b'"heads":2', b'"heads":1')), DamagedPacket,
                           "agrees with itself"),
    "a dtype of none": (_other_text(lambda text: text.replace(b"bfloat16", b"save")), DamagedPacket,
                        "dtype: expected a torch.dtype"),
    "another context's name": (_other_text(lambda text: text.replace(b'"context":"context"', b'"context":"another"')),
                               DamagedPacket, r"section 0 \(exact, grade 0\)"),
    "another packet's section": (
        DATA[: PACKET.header.nbytes] + OTHER.payload.numpy().tobytes(),
        DamagedPacket, "section 0"),
    "a section": (_with(PACKET.header.nbytes + SECOND.offset + 5, b"\xff\xfe"), DamagedPacket,
                  r"section 2 \(rows, grade 1\): expected checksum"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_what_is_wrong(name: str) -> None:
    data, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        read_packet(data)


def test_two_sections_of_one_packet_that_changed_places() -> None:
    first, second = (s for s in PACKET.header.layout.sections if s.kind == "residual" and s.rows == 64 and s.grade < 2)
    data, start = bytearray(DATA), PACKET.header.nbytes
    spans = [slice(start + s.offset, start + s.offset + s.nbytes) for s in (first, second)]
    data[spans[0]], data[spans[1]] = data[spans[1]], data[spans[0]]
    with pytest.raises(DamagedPacket, match=r"section 5 \(residual, grade 0\): expected checksum .* of section 6"):
        read_packet(bytes(data))


def test_bytes_between_arrays_must_be_zero() -> None:
    """Otherwise a packet could carry what nothing checks, and two packets of one context would differ."""
    packet = Context.random(70, heads=1, layers=1, dim=2, v_dim=2).packet("int4")
    data, header = bytearray(packet.to_bytes()), packet.header
    section = header.layout.sections[1]
    arrays = list(section.arrays.values())
    gap = next(a.offset + a.nbytes for a, b in pairwise(arrays) if a.offset + a.nbytes < b.offset)
    start = header.nbytes + section.offset
    data[start + gap] = 1
    end = start + section.nbytes
    data[end - 8 : end - 4] = struct.pack("<I", zlib.crc32(data[start : end - 8], header.checksum))
    with pytest.raises(DamagedPacket, match="section 1: expected zeros between its arrays"):
        read_packet(bytes(data))


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_kernels_seal_and_verify_packets_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the bytes of the CPU's way, in memory that is kept."""
    header = Context.random(70, heads=1, layers=1).packet().header
    bytes_ = torch.full((header.layout.nbytes,), 0x5A, dtype=torch.uint8)
    expected = seal(header, bytes_.clone()).to_bytes()
    monkeypatch.setattr(checksum, "LANES", 256)
    monkeypatch.setattr(checksum, "WORDS", 4)
    monkeypatch.setattr(packet_module, "crc32_of_ranges", functools.partial(checksum.crc32_of_ranges, backend="triton"))
    assert seal(header, bytes_).to_bytes() == expected
    data = torch.tensor(list(expected), dtype=torch.uint8)
    assert read_packet(data).payload.data_ptr() == data[header.nbytes :].data_ptr()
    data[-20] ^= 4
    with pytest.raises(DamagedPacket, match=r"section \d+ \(residual, grade \d\): expected checksum "):
        read_packet(data)


@settings(max_examples=60)
@given(st.data())
def test_a_tensor_is_read_as_its_bytes(drawn: st.DataObject) -> None:
    """Whole, cut, damaged or something else: the same packet, or the same error."""
    data = drawn.draw(st.binary(max_size=80) | st.integers(0, len(DATA)).map(lambda n: DATA[:n]) | st.just(DATA))
    if drawn.draw(st.booleans()) and data:
        place = drawn.draw(st.integers(0, len(data) - 1))
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    sections = drawn.draw(st.none() | st.integers(1, 20))
    said: list[Any] = []
    for form in (data, torch.tensor(list(data), dtype=torch.uint8)):
        try:
            said.append(read_packet(form, sections=sections).to_bytes())
        except PacketError as error:
            said.append((type(error), str(error)))
    assert said[0] == said[1]


def test_what_an_operation_leaves_unwritten_does_not_reach_a_packet() -> None:
    layout = PACKET.header.layout
    rooms = [torch.full((layout.nbytes,), fill, dtype=torch.uint8) for fill in (0, 0xAB)]
    context = Context.random(200, layers=1)
    from kara_kernels import reference

    sealed = []
    for room in rooms:
        payload = reference.quantize_rows(context.k, context.v, context.table, context.rows, layout, out=room)
        sealed.append(seal(PACKET.header, payload).to_bytes())
    assert sealed[0] == sealed[1] == DATA


@pytest.mark.parametrize("name", ["model", "context", "dim"])
def test_foreign_packets_are_refused(name: str) -> None:
    PACKET.require(model="model", context="context", cache={"dim": 8, "dtype": torch.bfloat16})
    wanted: dict[str, Any] = {"cache": {"dim": 16}} if name == "dim" else {name: "other"}
    with pytest.raises(ForeignPacket, match=rf"{name}: expected ('other'|16), got ('{name}'|8)"):
        PACKET.require(**wanted)


@pytest.mark.parametrize(("field", "value", "error"), [
    ("model", 3, TypeError), ("context", "a\nb", ValueError), ("scorer", "x" * 1025, ValueError),
    ("layout", {}, TypeError),
    ("model", "\ud800", ValueError),
])  # fmt: skip
def test_headers_of_nonsense(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{field}: expected"):
        replace(PACKET.header, **{field: value})


def test_a_name_in_any_language() -> None:
    header = replace(PACKET.header, model="Qwen3 – 模型", scorer="\U0001f600")
    assert Header.read(header.to_bytes()) == header


def test_cutting_refuses_what_is_no_border() -> None:
    with pytest.raises(ValueError, match=r"sections: expected one of \[2, 3, .*\], got 1"):
        PACKET.cut(1)
    with pytest.raises(ValueError, match=r"got 9"):
        PACKET.cut(4).cut(9)
    with pytest.raises(TruncatedPacket, match="sections: expected 9, got a packet of"):
        read_packet(PACKET.cut(4).to_bytes(), sections=9)


# ------------------------------------------------------------------------------------------------------- files


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "context.kara"
    write_file(path, PACKET)
    assert path.read_bytes() == DATA
    assert read_file(path).to_bytes() == DATA
    hurried = PACKET.header.steps[1]
    assert read_file(path, sections=hurried.sections).to_bytes() == DATA[: hurried.nbytes]
    assert cut_file(path, hurried.sections) == hurried.nbytes
    assert path.read_bytes() == DATA[: hurried.nbytes]
    with pytest.raises(ValueError, match=f"got {len(PACKET.header.layout.sections)}"):
        cut_file(path, len(PACKET.header.layout.sections))
    with pytest.raises(TruncatedPacket):
        read_file(path, sections=len(PACKET.header.layout.sections))
    assert [entry.name for entry in tmp_path.iterdir()] == ["context.kara"]


def test_reading_the_start_of_a_file_reads_no_more(tmp_path: Path) -> None:
    """The rest may even be damaged."""
    step = PACKET.header.steps[0]
    path = tmp_path / "context.kara"
    path.write_bytes(DATA[: step.nbytes] + b"rubbish")
    assert read_file(path, sections=step.sections).to_bytes() == DATA[: step.nbytes]
    with pytest.raises(TruncatedPacket):
        read_file(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "context.kara"
    write_file(path, PACKET)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, OTHER)
    assert path.read_bytes() == DATA
    assert [entry.name for entry in tmp_path.iterdir()] == ["context.kara"]


def test_a_reader_during_a_write_gets_the_old_packet(tmp_path: Path) -> None:
    path = tmp_path / "context.kara"
    write_file(path, PACKET)
    with path.open("rb") as old:
        write_file(path, OTHER)
        assert old.read() == DATA
    assert path.read_bytes() == OTHER.to_bytes()


@pytest.mark.parametrize("data", [b"", b"KARA", DATA[:30], described(b"{}"), b"x" * 100])
def test_files_that_are_no_packets(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "context.kara"
    path.write_bytes(data)
    for read in (lambda: read_file(path), lambda: read_file(path, sections=2), lambda: cut_file(path, 2)):
        with pytest.raises(PacketError):
            read()
    assert path.read_bytes() == data


# ------------------------------------------------------------------------------------------------------ fuzzing


def test_the_reader_survives_damage() -> None:
    """Of ten thousand damaged packets, what is read is undamaged. The module of packets reads a million."""
    found = fuzz(10_000, 0, valid())
    assert set(found) == {"DamagedPacket", "NotAPacket", "TruncatedPacket", "UnknownVersion", "equal"}
    assert found["equal"] < 200


def test_damage_makes_the_reader_allocate_no_more_than_the_data() -> None:
    import random

    draw, whole = random.Random(1), [packet.to_bytes() for packet in valid()]
    tracemalloc.start()
    try:
        for _ in range(1500):
            damaged = mutated(draw.choice(whole), draw)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                kept = len(read_packet(damaged).payload)
            except PacketError:
                kept = 0
            assert kept <= len(damaged)
            # Python objects of a parsed description take some 30 bytes for each of its bytes.
            assert tracemalloc.get_traced_memory()[1] - before <= 32 * min(len(damaged), 1 << 16) + (1 << 18)
    finally:
        tracemalloc.stop()
