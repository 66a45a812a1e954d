"""Two engines behind one server (``--data-parallel-size 2``): each compresses its own requests and keeps its own
contexts, one trace has the events of both, and one page their metrics."""

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import KARA, ON_GPU, Dense, Served, prompts
from openai import OpenAI

from demos.serve import server
from demos.serve.server import MODEL, Settings, serving

TOKENS = 200


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """A server of two engines, and the folder of its trace."""
    folder = tmp_path_factory.mktemp("two")
    contexts = {"ram_gib": 0.01, "grain_kib": 16, "min_tokens": 64, "trace": str(folder / "contexts.jsonl")}
    settings = Settings(
        model=model, blocks=60, block_size=32, max_model_len=512, max_requests=6, dtype="float32", eager=True,
        cpu=not ON_GPU, threads=1, kara={**KARA, "trace": str(folder / "trace.jsonl")},
        contexts={**contexts, "disk": {"path": str(folder / "disk"), "gib": 1}},
    )  # fmt: skip
    command = server.command
    with pytest.MonkeyPatch.context() as patch:
        # Engines in this process have named another OpenMP there than the server does, and vLLM takes only one.
        patch.delenv("LD_PRELOAD", raising=False)
        patch.setattr(server, "command", lambda *given: [*command(*given), "--data-parallel-size", "2"])
        with serving(settings, folder / "server.log") as running:
            yield running, folder


def ask(url, prompt):
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
    options = {"ignore_eos": True, "return_token_ids": True}
    said = client.completions.create(model=MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=options)
    return Served(said.id, prompt, said.choices[0].token_ids)


def of_engines(running, name):
    """The samples of a metric, by engine."""
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=30) as answer:
        return {
            engine: float(value)
            for engine, value in re.findall(
                rf'^{name}{{engine="(\d)",.*}} (\S+)$', answer.read().decode(), re.MULTILINE
            )
        }


def test_both_engines_compress_their_requests(two, model):
    running, folder = two
    given = prompts(5, 40, 77, 64, 30, 20)
    with ThreadPoolExecutor(len(given)) as pool:
        served = list(pool.map(lambda prompt: ask(running.url, prompt), given))
    events = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    dense = Dense(model)
    for request in served:
        own = [event for event in events if event["request_id"].startswith(request.request_id)]
        assert len(own) == 2
        assert dense.mismatches(request, own) == []
    assert of_engines(running, "kara:compressions_total") == {"0": 6.0, "1": 6.0}
    assert of_engines(running, "kara:request_retention_count") == {"0": 3.0, "1": 3.0}


def test_each_engine_has_its_own_part_of_the_disk(two):
    _, folder = two
    assert sorted(path.name for path in folder.glob("disk/*/server-*")) == ["server-0", "server-1"]
