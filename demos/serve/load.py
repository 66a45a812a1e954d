"""Sends all requests at once as streams of the official ``openai`` client, and polls the server's metrics meanwhile."""

from __future__ import annotations

import asyncio
import time

import openai

from .. import DemoError
from ..machine import share_of_others
from ..screen import Advance
from .report import Stream, Watched
from .server import MODEL, Server

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 1800  # timeout of one request; a starved request waits for others to finish


def drive(server: Server, prompts: list[str], tokens: int, advance: Advance = lambda *_: None) -> Watched:
    """Send all prompts at once, ask for `tokens` new tokens each, and wait until the last stream has ended."""
    try:
        return asyncio.run(_drive(server, prompts, tokens, advance))
    except openai.OpenAIError as error:
        raise DemoError(f"a request failed: {error}") from error


async def _drive(server: Server, prompts: list[str], tokens: int, advance: Advance) -> Watched:
    before, cpu_before = server.metrics(), server.cpu_seconds()
    polls: list[dict[str, float]] = []
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS
    ) as client:
        started = time.perf_counter()

        def now() -> float:
            return time.perf_counter() - started

        async def stream(prompt: str) -> Stream:
            seen = Stream()
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=tokens,
                temperature=0,
                stream=True,
                # vLLM extensions: never stop early, and report the token count with every chunk.
                stream_options={"include_usage": True, "continuous_usage_stats": True},
                extra_body={"ignore_eos": True},
            )
            count = 0
            async for chunk in answer:
                if chunk.usage and chunk.usage.completion_tokens > count:
                    fresh, count = chunk.usage.completion_tokens - count, chunk.usage.completion_tokens
                    seen.seconds.append(now())
                    seen.tokens.append(fresh)
                    running = polls[-1].get("vllm:num_requests_running", 0.0) if polls else 0.0
                    advance(fresh, f"{running:.0f} running")
                seen.parts += [choice.delta.content or "" for choice in chunk.choices]
            if count != tokens:
                raise DemoError(f"a request ended after {count} of {tokens} tokens")
            return seen

        async def watch() -> None:
            while True:
                polls.append({"seconds": now()} | await asyncio.to_thread(server.metrics))
                await asyncio.sleep(POLL_SECONDS)

        watcher = asyncio.create_task(watch())
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(stream(prompt)) for prompt in prompts]
        except* (openai.OpenAIError, DemoError) as several:
            raise _first(several) from None
        finally:
            watcher.cancel()
        seconds = now()
    others = share_of_others(cpu_before, server.cpu_seconds())
    after = server.metrics()
    return Watched(
        seconds=seconds,
        streams=[task.result() for task in tasks],
        polls=[poll for poll in polls if len(poll) > 1],
        counters={name: value - before.get(name, 0.0) for name, value in after.items()},
        others=others,
    )


def _first(several: BaseExceptionGroup) -> BaseException:
    error = several.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
