"""The quality bench: methods, replays against a dense model, tasks and statistics."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from dense import Ledger, dense_logits  # noqa: E402
from test_transformers import make_model  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from bench.quality import decode, measure, picture, statistics, tasks  # noqa: E402
from bench.quality.methods import (  # noqa: E402
    DEFAULT,
    METHODS,
    OURS,
    PAPER_SCORING,
    STRAIGHT,
    Kara,
    Method,
    ablations,
    guarded,
    pyramid,
)
from bench.quality.replay import Replay  # noqa: E402
from kara_kernels import scorers  # noqa: E402
from kara_kernels.engine import Policy  # noqa: E402
from kara_kernels.integrations.transformers import KaraCache  # noqa: E402
from kara_kernels.options import PAPER, RECOMMENDED, Scoring, split_options  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BY_NAME = {method.name: method for method in METHODS}


# ---- methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("keep", [77, 128])
def test_the_guards_budgets_follow_the_windows_and_keep_their_mean(keep: int, late: int) -> None:
    """Scores of later windows fall more slowly, so that fewer tokens hold less of them."""
    falls = torch.linspace(0.06, 0.005, 8)
    scores = [torch.exp(-fall * torch.arange(256.0)).expand(2, 3, 256) for fall in falls]
    budgets = guarded(scores, keep, late)
    assert len(budgets) == 8
    assert budgets[:late] == [keep] * late
    assert budgets[late:] == sorted(budgets[late:])
    assert budgets[-1] > 1.5 * budgets[late]
    assert abs(sum(budgets) - 8 * keep) <= 4
    assert guarded(scores[:1] * 4, keep, late) == [keep] * 4


@pytest.mark.parametrize("kept", [51, 77, 102, 128, 154])
def test_pyramid_budgets_fall_and_keep_their_mean(kept: int) -> None:
    budgets = pyramid(kept, 30)
    assert budgets == sorted(budgets, reverse=True)
    assert abs(sum(budgets) - 30 * kept) <= 15
    assert max(budgets) <= 256
    assert min(budgets) == max(1, kept // 20)


def test_what_the_library_recommends_is_what_is_measured() -> None:
    scoring, selection = split_options(RECOMMENDED)
    assert (OURS.scoring, BY_NAME[DEFAULT].selection) == (scoring, asdict(selection))
    assert (BY_NAME[DEFAULT].window, BY_NAME[DEFAULT].tail) == (Policy().window, Policy().tail)
    scoring, selection = split_options(PAPER)
    assert (STRAIGHT.scoring, BY_NAME["straight"].selection) == (scoring, asdict(selection))


def test_names_differ_and_every_peer_names_its_paper() -> None:
    names = [method.name for method in METHODS + ablations()]
    assert len(set(names)) == len(names)
    assert DEFAULT in names
    for method in METHODS:
        if method.family == "peer":
            assert "arXiv 2" in method.scorer.__doc__, method.name


# ---- replays -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model()


def text_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 61, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_compressed_replay_is_the_dense_model_without_the_dropped(llama: Any) -> None:
    """Three windows of 16 are reduced to 6 random tokens per layer and head. Then ten tokens are read."""
    ids, prompt, size, keep = text_of(9 + 48 + 5 + 10), 9, 16, 6
    replay = Replay(llama, ids[:-10], prompt)
    chance = torch.Generator().manual_seed(1)
    assert replay.windows(size, 5) == 3
    scores = [torch.rand(3, 2, size, generator=chance) for _ in range(3)]
    seen = replay.go_on(replay.compressed(scores, [[keep] * 3] * 3, 5, chunk_fraction=0.0), ids[-10:])

    ledger = Ledger(3, 2, torch.ones(1, len(ids)))
    ledger.read(len(ids) - 10)
    for index in reversed(range(3)):
        ledger.drop(0, prompt + index * size, size, scores[index].topk(keep).indices.sort(-1).values)
    ledger.read(len(ids))
    # Replay reads the text with the full cache. Only tokens after it miss the dropped ones.
    visible = ledger.visible.clone()
    for layer, s, h, token in torch.cartesian_prod(*map(torch.arange, (3, 1, 2, len(ids)))).tolist():
        held = range(token + 1) if token < len(ids) - 10 else [*ledger.held[layer][s][h][: 9 + 18 + 5],
                                                               *range(len(ids) - 10, token + 1)]  # fmt: skip
        visible[layer, s, h, token] = False
        visible[layer, s, h, token, list(held)] = True
    dense = dense_logits(llama, ids[None], torch.ones(1, len(ids)), visible)[0, -10:].log_softmax(-1)
    torch.testing.assert_close(seen, dense, rtol=1e-3, atol=1e-4)


def test_a_replay_that_keeps_all_is_the_model(llama: Any) -> None:
    ids = text_of(60)
    replay = Replay(llama, ids[:-8], 8)
    scores = [torch.rand(3, 2, 16) for _ in range(2)]
    with torch.no_grad():
        plain = llama(ids[None]).logits[0, -8:].log_softmax(-1)
    for cache in (replay.full(), replay.compressed(scores, [[16] * 3] * 2, 4)):
        torch.testing.assert_close(replay.go_on(cache, ids[-8:]), plain, rtol=1e-3, atol=1e-4)


def test_layers_may_have_budgets_of_their_own(llama: Any) -> None:
    replay = Replay(llama, text_of(50), 8)
    cache = replay.compressed([torch.rand(3, 2, 16)] * 2, [[10, 6, 1]] * 2, 5, chunk_fraction=0.0)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [50 - 2 * (16 - k) for k in (10, 6, 1)]
    assert replay.go_on(cache, text_of(5, 1)).isfinite().all()


def test_questions_asked_together_do_not_see_each_other(llama: Any) -> None:
    replay = Replay(llama, text_of(40), 8)
    questions = [text_of(length, length) for length in (3, 7, 1)]
    for question, last, answer in zip(
        questions, (2, 7, 1), replay.ask(replay.full(), questions, [2, 7, 1]), strict=True
    ):
        alone = replay.go_on(replay.full(), question)
        torch.testing.assert_close(answer, alone[-last:], rtol=1e-3, atol=1e-4)


def test_replayed_windows_are_scored_as_the_cache_scores_them(llama: Any) -> None:
    """The first window that KaraCache compresses in a text read at once is the replay's first."""
    ids = text_of(8 + 16 + 5)
    first = Replay(llama, ids, 8).window(0, 16, 5)
    expected = OURS(first).topk(6).indices.sort(-1).values
    llama.set_attn_implementation("kara")
    cache = KaraCache(llama, window=16, keep=6, tail=5, protected=8, chunk_fraction=0.0)
    with torch.no_grad():
        llama(ids[None], past_key_values=cache)
    assert torch.equal(cache.events[0].keep_indices.long(), expected)


