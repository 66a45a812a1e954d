"""Contexts that a profile lets be compressed harder, against a dense model that is fed the rows of their packets."""

import json
import time

import pytest
from contexts_harness import BLOCK, ON, serving
from harness import ON_GPU, prompts

from demos.serve.server import Settings
from demos.serve.server import serving as serving_http
from kara_kernels.contexts.__main__ import main
from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext, keys_of
from kara_kernels.integrations.vllm import watched

DOCUMENTS, QUESTIONS = prompts(*[256] * 7, seed=81), prompts(9, 5, 12, seed=82)


def write_profile(path, server, kl):
    """A profile of all documents, in which four bits cost ``kl``."""
    steps = [step for step in server.manager.catalogue._header("", 256, "none/int8").steps if step.rows == 256]
    measured = tuple(
        Measured("none/int8", x.sections, x.ratio, x.nbytes, 0.0, x.rows, kl * (256 - x.finer) / 256, 1.0)
        for x in steps
    )
    keys = [next(keys_of(document, [256])) for document in DOCUMENTS]
    contexts = {key: ProfiledContext(key, "", 256, 1.0, 0.1, ("?",), measured) for key in keys}
    Profile("made", {}, (), contexts).save(path)
    until = time.monotonic() + 10
    version = server.manager.catalogue.version
    while server.manager.catalogue.version == version:
        server.ask([1, 2, 3], tokens=1, contexts=False)  # an engine that does nothing looks at nothing
        assert time.monotonic() < until
        time.sleep(0.001)


def held(server):
    copies = {copy.key: copy for copy in server.manager.keeper.directory.copies()}
    places = [server.place_of(document + QUESTIONS[0], 256) for document in DOCUMENTS]
    return [copies.get(place.key) for place in places]


def test_a_client_measures_the_profile_of_a_server_that_reads_it(model, tmp_path):
    """Everything as an operator has it: the server waits for a file that the command writes."""
    path, lines = tmp_path / "profile.json", tmp_path / "contexts.jsonl"
    settings = Settings(
        model=model, blocks=100, block_size=BLOCK, max_model_len=1024, max_requests=2, dtype="float32", eager=True,
        cpu=not ON_GPU, threads=1, contexts={"alpha": 1e-3, "ram_gib": 0.1, "profile": str(path)},
    )  # fmt: skip
    document = " ".join(f"w{word}" for word in DOCUMENTS[0] + DOCUMENTS[1])
    lines.write_text(json.dumps({"text": document, "name": "a text", "queries": ["w1 w2", "w3"]}) + "\n")
    with serving_http(settings, tmp_path / "server.log") as running:
        command = ["profile", "--server", running.url, str(lines), "-o", str(path), "--tokens", "500"]
        assert main([*command, "--answer-tokens", "3"]) == 0
        time.sleep(1.5)  # it looks once a second
        assert main([*command, "--answer-tokens", "3", "--floor", "0.0"]) == 0
        metrics = running.metrics()
    (context,) = Profile.load(path).contexts.values()
    assert context.tokens == 480  # whole blocks
    assert context.key == next(keys_of(DOCUMENTS[0] + DOCUMENTS[1], [480]))
    finer = sorted(context.measured, key=lambda each: each.nbytes)
    assert len(finer) > 2
    assert all(each.rows == 480 for each in finer)
    assert finer[0].kl > finer[-1].kl >= 0
    assert metrics["kara:context_profile_contexts"] == 1, metrics


@pytest.mark.parametrize("below", ["nothing", "a disk"])
def test_what_a_profile_allows_is_stored_harder(model, tmp_path, monkeypatch, below):
    monkeypatch.setattr(watched, "SECONDS", 0.0)
    given = {**ON, "ram_gib": 4.5 * 122_880 / 2**30, "grain_kib": 4, "profile": str(tmp_path / "profile")}
    if below == "a disk":
        given |= {"ram_gib": 6 * 122_880 / 2**30, "disk": {"path": str(tmp_path / "store"), "gib": 0.1}}
    with serving(model, given) as some:

        def ask(document, question):
            some.forget()
            return some.ask(document + question, context_tokens=256)

        for document in DOCUMENTS:
            ask(document, QUESTIONS[0])
        some.rest()
        assert sum(copy is not None and copy.tier == "ram" for copy in held(some)) == 4
        assert len({copy.option.ratio for copy in held(some) if copy is not None}) == 1
        write_profile(tmp_path / "profile", some, kl=0.01)
        for _ in range(2):
            for document in DOCUMENTS:
                ask(document, QUESTIONS[1])
        assert [copy.tier for copy in held(some)] == ["ram"] * 7
        assert len({copy.option.ratio for copy in held(some)}) > 1
        before = some.manager.counts["hits", "ram"]
        for document in DOCUMENTS:
            assert ask(document, QUESTIONS[2]) == [some.judge(document + QUESTIONS[2], 256)]
        assert some.manager.counts["hits", "ram"] == before + 7
        assert some.manager.counts["moves", "cut"] > 0
        write_profile(tmp_path / "profile", some, kl=0.1)  # now four bits are below the floor
        for document in DOCUMENTS:
            ask(document, QUESTIONS[1])
        assert all(copy is None or copy.option.quality >= 0.97 for copy in held(some))
        some.assert_nothing_leaks()
