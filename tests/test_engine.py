"""The engine shim, piece by piece: settings, plan and commit, query ring, execution. `test_engine_machine.py` puts it
into a serving engine."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kara_kernels import CompressedWindow, PagedCache, compress_window, paged
from kara_kernels.engine import (
    Compression,
    Held,
    Ledger,
    PackedCache,
    Plan,
    Policy,
    QueryRing,
    Span,
    execute,
    warm_up,
)

aten = torch.ops.aten


def small(**settings: Any) -> Policy:
    """Eight tokens become four, four more wait behind them; every query is recorded."""
    return Policy(**{"window": 8, "keep": 4, "tail": 4, "query_stride": 1, "query_heads": "all"} | settings)


# ---- Policy ----------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
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
    "max_query_gib": (-1.0, math.inf),
}
COUNTS = (
    "window", "keep", "tail", "protected", "period", "max_sequences", "min_freed_blocks", "max_chunk", "query_stride",
)  # fmt: skip
NUMBERS = ("chunk_fraction", "redundancy", "max_query_gib")


def test_every_field_is_checked() -> None:
    assert set(OUT_OF_RANGE) == {field.name for field in dataclasses.fields(Policy)}
    assert {*COUNTS, *NUMBERS, "attention", "pool", "reduction", "value_norm", "query_heads"} == set(OUT_OF_RANGE)


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
    with pytest.raises(ValueError, match=r"^Keep, windw: expected one of .*window, keep, tail, .*max_query_gib$"):
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
    assert Policy(attention="causal", query_stride=1).attention == "causal"
    with pytest.raises(ValueError, match=r"query_stride: expected 1 with attention='causal' .*, got 2"):
        Policy(attention="causal")


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


# ---- plan and commit -------------------------------------------------------------------------------------


class Decoding:
    """One sequence that decodes a token a step, in blocks of its own. Its prompt is through."""

    def __init__(self, ledger: Ledger, name: str = "a", prompt: int = 5, computed: int = 0, decoded: int = 0) -> None:
        self.ledger, self.name, self.prompt = ledger, name, prompt
        self.logical = prompt + decoded
        ledger.start(name, prompt, computed)

    @property
    def physical(self) -> int:
        return self.logical - self.ledger.dropped(self.name)

    @property
    def blocks(self) -> list[int]:
        return [100 + i for i in range(-(-self.physical // self.ledger.page_size))]

    def held(self, first_owned: int = 0) -> Held:
        return Held(self.name, self.logical, self.blocks, first_owned)

    def step(self, first_owned: int = 0) -> Plan | None:
        """What is planned and committed now, then a token more."""
        plans = self.ledger.plan([self.held(first_owned)])
        for plan in plans:
            self.ledger.commit(plan)
        self.logical += 1
        return plans[0] if plans else None

    def until_planned(self, most: int = 200) -> Plan:
        for _ in range(most):
            if plan := self.step():
                return plan
        raise AssertionError(f"no compression in {most} steps")


@pytest.mark.parametrize("page", [1, 2, 3, 8])
@pytest.mark.parametrize("prompt", [1, 4, 5, 8, 11])
def test_the_first_window_does_not_swallow_the_prompt(page: int, prompt: int) -> None:
    plan = Decoding(Ledger(small(), page), prompt=prompt).until_planned()
    assert plan.window_start == prompt
    assert plan.logical_len == plan.physical_len >= prompt + 8 + 4


def test_a_window_and_its_tail_have_to_be_there() -> None:
    ledger = Ledger(small(), 1)
    sequence = Decoding(ledger, prompt=5, decoded=11)
    assert not ledger.is_due("a", sequence.logical)
    assert sequence.step() is None
    assert ledger.is_due("a", sequence.logical)
    assert sequence.step() is not None
    assert not ledger.skipped


def test_protected_tokens_count_from_the_start_of_the_sequence() -> None:
    assert Decoding(Ledger(small(protected=9), 1), prompt=5).until_planned().window_start == 9
    assert Decoding(Ledger(small(protected=9), 1), prompt=12).until_planned().window_start == 12


def test_every_token_is_looked_at_once_and_in_order() -> None:
    sequence = Decoding(Ledger(small(), 4), prompt=6)
    starts = [sequence.until_planned().window_start for _ in range(5)]
    assert starts == [6, 10, 14, 18, 22]


@pytest.mark.parametrize("page", range(1, 9))
@pytest.mark.parametrize("tail", [0, 1, 4, 7])
@pytest.mark.parametrize("keep", [1, 3, 7])
def test_no_sequence_starves_when_its_tail_meets_a_block_boundary(page: int, tail: int, keep: int) -> None:
    """Whatever the alignment and the wished gain, within a block of tokens the window is compressed."""
    for least in range(1, -(-(8 - keep) // page) + 1):
        for prompt in range(1, page + 1):
            ledger = Ledger(small(keep=keep, tail=tail, min_freed_blocks=least), page)
            sequence = Decoding(ledger, prompt=prompt)
            for _ in range(4):
                plan = sequence.until_planned()
                waited = plan.physical_len - plan.window_start - 8 - tail
                assert waited <= page
                assert len(plan.freed) >= least or waited == page


@pytest.mark.parametrize("prompt", range(1, 9))
def test_no_sequence_starves_when_rounds_and_blocks_march_in_step(prompt: int) -> None:
    """A round every block of tokens meets one alignment only; where that never frees a block, the wait ends as well."""
    sequence = Decoding(Ledger(small(keep=7, period=4), 4), prompt=prompt)
    for _ in range(4):
        plan = sequence.until_planned()
        assert plan.physical_len - plan.window_start <= 8 + 4 + 4 + 3


def test_a_compression_waits_for_its_gain() -> None:
    # 6 + 12 rows fill five blocks and would need four: at 21 rows six become five, but with 2 to free it takes none.
    ledger = Ledger(small(keep=3, min_freed_blocks=2), 4)
    sequence = Decoding(ledger, prompt=6)
    plan = sequence.until_planned()
    assert (plan.physical_len, plan.new_len) == (21, 16)
    assert len(plan.freed) == 2
    assert ledger.skipped == {"gain": 1}


def test_who_waits_for_no_gain_never_waits() -> None:
    """Blocks of 64 tokens, windows of 8: most compressions free nothing."""
    ledger = Ledger(small(keep=7, min_freed_blocks=0), 64)
    sequence = Decoding(ledger, prompt=6)
    for _ in range(20):
        plan = sequence.until_planned()
        assert plan.physical_len - plan.window_start == 8 + 4
    assert not ledger.skipped


def test_blocks_for_tokens_to_come_are_no_gain() -> None:
    """An engine may have allocated ahead: such blocks go back with the others, but are no reason to compress."""
    ledger = Ledger(small(), 8)
    ledger.start("a", 5, 0)
    # 17 rows become 13: three blocks, two. 19 rows of four blocks become 15.
    assert ledger.plan([Held("a", 17, [1, 2, 3, 4], 0)])[0].freed == (3, 4)
    ledger.start("a", 11, 0)
    # 23 rows become 19: three blocks hold either.
    assert ledger.plan([Held("a", 23, [1, 2, 3, 4], 0)]) == []


def test_nobody_starves_under_a_cap() -> None:
    """Six sequences, one compression every second step: they come in turn, however much one of them has to catch up."""
    ledger = Ledger(small(max_sequences=1, period=2, keep=1), 4)
    sequences = [Decoding(ledger, str(i), prompt=3 + i, decoded=60 * (i == 2)) for i in range(3)]
    waiting, longest = dict.fromkeys("012", 0), 0
    rng = random.Random(0)
    for step in range(400):
        held = [sequence.held() for sequence in sequences]
        rng.shuffle(held)
        plans = ledger.plan(held)
        assert len(plans) <= (step % 2 == 0)
        for plan in plans:
            ledger.commit(plan)
        for sequence in sequences:
            waiting[sequence.name] += 1
            if sequence.name in {plan.request_id for plan in plans}:
                waiting[sequence.name] = 0
            sequence.logical += 1
            if step > 60:  # the one that had to catch up has
                longest = max(longest, waiting[sequence.name])
    # A window takes 8 tokens; the wait for gain is 4 more, for two others 2 * 2.
    assert longest <= 8 + 4 + 4
    assert ledger.skipped["cap"] > 0


def test_those_with_most_to_compress_go_first_then_the_longest_running() -> None:
    ledger = Ledger(small(max_sequences=3), 1)
    sequences = [Decoding(ledger, name, decoded=n) for name, n in (("d", 14), ("c", 13), ("b", 14), ("a", 20))]
    for order in (sequences, sequences[::-1], sequences[2:] + sequences[:2]):
        plans = ledger.plan(sequence.held() for sequence in order)
        assert [plan.request_id for plan in plans] == ["a", "d", "b"]
    assert ledger.skipped == {"cap": 1}


def test_a_period_counts_engine_steps() -> None:
    ledger = Ledger(small(period=3), 1)
    sequence = Decoding(ledger, decoded=100)
    planned = [sequence.step() is not None for _ in range(7)]
    assert planned == [True, False, False, True, False, False, True]


def test_shared_blocks_are_never_rewritten() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, prompt=5, decoded=24)
    plan = sequence.step(first_owned=4)
    assert plan is not None
    assert plan.window_start == 16
    assert plan.touched == plan.blocks[4:]
    # Tokens that were shared then are not judged later either: the next window follows the last.
    assert ledger.plan([sequence.held()]) == []
    sequence.logical += 6
    assert ledger.plan([sequence.held()])[0].window_start == 20


def test_a_window_that_others_share_waits_until_it_has_moved_behind_them() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, prompt=5, decoded=13)
    everything = len(sequence.blocks)
    for _ in range(3):
        assert ledger.plan([sequence.held(everything)]) == []
        assert ledger.plan([sequence.held(2)]) == []
    assert ledger.skipped == {"shared": 1}, "a window and a reason count once"
    sequence.logical = 8 + 12
    assert ledger.plan([sequence.held(2)])[0].window_start == 8


def test_a_reason_counts_once_for_each_window() -> None:
    ledger = Ledger(small(max_sequences=1), 4)
    a, b = Decoding(ledger, "a", decoded=40), Decoding(ledger, "b", decoded=20)
    for _ in range(3):  # b waits now for a, now for blocks that are shared
        ledger.plan([a.held(), b.held()])
        ledger.plan([a.held(), b.held(len(b.blocks))])
    assert ledger.skipped == {"cap": 1, "shared": 1}
    ledger.commit(ledger.plan([b.held()])[0])
    b.logical += 20
    ledger.plan([a.held(), b.held()])
    assert ledger.skipped == {"cap": 2, "shared": 1}


def test_stale_prefix_hashes_cannot_serve_overwritten_blocks() -> None:
    """Every block that holds a row from the window on is named before it is written, and no other."""
    plan = Decoding(Ledger(small(), 4), prompt=6).until_planned()
    assert (plan.window_start, plan.physical_len, plan.new_len) == (6, 18, 14)
    written = {plan.blocks[row // 4] for row in range(plan.window_start, plan.physical_len)}
    assert set(plan.touched) == written == {101, 102, 103, 104}
    assert plan.freed == (104,)


def test_blocks_are_freed_and_not_only_flagged() -> None:
    ledger = Ledger(small(keep=2), 4)
    sequence = Decoding(ledger, prompt=6)
    pool = {100 + i for i in range(20)} - set(
        sequence.blocks
    )  # as many as it ever needs, and not one for each 4 tokens
    held = sequence.blocks
    for _ in range(200):
        if plan := sequence.step():
            assert plan.blocks == tuple(held)
            assert len(plan.freed) >= 1
            held = held[: plan.kept_blocks]
            pool |= set(plan.freed)
        while len(held) < len(sequence.blocks):
            held.append(min(pool))
            pool.remove(held[-1])
    assert ledger.windows("a") == 200 // 8 - 1
    assert len(held) == -(-(206 - 6 * 24) // 4)


def test_realised_lengths_are_the_ledgers() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, prompt=6)
    for windows in range(1, 4):
        plan = sequence.until_planned()
        assert plan.new_len == plan.physical_len - 4
        assert ledger.windows("a") == windows
        assert ledger.dropped("a") == 4 * windows == plan.logical_len - plan.new_len
    assert ledger.dropped("nobody") == ledger.windows("nobody") == 0


def test_a_plan_that_is_not_committed_has_not_happened() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, decoded=20)
    [first] = ledger.plan([sequence.held()])
    assert ledger.dropped("a") == ledger.windows("a") == 0
    [again] = ledger.plan([sequence.held()])
    assert again == first
    ledger.commit(again)
    assert ledger.dropped("a") == 4


def test_a_plan_is_committed_once_and_in_its_round() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, decoded=20)
    [old] = ledger.plan([sequence.held()])
    sequence.logical += 1
    [plan] = ledger.plan([sequence.held()])
    with pytest.raises(ValueError, match="plan: expected one of the latest round"):
        ledger.commit(old)
    ledger.commit(plan)
    with pytest.raises(ValueError, match="not committed yet"):
        ledger.commit(plan)
    assert ledger.dropped("a") == 4
    assert ledger.windows("a") == 1


def test_a_plan_of_an_earlier_step_is_refused_between_rounds() -> None:
    ledger = Ledger(small(period=2), 4)
    sequence = Decoding(ledger, decoded=20)
    [plan] = ledger.plan([sequence.held()])
    sequence.logical += 1
    assert ledger.plan([sequence.held()]) == []
    with pytest.raises(ValueError, match="plan: expected one of the latest round"):
        ledger.commit(plan)


def test_a_preempted_request_starts_anew() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, prompt=6)
    for _ in range(3):
        sequence.until_planned()
    ledger.forget("a")
    assert ledger.dropped("a") == ledger.windows("a") == 0
    assert ledger.plan([sequence.held()]) == [], "it holds nothing"
    ledger.start("a", 6, 4)
    plan = sequence.step()
    assert plan is not None
    assert plan.window_start == 6, "what was kept is lost with the blocks"
    assert plan.physical_len == plan.logical_len
    assert ledger.dropped("a") == 4


@pytest.mark.parametrize("again", [True, False])
def test_a_plan_of_a_former_life_is_refused(again: bool) -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, decoded=20)
    [plan] = ledger.plan([sequence.held()])
    ledger.forget("a")
    if again:
        ledger.start("a", 5, 0)
    with pytest.raises(ValueError, match="plan: expected"):
        ledger.commit(plan)
    assert ledger.dropped("a") == 0


def test_a_sequence_that_begins_anew_without_a_word_loses_its_plan() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, decoded=20)
    [plan] = ledger.plan([sequence.held()])
    ledger.start("a", 5, 0)
    with pytest.raises(ValueError, match="plan: expected"):
        ledger.commit(plan)


def test_batch_reordering_does_not_lose_the_dropped_counter() -> None:
    ledger = Ledger(small(max_sequences=8), 2)
    sequences = [Decoding(ledger, str(i), prompt=3 + i, decoded=5 * i) for i in range(5)]
    rng = random.Random(1)
    for _ in range(80):
        order = rng.sample(sequences, rng.randint(1, 5))  # who is scheduled in this step, in the batch's order
        for plan in ledger.plan(sequence.held() for sequence in order):
            owner = sequences[int(plan.request_id)]
            assert plan.window_start == owner.prompt + 4 * ledger.windows(owner.name)
            ledger.commit(plan)
        for sequence in order:
            sequence.logical += 1
    assert all(ledger.dropped(sequence.name) == 4 * ledger.windows(sequence.name) > 0 for sequence in sequences)
    left = sequences.pop(1)
    before = {sequence.name: ledger.dropped(sequence.name) for sequence in sequences}
    ledger.forget(left.name)
    assert {sequence.name: ledger.dropped(sequence.name) for sequence in sequences} == before


def test_a_prompt_in_chunks_is_not_compressed() -> None:
    """That nobody is offered in prefill is the engine's duty (`Held`); a prompt is safe even from one that forgets."""
    ledger = Ledger(small(), 4)
    ledger.start("a", 100, 0)
    for computed in range(0, 112, 4):
        assert not ledger.is_due("a", computed)
        assert ledger.plan([Held("a", computed, list(range(28)), 0)]) == []
    assert ledger.plan([Held("a", 112, list(range(28)), 0)])[0].window_start == 100


