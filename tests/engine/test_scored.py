"""Other methods by name: they see the rows and queries of the model, and what they need decides what is recorded."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from shim import DIM, GROUP, HEADS, LAYERS, Decoding, make_ring, small

from kara_kernels import PagedCache, scorers
from kara_kernels.engine import Held, Ledger, PackedCache, Plan, Policy, QueryRing, Span, execute, warm_up
from kara_kernels.reference import select_topk
from kara_kernels.scorers import REGISTRY, Entry, Rows, registered

OF_WINDOWS = [name for name, entry in REGISTRY.items() if entry.needs != "context"]
OTHERS = [name for name in OF_WINDOWS if name != "kara"]
PAGE, PROMPT, V_DIM = 4, 6, 5
FP8 = torch.float8_e4m3fn


def packed(cache: PagedCache) -> PackedCache:
    """The same rows, keys before values."""
    size, v_size = PAGE * HEADS * DIM, PAGE * HEADS * V_DIM
    halves = zip(cache.k, cache.v or (), strict=True)
    return PackedCache(
        [torch.cat((k.flatten(1), v.flatten(1)), 1) for k, v in halves],
        torch.arange(size).view(PAGE, HEADS, DIM), size + torch.arange(v_size).view(PAGE, HEADS, V_DIM),
    )  # fmt: skip


class Model:
    """A sequence that decodes, in a paged pool and as lists of rows of every layer and head."""

    def __init__(self, policy: Policy, length: int) -> None:
        torch.manual_seed(length)
        self.policy, self.ledger, self.ring = policy, Ledger(policy, PAGE), make_ring(policy, 1, length)
        self.ledger.start("a", PROMPT, PROMPT)
        self.free = torch.randperm(length).tolist()
        self.blocks: list[int] = []
        self.pools = [torch.zeros(LAYERS, length, PAGE, HEADS, dim) for dim in (DIM, V_DIM)]
        self.tokens = [torch.randn(LAYERS, length, HEADS, dim) for dim in (DIM, V_DIM)]
        self.queries = torch.randn(LAYERS, length, HEADS * GROUP, DIM)
        self.rows = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]  # positions of tokens
        self.length = 0

    def decode(self) -> None:
        position, row = self.length, len(self.rows[0][0])
        if row % PAGE == 0:
            self.blocks.append(self.free.pop())
        for pool, token in zip(self.pools, self.tokens, strict=True):
            pool[:, self.blocks[row // PAGE], row % PAGE] = token[:, position]
        self.ring.prepare([Span("a", PROMPT, position, 1)])
        for layer in range(LAYERS):
            self.ring.record(layer, self.queries[layer, position][None])
            for head in self.rows[layer]:
                head.append(position)
        self.length += 1

    def plan(self) -> Plan | None:
        return next(iter(self.ledger.plan([Held("a", self.length, self.blocks, 0)])), None)

    def seen(self, plan: Plan) -> Rows:
        """What the scorer should see."""
        total = len(self.rows[0][0])
        keys, values = (
            torch.stack([
                torch.stack([token[layer, places, head] for head, places in enumerate(self.rows[layer])])
                for layer in range(LAYERS)
            ])
            for token in self.tokens
        )  # fmt: skip
        needs = registered(self.policy.scorer).needs
        count = 0 if needs == "rows" else min(self.policy.window + self.policy.tail, self.length - PROMPT)
        queries = self.queries[:, self.length - count : self.length].unflatten(2, (HEADS, GROUP))
        assert keys.shape[2] == total
        return Rows(queries, keys, values, plan.window_start, plan.window, DIM**-0.5)

    def compress(self, plan: Plan, plain: bool = True) -> torch.Tensor:
        cache = PagedCache(*self.pools)
        [keep] = execute([plan], cache if plain else packed(cache), self.ring, self.policy)
        for layer, heads in enumerate(keep.tolist()):
            for head, kept in enumerate(heads):
                places = self.rows[layer][head]
                window = places[plan.window_start : plan.window_start + plan.window]
                places[plan.window_start : plan.window_start + plan.window] = [window[i] for i in kept]
        self.ledger.commit(plan)
        self.free += self.blocks[plan.kept_blocks :]
        del self.blocks[plan.kept_blocks :]
        return keep


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_sees_what_it_would_in_the_model(name: str) -> None:
    """Window by window, each after the rows that earlier windows left."""
    policy = small(scorer=name)
    model, events = Model(policy, 60), 0
    for _ in range(60):
        model.decode()
        if (plan := model.plan()) is None:
            continue
        rows, events = model.seen(plan), events + 1
        scores = registered(name).scorer(rows)
        if name == "random":
            seed = LAYERS * (plan.window_start + model.length - plan.physical_len)
            one = replace(rows, keys=rows.keys[:1], values=rows.values[:1], query=rows.query[:1])
            scores = torch.cat([scorers.random_per_head(replace(one, seed=seed + layer)) for layer in range(LAYERS)])
        of_packed = execute([plan], packed(PagedCache(*model.pools)), model.ring, policy, dry_run=True)
        keep = model.compress(plan)
        assert torch.equal(keep, select_topk(scores, plan.keep))
        assert torch.equal(keep, of_packed[0])
    assert events == 6


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "packed"])
@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_eight_bits_are_seen_times_their_scales(name: str, plain: bool) -> None:
    """One list for the model, so that the scale of one layer or head counts beside those of others."""
    policy = small(scorer=name, pool="model")
    model, scales = Model(policy, 60), [torch.rand(LAYERS, HEADS) + 0.1 for _ in range(2)]
    exact = [scale[:, None, :, None] for scale in scales]
    model.tokens = [x.to(FP8).float() * scale for x, scale in zip(model.tokens, exact, strict=True)]
    while (plan := model.plan()) is None:
        model.decode()
    stored = PagedCache(*((x / scale[:, :, None]).to(FP8) for x, scale in zip(model.pools, exact, strict=True)))
    cache = stored if plain else packed(stored)
    given = {"k_scale": scales[0], "v_scale": scales[1], "dry_run": True}
    [keep] = execute([plan], cache, model.ring, policy, **given)
    assert torch.equal(keep, model.compress(plan))


@pytest.mark.parametrize("form", ["int4", "fp8", "auto"])
def test_queries_are_seen_as_they_were_recorded(form: str) -> None:
    """Oldest first, however the ring wrapped around."""
    model = Model(small(scorer="tova", query_dtype=form), 40)
    for _ in range(40):
        model.decode()
    seen = model.ring.copied("a", 39, 12)
    exact = model.queries[:, 28:40]
    assert seen.dtype == exact.dtype
    errors = (seen - exact).abs().amax() / exact.abs().amax()
    assert errors <= {"int4": 0.075, "fp8": 0.0625, "auto": 0.0}[form]


def test_rows_move_as_they_do_for_kara() -> None:
    model = Model(small(scorer="newest"), 40)
    for _ in range(40):
        model.decode()
        if (plan := model.plan()) is not None:
            keep = model.compress(plan)
            assert (keep == torch.arange(4, 8)).all()
    for pool, token in zip(model.pools, model.tokens, strict=True):
        for layer in range(LAYERS):
            for head, places in enumerate(model.rows[layer]):
                held = pool[layer, model.blocks].flatten(0, 1)[: len(places), head]
                assert torch.equal(held, token[layer, places, head])
    assert model.rows[0][0][:8] == [0, 1, 2, 3, 4, 5, 10, 11]


def test_random_differs_between_layers_and_windows_but_not_between_runs() -> None:
    def lists() -> list[torch.Tensor]:
        model, found = Model(small(scorer="random", window=16, keep=8), 60), []
        for _ in range(60):
            model.decode()
            if (plan := model.plan()) is not None:
                found.append(model.compress(plan))
        return found

    first, again = lists(), lists()
    assert all(map(torch.equal, first, again))
    assert len({tuple(keep.flatten().tolist()) for windows in first for keep in windows}) == LAYERS * len(first)


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_what_a_method_needs_decides_what_is_recorded(name: str) -> None:
    policy = Policy(scorer=name, query_dtype="auto")
    ring = make_ring(policy, 4, 8)
    model = Model(small(scorer=name), 20)
    for _ in range(20):
        model.decode()
    if registered(name).needs == "rows":
        assert policy.query_rows == ring.rows == model.ring.sequences == 0
        assert ring.nbytes == LAYERS * HEADS * GROUP * DIM * 4  # the row for what is not recorded
    else:
        assert policy.query_rows == ring.rows == 384
        assert model.ring.sequences == 1


def test_a_ring_of_contexts_records_no_decoded_token_of_such_a_method() -> None:
    ring = QueryRing(
        small(scorer="knorm"), layers=LAYERS, query_heads=HEADS * GROUP, kv_heads=HEADS, head_dim=DIM, max_sequences=1,
        max_tokens=8, dtype=torch.float32, device="cpu", rows=8,
    )  # fmt: skip
    assert ring.prepare([Span("a", 8, 0, 8, 8)])
    for layer in range(LAYERS):
        ring.record(layer, torch.ones(8, HEADS * GROUP, DIM))
    assert not ring.prepare([Span("a", 8, 8, 2)])
    context = ring.of_context("a", 8, 0)
    assert context is not None
    assert (context == 1).all()
    none = make_ring(small(scorer="knorm"), 1, 8)  # without rows it records no context either
    assert not none.prepare([Span("a", 8, 0, 8, 8)])
    assert none.of_context("a", 8, 0) is None


def test_a_method_that_asks_every_query_scores_no_token_whose_query_is_gone() -> None:
    """A window that had to wait begins later. Another method takes the queries that are left."""
    starts = {}
    for name in ("compactor", "h2o"):
        ledger = Ledger(small(scorer=name), 4)
        sequence = Decoding(ledger, decoded=20)
        starts[name] = ledger.plan([sequence.held()])[0]
        plan = starts[name]
        assert plan.num_queries == 12
        assert plan.last_query == sequence.logical - 1
    assert starts["h2o"].window_start == 5
    assert starts["compactor"].window_start == 13  # the first of twelve recorded queries


@pytest.mark.parametrize(("name", "queries"), [("kara", 12), ("h2o", 5), ("knorm", 0), ("compactor", None)])
def test_survivors_are_scored_by_queries_of_rows_that_are_left(name: str, queries: int | None) -> None:
    """Queries of dropped tokens say where these stood, which other methods take for the place of a row."""
    ledger = Ledger(small(scorer=name, pressure_window=8, min_freed_blocks=0), 2)
    sequence = Decoding(ledger, prompt=4)
    for _ in range(4):
        sequence.until_planned()
    ledger.plan([])
    plans = ledger.relieve([sequence.held()], 2)
    if queries is None:
        assert plans == []
        return
    [plan] = plans
    assert (plan.window_start, plan.num_queries, plan.last_query) == (4, queries, sequence.logical - 1)


@pytest.mark.parametrize("name", ["kara_mean", "kvzip", "expected_attention", "random_shared"])
def test_methods_that_need_more_than_a_window_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"scorer: expected one that can score a window, got '{name}'"):
        Policy(scorer=name)


@pytest.mark.parametrize(
    "setting",
    [{"reduction": "mean"}, {"value_norm": True}, {"attention": "causal"}, {"chunk_fraction": 0.3}, {"max_chunk": 4},
     {"redundancy": 1.0}, {"query_stride": 2}, {"query_heads": "mean"}, {"look_ahead": 8}, {"max_loss": 0.1}],
    ids=str,
)  # fmt: skip
def test_settings_that_a_method_would_ignore_are_refused(setting: dict[str, Any]) -> None:
    [name] = setting
    Policy(**setting)
    with pytest.raises(ValueError, match=rf"{name}: expected .* with scorer='h2o', got {setting[name]!r}"):
        Policy(scorer="h2o", **setting)
    Policy(scorer="h2o", pool="layer", query_dtype="fp8", look_ahead=0)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"scorer: expected .*'kara'.*'newest'.*, got 'snap'"):
        Policy(scorer="snap")
    with pytest.raises(TypeError, match="scorer: expected a str, got NoneType"):
        Policy(scorer=None)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- a user's own


def oldest(rows: Rows) -> torch.Tensor:
    return -scorers.streaming_llm(rows)


ENTRY = Entry(oldest, "rows")
BROKEN = Entry(lambda rows: torch.zeros(3))
NOTHING = 3


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint(name, f"{__name__}:{value}", scorers.GROUP)
        for name, value in {
            "oldest": "oldest", "entry": "ENTRY", "broken": "BROKEN", "nothing": "NOTHING", "absent": "absent",
            "kara": "oldest",
        }.items()
    ]  # fmt: skip
    monkeypatch.setattr(scorers, "entry_points", lambda group: points if group == scorers.GROUP else [])
    registered.cache_clear()
    yield
    registered.cache_clear()


@pytest.mark.parametrize(("name", "queries"), [("oldest", 12), ("entry", 0)])
def test_an_installed_scorer_has_a_name(name: str, queries: int, installed: None) -> None:
    model = Model(small(scorer=name), 20)
    plan = None
    while plan is None:
        model.decode()
        plan = model.plan()
    assert plan.num_queries == queries
    assert (model.compress(plan) == torch.arange(4)).all()


def test_an_installed_scorer_replaces_none_of_ours(installed: None) -> None:
    assert registered("kara") is REGISTRY["kara"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "expected a scorer or an Entry"), ("absent", "to load, got AttributeError"),
     ("snap", "expected .*'kara', .*'oldest', .*, got 'snap'")],
)  # fmt: skip
def test_an_entry_point_without_a_scorer_is_refused(name: str, message: str, installed: None) -> None:
    with pytest.raises(ValueError, match="scorer: .*" + message):
        Policy(scorer=name)


def test_a_scorer_that_fails_does_so_in_the_warm_up(installed: None) -> None:
    model = Model(small(scorer="broken"), 8)
    message = "scorer 'broken': expected shape [1, 2, 2], got [3]"  # of the smallest window
    for cache in (PagedCache(*model.pools), packed(PagedCache(*model.pools))):
        with pytest.raises(ValueError, match=re.escape(message)):
            warm_up(cache, model.ring, model.policy)


@pytest.mark.parametrize("name", OTHERS)
def test_a_warm_up_runs_the_method_and_changes_nothing(name: str) -> None:
    model = Model(small(scorer=name), 8)
    for _ in range(8):
        model.decode()
    before = [pool.clone() for pool in model.pools]
    warm_up(PagedCache(*model.pools), model.ring, model.policy)
    assert all(map(torch.equal, before, model.pools))
