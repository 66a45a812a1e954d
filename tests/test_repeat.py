"""Repeated events: the same results and errors as ordinary calls, and nothing kept that is the caller's.

Interpreted, or with TRITON_INTERPRET=0 as compiled code in the emulator.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from bench.compile_only import compiling_for
from kara_kernels import CompressedWindow, LookAhead, PackedQueries, PagedCache, compress_window
from kara_kernels.ops import pack_queries
from kara_kernels.options import OPTIONS
from kara_kernels.windows import repeat
from kara_kernels.windows.repeat import kind_of

if not INTERPRETED:
    from ptx import emulating

LAYERS, HEADS, GROUP, DIM, PAGE, WINDOW, KEEP = 2, 2, 2, 16, 8, 24, 10
LENGTHS = [[30, 41], [20, 50], [37, 23]]  # of two sequences, call by call; some windows do not fit


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents are not checked on a GPU. On a CPU they are, and such calls are not repeated."""
    for module in ("request", "repeat"):
        monkeypatch.setattr(f"kara_kernels.windows.{module}.contents_are_checked", lambda device: False)


def pools(seed: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(LAYERS, 20, PAGE, HEADS, DIM, generator=generator).to(dtype) for _ in range(2)]


def in_place(scores: torch.Tensor) -> None:
    scores.neg_()


def arguments(seed: int, form: str) -> dict[str, Any]:
    """Those of one call. Contents, addresses and the width of the block table depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS[seed % len(LENGTHS)]).int()
    width = 8 + seed % 2
    tables = torch.randperm(20, generator=generator)[: 2 * width].int().view(2, width)
    query = torch.randn(LAYERS, 2, 20, HEADS * GROUP, DIM, generator=generator).bfloat16()
    given: dict[str, Any] = {"query": query, "block_tables": tables, "seq_lens": lengths}
    given |= {"window": WINDOW, "keep": KEEP}
    if form == "fp8":
        given["query"] = query.to(torch.float8_e4m3fn)
    elif form == "scales":
        given |= {"k_scale": torch.rand(LAYERS, HEADS, generator=generator) + 0.5, "scale": 0.3, "redundancy": 1.0}
    elif form == "recorded":
        rows = torch.randperm(45, generator=generator)[:40].int().view(2, 20)
        ring = torch.randn(LAYERS, 45, HEADS * GROUP, DIM, generator=generator).bfloat16()
        angles = torch.rand(DIM // 2, generator=generator)
        given |= {
            "query": pack_queries(ring, backend="torch"), "query_rows": rows,
            "window_starts": (lengths - 24).clamp(min=0), "protected_lens": torch.tensor([0, 3]).int(),
            "look_ahead": LookAhead(angles.cos(), angles.sin()),
        }  # fmt: skip
    elif form == "pooled":
        given |= {"pool": "layer"}
    elif form == "reduced":
        given |= {"pool": "model", "reduce_scores": lambda scores: scores * (seed - 1)}
    elif form == "reduced in place":
        given |= {"reduce_scores": in_place}
    return given


@contextmanager
def device(caches: Sequence[PagedCache], calls: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Runs the calls inside, of these arguments, and checks that the emulator reports no problem."""
    if INTERPRETED:
        yield
        return
    memory = [tensor for cache in caches for half in (cache.k, cache.v) for tensor in half or ()]
    with emulating("together", [*memory, *(tensor for given in calls for tensor in tensors_of(given))]) as launches:
        yield
    assert not [str(problem) for launch in launches for problem in launch.problems]


def tensors_of(given: dict[str, Any]) -> list[torch.Tensor]:
    values = [part for value in given.values() for part in (value if isinstance(value, tuple) else [value])]
    return [value for value in values if isinstance(value, torch.Tensor)]


def call(cache: PagedCache, given: dict[str, Any]) -> CompressedWindow:
    return compress_window(k_cache=cache.k, v_cache=cache.v, backend="triton", **given)