def test_options_of_our_scorer(llama: Any) -> None:
    first = Replay(llama, text_of(8 + 16 + 5), 8).window(0, 16, 5)
    scorings = [Scoring(value_norm=False), Scoring(reduction="mean"), Scoring(redundancy=1.0)]
    variants = [OURS, STRAIGHT, Kara(look_ahead=False), Kara(tail_queries=False), Kara(stride=2), Kara(mean_heads=True),
                *map(Kara, scorings), Kara(replace(PAPER_SCORING, attention="causal"), look_ahead=False)]  # fmt: skip
    found = [variant(first) for variant in variants]
    assert all(score.shape == (3, 2, 16) for score in found)
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


@torch.no_grad()
def test_where_a_text_is_left_is_where_generation_leaves_it() -> None:
    model = make_model()
    prompt = text_of(7, 3)
    [text] = decode.write(model, [prompt], 60)
    method = Method("small", "", "kara", OURS, {"chunk_fraction": 0.0}, window=16, tail=4)
    [found] = decode.decoding(model, "x", prompt, text, [(method, 0.125)])
    cache = KaraCache(model, window=16, keep=2, tail=4)
    own = model.generate(
        prompt[None], attention_mask=torch.ones(1, 7), past_key_values=cache, do_sample=False, min_new_tokens=60,
        max_new_tokens=60, pad_token_id=0,
    )[0, 7:]  # fmt: skip
    left = (own != text).nonzero()
    assert len(left), "the text was never left: this test says nothing"
    assert found["until"] == int(left[0]) >= 20
    assert found["kl"] > 0


def test_scorers_of_peers_decode_too() -> None:
    model = make_model()
    prompt, text = text_of(7, 3), text_of(60, 4)
    method = Method("small", "", "peer", scorers.h2o, {"chunk_fraction": 0.0}, window=16, tail=4)
    [found] = decode.decoding(model, "x", prompt, text, [(method, 0.5)])
    llama_text = decode.follow(model, prompt, text, DynamicCache(), 4, 16)
    assert llama_text.shape == (60, 61)
    assert 0 < found["held"] < 1


# ---- tasks -------------------------------------------------------------------------------------------------


class Plain:
    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=list(text.encode()))


def test_haystacks_hold_what_is_asked_where_it_is_compressed() -> None:
    filler = ["The quick brown fox jumps over the lazy dog. " * 300]
    stacks = tasks.haystacks(Plain(), filler, 4, 6000, 64, seed=3)
    assert [stack.ids for stack in stacks] == [s.ids for s in tasks.haystacks(Plain(), filler, 4, 6000, 64, seed=3)]
    assert stacks[0].ids != tasks.haystacks(Plain(), filler, 1, 6000, 64, seed=4)[0].ids
    for stack in stacks:
        assert len(stack.ids) == 6000
        text = bytes(stack.ids[64:-64]).decode()
        for case in stack.cases:
            if case.kind == "state":
                thing = case.question.split(", the ")[1].split(" is")[0]
                places = [line.split("in the ")[1] for line in text.splitlines() if line.startswith(f"The {thing} ")]
                assert len(places) == 3
                assert places[-1] == case.answer.strip() + "."
            elif case.kind == "key-value":
                assert case.question.splitlines()[-1] + case.answer in text
            else:
                asked = case.question.strip().split(": ", 1)[-1] if case.kind == "single key" else case.question.strip()
                fact = (asked.removeprefix("As was said above, the ") + case.answer).strip()
                assert fact in text, case
    with pytest.raises(ValueError, match="length: expected at least"):
        tasks.haystacks(Plain(), filler, 1, 200, 64, seed=3)


