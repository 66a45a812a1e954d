"""The demo of contexts without vLLM: documents and requests, figures, table, picture and options."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from demos import DemoError
from demos.contexts import __main__, profiling
from demos.contexts.documents import FACTS, Document, asked, documents, requests
from demos.serve.server import samples
from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext

for needed in ("matplotlib", "rich"):
    pytest.importorskip(needed)

from demos.contexts import picture, report  # noqa: E402


class Words:
    """A tokenizer whose tokens are words and the spaces behind them."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [self.known.setdefault(word, len(self.known)) for word in re.findall(r"\S+\s*|\s+", text)]
        return argparse.Namespace(input_ids=ids)

    def text(self, ids: list[int]) -> str:
        words = list(self.known)
        return "".join(words[i] for i in ids)


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


@pytest.fixture(scope="module")
def held(words: Words) -> list[Document]:
    return documents(words, 12, 512, seed=3)


def test_documents_have_as_many_tokens_as_asked_for_and_tell_their_facts(words: Words, held: list[Document]) -> None:
    for document in held:
        assert len(document.ids) == 512
        assert words(document.text).input_ids[:512] == document.ids
        text = words.text(document.ids)
        for query, answer in zip(document.queries, document.answers, strict=True):
            name = query.removeprefix("What is the code of station ").removesuffix("?")
            assert f"The code of station {name} is {answer}." in text
    assert len({document.text[:200] for document in held}) == len(held)


def test_a_seed_gives_the_same_documents_and_requests_and_another_one_others(
    words: Words, held: list[Document]
) -> None:
    assert documents(words, 12, 512, seed=3) == held
    assert documents(words, 12, 512, seed=4) != held
    assert requests(words, held, 20, seed=3) == requests(words, held, 20, seed=3)
    assert requests(words, held, 20, seed=3) != requests(words, held, 20, seed=4)


def test_requests_follow_zipf_and_never_ask_what_the_profile_asked(words: Words, held: list[Document]) -> None:
    asks = requests(words, held, 3000, seed=0)
    counts = Counter(ask.document for ask in asks)
    harmonic = sum(1 / rank for rank in range(1, 13))
    assert counts[0] / 3000 == pytest.approx(1 / harmonic, abs=0.03)
    assert counts[0] > counts[1] > counts[3] > counts[11] > 0
    for ask in asks:
        document = held[ask.document]
        assert ask.prompt[:512] == document.ids
        assert ask.answer in document.answers[1:]
    assert {ask.answer for ask in asks if ask.document == 0} == set(held[0].answers[1:])
    assert len(held[0].answers) == FACTS


def test_more_documents_than_there_are_texts_are_refused(words: Words) -> None:
    with pytest.raises(DemoError, match=r"--contexts must be at most \d+ with this Python, got 1000"):
        documents(words, 1000, 512, seed=0)


def answer(document: int, seconds: float, source: str, text: str = " 1234.", right: bool = True) -> report.Answer:
    return report.Answer(document, seconds, text, source, right, {"ram": 2**20 * 3.0, "disk": 0.0})


def sides() -> dict[str, report.Side]:
    chosen = [
        {"tier": "ram", "ratio": 0.3, "quality": 0.99, "rows": 700},
        {"tier": "disk", "ratio": 0.5, "quality": 1.0, "rows": 1536},
        None,
    ]
    answers = {
        "computed": [answer(0, 2.0, "computed"), answer(1, 4.0, "gpu")],
        "whole": [answer(0, 0.5, "ram"), answer(1, 1.5, "disk")],
        "fixed": [answer(0, 0.5, "ram"), answer(1, 0.7, "ram", " 1235.", False)],
        "kara": [answer(0, 0.4, "gpu"), answer(1, 0.6, "ram", " 1,234.")],
    }
    return {name: report.Side(given, 0.0, chosen if name == "kara" else []) for name, given in answers.items()}


@pytest.fixture
def result(words: Words, held: list[Document], tmp_path: Path) -> dict[str, Any]:
    options = __main__.parse(["--contexts", "18", "--picture", str(tmp_path / "a.png"), "--work", str(tmp_path)])
    asks = [asked(words, held, number, 1) for number in (0, 1)]
    profile = Profile("", {}, (), {})
    return report.collect(options, "a model", held[:3], asks, profile, "none/int4", sides(), {"profile": 30.0})