@pytest.mark.parametrize("form", ["plain", "fp8", "scales", "recorded", "pooled", "reduced", "reduced in place"])
@pytest.mark.parametrize("latent", [False, True], ids=["keys and values", "latent"])
def test_repetitions_equal_ordinary_calls(form: str, latent: bool) -> None:
    caches = [PagedCache(*(pool.clone() for pool in pools(0)[: 1 if latent else 2])) for _ in range(2)]
    calls = [arguments(seed, form) for seed in range(3)]
    skipped = 0
    with device(caches, calls):
        for given in calls:
            caches[1].events.clear()  # so that every call of it is ordinary
            found, expected = (call(cache, given) for cache in caches)
            for mine, other in zip(found, expected, strict=True):
                assert torch.equal(mine.nan_to_num(-1), other.nan_to_num(-1))
                assert mine.stride() == other.stride()
            for mine, other in zip(caches[0].k, caches[1].k, strict=True):
                assert torch.equal(mine, other)
            if not latent:
                assert all(map(torch.equal, caches[0].v or (), caches[1].v or ()))
            assert (found.keep_indices >= 0).any()
            skipped += int((found.keep_indices == -1).any())
    assert skipped == 2  # windows that do not fit, which the device decides
    assert len(caches[0].events) == 1  # the first call made it, two repeated it


def test_what_decides_about_launches_is_part_of_a_kind() -> None:
    """Calls that differ in it are calls of another kind, not repetitions with wrong arguments."""
    base = arguments(0, "recorded")
    k, v = pools(0)
    cache = PagedCache(k, v)

    def kind(**changed: Any) -> Any:
        given = base | changed
        options = {name: given.pop(name) for name in list(given) if name in OPTIONS}
        rest = {"scale": None, "k_scale": None, "scores": None, "reduce_scores": None, "dry_run": False} | given
        positional = [rest.pop(name) for name in ("query", "block_tables", "seq_lens")]
        return kind_of(positional[0], cache.k, cache.v, *positional[1:], "triton", rest | {"options": options})

    first = kind()
    assert first is not None
    assert first == kind()
    codes, scales = base["query"]
    cos, sin, _ = base["look_ahead"]
    shifted = torch.empty(codes.numel() + 4, dtype=torch.uint8)[4:].view(codes.shape)
    others = [
        kind(query=PackedQueries(shifted, scales)), kind(query=PackedQueries(codes[:, :30], scales[:, :30])),
        kind(query=codes), kind(query_rows=None), kind(query_rows=base["query_rows"][:, :19]),
        kind(query_rows=base["query_rows"].t().contiguous().t()), kind(window_starts=None), kind(protected_lens=None),
        kind(seq_lens=base["seq_lens"].long()), kind(seq_lens=base["seq_lens"].repeat(2)[::2]), kind(window=16),
        kind(window=24.0), kind(keep=9), kind(keep=True), kind(scale=1.0), kind(k_scale=2.0), kind(k_scale=cos[:1]),
        kind(k_scale=cos[:2]), kind(look_ahead=None), kind(look_ahead=LookAhead(cos, sin, True)),
        kind(look_ahead=LookAhead(cos[:4], sin[:4])), kind(block_tables=base["block_tables"].t().contiguous().t()),
        kind(block_tables=base["block_tables"].long()), kind(value_norm=True), kind(value_norm=1),
        kind(reduction="mean"), kind(redundancy=1.0), kind(chunk_fraction=0.2), kind(max_chunk=4), kind(pool="layer"),
        kind(reduce_scores=print), kind(reduce_scores=3),
    ]  # fmt: skip
    assert None not in others
    assert len({first, *others}) == 1 + len(others)
    wider = torch.zeros(2, 11, dtype=torch.int32)[:, :9]
    assert kind(block_tables=wider) == first  # widths differ from call to call, and are passed
    assert kind(reduce_scores=print) == kind(reduce_scores=len)
    for ordinary in ({"scores": scales}, {"dry_run": True}, {"dry_run": 0}, {"query": [codes]}, {"query": None},
                     {"block_tables": [[0]]}, {"block_tables": cos}):  # fmt: skip
        assert kind(**ordinary) is None, ordinary
    assert kind_of(codes, k, v, wider, base["seq_lens"], "triton", {}) is None  # a pool that is not checked yet


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": True}, "keep: expected an int"),
        ({"window": 24.0}, "window: expected an int"),
        ({"value_norm": 1}, "value_norm: expected"),
        ({"max_chunk": [8]}, "max_chunk: expected"),
        ({"scale": "1"}, "scale: expected"),
        ({"seq_lens": torch.tensor([30.0, 41.0])}, "seq_lens: expected dtype torch.int32"),
        ({"seq_lens": torch.tensor([30, 41, 7]).int()}, r"seq_lens: expected shape \[2\]"),
        ({"block_tables": torch.zeros(8, 2).int().t()}, "block_tables: expected stride 1"),
        ({"look_ahead": torch.ones(8)}, "look_ahead: expected LookAhead"),
        ({"look_ahead": (torch.ones(8), torch.ones(8), 0)}, "look_ahead.interleaved: expected"),
        ({"unknown": 1}, "unknown: expected options among"),
        ({"reduce_scores": 3}, "reduce_scores: expected a callable"),
        ({"reduce_scores": lambda scores: scores[..., :2]}, r"reduce_scores\(\.\.\.\): expected shape"),
    ],
)
def test_errors_are_those_of_ordinary_calls(changed: dict[str, Any], message: str) -> None:
    """After a good call, too. True equals 1, and would be found where 1 was kept."""
    cache = PagedCache(*pools(0))
    good = [
        arguments(0, "plain") | given
        for given in ({"keep": 1, "value_norm": True}, {}, {"scale": 1.0}, {"reduce_scores": torch.neg})
    ]
    with device([cache], good):
        for given in good:
            call(cache, given)
    before = [tensor.clone() for tensor in (*cache.k, *(cache.v or ()))]
    bad = arguments(0, "plain") | changed
    with device([cache], [bad]), pytest.raises((TypeError, ValueError), match=message):
        call(cache, bad)
    assert all(map(torch.equal, before, (*cache.k, *(cache.v or ()))))


