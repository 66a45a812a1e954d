"""Asks an OpenAI-compatible server, some problems at once, and compares replies with those of the full cache."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from demos import DemoError

from .problems import Problem

TOP = 5  # alternatives that the server tells with every token
PATIENCE_SECONDS = 3600


class Reply(NamedTuple):
    text: str
    finished: bool
    """False: the limit of tokens ended it."""
    tokens: list[str]
    top: list[dict[str, float]]
    """For every token, log probabilities of the likeliest ones."""


class Closeness(NamedTuple):
    """A reply beside that of the full cache."""

    same: int
    """Leading tokens that both have."""
    kl: float | None
    """Mean over these and the first that differs of the KL divergence from the full cache's distribution, in nats.
    Tokens that only one reply tells are one outcome, so this is a lower bound. None if the server tells none."""


def closeness(full: Reply, other: Reply) -> Closeness:
    same = 0
    while same < min(len(full.tokens), len(other.tokens)) and full.tokens[same] == other.tokens[same]:
        same += 1
    both = list(zip(full.top, other.top, strict=False))[: same + 1]  # the first that differs has the same past
    return Closeness(same, sum(divergence(*pair) for pair in both) / len(both) if both else None)


def divergence(p: dict[str, float], q: dict[str, float]) -> float:
    """KL divergence of the outcomes that both name, and of all others together."""
    common = [(math.exp(p[token]), math.exp(q[token])) for token in p.keys() & q.keys()]
    rest = (1 - sum(a for a, _ in common), 1 - sum(b for _, b in common))
    return max(0.0, sum(a * math.log(a / max(b, 1e-9)) for a, b in [*common, rest] if a > 1e-9))


def ask_all(
    url: str, model: str, problems: Sequence[Problem], limit: int, at_once: int, told: Callable[[Problem, Reply], None]
) -> None:
    """Asks every problem, ``at_once`` at a time, greedily and up to ``limit`` tokens. ``told`` gets the replies as they
    come, one at a time.

    Raises:
        DemoError: a request failed. Replies that came before count.
    """
    with ThreadPoolExecutor(at_once) as pool:
        asked = {pool.submit(_ask, url, model, problem, limit): problem for problem in problems}
        try:
            for done in as_completed(asked):
                told(asked[done], done.result())
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DemoError(f"a request to {url} failed: {error!r}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _ask(url: str, model: str, problem: Problem, limit: int) -> Reply:
    body = {"model": model, "messages": problem.messages, "max_tokens": limit, "temperature": 0, "logprobs": True,
            "top_logprobs": TOP}  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
        return _reply(json.load(answer)["choices"][0])


def _reply(choice: dict[str, Any]) -> Reply:
    tokens, top = [], []
    for one in (choice.get("logprobs") or {}).get("content") or []:
        tokens.append(one["token"])
        likely = (*one["top_logprobs"], one)
        top.append({other["token"]: max(-99.0, round(other["logprob"], 4)) for other in likely})
    return Reply(choice["message"]["content"] or "", choice["finish_reason"] == "stop", tokens, top)
