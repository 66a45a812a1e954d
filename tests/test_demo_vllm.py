"""The serving demo without vLLM: start and end of servers, consistency of figures, options, environment."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from demos import DemoError, environment
from demos.serve import __main__, server
from demos.serve.server import Settings

for needed in ("matplotlib", "rich"):
    pytest.importorskip(needed)

from demos.serve import picture, report  # noqa: E402
from demos.serve.report import Stream, Watched  # noqa: E402

ROOT = Path(__file__).parents[1]
SETTINGS = Settings(
    model="owner/name", blocks=9, block_size=32, max_model_len=64, max_requests=2, dtype="float32", eager=True, cpu=True
)
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:num_requests_running{engine="1",model_name="demo"} 2.0
kara:skipped_total{engine="0",reason="waiting"} 4.0
kara:skipped_total{engine="0",reason="shared, busy"} 1.0
kara:retention 0.75
python_gc_objects_collected_total{generation="0"} 9.0
"""


def test_samples_are_summed_and_reasons_kept_apart() -> None:
    assert server.samples(METRICS) == {
        "vllm:num_requests_running": 5.0,
        "kara:skipped_total": 5.0,
        "kara:skipped_total{waiting}": 4.0,
        "kara:skipped_total{shared, busy}": 1.0,
        "kara:retention": 0.75,
    }


def test_both_servers_differ_in_kara_only() -> None:
    plain = server.command(SETTINGS, 1)
    kara = server.command(replace(SETTINGS, kara={"window": 64}), 1)
    assert kara[: len(plain)] == plain
    assert kara[len(plain) :] == ["--additional-config", '{"kara": {"window": 64}}']


def test_the_cpu_environment_names_threads_and_keeps_what_is_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    monkeypatch.setattr(server, "_intel_openmp", lambda: "/lib/libiomp5.so")
    assert server.cpu_environment(3)["OMP_NUM_THREADS"] == "3"
    assert server.cpu_environment()["LD_PRELOAD"] == "/lib/libiomp5.so:other.so"
    monkeypatch.setattr(server, "_intel_openmp", lambda: None)
    assert "LD_PRELOAD" not in server.cpu_environment()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", "no output"),
        ("INFO start\nlast words\n\n", "last words"),
        (
            "(EngineCore pid=7) ERROR 11-22 06:13 [core.py:1] ValueError: too small\nSee above.\n",
            "ValueError: too small",
        ),
        ("ValueError: too small\nRuntimeError: Engine failed. See root cause above.\n", "ValueError: too small"),
    ],
)
def test_one_line_says_why_a_server_ended(tmp_path: Path, log: str, expected: str) -> None:
    path = tmp_path / "log"
    path.write_text(log, encoding="utf-8")
    assert server.reason(path) == f"{expected} (log: {path})"


