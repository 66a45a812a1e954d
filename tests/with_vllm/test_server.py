"""The real server under load: complete streams, aborted streams, and metrics."""

import json
import random
import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from harness import KARA, ON_GPU, prompts
from openai import BadRequestError, OpenAI

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
        cpu=not ON_GPU,
        threads=1,
        kara={**KARA, "trace": str(folder / "trace.jsonl"), "live": str(folder / "live.json")},
    )
    with serving(settings, folder / "server.log") as running:
        running.__dict__["log"], running.__dict__["trace"] = folder / "server.log", folder / "trace.jsonl"
        running.__dict__["live"] = folder / "live.json"
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


def answered(server, kara, prompt="w1 w2 w3", tokens=250, temperature=0, **options):
    """The answer to a completion whose client asks for `kara`, and the events of its trace."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
    options["extra_body"] = {"ignore_eos": True, "vllm_xargs": {"kara": kara}}
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=temperature, **options
    )
    events = [json.loads(line) for line in server.trace.read_text().splitlines()]
    return answer, [event for event in events if answer.id in event["request_id"]]


def test_clients_choose_over_http(server):
    for kara, keep in ((False, None), (0, None), ("false", None), (True, 32), ('{"keep": 8}', 8)):
        answer, events = answered(server, kara)
        assert answer.usage.completion_tokens == 250
        assert {event["keep"] for event in events} == (set() if keep is None else {keep})
        assert {event["request_id"] for event in events} == (set() if keep is None else {f"{answer.id}-0"})


def test_samples_and_prompts_are_told_apart_in_the_trace(server):
    answer, events = answered(server, True, prompt=["w1 w2", "w3"], n=2, temperature=1)
    ids = {f"{sample}_{answer.id}-{prompt}" for sample in (0, 1) for prompt in (0, 1)}
    assert {event["request_id"] for event in events} == ids


@pytest.mark.parametrize(
    ("kara", "words"),
    [
        ('{"keep": 64}', "kara: keep: expected 1..63, got 64"),
        ('{"kep": 8}', "kara: kep: expected one of keep, window, got kep"),
        ('{"\\ud800": 8}', "kara: \\ud800: expected one of keep, window"),
        ("yes", "kara: expected true, false or an object such as"),
        ({"keep": 8}, "vllm_xargs"),  # by vLLM, whose type has no objects
    ],
)
def test_bad_requests_get_status_400_and_the_engine_lives(server, kara, words):
    with pytest.raises(BadRequestError) as caught:
        answered(server, kara)
    assert caught.value.status_code == 400
    assert words in str(caught.value)
    assert len(answered(server, True, tokens=100)[1]) == 1


def test_operators_see_what_happens(server):
    stream(server, prompts(20, seed=9)[0], 250)
    answered(server, False)
    metrics = settled(server)
    events = [json.loads(line) for line in server.trace.read_text().splitlines()]
    assert metrics["kara:compressions_total"] == len(events)
    dropped = sum(event["physical_len_before"] - event["physical_len_after"] for event in events)
    assert metrics["kara:tokens_dropped_total"] == dropped
    assert metrics["kara:blocks_freed_total"] == sum(event["freed_blocks"] for event in events)
    assert metrics["kara:compress_seconds_total"] > 0
    assert metrics["kara:retention"] == 1.0  # nothing runs
    assert metrics["kara:opted_out_total{request}"] >= 1
    assert metrics["kara:request_retention_count"] > metrics["kara:request_retention_sum"] > 0
    assert metrics["kara:query_ring_bytes"] == 3 * (6 * 40 + 1) * 4 * 18
    log = server.log.read_text()
    said = re.search("Kara compresses the KV cache while decoding: (.*)", log)
    assert said is not None
    assert "window=64, keep=32, tail=16" in said[1]
    assert "attention='bidirectional'" in said[1]
    assert "query ring takes" in log
    assert all(re.match(r"(\d_)?cmpl-", event["request_id"]) for event in events)


def test_the_dashboard_asks_for_what_the_server_says(server):
    answered(server, False)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        scraped = answer.read().decode()
    samples = dict(re.findall(r"^([a-z]+:\w+)\{([^}]*)\}", scraped, re.MULTILINE))
    declared = dict(re.findall(r"^# TYPE (\S+) (\S+)", scraped, re.MULTILINE))
    dashboard = json.loads((Path(__file__).parents[2] / "docs/grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [expression for expression in asked if "kara:context_" not in expression]
    assert len(asked) >= 20
    for expression in asked:
        [name] = re.findall(r'((?:vllm|kara):\w+)\{model_name=~"\$model"\}', expression)
        kind = declared[name.removesuffix("_bucket")]
        assert (kind == "counter") == ("rate(" in expression and kind != "histogram")
        assert (kind == "histogram") == ("histogram_quantile(" in expression)
        # A sample with a reason exists once that has happened.
        labels = samples.get(name, 'model_name="",reason=""')
        for label in ("model_name", *re.findall(r"by \((\w+)\)", expression)):
            assert f'{label}="' in labels, f"{name} has no {label}"
    ours = {name for name in declared if name.startswith("kara:") and not name.endswith("_created")}
    shown = {name for expression in asked for name in re.findall(r"kara:\w+", expression)}
    assert ours - {name.removesuffix("_bucket") for name in shown} == {
        "kara:shadow_compressions_total",
        "kara:shadow_tokens_dropped_total",
    }


def test_settings_change_while_the_server_runs(server):
    def holds(keep):
        end = time.monotonic() + 30
        while server.metrics()["kara:keep"] != keep and time.monotonic() < end:
            stream(server, [1, 2, 3], 2)
        return server.metrics()["kara:keep"] == keep

    assert holds(32)
    server.live.write_text('{"keep": 20}')
    assert holds(20)
    _, events = answered(server, True)
    assert {event["keep"] for event in events} == {20}
    server.live.write_text('{"keep": 200}')
    stream(server, prompts(20, seed=9)[0], 250)
    assert holds(20)
    assert "keep: expected 1..63, got 200" in server.log.read_text()
    server.live.unlink()
    assert holds(32)
