"""The manager of vLLM's contexts without vLLM: by hand, and in random days whose model carries out the jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lower_tier import Disk

from kara_kernels import PayloadLayout
from kara_kernels.contexts.directory import Copy
from kara_kernels.contexts.packet import Header
from kara_kernels.contexts.utility import Option, Tier
from kara_kernels.integrations.vllm.contexts.admission import Admission
from kara_kernels.integrations.vllm.contexts.catalogue import Catalogue, Way
from kara_kernels.integrations.vllm.contexts.closed import PAUSE
from kara_kernels.integrations.vllm.contexts.grains import Grains
from kara_kernels.integrations.vllm.contexts.jobs import Ended, Load, Store
from kara_kernels.integrations.vllm.contexts.manager import ContextManager, Place
from kara_kernels.integrations.vllm.contexts.settings import CONVERSATION, may_drop
from kara_kernels.integrations.vllm.contexts.trace import watch

BLOCK = 16


def hashes(text: str) -> list[bytes]:
    """Of a prompt whose letters are blocks: each covers everything before it."""
    return [hashlib.sha256(text[: i + 1].encode()).digest() for i in range(len(text))]


def header(key: str, tokens: int, method: str) -> Header:
    (scorer, _, form), places = method.partition("/"), may_drop(method)
    layout = PayloadLayout(
        layers=1, heads=1, dim=16, v_dim=16, dtype=torch.bfloat16, tokens=tokens, rows=tokens, form=form,
        places=places,
    )  # fmt: skip
    return Header("a model", key, layout, scorer if places else "")


def manager(
    grains: int = 64, workers: int = 1, profile: str | None = None, methods: Sequence[str] = ("none/int8",),
    **options: Any,
) -> ContextManager:  # fmt: skip
    given = {"alpha": 100.0, "floor": 0.9, "half_life": 100.0, "min_tokens": 2 * BLOCK} | options
    region = Grains(grains, 512)
    catalogue = Catalogue(header, region, methods, profile, windows=True, left=True)
    some = ContextManager(
        grains=region, block_size=BLOCK, workers=workers, catalogue=catalogue, clock=lambda: 0.0, **given
    )  # type: ignore[arg-type]
    some.rates.prefill = 1e-2
    return some


def stored(some: ContextManager, text: str, name: str = "first", ids: Sequence[int] = ()) -> Store:
    """Offers the whole text as a context and stores it."""
    place = Place(hashes(text)[-1], BLOCK * len(text))
    some.offer(name, place, range(len(text)), ids)
    (job,), _ = some.step(0)
    some.ended(job.number, Ended(1, True, 0.1))
    return job


def test_a_context_is_what_a_request_asks_for_in_whole_blocks() -> None:
    some = manager()
    prompt = hashes("abcdef")
    assert some.place(prompt, 6 * BLOCK, 3 * BLOCK + 5) == Place(prompt[2], 3 * BLOCK)
    assert some.place(prompt, 6 * BLOCK, 99 * BLOCK) == Place(prompt[4], 5 * BLOCK)  # the last token is computed
    assert some.place(prompt, 6 * BLOCK + 1, 99 * BLOCK) == Place(prompt[5], 6 * BLOCK)
    assert some.place(prompt, 6 * BLOCK, 2 * BLOCK - 1) is None  # too short


def test_a_context_is_what_a_second_request_shares() -> None:
    some = manager()
    assert some.place(hashes("abcdxx"), 6 * BLOCK, None) is None
    assert some.place(hashes("abcdyyy"), 7 * BLOCK, None) == Place(hashes("abcd")[-1], 4 * BLOCK)
    assert some.place(hashes("zbcd"), 4 * BLOCK, None) is None


def test_the_longest_stored_context_is_admitted() -> None:
    some = manager()
    for text in ("abc", "abcde"):
        stored(some, text)
    prompt = hashes("abcdefg")
    found = some.admissions.find(prompt, 7 * BLOCK, 0)
    assert found is not None
    assert found.place == Place(prompt[4], 5 * BLOCK)
    assert not found.exact
    shorter = some.admissions.find(hashes("abcxx"), 5 * BLOCK, BLOCK)
    assert shorter is not None
    assert shorter.place.tokens == 3 * BLOCK
    assert some.admissions.find(prompt, 7 * BLOCK, 5 * BLOCK) is None  # the engine's own cache has as much
    assert some.admissions.find(hashes("abcde"), 5 * BLOCK, 3 * BLOCK) is None  # its last token must be computed
    assert some.admissions.find(hashes("xyz"), 3 * BLOCK, 0) is None


def test_what_loads_longer_than_it_computes_is_computed() -> None:
    some = manager()
    stored(some, "abcd")
    some.rates.see_load("int8", 1.0)
    assert some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0) is None
    assert some.counts["slower",] == 1
    for _ in range(2000):  # costs may have changed, and only a load can tell
        if some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0) is not None:
            break
    else:
        raise AssertionError("it was never tried again")


def test_each_form_takes_its_own_time_to_load() -> None:
    """Otherwise a form that loads slowly would be taken for one that loads as fast as another."""
    some = manager()
    rates = some.rates
    assert rates.to_load("int8", 100) == 0  # nothing was loaded yet
    stored(some, "abcd")
    admission = some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0)
    assert admission is not None
    for seconds in (0.1, 0.2):
        some.load("second", admission, range(4))
        _, (load,) = some.step(0)
        some.ended(load.number, Ended(1, True, seconds))
    mean = (0.8 * 0.1 + 0.2 * 0.2) / (4 * BLOCK)
    assert rates.to_load("int8", 100) == some.gauges()["load_row_seconds", "int8"] * 100 == pytest.approx(100 * mean)
    rates.see_load("int4", 9 * mean)
    assert some.admissions.seconds(0, admission.way) == pytest.approx(4 * BLOCK * mean)
    assert some.admissions.seconds(0, admission.way._replace(method="none/int4")) == pytest.approx(9 * 4 * BLOCK * mean)
    assert rates.to_load("fp8", 1) == pytest.approx(9 * mean)  # the slowest, until one was loaded
    rates.fade("fp8", "ram")
    assert rates.to_load("fp8", 1) < rates.to_load("int4", 1) == pytest.approx(9 * mean)
    (option,) = some.catalogue.options(admission.place.key, 4 * BLOCK, "", rates.to_load)
    assert option.decode_seconds == some.admissions.seconds(0, admission.way)


def test_a_load_reads_the_grains_of_its_store() -> None:
    some = manager()
    store = stored(some, "abcd")
    admission = some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0)
    assert admission is not None
    some.load("second", admission, [7, 8, 9, 4])
    _, (load,) = some.step(0)
    assert (load.grains, load.context, load.tokens) == (store.grains, store.context, 4 * BLOCK)
    assert load.nbytes == header(store.context, 4 * BLOCK, "none/int8").steps[-1].nbytes
    assert some.transfers.is_loading(admission.packet)
    some.ended(load.number, Ended(1, True, 0.1))
    assert not some.transfers.is_loading(admission.packet)
    assert not some.transfers.busy


def test_all_workers_must_succeed() -> None:
    some = manager(workers=3)
    some.offer("first", Place(hashes("abcd")[-1], 4 * BLOCK), range(4), [])
    (job,), _ = some.step(0)
    assert some.ended(job.number, Ended(2, True, 0.1)) is None
    assert some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0) is None
    assert some.ended(job.number, Ended(1, False, 0.1, "full")) is job
    assert some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0) is None
    assert some.counts["jobs", "store", "full"] == 1
    some.step(0)
    assert some.grains.free == some.grains.count


@pytest.mark.parametrize("ok", [True, False])
def test_a_damaged_packet_is_never_tried_again(ok: bool) -> None:
    some = manager()
    stored(some, "abcd")
    admission = some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0)
    assert admission is not None
    some.load("second", admission, range(4))
    _, (load,) = some.step(0)
    some.ended(load.number, Ended(1, ok, 0.1, "" if ok else "damaged"))
    some.rows.forget("first")
    some.step(0)
    assert (some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0) is not None) == ok
    assert some.counts["jobs", "load", "damaged"] == (not ok)
    assert (some.grains.free == some.grains.count) == (not ok)


def test_nothing_is_stored_from_blocks_that_are_gone() -> None:
    some = manager()
    some.offer("first", Place(hashes("abcd")[-1], 4 * BLOCK), range(4), [])
    some.rows.forget("first")
    assert some.step(0) == ([], [])
    assert not some.transfers.busy


def test_blocks_are_held_while_a_store_reads_them() -> None:
    some = manager()
    some.offer("first", Place(hashes("abcd")[-1], 4 * BLOCK), range(4), [])
    assert some.transfers.storing("first") == []
    (job,), _ = some.step(0)
    assert some.transfers.storing("first") == [job.number]
    some.ended(job.number, Ended(1, True, 0.1))
    assert some.transfers.storing("first") == []


def test_steps_measure_how_long_a_token_takes() -> None:
    now = [0.0]
    some = manager()
    some._clock, some.rates.prefill = lambda: now[0], 0.0
    for at, tokens in ((0.0, 100), (1.0, 8), (5.0, 200), (7.0, 0)):
        now[0] = at
        some.step(tokens)
    assert some.rates.prefill == pytest.approx(0.8 * 1 / 100 + 0.2 * 2 / 200)  # 8 tokens say nothing


def test_a_tier_that_fails_again_while_it_is_closed_was_closed_once() -> None:
    """A failure may be heard of twice: of the store, and of the job."""
    some = manager(16, lower=[(Tier("disk", 10**6, 1e9), Disk({}, 512))])
    for now in (0.0, 1.0, 2.0):
        some.closed.settle({"disk"}, now)
    assert some.counts["closed", "disk"] == 1
    assert "disk" in some.closed
    some.closed.settle(set(), 2.0 + PAUSE)
    assert "disk" not in some.closed
    some.closed.settle({"disk"}, 3.0 + PAUSE)
    assert some.counts["closed", "disk"] == 2


def test_what_is_read_slowly_is_computed() -> None:
    region: dict[int, tuple[str, int]] = {}
    some = manager(16, lower=[(Tier("disk", 10**6, 1e9), Disk(region, 512))])
    some.transfers.read_costs.append(("disk", 1.0))
    some.step(0)
    way = Way("none/int8", header("", 64, "none/int8").steps[-1])
    assert some.admissions.seconds(0, way, "disk") == way.step.nbytes
    assert some.admissions.seconds(0, way, "ram") == 0


def test_contexts_that_could_not_pass_through_are_not_stored() -> None:
    some = manager(16, lower=[(Tier("disk", 10**6, 1e9), Disk({}, 512))])
    some.offer("first", Place(hashes("abcdefgh")[-1], 8 * BLOCK), range(8), [])
    assert some.step(0) == ([], [])
    assert some.counts["refused",] == 1


def test_the_placement_hears_what_contexts_cost_now() -> None:
    """Storing pays only if computing takes long enough, which nobody knows at first."""
    some = manager(alpha=1e4)  # ten thousandths of quality are worth a second
    some.rates.prefill = 1e-3
    place = Place(hashes("abcd")[-1], 4 * BLOCK)
    some.offer("first", place, range(4), [])
    assert some.step(0) == ([], [])  # 0.064 seconds
    some.rates.prefill = 1.0
    some.offer("second", place, range(4), [])
    assert len(some.step(0)[0]) == 1


def test_contexts_that_nobody_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kara_kernels.integrations.vllm.contexts.manager.SEEN", 2)
    some = manager()
    for text in ("aa", "bb", "aa", "cc"):
        some.offer(text, Place(hashes(text)[-1], 2 * BLOCK), range(2), [])
        for job in some.step(0)[0]:
            some.ended(job.number, Ended(1, True, 0.1))
    stored = [text for text in ("aa", "bb", "cc") if some.admissions.find(hashes(text + "x"), 3 * BLOCK, 0)]
    assert stored == ["aa", "cc"]
    assert len(some._known) == 2
    some.step(0)
    assert some.grains.count - some.grains.free == sum(len(grains) for grains in some.transfers._held.values())
    assert len(some.transfers._held) == 2


def carry_out(some: ContextManager, disk: Disk, jobs: Sequence[Store]) -> None:
    """Stores, and what the disk has to do."""
    for job in jobs:
        disk.region.update({grain: (job.context, i) for i, grain in enumerate(job.grains)})
        some.ended(job.number, Ended(1, True, 0.1))
    for number in list(disk.jobs):
        disk.end(number, True)
    some.step(0)


@pytest.mark.parametrize(("method", "size", "fit"), [("none/exact", 17, 4), ("none/int8", 11, 6)])
def test_contexts_that_come_one_after_the_other_are_all_stored(method: str, size: int, fit: int) -> None:
    """Their requests end with the step that computes them, so rows are gone before another context has been written to
    the disk."""
    disk, names, now = Disk({}, 512), "abcdefghijkl", [0.0]
    some = manager(92, lower=[(Tier("disk", 10**6, 1e9), disk)], methods=[method], half_life=1.0)
    some._clock = lambda: now[0]
    for name in names:
        some.offer(name, Place(hashes(8 * name)[-1], 8 * BLOCK), range(8), [])
        (job,), _ = some.step(8 * BLOCK)
        assert len(job.grains) == size
        some.rows.forget(name)
        carry_out(some, disk, [job])
        now[0] += 2.0
    tiers = [copy.tier for copy in some.keeper.directory.copies()]
    assert tiers == ["disk"] * (len(names) - fit) + ["ram"] * fit
    assert some.grains.count - some.grains.free == fit * size
    assert not some.counts["moves", "given_up"]


def test_a_store_waits_for_what_passes_through_as_long_as_its_rows_are_there() -> None:
    disk = Disk({}, 512)
    some = manager(48, lower=[(Tier("disk", 10**6, 1e9), disk)], half_life=1.0)
    for name in "abcd":  # eleven grains each, and 36 hold three of them
        some.offer(name, Place(hashes(8 * name)[-1], 8 * BLOCK), range(8), [])
        carry_out(some, disk, some.step(0)[0])
    (low,) = (copy for copy in some.keeper.directory.copies() if copy.tier == "disk")
    way = some._known.way(Place.of(low.key), low.option)
    some.load("reader", Admission(Place.of(low.key), way, low.number, low.tier), range(8))
    some._clock = lambda: 9.0
    some.offer("e", Place(hashes(8 * "e")[-1], 8 * BLOCK), range(8), [])
    assert some.step(0)[0] == []
    for number in list(disk.jobs):
        disk.end(number, True)
    (store,), (load,) = some.step(0)
    assert (store.request_id, load.context) == ("e", low.key)
    assert not some.counts["moves", "given_up"]
    assert sum(n for (what, *_), n in some.counts.items() if what == "stored") == 5


def conversation(text: str, rows: int) -> Place:
    return Place(hashes(text)[-1], BLOCK * len(text), rows)


@pytest.mark.parametrize("place", [Place(b"\x01\xff", 64), Place(b"\x01\xff", 64, 40)])
def test_a_name_says_which_context_it_is(place: Place) -> None:
    assert Place.of(place.key) == place
    assert place.most_rows == (place.rows or 64)


@pytest.mark.parametrize("key", ["", "01ff", "01ff.", "01ff.64.", "xy.64", "01ff.64.40.x"])
def test_what_is_no_name_is_an_error(key: str) -> None:
    with pytest.raises(ValueError, match=r"invalid|values|non-hex"):
        Place.of(key)


def test_a_conversation_is_stored_as_it_is_and_admitted_by_those_who_may() -> None:
    some = manager()
    some.offer("first", conversation("abcd", 37), range(3), ())
    (job,), _ = some.step(0)
    assert (job.tokens, job.form, job.scorer, list(job.blocks)) == (37, "exact", "", [0, 1, 2])
    some.ended(job.number, Ended(1, True, 0.1))
    assert some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0) is None
    admission = some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0, conversations=True)
    assert admission is not None
    assert (admission.place, admission.way.method) == (conversation("abcd", 37), CONVERSATION)
    assert (admission.dropped, admission.way.step.rows, admission.exact) == (4 * BLOCK - 37, 37, False)
    some.used(admission.place, "ram", ())
    assert (
        some.admissions.find(hashes("abcdef"), 6 * BLOCK, 4 * BLOCK, conversations=True) is None
    )  # the pool has as much
    assert (
        some.admissions.find(hashes("abcd"), 4 * BLOCK, 0, conversations=True) is None
    )  # its last token must be computed


def test_who_may_not_go_on_finds_a_shorter_context_of_whole_rows() -> None:
    some = manager()
    stored(some, "ab")
    some.offer("second", conversation("abcd", 37), range(3), ())
    some.ended(some.step(0)[0][0].number, Ended(1, True, 0.1))
    for may, tokens in ((False, 2 * BLOCK), (True, 4 * BLOCK)):
        admission = some.admissions.find(hashes("abcdef"), 6 * BLOCK, 0, conversations=may)
        assert admission is not None
        assert admission.place.tokens == tokens


@pytest.mark.parametrize("ended", [False, True], ids=["while it is stored", "afterwards"])
@pytest.mark.parametrize("first", ["whole", "talk"])
def test_whole_rows_win(first: str, ended: bool) -> None:
    some, places = manager(), {"whole": Place(hashes("abcd")[-1], 4 * BLOCK), "talk": conversation("abcd", 37)}
    for name in (first, *places.keys() - {first}):
        some.offer(name, places[name], range(4), ())
        jobs = some.step(0)[0]
        if ended:
            for job in jobs:
                some.ended(job.number, Ended(1, True, 0.1))
    for number in list(some.transfers._running):
        some.ended(number, Ended(1, True, 0.1))
    some.step(0)
    assert [copy.key for copy in some.keeper.directory.copies()] == [places["whole"].key]
    assert len(some._known) == len(some.keeper.placement) == 1
    assert some.grains.count - some.grains.free == sum(len(grains) for grains in some.transfers._held.values())


def test_of_two_conversations_the_stored_one_stays() -> None:
    some = manager()
    for rows, expected in ((37, 37), (40, 37)):
        some.offer("someone", conversation("abcd", rows), range(3), ())
        for job in some.step(0)[0]:
            some.ended(job.number, Ended(1, True, 0.1))
        assert [copy.key for copy in some.keeper.directory.copies()] == [conversation("abcd", expected).key]
    some.keeper.lost(conversation("abcd", 37).key)
    some.offer("another", conversation("abcd", 40), range(3), ())
    some.ended(some.step(0)[0][0].number, Ended(1, True, 0.1))
    assert [copy.key for copy in some.keeper.directory.copies()] == [conversation("abcd", 40).key]


def test_blocks_are_held_for_what_may_still_be_stored() -> None:
    """Offered, but no step has planned it; stored; and never, where it finds no room."""
    some = manager()
    some.offer("first", conversation("abcd", 37), range(3), ())
    assert some.rows.hold("first")
    (job,), _ = some.step(0)
    some.rows.forget("first", but_due=True)
    assert some.rows.hold("first")
    some.ended(job.number, Ended(1, True, 0.1))
    assert not some.rows.hold("first")
    some.offer("huge", conversation("efgh", 10**4), range(3), ())
    some.step(0)
    some.rows.forget("huge", but_due=True)
    assert not some.rows.hold("huge")


def test_what_waits_for_room_holds_its_blocks_until_it_is_given_up() -> None:
    some = manager(8)
    some.offer("first", conversation("abcd", 37), range(3), ())
    (job,), _ = some.step(0)
    some.ended(job.number, Ended(1, True, 0.1))
    reading = some.keeper.load(job.context)
    some.rates.prefill = 1e3  # longer texts are worth more
    some.offer("second", conversation("efghijkl", 40), range(3), ())
    assert some.step(0) == ([], [])
    some.rows.forget("second", but_due=True)
    assert some.rows.hold("second")
    some.keeper.finish(reading)
    (job,), _ = some.step(0)
    assert job.request_id == "second"
    some.rows.forget("second")
    assert some.rows.hold("second")
    some.ended(job.number, Ended(1, True, 0.1))
    assert not some.rows.hold("second")


def test_a_reset_forgets_what_is_stored_and_drops_what_is_under_way() -> None:
    some = manager()
    before = stored(some, "abcd")
    copy = some.keeper.get(before.context)
    some.offer("second", Place(hashes("efgh")[-1], 4 * BLOCK), range(4), [])
    (job,), _ = some.step(0)
    some.offer("third", Place(hashes("ijkl")[-1], 4 * BLOCK), range(4), [])  # no step has planned it
    some.offer("huge", Place(hashes("m" * 400)[-1], 400 * BLOCK), range(400), [])  # refused, but its rows are there
    assert some.reset()
    assert some.counts["resets",] == 1
    assert not some.rows
    assert some.rows.hold("second")  # until its store has ended
    assert some.admissions.find(hashes("abcdx"), 5 * BLOCK, 0) is None
    assert some.grains.count - some.grains.free == len(job.grains)
    some.ended(job.number, Ended(1, True, 0.1))
    assert not some.rows.hold("second")
    assert some.step(0) == ([], [])
    assert some.keeper.directory.copies() == []
    assert len(some.keeper.placement) == len(some._known) == 0
    assert some.grains.free == some.grains.count
    assert stored(some, "abcd").number > before.number
    admission = some.admissions.find(hashes("abcdx"), 5 * BLOCK, 0)
    assert copy is not None
    assert admission is not None
    assert admission.copy > copy.number  # blocks of the old packet are never taken for its own


def test_what_waits_for_room_is_not_stored_after_a_reset() -> None:
    some = manager(8)
    some.offer("first", conversation("abcd", 37), range(3), ())
    (job,), _ = some.step(0)
    some.ended(job.number, Ended(1, True, 0.1))
    reading = some.keeper.load(job.context)
    some.rates.prefill = 1e3  # longer texts are worth more
    some.offer("second", conversation("efghijkl", 40), range(3), ())
    assert some.step(0) == ([], [])
    assert some.rows.hold("second")
    assert some.reset()
    assert not some.rows.hold("second")
    some.keeper.finish(reading)
    assert some.step(0) == ([], [])
    assert some.grains.free == some.grains.count


def test_a_reset_says_whether_a_request_waits_for_old_rows() -> None:
    """Their grains stay as they are until then."""
    some = manager()
    stored(some, "abcd")
    admission = some.admissions.find(hashes("abcdx"), 5 * BLOCK, 0)
    assert admission is not None
    some.load("second", admission, range(4))
    _, (load,) = some.step(0)
    assert not some.reset()
    assert some.admissions.find(hashes("abcdx"), 5 * BLOCK, 0) is None
    some.step(0)
    assert some.grains.count - some.grains.free == len(load.grains)
    some.ended(load.number, Ended(1, True, 0.1))
    some.step(0)
    assert some.grains.free == some.grains.count
    assert some.reset()


def test_a_tier_that_is_closed_for_good_never_opens() -> None:
    some = manager(16, lower=[(Tier("disk", 10**6, 1e9), Disk({}, 512))])
    some.closed.close("disk")
    some.closed.settle({"disk"}, 1.0)  # it may have failed at last
    some.closed.settle(set(), 3.0 + PAUSE)
    assert "disk" in some.closed
    assert not some.counts["closed", "disk"]
    assert some.keeper.placement._market.capacity == [12 * 512, 0]


@pytest.mark.parametrize(
    ("place", "method", "is_taken"),
    [
        (conversation("abcd", 37), CONVERSATION, True),
        (conversation("abcd", 37), "none/exact", False),
        (Place(hashes("abcd")[-1], 4 * BLOCK), CONVERSATION, False),
        (Place(hashes("abcd")[-1], 4 * BLOCK), "none/exact", True),
    ],
)
def test_a_conversation_that_was_left_is_known_by_its_name_and_its_method(
    place: Place, method: str, is_taken: bool
) -> None:
    some = manager()
    nbytes = some.grains.needed(header(place.key, place.most_rows, method).steps[-1].nbytes) * some.grains.nbytes
    assert (some._known.left(place, Option(method, 1.0, nbytes, 1.0)) is not None) == is_taken


class Days(RuleBasedStateMachine):
    """Requests of a few documents come, are admitted, preempted and end, and some leave a conversation; jobs end in any
    order, and some fail. Now and then, everything is forgotten."""

    @initialize(grains=st.integers(0, 60), workers=st.integers(1, 2), disk=st.sampled_from([0, 20, 1000]))
    def start(self, grains: int, workers: int, disk: int) -> None:
        self.region: dict[int, tuple[str, int]] = {}  # grain -> (context, place in its packet)
        self.disk = Disk(self.region, 512)
        lower = [(Tier("disk", disk * 512, 1e9), self.disk)] if disk else []
        self.manager, self.workers = manager(grains, workers, lower=lower), workers
        self.requests: dict[str, tuple[str, list[int]]] = {}  # text and blocks
        self.jobs: dict[int, tuple[Store | Load, int]] = {}  # and workers that have not reported
        self.blocks = self.names = self.oldest = 0  # oldest: the first copy that may be stored
        self.talked: set[str] = set()  # requests that have ended, and may be storing a conversation
        self.told: dict[str, tuple[str, Option]] = {}  # what is stored, as a trace has it
        watch(self.manager, self.hear)

    def hear(self, event: str, copy: Copy, came_from: str | None = None, **more: Any) -> None:
        if event in ("damaged", "failed"):  # it is dropped next, if it was not yet
            return
        before = self.told.pop(copy.key, None)
        if event != "dropped":
            self.told[copy.key] = copy.tier, copy.option
        if event in ("stored", "found"):
            assert before is None or before[1] != copy.option or before[0] != copy.tier
            return
        assert before is not None
        assert before[0] == (came_from or copy.tier)
        assert event != "dropped" or before[1] == copy.option

    def text(self, data: st.DataObject) -> str:
        return data.draw(st.text("ab", min_size=2, max_size=7))

    @rule(data=st.data(), asked=st.booleans(), local=st.integers(0, 3))
    def request(self, data: st.DataObject, asked: bool, local: int) -> None:
        text, name = self.text(data), f"r{self.names}"
        self.names += 1
        prompt, tokens = hashes(text), BLOCK * len(text)
        blocks = [self.blocks + i for i in range(len(text))]
        self.blocks += len(text)
        self.requests[name] = text, blocks
        place = self.manager.place(prompt, tokens, BLOCK * (len(text) - 1) if asked else None)
        admission = self.manager.admissions.find(prompt, tokens, BLOCK * local, conversations=asked)
        if admission is not None:
            assert asked or not admission.dropped
            assert BLOCK * local < admission.place.tokens < tokens
            assert admission.place.block_hash == prompt[admission.place.tokens // BLOCK - 1]
            if not self.manager.transfers.is_loading(admission.packet):
                self.manager.load(name, admission, blocks[: -(-admission.way.step.rows // BLOCK)])
                self.manager.used(admission.place, admission.tier, [])
        elif place is not None:
            self.manager.offer(name, place, blocks[: place.tokens // BLOCK], [])

    @rule()
    def step(self) -> None:
        touched = {grain for job, _ in self.jobs.values() for grain in job.grains}
        touched |= {grain for _, _, grains in self.disk.jobs.values() for grain in grains}
        stores, loads = self.manager.step(5)
        for job in stores:
            text, blocks = self.requests[job.request_id]  # it has not ended
            place = Place.of(job.context)
            assert list(job.blocks) == blocks[: -(-job.tokens // BLOCK)]
            assert (place.block_hash, place.most_rows) == (hashes(text)[place.tokens // BLOCK - 1], job.tokens)
            assert (place.rows is not None) == (job.request_id in self.talked)
            assert not touched & set(job.grains)  # nobody reads or writes them
            self.region.update({grain: (job.context, i) for i, grain in enumerate(job.grains)})
        for job in loads:  # a load of nothing fails
            assert [self.region[grain] for grain in job.grains] == [(job.context, i) for i in range(len(job.grains))]
            assert not job.grains or len(job.grains) == self.manager.grains.needed(job.nbytes)
        self.jobs.update({job.number: (job, self.workers) for job in (*stores, *loads)})
        for name in self.talked:
            self.manager.rows.forget(name, but_due=True)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def end(self, data: st.DataObject, ok: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.jobs)))
        job, left = self.jobs[number]
        ok = ok and bool(job.grains)
        done = self.manager.ended(number, Ended(1, ok, 0.1, "" if ok else "damaged"))
        assert (done is not None) == (left == 1)
        self.jobs[number] = job, left - 1
        if left == 1:
            del self.jobs[number]

    @precondition(lambda self: self.disk.jobs)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def end_of_disk(self, data: st.DataObject, ok: bool) -> None:
        self.disk.end(data.draw(st.sampled_from(sorted(self.disk.jobs))), ok)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), dropped=st.integers(0, 40))
    def leave(self, data: st.DataObject, dropped: int) -> None:
        """Its blocks are freed when no store reads them."""
        name = data.draw(st.sampled_from(sorted(self.requests)))
        text, blocks = self.requests[name]
        if name in self.talked:
            if not self.manager.rows.hold(name):
                self.talked.remove(name)
                del self.requests[name]
            return
        if 0 < dropped < BLOCK * len(text):
            self.manager.rows.forget(name)
            rows = BLOCK * len(text) - dropped
            self.manager.offer(name, conversation(text, rows), blocks[: -(-rows // BLOCK)], ())
            self.talked.add(name)
            return
        storing = {n for n, (job, _) in self.jobs.items() if isinstance(job, Store) and job.request_id == name}
        assert set(self.manager.transfers.storing(name)) == storing
        if not storing:
            self.manager.rows.forget(name)
            del self.requests[name]

    @rule(now=st.integers(0, 4))
    def reset(self, now: int) -> None:
        if now == 0:
            loads = [x for x in self.manager.transfers._running.values() if isinstance(x.job, Load)]
            assert self.manager.reset() == (not loads)
            assert not self.told
            self.oldest = self.manager.keeper.directory._number

    @invariant()
    def judge(self) -> None:
        if hasattr(self, "manager"):
            for copy in self.manager.keeper.directory.copies():
                assert copy.number >= self.oldest
                place = Place.of(copy.key)
                assert self.manager._known.place(place.block_hash) == place
            assert 0 <= self.manager.transfers._staged <= self.manager.transfers.staging
            used = self.manager.grains.count - self.manager.grains.free - self.manager.transfers._staged
            assert used * 512 <= self.manager.keeper.directory._tiers["ram"].capacity
            copies = self.manager.keeper.directory.copies()
            assert self.told == {copy.key: (copy.tier, copy.option) for copy in copies}

    def teardown(self) -> None:
        """At the end of the day nothing is lost: what is not stored is free, and what is stored is whole."""
        if not hasattr(self, "manager"):
            return
        quiet = 0
        for _ in range(200):
            for name in list(self.requests):
                if not self.manager.transfers.storing(name):
                    self.manager.rows.forget(name)
                    del self.requests[name]
            self.step()
            for number, (job, left) in self.jobs.items():
                ok = bool(job.grains)
                self.manager.ended(number, Ended(left, ok, 0.1, "" if ok else "damaged"))
            self.jobs.clear()
            for number in list(self.disk.jobs):
                self.disk.end(number, True)
            quiet = 0 if self.manager.transfers.busy or self.requests else quiet + 1
            if quiet > 3:
                break
        else:
            raise AssertionError("something never ends")
        assert self.manager.transfers._staged == self.manager.keeper._running == 0
        kept = {"ram": 0, "disk": 0}
        for copy in self.manager.keeper.directory.copies():
            count = self.manager.grains.needed(copy.option.nbytes)
            held = self.manager.transfers._held[copy.number]
            where = self.region if copy.tier == "ram" else self.disk.copies[copy.number]
            assert [where[grain] for grain in held] == [(copy.key, i) for i in range(count)]
            kept[copy.tier] += count
        assert self.manager.grains.count - self.manager.grains.free == kept["ram"]
        assert kept["ram"] <= self.manager.grains.count - self.manager.transfers.staging
        assert sum(map(len, self.disk.copies.values())) == kept["disk"]


TestDays = Days.TestCase
TestDays.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