def test_a_sequence_with_tokens_in_flight_is_not_offered_and_loses_nothing() -> None:
    """Async scheduling: while a step runs whose tokens are not counted yet, the engine leaves the sequence out."""
    ledger = Ledger(small(), 4)
    a, b = Decoding(ledger, "a", decoded=20), Decoding(ledger, "b", decoded=20)
    assert {plan.request_id for plan in ledger.plan([b.held()])} == {"b"}
    assert ledger.dropped("a") == 0
    a.logical += 1
    assert [plan.request_id for plan in ledger.plan([a.held(), b.held()])] == ["a", "b"]


def test_blocks_that_cannot_hold_the_rows_are_refused() -> None:
    """An engine that shortened a table by logical lengths, or forgot to give the dropped tokens back."""
    ledger = Ledger(small(), 4)
    ledger.start("a", 5, 0)
    with pytest.raises(ValueError, match="blocks: expected at least 5 of a for its 20 rows, got 4"):
        ledger.plan([Held("a", 20, [1, 2, 3, 4], 0)])


def test_who_never_started_is_left_alone() -> None:
    ledger = Ledger(small(), 4)
    assert ledger.plan([Held("a", 100, list(range(25)), 0)]) == []
    ledger.forget("a")


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_queries_that_the_prefix_cache_served_were_never_seen(stride: int) -> None:
    """A sequence resumed with decoded tokens from the prefix cache waits until enough queries are recorded."""
    policy = small(query_stride=stride)
    ledger = Ledger(policy, 1)
    sequence = Decoding(ledger, prompt=5, computed=29, decoded=24)
    plan = sequence.until_planned()
    recorded = [position for position in range(29, plan.logical_len) if position % stride == 0]
    assert plan.num_queries == len(recorded) == max(1, policy.query_rows // 4)
    assert plan.last_query == recorded[-1] // stride
    assert ledger.skipped == {"queries": 1}


@pytest.mark.parametrize("stride", [1, 3, 5])
@pytest.mark.parametrize("prompt", [1, 2, 3, 6])
def test_queries_of_the_prompt_do_not_judge(stride: int, prompt: int) -> None:
    policy = small(query_stride=stride)
    plan = Decoding(Ledger(policy, 1), prompt=prompt).until_planned()
    recorded = [position for position in range(prompt, plan.logical_len) if position % stride == 0]
    assert plan.num_queries == min(len(recorded), policy.query_rows)
    assert plan.last_query * stride == recorded[-1]


def assert_judged_by_window_and_tail(plan: Plan, dropped: int, stride: int = 1) -> None:
    first = plan.window_start + dropped
    judges = [position for position in range(first, first + 8 + 4) if position % stride == 0]
    assert (plan.last_query - plan.num_queries + 1) * stride <= judges[0]
    assert plan.last_query * stride >= judges[-1]


def test_windows_that_waited_are_judged_by_the_newest_queries() -> None:
    """A ring of the policy's rows has no others."""
    ledger = Ledger(small(), 1)
    sequence = Decoding(ledger, prompt=5, decoded=40)
    for left in (40, 36, 32):
        [plan] = ledger.plan([sequence.held()])
        ledger.commit(plan)
        assert plan.physical_len - 5 == left
        assert (plan.last_query, plan.num_queries) == (44, 12)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_a_ring_with_room_for_all_lets_each_window_be_judged_by_its_own(stride: int) -> None:
    """One forward brought 60 tokens: four windows and their tails, one after the other."""
    policy = small(query_stride=stride)
    ledger = Ledger(policy, 1, query_rows=1000)
    sequence = Decoding(ledger, prompt=5, decoded=60)
    for window in range(7):
        dropped = ledger.dropped("a")
        [plan] = ledger.plan([sequence.held()])
        assert plan.window_start == 5 + 4 * window
        assert_judged_by_window_and_tail(plan, dropped, stride)
        assert plan.num_queries <= policy.query_rows
        ledger.commit(plan)
    assert ledger.plan([sequence.held()]) == []
    assert 5 + 60 - ledger.dropped("a") - plan.window_start - 4 == ledger.uncompressed("a", 65) == 4


def test_a_ring_has_rows_for_the_policy_at_least() -> None:
    with pytest.raises(ValueError, match=r"query_rows: expected 12\.\.2147483647, got 11"):
        Ledger(small(), 1, query_rows=11)
    assert Ledger(small(), 1).query_rows == 12


@pytest.mark.parametrize("rows", [None, 100])
def test_causal_queries_are_those_of_the_windows_tokens(rows: int | None) -> None:
    ledger = Ledger(small(attention="causal"), 4, query_rows=rows)
    sequence = Decoding(ledger, prompt=6)
    for _ in range(6):
        dropped = ledger.dropped("a")
        plan = sequence.until_planned()
        first = plan.window_start + dropped
        assert range(plan.last_query - plan.num_queries + 1, plan.last_query + 1) == range(first, first + 8)
        assert first > plan.logical_len - 1 - (rows or 12), "its queries are still in the ring"


def test_tokens_whose_queries_are_gone_are_in_no_causal_window() -> None:
    """The ring holds 12 queries: whoever waits longer finds its oldest tokens without, and they stay as they are."""
    ledger = Ledger(small(attention="causal"), 4)
    sequence = Decoding(ledger, prompt=5, decoded=20)
    [plan] = ledger.plan([sequence.held()])
    assert (plan.window_start, plan.last_query, plan.num_queries) == (13, 20, 8)
    ledger.commit(plan)
    assert ledger.uncompressed("a", sequence.logical) == 4


def test_causal_windows_wait_for_queries_that_the_prefix_cache_did_not_serve() -> None:
    ledger = Ledger(small(attention="causal"), 1)
    sequence = Decoding(ledger, prompt=5, computed=29, decoded=24)
    assert ledger.is_due("a", sequence.logical)
    assert sequence.step() is None
    assert ledger.skipped == {"queries": 1}
    plan = sequence.until_planned()
    assert (plan.window_start, plan.logical_len, plan.last_query, plan.num_queries) == (29, 41, 36, 8)


@pytest.mark.parametrize("prompt", range(1, 9))
def test_no_causal_sequence_starves(prompt: int) -> None:
    """Neither for its gain nor for queries: rounds and blocks march in step, and one of two goes first."""
    ledger = Ledger(small(keep=7, period=4, max_sequences=1, attention="causal"), 4)
    sequences = [Decoding(ledger, name, prompt=prompt + i) for i, name in enumerate("ab")]
    for _ in range(400):
        for plan in ledger.plan([sequence.held() for sequence in sequences]):
            ledger.commit(plan)
        for sequence in sequences:
            sequence.logical += 1
    assert min(ledger.windows("a"), ledger.windows("b")) >= 400 // (2 * 4 + 8 + 4)


# ---- records ---------------------------------------------------------------------------------------------


def test_a_record_says_what_a_plan_did_and_is_a_line_of_json() -> None:
    policy = small()
    plan = Decoding(Ledger(policy, 4), "7", prompt=6).until_planned()
    keep = torch.arange(4, dtype=torch.int32).expand(2, 3, 4)
    record = Compression.of(plan, policy, keep, seconds=0.5)
    assert record == ("7", 18, 18, 14, 6, 8, 4, keep, 1, 0, 0.5)
    renamed = Compression.of(plan, policy, keep, seconds=0.5, request_id="cmpl-7", recomputed_len=11)
    line = json.loads(json.dumps(renamed.as_dict()))
    assert line == {
        "request_id": "cmpl-7", "logical_len": 18, "physical_len_before": 18, "physical_len_after": 14,
        "window_start": 6, "window": 8, "keep": 4, "keep_indices": [[[0, 1, 2, 3]] * 3] * 2, "freed_blocks": 1,
        "recomputed_len": 11, "seconds": 0.5,
    }  # fmt: skip
    assert list(line) == list(Compression._fields)


# ---- the query ring --------------------------------------------------------------------------------------

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 4


def make_ring(policy: Policy, max_sequences: int = 3, max_tokens: int = 40, **options: Any) -> QueryRing:
    given: dict[str, Any] = {
        "layers": LAYERS, "query_heads": HEADS * GROUP, "kv_heads": HEADS, "head_dim": DIM,
        "dtype": torch.float32, "device": "cpu",
    }  # fmt: skip
    return QueryRing(policy, max_sequences=max_sequences, max_tokens=max_tokens, **(given | options))


def asks(name: str, last_query: int, num_queries: int) -> Plan:
    """A plan as far as the ring reads it."""
    return Plan(name, 0, 0, 0, 0, (), 0, 0, last_query, num_queries)


def query_of(name: str, position: int, layer: int) -> torch.Tensor:
    """`[H*G, D]`, different for every token, layer and head; heads of a group lie 1 around their mean."""
    head = torch.arange(HEADS * GROUP)
    value = int(name, 36) * 1000 + position + head % GROUP * 2 - (GROUP - 1)
    return torch.stack([value, head // GROUP, torch.full_like(head, layer), head * 0], -1).float()


def batch_of(spans: Sequence[Span], layer: int, padding: int = 0) -> torch.Tensor:
    """The queries of a step: NaN where nobody may look, in prompts and padding."""
    nothing = torch.full((HEADS * GROUP, DIM), math.nan)
    rows = [
        query_of(span.request_id, position, layer) if position >= span.prompt_len else nothing
        for span in spans
        for position in range(span.first_position, span.first_position + span.num_tokens)
    ]
    return torch.stack([*rows, *[nothing] * padding]) if rows or padding else torch.empty(0, HEADS * GROUP, DIM)


def run_step(ring: QueryRing, spans: Sequence[Span], padding: int = 0) -> bool:
    anything = ring.prepare(spans)
    for layer in range(LAYERS):
        ring.record(layer, batch_of(spans, layer, padding))
    return anything


def assert_selected(ring: QueryRing, name: str, positions: Sequence[int]) -> None:
    """The ring serves exactly the queries of these positions, oldest first."""
    queries, [rows] = ring.select([asks(name, positions[-1] // ring.policy.query_stride, len(positions))])
    for layer in range(LAYERS):
        want = torch.stack([query_of(name, position, layer) for position in positions])
        if ring.policy.query_heads == "mean":
            want = want.unflatten(1, (HEADS, GROUP)).mean(2)
        assert torch.equal(queries[layer, rows], want)


class Graph(TorchDispatchMode):
    """A captured CUDA graph in small: every operation with the tensors it was called on, to be run again on them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            result = func(*args, **kwargs)
            if result.data_ptr() != before.data_ptr():  # its outputs live at fixed addresses as well
                before.copy_(result)


def test_the_ring_reports_what_it_takes() -> None:
    policy = small()
    ring = make_ring(policy, max_sequences=3)
    assert ring.nbytes == LAYERS * (3 * 12 + 1) * HEADS * GROUP * DIM * 4
    assert ring.queries.untyped_storage().nbytes() == ring.nbytes
    assert make_ring(small(query_heads="mean")).nbytes == ring.nbytes // GROUP
    assert make_ring(policy, dtype=torch.bfloat16).nbytes == ring.nbytes // 2
    strided = make_ring(small(query_stride=4)).nbytes
    assert strided == LAYERS * (3 * 3 + 1) * HEADS * GROUP * DIM * 4
    larger = make_ring(small(query_stride=4), rows=5)
    assert larger.nbytes == larger.queries.nbytes == LAYERS * (3 * 5 + 1) * HEADS * GROUP * DIM * 4
    with pytest.raises(ValueError, match=r"rows: expected 12\.\.2147483647, got 11"):
        make_ring(policy, rows=11)


def test_the_memory_of_the_ring_is_bounded() -> None:
    needed = make_ring(small()).nbytes
    make_ring(small(max_query_gib=needed / 2**30))
    with pytest.raises(ValueError, match=r"max_query_gib: the query ring of 3 sequences .*: raise query_stride or"):
        make_ring(small(max_query_gib=(needed - 1) / 2**30))
    with pytest.raises(
        ValueError, match=r"\(12 queries of 4 heads of 4 in 2 layers each\) .* at most 1 GiB, got 1\.14"
    ):
        make_ring(small(max_query_gib=1), max_sequences=800_000, device="meta")


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_a_ring_keeps_the_newest_of_every_nth_query(stride: int) -> None:
    policy = small(query_stride=stride)
    ring = make_ring(policy)
    first = 7
    recorded: list[int] = []
    for position in range(first, 60):
        anything = run_step(ring, [Span("a", first, position, 1)], padding=2)
        assert anything == (position % stride == 0)
        recorded += [position] * anything
        if recorded:
            assert_selected(ring, "a", recorded[-policy.query_rows :])
            assert_selected(ring, "a", recorded[-1:])


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("first", [5, 11])
def test_a_chunk_longer_than_the_ring_leaves_its_newest_queries(stride: int, first: int) -> None:
    policy = small(query_stride=stride)
    ring = make_ring(policy)
    chunk = [Span("b", 2, 2, 3), Span("a", 6, first, 30)]
    with Graph() as written:
        assert run_step(ring, chunk, padding=4)
    # Which of two writes to one row is the last, a GPU does not say.
    for func, args, _, _ in written.calls:
        if func is aten.index_copy_.default:
            rows, times = args[2].unique(return_counts=True)
            assert set(times[rows < len(args[0]) - 1].tolist()) == {1}
    recorded = [position for position in range(max(6, first), first + 30) if position % stride == 0]
    assert len(recorded) > policy.query_rows
    assert_selected(ring, "a", recorded[-policy.query_rows :])


def test_prompts_take_no_room() -> None:
    ring = make_ring(small(), max_sequences=1)
    assert not run_step(ring, [Span("a", 9, 0, 4), Span("b", 20, 16, 4)])
    assert ring.sequences == 0
    assert run_step(ring, [Span("b", 20, 12, 8), Span("a", 9, 4, 7)], padding=3)
    assert ring.sequences == 1
    assert_selected(ring, "a", [9, 10])


def test_means_of_groups() -> None:
    policy = small(query_heads="mean")
    ring = make_ring(policy)
    run_step(ring, [Span("a", 3, 3, 20)], padding=1)
    assert ring.queries.shape == (LAYERS, 3 * 12 + 1, HEADS, DIM)
    assert_selected(ring, "a", range(11, 23))
    # With as many KV heads as query heads there is nothing to average.
    alone = make_ring(policy, kv_heads=HEADS * GROUP)
    run_step(alone, [Span("a", 0, 0, 3)])
    assert alone.queries.shape == (LAYERS, 3 * 12 + 1, HEADS * GROUP, DIM)


def test_a_long_step_leaves_no_targets_to_a_short_one() -> None:
    ring = make_ring(small())
    run_step(ring, [Span("a", 0, 0, 6), Span("b", 0, 0, 6)])
    for spans in ([Span("a", 0, 6, 1)], []):  # the rest is padding, as in a batch of fixed size
        run_step(ring, spans, padding=30)
        assert_selected(ring, "a", range(7))
        assert_selected(ring, "b", range(6))


def test_padding_behind_a_step_of_prompts_only_is_not_recorded() -> None:
    ring = make_ring(small())
    run_step(ring, [Span("a", 0, 0, 6)])
    run_step(ring, [Span("b", 8, 0, 3)], padding=5)
    run_step(ring, [Span("b", 8, 3, 4)], padding=5)
    assert_selected(ring, "a", range(6))


def test_rings_go_from_one_sequence_to_the_next() -> None:
    ring = make_ring(small(), max_sequences=2)
    run_step(ring, [Span("a", 0, 0, 5), Span("b", 0, 0, 5)])
    with pytest.raises(RuntimeError, match="the query ring has no room for c: 2 sequences hold it"):
        ring.prepare([Span("c", 0, 0, 1)])
    ring.release("a")
    ring.release("a")
    ring.release("nobody")
    assert ring.sequences == 1
    run_step(ring, [Span("c", 0, 0, 7), Span("b", 0, 5, 1)])
    assert ring.sequences == 2
    assert_selected(ring, "c", range(7))
    assert_selected(ring, "b", range(6))
    with pytest.raises(RuntimeError, match="no room for a"):
        ring.prepare([Span("a", 0, 5, 1)])


def test_a_step_of_too_many_tokens_is_refused() -> None:
    ring = make_ring(small(), max_tokens=8)
    run_step(ring, [Span("a", 0, 0, 4), Span("b", 9, 0, 4)])
    with pytest.raises(ValueError, match="spans: expected at most 8 tokens in one step, got 9"):
        ring.prepare([Span("a", 0, 4, 1), Span("b", 9, 4, 8)])


def test_queries_of_several_sequences_are_selected_at_once() -> None:
    ring = make_ring(small())
    run_step(ring, [Span("a", 0, 0, 20), Span("b", 4, 0, 16)])
    run_step(ring, [Span("c", 1, 0, 14), Span("a", 0, 20, 3)])
    for count in (1, 5, 12):
        plans = [asks("c", 13, count), asks("a", 22, count), asks("b", 15, count)]
        queries, rows = ring.select(plans)
        assert queries is ring.queries, "no query is copied"
        assert (rows.shape, rows.dtype) == ((3, count), torch.int32)
        for plan, of_plan in zip(plans, rows, strict=True):
            assert torch.equal(of_plan, ring.select([plan])[1][0])
            assert_selected(ring, plan.request_id, range(plan.last_query - count + 1, plan.last_query + 1))


@pytest.mark.parametrize("stride", [1, 3])
def test_a_larger_ring_takes_over_what_a_smaller_one_holds(stride: int) -> None:
    policy = small(query_stride=stride)
    ring, larger = make_ring(policy), make_ring(policy, rows=31, max_sequences=4)
    run_step(ring, [Span("a", 0, 0, 33), Span("b", 4, 0, 7)])
    last = 32 // stride
    larger.copy(ring, "a", last, policy.query_rows)
    larger.copy(ring, "c", 5, 0)  # of whom nothing is recorded
    assert larger.sequences == 1
    run_step(larger, [Span("a", 0, 33, 19), Span("c", 0, 0, 2)])
    newest = [position for position in range(52) if position % stride == 0]
    assert_selected(larger, "a", newest[-(policy.query_rows + 19 // stride) :])
    assert_selected(ring, "b", [p for p in range(4, 7) if p % stride == 0])


def test_recomputation_writes_the_same_rows_again() -> None:
    ring = make_ring(small(query_stride=2))
    for first, count in ((4, 20), (4, 8), (12, 12)):
        run_step(ring, [Span("a", 4, first, count)])
    assert_selected(ring, "a", range(12, 24, 2))


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_recording_survives_cuda_graph_replay(heads: str) -> None:
    """`record` runs once, at capture; from then on only `prepare` and the replay do."""
    ring = make_ring(small(query_heads=heads), max_tokens=16)
    batch = [torch.full((16, HEADS * GROUP, DIM), math.nan) for _ in range(LAYERS)]
    ring.prepare([])
    with Graph() as graph:
        for layer in range(LAYERS):
            ring.record(layer, batch[layer])
    [address] = {args[2].data_ptr() for func, args, _, _ in graph.calls if func is aten.index_copy_.default}

    def replay(spans: list[Span]) -> None:
        ring.prepare(spans)
        used = sum(span.num_tokens for span in spans)
        for layer in range(LAYERS):
            batch[layer].copy_(batch_of(spans, layer, 16 - used))
        graph.replay()

    replay([Span("a", 3, 0, 9), Span("b", 0, 0, 4)])
    replay([Span("b", 0, 4, 1), Span("a", 3, 9, 1)])
    replay([])
    replay([Span("a", 3, 10, 1)])
    assert_selected(ring, "a", range(3, 11))
    assert_selected(ring, "b", range(5))
    with Graph() as later:
        ring.record(0, batch[0])
    assert {args[2].data_ptr() for func, args, _, _ in later.calls if func is aten.index_copy_.default} == {address}


class Stream(TorchDispatchMode):
    """A device that is behind: copies that nobody waits for happen when the stream comes to them."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.copy_.default and args[2:] == (True,):
            self.late.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def test_async_scheduling_may_prepare_the_next_step_before_this_one_runs() -> None:
    ring = make_ring(small())
    steps = [[Span("a", 0, 0, 4), Span("b", 0, 0, 4)], [Span("b", 0, 4, 1), Span("a", 0, 4, 1)], [Span("b", 0, 5, 1)]]
    with Stream() as stream:
        for spans in steps:
            ring.prepare(spans)
    assert len(stream.late) == len(steps)
    for spans, (target, source) in zip(steps, stream.late, strict=True):
        target.copy_(source)
        for layer in range(LAYERS):
            ring.record(layer, batch_of(spans, layer, padding=10))
    assert_selected(ring, "a", range(5))
    assert_selected(ring, "b", range(6))


# ---- execution -------------------------------------------------------------------------------------------

V_DIM = 3


class Worker:
    """Sequences that are due, on pools of random rows and recorded queries, and a copy of either to compare with.

    `unseen` decoded tokens of a sequence came from the prefix cache: their queries are missing.
    """

    def __init__(
        self,
        policy: Policy,
        decoded: Sequence[int] = (12, 17),
        unseen: Sequence[int] = (),
        page: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.policy, self.page = policy, page
        torch.manual_seed(len(decoded) + page)
        ledger = Ledger(policy, page)
        lengths = [3 + i + n for i, n in enumerate(decoded)]
        used = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(used) + 3).tolist()
        self.blocks = len(order)
        self.k = [self._rows(DIM).to(dtype) for _ in range(LAYERS)]
        self.v = [self._rows(V_DIM).to(dtype) for _ in range(LAYERS)]
        self.ring = make_ring(policy, len(decoded), sum(lengths) + 5, dtype=dtype)
        self.queries: dict[str, torch.Tensor] = {}
        self.every: dict[str, torch.Tensor] = {}
        spans, held, steps = [], [], []
        for i, length in enumerate(lengths):
            name, prompt, first = str(i), 3 + i, 3 + i + (unseen[i] if unseen else 0)
            ledger.start(name, prompt, first)
            spans.append(Span(name, prompt, first, length - first))
            held.append(Held(name, length, [order.pop() for _ in range(used[i])], 0))
            every = torch.randn(LAYERS, length, HEADS * GROUP, DIM).to(dtype)
            recorded = [p for p in range(first, length) if p % policy.query_stride == 0]
            self.queries[name] = every[:, recorded[-policy.query_rows :]]
            self.every[name] = every
            steps.append(every[:, first:])
        self.ring.prepare(spans)
        for layer in range(LAYERS):
            self.ring.record(layer, torch.cat([step[layer] for step in steps]))
        self.plans = ledger.plan(held)
        assert len(self.plans) == len(decoded)

    def _rows(self, dim: int) -> torch.Tensor:
        return torch.randn(self.blocks, self.page, HEADS, dim)

    @property
    def cache(self) -> PagedCache:
        return PagedCache(self.k, self.v)

    def packed(self) -> PackedCache:
        """The same rows at places in no order, a few elements between them unused."""
        size = self.page * HEADS * (DIM + V_DIM)
        places = torch.randperm(size + 7)[:size]
        k_at = places[: self.page * HEADS * DIM].view(self.page, HEADS, DIM)
        v_at = places[self.page * HEADS * DIM :].view(self.page, HEADS, V_DIM)
        pools = [torch.full((self.blocks, size + 7), 9.0, dtype=self.k[0].dtype) for _ in range(LAYERS)]
        for pool, k, v in zip(pools, self.k, self.v, strict=True):
            pool[:, k_at], pool[:, v_at] = k, v
        self.at = k_at, v_at
        return PackedCache(pools, k_at, v_at)

    def queries_of(self, plan: Plan) -> torch.Tensor:
        """`[L, N, H*G, D]`: those that the plan names, oldest first; of a causal plan, of the window's own tokens."""
        if self.policy.attention == "causal":
            return self.every[plan.request_id][:, plan.window_start : plan.window_start + self.policy.window]
        return self.queries[plan.request_id]

    def expected(self, **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Keep lists and caches after `compress_window` on one sequence after the other, with queries in order."""
        ks, vs = [k.clone() for k in self.k], [v.clone() for v in self.v]
        keeps = []
        for plan in self.plans:
            done = compress_window(
                self.queries_of(plan)[:, None], ks, vs,
                torch.tensor([plan.blocks], dtype=torch.int32), torch.tensor([plan.physical_len], dtype=torch.int32),
                window=self.policy.window, keep=self.policy.keep, backend="torch",
                window_starts=torch.tensor([plan.window_start], dtype=torch.int32),
                **self.policy.selection, **options,
            )  # fmt: skip
            assert done.seq_lens.tolist() == [plan.new_len]
            keeps.append(done.keep_indices[:, 0])
        return keeps, ks, vs


def equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("page", [1, 3, 4])
@pytest.mark.parametrize(("pool", "attention"), [("head", "bidirectional"), ("model", "causal"), ("head", "causal")])
def test_every_plan_of_a_step_is_executed(page: int, pool: str, attention: str) -> None:
    worker = Worker(small(pool=pool, attention=attention, chunk_fraction=0.0), decoded=(12, 17, 15), page=page)
    keeps, ks, vs = worker.expected(scale=0.7, k_scale=1.5)
    kept = execute(worker.plans, worker.cache, worker.ring, worker.policy, scale=0.7, k_scale=1.5)
    assert equal(kept, keeps)
    assert equal(worker.k, ks)
    assert equal(worker.v, vs)


class Spied:
    """What `execute` hands to `compress_window`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        module = sys.modules["kara_kernels.windows.execute"]
        inner = module.compress_window  # type: ignore[attr-defined]

        def spy(query: Any, k: Any, v: Any, tables: Any, lengths: Any, **options: Any) -> CompressedWindow:
            self.calls.append((query, tables, lengths, options))
            return inner(query, k, v, tables, lengths, **options)

        monkeypatch.setattr(module, "compress_window", spy)


def test_only_blocks_that_are_rewritten_or_freed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, lengths and starts begin with the first written block, however long the sequence is before it."""
    worker, spied = Worker(small(), decoded=(12, 17), page=2), Spied(monkeypatch)
    assert all(plan.first_written > 0 for plan in worker.plans)
    execute(worker.plans, worker.cache, worker.ring, worker.policy)
    [(_, tables, lengths, options)] = spied.calls
    for s, plan in enumerate(worker.plans):
        touched = len(plan.touched)
        assert tables[s, :touched].tolist() == list(plan.touched)
        assert set(tables[s].tolist()) == set(plan.touched), "what fills a shorter table up is its own"
        assert lengths[s] == plan.physical_len - 2 * plan.first_written
        assert options["window_starts"][s] == plan.window_start - 2 * plan.first_written


@pytest.mark.parametrize("packed", [False, True])
def test_queries_are_read_where_the_ring_has_them(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    worker, spied = Worker(small()), Spied(monkeypatch)
    execute(worker.plans, worker.packed() if packed else worker.cache, worker.ring, worker.policy)
    assert len(spied.calls) == (len(worker.plans) if packed else 1)
    rows = torch.cat([options["query_rows"] for _, _, _, options in spied.calls])
    assert torch.equal(rows, worker.ring.select(worker.plans)[1])
    assert all(query is worker.ring.queries for query, _, _, _ in spied.calls)


@pytest.mark.parametrize("packed", [False, True])
def test_turned_queries_score(packed: bool) -> None:
    worker = Worker(small(chunk_fraction=0.0), decoded=(12, 17, 15), unseen=(0, 0, 9))

    def turn(queries: torch.Tensor) -> torch.Tensor:
        assert queries.shape[:1] + queries.shape[3:] == (LAYERS, HEADS * GROUP, DIM)
        return queries.roll(1, -1)

    for name, queries in worker.queries.items():
        worker.queries[name] = turn(queries[:, None])[:, 0]
    keeps, ks, vs = worker.expected()
    cache = worker.packed() if packed else worker.cache
    assert equal(execute(worker.plans, cache, worker.ring, worker.policy, turn=turn), keeps)
    assert packed or equal(worker.k + worker.v, ks + vs)


@pytest.mark.parametrize("packed", [False, True])
def test_given_scores_select_in_the_order_of_the_plans(packed: bool) -> None:
    worker = Worker(small(max_sequences=8, chunk_fraction=0.0), decoded=(12, 17, 13, 30), unseen=(0, 13, 9, 26))
    scores = torch.rand(LAYERS, 4, HEADS, 8)
    order = [2, 0, 3, 1]
    cache = worker.packed() if packed else worker.cache
    kept = execute([worker.plans[i] for i in order], cache, worker.ring, worker.policy, scores=scores)
    for s, keep in enumerate(kept):
        assert torch.equal(keep.long(), scores[:, s].topk(4).indices.sort(-1).values)


def test_plans_with_different_numbers_of_queries_are_mixed() -> None:
    """Results come in the plans' order, whatever groups they were compressed in."""
    worker = Worker(small(max_sequences=8), decoded=(12, 17, 13, 30), unseen=(0, 13, 9, 26))
    assert len({plan.num_queries for plan in worker.plans}) == 2
    keeps, ks, vs = worker.expected()
    assert equal(execute(worker.plans, worker.cache, worker.ring, worker.policy), keeps)
    assert equal(worker.k + worker.v, ks + vs)
    worker = Worker(small(max_sequences=8), decoded=(12, 17, 13, 30), unseen=(0, 13, 9, 26))
    order = [0, 3, 1, 2]
    assert [worker.plans[i].num_queries for i in order] == [4, 12, 4, 4]
    kept = execute([worker.plans[i] for i in order], worker.cache, worker.ring, worker.policy)
    assert equal(kept, [keeps[i] for i in order])


def test_slot_tables_are_block_tables_of_single_rows() -> None:
    worker = Worker(small(), page=1)
    assert all(plan.first_written == plan.window_start for plan in worker.plans)
    before = worker.k[0].clone()
    kept = execute(worker.plans, worker.cache, worker.ring, worker.policy)
    for plan, keep in zip(worker.plans, kept, strict=True):
        for head in range(HEADS):
            chosen = [plan.window_start + j for j in keep[0, head].tolist()]
            sources = chosen + list(range(plan.window_start + 8, plan.physical_len))
            got = worker.k[0][list(plan.blocks[plan.window_start : plan.new_len]), 0, head]
            assert torch.equal(got, before[[plan.blocks[source] for source in sources], 0, head])


def test_tail_rows_move_through_the_block_table() -> None:
    """Neighbours in a sequence are no neighbours in the pool; rows of all others stay, bit for bit."""
    worker = Worker(small(tail=7), decoded=(20,), page=2)
    [plan] = worker.plans
    before = [pool.clone() for pool in worker.k + worker.v]
    [keep] = execute(worker.plans, worker.cache, worker.ring, worker.policy)
    own = {cell: cell for cell in (oracle.cell_of(plan.blocks, 2, row) for row in range(plan.physical_len))}
    for pool, old, layer in zip(worker.k + worker.v, before, [0, 1, 0, 1], strict=True):
        for head in range(HEADS):
            kept = keep[layer, head].tolist()
            sources, _ = oracle.compact(own, plan.blocks, 2, plan.window_start, plan.physical_len, kept, 8)
            want = old[:, :, head].clone()
            for to, source in sources.items():
                want[to] = old[source][head]
            assert torch.equal(pool[:, :, head], want)


def test_no_row_is_kept_twice_when_all_are_worth_the_same() -> None:
    worker = Worker(small(chunk_fraction=0.9, max_chunk=3))
    for k in worker.k:
        k.zero_()
    for keep in execute(worker.plans, worker.cache, worker.ring, worker.policy):
        assert keep.shape == (LAYERS, HEADS, 4)
        assert bool((keep.diff(dim=-1) > 0).all())
        assert 0 <= int(keep.min()) <= int(keep.max()) < 8


@pytest.mark.parametrize("page", [1, 4])
def test_packed_caches_give_the_same_bits(page: int, backend: str) -> None:
    dtype = torch.bfloat16 if page == 4 else torch.float32
    worker = Worker(small(max_sequences=8), decoded=(12, 17, 14), unseen=(0, 0, 11), page=page, dtype=dtype)
    packed = worker.packed()
    want = execute(worker.plans, worker.cache, worker.ring, worker.policy, backend=backend)
    got = execute(worker.plans, packed, worker.ring, worker.policy, backend=backend)
    assert equal(got, want)
    k_at, v_at = worker.at
    unused = torch.ones(packed.pools[0].shape[1], dtype=torch.bool)
    unused[torch.cat([k_at.flatten(), v_at.flatten()])] = False
    for pool, k, v in zip(packed.pools, worker.k, worker.v, strict=True):
        assert torch.equal(pool[:, k_at], k)
        assert torch.equal(pool[:, v_at], v)
        assert bool((pool[:, unused] == 9).all())


def test_the_ranks_agree_through_the_hook() -> None:
    """`reduce_scores` sees the pooled scores, and its answer decides what stays."""
    worker = Worker(small(pool="layer", chunk_fraction=0.0))
    shapes = []

    def last_four(scores: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(scores.shape))
        return torch.arange(8.0).expand(scores.shape).contiguous()

    kept = execute(worker.plans, worker.cache, worker.ring, worker.policy, reduce_scores=last_four)
    assert shapes == [(LAYERS, 2, 1, 8)]
    assert all(keep.tolist() == [[[4, 5, 6, 7]] * HEADS] * LAYERS for keep in kept)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("packed", [False, True])
def test_warming_up_calls_everything_and_changes_nothing(backend: str, packed: bool, attention: str) -> None:
    policy, pools = (
        small(pool="layer", attention=attention),
        torch.randn(2, 2, 5, 4, 2, 16),
    )
    before, called = pools.clone(), []  # two layers, K and V, 5 blocks of 4 rows
    if packed:
        offsets = torch.randperm(4 * 2 * 16).view(4, 2, 16)
        both = [torch.cat([k.flatten(1), v.flatten(1)], 1) for k, v in pools]
        cache: Any = PackedCache(both, offsets, offsets + 4 * 2 * 16)
    else:
        cache = PagedCache(list(pools[:, 0]), list(pools[:, 1]))
    ring = QueryRing(
        policy, layers=2, query_heads=4, kv_heads=2, head_dim=16, max_sequences=3, max_tokens=8,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    warm_up(cache, ring, policy, reduce_scores=lambda scores: called.append(scores.shape), backend=backend)
    assert called == [(2, 1, 1, 8)]
    assert torch.equal(pools, before)
    if packed:
        assert torch.equal(torch.stack(both), torch.cat([before[:, 0].flatten(2), before[:, 1].flatten(2)], 2))


def test_a_step_without_plans_does_nothing() -> None:
    worker = Worker(small())
    before = [k.clone() for k in worker.k]
    assert execute([], worker.cache, worker.ring, worker.policy) == []
    assert execute([], worker.packed(), worker.ring, worker.policy) == []
    assert equal(worker.k, before)


def flat(low: int, *shape: int) -> torch.Tensor:
    return torch.arange(low, low + math.prod(shape)).view(shape)


ROWS = torch.zeros(3, 20)
BAD_PACKED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layer": ({"pools": []}, ValueError, "pools: expected at least one layer, got none"),
    "a vector": ({"pools": [ROWS[0]]}, ValueError, r"pools\[0\]: expected shape \[B, E\], got \[20\]"),
    "stride": ({"pools": [ROWS.t()]}, ValueError, r"pools\[0\]: expected stride 1 .*, got 20"),
    "shape": ({"pools": [ROWS, ROWS[1:]]}, ValueError, r"pools\[1\]: expected shape .*\[3, 20.* got .*\[2, 20"),
    "dtype": ({"pools": [ROWS, ROWS.half()]}, ValueError, r"pools\[1\]: expected dtype torch.float32 .*torch.float16"),
    "device": ({"pools": [ROWS, ROWS.to("meta")]}, ValueError, r"pools\[1\]: expected device cpu as .*, got meta"),
    "int32": (
        {"k_offsets": flat(0, 2, 2, 3).int()},
        TypeError,
        "k_offsets: expected dtype torch.int64, got torch.int32",
    ),
    "flat": ({"v_offsets": flat(12, 8)}, ValueError, r"v_offsets: expected shape \[P, H, D\].*, got \[8\]"),
    "pages": ({"v_offsets": flat(12, 4, 1, 2)}, ValueError, r"v_offsets: expected shape .* got \[4, 1, 2\]"),
    "empty": ({"k_offsets": flat(0, 2, 2, 0)}, ValueError, r"k_offsets: .* got \[2, 2, 0\]"),
    "outside": ({"v_offsets": flat(13, 2, 2, 2)}, ValueError, r"offsets: expected 0\.\.19, got 0\.\.20"),
    "negative": ({"k_offsets": flat(-1, 2, 2, 3)}, ValueError, r"offsets: expected 0\.\.19, got -1\.\.19"),
    "twice": ({"v_offsets": flat(11, 2, 2, 2)}, ValueError, "offset of its own, got one twice"),
}


@pytest.mark.parametrize("case", BAD_PACKED)
def test_packed_layouts_that_cannot_be_are_refused(case: str) -> None:
    given, error, message = BAD_PACKED[case]
    good = {"pools": [ROWS, ROWS.clone()], "k_offsets": flat(0, 2, 2, 3), "v_offsets": flat(12, 2, 2, 2)}
    PackedCache(**good)
    with pytest.raises(error, match=message):
        PackedCache(**(good | given))


# ---- host and device -------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails where a host would wait for its device: values read back, and copies from memory that is not handed over.

    The device is "meta", whose values cannot be read at all. Counts uploads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if func is aten._to_copy.default:
            moves = kwargs.get("device", args[0].device).type != args[0].device.type
            assert not moves or kwargs.get("non_blocking"), "a copy that the host waits for"
            self.uploads += moves
        elif func is aten.copy_.default:
            assert args[2:] == (True,) or len(devices) == 1, "a copy that the host waits for"
            self.uploads += len(devices) == 2
        else:
            assert len(devices) <= 1, f"{func}: numbers on the host beside tensors on the device"
            assert func is not aten._local_scalar_dense.default
        return func(*args, **kwargs)


class NoHiddenUploads(TorchFunctionMode):
    """Fails where numbers reach the device by a copy that operations do not show: new tensors, lists as indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            assert str(kwargs.get("device", "cpu")) == "cpu", "a tensor made on the device from numbers on the host"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device.type != "cpu":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in parts), "a list as an index of a tensor on the device"
        return func(*args, **kwargs)


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoWaiting]:
    """`compress_window` has such a test of its own; here it is only asked for its shapes."""

    def shapes_only(query: Any, k: Any, v: Any, tables: Any, lengths: Any, *, keep: int, **options: Any) -> Any:
        given = query, *k, tables, lengths, options["window_starts"], options["query_rows"]
        assert {x.device.type for x in given} == {"meta"}
        keep_indices = tables.new_empty(len(k), len(tables), k[0].shape[2], keep)
        return CompressedWindow(lengths, keep_indices, keep_indices.float(), lengths)

    monkeypatch.setattr(sys.modules["kara_kernels.windows.execute"], "compress_window", shapes_only)
    monkeypatch.setattr(paged, "_check_overlap", lambda k, v: None)  # meta tensors have no addresses
    with NoHiddenUploads(), NoWaiting() as mode:
        yield mode


def test_no_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing, recording, selecting and executing never read the device, and uploads do not grow with the batch."""
    uploads = []
    for sequences in (1, 5):
        worker = Worker(small(max_sequences=8), decoded=[12] * sequences, unseen=[9] * sequences)
        pools = [torch.empty(50, 60, device="meta") for _ in range(LAYERS)]
        offsets = torch.arange(4 * HEADS * (DIM + V_DIM))
        k_at, v_at = (x.view(4, HEADS, -1) for x in offsets.split([4 * HEADS * DIM, 4 * HEADS * V_DIM]))
        packed = PackedCache(pools, k_at, v_at)
        with no_waiting(monkeypatch) as mode:
            ring = make_ring(worker.policy, max_sequences=sequences, max_tokens=60, device="meta")
            cache = PagedCache(*(torch.empty(LAYERS, 50, 4, HEADS, d, device="meta") for d in (DIM, V_DIM)))
            assert ring.prepare([Span(plan.request_id, 3, 3, 9) for plan in worker.plans])
            for layer in range(LAYERS):
                ring.record(layer, torch.empty(60, HEADS * GROUP, DIM, device="meta"))
            execute(worker.plans, cache, ring, worker.policy)
            uploads.append(mode.uploads)
            kept = execute(worker.plans, packed, ring, worker.policy)
            assert [keep.shape for keep in kept] == [(LAYERS, HEADS, 4)] * sequences
    assert uploads[0] == uploads[1] == 2  # targets, and one for lengths, starts, rows and tables


def test_a_step_without_queries_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = make_ring(small(query_stride=4), device="meta")
    with no_waiting(monkeypatch) as mode:
        uploads = []
        for position in range(4, 10):
            ring.prepare([Span("a", 1, position, 1)])
            uploads.append(mode.uploads)
    # At position 4 a target, at 5 it is taken back.
    assert uploads == [1, 2, 2, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_records_in_a_graph_and_never_waits() -> None:
    ring = make_ring(small(), max_tokens=16, device="cuda")
    batch = [torch.zeros(16, HEADS * GROUP, DIM, device="cuda") for _ in range(LAYERS)]
    steps = [[Span("a", 3, 0, 9), Span("b", 0, 0, 4)], [Span("b", 0, 4, 1), Span("a", 3, 9, 1)]]
    given = [[batch_of(s, layer, 16 - sum(x.num_tokens for x in s)).cuda() for layer in range(LAYERS)] for s in steps]
    ring.prepare([])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            ring.record(layer, batch[layer])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for spans, queries in zip(steps, given, strict=True):
            ring.prepare(spans)
            for static, new in zip(batch, queries, strict=True):
                static.copy_(new)
            graph.replay()
        queries, rows = ring.select([asks("a", 9, 7)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chosen = queries[0].cpu()[rows[0].cpu()]
    assert chosen[:, 0, 0].tolist() == [query_of("a", p, 0)[0, 0].item() for p in range(3, 10)]
