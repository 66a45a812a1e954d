"""Named scorers: by hand and against plain Python, some queries at a time, and what they refuse."""

from __future__ import annotations

import cmath
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kara_kernels import LookAhead, scorers
from kara_kernels.ops import rank_rows, score_window
from kara_kernels.options import Scoring
from kara_kernels.scorers import NAMED, Repetition, Rows, named, own, published

LAYERS, HEADS, GROUP, DIM, VALUES, TOTAL = 2, 2, 3, 6, 3, 14
Scores = list[list[list[float]]]  # [L][H][length]


# ------------------------------------------------------------------------------------------------------ by hand


def hand(query: Any = None, keys: Any = None, values: Any = None, *, length: int, start: int = 0, group: int = 1,
         tail: int = 0) -> Rows:  # fmt: skip
    """One layer and one KV head, zeros by default. ``keys [T][D]``, ``query [N][G][D]``."""
    total = start + length + tail
    keys = torch.zeros(total, 2) if keys is None else torch.tensor(keys)
    query = torch.zeros(length + tail, group, keys.shape[1]) if query is None else torch.tensor(query)
    values = torch.zeros(total, 2) if values is None else torch.tensor(values)
    return Rows(query[None, :, None], keys[None, None], values[None, None], start, length, 1.0)


def scores(scorer: scorers.Scorer, rows: Rows) -> list[float]:
    found = scorer(rows)
    assert found.shape == (1, 1, rows.length)
    return found[0, 0].tolist()


def approx(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-5)


def test_h2o_sums_what_queries_gave_that_could_see_a_key() -> None:
    # Tokens 0 | 1 2: the query of 1 halves between 0 and 1, that of 2 gives a third to each.
    assert scores(scorers.h2o, hand(length=2, start=1)) == approx(1 / 2 + 1 / 3, 1 / 3)


def test_tova_asks_the_newest_query_of_all_heads() -> None:
    # Head 0 attends evenly to four tokens, head 1 to token 1 alone. Token 0 lies before the window, 3 is the tail.
    query = [[[0.0, 0.0], [0.0, 0.0]]] * 2 + [[[0.0, 0.0], [90.0, 0.0]]]
    keys = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert scores(scorers.tova, hand(query, keys, length=2, start=1, tail=1)) == approx((1 / 4 + 1) / 2, 1 / 8)


def test_snapkv_pools_over_seven() -> None:
    keys = [[0.0, 0.0]] * 10
    keys[5] = [90.0, 0.0]
    rows = hand([[[0.0, 0.0]]] * 9 + [[[1.0, 0.0]]], keys, length=9, tail=1)
    # Only the last of the ten queries attends to token 5. The others share evenly what they can see.
    received = [sum(1 / (i + 1) for i in range(j, 9)) / 10 + (0.1 if j == 5 else 0.0) for j in range(9)]
    assert scores(scorers.snapkv, rows) == approx(*(max(received[max(0, j - 3) : j + 4]) for j in range(9)))


def test_snapkv_asks_the_last_32() -> None:
    query = [[[90.0, 0.0]]] * 8 + [[[0.0, 0.0]]] * 32
    keys = [[1.0, 0.0]] + [[0.0, 0.0]] * 39
    received = sum(1 / (i + 1) for i in range(8, 40)) / 32  # had the first eight been asked: more
    assert scores(scorers.snapkv, hand(query, keys, length=40))[0] == pytest.approx(received, abs=1e-5)


def test_knorm_and_keydiff() -> None:
    keys = [[3.0, 4.0], [0.0, 1.0]]
    assert scores(scorers.knorm, hand(keys=keys, length=2)) == approx(-5, -1)
    # Unit keys (1,0), (1,0), (0,1): their mean is (2,1)/3.
    keys = [[2.0, 0.0], [1.0, 0.0], [0.0, 7.0]]
    assert scores(scorers.keydiff, hand(keys=keys, length=3)) == approx(*(-x / math.sqrt(5) for x in (2, 2, 1)))


def test_rkv_subtracts_what_is_alike_but_not_against_the_newest() -> None:
    # Three equal keys. Of each row's similar keys the newest is forgiven: rows (0,1,-), (1,0,-), (1,-,0).
    alike = [math.exp(x) for x in (2 / 3, 1 / 3, 0)]
    expected = [0.1 / 3 - 0.9 * a / sum(alike) for a in alike]
    assert scores(scorers.rkv, hand(keys=[[1.0, 0.0]] * 3, length=3)) == approx(*expected)


