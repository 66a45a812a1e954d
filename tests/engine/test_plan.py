"""Plan and commit: which sequence is compressed when, the resulting blocks and lengths, and which queries score."""

from __future__ import annotations

import random
from typing import Any

import pytest
from shim import Decoding, small

from kara_kernels.engine import Held, Ledger, Plan


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
    """For any alignment and any required gain, the window is compressed within one block of tokens."""
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
    """With one round per block of tokens, only one alignment occurs. If it never frees a block, the wait still ends."""
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
    """Blocks allocated ahead return with the others, but they are no reason to compress."""
    ledger = Ledger(small(), 8)
    ledger.start("a", 5, 0)
    # 17 rows become 13: three blocks, two. 19 rows of four blocks become 15.
    assert ledger.plan([Held("a", 17, [1, 2, 3, 4], 0)])[0].freed == (3, 4)
    ledger.start("a", 11, 0)
    # 23 rows become 19: three blocks hold either.
    assert ledger.plan([Held("a", 23, [1, 2, 3, 4], 0)]) == []


def test_nobody_starves_under_a_cap() -> None:
    """Six sequences share one compression every second step. They take turns, even if one has to catch up a lot."""
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
    for _ in range(3):  # b waits first for a, then for shared blocks
        ledger.plan([a.held(), b.held()])
        ledger.plan([a.held(), b.held(len(b.blocks))])
    assert ledger.skipped == {"cap": 1, "shared": 1}
    ledger.commit(ledger.plan([b.held()])[0])
    b.logical += 20
    ledger.plan([a.held(), b.held()])
    assert ledger.skipped == {"cap": 2, "shared": 1}


def test_stale_prefix_hashes_cannot_serve_overwritten_blocks() -> None:
    """Exactly the blocks with rows from the window on are named before they are written."""
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
    with pytest.raises(ValueError, match="plan: expected an uncommitted one of the latest round"):
        ledger.commit(old)
    ledger.commit(plan)
    with pytest.raises(ValueError, match="expected an uncommitted one"):
        ledger.commit(plan)
    assert ledger.dropped("a") == 4
    assert ledger.windows("a") == 1


def test_a_plan_of_an_earlier_step_is_refused_between_rounds() -> None:
    ledger = Ledger(small(period=2), 4)
    sequence = Decoding(ledger, decoded=20)
    [plan] = ledger.plan([sequence.held()])
    sequence.logical += 1
    assert ledger.plan([sequence.held()]) == []
    with pytest.raises(ValueError, match="plan: expected an uncommitted one of the latest round"):
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


def test_a_preempted_request_may_go_on_with_what_is_stored_of_it() -> None:
    ledger = Ledger(small(), 4)
    sequence = Decoding(ledger, prompt=6)
    for _ in range(3):
        sequence.until_planned()
    dropped, length = ledger.dropped("a"), sequence.logical
    ledger.forget("a")
    ledger.admit("a", dropped)
    ledger.start("a", 6, length)
    sequence.logical = length
    assert ledger.dropped("a") == dropped
    assert ledger.uncompressed("a", length) == 0
    plan = sequence.until_planned()
    assert plan.window_start == length - dropped, "its rows are not compressed a second time"


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
    """The engine must not offer sequences in prefill (`Held`). A prompt is safe even if the engine forgets that."""
    ledger = Ledger(small(), 4)
    ledger.start("a", 100, 0)
    for computed in range(0, 112, 4):
        assert not ledger.is_due("a", computed)
        assert ledger.plan([Held("a", computed, list(range(28)), 0)]) == []
    assert ledger.plan([Held("a", 112, list(range(28)), 0)])[0].window_start == 100


def test_a_sequence_that_is_not_offered_loses_nothing() -> None:
    """An engine whose tokens in flight may be rejected does not offer the sequence."""
    ledger = Ledger(small(), 4)
    a, b = Decoding(ledger, "a", decoded=20), Decoding(ledger, "b", decoded=20)
    assert {plan.request_id for plan in ledger.plan([b.held()])} == {"b"}
    assert ledger.dropped("a") == 0
    a.logical += 1
    assert [plan.request_id for plan in ledger.plan([a.held(), b.held()])] == ["a", "b"]


