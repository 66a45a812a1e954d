"""Utility, decayed uses and the checks of values. Expected numbers are worked out by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from kara_kernels.contexts.utility import Context, Decay, Option, Tier, check_tiers, ttft, utility

TIER = Tier("ram", capacity=100, bandwidth=50.0, latency=0.5)
HALF = Option("int8", 0.5, 25, 0.9, decode_seconds=0.25)
CONTEXT = Context("c", (HALF,), prefill_seconds=8.0, question_seconds=2.0)


def test_time_to_the_first_token_adds_loading_latency_decoding_and_the_question() -> None:
    assert ttft(CONTEXT, HALF, TIER) == 25 / 50 + 0.5 + 0.25 + 2.0
    assert ttft(CONTEXT) == 8.0 + 2.0


def test_utility_is_that_of_the_paper() -> None:
    assert utility(CONTEXT, HALF, TIER, alpha=10.0, frequency=3.0) == (10.0 * 0.9 - 3.25) * 3.0
    assert utility(CONTEXT, None, None, alpha=10.0, frequency=3.0) == (10.0 - 10.0) * 3.0  # recomputed: quality 1


def test_a_packet_cuts_to_smaller_ones_of_its_method() -> None:
    quarter, other = Option("int8", 0.25, 12, 0.5), Option("keydiff", 0.25, 12, 0.5)
    assert HALF.cuts_to(quarter)
    assert HALF.cuts_to(HALF)
    assert not quarter.cuts_to(HALF)
    assert not HALF.cuts_to(other)
    assert HALF.same_bytes(Option("int8", 0.5, 25, 0.1))
    assert not HALF.same_bytes(quarter)
    assert not quarter.same_bytes(other)


def test_hits_halve_with_age() -> None:
    decay = Decay(half_life=10.0, start=5.0)
    assert decay.weight(5.0) == 1.0
    total = decay.weight(5.0) + decay.weight(15.0)
    assert total / decay.weight(15.0) == 1.5  # the older use counts half
    assert total / decay.weight(25.0) == 0.75


def test_rebasing_changes_no_order_and_no_hits() -> None:
    decay, draw = Decay(half_life=2.0), random.Random(1)
    sums = [sum(decay.weight(draw.uniform(900, 1020)) for _ in range(4)) for _ in range(100)]
    assert decay.rebase(1024.0) == 1.0  # 512 half-lives
    hits = [total / decay.weight(1025.0) for total in sums]
    factor = decay.rebase(1025.0)
    assert math.frexp(factor)[0] == 0.5  # a power of two, so products are exact
    assert [total * factor / decay.weight(1025.0) for total in sums] == hits
    assert decay.weight(1025.0) < 2


def test_clocks_may_count_from_anywhere() -> None:
    decay = Decay(half_life=3600.0)
    assert decay.rebase(1.8e9) == 0.0  # seconds since 1970: uses at 0 are forgotten
    assert decay.weight(1.8e9 + 3600) / decay.weight(1.8e9) == 2.0


@pytest.mark.parametrize(
    ("make", "values", "error", "message"),
    [
        (Tier, {"name": ""}, ValueError, "name: expected a name, got ''"),
        (Tier, {"name": 3}, TypeError, "name: expected a str, got int"),
        (Tier, {"capacity": -1}, ValueError, "capacity: expected 0.."),
        (Tier, {"capacity": 1.5}, TypeError, "capacity: expected an int, got float"),
        (Tier, {"bandwidth": 0}, ValueError, "bandwidth: expected"),
        (Tier, {"latency": math.nan}, ValueError, "latency: expected"),
        (Tier, {"reserve": 101}, ValueError, "reserve: expected 0..100, got 101"),
        (Option, {"method": ""}, ValueError, "method: expected a name"),
        (Option, {"ratio": 0}, ValueError, "ratio: expected"),
        (Option, {"nbytes": 0}, ValueError, "nbytes: expected 1.."),
        (Option, {"quality": 1.01}, ValueError, "quality: expected 0..1, got 1.01"),
        (Option, {"decode_seconds": -1}, ValueError, "decode_seconds: expected"),
        (Context, {"key": b"c"}, TypeError, "key: expected a str, got bytes"),
        (Context, {"options": [HALF]}, TypeError, "options: expected a tuple of Option"),
        (Context, {"options": (HALF, HALF)}, ValueError, "options: expected one of method 'int8' with 25 bytes"),
        (Context, {"prefill_seconds": math.inf}, ValueError, "prefill_seconds: expected"),
        (Context, {"question_seconds": -1}, ValueError, "question_seconds: expected"),
        (Context, {"floor": 2}, ValueError, "floor: expected 0..1, got 2"),
        (Decay, {"half_life": 0}, ValueError, "half_life: expected"),
    ],
)
def test_bad_values_are_refused(make: Any, values: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[Any, dict[str, Any]] = {
        Tier: {"name": "ram", "capacity": 100, "bandwidth": 1.0},
        Option: {"method": "int8", "ratio": 0.5, "nbytes": 1, "quality": 1.0},
        Context: {"key": "c", "options": (), "prefill_seconds": 1.0},
        Decay: {"half_life": 1.0},
    }
    make(**good[make])
    with pytest.raises(error) as caught:
        make(**good[make] | values)
    assert str(caught.value).startswith(message)


def test_tiers_need_names_of_their_own() -> None:
    assert check_tiers([TIER]) == (TIER,)
    with pytest.raises(ValueError, match=r"tiers: expected one or more with different names, got \['ram', 'ram'\]"):
        check_tiers([TIER, TIER])
    with pytest.raises(ValueError, match="tiers: expected"):
        check_tiers([])