def test_rkv_takes_logits_of_the_group_at_their_greatest() -> None:
    keys = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]] + [[0.0, 0.0, 0.0]] * 12
    query = [[[math.log(2), 0.0, 0.0], [0.0, 0.0, math.log(4)]]] * 15
    # exp of the greatest logits: 2, 1, 4 and twelve ones, max-pooled over three neighbours to either side.
    weights = [2, 1, 4] + [1] * 12
    pooled = [max(weights[max(0, j - 3) : j + 4]) / sum(weights) for j in range(15)]
    assert scores(scorers.rkv, hand(query, keys, length=15)) == approx(*(0.1 * x - 0.9 / 15 for x in pooled))


def test_chunkkv_ranks_fixed_chunks_of_ten() -> None:
    keys = [[90.0, 0.0] if j == 12 else [0.0, 0.0] for j in range(25)]
    found = scores(scorers.chunkkv, hand([[[1.0, 0.0]]] * 25, keys, length=25))
    assert found[10:20] == [found[10]] * 10
    assert found[0:10] == [found[0]] * 10
    # Queries 12 to 24 give all to token 12. Those before share evenly.
    assert found[10] == pytest.approx((13 + 1 / 11 + 2 / 12) / 25 / 10, abs=1e-5)
    assert found[20:] == approx(*[0.0] * 5)


def test_compactor_weighs_by_values_and_averages_neighbours() -> None:
    values = [[3.0, 0.0], [0.0, 6.0], [9.0, 0.0]]
    assert scores(scorers.compactor, hand(values=values, length=3)) == approx(4.5, 6, 7.5)


def test_kvzip_takes_the_most_that_any_repeated_token_gave() -> None:
    # A token of the pass sees the three rows, then itself and the token before it: a quarter, then a fifth to each.
    rows = hand(length=3)
    pass_ = Repetition(0, 3, torch.zeros(1, 2, 1, 1, 2), torch.zeros(1, 1, 2, 2))
    assert scores(scorers.kvzip, with_(rows, repetitions=(pass_,))) == approx(1 / 4, 1 / 4, 1 / 4)
    # The second token looks for row 1 alone.
    query = torch.zeros(1, 2, 1, 1, 2)
    query[0, 1, 0, 0, 0] = 1.0
    rows = hand(keys=[[0.0, 0.0], [90.0, 0.0], [0.0, 0.0]], length=3)
    pass_ = Repetition(0, 3, query, torch.zeros(1, 1, 2, 2))
    assert scores(scorers.kvzip, with_(rows, repetitions=(pass_,))) == approx(1 / 4, 1, 1 / 4)


def test_expected_attention_adds_half_the_variance() -> None:
    # Without a rotation. The queries after the sinks are 1 and 3 along the first axis: mean 2, variance 1.
    query = [[[50.0, 0.0]]] * 4 + [[[1.0, 0.0]], [[3.0, 0.0]]]
    keys = [[0.0, 0.0]] * 4 + [[1.0, 0.0], [0.0, 1.0]]
    logits = [0.0] * 4 + [2 + 1 / 2, 0.0]
    total = math.exp(2.5) + 1  # of the keys that are no sinks
    rows = hand(query, keys, [[2.0, 0.0]] * 6, length=6)
    assert scores(scorers.expected_attention, rows) == approx(*(2 * (math.exp(x) / total + 0.01) for x in logits))


def test_chance_is_repeatable_and_streaming_keeps_the_newest() -> None:
    zeros = torch.zeros(2, 3, 4, 8)
    rows = Rows(torch.zeros(2, 0, 3, 1, 8), zeros, zeros, 0, 4, 1.0, seed=5)
    assert torch.equal(scorers.random_per_head(rows), scorers.random_per_head(rows))
    assert not torch.equal(scorers.random_per_head(rows), scorers.random_per_head(with_(rows, seed=6)))
    assert len({tuple(row) for row in scorers.random_per_head(rows).flatten(0, 1).tolist()}) == 6
    assert len({tuple(row) for row in scorers.random_shared(rows).flatten(0, 1).tolist()}) == 1
    assert scorers.streaming_llm(rows)[1, 2].tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------- against plain Python


