"""Conversations: the next turn goes on with the rows that windows left of this one.

The dense model is fed the rows of the packet at the places that the trace of the earlier turn says, and both turns'
keep lists. It is also asked without any packet: one forward pass over the whole text, with what either turn dropped
masked."""

import threading
from dataclasses import replace

import pytest
import torch
from both_harness import TAILED, TALKING, serving_both, stored, turn
from contexts_harness import ON
from harness import KARA, MODES, configure, no_block_once, prompts


@pytest.fixture(scope="module", params=MODES)
def served_both(model, dense, request, tmp_path_factory):
    trace = tmp_path_factory.mktemp("conversations") / "trace.jsonl"
    with serving_both(model, trace, TAILED, TALKING, mode=request.param, max_num_batched_tokens=64) as both:
        both.dense = dense
        yield both


@pytest.fixture
def both(served_both):
    served_both.server.forget()
    for known in list(served_both.manager._known._known.values()):
        served_both.manager.forget(known.place)
    return served_both


def dropped(both, served):
    """Tokens of a request's text that have no rows when it ends, those of earlier turns among them."""
    last = both.engine.events_of(served.request_id)[-1]
    return last["logical_len"] - last["physical_len_before"] + last["window"] - len(last["keep_indices"][0][0])


def rows_at_the_end(both):
    """What requests hold in the cache when they end: keys and values ``[L, H, rows, D]``, by their names."""
    half, cache, found = both.half, both.server.worker._cache, {}
    finished = half.finished

    def watched(request):
        blocks = both.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
        found[request.request_id.rsplit("-", 1)[0]] = [
            torch.stack([x[blocks].flatten(0, 1).transpose(0, 1) for x in pool]).cpu() for pool in (cache.k, cache.v)
        ]
        return finished(request)

    half.finished = watched
    return found


