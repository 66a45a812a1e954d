"""Settings: every field is checked, and errors name it."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
from shim import small

from kara_kernels.engine import Ledger, Policy

OUT_OF_RANGE = {
    "scorer": ("snap", "kvzip"),
    "window": (1, 4097),
    "keep": (0, 256),
    "tail": (-1, 2**31),
    "protected": (-1, 2**31),
    "period": (0, 2**31),
    "max_sequences": (0, 2**31),
    "min_freed_blocks": (-1, 2**31),
    "attention": ("sideways", None),
    "chunk_fraction": (-0.1, 1.1, math.nan),
    "max_chunk": (0, 2**31),
    "pool": ("token", 3),
    "reduction": ("max", None),
    "value_norm": (),  # a bool, None, or a TypeError
    "redundancy": (-1.0, math.inf),
    "query_stride": (0, 257),
    "query_heads": ("max", None),
    "query_dtype": ("fp4", None),
    "look_ahead": (-1, 2**31),
    "pressure_tail": (-1, 129),
    "pressure_keep": (0, 4097),
    "pressure_window": (0, 4097),
    "max_loss": (-0.1, 1.1, math.nan),
    "min_keep": (0, 129),
    "max_keep": (127, 256),
    "max_query_gib": (-1.0, math.inf),
}
COUNTS = (
    "window", "keep", "tail", "protected", "period", "max_sequences", "min_freed_blocks", "max_chunk", "query_stride",
)  # fmt: skip
NUMBERS = ("chunk_fraction", "redundancy", "max_query_gib")


def test_every_field_is_checked() -> None:
    assert set(OUT_OF_RANGE) == {field.name for field in dataclasses.fields(Policy)}
    assert {
        *COUNTS,
        *NUMBERS,
        "scorer",
        "attention",
        "pool",
        "reduction",
        "value_norm",
        "query_heads",
        "query_dtype",
        "look_ahead",
        "pressure_tail",
        "pressure_keep",
        "pressure_window",
        "max_loss",
        "min_keep",
        "max_keep",
    } == set(OUT_OF_RANGE)


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, values in OUT_OF_RANGE.items() for x in values])
def test_a_field_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(repr(value))}$"):
        Policy(**{name: value})


@pytest.mark.parametrize("value", [1, "yes"])
def test_a_switch_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=f"^value_norm: expected a bool, got {type(value).__name__}$"):
        Policy(value_norm=value)


@pytest.mark.parametrize("value", [1.0, "8", True, None])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_ints(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected an int, got {type(value).__name__}$"):
        Policy(**{name: value})


@pytest.mark.parametrize("value", ["8", True, None])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected a number, got {type(value).__name__}$"):
        Policy(**{name: value})


def test_settings_of_a_file() -> None:
    assert Policy.from_settings({}) == Policy()
    assert Policy.from_settings({"window": 64, "keep": 16, "max_query_gib": 1}) == Policy(
        window=64, keep=16, max_query_gib=1
    )
    with pytest.raises(ValueError, match=r"^Keep, windw: expected one of .*window, keep, tail, .*, got Keep, windw$"):
        Policy.from_settings({"windw": 64, "Keep": 3, "tail": 1})
    with pytest.raises(TypeError, match="settings: expected a mapping, got list"):
        Policy.from_settings([("window", 64)])  # type: ignore[arg-type]


def test_policies_cannot_be_changed_behind_the_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().window = 1  # type: ignore[misc]


def test_pages_that_no_window_fills_are_refused() -> None:
    small().check_page_size(8)
    with pytest.raises(ValueError, match="window: expected at least one block of 9 tokens, got 8"):
        small().check_page_size(9)
    with pytest.raises(ValueError, match="page_size: expected 1"):
        small().check_page_size(0)
    with pytest.raises(ValueError, match="window"):
        Ledger(small(), 9)


@pytest.mark.parametrize(("page", "most"), [(1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_more_freed_blocks_than_there_can_be_are_refused(page: int, most: int) -> None:
    small(min_freed_blocks=most).check_page_size(page)
    with pytest.raises(
        ValueError,
        match=f"min_freed_blocks: expected at most {most}, .* dropping 4 of 8 .* blocks of {page}, got {most + 1}",
    ):
        Ledger(small(min_freed_blocks=most + 1), page)


def test_what_follows_from_a_policy() -> None:
    policy = Policy(window=20, keep=6, tail=5, query_stride=8, pool="layer", max_chunk=3)
    assert (policy.dropped, policy.query_rows) == (14, 4)
    names = "attention", "reduction", "value_norm", "redundancy", "pool", "chunk_fraction", "max_chunk"
    assert policy.selection == {name: getattr(policy, name) for name in names}
    assert (policy.selection["pool"], policy.selection["max_chunk"]) == ("layer", 3)


def test_causal_queries_are_all_recorded() -> None:
    assert Policy(attention="causal").attention == "causal"
    with pytest.raises(ValueError, match=r"query_stride: expected 1 with attention='causal' .*, got 2"):
        Policy(attention="causal", query_stride=2)


def test_it_looks_one_window_ahead_unless_told() -> None:
    assert Policy(window=64, keep=32).positions_ahead == 64
    assert Policy(window=64, keep=32, attention="causal").positions_ahead == 0
    assert Policy(window=64, keep=32, look_ahead=7).positions_ahead == 7
    assert Policy(look_ahead=7, attention="causal").positions_ahead == 7
    with pytest.raises(TypeError, match=r"^look_ahead: expected an int, got str$"):
        Policy(look_ahead="far")  # type: ignore[arg-type]


def test_who_waits_for_no_gain_may_drop_nothing_and_have_any_blocks() -> None:
    policy = small(window=1, keep=1, tail=0, min_freed_blocks=0)
    assert policy.dropped == 0
    policy.check_page_size(64)
    with pytest.raises(ValueError, match=r"^window: expected 2\.\.4096, got 1$"):
        small(window=1, keep=1)
    with pytest.raises(ValueError, match=r"^keep: expected 1\.\.7, got 8$"):
        small(keep=8)
    with pytest.raises(ValueError, match="page_size: expected 1"):
        policy.check_page_size(0)
