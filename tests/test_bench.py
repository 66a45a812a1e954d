"""The benches' baselines, pages and arguments, as far as they need no GPU."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import baselines, tables
from bench.gpu import __main__ as gpu
from bench.gpu import measure, packets, report
from bench.speed import __main__ as speed
from kara_kernels import compress_window, reference
from kara_kernels.options import PAPER, RECOMMENDED
from kara_kernels.payload import FORMS

# ---------------------------------------------------------------------------------------------------- tables


def test_a_table_gives_back_what_was_written(tmp_path: Path) -> None:
    head = {"kind": "a kind, of sorts", "version": "2.13.0+cpu", "plan": {"quick": False, "seed": 0}}
    rows = [
        {"name": 'a "b", c', "n": 3, "x": 0.1 + 0.2, "yes": True, "times": {"a": {"low": 1e-300}}, "many": [1, 2.5]},
        {"name": "b", "z": -0.0, "many": ["one key", True]},
    ]
    tables.write(tmp_path / "t.csv", rows, **head)
    assert tables.read(tmp_path / "t.csv") == (head, rows)
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 4 + 1 + 2  # a line a row
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("value", ["3", "True", "1e3", "nan", "1_000", "", "a\nb", "a;b", (), [], [[1]], {1}, Path()])
def test_what_a_table_would_change_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="value: expected"):
        tables.write(tmp_path / "t.csv", [{"a": value}])
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("name", ["a.b", "a[]", "a: b"])
def test_columns_that_would_nest_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="column: expected"):
        tables.write(tmp_path / "t.csv", [{name: 1}])


# ------------------------------------------------------------------------------------------------ baselines


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def attention(query: torch.Tensor, keys: torch.Tensor) -> list[list[list[float]]]:
    """``query [n, G, D]``, ``keys [W, D]`` -> logits ``[n][G][W]`` in plain Python."""
    scale = keys.shape[1] ** -0.5
    return [[[scale * sum(a * b for a, b in zip(q, k, strict=True)) for k in keys.tolist()] for q in of_token]
            for of_token in query.tolist()]  # fmt: skip


def pooled(row: list[float]) -> list[float]:
    return [max(row[max(0, i - 3) : i + 4]) for i in range(len(row))]


def of_method(name: str, query: torch.Tensor, keys: torch.Tensor) -> list[float]:
    """Scores of one KV head, as defined in the papers of the methods."""
    last = {"mean_attention": len(query), "rkv": 8, "snapkv": 32}[name]
    logits = attention(query[-last:], keys)
    if name == "rkv":
        rows = [softmax([max(g[j] for g in of_token) for j in range(len(keys))]) for of_token in logits]
    else:
        rows = [softmax(row) for of_token in logits for row in of_token]
    mean = [sum(row[j] for row in rows) / len(rows) for j in range(len(keys))]
    if name == "mean_attention":
        return mean
    if name == "snapkv":
        return pooled(mean)
    unit = [[x / math.sqrt(sum(y * y for y in k)) for x in k] for k in keys.tolist()]
    cosine = [
        sum(0.0 if i == j else sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for i in range(len(keys)))
        / len(keys) for j in range(len(keys))
    ]  # fmt: skip
    return [0.1 * a - 0.9 * b for a, b in zip(pooled(mean), softmax(cosine), strict=True)]


@pytest.mark.parametrize("name", ["mean_attention", "rkv", "snapkv"])
def test_scorers(name: str) -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(2, 40, 3 * 2, 8), torch.randn(2, 3, 12, 8)
    scores = getattr(baselines, name)(query, keys)
    grouped = query.view(2, 40, 3, 2, 8)
    for s in range(2):
        for h in range(3):
            expected = of_method(name, grouped[s, :, h], keys[s, h])
            assert scores[s, h].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scorer", [baselines.mean_attention, baselines.rkv, baselines.snapkv])
def test_events_move_rows_as_the_library_does(scorer: baselines.Scorer) -> None:
    torch.manual_seed(0)
    window, keep, page = 24, 10, 4
    pools = [[torch.randn(20, page, 2, 8) for _ in range(2)] for _ in range(2)]
    twins = copy.deepcopy(pools)
    queries = [torch.randn(2, 40, 4, 8) for _ in range(2)]
    tables = torch.randperm(20).int().view(2, 10)
    starts, lengths = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([38, 30], dtype=torch.int32)
    given = (tables, starts, lengths)
    new = baselines.compress(scorer, queries, *pools, *given, window, keep)
    scores = baselines.score(scorer, queries, twins[0], tables, starts, window)
    kept = baselines.select(scores, keep).int()
    expected = reference.compact_blocks(*twins, *given, kept, window)
    assert torch.equal(new, expected)
    assert all(torch.equal(a, b) for a, b in zip(pools[0] + pools[1], twins[0] + twins[1], strict=True))
    best = scores.sort(-1, descending=True).values[..., :keep]  # pooled scores tie: any of equals may be kept
    assert torch.equal(scores.gather(-1, kept.long()).sort(-1, descending=True).values, best)


def test_the_predecessors_work_is_ours() -> None:
    """Equal queries give equal scores, so the timed jobs differ only in how they compute them."""
    torch.manual_seed(0)
    keys, values = torch.randn(1, 20, 4, 2, 8), torch.randn(1, 20, 4, 2, 8)
    query, tables = torch.randn(1, 1, 24, 4, 8), torch.randperm(20).int().view(1, 20)
    starts, lengths = torch.zeros(1, dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    theirs = baselines.score(baselines.mean_attention, list(query), list(keys), tables, starts, 24)
    ours = compress_window(query, keys, values, tables, lengths, window=24, keep=8, window_starts=starts, **PAPER)
    assert torch.allclose(theirs, ours.scores, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- speed


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache other than the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_a_quick_run_of_the_cpu_bench(tmp_path: Path) -> None:
    assert speed.main(["--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    head, [row] = tables.read(tmp_path / "speed.csv")
    assert list(row["seconds"]) == list(speed.report.LABELS)
    assert all(len(times) == 2 for times in row["seconds"].values())
    text = (tmp_path / "speed.md").read_text()
    assert text == speed.report.page(head, [row])
    assert f"{speed.report.ratio(row, 'predecessor', 'kara'):.2f}x" in text
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_a_stopped_run_of_the_cpu_bench_goes_on_and_a_finished_one_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[speed.Case] = []

    def measure(case: speed.Case, rounds: int) -> dict[str, list[float]]:
        if len(measured) == 1 and stopping:
            raise KeyboardInterrupt
        measured.append(case)
        return dict.fromkeys(speed.report.LABELS, [1.0] * rounds)

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "CASES", [replace(speed.QUICK[0], window=window) for window in (64, 128, 256)])
    command, stopping = ["--rounds", "2", "--out", str(tmp_path)], True
    assert speed.main(command) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert not list(tmp_path.glob("speed*"))
    measured, stopping = [], False
    assert speed.main(command) == 0
    assert [case.window for case in measured] == [128, 256]
    assert len(tables.read(tmp_path / "speed.csv")[1]) == 3
    measured = []
    assert speed.main([*command, "--threads", "1"]) == 0
    assert len(measured) == 3


def test_the_committed_page_is_that_of_its_table() -> None:
    head, rows = tables.read(speed.RESULTS / "speed.csv")
    made = [row.get("case") for row in rows], head.get("recorded")
    if made != ([case.label for case in speed.CASES], speed.recorded()):
        pytest.skip("the committed table is of an earlier bench: make bench")
    assert (speed.RESULTS / "speed.md").read_text() == speed.report.page(head, rows)


def test_ratios_are_of_neighbours() -> None:
    seconds = {name: [1.0, 2.0, 10.0] for name in speed.report.LABELS}
    seconds["predecessor"] = [3.0, 8.0, 10.0]  # 3, 4 and 1 times
    row = {"case": "c", **asdict(speed.QUICK[0]), "seconds": seconds}
    assert speed.report.ratio(row, "predecessor", "kara") == 3.0
    assert speed.report.milliseconds(row, "kara") == 2000.0
    head = {"machine": "m", "threads": 1, "torch": "t", "tail": 128, "page": 16}
    assert "as recorded: met in 1 of 1 cases" in speed.report.page(head, [row])
    seconds["predecessor"] = [2.9, 2.0, 10.0]
    assert "as recorded: met in 0 of 1 cases" in speed.report.page(head, [row])


def test_the_cpu_bench_times_what_is_recommended_as_the_shim_records_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    real = speed.compress_window
    monkeypatch.setattr(speed, "compress_window", lambda q, *a, **k: calls.append({"q": q, **k}) or real(q, *a, **k))
    case = speed.QUICK[0]
    jobs = speed.World(case).jobs()
    assert list(jobs)[:2] == ["kara", "paper"]
    for job in jobs.values():
        job()
    recommended, paper = calls
    assert {name: recommended[name] for name in RECOMMENDED} == dict(RECOMMENDED)
    assert {name: paper[name] for name in PAPER} == dict(PAPER)
    rows, heads = case.window + 128, case.heads * case.group
    assert recommended["query_rows"].shape == (1, rows)
    assert recommended["q"].codes.shape == (case.layers, rows, heads, case.dim // 2)
    assert len(recommended["look_ahead"].cos) == case.dim // 2
    assert paper["q"].shape == (case.layers, 1, case.window, case.heads * case.group, case.dim)


@pytest.mark.parametrize("argument", [["--threads", "0"], ["--rounds", "0"], ["--rounds", "x"]])
def test_bad_arguments_of_the_cpu_bench(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(argument)
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m bench.speed: error: ")


# ------------------------------------------------------------------------------------------------------ GPU


@pytest.fixture
def rehearsal(tmp_path: Path) -> Path:
    assert gpu.main(["--rehearse", "--rounds", "3", "--out", str(tmp_path)]) == 0
    return tmp_path / "rehearsal.csv"


def test_a_rehearsal_says_what_it_is(rehearsal: Path) -> None:
    head, rows = report.read(rehearsal)
    assert "not a GPU timing" in head["kind"]
    assert head["machine"]["device"] == "CPU"
    assert "not a GPU timing" in rehearsal.with_suffix(".md").read_text()
    assert rehearsal.with_suffix(".md").read_text() == report.page((head, rows))
    assert rehearsal.with_suffix(".png").stat().st_size > 10_000


def test_files_of_gpu_times_hold_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    for path in gpu.RESULTS.glob("gpu*.csv"):
        assert report.read(path)[0]["kind"] == gpu.REAL
        assert path.with_suffix(".md").read_text(encoding="utf-8") == report.page(report.read(path))
    assert not list(gpu.RESULTS.glob("gpu*sample*"))
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse"])
    assert "--rehearse: expected --out FOLDER" in capsys.readouterr().err.splitlines()[-1]


def test_packets_are_timed(tmp_path: Path) -> None:
    assert gpu.main(["--packets", "--rehearse", "--rounds", "2", "--out", str(tmp_path)]) == 0
    head, rows = tables.read(tmp_path / "packets.csv")
    assert "not a GPU timing" in head["kind"]
    assert {row["form"] for row in rows} == set(FORMS)
    assert all(row[part] >= 0 for row in rows for part in packets.PARTS)
    assert f"{rows[-1]['load']} |" in (tmp_path / "packets.md").read_text(encoding="utf-8")


def test_two_runs_are_compared(rehearsal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = report.read(rehearsal)
    after = copy.deepcopy(before)
    assert " *" not in report.compare(before, after)
    head, rows = after
    for time in rows[0]["times"].values():
        for key in ("low", "median", "high"):
            time[key] *= 100
    head["machine"]["device"] = "another"
    assert report.compare(before, after).count("| 100.000 * |") == len(rows[0]["times"])
    assert "Different device: CPU and another." in report.compare(before, after)
    assert gpu.main(["--compare", str(rehearsal), str(rehearsal)]) == 0
    assert "| 1.000 |" in capsys.readouterr().out
    for content in ("{}", "no table", "# schema: 99\na,b\n1,2\n", "# schema: 1\na,b\n1\n", "# nothing\n"):
        (tmp_path / "other.csv").write_text(content)
        with pytest.raises(SystemExit):
            gpu.main(["--compare", str(rehearsal), str(tmp_path / "other.csv")])
        assert "other.csv: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    # Skipped tests do not count as success.
    assert "passed" not in (measure.suite_is_green() or "passed")


def test_a_red_suite_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "suite_is_green", lambda: "tests/test_gpu.py: 1 failed")
    monkeypatch.setattr(measure, "measure", lambda *a: pytest.fail("timed"))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "no times from kernels that are not known to be right" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quantiles() -> None:
    assert measure.quantiles([float(i) for i in range(11)]) == {"low": 1.0, "median": 5.0, "high": 9.0}
    assert measure.quantiles([3.0]) == {"low": 3.0, "median": 3.0, "high": 3.0}


def test_floor_of_a_case() -> None:
    case = measure.Case("c", layers=2, heads=3, group=4, dim=8, window=16, batch=5)
    lists, rows, recorded = 2 * 3 * 5, 8 + 128, 4 * (16 + 128)
    assert case.recorded == recorded
    assert measure.floor_bytes(case) == {
        "score": lists * (recorded * (4 + 2) + 8 * 2 * (16 + 16)),  # codes and scales, keys and values
        "paper's score": lists * 8 * 2 * (4 * 16 + 16),
        "compact": lists * rows * 8 * 2 * 2 * 2,
    }
    latent = measure.Case("c", 2, 3, 4, 8, 16, 5, values=False)
    assert measure.floor_bytes(latent)["compact"] == lists * rows * 8 * 2 * 2
    assert measure.floor_bytes(latent)["score"] == lists * (recorded * (4 + 2) + 8 * 2 * 16)


def test_what_is_timed_first_is_what_the_shim_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, rows and numbers of queries in every call. Jobs with every token's query are skipped if too large."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def seen(name: str, call: Any) -> Any:
        def wrapper(query: Any, *a: Any, **k: Any) -> Any:
            calls.append((name, {"query": query, **k}))
            return call(query, *a, **k)

        return wrapper

    for name in ("compress_window", "score_window"):
        monkeypatch.setattr(measure, name, seen(name, getattr(measure, name)))
    case = measure.REHEARSAL[1]
    world = measure.World(case, "cpu", torch.float32)
    jobs = world.jobs("torch")
    assert list(jobs)[:5] == ["event", "score", "select", "compact", "overlapping"]
    for name in ("event", "score", "paper's event", "paper's score"):
        calls.clear()
        jobs[name]()
        [(_, given)] = calls
        if name.startswith("paper"):
            assert given["query"].shape[2:4] == (case.window, case.heads * case.group)
            assert given["query_rows"] is None
            assert given["reduction"] == "mean"
        else:
            rows, heads = case.window + 128, case.heads * case.group
            assert given["query"].codes.shape[1:3] == (case.batch * rows, heads)
            assert given["query_rows"].shape == (case.batch, rows)
            assert len(given["look_ahead"].cos) == case.dim // 2
            assert given["reduction"] == "rms"
    calls.clear()
    jobs["event"]()
    assert {name: calls[0][1][name] for name in RECOMMENDED} == dict(RECOMMENDED)
    jobs["paper's event"]()
    assert {name: calls[1][1][name] for name in PAPER} == dict(PAPER)
    monkeypatch.setattr(measure, "MOST_QUERIES", 1)
    assert list(measure.World(case, "cpu", torch.float32).jobs("torch")) == [*jobs][:5]


def test_jobs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    names = ["event", "score", "compact"]
    monkeypatch.setattr(measure.World, "jobs", lambda self, backend: {n: lambda n=n: turns.append(n) for n in names})
    row = measure.measure(measure.REHEARSAL[0], "cpu", 4, 0)
    assert turns == names * 5  # the first of each warms up
    assert list(row["times"]) == names


def test_the_reference_check_sees_a_wrong_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the PyTorch path on both sides, then with wrongly moved rows, and with different keep lists."""
    real = measure.compress_window
    monkeypatch.setattr(measure, "compress_window", lambda *a, **k: real(*a, **k | {"backend": "torch"}))
    world = measure.World(measure.REHEARSAL[0], "cpu", torch.float32)
    assert measure.differs_from_reference(world) is None

    def spoiled(*a: object, **k: object) -> object:
        result = real(*a, **k | {"backend": "torch"})  # type: ignore[arg-type]
        if k["backend"] == "triton":
            world.cache.k.stacked[0, 0, 0, 0, 0] += 1  # type: ignore[index]
        return result

    monkeypatch.setattr(measure, "compress_window", spoiled)
    assert measure.differs_from_reference(world) == "moved rows"
