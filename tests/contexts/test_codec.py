"""From a paged cache to a packet and back: dropping and quantising commute with cutting, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packets import Context

from kara_kernels.contexts.codec import decode, encode
from kara_kernels.contexts.packet import ForeignPacket, Packet, read_packet


def encoded(context: Context, **options: Any) -> Packet:
    options = {"rows": context.rows, "channels": context.channels, **options}
    return encode(context.k, context.v, context.table, context.rows.shape[-1], model="m", context="c", **options)


def rows_at(pool: list[torch.Tensor], table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``[L, H, R, D]`` of a pool in plain indexing."""
    page = pool[0].shape[1]
    return torch.stack([
        torch.stack([torch.stack([layer[table[t // page], t % page, h] for t in places[i, h].tolist()])
                     for h in range(layer.shape[2])])
        for i, layer in enumerate(pool)
    ])  # fmt: skip


@settings(max_examples=25)
@given(st.sampled_from(["exact", "fp8", "int8", "int4"]), st.integers(66, 300), st.booleans(), st.integers(0, 50))
def test_an_encoding_of_fewer_sections_is_a_cut(form: str, tokens: int, ordered: bool, seed: int) -> None:
    context = Context.random(tokens, layers=1, seed=seed)
    options: dict[str, Any] = {"form": form} | ({} if ordered else {"rows": None})
    whole = encoded(context, **options)
    for step in whole.header.steps:
        assert encoded(context, sections=step.sections, **options).to_bytes() == whole.to_bytes()[: step.nbytes]


@settings(max_examples=25)
@given(st.sampled_from(["exact", "fp8", "int8", "int4"]), st.integers(66, 300), st.integers(0, 50), st.data())
def test_rows_of_a_cut_are_rows_of_the_whole(form: str, tokens: int, seed: int, data: st.DataObject) -> None:
    """Dropping rows and cutting bits: each row is as the whole has it, or as four bits have it; the others are left."""
    context = Context.random(tokens, layers=2, seed=seed)
    whole = encoded(context, form=form)
    step = data.draw(st.sampled_from(whole.header.steps))
    found, full, four = context.empty(), context.empty(), context.empty()
    decode(whole.cut(step.sections), *found, context.table)
    decode(whole, *full, context.table)
    last_of_four = next(s for s in reversed(whole.header.steps) if s.finer <= 4 or form in ("exact", "fp8"))
    decode(whole.cut(last_of_four.sections), *four, context.table)
    finer = step.rows if form in ("exact", "fp8") else step.finer
    for half in (0, 1):
        for pool, (start, stop) in ((full, (0, finer)), (four, (finer, step.rows))):
            places = context.rows[..., start:stop]
            if stop > start:
                expected = rows_at(pool[half], context.table, places)
                assert torch.equal(rows_at(found[half], context.table, places), expected)
        if step.rows < tokens:
            assert (rows_at(found[half], context.table, context.rows[..., step.rows :]) == 1).all()


def test_to_the_front_takes_as_few_blocks_as_rows_need() -> None:
    context = Context.random(300)
    packet = encoded(context, form="exact").cut(2)
    rows = packet.step.rows
    found = context.empty()
    table = context.table[: -(-rows // 16)]
    decode(packet, *found, table, to="front")
    places = torch.arange(rows).expand(2, 2, -1)
    for half, pool in zip(found, (context.k, context.v), strict=True):
        assert torch.equal(rows_at(half, table, places), rows_at(pool, context.table, context.rows[..., :rows]))


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_sinks_stay_exact(form: str) -> None:
    context = Context.random(130)
    found = context.empty()
    decode(encoded(context, form=form).cut(2), *found, context.table)
    for half, pool in zip(found, (context.k, context.v), strict=True):
        places = context.rows[..., :4]
        assert torch.equal(rows_at(half, context.table, places), rows_at(pool, context.table, places))


def test_more_bits_lose_less() -> None:
    context = Context.random(512, dim=64, v_dim=64)
    lost = {}
    for form in ("exact", "int8", "int4", "fp8"):
        found = context.empty()
        decode(encoded(context, form=form), *found, context.table)
        lost[form] = [float((a[context.table].float() - b[context.table].float()).square().mean())
                      for a, b in zip(found[0] + found[1], context.k + context.v, strict=True)]  # fmt: skip
    assert max(lost["exact"]) == 0
    for int8, int4, fp8 in zip(lost["int8"], lost["int4"], lost["fp8"], strict=True):
        assert 0 < int8 * 100 < int4
        assert int8 * 2 < fp8


def test_one_layer_as_tensors_and_a_latent_cache() -> None:
    context = Context.random(100, layers=1, v_dim=0)
    packet = encode(context.k[0], None, context.table, 100, model="m", context="c", rows=context.rows[0])
    assert packet.to_bytes() == encoded(context).to_bytes()
    found = torch.ones_like(context.k[0])
    decode(read_packet(packet.to_bytes()), found, None, context.table, model="m", context="c")
    assert not torch.equal(found, torch.ones_like(found))


@pytest.mark.parametrize(("options", "change", "message"), [
    ({"model": "n"}, {}, "model: expected 'n', got 'm'"),
    ({"context": "d"}, {}, "context: expected 'd', got 'c'"),
    ({}, {"heads": 1}, "heads: expected 1, got 2"),
    ({}, {"dim": 16}, "dim: expected 16, got 8"),
    ({}, {"layers": 1}, "layers: expected 1, got 2"),
    ({}, {"v_dim": 0}, "v_dim: expected 0, got 6"),
    ({}, {"dtype": torch.float16}, "dtype: expected torch.float16, got torch.bfloat16"),
])  # fmt: skip
def test_another_cache_is_left_alone(options: dict[str, str], change: dict[str, Any], message: str) -> None:
    packet, other = encoded(Context.random(70)), Context.random(70, **change)
    found = other.empty()
    with pytest.raises(ForeignPacket, match=message):
        decode(packet, *found, other.table, **options)
    assert all((x == 1).all() for x in found[0] + (found[1] or []))


def test_a_cache_that_is_too_short_is_left_alone() -> None:
    context = Context.random(70)
    packet, found = encoded(context), context.empty()
    with pytest.raises(ValueError, match="block_table: expected blocks for 70 tokens, got 2 blocks of 16"):
        decode(packet, *found, context.table[:2])
    assert all((x == 1).all() for x in found[0] + (found[1] or []))