def test_figures_compare_with_the_server_that_computes(result: dict[str, Any]) -> None:
    json.dumps(result, allow_nan=False)
    kara = result["sides"]["kara"]
    assert kara["first_token_seconds"] == {"mean": pytest.approx(0.5), "median": 0.5, "p95": 0.6}
    assert kara["sources"] == {"gpu": 0.5, "ram": 0.5, "disk": 0.0, "computed": 0.0}
    assert (kara["same_answers"], kara["right_answers"]) == (0.5, 1.0)
    assert result["sides"]["fixed"]["right_answers"] == 0.5
    assert result["sooner"] == {"computed": pytest.approx(6), "whole": pytest.approx(2), "fixed": pytest.approx(1.2)}
    assert [each["asked"] for each in result["documents"]] == [1, 1, 0]


def test_findings_say_what_was_reached_and_what_was_missed(result: dict[str, Any]) -> None:
    first, second, blocks, third = report.findings(result)
    assert blocks.startswith("Fewer rows are kept of 1 of the documents. While in use these take 46% of the blocks")
    assert "6.0 times sooner than with vLLM's own prefix cache, 2.0 times" in first
    assert "50% of the answers are the same" in second
    assert third == "Goals missed: 1.5 times than fixed, LRU."
    result["blocks"] = {"documents": 2, "share": 0.61}
    assert report.findings(result)[-1] == "Goals missed: 1.5 times than fixed, LRU; 60% of the blocks."
    result["blocks"] = None
    assert len(report.findings(result)) == 3
    result["sides"]["kara"]["cpu_share_of_others"] = 0.3
    assert "doubtful" in report.findings(result)[-1]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (19, 19), (20, 19), (21, 20), (100, 95)])
def test_of_a_hundred_values_ninety_five_do_not_exceed_the_percentile(count: int, expected: int) -> None:
    assert report.percentile(list(range(count, 0, -1)), 0.95) == expected


def test_the_picture_is_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    picture.draw(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 20_000
    with pytest.raises(DemoError, match="--picture"):
        picture.draw(result, tmp_path / "none" / "a.png")


def test_sources_are_told_by_the_counters_that_grew() -> None:
    page = 'kara:context_hits_total{engine="0",source="%s"} %d.0\nvllm:prefix_cache_hits_total{engine="0"} %d.0\n'
    before = samples(page % ("ram", 1, 5) + page % ("disk", 2, 5))
    for source, ram, disk, own in (("ram", 2, 2, 5), ("disk", 1, 3, 5), ("gpu", 1, 2, 6), ("computed", 1, 2, 5)):
        after = samples(page % ("ram", ram, own) + page % ("disk", disk, own))
        assert report.source_of(before, after) == source


def test_the_fixed_compression_is_the_hardest_that_is_good_enough_in_the_mean() -> None:
    def context(key: str, kl: float) -> ProfiledContext:
        ways = [(3, 200, 64, 0.001), (2, 100, 64, kl), (1, 50, 32, 4 * kl)]
        measured = [
            Measured("kara_sampled/int8", sections, nbytes / 400, nbytes, 0.0, rows, loss, 1.0)
            for sections, nbytes, rows, loss in ways
        ]
        return ProfiledContext(key, "", 64, 1.0, 0.1, ("?",), tuple(measured))

    profile = Profile("", {}, (), {"a": context("a", 0.01), "b": context("b", 0.03)})
    found = [profiling.fixed_step(profile, floor) for floor in (0.9, 0.97, 0.99, 1.0)]
    assert [step.sections for step in found] == [1, 2, 3, 3]  # 0.92 and 0.98 in the mean
    assert profiling.described(found[0], 64) == "50% of the rows in 12% of the bytes"
    for key, kept in profiling.only(profile, found[1]).contexts.items():
        assert kept.measured == (profile.contexts[key].measured[1],)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tokens", "1000"], "--tokens must be whole blocks of 32, got 1000"),
        (["--floor", "2"], "--floor must be 0 to 1, got 2.0"),
        (["--contexts", "17"], "--contexts must be at least 18, got 17"),
        (["--picture", "a.txt"], "--picture must end in .png, .svg, .pdf, got a.txt"),
        (["--nothing"], r"unrecognized arguments: --nothing \(--help lists the options\)"),
    ],
)
def test_bad_options_are_named_in_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=expected) as raised:
        __main__.parse([*arguments, "--work", str(tmp_path), "--logs", str(tmp_path)])
    assert raised.value.code == 2
