"""The reasoning bench with real servers: a server for every method, rows, and the page."""

import json
import shutil
from pathlib import Path

from bench import tables
from bench.reasoning import __main__ as command

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def test_every_method_has_a_server(model, tmp_path, monkeypatch):
    """A model of random weights solves nothing and never ends, but all of its replies are compressed and compared."""
    talking = tmp_path / "talking"
    shutil.copytree(model, talking)
    told = talking / "tokenizer_config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "chat_template": TEMPLATE}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # logs go to build/
    given = "--problems 6 --methods knorm --retentions 0.5 --window 64 --tail 16 --limit 160 --at-once 6 --threads 1"
    out = tmp_path / "out"
    assert command.main([*given.split(), "--model", str(talking), "--out", str(out)]) == 0
    _, rows = tables.read(out / "reasoning.csv")
    answers = [row for row in rows if row["kind"] == "answer"]
    assert len(answers) == 3 * 6
    assert all(row["tokens"] == 160 and not row["finished"] and not row["solved"] for row in answers)
    again, knorm = ([row for row in answers if row["method"] == name] for name in ("full again", "knorm"))
    assert all(row["equal"] and row["kl"] < 1e-3 for row in again)
    assert all(80 <= row["same"] <= 160 for row in knorm)  # nothing is compressed before window and tail
    assert min(row["same"] for row in knorm) < 160
    assert max(row["kl"] for row in knorm) > 10 * max(row["kl"] for row in again)
    held = {row["method"]: row["held"] / max(1, row["ended"]) for row in rows if row["kind"] == "cell"}
    assert held["full"] == 0.0
    assert 0.5 < held["knorm"] < 1.0
    assert "| knorm, 50% | 6 | 0.0% |" in (out / "reasoning.md").read_text()
    assert len(list(Path("build/reasoning").glob("*.log"))) == 3