class Text:
    """Random queries before rotation, keys and values as nested lists, and the same as :class:`Rows`.

    Of ``TOTAL`` tokens the newest 9 have queries. Rows 6 to 11 are scored, so two make a tail.
    """

    first_query, start, length, scale, window, step = TOTAL - 9, 6, 6, 0.7, 4096, 1

    def __init__(self, seed: int = 0, *, rotated: int = 4, interleaved: bool = False) -> None:
        chance = random.Random(seed)

        def some(*shape: int) -> Any:
            return [some(*shape[1:]) for _ in range(shape[0])] if shape else chance.gauss(0, 1)

        self.plain = some(LAYERS, TOTAL, HEADS, GROUP, DIM)  # queries of all tokens before rotation
        self.keys = some(LAYERS, HEADS, TOTAL, DIM)  # as cached
        self.values = some(LAYERS, HEADS, TOTAL, VALUES)
        self.passes = [(0, 5, some(LAYERS, 4, HEADS, GROUP, DIM), some(LAYERS, HEADS, 4, DIM)),
                       (4, 9, some(LAYERS, 3, HEADS, GROUP, DIM), some(LAYERS, HEADS, 3, DIM))]  # fmt: skip
        self.rotated, self.interleaved = rotated, interleaved
        self.query = [
            [[[self.turn(q, t) for q in group] for group in token] for t, token in enumerate(layer)]
            for layer in self.plain
        ]

    def turn(self, vector: list[float], positions: float) -> list[float]:
        """A vector turned by some positions. Pair i turns by 0.9 / 4^i a position."""
        half, out = self.rotated // 2, list(vector)
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if self.interleaved else (i, i + half)
            turned = complex(vector[a], vector[b]) * cmath.rect(1, positions * 0.9 / 4**i)
            out[a], out[b] = turned.real, turned.imag
        return out

    def ahead(self, n: int, device: torch.device) -> LookAhead:
        angles = torch.tensor([n * 0.9 / 4**i for i in range(self.rotated // 2)], dtype=torch.float64)
        return LookAhead(angles.cos().float(), angles.sin().float(), self.interleaved)

    def rows(self, **changed: Any) -> Rows:
        repetitions = tuple(
            Repetition(first, count, torch.tensor(query), torch.tensor(keys))
            for first, count, query, keys in self.passes
        )
        query = torch.tensor(self.query)[:, self.first_query :]
        given = {"query": query, "keys": torch.tensor(self.keys), "values": torch.tensor(self.values),
                 "start": self.start, "length": self.length, "scale": self.scale, "ahead": self.ahead,
                 "repetitions": repetitions}  # fmt: skip
        return Rows(**{**given, **changed})

    @property
    def span(self) -> range:
        return range(self.start, self.start + self.length)


def with_(rows: Rows, **changed: Any) -> Rows:
    return Rows(**{**{name: getattr(rows, name) for name in Rows.__dataclass_fields__}, **changed})


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: list[float]) -> float:
    return math.sqrt(dot(a, a))


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def for_each_head(text: Text, of_head: Callable[[Text, int, int], list[float]]) -> Scores:
    return [[of_head(text, layer, head) for head in range(HEADS)] for layer in range(LAYERS)]


def attention(text: Text, layer: int, head: int, g: int, t: int) -> list[float]:
    """What query head g of token t gives to every token: nothing to later ones."""
    seen = text.keys[layer][head][: t + 1]
    return softmax([text.scale * dot(text.query[layer][t][head][g], key) for key in seen]) + [0.0] * (TOTAL - t - 1)


def pooled(row: list[float], width: int) -> list[float]:
    return [max(row[max(0, j - width // 2) : j + width // 2 + 1]) for j in range(len(row))]


def snapkv(text: Text, layer: int, head: int) -> list[float]:
    asked = range(max(text.first_query, TOTAL - published.SNAP_QUERIES), TOTAL)
    given = [attention(text, layer, head, g, t) for g in range(GROUP) for t in asked]
    return pooled([mean([row[j] for row in given]) for j in text.span], published.SNAP_POOL)


def h2o(text: Text, layer: int, head: int) -> list[float]:
    asked = range(text.first_query, TOTAL)
    given = [attention(text, layer, head, g, t) for g in range(GROUP) for t in asked]
    return [sum(row[j] for row in given) for j in text.span]


def tova(text: Text, layer: int, head: int) -> list[float]:
    given = [attention(text, layer, h, g, TOTAL - 1) for h in range(HEADS) for g in range(GROUP)]
    return [mean([row[j] for row in given]) for j in text.span]


def chunkkv(text: Text, layer: int, head: int) -> list[float]:
    asked = range(max(text.first_query, TOTAL - published.SNAP_QUERIES), TOTAL)
    given = [attention(text, layer, h, g, t) for h in range(HEADS) for g in range(GROUP) for t in asked]
    row = [mean([each[j] for each in given]) for j in text.span]
    chunks = [row[i : i + published.CHUNK] for i in range(0, len(row), published.CHUNK)]
    return [mean(chunk) for chunk in chunks for _ in chunk]


def knorm(text: Text, layer: int, head: int) -> list[float]:
    return [-norm(text.keys[layer][head][j]) for j in text.span]


def keydiff(text: Text, layer: int, head: int) -> list[float]:
    units = [[x / norm(key) for x in key] for key in (text.keys[layer][head][j] for j in text.span)]
    anchor = [mean([unit[d] for unit in units]) for d in range(DIM)]
    return [-dot(unit, anchor) / norm(anchor) for unit in units]


def rkv(text: Text, layer: int, head: int) -> list[float]:
    keys = text.keys[layer][head]
    rows = []
    for t in range(max(text.first_query, TOTAL - published.RKV_QUERIES), TOTAL):
        group = text.query[layer][t][head]
        rows.append(softmax([max(text.scale * dot(group[g], keys[j]) for g in range(GROUP)) for j in text.span]))
    important = pooled([mean([row[i] for row in rows]) for i in range(text.length)], published.RKV_POOL)
    held = keys[text.start :]
    similar = [[dot(a, b) / norm(a) / norm(b) if a is not b else 0.0 for b in held] for a in held]
    for row in similar:
        row[max([j for j, cosine in enumerate(row) if cosine > 0.5], default=0)] = 0.0
    redundant = softmax([mean([row[j] for row in similar]) for j in range(len(held))])
    return [0.1 * a - 0.9 * b for a, b in zip(important, redundant, strict=False)]


def compactor(text: Text, layer: int, head: int) -> list[float]:
    keys, found = text.keys[layer][head], []
    for first in range(text.start, text.start + text.length, published.COMPACTOR_CHUNK):
        chunk = range(first, min(first + published.COMPACTOR_CHUNK, text.start + text.length))
        given = [
            softmax([text.scale * dot(text.query[layer][t][head][g], keys[j]) for j in chunk])
            for t in chunk for g in range(GROUP)
        ]  # fmt: skip
        for place, j in enumerate(chunk):
            found.append(sum(row[place] for row in given) / GROUP * norm(text.values[layer][head][j]))
    return [mean(found[max(0, i - 1) : i + 2]) for i in range(len(found))]


def kvzip(text: Text, layer: int, head: int) -> list[float]:
    best = [0.0] * TOTAL
    for first, count, query, own_keys in text.passes:
        repeated = [*range(min(4, first)), *range(first, first + count)]
        for m, token in enumerate(query[layer]):
            for vector in token[head]:
                seen = [text.keys[layer][head][j] for j in repeated] + own_keys[layer][head][: m + 1]
                given = softmax([text.scale * dot(vector, key) for key in seen])
                for place, j in enumerate(repeated):
                    if j >= first:
                        best[j] = max(best[j], given[place])
    return [best[j] for j in text.span]


def expected_attention(text: Text, layer: int, head: int) -> list[float]:
    # The mean rotation of the next 512 positions, as a matrix.
    axes = [[float(d == e) for e in range(DIM)] for d in range(DIM)]
    turned = [[text.turn(axis, TOTAL + n) for n in range(512)] for axis in axes]
    rotation = [[mean([row[e] for row in turned[d]]) for d in range(DIM)] for e in range(DIM)]
    logits = []
    for g in range(GROUP):
        queries = [text.plain[layer][t][head][g] for t in range(max(4, text.first_query), TOTAL)]
        middle = [mean([q[d] for q in queries]) for d in range(DIM)]
        spread = [[mean([(q[d] - middle[d]) * (q[e] - middle[e]) for q in queries]) for e in range(DIM)]
                  for d in range(DIM)]  # fmt: skip
        turned_mean = [dot(row, middle) for row in rotation]
        logits.append([])
        for j in text.span:
            key = text.keys[layer][head][j]
            back = [sum(rotation[e][d] * key[e] for e in range(DIM)) for d in range(DIM)]  # the key, turned back
            variance = sum(back[d] * spread[d][e] * back[e] for d in range(DIM) for e in range(DIM))
            logits[-1].append(text.scale * dot(turned_mean, key) + text.scale**2 * variance / 2)
    free = [[x for x, j in zip(row, text.span, strict=True) if j >= 4] for row in logits]
    totals = [sum(math.exp(x) for x in row) for row in free]
    found = [mean([math.exp(row[i]) / total for row, total in zip(logits, totals, strict=True)])
             for i in range(text.length)]  # fmt: skip
    return [(x + 0.01) * norm(text.values[layer][head][j]) for x, j in zip(found, text.span, strict=True)]


def kara(text: Text, layer: int, head: int, power: int = 2, step: int = 1) -> list[float]:
    width = min(text.length, text.window)
    sinks = [text.start + i for i in range(min(4, width - 1))]
    others = [j for j in text.span if j not in sinks]
    body = width - len(sinks)
    count = math.ceil(len(others) / body)
    found = {}
    for i in range(count):
        begin = (len(others) - body) * i // max(1, count - 1)
        seen = sinks + others[begin : begin + body]
        rows = [
            softmax([text.scale * dot(text.turn(q, text.length), text.keys[layer][head][j]) for j in seen])
            for t in range(text.first_query + step - 1, TOTAL, step) for q in text.query[layer][t][head]
        ]  # fmt: skip
        for place, j in enumerate(seen):
            if i == 0 or j not in sinks:  # the last window that holds a row has the last word
                received = mean([row[place] ** power for row in rows]) ** (1 / power)
                found[j] = received * norm(text.values[layer][head][j])
    return [found[j] for j in text.span]


def kara_mean(text: Text, layer: int, head: int) -> list[float]:
    return kara(text, layer, head, power=1)


def kara_sampled(text: Text, layer: int, head: int) -> list[float]:
    return kara(text, layer, head, power=1, step=text.step)


ORACLES = {
    "kara": kara, "kara_mean": kara_mean, "kara_sampled": kara_sampled, "compactor": compactor,
    "expected_attention": expected_attention, "kvzip": kvzip, "snapkv": snapkv, "keydiff": keydiff, "knorm": knorm,
    "h2o": h2o, "tova": tova, "rkv": rkv, "chunkkv": chunkkv,
}  # fmt: skip


def test_every_scorer_but_chance_has_an_oracle() -> None:
    assert set(NAMED) - set(ORACLES) == {"random", "random_shared", "streaming_llm", "newest"}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_scores_are_those_of_plain_python(name: str, narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``narrow``: fewer queries asked than there are, small pools, chunks and windows, a query at a time."""
    if narrow:
        for constant, value in (("SNAP_QUERIES", 3), ("SNAP_POOL", 3), ("RKV_QUERIES", 2), ("RKV_POOL", 3),
                                ("CHUNK", 4), ("COMPACTOR_CHUNK", 4), ("SLICE_ELEMENTS", 1)):  # fmt: skip
            monkeypatch.setattr(published, constant, value)
    text, window = Text(3, interleaved=narrow, rotated=6 if narrow else 4), {}
    if name == "kara_sampled":
        text.window = 4  # the greatest power of two of at most six rows
    if narrow and name == "kara_sampled":
        monkeypatch.setattr(own, "CONTEXT_QUERIES", 4)
        text.step = 3  # of nine queries
    if narrow and name == "kara":
        text.window = 5
        window = {"window": 5}
    expected = torch.tensor(for_each_head(text, ORACLES[name]))
    torch.testing.assert_close(named(name)(text.rows(), **window), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 6, 8, 9, 13, 14])
def test_windows_that_share_the_first_rows(window: int) -> None:
    text = Text(5)
    text.first_query, text.start, text.length, text.window = 5, 0, TOTAL, window
    expected = torch.tensor(for_each_head(text, kara))
    torch.testing.assert_close(scorers.kara(text.rows(), window=window), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("length", range(1, 14))
def test_contexts_of_all_lengths_share_windows_of_a_power_of_two(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text, asked = Text(6), []
    text.first_query, text.start, text.length = 0, 0, length
    monkeypatch.setattr(own, "MAX_WINDOW", 8)
    monkeypatch.setattr(own, "score_window", lambda *args, **rest: asked.append(args[4]) or score_window(*args, **rest))
    scorers.kara_sampled(text.rows())
    assert set(asked) == {max(w for w in (1, 2, 4, 8) if w <= length)}


@pytest.mark.parametrize("name", ["expected_attention", "kara", "h2o"])
def test_a_whole_context_from_its_first_token(name: str) -> None:
    """Here the queries and keys of the sinks are among those given."""
    text = Text(4)
    text.first_query, text.start, text.length = 0, 0, TOTAL
    expected = torch.tensor(for_each_head(text, ORACLES[name]))
    torch.testing.assert_close(named(name)(text.rows()), expected, rtol=2e-5, atol=2e-6)


# --------------------------------------------------------------------------------------------------- properties


def test_models_without_a_rotary_embedding_look_nowhere() -> None:
    """``ahead`` of None is that of angles of zero."""
    still = Text(5, rotated=0)
    for name in ("kara", "expected_attention"):
        expected = torch.tensor(for_each_head(still, ORACLES[name]))
        torch.testing.assert_close(named(name)(still.rows(ahead=None)), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_half_precision_is_scored_in_float32(name: str) -> None:
    rows = Text(6).rows()

    def of(dtype: torch.dtype) -> Rows:
        passes = tuple(
            Repetition(p.start, p.length, p.query.bfloat16().to(dtype), p.keys.bfloat16().to(dtype))
            for p in rows.repetitions
        )
        wide = {part: getattr(rows, part).bfloat16().to(dtype) for part in ("query", "keys", "values")}
        return with_(rows, **wide, repetitions=passes)

    found, expected = named(name)(of(torch.bfloat16)), named(name)(of(torch.float32))
    assert found.dtype == torch.float32
    # The library's own score rounds turned keys to bfloat16, as the kernels do.
    torch.testing.assert_close(found, expected, rtol=2e-2 if name.startswith("kara") else 1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["knorm", "keydiff"])
def test_what_needs_no_queries_does_not_depend_on_the_order_of_rows(name: str) -> None:
    rows = with_(Text(7).rows(), query=torch.zeros(LAYERS, 0, HEADS, GROUP, DIM), start=0, length=TOTAL)
    order = torch.randperm(TOTAL, generator=torch.Generator().manual_seed(0))
    shuffled = named(name)(with_(rows, keys=rows.keys[:, :, order]))
    torch.testing.assert_close(shuffled, named(name)(rows)[..., order], rtol=1e-6, atol=1e-6)


def test_scaled_keys() -> None:
    """KeyDiff looks at directions only, Knorm at lengths."""
    rows = Text(8).rows()
    scaled = with_(rows, keys=3 * rows.keys)
    torch.testing.assert_close(scorers.knorm(scaled), 3 * scorers.knorm(rows))
    torch.testing.assert_close(scorers.keydiff(scaled), scorers.keydiff(rows))


def test_logits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queries there are, those of one query fit or no more exist at a time."""
    monkeypatch.setattr(published, "SLICE_ELEMENTS", 2 * HEADS * GROUP * TOTAL + 1)
    taken: list[int] = []
    softmax_ = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: taken.append(x.numel()) or softmax_(x, dim))
    rows = Text(9).rows()
    for name in ("h2o", "snapkv", "kvzip"):
        named(name)(rows)
    assert max(taken) == 2 * HEADS * GROUP * TOTAL


def test_orders_of_a_context_begin_with_its_sinks() -> None:
    rows = Text(10).rows(start=0, length=TOTAL)
    order = rank_rows(scorers.knorm(rows), sinks=2, newest=3)
    assert order.shape == (LAYERS, HEADS, TOTAL)
    assert order[..., :5].tolist() == [[[0, 1, 11, 12, 13]] * HEADS] * LAYERS


def test_options_of_the_own_score() -> None:
    rows = Text(11).rows()
    plain = scorers.kara(rows)
    changed = [scorers.kara(rows, look_ahead=False), scorers.kara(rows, scoring=Scoring(value_norm=False)),
               scorers.kara(rows, scoring=Scoring(reduction="mean")), scorers.kara(rows, scoring=Scoring(redundancy=1)),
               scorers.kara(rows, query=list(rows.query[:, 2:].flatten(2, 3)[:, None]))]  # fmt: skip
    assert all(not torch.allclose(plain, other) for other in changed)


def test_every_scorer_names_its_paper() -> None:
    without = {"kara", "kara_mean", "kara_sampled", "random_shared"}
    for name, scorer in NAMED.items():
        assert scorer.__doc__
        assert ("arXiv" in " ".join(scorer.__doc__.split())) == (name not in without), name


def test_names_lead_to_scorers() -> None:
    assert named("snapkv") is scorers.snapkv
    with pytest.raises(ValueError, match=r"scorer: expected one of 'kara', 'kara_mean', .*, got 'snap'"):
        named("snap")
    with pytest.raises(TypeError):
        NAMED["snapkv"] = scorers.h2o  # type: ignore[index]


ONE = Repetition(0, 3, torch.zeros(LAYERS, 2, HEADS, GROUP, DIM), torch.zeros(LAYERS, HEADS, 2, DIM))
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"keys": []}, TypeError, "keys: expected a tensor, got list"),
    "fp8": ({"keys": torch.zeros(2, 2, 14, 6).to(torch.float8_e4m3fn)}, TypeError, "keys: expected dtype"),
    "fewer values": ({"values": torch.zeros(2, 2, 13, 3)}, ValueError, r"values: expected shape \[2, 2, 14, any\]"),
    "flat queries": ({"query": torch.zeros(2, 9, 6, 6)}, ValueError, r"query: expected shape \[2, any, 2, any, 6\]"),
    "more queries": ({"query": torch.zeros(2, 15, 2, 3, 6)}, ValueError, r"query: .* at most 14 tokens, got 15"),
    "nothing": ({"length": 0}, ValueError, r"length: expected 1\.\.14, got 0"),
    "behind the end": ({"start": 9}, ValueError, r"start: expected 0\.\.8, got 9"),
    "infinite": ({"scale": math.inf}, ValueError, "scale: expected"),
    "of other heads": (
        {"repetitions": (Repetition(0, 3, ONE.query[:, :, :1], ONE.keys),)}, ValueError, r"repetitions\[0\].query: "),
    "fewer keys": (
        {"repetitions": (ONE, Repetition(0, 3, ONE.query, ONE.keys[:, :, :1]))}, ValueError, r"repetitions\[1\].keys"),
    "beyond the context": (
        {"repetitions": (Repetition(12, 3, ONE.query, ONE.keys),)}, ValueError, r"repetitions\[0\].start: .* got 12"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_that_do_not_fit_are_refused(case: str) -> None:
    changed, error, message = BAD[case]
    with pytest.raises(error, match=message):
        Text().rows(**changed)


def test_what_a_scorer_lacks_is_told() -> None:
    rows = Text().rows()
    silent = with_(rows, query=rows.query[:, :0])
    for name in ("snapkv", "h2o", "tova", "chunkkv", "rkv"):
        with pytest.raises(ValueError, match="query: expected at least 1 query"):
            named(name)(silent)
    with pytest.raises(ValueError, match="query: expected queries after the first 4 tokens, got 0 of 14 tokens"):
        scorers.expected_attention(silent)
    with pytest.raises(ValueError, match=r"query: expected .* from row 6 on, for compactor, got those from row 8 on"):
        scorers.compactor(with_(rows, query=rows.query[:, 3:]))
    with pytest.raises(ValueError, match=r"window: expected 1\.\.4096, got 5000"):
        scorers.kara(rows, window=5000)
    with pytest.raises(ValueError, match="repetitions: expected at least one for kvzip, got none"):
        scorers.kvzip(with_(rows, repetitions=()))