# A server that answers, has a child process and, like a hung engine, ignores requests to stop.
FAKE = """
    import http.server, signal, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(b"vllm:child %d\\n" % child.pid)
        def log_message(self, *_): pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    code = textwrap.dedent(program)
    monkeypatch.setattr(server, "command", lambda settings, port: [sys.executable, "-c", code, str(port)])


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("error", [None, DemoError("a request failed"), KeyboardInterrupt()])
def test_no_process_outlives_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    fake(monkeypatch, FAKE)
    monkeypatch.setattr(server, "STOP_SECONDS", 0.5)
    with (
        pytest.raises(type(error)) if error else nullcontext(),
        server.serving(SETTINGS, tmp_path / "log") as running,
    ):
        child = int(running.metrics()["vllm:child"])
        assert alive(child)
        cpu = running.cpu_seconds()
        assert cpu
        assert server.session_seconds(running.session) > 0
        assert 0 < cpu.own < cpu.busy <= cpu.there
        if error:
            raise error
    end = time.monotonic() + 5
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "raise ValueError('blocks are too few')")
    with (
        pytest.raises(DemoError, match=r"did not start: ValueError: blocks are too few \(log: "),
        server.serving(SETTINGS, tmp_path / "log"),
    ):
        pass


def test_a_server_that_dies_is_blamed_for_failed_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FAKE.replace("signal.SIG_IGN", "lambda *_: sys.exit('RuntimeError: engine died')"))

    def load() -> None:
        with server.serving(SETTINGS, tmp_path / "log") as running:
            os.kill(running.session, signal.SIGTERM)
            raise DemoError("a request failed: connection lost")

    with pytest.raises(DemoError, match="the server ended: RuntimeError: engine died"):
        load()


def watched(rate: float, kara: bool = False) -> Watched:
    """Two streams of 100 tokens at `rate` per second. The second pauses for ten seconds in the middle."""
    steps = [index / rate for index in range(1, 101)]
    late = [moment + 10 * (index >= 50) for index, moment in enumerate(steps)]
    streams = [Stream(seconds=list(times), tokens=[1] * 100, parts=["ab", "c"]) for times in (steps, late)]
    end = late[-1]
    gauge = {"kara:retention": 0.6} if kara else {}
    polls: list[dict[str, float]] = [
        {"seconds": end * share, "vllm:num_requests_running": running, "vllm:kv_cache_usage_perc": share} | gauge
        for share, running in ((0, 0), (0.5, 2), (1, 1))
    ]
    counters: dict[str, float] = {"vllm:num_preemptions_total": 1}
    if kara:
        counters |= {"kara:compressions_total": 3, "kara:tokens_dropped_total": 96, "kara:skipped_total{shared}": 2}
    return Watched(seconds=end, streams=streams, polls=polls, counters=counters, others=0.0)


def test_figures_agree_with_what_was_seen() -> None:
    run = report.figures(watched(10, kara=True), blocks=40, start_seconds=1.0)
    assert run["tokens"] == 200
    assert run["tokens_per_second"] == pytest.approx(200 / 20)
    assert run["blocks_peak"] == 40
    assert (run["running_mean"], run["running_peak"]) == (1.5, 2)
    assert run["first_token_seconds"] == pytest.approx({"median": 0.1, "max": 0.1})
    assert run["between_tokens_seconds"]["median"] == pytest.approx(0.1)
    assert run["between_tokens_seconds"]["max"] == pytest.approx(10.1)
    assert [len(stream["active"]) for stream in run["streams"]] == [1, 2]
    assert run["timeline"]["tokens"] == [0, 150, 200]
    assert run["kara"]["retention_mean"] == pytest.approx(0.6)
    assert run["kara"]["skipped"] == {"shared": 2}
    assert report.figures(watched(10), blocks=40, start_seconds=1.0)["kara"] is None


def result(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    options = __main__.parse(["--picture", str(tmp_path / "p.png"), "--logs", str(tmp_path), *arguments])
    found = {
        stage: {
            "blocks": count,
            "vllm": report.figures(watched(10), count, 1.0),
            "kara": report.figures(watched(20, kara=True), count, 1.0),
        }
        for stage, count in (("limited", 40), ("plentiful", 120))
    }
    if options.no_plentiful:
        del found["plentiful"]
    return report.collect(options, "x", SETTINGS, [5, 6], 120, found, {"start": 1.0})


@pytest.mark.parametrize("arguments", [(), ("--no-plentiful",)])
def test_table_words_picture_and_json_from_one_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    found = result(tmp_path, *arguments)
    report.show(report.Screen(), found)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Kara makes {20 / 15:.2f} times vLLM's output tokens" in shown
    assert ("Memory is plentiful" in shown) == (not arguments)
    picture.draw(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    report.write_json(tmp_path / "p.json", found)
    assert json.loads((tmp_path / "p.json").read_text())["limited"]["speedup"] == pytest.approx(20 / 15)


def test_doubtful_times_are_called_so(tmp_path: Path) -> None:
    found = result(tmp_path)
    assert not any("doubtful" in line for line in report.findings(found))
    found["plentiful"]["vllm"]["cpu_share_of_others"] = 0.4
    assert any("40% of the CPU time" in line for line in report.findings(found))
    found["plentiful"]["vllm"]["cpu_share_of_others"] = found["limited"]["kara"]["cpu_share_of_others"] = None
    assert not any("doubtful" in line for line in report.findings(found))  # nobody knows


def test_only_what_is_told_reaches_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kara_kernels.engine import Policy

    monkeypatch.chdir(tmp_path)
    assert __main__.parse([]).given == {}
    assert __main__.parse([]).policy == dataclasses.asdict(Policy())
    options = __main__.parse(["--window", "64", "--policy", '{"pool": "layer", "trace": "t"}'])
    assert options.given == {"window": 64, "keep": 32, "pool": "layer", "trace": "t"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with a configuration of 2 x 2 x 2 x 8 float32 numbers per token. Every prompt has 10 tokens."""
    transformers = pytest.importorskip("transformers")
    from demos.serve import demand

    transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048
    ).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demand, "prompt_lengths", lambda model, prompts: [10] * len(prompts))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def prepared(config: Path, *arguments: str) -> Any:
    from demos.serve import demand

    return demand.prepare(__main__.parse(arguments), str(config))


def test_prompts_about_documents(config: Path) -> None:
    from demos.serve.prompts import PROMPTS

    load = prepared(config, "--documents", "3", "--document-tokens", "50", "--requests", "16", "--no-plentiful")
    texts = [prompt.rsplit("\n\n", 1) for prompt in load.prompts]
    assert len({text for text, _ in texts}) == 3
    assert {len(text) for text, _ in texts} == {200}
    assert [question for _, question in texts] == list(PROMPTS)
    assert prepared(config, "--requests", "16", "--no-plentiful").prompts == list(PROMPTS)


