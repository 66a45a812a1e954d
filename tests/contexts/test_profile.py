"""The profile: its file, its judges on a small model, its command, and measured tiers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kara_kernels.contexts import __main__ as command
from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext, ProfileError
from kara_kernels.contexts.tiers import measure_tier
from kara_kernels.contexts.utility import Option, Tier

MEASURED = Measured("knorm/exact", 3, 0.5, 1000, 0.01, 64, math.log(2), 0.75, 0.9, None)
CONTEXT = ProfiledContext("key", "name", 128, 2.0, 0.1, ("Why?",), (MEASURED,))
PROFILE = Profile("hash", {"model": "m"}, (Tier("ram", 10, 1e9, 0.001),), {"key": CONTEXT})

# ------------------------------------------------------------------------------------------------------ the file


def test_a_profile_is_what_was_saved(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == PROFILE
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_what_placement_gets() -> None:
    context = CONTEXT.context("likelihood", floor=0.4)
    assert context.options == (Option("knorm/exact", 0.5, 1000, 0.5, 0.01),)
    assert (context.key, context.prefill_seconds, context.question_seconds, context.floor) == ("key", 2.0, 0.1, 0.4)
    assert CONTEXT.context("agreement").options[0].quality == 0.75
    assert CONTEXT.context("cosine", methods=("knorm/exact",)).options[0].quality == 0.9
    assert CONTEXT.context(methods=("other",)).options == ()
    with pytest.raises(ValueError, match="judge: expected one that the profile has, got 'exact'"):
        CONTEXT.context("exact")
    with pytest.raises(ValueError, match="judge: expected one of"):
        CONTEXT.context("taste")


def _broken(change: Any) -> str:
    measured = {
        "method": "a/int8", "sections": 1, "ratio": 0.5, "nbytes": 5, "decode_seconds": 0.0, "rows": 4, "kl": 0.0,
        "agreement": 1.0,
    }  # fmt: skip
    context = {
        "key": "key", "name": "n", "tokens": 16, "prefill_seconds": 1.0, "question_seconds": 0.0, "queries": [],
        "measured": [measured],
    }  # fmt: skip
    held = {"format": 1, "key": "k", "about": {}, "tiers": [], "contexts": [context]}
    change(held)
    return json.dumps(held)


def _of_measured(change: Any) -> str:
    return _broken(lambda held: change(held["contexts"][0]["measured"]))


BROKEN = {
    "nothing": ("", "Expecting value"),
    "a list": ("[]", "list indices"),
    "deep": ("[" * 200_000, "Recursion"),
    "format": (_broken(lambda held: held.update(format=2)), "format: expected 1, got 2"),
    "no contexts": (_broken(lambda held: held.pop("contexts")), "contexts"),
    "no kl": (_of_measured(lambda found: found[0].pop("kl")), "kl"),
    "quality": (_of_measured(lambda found: found[0].update(agreement=1.5)), "agreement: expected 0"),
    "not a number": (_of_measured(lambda found: found[0].update(kl=float("nan"))), "kl: expected"),
    "size": (_of_measured(lambda found: found[0].update(nbytes=0)), "nbytes: expected 1"),
    "a tier": (_broken(lambda held: held.update(tiers=[{"name": "x", "capacity": -1, "bandwidth": 1}])), "capacity"),
    "two alike": (_of_measured(lambda found: found.append(found[0])), "got two"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_profiles(name: str, tmp_path: Path) -> None:
    text, message = BROKEN[name]
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProfileError, match=rf"p\.json: expected a profile, got .*{message}"):
        Profile.load(tmp_path / "p.json")


# ---------------------------------------------------------------------------------------------------- the judges


class Letters:
    """A tokenizer whose tokens are characters; token 0 begins a text."""

    def __call__(self, text: str, add_special_tokens: bool, return_tensors: str) -> Any:
        ids = [0] * add_special_tokens + [min(ord(letter), 127) for letter in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]))

    def __len__(self) -> int:
        return 128

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(int(i)) for i in ids if int(i))


def tiny(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.15, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TEXT = "The lighthouse of Pharos stood in Alexandria. Earthquakes destroyed it between 956 and 1323. " * 3


def profiler(model: Any = None, **settings: Any) -> Any:
    from kara_kernels.contexts.profiler import Profiler, Settings

    settings = {"tokens": 224, "queries": 1, "answer_tokens": 6, **settings}
    return Profiler(model or tiny(), Letters(), Settings(**settings))


def source(**fields: Any) -> Any:
    from kara_kernels.contexts.profile import Source

    return Source("pharos", TEXT, **fields)


def test_more_bytes_of_one_method_lose_less(one_thread: None) -> None:
    found = profiler(methods=("compactor/int8", "knorm/exact", "none/int4")).profile(
        source(queries=("Where?", "When?"))
    )
    assert found.tokens == 224
    assert found.queries == ("Where?", "When?")
    by_method: dict[str, list[Measured]] = {}
    for each in found.measured:
        by_method.setdefault(each.method, []).append(each)
    assert set(by_method) == {"compactor/int8", "knorm/exact", "none/int4"}
    for steps in by_method.values():
        assert [s.nbytes for s in steps] == sorted({s.nbytes for s in steps})
        assert steps[-1].rows == 224
        assert steps[0].kl >= steps[-1].kl
    assert by_method["knorm/exact"][-1].kl < 1e-6  # rows in another order attend alike
    assert by_method["knorm/exact"][-1].agreement == 1
    assert by_method["knorm/exact"][0].kl > 100 * by_method["compactor/int8"][-1].kl > 0
    whole = 2 * 2 * 224 * 32 * 2
    assert all(math.isclose(s.ratio, s.nbytes / whole) for s in found.measured)
    found.context()


def test_what_is_judged_is_the_model_itself(one_thread: None) -> None:
    """The log-probabilities behind a full cache, of several questions at once, are those of one pass over the text."""
    from kara_kernels.contexts.replay import Replay, cache_of

    model, tokens = tiny(), Letters()
    ids = tokens(TEXT[:64], True, "pt").input_ids[0]
    questions = [tokens(text, False, "pt").input_ids[0] for text in ("Where was it?", "Who?")]
    replay = Replay(model, ids)
    asked = replay.ask(replay.full(), questions, [3, 4])
    model.set_attn_implementation("eager")
    for question, last, found in zip(questions, (3, 4), asked, strict=True):
        with torch.no_grad():
            plain = model(torch.cat((ids, question))[None]).logits[0, -last:].log_softmax(-1)
        assert torch.allclose(found, plain, atol=2e-5)
    model.set_attn_implementation("kara-contexts")
    order = torch.randperm(len(ids))
    shuffled = replay.ask(cache_of(replay.keys[:, :, order], replay.values[:, :, order]), questions, [3, 4])
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(asked, shuffled, strict=True))


def test_answers_are_those_of_generate(one_thread: None) -> None:
    from kara_kernels.contexts.replay import Replay

    model = tiny(1)
    ids = Letters()(TEXT[:80], True, "pt").input_ids[0]
    replay = Replay(model, ids[:64])
    answer = replay.answer(replay.full(), ids[64:], 8, ())
    model.set_attn_implementation("eager")
    mask = torch.ones_like(ids[None])
    made = model.generate(
        ids[None], attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=[]
    )
    assert answer.tolist() == made[0, len(ids) :].tolist()


def test_repetitions_see_the_context(one_thread: None) -> None:
    """KVzip is given queries of the instruction and the context again, behind the context."""
    from kara_kernels.contexts.replay import Replay

    ids = Letters()(TEXT[:64], True, "pt").input_ids[0]
    rows = Replay(tiny(), ids).rows(repeat=[7, 8, 9])
    (repetition,) = rows.repetitions
    assert (repetition.start, repetition.length) == (0, len(ids))
    assert repetition.query.shape == (2, 3 + len(ids), 2, 2, 16)
    assert repetition.keys.shape == (2, 2, 3 + len(ids), 16)
    found = profiler(methods=("kvzip/int4",)).profile(source(queries=("Where?",)))
    assert {each.method for each in found.measured} == {"kvzip/int4"}


def test_questions_are_made_from_passages_with_a_seed(one_thread: None) -> None:
    ask = profiler(methods=("none/int4",), queries=2)
    first, again = ask.profile(source()), ask.profile(source())
    assert first.queries == again.queries
    assert len(first.queries) == 2
    assert [replace(m, decode_seconds=0) for m in first.measured] == [
        replace(m, decode_seconds=0) for m in again.measured
    ]


def test_given_answers_and_cosines(one_thread: None) -> None:
    from kara_kernels.contexts.profiler import _meets

    assert _meets("Alexandria", "It stood in alexandria.") == 1
    assert _meets("andria", "It stood in Alexandria.") == 0
    ask = profiler(methods=("none/int8",), judge_answers=True)
    full = ask.profile(source(queries=("Where?",))).measured[-1]
    assert full.cosine is None
    assert full.exact is None
    ask.embed = lambda texts: torch.nn.functional.normalize(torch.tensor([[1.0, len(text)] for text in texts]), dim=-1)
    truth = Letters().decode(ask._queries(source(queries=("Where?",)), _replay(ask))[0].answer)
    judged = ask.profile(source(queries=("Where?", "Who?"), answers=(truth, None))).measured[-1]
    assert judged.exact == (1.0 if judged.agreement == 1 and truth.strip() else judged.exact)
    assert judged.cosine is not None
    assert judged.cosine > 0.9


def _replay(ask: Any) -> Any:
    from kara_kernels.contexts.replay import Replay

    return Replay(ask.model, ask.tokens_of(source()), dtype=ask.dtype)


def test_what_cannot_be_profiled(one_thread: None) -> None:
    from kara_kernels.contexts.profile import Source
    from kara_kernels.contexts.profiler import Settings

    with pytest.raises(ValueError, match=r"method 'best/int8': scorer: expected one of"):
        Settings(methods=("best/int8",))
    with pytest.raises(ValueError, match=r"method 'knorm/int3': form: expected one of"):
        Settings(methods=("knorm/int3",))
    with pytest.raises(ValueError, match=r"context 'short': expected at least 32 tokens, got 0"):
        profiler().profile(Source("short", "too short"))
    windowed = tiny()
    windowed.config.layer_types = ["sliding_attention"] * 2
    ask = profiler(windowed)
    with pytest.raises(ValueError, match="model: expected full attention in all layers, got sliding_attention"):
        ask.profile(source())


# --------------------------------------------------------------------------------------------------- the command


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, lines: list[str] | None = None) -> int:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: tiny())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: Letters())
    lines = [json.dumps({"name": "pharos", "text": TEXT, "queries": ["Where?"]})] if lines is None else lines
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    return command.main([
        "profile", "model", str(tmp_path / "c.jsonl"), "-o", str(tmp_path / "p.json"), "--methods", "none/int4",
        "--tokens", "96", "--answer-tokens", "4", *arguments,
    ])  # fmt: skip


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    assert run(tmp_path, monkeypatch, "--tier", "ram=ram", "--tier", f"disk={tmp_path}") == 0
    first = Profile.load(tmp_path / "p.json")
    assert [tier.name for tier in first.tiers] == ["ram", "disk"]
    (context,) = first.contexts.values()
    assert (context.name, context.tokens, context.queries) == ("pharos", 96, ("Where?",))
    assert "1 contexts, 4 compressions" in capsys.readouterr().err or len(context.measured) != 4

    # Again with a second context: the first is not measured again.
    second = json.dumps({"text": TEXT[20:], "queries": ["When?"]})
    lines = [json.dumps({"name": "pharos", "text": TEXT, "queries": ["Where?"]}), second]
    assert run(tmp_path, monkeypatch, lines=lines) == 0
    both = Profile.load(tmp_path / "p.json")
    assert both.contexts[context.key] == context
    assert [each.name for each in both.contexts.values()] == ["pharos", "line 2"]
    assert both.tiers == first.tiers

    # Other settings would mix what cannot be compared.
    assert run(tmp_path, monkeypatch, "--seed", "1") == 2
    assert "has another model, other settings or code of other figures" in capsys.readouterr().err
    assert Profile.load(tmp_path / "p.json") == both


@pytest.mark.parametrize(("lines", "arguments", "message"), [
    (["{"], [], r"c\.jsonl, line 1: expected an object with text, got JSONDecodeError"),
    (["[]"], [], "line 1: expected an object with text"),
    (['{"text": 1}'], [], "text and queries must be strings"),
    (["", '{"text": "a", "queries": ["b"], "answers": ["c", "d"]}'], [], "line 2: .* 1 queries have 2 answers"),
    ([], [], "expected at least one context, got none"),
    (None, ["--tier", "ram"], "--tier: expected NAME=WHERE, got 'ram'"),
    (None, ["--tier", "x=/no/such/folder"], "tier 'x' at /no/such/folder: .*No such file"),
    (None, ["--tier", "x=ftp://a"], "expected 'ram', a directory or redis://"),
    (None, ["--cache-dtype", "int3"], "cache_dtype: expected one of"),
    (None, ["--tokens", "31"], "tokens: expected 32..2147483647, got 31"),
    (None, ["--queries", "0"], "queries: expected 1.."),
    (None, ["--answer-tokens", "0"], "answer_tokens: expected 1.."),
])  # fmt: skip
def test_errors_of_the_command_are_one_line(
    lines: list[str] | None, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import re

    assert run(tmp_path, monkeypatch, *arguments, lines=lines) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert re.search(f"^error: .*{message}", said[0])
    assert not (tmp_path / "p.json").exists()


def test_errors_of_a_model_are_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": TEXT}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert command.main(["profile", str(tmp_path / "none"), str(tmp_path / "c.jsonl"), "-o", str(tmp_path / "p")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------- measured tiers


def test_a_slow_tier_is_measured_as_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only reads move: 1 ms an operation and 1 ms a MiB."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    original = Path.open

    def slow(path: Path, *arguments: Any, **options: Any) -> Any:
        file = original(path, *arguments, **options)
        if arguments == ("rb",):
            now[0] += 0.001 + path.stat().st_size / 2**20 * 0.001
        return file

    monkeypatch.setattr(Path, "open", slow)
    tier = measure_tier("disk", str(tmp_path), size=8 << 20)
    assert math.isclose(tier.latency, 0.001 + 0.001 / 256, rel_tol=1e-6)
    assert math.isclose(tier.bandwidth, 2**20 / 0.001, rel_tol=1e-6)
    assert not list(tmp_path.iterdir())


def test_ram_is_measured() -> None:
    tier = measure_tier("ram", "ram", size=8 << 20)
    assert tier.bandwidth > 1e7
    assert tier.capacity > 1 << 20
    for size in (4096, 10_000):
        with pytest.raises(ValueError, match=f"size: expected a multiple of 4096, at least 8192, got {size}"):
            measure_tier("ram", "ram", size=size)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server is installed")
def test_redis_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    socket = tmp_path / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(socket), "--maxmemory", "100mb", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        tier = measure_tier("remote", f"unix://{socket}", size=4 << 20)
    finally:
        server.terminate()
        server.wait()
    assert tier.capacity == 100 << 20
    assert tier.bandwidth > 1e6


def test_no_error_of_a_tier_names_a_password() -> None:
    with pytest.raises(ValueError, match=r"tier 'remote' at redis://me:\*\*\*@127\.0\.0\.1:1/0: ") as raised:
        measure_tier("remote", "redis://me:se/cr@et@127.0.0.1:1/0")
    assert "cr@et" not in str(raised.value)
