"""The single list of options: everything that takes options takes all of them, with the same defaults and checks."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from kara_kernels import compress_window
from kara_kernels.engine import Policy
from kara_kernels.options import OPTIONS, PAPER, RECOMMENDED, Options, Scoring, Selection, split_options
from kara_kernels.windows.graph import SCHEMA


def test_a_policy_has_every_option_with_the_recommended_default() -> None:
    assert Policy().selection == RECOMMENDED
    assert {field.name for field in fields(Policy)} > set(OPTIONS)


def test_the_keywords_are_those_of_the_two_parts() -> None:
    assert set(Options.__annotations__) == set(OPTIONS)
    assert set(OPTIONS) == {field.name for part in (Scoring, Selection) for field in fields(part)}
    named = inspect.signature(compress_window).parameters
    assert not set(named) & set(OPTIONS), "an option stands in the signature and in the list"


def test_the_operator_takes_every_option() -> None:
    assert all(f" {name}" in SCHEMA for name in OPTIONS)


def test_the_paper_is_what_it_published() -> None:
    assert PAPER == {
        "attention": "bidirectional", "reduction": "mean", "value_norm": False, "redundancy": 0.0, "pool": "head",
        "chunk_fraction": 0.3, "max_chunk": 8,
    }  # fmt: skip


def test_defaults_cannot_be_changed_under_others() -> None:
    with pytest.raises(TypeError):
        RECOMMENDED["reduction"] = "mean"  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        Policy().reduction = "mean"  # type: ignore[misc]


def test_numbers_become_floats() -> None:
    """An int would be a different type for a kernel and cause another compilation."""
    scoring, selection = split_options({"redundancy": 0, "chunk_fraction": 0})
    assert type(scoring.redundancy) is type(selection.chunk_fraction) is float


@pytest.mark.parametrize(
    ("keep", "fraction", "budget"), [(128, 0.1, 13), (1, 1.0, 0), (2, 1.0, 1), (10, 0.25, 2), (10, 0.0, 0)]
)
def test_the_chunk_budget_leaves_a_candidate(keep: int, fraction: float, budget: int) -> None:
    assert Selection(chunk_fraction=fraction).chunk_budget(keep) == budget


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"attention": "all"}, ValueError, "attention: expected one of 'bidirectional', 'causal', got 'all'"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of 'mean', 'rms', got 'max'"),
        ({"value_norm": 1}, TypeError, "value_norm: expected a bool, got int"),
        ({"redundancy": -1}, ValueError, "redundancy: expected 0.0..3.4e+38, got -1"),
        ({"pool": "row"}, ValueError, "pool: expected one of 'head', 'layer', 'model', got 'row'"),
        ({"chunk_fraction": 2}, ValueError, "chunk_fraction: expected 0.0..1.0, got 2"),
        ({"max_chunk": 0}, ValueError, "max_chunk: expected 1..2147483647, got 0"),
        ({"rho": 1.0}, TypeError, "rho: expected options among attention, reduction, value_norm, redundancy, pool"),
    ],
)
def test_what_is_wrong_is_named_by_all_who_take_it(given: dict, error: type[Exception], words: str) -> None:
    cache = torch.zeros(1, 4, 1, 2)
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(error) as raised:
        compress_window(torch.zeros(1, 2, 1, 2), cache, cache.clone(), table, length, window=4, keep=2, **given)
    assert words in str(raised.value)
    if "rho" not in given:
        with pytest.raises(error) as raised:
            Policy(**given)
        assert words in str(raised.value)


def test_causal_engines_record_every_query() -> None:
    assert Policy(attention="causal").selection["attention"] == "causal"
    with pytest.raises(ValueError, match="query_stride: expected 1 with attention='causal'"):
        Policy(attention="causal", query_stride=2)