def test_blocks_of_a_load(config: Path) -> None:
    load = prepared(
        config,
        "--requests",
        "30",
        "--tokens",
        "150",
        "--block-size",
        "32",
        "--tail",
        "32",
        "--window",
        "64",
        "--keep",
        "32",
    )
    assert len(load.prompts) == len(load.lengths) == 30
    assert load.demand == 30 * 5
    assert load.longest == 160
    assert load.stages(plentiful=True) == {"limited": 50, "plentiful": 180}
    assert load.stages(plentiful=False) == {"limited": 50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--requests", str(10**12)],
            r"--requests, --tokens: expected at most [\d,]+ blocks in all, got [\d,]{15,}, which",
        ),
        (["--tokens", "2007"], "--tokens: expected at most 2,006 with this model, got 2,007"),
        (["--block-size", "48"], "--block-size: expected a multiple of 32 on a CPU, got 48"),
        (
            ["--documents", "16", "--document-tokens", "100000"],
            r"--documents, --document-tokens: expected at most [\d,]+ tokens in all, got 1,600,000",
        ),
        (["--requests", "1"], "--budget 0.333333 is 17 blocks, but one request alone needs 51"),
    ],
)
def test_what_no_server_has_room_for_is_refused_before_one_starts(
    config: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(DemoError, match=message):
        prepared(config, *arguments)
    prepared(config, "--tokens", "2006")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--budget", "0"], "--budget must be over 0 and at most 1, got 0.0"),
        (["--budget", "nan"], "--budget must be over 0"),
        (["--policy", "{"], "--policy is not JSON"),
        (["--policy", "[1]"], "--policy must be a JSON object"),
        (["--policy", '{"windw": 3}'], "windw: expected one of"),
        (["--keep", "256"], "keep: expected"),
        (["--tokens", "384"], "--tokens: expected more than the 384 of --window plus --tail, got 384"),
        (["--picture", "x.txt"], "--picture must end in"),
        (["--model", "./missing"], "there is no such directory"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert __main__.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_help_needs_no_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demos.serve", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "--budget" in done.stdout


class Installer:
    """Replaces pip and venv: records the commands and fails on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[str] = []
        self.fail = ""
        monkeypatch.setattr(environment, "_run", self)

    def __call__(self, *command: object) -> None:
        line = " ".join(str(part) for part in command)
        self.commands.append(line)
        if self.fail and self.fail in line:
            raise DemoError("no network")
        if "-m venv" in line:
            folder = Path(str(command[-1]))
            environment._site(folder).mkdir(parents=True)
            (folder / "bin").mkdir()
            (folder / "bin" / "python").touch()


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "DISK_NEEDED", 0)
    return Installer(monkeypatch)


def test_the_environment_is_built_once(installer: Installer, tmp_path: Path, capsys: Any) -> None:
    layer = tmp_path / "layer"
    assert environment.main([str(layer)]) == 0
    assert capsys.readouterr().out == f"{layer}/bin/python\n"
    count = len(installer.commands)
    assert environment.main([str(layer)]) == 0
    assert len(installer.commands) == count
    pth = next(environment._site(layer).glob("*.pth")).read_text()
    assert "kara_kernels/vllm-" in pth


def test_an_unfinished_environment_is_built_again(installer: Installer, tmp_path: Path, capsys: Any) -> None:
    installer.fail = "uninstall"
    assert environment.main([str(tmp_path / "layer")]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1] == "python -m demos.environment: error: no network"
    installer.fail = ""
    assert environment.main([str(tmp_path / "layer")]) == 0


def test_the_cpu_index_is_asked_when_the_users_own_fails(installer: Installer) -> None:
    installer.fail = "gguf==0.19.0"
    with pytest.raises(DemoError):
        environment.packages()
    first, second = [line for line in installer.commands if " install " in line]
    assert second == f"{first} --extra-index-url {environment.CPU_WHEELS}"


def test_a_full_disk_is_one_line(installer: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DISK_NEEDED", 1 << 60)
    with pytest.raises(DemoError, match=r"vLLM needs \d+ GiB in .*, \d+ GiB are free"):
        environment.packages()


def test_pins_agree_with_the_constraints() -> None:
    pins = dict(pin.split("==") for pin in environment.PINS)
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    shared = pins.keys() & constraints.keys()
    assert shared >= {"torch", "transformers", "pytest"}
    assert {name: pins[name].removesuffix("+cpu") for name in shared} == {name: constraints[name] for name in shared}
