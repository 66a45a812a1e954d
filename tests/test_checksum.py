"""CRC-32 of ranges: zlib against plain Python, and the kernel against zlib."""

import zlib
from itertools import pairwise

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from on_gpu import ON_GPU, lent

from kara_kernels import ops, reference
from kara_kernels.ops import checksum
from kara_kernels.ops.checksum import power, times

if not INTERPRETED:
    from ptx import ORDERS, emulating

crc32_of_ranges = lent(ops.crc32_of_ranges)


def by_hand(data: bytes, start: int) -> int:
    """Long division, a bit at a time."""
    rest = start ^ 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            odd = (rest ^ byte >> bit) & 1
            rest = rest >> 1 ^ 0xEDB88320 * odd
    return rest ^ 0xFFFFFFFF


def numbers(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)


@given(st.binary(max_size=40), st.integers(0, 2**32 - 1))
def test_zlib_divides_by_hand(data: bytes, start: int) -> None:
    whole = len(data) // 4 * 4
    held = torch.tensor(list(data), dtype=torch.uint8)
    assert reference.crc32_of_ranges(held, [(0, whole)], start) == [by_hand(data[:whole], start)]


@given(st.integers(0, 500), st.integers(0, 500))
def test_powers_multiply(a: int, b: int) -> None:
    assert times(power(a), power(b)) == power(a + b)
    assert times(power(0), power(b)) == power(b)


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_zeros_behind_a_range_multiply_by_a_power(rest: int, zeros: int) -> None:
    assert by_hand(bytes(zeros), rest ^ 0xFFFFFFFF) == times(rest, power(8 * zeros)) ^ 0xFFFFFFFF


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="needs the interpreter or a GPU")
@settings(max_examples=5)
@example(at=(0, 0, 1, 32, 33, 192), skip=0, start=0)  # nothing, one word, one tile, and a word more
@given(
    at=st.lists(st.integers(0, 192), min_size=2, max_size=6).map(sorted), skip=st.integers(0, 3),
    start=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_kernel_agrees_with_zlib(at: list[int], skip: int, start: int) -> None:
    """Tiles of 32 words. Ranges follow each other, in memory that begins and ends elsewhere."""
    data = numbers(4 * 200)[4 * skip :]
    ranges = [(4 * first, 4 * end) for first, end in pairwise(at)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum, "LANES", 16)
        patch.setattr(checksum, "WORDS", 2)
        found = crc32_of_ranges(data, ranges, start, backend="triton")
    held = data.numpy().tobytes()
    assert found == [zlib.crc32(held[first:end], start) for first, end in ranges]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("count", [4, 1 << 18, (1 << 18) + 4, 12345 * 4, 100 << 20])
def test_tiles_of_full_size_agree(count: int) -> None:
    data = numbers(count)
    ranges = [(0, count), (count // 8 * 4, count)]
    assert crc32_of_ranges(data, ranges, 7, backend="triton") == reference.crc32_of_ranges(data, ranges, 7)


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="runs the emulator: TRITON_INTERPRET=0")
@pytest.mark.parametrize(("lanes", "words", "warps"), [(64, 3, 2), (1024, 2, 8)])
def test_the_emulated_kernel_agrees_without_a_problem(
    monkeypatch: pytest.MonkeyPatch, lanes: int, words: int, warps: int
) -> None:
    monkeypatch.setattr(checksum, "LANES", lanes)
    monkeypatch.setattr(checksum, "WORDS", words)
    monkeypatch.setattr(checksum, "WARPS", warps)
    data = numbers(4 * lanes * words * 2 + 40)
    ranges = [(0, 8), (8, len(data))]
    for order in ORDERS:
        with emulating(order, [data]) as launches:
            assert ops.crc32_of_ranges(data, ranges, 99, backend="triton") == reference.crc32_of_ranges(
                data, ranges, 99
            )
        assert not [str(problem) for launch in launches for problem in launch.problems]


def test_no_ranges_have_no_checksums(backend: str) -> None:
    assert ops.crc32_of_ranges(numbers(8), [], backend=backend) == []


@pytest.mark.parametrize(
    ("data", "ranges", "start", "error", "message"),
    [
        (b"abcd", [], 0, TypeError, "data: expected a uint8 tensor, got bytes"),
        (torch.zeros(4), [], 0, TypeError, "data: expected a uint8 tensor, got torch.float32"),
        (numbers(8)[1:], [], 0, ValueError, "data: expected contiguous bytes at an address that 4 divides, got "),
        (numbers(8)[::2], [], 0, ValueError, "data: expected contiguous bytes at an address that 4 divides, got "),
        (numbers(8), [(0, 12)], 0, ValueError, r"ranges: expected multiples of 4 within 8 bytes, got 0\.\.12"),
        (numbers(8), [(0, 6)], 0, ValueError, r"ranges: expected multiples of 4 within 8 bytes, got 0\.\.6"),
        (numbers(8), [(4, 0)], 0, ValueError, r"ranges: expected multiples of 4 within 8 bytes, got 4\.\.0"),
        (numbers(8), [], 2**32, ValueError, "start: expected 0..4294967295, got 4294967296"),
    ],
)
def test_bad_arguments_are_refused(data, ranges, start, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        ops.crc32_of_ranges(data, ranges, start)
