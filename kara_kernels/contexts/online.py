"""Measures the profile of contexts through a server that runs, as an ordinary client of it.

For each query the server is asked for the answer from exact rows, and then, token by token of that answer, for the next
token from rows in each compression. The divergence is summed over the most probable tokens, and all others together. So
it is at most that of the whole distributions.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .profile import ASK, Measured, ProfiledContext, keys_of

METHODS = ("none/int8",)
SHARES = (0.125, 0.25, 0.5)
"""Of the way from the smallest packet that the server can make of a stored one to the stored one itself."""
BLOCK = 256  # tokens of the largest block
TOP = 20  # tokens whose probabilities the server tells; vLLM's own limit
PATIENCE = 600.0  # seconds for an answer
LEAST = 1e-9  # of probabilities: less is rounding
LOOK = 0.2  # seconds between two looks whether the server is idle


class ServerError(ValueError):
    """A server that does not answer, or not as expected."""


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    tokens: list[int]
    tops: list[dict[int, float]]
    """Log probabilities of the most probable tokens at each place."""
    context: Mapping[str, Any]
    """Where the rows of the context came from."""
    seconds: float


class Server:
    """An OpenAI-compatible server of vLLM with contexts.

    Args:
        url: without ``/v1``.
        model: as the server names it; None: the only one it has.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        served = [each["id"] for each in self._json(self._read("/v1/models"))["data"]]
        if model is not None and model not in served:
            raise ServerError(f"model: expected one of {', '.join(served)}, got {model!r}")
        self.model = model or served[0]

    def wait(self, say: Callable[[], None]) -> None:
        """Until the server has nothing else to do."""
        while self._busy():
            say()
            time.sleep(LOOK)

    def tokens(self, text: str, special: bool) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        return self._post("/tokenize", body)["tokens"]

    def ask(self, prompt: Sequence[int], count: int, params: Mapping[str, Any]) -> Answer:
        """The ``count`` most probable tokens behind a prompt."""
        begun = time.perf_counter()
        said = self._post("/v1/completions", {
            "model": self.model, "prompt": list(prompt), "max_tokens": count, "temperature": 0, "logprobs": TOP,
            "return_tokens_as_token_ids": True, "kv_transfer_params": dict(params),
        })  # fmt: skip
        try:
            found = said["choices"][0]["logprobs"]
            tops = [{_id(token): value for token, value in top.items()} for top in found["top_logprobs"]]
            told = (said.get("kv_transfer_params") or {}).get("context") or {}
            return Answer([_id(token) for token in found["tokens"]], tops, told, time.perf_counter() - begun)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(f"{self.url}: expected a completion, got {type(error).__name__}: {error}") from None

    def _busy(self) -> bool:
        held = self._read("/metrics").decode(errors="replace").splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        return any(float(line.rpartition(" ")[2]) > 0 for line in held if line.startswith(names))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json(self._read(path, json.dumps(body).encode()))

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise ServerError(f"{self.url}: expected JSON, got {error}") from None

    def _read(self, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.url}{path}: {error.code} {error.read(300).decode(errors='replace')}") from None
        except (OSError, ValueError) as error:
            raise ServerError(f"{self.url}{path}: {error}") from None


