"""Contexts in engines of their own: in processes, over HTTP, with little room, and what does not start."""

import json
import random
import re
import shutil
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from contexts_harness import ON, serving
from harness import MODES, ON_GPU, engine, greedy, no_block_once, prompts
from openai import BadRequestError, OpenAI
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs

from demos.serve.server import MODEL, Settings
from demos.serve.server import serving as serving_http
from kara_kernels.contexts.__main__ import main as contexts_command
from kara_kernels.integrations.vllm.contexts.stats import COUNTERS, GAUGES


def test_the_engine_in_a_process_of_its_own_and_its_metrics(model, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    document, question = prompts(960, 9, seed=43)
    before = shown()
    settings = {"additional_config": {"contexts": ON}, "disable_log_stats": False}
    with engine(model, None, **settings) as some:
        assert some.scheduler is None
        for _ in range(5):
            sampling = greedy(12, extra_args={"kv_transfer_params": {"context_tokens": 960}})
            some.generate([document + question], sampling)
            time.sleep(1)  # the store goes on after the answer
            assert some.llm.reset_prefix_cache()
    found = defaultdict(float, {name: value - before.get(name, 0) for name, value in shown().items()})
    hits = found["hits_total", "ram"]
    assert hits >= 1, found
    assert hits + found["slower_total",] == 4  # costs are measured, and may be anything
    assert found["hit_tokens_total", "ram"] == 960 * hits
    assert found["jobs_total", "store", "ok"] == 1
    assert found["jobs_total", "load", "ok"] == hits
    assert [n for (name, *_), n in found.items() if name == "stored_total" and n] == [1]
    assert found["first_tokens_total", "computed"] == 5 - hits
    assert found["first_tokens_total", "ram"] == hits
    assert 0 < found["first_token_seconds_total", "ram", "observed"] < 60
    assert shown()["stored_now",] == 1
    assert 0 < shown()["bytes", "ram"] < shown()["capacity_bytes", "ram"]


def test_the_metrics_are_documented():
    page = (Path(__file__).parents[2] / "docs/vllm-contexts.md").read_text(encoding="utf-8")
    section = page.partition("\n## Metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    found = dict(re.findall(r"`(\w+)(?:\{([\w,]+)\})?`", " ".join(rows)))
    counters = {f"{name}_total": ",".join(labels) for name, (labels, _) in COUNTERS.items()}
    assert found == counters | {name: ",".join(labels) for name, (labels, _) in GAUGES.items()}


def test_the_dashboard_asks_for_metrics_and_labels_that_exist():
    dashboard = json.loads((Path(__file__).parents[2] / "docs/grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [expression for expression in asked if "kara:context_" in expression]
    assert len(asked) >= 9
    for expression in asked:
        by = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([\w, ]+)\)", expression))))
        for name, chosen in re.findall(r'kara:context_(\w+)\{model_name=~"\$model"([^}]*)\}', expression):
            counter = name.removesuffix("_total")
            assert (name != counter) == ("rate(" in expression)
            labels = set((COUNTERS if name != counter else GAUGES)[counter][0])
            assert by | set(re.findall(r"(\w+)!?=", chosen)) <= labels, expression


def shown():
    """The metrics of contexts by name and labels, in the order of their names."""
    found = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            name = sample.name.removeprefix("kara:context_")
            if name != sample.name and not name.endswith("_created"):
                own = [v for k, v in sorted(sample.labels.items()) if k not in ("engine", "model_name")]
                found[name, *own] = sample.value
    return found


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_tensor_parallel_ranks(model):
    """Every rank stores and loads its own heads."""
    document, question = prompts(256, 9, seed=41)
    said = []
    for ranks in (1, 2):
        with serving(model, tensor_parallel_size=ranks) as some:
            exact = some.ask(document + question, context_tokens=256)
            some.forget()
            said.append((exact, some.ask(document + question, context_tokens=256)))
            assert some.manager.counts["hits", "ram"] == 1
            assert some.ask(document + question, contexts=False) == exact
            some.assert_nothing_leaks()
    assert said[0] == said[1]


def test_a_server_admits_over_http(model, tmp_path):
    """Everything as a stranger has it: costs are measured, and a client of OpenAI's asks."""
    settings = Settings(
        model=model, blocks=200, block_size=32, max_model_len=2048, max_requests=4, dtype="float32", eager=True,
        cpu=not ON_GPU, threads=1, contexts={"alpha": 1e-3, "ram_gib": 0.1},
    )  # fmt: skip
    document, *questions = prompts(1500, 9, 9, 9, seed=47)
    with serving_http(settings, tmp_path / "server.log") as running:
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=120, max_retries=0)

        def ask(question, **params):
            options = {"ignore_eos": True, "kv_transfer_params": params}
            answer = client.completions.create(
                model=MODEL, prompt=document + question, max_tokens=8, temperature=0, extra_body=options
            )
            time.sleep(1)  # stores go on after the answer
            return answer.choices[0].text

        exact = ask(questions[0], contexts=False)
        said = [ask(question, context_tokens=1472) for question in questions]
        again = [ask(question, context_tokens=1472) for question in questions]
        assert ask(questions[0], contexts=False) == exact == said[0]
        assert again[1:] == said[1:]
        with pytest.raises(BadRequestError, match="context_tokens: expected an int, got str"):
            ask(questions[0], context_tokens="all")
        metrics = running.metrics()
    assert metrics["kara:context_jobs_total"] >= 1, metrics


def test_a_context_that_is_computed_in_chunks_is_stored_whole(model):
    prompt = [token for part in prompts(256, 9, seed=53) for token in part]
    at_once = stored_rows(model, prompt)
    in_chunks = stored_rows(model, prompt, max_num_batched_tokens=64)
    for rows, expected in zip(in_chunks, at_once, strict=True):
        torch.testing.assert_close(rows, expected, rtol=0, atol=0.1)


def stored_rows(model, prompt, **options):
    """Rows of the packet of a prompt's first 256 tokens."""
    with serving(model, **options) as some:
        some.ask(prompt, context_tokens=256)
        some.rest()
        return some.rows_of(prompt, 256)


def test_a_store_reads_its_blocks_before_others_write_them(model):
    """A request is preempted and aborted while its store has not begun, and another one is given its blocks."""
    document, other, question = prompts(256, 256, 9, seed=51)
    undisturbed = stored_rows(model, document + question)
    with serving(model, num_gpu_blocks_override=12, max_model_len=352) as small:
        gate, store, core = threading.Event(), small.worker._store, small.llm.llm_engine
        small.worker._store = lambda job: store(job) if gate.wait(10) else None
        asking = {"kv_transfer_params": {"context_tokens": 256}}
        core.add_request("a", {"prompt_token_ids": document + question}, greedy(20, extra_args=asking))
        while not small.manager.transfers.busy:
            core.step()
        no_block_once(small)
        threading.Timer(0.5, gate.set).start()
        core.step()
        assert not small.scheduler.running
        core.abort_request(["a"])
        small.ask(other + question, contexts=False)
        small.rest()
        for rows, expected in zip(small.rows_of(document + question, 256), undisturbed, strict=True):
            assert torch.equal(rows, expected)
        small.assert_nothing_leaks()


def with_disk(folder, **more):
    """Room for four packets of 256 tokens and one that passes through; on a disk for all."""
    return {**ON, "ram_gib": 6 * 110_000 / 2**30, "grain_kib": 4, "disk": {"path": str(folder), "gib": 0.1}, **more}


def test_what_finds_no_room_in_memory_lies_on_a_disk(model, tmp_path):
    documents, (question,) = prompts(*[256] * 7, seed=61), prompts(9, seed=62)
    with serving(model, with_disk(tmp_path / "store")) as some:
        for document in documents:
            place = some.place_of(document + question, 256)
            while some.manager.keeper.get(place.key) is None:  # its rows may be gone before others have made room
                some.ask(document + question, context_tokens=256)
                some.forget()
        tiers = [some.manager.keeper.get(some.place_of(d + question, 256).key).tier for d in documents]
        assert tiers.count("ram") == 4
        assert tiers.count("disk") == 3
        for document in documents:
            said = some.ask(document + question, context_tokens=256)
            some.forget()
            assert said == [some.judge(document + question, 256)]
        counts = some.manager.counts
        assert counts["hits", "disk"] >= 3
        assert counts["hits", "disk"] + counts["hits", "ram"] == 7
        assert not any(n for key, n in counts.items() if "failed" in key or "damaged" in key)
        # Each computes its question of 9 tokens, at a second each, and reads what the last reads say.
        assert counts["first_token_seconds", "disk", "predicted"] > 9 * counts["hits", "disk"] + 1e-4
        some.assert_nothing_leaks()
        stored = {d[0]: some.rows_of(d + question, 256) for d in documents}
        left = [copy.tier for copy in some.manager.keeper.directory.copies()].count("disk")
    files = [path for path in (tmp_path / "store").rglob("*") if path.suffix == ".bin"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    with serving(model, with_disk(tmp_path / "store")) as again:  # a restart
        assert len(again.manager.keeper.directory) == left
        for document in documents:
            prompt = document + question
            if again.manager.keeper.get(again.place_of(prompt, 256).key) is not None:
                for rows, expected in zip(again.rows_of(prompt, 256), stored[document[0]], strict=True):
                    assert torch.equal(rows, expected)
                assert again.ask(prompt, context_tokens=256) == [again.judge(prompt, 256)]
                again.forget()
        assert again.manager.counts["hits", "disk"] == left
        again.assert_nothing_leaks()


@pytest.mark.parametrize(
    ("ranks", "grain"), [(1, 4), pytest.param(2, 5, marks=pytest.mark.skipif(ON_GPU, reason="needs two GPUs"))]
)
def test_an_operator_reads_and_deletes_what_a_server_left(model, tmp_path, capsys, ranks, grain):
    """The commands, which never import vLLM, find the files of a real engine's tier, and every worker's packet."""
    documents, (question,) = prompts(*[256] * 7, seed=61), prompts(9, seed=62)
    store = str(tmp_path / "store")

    def command(name, *words):
        capsys.readouterr()  # what vLLM has logged
        code = contexts_command([name, store, *words])
        said = capsys.readouterr()
        return code, said.out

    with serving(model, with_disk(store, grain_kib=grain), tensor_parallel_size=ranks) as some:
        for document in documents:
            some.ask(document + question, context_tokens=256)
            some.forget()
        some.connector._store.save(some.manager, at_once=True)
        stored = {copy.key: copy.number for copy in some.manager.keeper.directory.copies() if copy.tier == "disk"}
        assert len(stored) >= 2
        assert command("verify") == (0, f"{len(stored)} whole\n")
        assert command("drop", "--all") == (2, "0 contexts deleted, 0 bytes\n")
    listed = json.loads(command("ls", "--json")[1])
    assert listed["servers"][0]["model_name"] == model
    assert {row["context"]: row["tokens"] for row in listed["contexts"]} == dict.fromkeys(stored, 256)
    size = sum(path.stat().st_size for path in Path(store).rglob("*.bin"))
    assert sum(row["bytes"] for row in listed["contexts"]) == size
    assert command("verify") == (0, f"{len(stored)} whole\n")
    dropped, *kept = stored
    assert command("drop", dropped)[0] == 0
    assert command("verify") == (0, f"{len(kept)} whole\n")
    with serving(model, with_disk(store, grain_kib=grain), tensor_parallel_size=ranks) as again:
        assert {copy.key: copy.number for copy in again.manager.keeper.directory.copies()} == {
            key: stored[key] for key in kept
        }
        for document in documents:
            held = again.manager.keeper.get(again.place_of(document + question, 256).key) is not None
            said = again.ask(document + question, context_tokens=256)
            again.forget()
            if held and ranks == 1:
                assert said == [again.judge(document + question, 256)]
        assert again.manager.counts["hits", "disk"] >= len(kept)
        again.assert_nothing_leaks()


@pytest.mark.parametrize("fault", ["deleted", "truncated", "swapped", "flipped", "unreadable"])
def test_what_is_damaged_on_a_disk_is_computed_again(model, tmp_path, fault):
    documents, (question,) = prompts(*[256] * 7, seed=61), prompts(9, seed=62)
    with serving(model, with_disk(tmp_path / "store")) as some:
        for document in documents:
            exact = some.ask(document + question, context_tokens=256)
            some.forget()
        on_disk = [c for c in some.manager.keeper.directory.copies() if c.tier == "disk"]
        first, other = (Path(some.connector._store.disk.path(copy.number, 2)) for copy in on_disk[:2])
        data = bytearray(first.read_bytes())
        if fault == "deleted":
            first.unlink()
        elif fault == "truncated":
            first.write_bytes(data[:100])
        elif fault == "swapped":
            first.write_bytes(other.read_bytes())
        elif fault == "flipped":
            data[77] ^= 4
            first.write_bytes(data)
        else:
            first.unlink()
            first.mkdir()
        prompt = next(d for d in documents if some.place_of(d + question, 256).key == on_disk[0].key) + question
        exact = some.ask(prompt, contexts=False)
        some.forget()
        assert some.ask(prompt, context_tokens=256) == exact
        assert some.manager.counts["jobs", "load", "damaged"] == 1
        some.forget()
        assert some.ask(prompt, context_tokens=256) == [some.judge(prompt, 256)]
        some.assert_nothing_leaks()


def test_a_disk_that_cannot_be_written_is_left_alone_for_a_while(model, tmp_path):
    documents, (question,) = prompts(*[256] * 8, seed=63), prompts(9, seed=64)
    with serving(model, with_disk(tmp_path / "store")) as some:
        packets = Path(some.connector._store.disk.path(0, 0)).parents[2]
        packets.write_text("no folder")
        for document in documents:
            some.ask(document + question, context_tokens=256)
            some.forget()
        assert some.manager.counts["closed", "disk"] == 1
        assert some.manager.counts["jobs", "write", "failed"] < 5
        tiers = [copy.tier for copy in some.manager.keeper.directory.copies()]
        assert set(tiers) == {"ram"}
        packets.unlink()
        some.manager.closed.until["disk"] = 0.0  # the while is over
        for document in documents:
            some.ask(document + question, context_tokens=256)
            some.forget()
        assert "disk" in [copy.tier for copy in some.manager.keeper.directory.copies()]
        some.assert_nothing_leaks()


def test_a_server_that_was_killed_leaves_nothing_wrong(model, tmp_path):
    """What a kill at any moment leaves on the disk: the folder is copied while packets are written and deleted."""
    documents, (question,) = prompts(*[256] * 7, seed=65), prompts(9, seed=66)
    draw, left = random.Random(7), []
    with serving(model, with_disk(tmp_path / "store", half_life=1e-3)) as some:
        saving = some.connector._store
        for turn in range(40):
            some.ask(draw.choice(documents) + question, context_tokens=256)
            some.llm.reset_prefix_cache()
            if draw.random() < 0.3:
                saving.save(some.manager, at_once=True)
            if turn % 10 == 9:
                left.append(tmp_path / f"left-{turn}")
                shutil.copytree(tmp_path / "store", left[-1], ignore_dangling_symlinks=True)
        assert some.manager.counts["jobs", "write", "ok"] > 5
    found = 0
    for folder in left:
        with serving(model, with_disk(folder)) as again:
            copies = again.manager.keeper.directory.copies()
            files = [path for path in folder.rglob("*") if path.suffix in (".bin", ".tmp")]
            assert len(files) == sum(again.manager.grains.needed(copy.option.nbytes) for copy in copies)
            for document in documents:
                prompt = document + question
                (exact,) = again.ask(prompt, contexts=False)
                again.forget()
                stored = again.manager.keeper.get(again.place_of(prompt, 256).key) is not None
                found += stored
                said = again.ask(prompt, context_tokens=256)
                assert said == [again.judge(prompt, 256) if stored else exact]
                again.forget()
            assert not again.manager.counts["jobs", "load", "damaged"]
            again.assert_nothing_leaks()
    assert found > 3


@pytest.mark.parametrize("below", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("mode", MODES)
def test_random_days_in_little_room(model, mode, below, tmp_path):
    """Room for two packets of six, or for three and a disk, and blocks for two requests and a half. Requests come, are
    preempted and aborted in the middle of loads. Who opted out is answered as by vLLM alone."""
    little = {**ON, "ram_gib": 2.2 * 110_000 / 2**30, "grain_kib": 4}
    if below:
        little = with_disk(tmp_path / "store", ram_gib=5 * 110_000 / 2**30)  # three packets, and one that passes
    with serving(model, little, num_gpu_blocks_override=28, max_model_len=512, mode=mode) as small:
        random_days(small)


def random_days(small, most=700):
    draw, core, scheduler = random.Random(5), small.llm.llm_engine, small.scheduler
    documents = prompts(*[256] * 6, seed=31)
    asked = [document + question for document in documents for question in prompts(7, 12, seed=32)]
    alone = {}
    for prompt in asked:
        (alone[tuple(prompt)],) = small.ask(prompt, contexts=False)
        small.forget()
    running, said, names, steps = {}, {}, 0, 0
    while names < most or core.has_unfinished_requests():
        if names < most and len(running) < 4 and draw.random() < 0.4:
            name, prompt, out = f"r{names}", draw.choice(asked), draw.random() < 0.4
            params = {"contexts": False} if out else {"context_tokens": 256}
            sampling = greedy(12, extra_args={"kv_transfer_params": params})
            core.add_request(name, {"prompt_token_ids": prompt}, sampling)
            running[name], names = (prompt, out), names + 1
        if running and draw.random() < 0.05:
            name = draw.choice(sorted(running))
            core.abort_request([name])
            del running[name]
        if draw.random() < 0.4:
            small.llm.reset_prefix_cache()
        for output in core.step():
            if output.finished and output.request_id in running:
                said[output.request_id] = (*running.pop(output.request_id), list(output.outputs[0].token_ids))
        steps += 1
        assert steps < 20_000
    wrong = [name for name, (prompt, out, tokens) in said.items() if out and tokens != alone[tuple(prompt)]]
    assert not wrong
    assert len(said) > 200
    assert small.manager.counts["hits", "ram"] + small.manager.counts["hits", "disk"] > 5, small.manager.counts
    assert not scheduler.running
    assert steps > 2000
    small.assert_nothing_leaks()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"contexts": {"floors": 1}}, "contexts: floors: expected one of ram_gib, "),
        ({"contexts": {"floor": 2}}, "contexts: floor: expected 0..1, got 2"),
        ({"contexts": {"profile": ""}}, "contexts: profile: expected a path, got ''"),
        ({"contexts": {"profile": __file__}}, f"contexts: profile: {__file__}: expected a profile, got "),
        ({"contexts": {"methods": "none/int8"}}, "contexts: methods: expected a list of one or more, got 'none/int8'"),
        ({"contexts": {"methods": ["snapkv/int8"]}}, "contexts: methods: expected one of 'none/int8', "),
        ({"contexts": {"methods": ["none/int4"]}}, "expected none/int8 or none/exact among them without a profile"),
        ({"contexts": 3}, "contexts: expected an object of settings, got int"),
        ({"contexts": {}, "kara": {"windw": 1}}, "kara: windw: expected one of "),
        ({"contexts": {"floor": 2}, "kara": {}}, "contexts: floor: expected 0..1, got 2"),
        (
            {"contexts": {}, "kv_offloading_size": 1.0},
            "contexts: expected only supported features, got other KV connectors",
        ),
        ({"contexts": {}, "enable_prefix_caching": False}, "got no prefix cache"),
        (
            {"contexts": {"disk": {"path": "/x", "gib": 1}}, "enable_lora": True},
            "got LoRA adapters .--enable-lora., which are known by their paths, beside a disk",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_at_start_up(model, options, expected):
    additional = {name: options[name] for name in ("contexts", "kara") if name in options}
    rest = {name: value for name, value in options.items() if name not in additional}
    with pytest.raises(ValueError, match=expected):
        EngineArgs(model=model, additional_config=additional, max_model_len=512, **rest).create_engine_config()
