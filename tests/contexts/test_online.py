"""Profiles that an ordinary client measures: against a server whose probabilities are known."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kara_kernels.contexts import online
from kara_kernels.contexts.__main__ import main
from kara_kernels.contexts.online import OnlineProfiler, Server, ServerError, divergence
from kara_kernels.contexts.profile import Profile, keys_of

BLOCK, STEPS = 16, {3: 0.3, 5: 0.42, 9: 0.55}  # ratios by sections
TEXT, QUERIES = " ".join(f"w{i}" for i in range(1, 90)), ("w7 w8", "w9")


class Fake:
    """Answers as vLLM does. Rows that lost something make the second token likelier, at every place."""

    def __init__(self) -> None:
        self.busy, self.asked, self.stored, self.broken = 0, [], set(), False

    def tops(self, prompt: list[int], lost: float) -> dict[str, float]:
        best = (prompt[-1] + 1) % 100
        return {f"token_id:{best}": math.log(0.7 - lost), f"token_id:{best + 100}": math.log(0.2 + lost)}

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(asked)
        prompt, params = list(asked["prompt"]), asked["kv_transfer_params"]
        tokens, context, lost = params.get("context_tokens", 0) // BLOCK * BLOCK, {"source": "computed"}, 0.0
        if params.get("contexts", True) and (name := tuple(prompt[:tokens])) in self.stored:
            wanted = params.get("context", {"method": "none/int8", "ratio": 1.0})
            if wanted["method"] == "none/int8":
                sections = min(STEPS, key=lambda step: abs(STEPS[step] - wanted["ratio"]))
                lost = 0.6 - STEPS[sections]
                context = {
                    "source": "ram", "tokens": tokens, "method": "none/int8", "ratio": STEPS[sections],
                    "sections": sections, "nbytes": 1000 * sections,
                }  # fmt: skip
        elif params.get("contexts", True) and tokens:
            self.stored.add(name)
        said, tops = [], []
        for _ in range(asked["max_tokens"]):
            tops.append(self.tops(prompt, lost))
            said.append(max(tops[-1], key=tops[-1].__getitem__))
            prompt.append(int(said[-1].removeprefix("token_id:")))
        choice = {"logprobs": {"tokens": said, "top_logprobs": tops}}
        return {"choices": [choice], "kv_transfer_params": {"context": context}}


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    state = Fake()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def answer(self, body: Any, code: int = 200) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/metrics":
                busy, state.busy = state.busy, max(0, state.busy - 1)
                self.answer(f'vllm:num_requests_running{{engine="0"}} {float(busy > 0)}\n')
            else:
                self.answer({"data": [{"id": "served"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "served"
            if self.path == "/tokenize":
                words = body["prompt"].split()
                self.answer({"tokens": [int(word[1:]) if word[1:].isdigit() else 0 for word in words]})
            elif state.broken:
                self.answer("out of order", 503)
            else:
                self.answer(state.complete(body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def kl(lost: float) -> float:
    p, q = (0.7, 0.2, 0.1), (0.7 - lost, 0.2 + lost, 0.1)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_every_compression_is_measured_token_by_token(fake: tuple[Fake, str]) -> None:
    state, url = fake
    said: list[tuple[str, float]] = []
    profiler = OnlineProfiler(Server(url), ["none/int8", "none/int4"], 80, 4, lambda *what: said.append(what))
    ids = profiler.ids(TEXT)
    assert ids == list(range(1, 81))
    found = profiler.profile("a name", ids, QUERIES)
    assert (found.key, found.tokens, found.queries) == (next(keys_of(ids, [80])), 80, QUERIES)
    assert [(each.sections, each.ratio, each.nbytes, each.rows) for each in found.measured] == [
        (step, STEPS[step], 1000 * step, 80) for step in STEPS
    ]
    for each in found.measured:
        lost = 0.6 - STEPS[each.sections]
        assert each.kl == pytest.approx(kl(lost))
        assert each.agreement == float(lost < 0.25)
    exact = [asked for asked in state.asked if asked["kv_transfer_params"] == {"contexts": False}]
    assert [asked["max_tokens"] for asked in exact] == [4, 4]
    answer = [*ids, 0, 7, 8, 0]
    assert exact[0]["prompt"] == answer
    judged = [asked["prompt"] for asked in state.asked if "context" in asked["kv_transfer_params"]]
    assert [*answer, 1, 2, 3] in judged  # the exact answer, not that of the compression
    assert said[0][0] == "prefill"
    assert all(0 <= done <= 1 for _, done in said)


def test_the_quality_that_others_get_is_told(fake: tuple[Fake, str]) -> None:
    _, url = fake
    profiler = OnlineProfiler(Server(url), ["none/int8"], 80, 4)
    ids = profiler.ids(TEXT)
    assert profiler.quality(ids, QUERIES) > 0.99  # the first request is computed, and the others get the whole packet
    assert profiler.quality(ids, QUERIES) == pytest.approx(math.exp(-kl(0.05)))


def test_the_command_writes_a_profile_and_measures_again_what_is_served_too_badly(
    fake: tuple[Fake, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, url = fake
    lines, out = tmp_path / "contexts.jsonl", tmp_path / "profile.json"
    lines.write_text(json.dumps({"text": TEXT, "name": "a name", "queries": QUERIES}) + "\n")
    command = ["profile", "--server", url, str(lines), "-o", str(out), "--tokens", "83", "--answer-tokens", "2"]
    assert main(command) == 0
    (context,) = Profile.load(out).contexts.values()
    assert (context.name, context.tokens, len(context.measured)) == ("a name", 80, len(STEPS))
    assert "1 contexts, 3 compressions" in capsys.readouterr().err
    asked = len(state.asked)
    assert main(command) == 0
    assert len(state.asked) == asked  # it is known
    assert main([*command, "--floor", "0.97"]) == 0
    checked = len(state.asked) - asked
    assert checked == 2 + 2 * 2  # exact answers, and each of their tokens
    assert main([*command, "--floor", "1.0"]) == 0
    assert len(state.asked) > asked + 3 * checked
    lines.write_text(json.dumps({"text": TEXT}) + "\n")
    assert main(command) == 2
    assert "expected queries of every context with --server, got none of line 1" in capsys.readouterr().err
    assert main(["profile", str(lines)]) == 2
    assert "MODEL: expected a folder or name" in capsys.readouterr().err


def test_it_waits_while_the_server_is_busy(fake: tuple[Fake, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "LOOK", 0.0)
    state, url = fake
    state.busy = 5
    said: list[str] = []
    profiler = OnlineProfiler(Server(url), ["none/int8"], 80, 2, lambda what, done: said.append(what))
    profiler.profile("a name", profiler.ids(TEXT), QUERIES[:1])
    assert said[:6] == ["waiting, because the server is busy"] * 5 + ["prefill"]


def test_a_context_that_is_not_stored_is_an_error(fake: tuple[Fake, str]) -> None:
    _, url = fake
    profiler = OnlineProfiler(Server(url), ["none/int4"], 80, 2)
    with pytest.raises(ServerError, match="context 'a name': expected the server to store it, got none of its rows"):
        profiler.profile("a name", profiler.ids(TEXT), QUERIES[:1])


def test_servers_that_answer_otherwise_are_named(fake: tuple[Fake, str]) -> None:
    state, url = fake
    with pytest.raises(ServerError, match="model: expected one of served, got 'other'"):
        Server(url, "other")
    server = Server(f"{url}/v1/")
    state.broken = True
    with pytest.raises(ServerError, match=r"/v1/completions: 503 out of order"):
        server.ask([1], 1, {})
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:1/v1/models: "):
        Server("http://127.0.0.1:1")


def test_divergence_is_never_more_than_that_of_the_whole_distributions() -> None:
    draw = random.Random(0)
    for _ in range(200):
        whole = []
        for _ in range(2):
            weights = [draw.expovariate(1) ** 3 + 1e-6 for _ in range(12)]
            whole.append({token: math.log(weight / sum(weights)) for token, weight in enumerate(weights)})
        p, q = whole
        exact = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in p)
        tops = [dict(sorted(each.items(), key=lambda item: -item[1])[:4]) for each in whole]
        assert 0 <= divergence(*tops) <= exact + 1e-9
        assert divergence(p, q) == pytest.approx(exact)


def test_divergence_lumps_what_both_do_not_know() -> None:
    full = {1: math.log(0.5), 2: math.log(0.3)}
    assert divergence(full, full) == 0
    other = {1: math.log(0.2), 3: math.log(0.5)}
    terms = (0.5 * math.log(0.5 / 0.2), 0.3 * math.log(0.3 / 0.2), 0.2 * math.log(0.2 / 0.8))
    assert divergence(full, other) == pytest.approx(sum(terms))
    sure = {1: 0.0}
    assert divergence(sure, {2: math.log(0.99), 3: math.log(0.01)}) == pytest.approx(math.log(100))
    assert divergence({1: math.log(0.5)}, sure) > 5  # no rest is left
