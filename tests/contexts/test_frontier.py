"""The frontier of codecs: what they give back and how many bytes they count, against plain Python."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_transformers import make_model

from bench import tables
from bench.contexts import frontier, page, texts
from bench.contexts.codecs import Entry, entries
from bench.contexts.quantise import (
    NEWEST,
    SINKS,
    Channels,
    Context,
    Float8,
    Packet,
    Residual,
    coded,
    nibbles,
    packet_code,
    ranked,
    rotated,
)
from bench.quality.texts import Text
from bench.store import Store
from demos.screen import Screen
from kara_kernels.contexts.replay import Replay
from kara_kernels.scorers import Rows

pytestmark = pytest.mark.usefixtures("one_thread")


def context(rows: int = 48, dim: int = 8, layers: int = 2, heads: int = 2, seed: int = 0) -> Context:
    """Random rows in bfloat16, ranked by random scores."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).bfloat16().float()

    query, keys, values = some(layers, rows, heads, 2, dim), *(some(layers, heads, rows, dim) for _ in range(2))
    scores = torch.rand(layers, heads, rows, generator=draw)
    window = Rows(query, keys, values, 0, rows, dim**-0.5, 0, None)
    return Context(window, {"ours": lambda _: scores})


def hadamard(row: list[float]) -> list[float]:
    """By the signs of the matrix: -1 to the number of common bits."""
    n = len(row)
    return [sum(x * (-1) ** (i & j).bit_count() for j, x in enumerate(row)) / math.sqrt(n) for i in range(n)]


def bfloat16(x: float, up: bool) -> float:
    """The nearest bfloat16 that is not below (above) ``x``, by its eight binary digits."""
    if x == 0:
        return 0.0
    _, exponent = math.frexp(x)
    unit = Fraction(2) ** (exponent - 8)
    return float((math.ceil if up else math.floor)(Fraction(x) / unit) * unit)


def code(values: list[float], bits: int) -> list[float]:
    """A group after the packet's code, with exact fractions."""
    low, high = bfloat16(min(values), False), bfloat16(max(values), True)
    found = []
    for x in values:
        place = (Fraction(x) - Fraction(low)) / (Fraction(high) - Fraction(low)) if high > low else Fraction(0)
        if bits < 4:
            steps = 2**bits - 1
            share = Fraction(round(place * steps), steps)
        else:
            first = (round(place * 240) + 8) >> (8 - bits)  # the first bits
            cell = 2 ** (8 - bits)
            share = Fraction(first * cell + cell // 2 - 8, 240)
        found.append(float(Fraction(low) + (Fraction(high) - Fraction(low)) * share))
    return found


def across(rows: list[list[float]], bits: int) -> list[list[float]]:
    """A group of rows, coded per channel."""
    columns = [code([row[i] for row in rows], bits) for i in range(len(rows[0]))]
    return [[column[i] for column in columns] for i in range(len(rows))]


# ---- the code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 8, 64])
def test_a_rotation_is_hadamards_and_undoes_itself(dim: int) -> None:
    rows = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
    expected = torch.tensor([hadamard(row) for row in rows.double().tolist()])
    torch.testing.assert_close(rotated(rows), expected.float(), rtol=0, atol=1e-6 * dim)
    torch.testing.assert_close(rotated(rotated(rows)), rows, rtol=0, atol=1e-6 * dim)


def test_a_rotation_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="rows: expected a power of two of channels, got 48"):
        rotated(torch.zeros(1, 48))


@given(
    st.lists(st.integers(0, 240), max_size=20), st.integers(2, 8), st.sampled_from([0, -120, -240]), st.integers(-3, 3)
)
def test_integers_are_coded_exactly(inner: list[int], bits: int, low: int, power: int) -> None:
    values = [(low + x) * 2.0**power for x in (0, *inner, 240)]
    assert coded(torch.tensor(values), 0, bits).tolist() == pytest.approx(code(values, bits), rel=1e-6, abs=1e-30)


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20), st.integers(4, 8))
def test_the_error_is_at_most_half_a_cell_and_one_rounding(values: list[float], bits: int) -> None:
    rows = torch.tensor(values)
    width = packet_code(rows, 0)[2]
    error = (coded(rows, 0, bits) - rows).abs().max()
    assert error <= width * ((2 ** (8 - bits) // 2 + 0.5) / 240) + 1e-6 * rows.abs().max() + 1e-30


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20))
def test_bounds_are_the_nearest_bfloat16_outside(values: list[float]) -> None:
    _, low, width = packet_code(torch.tensor(values), 0)
    values = [x if abs(x) > 1e-37 else 0.0 for x in values]  # subnormal numbers have fewer digits
    if min(values) == torch.tensor(values).min() and max(map(abs, values)) > 1e-30:
        assert float(low) == pytest.approx(bfloat16(min(values), False), abs=1e-37)
        expected = bfloat16(max(values), True) - bfloat16(min(values), False)
        assert float(width) == pytest.approx(expected, rel=1e-6, abs=1e-37)