def test_blocks_that_cannot_hold_the_rows_are_refused() -> None:
    """For example, an engine that shortened a table by logical lengths."""
    ledger = Ledger(small(), 4)
    ledger.start("a", 5, 0)
    with pytest.raises(ValueError, match="blocks: expected at least 5 for the 20 rows of a, got 4"):
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
    """A ring with the policy's number of rows holds no older ones."""
    ledger = Ledger(small(), 1)
    sequence = Decoding(ledger, prompt=5, decoded=40)
    for left in (40, 36, 32):
        [plan] = ledger.plan([sequence.held()])
        ledger.commit(plan)
        assert plan.physical_len - 5 == left
        assert (plan.last_query, plan.num_queries) == (44, 12)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_a_ring_with_room_for_all_lets_each_window_be_judged_by_its_own(stride: int) -> None:
    """One forward pass added 60 tokens: four consecutive windows and their tails."""
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
    """The ring holds 12 queries. After a longer wait, the oldest tokens have no queries and stay uncompressed."""
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
    """No sequence waits forever for gain or for queries, even if rounds and blocks coincide and another goes first."""
    ledger = Ledger(small(keep=7, period=4, max_sequences=1, attention="causal"), 4)
    sequences = [Decoding(ledger, name, prompt=prompt + i) for i, name in enumerate("ab")]
    for _ in range(400):
        for plan in ledger.plan([sequence.held() for sequence in sequences]):
            ledger.commit(plan)
        for sequence in sequences:
            sequence.logical += 1
    assert min(ledger.windows("a"), ledger.windows("b")) >= 400 // (2 * 4 + 8 + 4)


def test_who_lacks_blocks_compresses_early() -> None:
    """With a shorter tail, those with most to compress first, and no more than it takes."""
    ledger = Ledger(small(pressure_tail=1, pressure_keep=4), 4)
    sequences = [Decoding(ledger, name, prompt=4, decoded=n) for name, n in (("a", 12), ("b", 9), ("c", 11), ("d", 8))]
    held = [sequence.held() for sequence in sequences]
    [due] = ledger.plan(held)
    ledger.commit(due)
    assert due.request_id == "a"
    assert ledger.relieve(held, 0) == []
    assert [plan.request_id for plan in ledger.relieve(held, 1)] == ["c"]
    plans = ledger.relieve([held[1], held[3]], 9)
    assert [plan.request_id for plan in plans] == ["b"]  # d has no tail, and nobody is compressed twice in a step
    assert (plans[0].window_start, plans[0].num_queries, plans[0].last_query) == (4, 9, 12)
    ledger.commit(plans[0])
    assert ledger.dropped("b") == 4
    assert not ledger.skipped


def test_compressing_early_has_to_free_a_block() -> None:
    """A window that has waited long enough for its gain is compressed without one, but not to free blocks."""
    ledger = Ledger(small(keep=7, pressure_tail=0), 8)
    sequence = Decoding(ledger, prompt=4, decoded=10)  # 14 rows become 13: two blocks hold either
    assert ledger.plan([sequence.held()]) == []
    assert ledger.relieve([sequence.held()], 5) == []
    sequence.logical = 4 + 13  # 17 rows become 16
    assert ledger.plan([sequence.held()]) != []


@pytest.mark.parametrize("prompt", [1, 5, 9])
@pytest.mark.parametrize("page", [1, 3, 8])
def test_a_known_text_is_computed_in_chunks_that_hold_no_more_than_the_peak(page: int, prompt: int) -> None:
    """As after a preemption: the text is there, and every window is compressed before the next chunk."""
    ledger = Ledger(small(), page)
    total = prompt + 61
    chunk = ledger.chunk("a", prompt, 0)
    assert chunk >= prompt + 8 + 4
    ledger.start("a", prompt, 0)
    computed, most = 0, 0
    while computed < total:
        computed += min(ledger.chunk("a", prompt, computed), total - computed)
        most = max(most, computed - ledger.dropped("a"))
        for plan in ledger.plan([Held("a", computed, range(computed), 0)]):
            ledger.commit(plan)
    assert most <= ledger.peak(prompt, total) < total
    assert (61 - 4) // 8 - 1 <= ledger.windows("a") <= (61 - 4) // 8  # the last may still wait for its gain
    assert ledger.peak(prompt, prompt + 3) == prompt + 3


