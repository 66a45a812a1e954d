"""Shared parts of demos and benches: progress, the machine, command lines. No wheel contains any of it."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from demos import DemoError, command, environment, machine
from demos.machine import Seconds
from demos.screen import Screen, duration, time_told
from kara_kernels import options
from kara_kernels.engine import Policy
from kara_kernels.options import OPTIONS

ROOT = Path(__file__).parents[1]


def test_a_line_of_progress_comes_also_while_a_step_hangs(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    phases: dict[str, float] = {}
    with Screen(every=0.05).phase(phases, "reading", 4, "pages") as advance:
        advance(1, "page 7")
        time.sleep(0.3)
        advance(3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert re.fullmatch(r"reading: 1 of 4 pages, 0 s, about 5 s left, page 7", lines[0])
    assert lines[-1] == "reading: 4 of 4 pages, 0 s"
    assert phases["reading"] >= 0.3


def test_a_short_phase_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen().phase({}, "reading", 4) as advance:
        advance(4)
    assert capsys.readouterr().out == "reading: 4 of 4 tokens, 0 s\n"


def test_no_line_follows_a_phase_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    before = threading.active_count()
    with pytest.raises(DemoError), Screen(every=0.01).phase({}, "reading", 4):
        raise DemoError("no")
    assert threading.active_count() == before
    capsys.readouterr()


def test_waiting_says_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    with Screen(every=0.05).waiting({}, "starting"):
        time.sleep(0.2)
    assert set(capsys.readouterr().out.splitlines()) == {"starting: 0 s"}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_time_left_follows_the_pace_so_far() -> None:
    assert time_told(25, 100, 10) == "10 s, about 30 s left"
    assert time_told(1, 100, 10) == "10 s, about 16 min left"
    assert time_told(99, 100, 10) == "10 s, about 5 s left"
    assert time_told(1, 1000, 10) == "10 s, about 3 h left"
    assert time_told(0, 100, 10) == "10 s"  # no pace yet
    assert time_told(100, 100, 40) == "40 s"


STAT = "cpu  9 9 9 9 9 9 9 9 0 0\n" + "".join(
    f"cpu{number} {user} 10 20 {idle} 5 1 2 7 99 99\n"
    for number, user, idle in ((0, 100, 300), (1, 50, 400), (2, 1, 1))
)


def test_cpu_time_is_that_of_the_usable_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text(STAT + "intr 1 2 3\n", encoding="ascii")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(machine.os, "sysconf", lambda _: 100)
    found = machine.cpu_seconds(lambda: 1.5, tmp_path / "stat")
    assert found == Seconds(1.5, (150 + 2 * 40) / 100, (150 + 2 * 40 + 700 + 2 * 5) / 100)  # stolen time is busy


@pytest.mark.parametrize("text", [None, "", "cpu0 a b\n"])
def test_unknown_cpu_time_is_silence(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "stat").write_text(text, encoding="ascii")
    first, second = (machine.cpu_seconds(stat=tmp_path / "stat") for _ in range(2))
    assert machine.share_of_others(first, second) is None
    assert machine.doubt(None) is None


def test_others_are_whoever_is_busy_and_not_we() -> None:
    before = Seconds(own=1, busy=10, there=100)
    assert machine.share_of_others(before, Seconds(own=5, busy=18, there=120)) == pytest.approx(4 / 20)
    assert machine.share_of_others(before, Seconds(own=9, busy=17, there=120)) == 0  # ticks are coarse
    assert machine.doubt(0.04) is None
    assert machine.doubt(0.31) == "Other programs used 31% of the CPU time during the run, so the timings are doubtful."


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads /proc")
def test_our_own_work_is_not_that_of_others() -> None:
    before = machine.own_seconds()
    while machine.own_seconds() - before < 0.05:
        pass
    now = machine.cpu_seconds()
    assert now is None or 0 < now.own <= now.there


def test_memory_is_the_least_of_what_is_known(tmp_path: Path) -> None:
    info, group = tmp_path / "meminfo", tmp_path / "group"
    info.write_text("MemTotal: 10 kB\nMemAvailable:    2048 kB\n", encoding="ascii")
    assert machine._of_machine(info) == 2 << 20
    assert machine._of_machine(tmp_path / "none") is None
    group.mkdir()
    assert machine._of_container(group) is None
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 500\ninactive_file 150\n"),
    ):
        (group / name).write_text(text, encoding="ascii")
    assert machine._of_container(group) == 450
    (group / "memory.max").write_text("max\n", encoding="ascii")
    assert machine._of_container(group) is None


def test_every_option_of_the_library_is_one_of_the_command_line() -> None:
    parser = command.Parser("x", "", "")
    command.add_options(command.add_policy(parser))
    assert command.told(parser.parse_args([]), list(OPTIONS)) == {}
    values = {name: "off" if field.default is None else str(field.default) for name, field in OPTIONS.items()}
    arguments = [part for name, value in values.items() for part in (command.flag(name), value)]
    got = command.told(parser.parse_args(arguments), list(OPTIONS))
    assert got == {name: False if field.default is None else field.default for name, field in OPTIONS.items()}


def test_what_help_shows_is_what_the_library_has() -> None:
    parser = command.Parser("x", "", "")
    command.add_options(command.add_policy(parser))
    shown = {action.dest: action for action in parser._actions}
    defaults = {**options.RECOMMENDED, "window": Policy().window, "tail": Policy().tail}
    for name, default in defaults.items():
        assert str(shown[name].help).endswith(f"(default: {'on' if default is None else default})")
    assert set(defaults) | {"keep", "help"} == set(shown)
    assert {name: shown[name].choices for name in ("attention", "reduction", "pool")} == {
        "attention": options.ATTENTIONS,
        "reduction": options.REDUCTIONS,
        "pool": options.POOLS,
    }


@pytest.mark.parametrize("demo", ["demos.generate", "demos.serve"])
def test_help_does_not_import_torch(demo: str) -> None:
    script = (
        "import runpy, sys\n"
        f"sys.argv = [{demo!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({demo!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    assert not left.code, left.code\n"
        "slow = {'torch', 'numpy', 'transformers', 'vllm', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--window W" in done.stdout


def test_window_keep_and_tail_are_the_librarys() -> None:
    def filled(**given: Any) -> argparse.Namespace:
        wanted = argparse.Namespace(**({"window": None, "keep": None, "tail": None} | given))
        command.fill_policy(wanted)
        return wanted

    usual = Policy()
    assert vars(filled()) == {"window": usual.window, "keep": usual.keep, "tail": usual.tail}
    assert vars(filled(window=64, tail=0)) == {"window": 64, "keep": 32, "tail": 0}


def test_a_refusal_of_the_library_names_the_option() -> None:
    with pytest.raises(DemoError, match=r"^--max-chunk: expected 1, got 0$"), command.library_checks():
        raise ValueError("max_chunk: expected 1, got 0")
    with pytest.raises(DemoError, match=r"^KaraCache needs one device: two$"), command.library_checks():
        raise NotImplementedError("KaraCache needs one device: two")


@pytest.mark.parametrize("pyproject", [None, "[project]\nname = 'another'\n", "not = toml = at all"])
def test_the_environment_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pyproject: str | None
) -> None:
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    monkeypatch.setattr(environment, "packages", lambda: pytest.fail("3.5 GB before the check"))
    if pyproject is not None:
        (tmp_path / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    assert environment.main([str(tmp_path / "layer")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("python -m demos.environment: error: this needs a checkout of kara-kernels")
    assert told.count("\n") == 1


def test_no_wheel_holds_demos() -> None:
    from setuptools import find_namespace_packages

    find = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"][
        "find"
    ]
    taken = find_namespace_packages(str(ROOT), **find)
    assert {"kara_kernels", "kara_kernels.ops", "kara_kernels.integrations.transformers"} <= set(taken)
    assert {name.split(".")[0] for name in taken} == {"kara_kernels"}