def test_fewer_bits_are_the_first_bits_of_more() -> None:
    rows = torch.randn(300, generator=torch.Generator().manual_seed(1))
    u, low, width = packet_code(rows, 0)
    assert (u >= 8).all()
    assert (u <= 248).all()
    for bits in range(4, 9):
        cell = 2 ** (8 - bits)
        first = torch.tensor([int(x) // cell for x in u])  # no other information
        expected = low + width * (first * cell + cell // 2 - 8) / 240
        torch.testing.assert_close(coded(rows, 0, bits), expected, rtol=0, atol=1e-6)


# ---- packets -------------------------------------------------------------------------------------------------


def order_of(scores: list[float]) -> list[int]:
    rows = range(len(scores))
    first = [i for i in rows if i < SINKS or i >= len(scores) - NEWEST]
    return first + sorted((i for i in rows if i not in first), key=lambda i: (-scores[i], i))


def test_ranks_begin_with_sinks_and_newest_and_ties_go_to_the_lowest_index() -> None:
    scores = [float(x) for x in random.Random(3).choices(range(5), k=60)]
    assert ranked(torch.tensor(scores)).tolist() == order_of(scores)


def packet(rows: Context, codec: Packet, layer: int, head: int) -> tuple[list[list[float]], list[list[float]]]:
    """A packet's rows of one head, in plain Python."""
    scores = rows.scorers["ours"](rows.window)[layer, head].tolist()
    order = list(range(len(scores))) if codec.order == "position" else order_of(scores)
    order = order[: round(codec.kept * len(order))]
    if codec.grades:
        size = math.ceil((len(order) - codec.exact) / codec.grades)
        starts = range(codec.exact, len(order), size)
        order = order[: codec.exact] + [i for start in starts for i in sorted(order[start : start + size])]
    keys, values = ([list(tensor[layer, head, i].tolist()) for i in order] for tensor in (rows.keys, rows.values))
    split = codec.exact + round(codec.better * len(order) / codec.group) * codec.group
    for first, last, (k_bits, v_bits) in (
        (codec.exact, split, codec.better_bits),
        (split, len(order), (codec.k_bits, codec.v_bits)),
    ):
        if v_bits < 16:
            values[first:last] = [code(row, v_bits) for row in values[first:last]]
        for start in range(first, last if k_bits < 16 else first, codec.group):
            span = slice(start, min(start + codec.group, last))
            turned = [hadamard(row) if "k" in codec.rotate else row for row in keys[span]]
            if codec.k_per == "row":
                turned = [code(row, k_bits) for row in turned]
            else:
                turned = across(turned, k_bits)
            keys[span] = [hadamard(list(row)) if "k" in codec.rotate else list(row) for row in turned]
    return keys, values


PACKETS = [
    Packet(4, 4, group=16),
    Packet(8, 6, 0.75, group=16),
    Packet(6, 4, 0.8, group=16, better=0.4, better_bits=(8, 5)),
    Packet(5, 4, group=64, rotate=""),
    Packet(4, 3, group=8, order="position", exact=0, rotate=""),
    Packet(4, 4, group=16, k_per="row"),
    Packet(16, 16, 0.9),
    Packet(4, 4, 0.9, group=8, grades=3),
    Packet(16, 8, group=16),
]


@pytest.mark.parametrize("codec", PACKETS, ids=repr)
def test_packets_give_back_what_plain_python_does(codec: Packet) -> None:
    rows = context()
    kept = codec(rows)
    for layer, head in itertools.product(range(2), range(2)):
        for name, found, expected in zip("kv", (kept.keys, kept.values), packet(rows, codec, layer, head), strict=True):
            # Where float32 rounds a tie the other way, one number is one step of 240 away: none is, with this seed.
            torch.testing.assert_close(found[layer, head], torch.tensor(expected), rtol=0, atol=5e-6, msg=name)


@pytest.mark.parametrize("codec", PACKETS, ids=repr)
@pytest.mark.parametrize("rows", [40, 77])
def test_packets_count_every_byte(codec: Packet, rows: int) -> None:
    layers, heads, dim = 1, 2, 8
    bits = 0
    for _ in range(layers * heads):
        kept = round(codec.kept * rows)
        split = codec.exact + round(codec.better * kept / codec.group) * codec.group
        groups = set()
        for row in range(kept):
            bits += 0 if codec.order == "position" else 16  # its index
            k_bits, v_bits = (codec.k_bits, codec.v_bits) if row >= split else codec.better_bits
            if row < codec.exact:
                k_bits = v_bits = 16
            bits += dim * (k_bits + v_bits)
            bits += 2 * 16 * (v_bits < 16)
            if k_bits < 16:
                first = codec.exact if row < split else split
                groups.add(row if codec.k_per == "row" else (row >= split, (row - first) // codec.group))
        bits += len(groups) * (1 if codec.k_per == "row" else dim) * 2 * 16
    assert codec(context(rows, dim, layers, heads)).nbytes * 8 == bits


def test_a_context_in_16_bits_has_ratio_one_without_indices() -> None:
    rows = context()
    assert Packet(16, 16, order="position")(rows).nbytes == rows.full_bytes == 2 * 2 * 2 * 2 * 48 * 8


def test_codes_of_four_bits_lie_two_a_byte() -> None:
    rows = context(rows=40, dim=4, layers=1, heads=1)
    order = order_of(rows.scorers["ours"](rows.window)[0, 0].tolist())[SINKS:]
    keys = [hadamard(rows.keys[0, 0, i].tolist()) for i in order]
    values = [rows.values[0, 0, i].tolist() for i in order]

    def high(group: list[float]) -> list[int]:
        low, top = bfloat16(min(group), False), bfloat16(max(group), True)
        return [(round(240 * (x - low) / (top - low)) + 8) // 16 for x in group]

    columns = [high(list(channel)) for channel in zip(*keys, strict=True)]
    expected = {"K": list(zip(*columns, strict=True)), "V": [tuple(high(row)) for row in values]}
    for part, data in nibbles(rows).items():
        assert list(data) == [a + 16 * b for row in expected[part] for a, b in zip(row[::2], row[1::2], strict=True)]


# ---- other codecs --------------------------------------------------------------------------------------------


def test_fp8_is_the_nearest_e4m3() -> None:
    table = [0.0] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    table += [m / 8 * 2.0**-6 for m in range(1, 8)]
    rows = context()
    found = Float8()(rows)
    assert found.nbytes * 2 == rows.full_bytes
    for x, y in zip(rows.keys.flatten().tolist(), found.keys.flatten().tolist(), strict=True):
        assert abs(abs(x) - abs(y)) == min(abs(abs(x) - t) for t in table)


def test_think_keeps_the_channels_of_greatest_product_of_norms() -> None:
    rows = context()
    found = Channels(0.5)(rows)
    assert found.nbytes == 2 * 2 * (48 * 2 * (4 + 8) + 1)
    assert torch.equal(found.values, rows.values)
    for layer, head in itertools.product(range(2), range(2)):
        query = rows.window.query[layer, -32:, head].tolist()  # [32][G][D]
        products = []
        for channel in range(8):
            norms = [math.sqrt(sum(token[g][channel] ** 2 for token in query)) for g in range(2)]
            key = math.sqrt(sum(row[channel] ** 2 for row in rows.keys[layer, head].tolist()))
            products.append(sum(norms) / 2 * key)
        best = sorted(range(8), key=lambda channel: -products[channel])[:4]
        expected = torch.zeros(48, 8)
        expected[:, best] = rows.keys[layer, head][:, best]
        assert torch.equal(found.keys[layer, head], expected)


def test_think_with_few_bits_stores_no_byte_of_other_channels() -> None:
    rows = context()
    found, whole = Channels(0.5, 4)(rows), Packet(4, 4, order="position", rotate="")(rows)
    held = (found.keys != 0).any(2, keepdim=True)
    assert torch.equal(found.keys, whole.keys * held)
    channel = 4 * 2 + 44 / 2 + 4  # sinks, nibbles, one group's bounds
    assert found.nbytes == whole.nbytes - 4 * (4 * channel - 1)


def test_residuals_are_differences_to_the_nearest_reference() -> None:
    rows = context(layers=1, heads=1)
    found = Residual(4, 4, 3)(rows)
    keys, values = (tensor[0, 0].tolist() for tensor in (rows.keys, rows.values))
    refs = list(range(4, 48, 4))
    others = [i for i in range(4, 48) if i not in refs]
    ref_keys = dict(zip(refs, across([keys[i] for i in refs], 8), strict=True))
    ref_values = {i: code(values[i], 8) for i in refs}

    def distance(i: int, r: int) -> float:
        return math.dist((*keys[i], *values[i]), (*ref_keys[r], *ref_values[r]))

    def minus(a: list[float], b: list[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    nearest = {i: min(refs, key=lambda r, i=i: distance(i, r)) for i in others}
    apart = across([minus(keys[i], ref_keys[nearest[i]]) for i in others], 4)
    for i, difference in zip(others, apart, strict=True):
        base = ref_values[nearest[i]]
        values[i] = minus(base, [-x for x in code(minus(values[i], base), 3)])
        keys[i] = minus(ref_keys[nearest[i]], [-x for x in difference])
    for i in refs:
        keys[i], values[i] = list(ref_keys[i]), ref_values[i]
    # Differences in float32 may fall on the other side of a step: 1/15 of a range of about 6 would be 0.4.
    torch.testing.assert_close(found.keys[0, 0], torch.tensor(keys), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.values[0, 0], torch.tensor(values), rtol=0, atol=1e-5)
    bounds = 4
    assert found.nbytes == (
        4 * 4 * 8 + len(refs) * (2 * 8 + bounds) + 8 * bounds  # sinks, references
        + len(others) * (8 * 7 // 8 + bounds + 2) + 8 * bounds
    )  # fmt: skip


def test_codecs_have_names_of_their_own_and_store_less_than_the_cache() -> None:
    rows, found = context(rows=96), entries()
    assert len({entry.name for entry in found}) == len(found)
    assert len({repr(entry.codec) for entry in found}) == len(found)
    rows.scorers = dict.fromkeys(frontier.SCORERS, rows.scorers["ours"])
    sizes = {entry.name: entry.codec(rows).nbytes / rows.full_bytes for entry in found}
    assert max(sizes.values()) < 1
    assert set(frontier.QUICK) <= set(sizes)


def test_the_entropy_of_codes() -> None:
    assert frontier.entropy(bytes(range(256))) == pytest.approx(1)
    assert frontier.entropy(bytes([0x01] * 10)) == pytest.approx(1 / 4)  # two codes, equally often: one bit of four
    assert frontier.entropy(bytes([0x33] * 10)) == 0


# ---- texts, runs and the page --------------------------------------------------------------------------------


def test_sixty_texts_of_six_kinds_in_turn() -> None:
    found = texts.shipped()
    assert len(found) >= 60
    assert tuple(text.kind for text in found[: frontier.QUICK_TEXTS]) == texts.KINDS
    assert len({text.name for text in found}) == len(found)
    assert len({text.text for text in found}) == len(found)
    # One token has hardly more than six characters in these texts.
    assert all(6 * (frontier.LENGTH + frontier.AHEAD) <= len(text.text) <= texts.LENGTH for text in found)


class Letters:
    """A byte tokenizer, for models without a vocabulary of words."""

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[byte % 61 for byte in text.encode()])


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``small_run()`` measures two codecs on two short texts and returns the records and how often a model read."""
    monkeypatch.setattr(frontier, "LENGTH", 64)
    monkeypatch.setattr(frontier, "AHEAD", 16)
    written = [
        Text(f"text-{i}", "code", f"for i in range({i}): print('some text that goes on', i * {i})\n" * 9)
        for i in (3, 7)
    ]
    monkeypatch.setattr(texts, "shipped", lambda: [*written, Text("short", "code", "too short")])
    monkeypatch.setattr(frontier, "QUICK", ("K8V8", "K4V4", "0.25 of the rows, K4V4"))
    reads, ask = [], Replay.ask

    def counted(self: Replay, *arguments: Any) -> Any:
        reads.append(1)
        return ask(self, *arguments)

    monkeypatch.setattr(Replay, "ask", counted)
    model = make_model()

    def go() -> tuple[list[dict[str, Any]], int]:
        reads.clear()
        run = frontier.Run(model, Letters(), Store(tmp_path / "store"), Screen(), quick=True)
        return run.records(), len(reads)

    return go


def test_a_run_measures_once_and_loses_less_with_more_bytes(small_run: Any) -> None:
    records, reads = small_run()
    assert reads == 2 * (3 + 3)  # before and after rounding, and to repeat; then every codec
    assert small_run() == (records, 0)
    for text in {record["text"] for record in records}:
        kl = {record["codec"]: record["kl"] for record in records if record["text"] == text and "kl" in record}
        assert 0 <= kl["K8V8"] < kl["K4V4"] < kl["0.25 of the rows, K4V4"]
    sizes = [record["bytes"] for record in records if record.get("codec") == "K4V4"]
    alike = context(64, 8)
    assert sizes == [Packet(4, 4)(alike).nbytes / alike.full_bytes] * 2


def test_kl_is_to_the_uncompressed_cache() -> None:
    full, seen = (torch.tensor([[p, 1 - p], [0.5, 0.5]]).log() for p in (0.9, 0.6))
    expected = (0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)) / 2  # two tokens, the second as it was
    assert frontier.Reader._kl(full, seen) == pytest.approx(expected, rel=1e-5)


def test_an_uncompressed_cache_loses_nothing() -> None:
    ids = torch.tensor(Letters()("The cache in sixteen bits, as a codec finds it. " * 30).input_ids[:960])
    reader = frontier.Reader(make_model(), ids, repeat=[1, 2, 3])
    everything = Packet(16, 16, order="position")
    found = frontier.fidelity(reader, Entry("all", "packet", everything))
    assert found == {"bytes": 1.0, "kl": pytest.approx(0, abs=1e-7), "top1": 1.0}
    assert reader.rounding > 0


def record(codec: str, family: str, size: float, *kls: float) -> list[dict[str, Any]]:
    return [
        {"text": f"text-{i}", "kind": "code", "codec": codec, "family": family, "bytes": size, "kl": kl, "top1": 0.9}
        for i, kl in enumerate(kls)
    ]


HEAD = {
    "model": "a model", "quick": False, "context": 768, "ahead": 192, "kara_kernels": "0.1.0", "torch": "2.13.0",
    "transformers": "5.19.0", "machine": "a machine",
}  # fmt: skip
RECORDS = [
    *record("K8V8", "packet", 0.54, 0.001, 0.003),
    *record("K4V4", "packet", 0.29, 0.01, 0.03),
    *record("dear", "change", 0.5, 0.02, 0.04),
    *record("int2", "plain", 0.14, 0.3, 0.5),
    *record("half", "rows", 0.5, 0.05, 0.05),
    *record("bfloat16", "cache", 1.0, 0.00001, 0.00003),
    {"text": "text-0", "kind": "code", "family": "coder", "part": "K", "coder": "zstd 3", "squeezed": 0.9,
     "megabytes_per_second": 123.4},
]  # fmt: skip


def test_the_page_has_the_figures_and_a_frontier_without_losers(tmp_path: Path) -> None:
    written = page.write(HEAD, RECORDS)
    sections = {part.splitlines()[0]: part for part in written.split("\n## ")[1:]}
    on_it = [line.split(" | ")[0].strip("| ") for line in sections["The frontier"].splitlines() if " | 0." in line]
    assert on_it == ["K8V8", "K4V4", "int2"]
    assert "| 1/2 | K8V8: 0.00200 at 0.540 | int2: 0.40000 at 0.140 | half: 0.05000 at 0.500 | dear: 0.03000" in written
    assert "| 1/4 | K4V4: 0.02000 at 0.290 | int2: 0.40000 at 0.140 |  |  |" in written
    changed = sections["K4V4 with one thing changed"]
    assert "| dear | 0.5000 | 0.03000 | 0.03000 | 90.0 % | 1.50 (1.33 to 2.00) |" in changed
    assert "| K | zstd 3 | 0.900 | 123 |" in written
    assert "bfloat16 alone costs a KL of\n0.000020." in written
    table = tmp_path / "frontier.csv"
    tables.write(table, RECORDS, **HEAD)
    assert page.write(*tables.read(table)) == written


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["--texts", "0"], "--texts: expected 1 or more, got 0"),
        (["--threads", "-1"], "--threads: expected 1 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused(given: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        frontier.parse(given)
    assert what in capsys.readouterr().err


def test_a_missing_gguf_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert frontier.main(["--model", str(tmp_path / "no.gguf"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"frontier: --model {tmp_path / 'no.gguf'}: no such file")
