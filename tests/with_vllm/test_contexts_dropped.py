"""Contexts that are admitted with fewer rows than tokens, against a dense model in which the others are masked."""

import threading

import pytest
import torch
from both_harness import allow, serving_both
from contexts_harness import ON
from dense import _seen, dense_logits, replay
from harness import KARA, MODES, configure, prompts
from recorded import as_recorded

from kara_kernels.integrations.transformers.rotary import find_look_ahead
from kara_kernels.ops import rank_rows
from kara_kernels.scorers import Rows, kara_sampled, keydiff
from kara_kernels.windows.queries import spread

TOKENS = 256
DOCUMENT, OTHER, *QUESTIONS = prompts(TOKENS, TOKENS, 9, 5, 31, 40, seed=201)
METHODS = ("keydiff/int8", "knorm/int4", "kara_sampled/int8")


@pytest.fixture(scope="module", params=MODES)
def served_both(model, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropped")
    contexts = {**ON, "methods": METHODS, "profile": str(folder / "profile.json")}
    with serving_both(
        model, folder / "trace.jsonl", contexts=contexts, mode=request.param, max_num_batched_tokens=64
    ) as both:
        yield both


def store(both, name, document, method="keydiff/int8", rows=68):
    allow(both, [document], lambda: method, lambda steps: [step for step in steps if step.rows == rows])
    both.store(name, document + QUESTIONS[0], TOKENS)
    copy = both.manager.keeper.get(both.server.place_of(document + QUESTIONS[0], TOKENS).key)
    assert copy.option.method == method


def test_rows_of_a_dropped_context_never_get_the_hashes_of_its_tokens(both, dense):
    """Requests that follow find no block of the first, whether they are admitted out of the same packet or want exact
    rows, and whether the first still runs or not."""
    store(both, "stored", DOCUMENT)
    pool = both.scheduler.kv_cache_manager.block_pool
    served = both.drive(
        {
            0: lambda both: both.add("first", DOCUMENT + QUESTIONS[0], 120, context_tokens=TOKENS),
            40: lambda both: both.add("second", DOCUMENT + QUESTIONS[1], 60, context_tokens=TOKENS),
            60: lambda both: both.add("exact", DOCUMENT + QUESTIONS[1], 60, contexts=False),
        }
    )
    assert [served[name].rows[0] is not None for name in ("first", "second", "exact")] == [True, True, False]
    assert served["first"].rows[0][2].shape[2] == 68
    dense.assert_equal(both.engine, served.values(), compressions=0)
    assert len(pool.cached_block_hash_to_block) == (TOKENS + 5 + 60) // 32  # those of the exact one
    both.assert_nothing_leaks()


def held_when(both, monkeypatch, said):
    """Gets the number of blocks that are taken when the only request has as many tokens of its own."""
    noted, schedule = [], both.scheduler.schedule

    def noting(*args, **kwargs):
        output = schedule(*args, **kwargs)
        if any(request.num_output_tokens == said for request in both.scheduler.running):
            noted.append(both.engine.held_blocks)
        return output

    monkeypatch.setattr(both.scheduler, "schedule", noting)
    return noted


@pytest.mark.parametrize(
    ("method", "rows"), [("keydiff/int8", 68), ("keydiff/int8", 132), ("knorm/int4", 68), ("kara_sampled/int8", 68)]
)
def test_a_dropped_context_takes_blocks_for_its_rows_only(both, dense, monkeypatch, method, rows):
    """And for the 40 + 60 tokens behind it, of which 64 are read in one step."""
    document = prompts(TOKENS, seed=210 + rows + len(method))[0]
    store(both, f"stored-{method[:4]}-{rows}", document, method, rows)
    both.engine.peak, noted = 0, held_when(both, monkeypatch, 50)
    name = f"admitted-{method[:4]}-{rows}"
    served = both.ask(name, document + QUESTIONS[3], 60, context_tokens=TOKENS)
    dense.assert_equal(both.engine, [served], compressions=0)
    at_most = -(-(rows + 40 + 50) // 32)
    assert at_most - 1 <= noted[0] <= at_most
    assert both.engine.peak == -(-(rows + 40 + 60) // 32)
    both.assert_nothing_leaks()


def test_windows_compress_what_follows_a_dropped_context(both, dense):
    """In chunks of 64 tokens, beside requests that are computed, or admitted and then left alone."""
    store(both, "stored-windows", OTHER)
    served = both.drive(
        {
            0: lambda both: both.add("windows", OTHER + QUESTIONS[0], 230, context_tokens=TOKENS),
            1: lambda both: both.add("long", OTHER + prompts(150, seed=202)[0], 200, context_tokens=TOKENS),
            2: lambda both: both.add("alone", OTHER + QUESTIONS[2], 150, False, context_tokens=TOKENS),
            3: lambda both: both.add("keep", OTHER + QUESTIONS[1], 200, {"keep": 8}, context_tokens=TOKENS),
            4: lambda both: both.add("computed", prompts(70, seed=203)[0], 230),
        }
    )
    assert [name for name, x in served.items() if x.rows[0] is None] == ["computed"]
    assert both.engine.events_of("alone") == []
    dense.assert_equal(both.engine, [x for name, x in served.items() if name != "alone"], compressions=2)
    dense.assert_equal(both.engine, [served["alone"]], compressions=0)
    both.assert_nothing_leaks()


def test_a_preempted_request_is_admitted_with_fewer_rows_again(both, dense, monkeypatch):
    both.lose_rows(monkeypatch)
    document = prompts(TOKENS, seed=204)[0]
    store(both, "stored-preempted", document)
    served = both.drive(
        {
            0: lambda both: both.add("preempted", document + QUESTIONS[0], 260, context_tokens=TOKENS),
            160: lambda both: both.preempt(),
        }
    )["preempted"]
    (start,) = served.recomputed
    assert [served.rows[when] is not None for when in (0, start)] == [True, True]
    dense.assert_equal(both.engine, [served], compressions=3)
    both.assert_nothing_leaks()


def test_a_damaged_packet_of_fewer_rows_is_computed_again(both, dense):
    document = prompts(TOKENS, seed=205)[0]
    prompt = document + QUESTIONS[0]
    store(both, "stored-damaged", document)
    copy = both.manager.keeper.get(both.server.place_of(prompt, TOKENS).key)
    rows, place = both.server.rows_of_copy(copy, TOKENS), both.server.worker._region
    place[both.manager.transfers._held[copy.number][-1], 5] ^= 1
    both.server.rows_of_copy = lambda *args: rows  # those that it would have had
    served = both.ask("damaged", prompt, 60, context_tokens=TOKENS)
    del both.server.rows_of_copy
    served.rows = {0: None}
    dense.assert_equal(both.engine, [served], compressions=0)
    both.assert_nothing_leaks()


def test_a_request_may_be_aborted_while_fewer_rows_are_loaded(both, monkeypatch):
    """A second one loads at the same time: it would find no rows in the pool."""
    document = prompts(TOKENS, seed=206)[0]
    store(both, "stored-aborted", document)
    gate, load = threading.Event(), both.server.worker._load
    monkeypatch.setattr(both.server.worker, "_load", lambda job: load(job) if gate.wait(60) else None)

    def abort(both):
        assert sum(bool(running.packet) for running in both.manager.transfers._running.values()) == 2
        both.engine.abort("first-aborted")
        gate.set()

    both.drive(
        {
            0: lambda both: both.add("first-aborted", document + QUESTIONS[0], 20, context_tokens=TOKENS),
            1: lambda both: both.add("second-aborted", document + QUESTIONS[1], 20, context_tokens=TOKENS),
            3: abort,
        }
    )
    both.assert_nothing_leaks()


def test_exact_rows_in_the_pool_win(both, dense):
    document = prompts(TOKENS, seed=207)[0]
    store(both, "stored-pool", document)
    both.ask("exact-pool", document + QUESTIONS[0], contexts=False)
    served = both.ask("pool", document + QUESTIONS[1], 30, context_tokens=TOKENS)
    assert served.rows[0] is None
    dense.assert_equal(both.engine, [served], compressions=0)
    both.assert_nothing_leaks()


def test_ordered_rows_that_are_all_there_stand_at_their_places(both, dense):
    """Requests share their blocks, also those that are admitted with the beginning of the context only."""
    document = prompts(TOKENS, seed=208)[0]
    store(both, "stored-all", document, "knorm/int4", TOKENS)
    served = both.drive(
        {
            0: lambda both: both.add("all", document + QUESTIONS[0], 200, context_tokens=TOKENS),
            40: lambda both: both.add("sharing", document + QUESTIONS[1], 60, context_tokens=TOKENS),
        }
    )
    assert both.manager.counts["hits", "gpu"] >= 1
    dense.assert_equal(both.engine, served.values(), compressions=0)
    both.assert_nothing_leaks()


def test_a_client_measures_packets_of_fewer_rows(both):
    """Every compression that the stored packet can be cut to."""
    document = prompts(TOKENS, seed=209)[0]
    prompt, server = document + QUESTIONS[0], both.server
    store(both, "stored-forced", document, rows=132)
    place = server.place_of(prompt, TOKENS)
    steps = [
        step for step in both.manager.catalogue._header(place.key, TOKENS, "keydiff/int8").steps if step.rows < 133
    ]
    assert [step.rows for step in steps] == [68, 132]
    for step in steps:
        wanted = {"method": "keydiff/int8", "ratio": step.ratio + 1e-4}
        ((said, told),) = server.ask_and_hear(prompt, context_tokens=TOKENS, context=wanted)
        assert told["context"] == {
            "source": "ram", "tokens": TOKENS, "method": "keydiff/int8", "ratio": step.ratio,
            "sections": step.sections, "nbytes": step.nbytes,
        }  # fmt: skip
        assert said == server.judge(prompt, TOKENS, sections=step.sections)
    both.assert_nothing_leaks()


def test_rows_are_ranked_by_the_queries_that_computed_them(both, dense):
    """Recorded in chunks of 64 tokens. A few rows are as good as others, and rounding decides."""
    document, method = prompts(TOKENS, seed=211)[0], "kara_sampled/int8"
    store(both, "stored-judged", document, method)
    copy = both.manager.keeper.get(both.server.place_of(document + QUESTIONS[0], TOKENS).key)
    places = both.server.rows_of_copy(copy, TOKENS)[2].flatten(0, 1).tolist()
    ids = torch.tensor([document])
    real = torch.ones_like(ids, dtype=torch.bool)
    dense_logits(dense.model, ids, real, replay(dense.model, real, []).visible)
    query, keys, values = (torch.stack([_seen[layer][i][0] for layer in sorted(_seen)]) for i in range(3))
    ring = both.engine.runner.kara_ring
    stride, count = spread(TOKENS, ring.rows)
    query = query.transpose(1, 2)[:, stride - 1 :: stride].contiguous()
    assert query.shape[1] == count <= ring.rows
    query = as_recorded(query, ring.policy, keys.shape[1]).unflatten(2, (keys.shape[1], -1))
    rows = Rows(query, keys, values, 0, TOKENS, keys.shape[-1] ** -0.5, ahead=find_look_ahead(dense.model))
    shared = {}
    for scorer in (kara_sampled, keydiff):
        best = rank_rows(scorer(rows))[..., :68].flatten(0, 1).tolist()
        shared[scorer] = [len(set(mine) & set(best_of)) for mine, best_of in zip(places, best, strict=True)]
    assert min(shared[kara_sampled]) >= 66
    assert max(shared[keydiff]) < 66
    both.assert_nothing_leaks()


@pytest.mark.parametrize("found", [64, 96])
def test_rows_whose_queries_are_not_known_are_not_ranked(both, found):
    """A quarter of a context may be found in the pool."""
    document, method = prompts(TOKENS, seed=212 + found)[0], "kara_sampled/int8"
    prompt = document + QUESTIONS[0]
    allow(both, [document], lambda: method, lambda steps: [step for step in steps if step.rows == 68])
    refused = both.manager.counts["refused",]
    both.ask(f"before-{found}", document[: found + 1], 1, contexts=False)
    both.ask(f"judged-{found}", prompt, context_tokens=TOKENS)
    both.server.rest()
    copy = both.manager.keeper.get(both.server.place_of(prompt, TOKENS).key)
    assert (copy is None) == (found > 64) == (both.manager.counts["refused",] > refused)
    both.assert_nothing_leaks()


@pytest.mark.parametrize(
    ("kara", "contexts", "expected"),
    [
        (None, {}, "keydiff/int8 without windows that move rows"),
        ({**KARA, "shadow": True}, {}, "keydiff/int8 without windows that move rows"),
        (
            {"default": "off", "scorer": "knorm"}, {"methods": ["none/int8", "kara_sampled/int8"]},
            "kara_sampled/int8 beside windows that record no queries .scorer 'knorm'.",
        ),
        (KARA, {"profile": None}, "methods: expected a profile beside methods that drop rows, got keydiff/int8"),
    ],
)  # fmt: skip
def test_engines_that_cannot_drop_rows_are_refused(model, tmp_path, kara, contexts, expected):
    given = {**ON, "methods": ["none/int8", "keydiff/int8"], "profile": str(tmp_path / "profile"), **contexts}
    with pytest.raises(ValueError, match=expected):
        configure(model, None, additional_config={"contexts": given} | ({} if kara is None else {"kara": kara}))
