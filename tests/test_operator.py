"""compress_window under `torch.compile`: one node of a full graph, with the same results and moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kara_kernels import CompressedWindow, PagedCache, compress_window
from kara_kernels.options import RECOMMENDED


def inputs(layers: int | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    lead = () if layers is None else (layers,)
    return {
        "query": torch.randn(*lead, 2, 16, 4, 8),
        "k_cache": torch.randn(*lead, 20, 4, 2, 8),
        "v_cache": torch.randn(*lead, 20, 4, 2, 8),
        "block_tables": torch.randperm(20).int().view(2, 10),
        "seq_lens": torch.tensor([30, 15], dtype=torch.int32),
    }


def clones(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in given.items()}


OPTIONS = [
    {}, {"pool": "layer", "reduction": "rms", "value_norm": True}, {"redundancy": 0.5, "k_scale": 0.5, "pool": "model"},
    {"k_scale": torch.tensor([0.5])}, {"look_ahead": (torch.tensor([0.5]), torch.tensor([-0.5]))},
    {"window_starts": torch.tensor([3, 0], dtype=torch.int32)},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layers", [None, 3])
def test_compiled_as_a_whole_it_does_the_same(layers: int | None, options: dict[str, object]) -> None:
    def step(given: dict[str, torch.Tensor]) -> CompressedWindow:
        query = given["query"] * 2  # something for the graph to hold beside it
        rest = {name: tensor for name, tensor in given.items() if name != "query"}
        return compress_window(query, **rest, window=16, keep=8, **options)  # type: ignore[arg-type]

    eager, compiled = clones(inputs(layers)), clones(inputs(layers))
    expected = step(eager)
    torch._dynamo.reset()
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    assert isinstance(result, CompressedWindow)
    assert expected.seq_lens.tolist() == [22, 15]
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


def arguments(scores: torch.Tensor | None) -> tuple[tuple, dict]:
    given = inputs(2)
    if scores is not None:
        given["query"] = None  # type: ignore[assignment]
    keywords = {
        "window": 16, "keep": 8, "scores": scores, "window_starts": None, "protected_lens": None,
        "query_rows": None, "scale": None, "k_scale": None, "k_scales": None, "cos": None, "sin": None,
        "interleaved": False, "backend": "auto", **RECOMMENDED,
    }  # fmt: skip
    return tuple(given.values()), keywords


@pytest.mark.parametrize("scores", [None, torch.rand(2, 2, 2, 16)], ids=["scored", "given scores"])
def test_the_operator_is_what_it_says(scores: torch.Tensor | None) -> None:
    """Checks schema, mutation, shapes of fake tensors, and AOT autograd."""
    torch.library.opcheck(torch.ops.kara_kernels.compress_window.default, *arguments(scores))


@pytest.mark.parametrize(("change", "name"), [
    (lambda given: given | {"k_cache": list(given["k_cache"])}, "k_cache"),
    (lambda given: given | {"query": list(given["query"])}, "query"),
    (lambda given: given | {"k_cache": PagedCache(given["k_cache"]).k, "v_cache": None}, "k_cache"),
    (lambda given: given | {"reduce_scores": lambda scores: scores}, "reduce_scores"),
])  # fmt: skip
def test_what_a_graph_cannot_hold_is_named(change: Callable, name: str) -> None:
    def step(given: dict) -> CompressedWindow:
        return compress_window(**given, window=16, keep=8)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"{name}: expected"):
        torch.compile(step, fullgraph=True, backend="eager")(change(inputs(2)))
