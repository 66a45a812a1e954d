"""The trace of vLLM's contexts without vLLM: what its lines say. That they say all, `test_manager` finds out."""

from __future__ import annotations

import builtins
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from lower_tier import Disk
from test_manager import BLOCK, hashes, manager, stored

from kara_kernels.contexts.directory import Copy
from kara_kernels.contexts.utility import Option, Tier
from kara_kernels.integrations.vllm.contexts.jobs import Ended
from kara_kernels.integrations.vllm.contexts.known import Place
from kara_kernels.integrations.vllm.contexts.trace import Event, Trace, watch


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_happened_to_whom(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    some = manager()
    watch(some, Trace(str(path), lambda name: name.upper()))
    stored(some, "aabb")
    (copy,) = some.keeper.directory.copies()
    (line,) = lines(path)
    assert tuple(line) == Event._fields
    assert line.pop("time") > 1.7e9
    assert line == {
        "event": "stored", "context": copy.key, "tokens": 4 * BLOCK, "tier": "ram", "method": "none/int8",
        "ratio": copy.option.ratio, "nbytes": copy.option.nbytes, "request_id": "FIRST", "came_from": None,
        "predicted_seconds": None,
    }  # fmt: skip


@pytest.mark.parametrize("error", ["damaged", "failed"])
def test_what_cannot_be_loaded_is_named_and_dropped(tmp_path: Path, error: str) -> None:
    path = tmp_path / "trace"
    some = manager()
    stored(some, "aabb")
    watch(some, Trace(str(path)))
    admission = some.admissions.find(hashes("aabbc"), 5 * BLOCK, 0)
    assert admission is not None
    some.load("second", admission, range(4))
    _, (job,) = some.step(0)
    some.ended(job.number, Ended(1, False, 0.1, error))
    assert [(line["event"], line["request_id"]) for line in lines(path)] == [(error, "second"), ("dropped", None)]


def test_what_lies_on_a_disk_is_found_and_what_moves_says_from_where(tmp_path: Path) -> None:
    path, disk = tmp_path / "trace", Disk({}, 512)
    some = manager(lower=[(Tier("disk", 512 * 1000, 1e9), disk)])
    watch(some, Trace(str(path)))
    place = Place(hashes("aabb")[-1], 4 * BLOCK)
    copy = some.adopt(place, "disk", "none/int8", 2**20, [])
    assert copy is not None
    disk.copies[copy.number] = {i: (copy.key, i) for i in range(100)}
    some.used(place, "disk", [])
    some.step(0)
    (number,) = disk.jobs
    disk.end(number, True)
    some.step(0)
    assert [(line["event"], line["came_from"], line["tier"]) for line in lines(path)] == [
        ("found", None, "disk"), ("moved", "disk", "ram"),
    ]  # fmt: skip


def test_what_lies_below_already_moves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As packets do that were offered to a remote tier before they left memory."""
    monkeypatch.setattr(Disk, "has", lambda self, copy: True)
    path, some = tmp_path / "trace", manager(lower=[(Tier("disk", 512 * 1000, 1e9), Disk({}, 512))])
    context = stored(some, "aabb").context
    watch(some, Trace(str(path)))
    moving = some.keeper.directory.move(context, "disk")
    assert moving is not None
    some.transfers.start(moving)
    assert [(line["event"], line["came_from"], line["tier"]) for line in lines(path)] == [("moved", "ram", "disk")]


def test_a_file_that_cannot_be_written_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace, copy = Trace(str(tmp_path / "gone" / "trace")), Copy("aa.16", "ram", Option("none/int8", 0.5, 512, 1.0), 0)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            trace("dropped", copy)
    assert len([record for record in caplog.records if "trace" in record.message]) == 1
    (tmp_path / "gone").mkdir()
    trace("dropped", copy)
    assert len(lines(tmp_path / "gone" / "trace")) == 1


def test_a_line_is_one_unbuffered_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So lines of engines that share a file do not mix."""
    opened, real = [], builtins.open

    def spied(*args: Any, **kwargs: Any) -> Any:
        opened.append((args, kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(builtins, "open", spied)
    path = str(tmp_path / "trace")
    Trace(path)("dropped", Copy("aa.16", "ram", Option("none/int8", 0.5, 512, 1.0), 0))
    assert opened == [((path, "ab"), {"buffering": 0})]