# ---- statistics --------------------------------------------------------------------------------------------


def test_ratios_and_differences_are_paired() -> None:
    draw = random.Random(0)
    theirs = {f"t{i}": draw.uniform(1, 100) for i in range(12)}
    half = {text: value / 2 for text, value in theirs.items()}
    assert statistics.ratio(half, theirs) == pytest.approx((0.5, 0.5, 0.5))  # paired: no spread at all
    less = {text: value - 3 for text, value in theirs.items()}
    assert statistics.difference(less, theirs) == pytest.approx((-3, -3, -3))
    unlike = statistics.ratio({text: draw.uniform(1, 100) for text in theirs}, theirs)
    assert unlike.low < unlike.value < unlike.high
    assert statistics.ratio({"t0": 1.0, "other": 9.0}, theirs).value == pytest.approx(1 / theirs["t0"])
    with pytest.raises(ValueError, match="both methods"):
        statistics.ratio({"a": 1.0}, {"b": 1.0})


def test_the_interval_covers_as_often_as_it_says() -> None:
    """For 200 samples of twelve texts, nearly 95 % of the intervals contain the true difference of 1."""
    draw, hits = random.Random(1), 0
    for _ in range(200):
        theirs = {str(i): draw.gauss(0, 1) for i in range(12)}
        ours = {text: value + draw.gauss(1, 1) for text, value in theirs.items()}
        interval = statistics.difference(ours, theirs)
        hits += interval.low <= 1 <= interval.high
    assert 170 <= hits <= 198


def test_ranks_are_read_off_the_data() -> None:
    less = {("a", 0.3): {"t": 1.0}, ("b", 0.3): {"t": 2.0}, ("c", 0.3): {"t": 2.0},
            ("a", 0.5): {"t": 9.0}, ("b", 0.5): {"t": 1.0}, ("c", 0.5): {"t": 2.0}, ("d", 0.3): {"t": 0.0}}  # fmt: skip
    more = {("a", 1.0): {"t": 0.0}, ("a", 0.3): {"t": 0.1}, ("b", 0.3): {"t": 0.2}, ("c", 0.3): {"t": 0.3}}
    # a: 1, 3, 3. b: 2, 1, 2. c: 2, 2, 1. d has not been everywhere.
    assert statistics.ranks([(less, 1), (more, -1)], "dcba") == {"c": 5 / 3, "b": 5 / 3, "a": 7 / 3}
    assert next(iter(statistics.ranks([(less, 1), (more, -1)], "dbca"))) == "b"


def test_the_picture_names_the_best_peers_of_its_data() -> None:
    def record(task: str, method: str, rank: int) -> dict[str, Any]:
        return {"task": task, "item": "t", "method": method, "retention": 0.5, "kl": 0.1 * rank, "kinds": ["a"],
                "nll": [1.0 + rank], "exact": [rank < 2]}  # fmt: skip

    names = [method.name for method in METHODS if method.family == "peer"]
    for order in (names, names[::-1]):
        records = [record(task, name, rank) for task in ("fidelity", "recall") for rank, name in enumerate(order, 1)]
        records.append(record("recall", "full", 0) | {"retention": 1.0})
        records += [record(task, "random", 0) for task in ("fidelity", "recall")]  # random selection is no peer
        assert list(picture.best_peers(records)) == order[:3]


def test_recall_is_judged_by_what_the_full_cache_can() -> None:
    def record(method: str, retention: float, nll: list[float], exact: list[bool]) -> dict[str, Any]:
        return {"task": "recall", "item": "h", "method": method, "retention": retention, "kinds": ["a", "a", "b"],
                "nll": nll, "exact": exact}  # fmt: skip

    records = [record("full", 1.0, [1.0, 2.0, 3.0], [True, False, True]),
               record("x", 0.5, [1.5, 2.5, 5.0], [True, True, False])]  # fmt: skip
    above, exact = statistics.recall_tables(records)
    assert above["x", 0.5] == {"h": pytest.approx(1.0)}
    assert exact["x", 0.5] == {"h": 0.5}
    assert statistics.recall_by_kind(records, "x", 0.5) == {"a": (2.0, 1.0), "b": (5.0, 0.0)}


def test_measured_distances_cover_what_is_read() -> None:
    assert measure.DISTANCES[0] == 0
    assert measure.DISTANCES[-1] == measure.AHEAD
