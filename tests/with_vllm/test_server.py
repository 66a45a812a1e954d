"""The real server under load: complete streams, aborted streams, and metrics."""

import json
import random
import re
import threading
import time

import pytest
from harness import KARA, prompts
from openai import OpenAI

from demos.serve.server import MODEL, Settings, serving


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    settings = Settings(
        model=model,
        blocks=60,
        block_size=32,
        max_model_len=512,
        max_requests=6,
        dtype="float32",
        eager=True,
        cpu=True,
        threads=1,
        kara={**KARA, "trace": str(folder / "trace.jsonl")},
    )
    with serving(settings, folder / "server.log") as running:
        running.__dict__["log"], running.__dict__["trace"] = folder / "server.log", folder / "trace.jsonl"
        yield running


def stream(server, prompt, tokens, stop_after=None):
    """Token texts of one streamed completion, aborted after ``stop_after`` tokens."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
    said = []
    options = {"ignore_eos": True, "skip_special_tokens": False}
    with client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=options
    ) as answer:
        for chunk in answer:
            said.append(chunk.choices[0].text)
            if stop_after is not None and len(said) >= stop_after:
                break
    return said


def settled(server):
    """The metrics once no request runs or waits."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        metrics = server.metrics()
        if not metrics["vllm:num_requests_running"] and not metrics["vllm:num_requests_waiting"]:
            return metrics
        time.sleep(0.2)
    raise AssertionError("requests still run")


def test_load_with_aborted_streams_leaks_nothing(server):
    draw = random.Random(3)
    given = prompts(*(draw.randrange(1, 100) for _ in range(18)))
    stops = [draw.randrange(1, 250) if i % 2 else None for i in range(len(given))]
    said = [None] * len(given)

    def read(i):
        said[i] = stream(server, given[i], 300, stops[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    metrics = settled(server)
    assert metrics["vllm:kv_cache_usage_perc"] == 0
    assert metrics["kara:compressions_total"] >= 20
    # Complete streams got everything, and get the same again without other requests.
    whole = [i for i, stop in enumerate(stops) if stop is None]
    for i in whole:
        assert len("".join(said[i]).split()) == 300
    alone = stream(server, given[whole[0]], 300)
    assert "".join(alone) == "".join(said[whole[0]])


def test_operators_see_what_happens(server):
    stream(server, prompts(20, seed=9)[0], 250)
    metrics = settled(server)
    events = [json.loads(line) for line in server.trace.read_text().splitlines()]
    assert metrics["kara:compressions_total"] == len(events)
    assert metrics["kara:tokens_dropped_total"] == 32 * len(events)
    assert metrics["kara:blocks_freed_total"] == sum(event["freed_blocks"] for event in events)
    assert metrics["kara:compress_seconds_total"] > 0
    assert metrics["kara:retention"] == 1.0  # nothing runs
    log = server.log.read_text()
    said = re.search("Kara compresses the KV cache while decoding: (.*)", log)
    assert said is not None
    assert "window=64, keep=32, tail=16" in said[1]
    assert "attention='bidirectional'" in said[1]
    assert "query ring takes" in log
    assert {event["request_id"][:5] for event in events} == {"cmpl-"}
