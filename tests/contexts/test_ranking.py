"""The order of a context's rows, from a paged cache."""

from __future__ import annotations

import pytest
import torch

from kara_kernels import PagedCache
from kara_kernels.contexts.ranking import Judges, ranked
from kara_kernels.ops import rank_rows
from kara_kernels.scorers import Rows, kara_sampled


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_rows_are_ranked_with_the_scale_of_the_model(scale: float) -> None:
    torch.manual_seed(0)
    cache = PagedCache(*([torch.randn(6, 16, 2, 16) for _ in range(3)] for _ in range(2)))
    table, queries = torch.tensor([4, 1, 3, 5], dtype=torch.int32), torch.randn(3, 20, 4, 16)
    keys, values = (
        torch.stack([x[table].flatten(0, 1).transpose(0, 1) for x in of]) for of in (cache.k, cache.v or ())
    )
    rows = Rows(queries.unflatten(2, (2, 2)), keys, values, 0, 64, scale)
    judges = Judges(lambda *_: queries, queries[:, :1], None, scale)
    assert torch.equal(ranked(cache, table, "kara_sampled", queries, judges), rank_rows(kara_sampled(rows)))


def test_rows_of_eight_bits_are_ranked_times_their_scales() -> None:
    torch.manual_seed(0)
    cache = PagedCache(*(torch.randn(3, 6, 16, 2, 16).to(torch.float8_e4m3fn) for _ in range(2)))
    scales = [torch.rand(3, 2) + 0.1 for _ in range(2)]
    assert cache.v is not None
    exact = [
        torch.stack([x.float() * factor[:, None] for x, factor in zip(of, scale, strict=True)])
        for of, scale in zip((cache.k, cache.v), scales, strict=True)
    ]
    table, queries = torch.tensor([4, 1, 3, 5], dtype=torch.int32), torch.randn(3, 20, 4, 16)
    plain, scaled = (Judges(lambda *_: queries, queries[:, :1], None, 0.25, *of) for of in ((), scales))
    for scorer in ("kara_sampled", "compactor"):
        asked = queries if scorer == "kara_sampled" else torch.randn(3, 64, 4, 16)
        expected = ranked(PagedCache(*exact), table, scorer, asked, plain)
        assert torch.equal(ranked(cache, table, scorer, asked, scaled), expected)
        assert not torch.equal(ranked(cache, table, scorer, asked, plain), expected)