def test_who_still_lacks_blocks_keeps_fewer_tokens() -> None:
    """Unless the sequence asked for its own ``keep``."""
    ledger = Ledger(small(keep=6, pressure_tail=0, pressure_keep=2), 2)
    held = [Decoding(ledger, name, prompt=4, decoded=8).held() for name in "ab"]
    ledger.start("b", 4, 0, keep=6)
    assert [(plan.request_id, plan.keep, len(plan.freed)) for plan in ledger.relieve(held, 2)] == [
        ("a", 6, 1),
        ("b", 6, 1),
    ]
    plans = ledger.relieve(held[:1], 2)
    assert plans == []  # nobody is planned twice in a round
    ledger.plan([])
    plans = ledger.relieve(held, 3)
    assert [(plan.request_id, plan.keep, len(plan.freed)) for plan in plans] == [("a", 2, 3)]
    ledger.commit(plans[0])
    assert ledger.dropped("a") == 6


def test_who_still_lacks_blocks_compresses_smaller_windows() -> None:
    """A quarter of a window, which keeps the same share. Not if the sequence has settings of its own."""
    ledger = Ledger(small(pressure_tail=1, pressure_window=4), 2)
    held = [Decoding(ledger, name, prompt=4, decoded=6).held() for name in "ab"]
    ledger.start("b", 4, 4, keep=2)
    assert [ledger.is_due(name, 10, urgent=True) for name in "ab"] == [True, False]
    [plan] = ledger.relieve(held, 1)
    assert (plan.request_id, plan.window_start, plan.window, plan.keep, plan.new_len) == ("a", 4, 4, 2, 8)
    assert (plan.num_queries, plan.last_query) == (6, 9)
    ledger.commit(plan)
    ledger.plan([])
    assert not ledger.is_due("a", 10, urgent=True)
    assert ledger.relieve([held[0]._replace(blocks=range(4))], 1) == []


def test_who_still_lacks_blocks_compresses_survivors_once_more() -> None:
    """The oldest first, to a quarter if others keep a half; each only once, and new survivors when there are any."""
    ledger = Ledger(small(tail=0, pressure_window=8, min_freed_blocks=0), 2)
    sequence = Decoding(ledger, prompt=4)
    for _ in range(4):
        sequence.until_planned()
    assert (ledger.windows("a"), sequence.physical) == (4, 4 + 4 * 4 + 1)
    held = sequence.held()
    ledger.plan([])
    [plan] = ledger.relieve([held], 2)
    assert (plan.window_start, plan.window, plan.keep, plan.new_len) == (4, 8, 4, held.logical_len - 16 - 4)
    assert (plan.num_queries, plan.last_query) == (8, held.logical_len - 1)
    ledger.commit(plan)
    ledger.plan([])
    [plan] = ledger.relieve([sequence.held()], 2)
    assert (plan.window_start, plan.window, plan.keep) == (8, 8, 4)
    ledger.commit(plan)
    ledger.plan([])
    assert ledger.relieve([sequence.held()], 2) == []
    assert (sequence.physical, ledger.dropped("a")) == (4 + 4 + 4 + 1, 24)
    plan = sequence.until_planned()  # the next window comes after them
    assert plan.window_start == 12


@pytest.mark.parametrize("settings", [{"pressure_keep": 4}, {"attention": "causal"}, {"max_loss": 0.5}])
def test_survivors_stay_as_they_are(settings: dict[str, Any]) -> None:
    ledger = Ledger(small(tail=0, min_freed_blocks=0, **settings), 2)
    sequence = Decoding(ledger, prompt=4)
    for _ in range(4):
        sequence.until_planned()
    ledger.plan([])
    assert ledger.relieve([sequence.held()], 2) == []
