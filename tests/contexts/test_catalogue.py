"""What vLLM's contexts may be stored as: what a profile says, and what the manager makes of it."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from lower_tier import Disk
from test_manager import BLOCK, hashes, header, manager, stored

from kara_kernels.contexts.packet import Header
from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext, ProfileError, keys_of
from kara_kernels.contexts.utility import Option, Tier
from kara_kernels.integrations.vllm import watched
from kara_kernels.integrations.vllm.contexts.catalogue import Catalogue, Way
from kara_kernels.integrations.vllm.contexts.grains import Grains
from kara_kernels.integrations.vllm.contexts.jobs import Ended
from kara_kernels.integrations.vllm.contexts.manager import ContextManager, Place
from kara_kernels.integrations.vllm.contexts.trace import watch
from kara_kernels.payload import EXACT_ROWS

TOKENS = 1024
IDS = list(range(TOKENS + 200))


def measured(tokens: int, losses: Sequence[float], method: str = "none/int8") -> tuple[Measured, ...]:
    """Divergences of all packets of all rows, from the one with four bits on."""
    steps = [step for step in header("", tokens, method).steps if step.rows == tokens]
    assert len(steps) == len(losses)
    return tuple(
        Measured(method, step.sections, step.ratio, step.nbytes, 0.1, tokens, kl, 1.0)
        for step, kl in zip(steps, losses, strict=True)
    )


LOSSES = [0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0.001]


def profile(path: Path, ids: Sequence[int] = IDS[:TOKENS], losses: Sequence[float] = LOSSES) -> str:
    (key,) = keys_of(ids, [len(ids)])
    context = ProfiledContext(key, "", len(ids), 1.0, 0.1, ("?",), measured(len(ids), losses))
    Profile("made", {}, (), {key: context}).save(path)
    return str(path)


def options(catalogue: Catalogue, ids: Sequence[int], tokens: int) -> list[Option]:
    return catalogue.options("a key", tokens, catalogue.find(ids, tokens), lambda form, rows: 0.0)


def until_changed(catalogue: Catalogue) -> None:
    until = time.monotonic() + 10
    while not catalogue.changed():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "SECONDS", 0.0)


def test_keys_are_those_of_the_prefixes() -> None:
    expected = [hashlib.sha256(b"".join(x.to_bytes(8, "little") for x in IDS[:n])).hexdigest()[:32] for n in (3, 3, 40)]
    assert list(keys_of(IDS, (3, 3, 40))) == expected


def test_without_a_profile_eight_bits_are_safe() -> None:
    catalogue = Catalogue(header, Grains(64, 512))
    (option,) = options(catalogue, IDS, TOKENS)
    whole = header("a key", TOKENS, "none/int8").steps[-1]
    assert (option.method, option.quality, option.ratio) == ("none/int8", 0.9999, whole.ratio)
    assert option.nbytes == -(-whole.nbytes // 512) * 512
    way = catalogue.way("a key", TOKENS, option)
    assert way is not None
    assert (way.method, way.form, way.scorer, way.step) == ("none/int8", "int8", "", whole)


def test_a_profile_says_what_fewer_bits_cost(tmp_path: Path) -> None:
    catalogue = Catalogue(header, Grains(64, 512), profile=profile(tmp_path / "p"))
    found = options(catalogue, IDS, TOKENS)
    assert [option.quality for option in found] == [math.exp(-kl) for kl in LOSSES]
    for option, each in zip(found, measured(TOKENS, LOSSES), strict=True):
        way = catalogue.way("a key", TOKENS, option)
        assert way is not None
        assert way.step.sections == each.sections


def test_packets_of_fewer_rows_say_nothing_about_those_of_all(tmp_path: Path) -> None:
    path = tmp_path / "p"
    made = Profile.load(profile(path))
    (context,) = made.contexts.values()
    fewer = header("", TOKENS, "none/int8").steps[0]
    assert fewer.rows < TOKENS
    better = Measured("none/int8", fewer.sections, fewer.ratio, fewer.nbytes, 0.1, fewer.rows, 0.0, 1.0)
    context = replace(context, measured=(better, *context.measured))
    replace(made, contexts={context.key: context}).save(path)
    found = options(Catalogue(header, Grains(64, 512), profile=str(path)), IDS, TOKENS)
    assert [option.quality for option in found] == [math.exp(-kl) for kl in LOSSES]


def dropping(tokens: int, ids: Sequence[int] = IDS[:TOKENS], method: str = "keydiff/int8") -> Profile:
    """Half of the rows with four bits, three quarters of them, and all with half of them fine."""
    steps = header("", tokens, method).steps
    chosen = [
        min((step for step in steps if step.finer == steps[0].finer), key=lambda step: abs(step.rows - share * tokens))
        for share in (0.5, 0.75)
    ] + [next(step for step in steps if step.finer >= tokens // 2)]
    found = tuple(
        Measured(method, step.sections, step.ratio, step.nbytes, 0.1, step.rows, kl, 1.0)
        for step, kl in zip(chosen, (0.09, 0.05, 0.01), strict=True)
    )
    (key,) = keys_of(ids, [len(ids)])
    return Profile("made", {}, (), {key: ProfiledContext(key, "", len(ids), 1.0, 0.1, ("?",), found)})


def way_of(catalogue: Catalogue, tokens: int, option: Option) -> Way:
    way = catalogue.way("a key", tokens, option)
    assert way is not None
    return way


def test_ordered_rows_may_be_dropped_as_far_as_a_profile_has_measured(tmp_path: Path) -> None:
    """Also of a context that is a little longer, of which at least as large a share is kept."""
    dropping(TOKENS).save(tmp_path / "p")
    methods = ("none/int8", "keydiff/int8")
    catalogue = Catalogue(header, Grains(640, 64), methods, str(tmp_path / "p"), windows=True)
    measured_as = Profile.load(tmp_path / "p").contexts.popitem()[1].measured  # type: ignore[attr-defined]
    for tokens in (TOKENS, TOKENS + BLOCK, TOKENS * 10 // 9 // BLOCK * BLOCK):
        safe, *found = options(catalogue, IDS, tokens)
        assert (safe.method, safe.quality) == ("none/int8", 0.9999)
        assert [option.quality for option in found] == [math.exp(-kl) for kl in (0.09, 0.05, 0.01)]
        assert [way_of(catalogue, tokens, option).step.rows < tokens for option in found] == [True, True, False]
        for option, each in zip(found, measured_as, strict=True):
            way = way_of(catalogue, tokens, option)
            assert (way.form, way.scorer) == ("int8", "keydiff")
            assert (way.step.rows - EXACT_ROWS) * TOKENS >= (each.rows - EXACT_ROWS) * tokens
            grade = header("", tokens, "keydiff/int8").layout.grade_rows
            assert way.step.rows < each.rows * tokens / TOKENS + grade
            if tokens == TOKENS:
                assert way.step.sections == each.sections


def test_an_engine_that_cannot_drop_rows_knows_no_such_packets(tmp_path: Path) -> None:
    """An earlier process, or another server, may have stored them."""
    dropping(TOKENS).save(tmp_path / "p")
    able = Catalogue(header, Grains(640, 64), ("keydiff/int8",), str(tmp_path / "p"), windows=True)
    unable = Catalogue(header, Grains(640, 64), profile=str(tmp_path / "p"))
    for option in options(able, IDS, TOKENS):
        assert able.way("a key", TOKENS, option) is not None
        assert unable.way("a key", TOKENS, option) is None


def test_rows_that_cannot_be_ranked_again_displace_nothing(tmp_path: Path) -> None:
    """Of two contexts, one was cut to fit. It is asked for again and again, out of the engine's own cache: its rows are
    at hand, but a larger packet of them needs their queries."""
    method = "kara_sampled/int8"
    dropping(TOKENS, method=method).save(tmp_path / "p")
    some = manager(110, methods=[method], profile=str(tmp_path / "p"))
    for name in "ab":
        some.offer(name, Place(hashes(64 * name)[-1], TOKENS), range(64), IDS, 0)
        (job,), _ = some.step(0)
        some.ended(job.number, Ended(1, True, 0.1))
        some.step(0)
        some.rows.forget(name)
    sizes = {copy.key: copy.option.nbytes for copy in some.keeper.directory.copies()}
    assert sorted(sizes.values()) == [38 * 512, 66 * 512]
    place = Place.of(min(sizes, key=lambda key: sizes[key]))
    for _ in range(9):
        some.offer("again", place, range(64), IDS)
        assert some.step(0) == ([], [])
        some.rows.forget("again")
    assert {copy.key: copy.option.nbytes for copy in some.keeper.directory.copies()} == sizes
    assert some.counts["refused",] == some.counts["moves", "given_up"] == 0
    assert some.keeper.placement.hits(place.key) > 9


def test_the_longest_profiled_prefix_is_found(tmp_path: Path) -> None:
    ids = {TOKENS - BLOCK: [0.5] * 9, TOKENS: LOSSES}
    made = [Profile.load(profile(tmp_path / "p", IDS[:n], losses)) for n, losses in ids.items()]
    replace(made[0], contexts={**made[0].contexts, **made[1].contexts}).save(tmp_path / "p")
    catalogue = Catalogue(header, Grains(64, 512), profile=str(tmp_path / "p"))
    assert options(catalogue, IDS, TOKENS)[0].quality == math.exp(-LOSSES[0])


def test_a_profile_holds_for_what_is_little_longer(tmp_path: Path) -> None:
    """With a step of at least the share of fine rows that was measured: a longer context has other grades."""
    catalogue = Catalogue(header, Grains(64, 512), profile=profile(tmp_path / "p"))
    least = header("", TOKENS, "none/int8").steps
    for tokens in (TOKENS + BLOCK, TOKENS * 10 // 9 // BLOCK * BLOCK):
        found = {option.quality: option for option in options(catalogue, IDS, tokens)}
        assert len(found) > 1
        for kl, each in zip(LOSSES, measured(TOKENS, LOSSES), strict=True):
            if (option := found.get(math.exp(-kl))) is not None:
                way = catalogue.way("a key", tokens, option)
                assert way is not None
                finer = next(step.finer for step in least if step.sections == each.sections)
                assert (way.step.finer - EXACT_ROWS) / tokens >= (finer - EXACT_ROWS) / TOKENS
    for ids, tokens in ((IDS, TOKENS + 130), (IDS, TOKENS - BLOCK), ([9, *IDS[1:]], TOKENS), ([], TOKENS)):
        assert len(options(catalogue, ids, tokens)) == 1


def test_packets_of_as_many_grains_are_one_option(tmp_path: Path) -> None:
    grain = 4096
    catalogue = Catalogue(header, Grains(64, grain), profile=profile(tmp_path / "p"))
    found = options(catalogue, IDS, TOKENS)
    assert len(found) < len(LOSSES)
    assert len({option.nbytes for option in found}) == len(found)
    for option in found:
        way = catalogue.way("a key", TOKENS, option)
        assert way is not None
        assert option.nbytes - grain < way.step.nbytes <= option.nbytes
        larger = [step for step in header("a key", TOKENS, "none/int8").steps if way.step.nbytes < step.nbytes]
        assert not larger or larger[0].nbytes > option.nbytes


@pytest.mark.parametrize(("method", "nbytes"), [("keydiff/int8", 512), ("none/int8", 512), ("none/int8", 10**6)])
def test_packets_that_it_does_not_make_are_not_known(method: str, nbytes: int) -> None:
    catalogue = Catalogue(header, Grains(64, 512))
    assert catalogue.way("a key", TOKENS, Option(method, 0.5, nbytes, 1.0)) is None


def test_a_profile_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "p"
    catalogue = Catalogue(header, Grains(64, 512), profile=str(path))
    assert not catalogue.changed()
    assert (catalogue.version, catalogue.profiled) == (1, 0)
    profile(path)
    until_changed(catalogue)
    assert (catalogue.version, catalogue.profiled) == (2, 1)
    path.write_text("no profile")
    until = time.monotonic() + 10
    while not catalogue.refused:
        assert not catalogue.changed()
        assert time.monotonic() < until
    assert len(options(catalogue, IDS, TOKENS)) == len(LOSSES)
    path.unlink()
    assert not catalogue.changed()
    assert (catalogue.version, catalogue.refused, catalogue.profiled) == (2, 2, 1)
    profile(path, losses=[0.5] * 9)
    os.utime(path, (1, 1))
    until_changed(catalogue)
    assert options(catalogue, IDS, TOKENS)[0].quality == math.exp(-0.5)
    assert catalogue.age > 1e6


def test_a_profile_that_cannot_be_read_at_first_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text("{}")
    with pytest.raises(ProfileError, match="expected a profile"):
        Catalogue(header, Grains(64, 512), profile=str(path))


def held(some: ContextManager, text: str) -> Option | None:
    copy = some.keeper.get(Place(hashes(text)[-1], BLOCK * len(text)).key)
    return None if copy is None else copy.option


def test_an_admission_builds_no_header_again() -> None:
    """It takes a quarter of a millisecond, and the scheduler asks in every step while a request waits."""
    some, built = manager(256), []

    def counting(key: str, tokens: int, method: str) -> Header:
        built.append(key)
        return header(key, tokens, method)

    some._known.catalogue = Catalogue(counting, some.grains)
    stored(some, ALICE)
    before = len(built)
    assert before > 0
    for _ in range(3):
        assert some.admissions.find(hashes(ALICE + "x"), TOKENS + BLOCK, 0) is not None
    assert len(built) == before


ALICE, BOB = "a" * 64, "b" * 64  # contexts of 1,024 tokens


def test_what_the_profile_allows_is_cut_where_room_is_short(tmp_path: Path) -> None:
    needed = Grains(1, 512).needed(header("", TOKENS, "none/int8").steps[-1].nbytes)
    some, told = manager(needed * 8 // 5, alpha=1.0, profile=profile(tmp_path / "p")), []
    watch(some, lambda event, copy, **more: told.append((event, copy.option.nbytes)))
    stored(some, ALICE, "alice", IDS)
    stored(some, BOB, "bob", [7] * TOKENS)  # not in the profile
    assert held(some, BOB).nbytes == needed * 512  # type: ignore[union-attr]
    assert held(some, ALICE).nbytes == 23040  # type: ignore[union-attr]
    admission = some.admissions.find(hashes(ALICE + "x"), TOKENS + BLOCK, 0)
    assert admission is not None
    assert admission.nbytes <= held(some, ALICE).nbytes  # type: ignore[union-attr]
    assert some.counts["moves", "cut"] == 1
    assert told == [("stored", needed * 512), ("cut", 23040), ("stored", needed * 512)]


def test_what_a_new_profile_finds_too_bad_leaves(tmp_path: Path) -> None:
    path = tmp_path / "p"
    some, told = manager(256, alpha=1e-3, profile=profile(path)), []
    watch(some, lambda event, copy, **more: told.append(event))
    stored(some, ALICE, "alice", IDS)
    assert held(some, ALICE) is not None
    profile(path, losses=[0.5] * 9)
    os.utime(path, (1, 1))
    until = time.monotonic() + 10
    while held(some, ALICE) is not None:
        some.step(0)
        assert time.monotonic() < until
    assert some.grains.free == some.grains.count
    assert some.counts["below_floor",] == 1
    assert told == ["stored", "below_floor", "dropped"]


def test_what_tiers_are_worth_is_told(tmp_path: Path) -> None:
    some = manager(512, alpha=2.0, lower=[(Tier("disk", 10**6, 1e9), Disk({}, 512))])
    assert (some.gauges()["utility", "ram"], some.gauges()["utility", "disk"]) == (0, 0)
    stored(some, ALICE, "alice", IDS)
    again = some.keeper.placement.utilities(0.0)
    assert again["ram"] == pytest.approx(some.keeper.placement.utility(0.0), abs=1e-9)
    assert again["ram"] == pytest.approx(2.0 * 0.9999, abs=1e-3)
    assert again["disk"] == 0
    assert some.gauges()["utility", "ram"] == 0  # it is summed now and then


def test_what_is_left_by_another_process_stays_until_it_is_used(tmp_path: Path) -> None:
    """Nobody knows which text it is of before."""
    where = str(profile(tmp_path / "p"))
    for known, left in ((where, True), (None, False)):
        some = manager(256, profile=where, lower=[(Tier("disk", 10**6, 1e9), Disk({}, 512))])
        place = Place(hashes(ALICE)[-1], TOKENS)
        some.offer("alice", place, range(64), IDS)
        measured = some.catalogue.options(place.key, TOKENS, some.catalogue.find(IDS, TOKENS), some.rates.to_load)
        smallest = min(measured, key=lambda option: option.nbytes)
        copy = some.keeper.directory.store(place.key, smallest, "disk")
        assert copy is not None
        some.keeper.directory.finish(copy, True)
        some.keeper.save(tmp_path / "directory")
        again = manager(256, profile=known, lower=[(Tier("disk", 10**6, 1e9), Disk({}, 512))])
        again.restore(tmp_path / "directory", lambda number, grains: True)
        again.step(0)
        assert held(again, ALICE) == smallest
        admission = again.admissions.find(hashes(ALICE + "x"), TOKENS + BLOCK, 0)
        assert admission is not None
        again.used(place, "disk", IDS)
        again.step(0)
        assert (held(again, ALICE) is not None) == left
