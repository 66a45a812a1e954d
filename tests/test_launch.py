"""Launchers called directly: queries read in place by row, layers scored in slices, frontiers.

Interpreted, or with TRITON_INTERPRET=0 as compiled code in the emulator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import INTERPRETED
from worlds import Plan, Sequenced, World, allowed_error, dense_scores

from kara_kernels import compress_window
from kara_kernels.arguments import ScoreArguments, Windows
from kara_kernels.ops.compact import launch_compact
from kara_kernels.ops.score import launch_score, plan_score
from kara_kernels.options import Scoring
from kara_kernels.paged import Layers, PagedCache

if not INTERPRETED:
    from ptx import emulating

MIXED = (Sequenced(start=3, tail=10), Sequenced(start=9, lacking=2), Sequenced(start=0, tail=0))


@contextmanager
def device(memory: Iterable[torch.Tensor]) -> Iterator[None]:
    """Runs the launches inside and checks that the emulator reports no problem."""
    if INTERPRETED:
        yield
        return
    with emulating("together", memory) as launches:
        yield
    assert not [str(problem) for launch in launches for problem in launch.problems]


def partials_of(world: World, queries: Layers, layers: slice = slice(None), rows: torch.Tensor | None = None,
                attention: str = "bidirectional", norms: bool = False) -> torch.Tensor:  # fmt: skip
    """Partial rows of some layers, launched as in `compress_window`. NaN if nothing was written."""
    plan, cache = world.plan, PagedCache(world.k_caches, world.v_caches)
    first, last, _ = layers.indices(plan.layers)
    k_scale = torch.linspace(0.5, 1.5, plan.layers * plan.heads).view(plan.layers, plan.heads)
    given = ScoreArguments(
        cache=cache, block_tables=world.block_tables, window=plan.window, many=True, window_starts=world.window_starts,
        seq_lens=world.seq_lens, protected_lens=world.protected_lens, query=queries, query_rows=rows,
        scoring=Scoring(attention=attention, value_norm=norms), scale=0.125, k_scale=k_scale,
    )  # fmt: skip
    with device([*queries, *world.k_caches, *world.v_caches]):
        config, partial = plan_score(given)
        partials = torch.full((last - first, len(plan.sequences), plan.heads, partial.tiles, plan.window), torch.nan)
        launch_score(partials, given, config, partial, first)
    return partials


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.bfloat16), (24, torch.float32)])  # whole, streamed
@pytest.mark.parametrize("stacked", [True, False])
def test_queries_are_read_in_place(attention: str, dim: int, dtype: torch.dtype, stacked: bool) -> None:
    """Queries read by row give the same bits as gathered queries, whatever lies around them."""
    world = World(Plan(MIXED, 2, 2, 3, 40, 30, dim, dim, 8, dtype=dtype, query_dtype=dtype)).give_values()
    room = torch.full((2, 101, 6, dim), torch.nan, dtype=dtype)
    rows = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:90].view(3, 30).int()
    for layer, query in enumerate(world.query):
        room[layer, rows.long()] = query
    wide = torch.full((3, 35), 100, dtype=torch.int32)
    wide[:, 2:32] = rows
    ring = Layers("query", room[:, None] if stacked else [layer[None] for layer in room])
    expected = partials_of(world, Layers("query", world.query), attention=attention)
    assert expected[:, 0].isfinite().all()
    assert expected[:, 1].isnan().all()
    found = partials_of(world, ring, rows=wide[:, 2:32], attention=attention)
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("stacked", [True, False])
def test_layers_may_be_walked_in_slices(stacked: bool) -> None:
    world = World(Plan(MIXED, 5, 2, 2, 64, 20, 64, 64, 8, "stacked" if stacked else "NHD")).give_values()
    queries = Layers("query", torch.stack(world.query) if stacked else world.query)
    at_once = partials_of(world, queries, norms=True)
    walked = [partials_of(world, queries, part, norms=True) for part in (slice(0, 2), slice(2, 4), slice(4, 5))]
    assert torch.equal(torch.cat(walked).nan_to_num(-1), at_once.nan_to_num(-1))
    assert not torch.equal(walked[0].nan_to_num(-1), walked[1].nan_to_num(-1))


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("protected", [True, False])
def test_frontiers(starts: bool, protected: bool) -> None:
    """The end of the kept rows. For a skipped sequence it is the protected length, at least zero."""
    window, keep = 8, 3
    lengths, given = torch.tensor([20, 12, 9, 30]).int(), torch.tensor([5, 6, -7, 21]).int()
    begin = torch.tensor([5, 4, 0, 22]).int()
    pool = torch.zeros(16, 8, 1, 16)
    kept = torch.tensor([[0, 3, 7], [-1] * 3, [-1] * 3, [0, 1, 2]]).int()[None, :, None]
    new_lens, frontiers = torch.full((2, 4), -9, dtype=torch.int32)
    windows = Windows(
        cache=PagedCache(pool[None]), block_tables=torch.arange(16).int().view(4, 4), window=window, many=True,
        window_starts=begin if starts else None, seq_lens=lengths, protected_lens=given if protected else None,
    )  # fmt: skip
    with device([pool]):
        launch_compact(new_lens, frontiers, windows, kept)
    alone = [6, 0] if protected else [0, 0]
    first = begin if starts else lengths - window
    assert frontiers.tolist() == [int(first[0]) + keep, *alone, int(first[3]) + keep]
    assert new_lens.tolist() == [15, 12, 9, 25]


TYPES = [
    (torch.bfloat16, torch.float8_e4m3fn), (torch.float8_e4m3fn, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16), (torch.float8_e4m3fn, torch.uint8), (torch.uint8, torch.int8),
]  # fmt: skip


WINDOWS = [(3, 27), (1, 25)]


@pytest.mark.parametrize(("k_dtype", "v_dtype"), TYPES)
def test_keys_and_values_of_different_types(k_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    """Each cache moves its own bytes. Scores use the keys of one and the norms of the other."""
    generator = torch.Generator().manual_seed(0)

    def pool(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(2, 9, 8, 2, 16, generator=generator).mul(50 if dtype == torch.uint8 else 1).to(dtype)

    scored = k_dtype != torch.uint8
    given = {
        "query": torch.randn(2, 2, 20, 4, 16, generator=generator).bfloat16() if scored else None,
        "block_tables": torch.randperm(9, generator=generator)[:8].int().view(2, 4),
        "seq_lens": torch.tensor([30, 27]).int(),
        "window_starts": torch.tensor([first for first, _ in WINDOWS]).int(),
        "window": 24,
        "keep": 10,
    }
    k, v = pool(k_dtype), pool(v_dtype)
    twins = k.clone(), v.clone()
    norms = scored and v_dtype.is_floating_point
    scores = None if scored else torch.randn(2, 2, 2, 24, generator=generator)
    with device([k, v, *([given["query"]] if scored else [])]):
        found = compress_window(k_cache=k, v_cache=v, scores=scores, value_norm=norms, backend="triton", **given)
    for layer, s in ((layer, s) for layer in range(2) for s in range(2 if scored else 0)):
        rows = [int(given["block_tables"][s, t // 8]) * 8 + t % 8 for t in range(*WINDOWS[s])]
        keys, values = (twin[layer].flatten(0, 1)[rows] for twin in twins)
        options = {"reduction": "rms", "values": values if norms else None}
        exact = dense_scores(given["query"][layer, s], keys, dtype=torch.float64, **options)
        bound = allowed_error(given["query"][layer, s], keys, exact, **options)
        assert (found.scores[layer, s].double() - exact).abs().max() <= bound
    given |= {"query": None, "scores": found.scores.contiguous()}
    expected = compress_window(k_cache=twins[0], v_cache=twins[1], backend="torch", **given)
    assert torch.equal(found.keep_indices, expected.keep_indices)
    for moved, twin in zip((k, v), twins, strict=True):
        assert torch.equal(moved.view(torch.uint8), twin.view(torch.uint8))