class OnlineProfiler:
    """Profiles contexts one by one.

    Args:
        methods: of the plugin.
        tokens: of a context at most.
        answer_tokens: judged of each query.
        say: called with what is being done now, and the share of the context that is done.
    """

    def __init__(
        self, server: Server, methods: Sequence[str], tokens: int, answer_tokens: int,
        say: Callable[[str, float], None] = lambda text, done: None,
    ) -> None:  # fmt: skip
        self.server, self.methods, self.tokens, self.answer_tokens = server, methods, tokens, answer_tokens
        self.say = say

    def ids(self, text: str) -> list[int]:
        """Tokens of a context. The server makes whole blocks of them."""
        return self.server.tokens(text, special=True)[: self.tokens]

    def profile(self, name: str, ids: Sequence[int], queries: Sequence[str]) -> ProfiledContext:
        """All methods on one context.

        Raises ServerError for a server that does not store it.
        """
        first = self._ask(ids, 1, {"context_tokens": len(ids)}, "prefill", 0.0)
        asked = [self._asked(ids, query) for query in queries]
        steps = [step for method in self.methods for step in self._steps(ids, asked[0][0], method)]
        found = []
        for number, told in enumerate(steps):
            what, done = f"{told['method']} at {told['ratio']:.2f}", 0.1 + 0.9 * number / len(steps)
            kl, agreement = self._judge(ids, asked, _forced(ids, told["method"], told["ratio"]), what, done)
            found.append(Measured(
                told["method"], told["sections"], told["ratio"], told["nbytes"], 0.0, told["tokens"], kl, agreement
            ))  # fmt: skip
        if not found:
            raise ServerError(f"context {name!r}: expected the server to store it, got none of its rows back")
        question = statistics.median(answer.seconds for _, answer in asked) / self.answer_tokens
        size = found[0].rows
        (key,) = keys_of(ids, [size])
        return ProfiledContext(key, name, size, first.seconds, question, tuple(queries), tuple(found))

    def find(self, ids: Sequence[int], done: Mapping[str, ProfiledContext]) -> ProfiledContext | None:
        """The context among those that are profiled: the server has left out what fills no block."""
        lengths = sorted({context.tokens for context in done.values() if 0 <= len(ids) - context.tokens < BLOCK})
        return next((done[key] for key in keys_of(ids, lengths) if key in done), None)

    def quality(self, ids: Sequence[int], queries: Sequence[str]) -> float:
        """What the server achieves now, with the compression that ordinary requests get: ``exp(-divergence)``."""
        asked = [self._asked(ids, query) for query in queries]
        return math.exp(-self._judge(ids, asked, {"context_tokens": len(ids)}, "as served", 0.5)[0])

    def _steps(self, ids: Sequence[int], question: Sequence[int], method: str) -> list[Mapping[str, Any]]:
        """What the server can give, of what it has stored: the ends, and some between them."""
        prompt, told = [*ids, *question], dict[int, Mapping[str, Any]]()

        def at(ratio: float) -> float:
            context = self._ask(prompt, 1, _forced(ids, method, ratio), method, 0.1).context
            if "sections" in context:
                told[context["sections"]] = context
            return context.get("ratio", 0.0)

        least, most = at(1e-9), at(1e9)
        for share in SHARES:
            at(least + share * (most - least))
        return [told[sections] for sections in sorted(told)]

    def _asked(self, ids: Sequence[int], query: str) -> tuple[list[int], Answer]:
        """A question's tokens, and its answer from exact rows."""
        question = self.server.tokens(ASK.format(query=query), special=False)
        return question, self._ask([*ids, *question], self.answer_tokens, {"contexts": False}, "exact answers", 0.0)

    def _judge(
        self, ids: Sequence[int], asked: Sequence[tuple[list[int], Answer]], params: Mapping[str, Any], what: str,
        done: float,
    ) -> tuple[float, float]:  # fmt: skip
        """Mean divergence over all tokens of all answers, and the share of them that stay the most probable."""
        kls, same = [], []
        for question, exact in asked:
            for place, full in enumerate(exact.tops):
                prompt = [*ids, *question, *exact.tokens[:place]]
                (top,) = self._ask(prompt, 1, params, what, done).tops
                kls.append(divergence(full, top))
                same.append(max(full, key=full.__getitem__) == max(top, key=top.__getitem__))
        return statistics.fmean(kls), statistics.fmean(same)

    def _ask(self, prompt: Sequence[int], count: int, params: Mapping[str, Any], what: str, done: float) -> Answer:
        self.server.wait(lambda: self.say("waiting, because the server is busy", done))
        self.say(what, done)
        return self.server.ask(prompt, count, params)


def divergence(full: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Of the second from the first, in nats, over the tokens of the first and all others together. A token that the
    second does not have is no likelier than the least likely that it has. So it is never more than the whole one."""
    least = min(other.values())
    pairs = [(math.exp(value), math.exp(other.get(token, least))) for token, value in full.items()]
    known = math.fsum(math.exp(other[token]) for token in full.keys() & other.keys())
    rest = (1 - math.fsum(p for p, _ in pairs), 1 - known)
    return max(0.0, math.fsum(p * math.log(p / max(q, LEAST)) for p, q in [*pairs, rest] if p > LEAST))


def _forced(ids: Sequence[int], method: str, ratio: float) -> Mapping[str, Any]:
    return {"context": {"method": method, "ratio": max(ratio, 1e-9)}, "context_tokens": len(ids)}


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))
