"""Sequences with a window and a keep of their own, beside others of the same engine."""

from __future__ import annotations

import pytest
from shim import Decoding, small

from kara_kernels.engine import Ledger


def test_a_plan_says_what_the_policy_says_unless_its_sequence_says_otherwise() -> None:
    ledger = Ledger(small(), 4)
    plans = [Decoding(ledger, "a", **own).until_planned() for own in ({}, {"keep": 2}, {"window": 6}, {"window": 7})]
    assert [(plan.window, plan.keep) for plan in plans] == [(8, 4), (8, 2), (6, 4), (7, 4)]
    assert [plan.physical_len - plan.new_len for plan in plans] == [4, 6, 2, 3]


@pytest.mark.parametrize(("own", "enough"), [({}, 12), ({"keep": 3}, 12), ({"window": 6}, 10)])
def test_it_is_due_with_its_own_window_and_the_tail(own: dict[str, int], enough: int) -> None:
    ledger = Ledger(small(), 1)
    sequence = Decoding(ledger, prompt=5, decoded=enough - 1, **own)
    assert not ledger.is_due("a", sequence.logical)
    assert sequence.step() is None
    assert ledger.is_due("a", sequence.logical)
    assert sequence.step() is not None


def test_survivors_of_its_own_keep_are_not_looked_at_again() -> None:
    ledger = Ledger(small(), 1)
    short, usual, narrow = Decoding(ledger, "a", keep=1), Decoding(ledger, "b"), Decoding(ledger, "c", window=5, keep=3)
    for sequence, starts, dropped in ((short, [5, 6, 7], 21), (usual, [5, 9, 13], 12), (narrow, [5, 8, 11], 6)):
        assert [sequence.until_planned().window_start for _ in range(3)] == starts
        assert ledger.dropped(sequence.name) == dropped


def test_it_is_judged_by_as_many_queries_as_its_window_needs() -> None:
    """The ring has rows for a larger window than the policy's."""
    ledger = Ledger(small(), 1, query_rows=20)
    for own, rows in (({}, 12), ({"window": 5}, 9), ({"window": 16}, 20)):
        plan = Decoding(ledger, prompt=5, decoded=40, **own).until_planned()
        assert plan.num_queries == rows
        assert plan.last_query - plan.num_queries + 1 >= 45 - 20


def test_its_own_gain_decides_whether_it_waits() -> None:
    """6 + 12 rows fill five blocks. Four rows fewer fill four, one row fewer five."""
    ledger = Ledger(small(), 4)
    assert Decoding(ledger, prompt=6, decoded=12, keep=4).step() is not None
    assert Decoding(ledger, prompt=6, decoded=12, keep=7).step() is None
    assert ledger.skipped == {"gain": 1}


def test_a_restart_says_it_anew() -> None:
    ledger = Ledger(small(), 1)
    assert Decoding(ledger, keep=2).until_planned().keep == 2
    assert Decoding(ledger).until_planned().keep == 4


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"keep": 0}, ValueError, r"keep: expected 1\.\.7, got 0"),
        ({"keep": 8}, ValueError, r"keep: expected 1\.\.7, got 8"),
        ({"keep": True}, TypeError, "keep: expected an int, got bool"),
        ({"keep": "3"}, TypeError, "keep: expected an int, got str"),
        ({"keep": 5}, ValueError, "min_freed_blocks: expected at most 1, .* dropping 3 of 8 tokens"),
        ({"window": 4}, ValueError, r"keep: expected 1\.\.3, got 4"),
        ({"window": 3, "keep": 1}, ValueError, "window: expected at least one block of 4 tokens, got 3"),
        ({"window": 9}, ValueError, r"query_rows: expected 13\.\.2147483647, got 12"),
    ],
)
def test_what_cannot_be_is_refused_as_in_a_policy(own: dict[str, int], error: type[Exception], message: str) -> None:
    ledger = Ledger(small(keep=2, min_freed_blocks=2) if own.get("keep") == 5 else small(), 4)
    with pytest.raises(error, match=message):
        ledger.start("a", 5, 0, **own)
    assert not ledger.is_due("a", 100)