def apart(scores: torch.Tensor) -> torch.Tensor:
    """A hook's result with other strides."""
    return torch.stack([scores, scores], -2)[..., 0, :].neg_()


@pytest.mark.parametrize("changed", [{"dry_run": True}, {"reduce_scores": apart}])
def test_other_calls_are_ordinary(changed: dict[str, Any]) -> None:
    cache = PagedCache(*pools(0))
    calls = [arguments(seed, "plain") | changed for seed in range(2)]
    with device([cache], calls):
        for given in calls:
            call(cache, given)
    assert not cache.events


def shifted(scores: torch.Tensor) -> torch.Tensor:
    """A hook's result at an address that the kept launch may not read as wide as it does."""
    return torch.empty(scores.numel() + 1)[1:].view(scores.shape).copy_(scores).neg_()


@pytest.mark.parametrize("hook", [apart, shifted])
def test_a_hook_may_return_another_layout(hook: Any) -> None:
    caches = [PagedCache(*(pool.clone() for pool in pools(0))) for _ in range(2)]
    calls = [arguments(seed, "plain") | {"reduce_scores": torch.neg} for seed in range(2)]
    with device(caches, calls):
        for cache in caches:
            call(cache, calls[0])
        found, expected = call(caches[0], calls[1] | {"reduce_scores": hook}), call(caches[1], calls[1])
    assert len(caches[0].events) == 1
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, caches[0].k, caches[1].k))


def test_contents_that_are_checked_are_checked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache(*pools(0))
    good = arguments(0, "plain")
    with device([cache], [good]):
        call(cache, good)
    for module in ("request", "repeat"):
        monkeypatch.setattr(f"kara_kernels.windows.{module}.contents_are_checked", lambda device: True)
    bad = arguments(1, "plain")
    bad["block_tables"][1] = 99
    with pytest.raises(ValueError, match="block id"):
        call(cache, bad)


def test_nothing_of_the_caller_is_kept() -> None:
    cache = PagedCache(*pools(0))
    given = arguments(0, "recorded")
    with nullcontext() if INTERPRETED else compiling_for("sm_90"):  # the emulator keeps its arguments
        done, again = call(cache, given), call(cache, given)
    held = [weakref.ref(tensor) for tensor in (*tensors_of(given), *done, *again)]
    del given, done, again
    gc.collect()
    assert len(cache.events) == 1
    assert not [kept for kept in held if kept() is not None]


def test_kinds_that_a_cache_keeps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "MOST", 2)
    cache = PagedCache(*pools(0))
    calls = [arguments(0, "plain") | {"keep": keep} for keep in (3, 4, 5, 6, 3)]
    with device([cache], calls):
        for given in calls:
            call(cache, given)
    assert 1 <= len(cache.events) <= 2