def test_turns_go_on_with_the_rows_that_windows_left(both, dense):
    """Five turns, each with windows. Nothing that an earlier turn said is computed or compressed again."""
    first, *questions = prompts(100, 20, 33, 7, 12, seed=301)
    kept = rows_at_the_end(both)
    served, text = turn(both, "turn-0", [], first, 230)
    dense.assert_equal(both.engine, [served], compressions=2)
    for number, question in enumerate(questions, start=1):
        (place,) = [x for x in stored(both) if x.tokens == (len(text) - 1) // 32 * 32]
        assert place.rows == place.tokens - dropped(both, served)
        copy = both.manager.keeper.get(place.key)
        for packed, held in zip(both.server.rows_of_copy(copy, place.rows), kept[served.request_id], strict=False):
            assert torch.equal(packed, held[:, :, : place.rows])
        both.engine.peak, hits = 0, both.manager.counts["hits", "ram"]
        served, text = turn(both, f"turn-{number}", text, question, 150)
        assert both.manager.counts["hits", "ram"] == hits + 1
        assert served.rows[0][2].shape[2] == place.rows
        events = both.engine.events_of(served.request_id)
        assert events[0]["window_start"] >= len(served.prompt) - (place.tokens - place.rows)
        most = max(*(event["physical_len_before"] for event in events), len(text) - dropped(both, served))
        assert both.engine.peak <= -(-(most + 1) // 32) < len(text) // 32
        dense.assert_equal(both.engine, [served], compressions=1)
    both.half.finished = type(both.half).finished.__get__(both.half)
    both.assert_nothing_leaks()
    for place in stored(both):
        assert place.rows < place.tokens


def test_two_turns_equal_one_pass_over_their_text(both, dense):
    """No packet is read here: what the first turn dropped is masked, in the text of the second one."""
    first, question = prompts(90, 25, seed=302)
    one, text = turn(both, "pass-0", [], first, 220)
    two, _ = turn(both, "pass-1", text, question, 150)
    tokens = two.rows[0][0].shape[2]
    earlier = [{**x, "logical_len": min(x["logical_len"], tokens)} for x in both.engine.events_of(one.request_id)]
    later = both.engine.events_of(two.request_id)
    assert len(earlier) >= 2
    assert later
    two.rows = {}
    assert dense.mismatches(two, [*earlier, *({**x, "recomputed_len": 0} for x in later)]) == []


@pytest.mark.parametrize("how", ["kara", "contexts", "default"])
def test_who_has_opted_out_never_sees_a_conversation(both, dense, how, monkeypatch):
    """Neither as the next turn, nor by leaving one."""
    first, question = prompts(80, 9, seed=321 + len(how))
    _, text = turn(both, f"before-{how}", [], first, 200)
    (place,) = stored(both)
    own, params = (False, {}) if how == "kara" else (..., {"contexts": False} if how == "contexts" else {})
    if how == "default":
        monkeypatch.setattr(both.scheduler, "_settings", replace(both.scheduler._settings, default="off"))
    alone, whole = turn(both, f"alone-{how}", text, question, 170, own, **params)
    assert alone.rows[0] is None
    assert bool(both.engine.events_of(alone.request_id)) == (how == "contexts")
    dense.assert_equal(both.engine, [alone], compressions=int(how == "contexts"))
    if how != "contexts":  # vLLM alone: a dense model of which nothing is dropped
        assert dense.mismatches(replace(alone, rows={}), []) == []
    assert stored(both) == [place]
    monkeypatch.undo()
    after, _ = turn(both, f"after-{how}", whole, question, 12)
    assert after.rows[0][0].shape[2] == place.tokens  # of the first turn: the one that opted out left nothing
    dense.assert_equal(both.engine, [after], compressions=0)
    both.assert_nothing_leaks()


def test_a_request_that_is_too_short_for_windows_goes_on_too(both, dense):
    first, question, other = prompts(80, 40, 9, seed=304)
    _, text = turn(both, "short-0", [], first, 200)
    short, text = turn(both, "short-1", text, question, 20)
    assert short.rows[0] is not None
    assert len(stored(both)) == 2
    last, _ = turn(both, "short-2", text, other, 20)
    assert last.rows[0][0].shape[2] == (len(text) - 1) // 32 * 32
    dense.assert_equal(both.engine, [short, last], compressions=0)
    both.assert_nothing_leaks()


def test_other_tenants_never_find_a_conversation(both, dense):
    first, question = prompts(80, 9, seed=305)
    one, text = turn(both, "tenant-0", [], first, 200, salt="one")
    other, _ = turn(both, "tenant-1", text, question, 20, salt="two")
    nobody, _ = turn(both, "tenant-2", text, question, 20)
    same, _ = turn(both, "tenant-3", text, question, 20, salt="one")
    assert [x.rows[0] is not None for x in (other, nobody, same)] == [False, False, True]
    dense.assert_equal(both.engine, [one, other, nobody, same], compressions=0)
    both.assert_nothing_leaks()


def test_rows_of_a_conversation_never_get_the_hashes_of_its_tokens(both, dense):
    """Nor what follows them. An exact request beside it hashes its own blocks, and the next one finds only those."""
    first, question = prompts(80, 9, seed=306)
    _, text = turn(both, "hashes-0", [], first, 200)
    both.server.forget()
    pool = both.scheduler.kv_cache_manager.block_pool
    went_on = both.ask("hashes-1", text + question, 60)
    assert went_on.rows[0] is not None
    assert not len(pool.cached_block_hash_to_block)
    exact = both.ask("hashes-2", text + question, 60, False, contexts=False)
    assert len(pool.cached_block_hash_to_block) == (len(text) + 9 + 60 - 1) // 32
    again = both.ask("hashes-3", text + question, 30, False)
    dense.assert_equal(both.engine, [went_on, exact, again], compressions=0)
    both.assert_nothing_leaks()


def test_an_admitted_request_leaves_a_conversation_under_its_own_name(both, dense):
    """It ran in the prefix cache of a packet of eight bits. The next turn goes on from there."""
    document, question, other = prompts(256, 9, 14, seed=307)
    both.store("stored-document", document + question, 256)
    one, text = turn(both, "document-0", document, question, 200, context_tokens=256)
    assert one.rows[0] is not None
    (place,) = stored(both)
    two, _ = turn(both, "document-1", text, other, 150)
    assert two.rows[0][0].shape[2] == place.tokens > 256
    dense.assert_equal(both.engine, [one, two], compressions=1)
    both.assert_nothing_leaks()


def test_who_lost_no_rows_leaves_no_conversation(both):
    document, question = prompts(256, 9, seed=308)
    both.store("stored-whole", document + question, 256)
    one, _ = turn(both, "whole-0", document, question, 60, context_tokens=256)
    two, _ = turn(both, "whole-1", [], document[:90], 60)
    assert [x.rows[0] is not None for x in (one, two)] == [True, False]
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_whole_rows_win(both, dense):
    """A context of the same tokens takes the place of a conversation, and is not replaced by one."""
    first, question = prompts(60, 9, seed=309)
    _, text = turn(both, "win-0", [], first, 200)
    (place,) = stored(both)
    turn(both, "win-1", text, question, 12, False, context_tokens=place.tokens)
    assert stored(both) == []
    two, _ = turn(both, "win-2", text, question, 12)
    assert two.rows[0][2].shape[2] == place.tokens
    _, again = turn(both, "win-3", [], first, 200)
    assert again == text
    assert stored(both) == []
    dense.assert_equal(both.engine, [two], compressions=0)
    both.assert_nothing_leaks()


def test_a_text_that_was_said_twice_is_stored_once(both):
    (first,) = prompts(60, seed=310)  # shorter than any context
    turn(both, "twice-0", [], first, 200)
    (place,), began = stored(both), both.manager.counts["stored", "kara/exact", "1.00"]
    turn(both, "twice-1", [], first, 200)
    assert stored(both) == [place]
    assert both.manager.counts["stored", "kara/exact", "1.00"] == began
    both.manager.keeper.remove(place.key)  # as if it had found no room
    turn(both, "twice-2", [], first, 200)
    assert stored(both) == [place]
    both.assert_nothing_leaks()


def test_short_texts_are_left_alone(both, monkeypatch):
    (first,) = prompts(40, seed=311)
    monkeypatch.setattr(both.manager, "min_tokens", 300)
    turn(both, "least-0", [], first, 200)
    assert both.engine.events_of("least-0")
    assert stored(both) == []
    monkeypatch.setattr(both.manager, "min_tokens", 224)
    turn(both, "least-1", [], first, 200)
    assert [place.tokens for place in stored(both)] == [224]
    both.assert_nothing_leaks()


def test_an_aborted_request_leaves_nothing(both):
    (first,) = prompts(80, seed=312)
    both.drive({0: lambda both: both.add("aborted", first, 300), 200: lambda both: both.engine.abort("aborted")})
    assert both.engine.events_of("aborted")
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_a_request_whose_rows_are_not_written_leaves_nothing(both, monkeypatch):
    """It may end by a token of a step in flight, after it was preempted."""
    ended = both.half._conversations.ended

    def unwritten(request, blocks):
        request.num_computed_tokens = request.num_tokens - 2
        ended(request, blocks)

    monkeypatch.setattr(both.half._conversations, "ended", unwritten)
    turn(both, "unwritten", [], prompts(60, seed=319)[0], 200)
    assert both.engine.events_of("unwritten")
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_blocks_are_held_until_their_rows_are_stored(both, dense, monkeypatch):
    """Another request runs meanwhile, and is given other blocks."""
    first, question, other = prompts(80, 9, 200, seed=313)
    gate, store = threading.Event(), both.server.worker._store
    monkeypatch.setattr(both.server.worker, "_store", lambda job: store(job) if gate.wait(60) else None)
    one = both.ask("held-0", first, 200)
    text = one.prompt + one.tokens
    held = both.engine.held_blocks
    assert held >= 4
    assert both.half.busy
    beside = both.ask("held-1", other, 60, False)
    assert both.engine.held_blocks == held
    gate.set()
    both.server.rest()
    assert both.engine.held_blocks == 0
    two, _ = turn(both, "held-2", text, question, 60)
    assert two.rows[0] is not None
    dense.assert_equal(both.engine, [one, beside, two], compressions=0)
    both.assert_nothing_leaks()


def test_a_conversation_that_finds_no_room_lets_go_of_its_blocks(both, monkeypatch):
    """Too large for any place; or it waits for what is read, and blocks become short."""
    first, document = prompts(80, 256, seed=314)
    with monkeypatch.context() as patch:
        patch.setattr(both.manager._known, "_most", 1)
        turn(both, "room-0", [], first, 200)
        both.server.rest()
        assert stored(both) == []
        assert both.engine.held_blocks == 0
    with monkeypatch.context() as patch:
        patch.setattr(both.manager.keeper.directory, "_has_room", lambda *args, **kwargs: False)
        patch.setattr(both.manager.keeper, "_running", 1)  # it may free some
        both.ask("room-1", first, 200)
        assert both.engine.held_blocks
        assert both.half.busy

        def short_of_blocks(both):
            assert both.half._ended
            no_block_once(both.engine)

        both.drive({0: lambda both: both.add("room-2", document, 100, False), 20: short_of_blocks})
        assert both.engine.recomputed["room-2"] == []  # it waited for these blocks, instead of being preempted
        assert not both.half._ended
        assert both.engine.held_blocks == 0
    assert stored(both) == []
    both.assert_nothing_leaks()


def test_a_preempted_turn_goes_on_with_its_rows(both, dense):
    first, question = prompts(80, 9, seed=315)
    _, text = turn(both, "back-0", [], first, 200)
    both.server.forget()
    served = both.drive(
        {
            0: lambda both: both.add("back-1", text + question, 260),
            160: lambda both: both.preempt(),
        }
    )["back-1"]
    (start,) = served.recomputed
    assert [served.rows[when] is not None for when in (0, start)] == [True, True]
    dense.assert_equal(both.engine, [served], compressions=2)
    last, _ = turn(both, "back-2", served.prompt + served.tokens, question, 60)
    assert last.rows[0][0].shape[2] == (len(served.prompt) + 259) // 32 * 32
    dense.assert_equal(both.engine, [last], compressions=0)
    both.assert_nothing_leaks()


@pytest.mark.parametrize(
    ("kara", "given", "expected"),
    [
        (None, True, "conversations without windows that move rows"),
        ({**KARA, "shadow": True}, True, "conversations without windows that move rows"),
        (KARA, 1, "conversations: expected a bool, got int"),
    ],
)
def test_engines_without_windows_are_refused(model, kara, given, expected):
    contexts = {**ON, "conversations": given}
    with pytest.raises(ValueError, match=expected):
        configure(model, None, additional_config={"contexts": contexts} | ({} if kara is None else {"kara": kara}))
