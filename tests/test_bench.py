"""What the benches time themselves against, their pages, and their arguments; everything that needs no GPU."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from bench import baselines
from bench.gpu import __main__ as gpu
from bench.gpu import measure, report
from bench.speed import __main__ as speed
from kara_kernels import compress_window, reference

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
    """Scores of one KV head, as the methods' papers have them."""
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
    """Same queries, same scores: what is timed differs in how, not in what."""
    torch.manual_seed(0)
    keys, values = torch.randn(1, 20, 4, 2, 8), torch.randn(1, 20, 4, 2, 8)
    query, tables = torch.randn(1, 1, 24, 4, 8), torch.randperm(20).int().view(1, 20)
    starts, lengths = torch.zeros(1, dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    theirs = baselines.score(baselines.mean_attention, list(query), list(keys), tables, starts, 24)
    ours = compress_window(query, keys, values, tables, lengths, window=24, keep=8, window_starts=starts)
    assert torch.allclose(theirs, ours.scores, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- speed


def test_a_quick_run_of_the_cpu_bench(tmp_path: Path) -> None:
    assert speed.main(["--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    [row] = result["rows"]
    assert all(len(times) == 2 for times in row["seconds"].values())
    text = (tmp_path / "speed.md").read_text()
    assert text == speed.page(result)
    assert f"{row['event_ratio']:.2f}x" in text
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_ratios_are_of_neighbours() -> None:
    seconds = {name: [1.0, 2.0, 10.0] for name in speed.LABELS}
    seconds["predecessor"] = [3.0, 8.0, 10.0]  # 3, 4 and 1 times
    row = speed.row(speed.QUICK[0], seconds)
    assert row["event_ratio"] == 3.0
    assert row["median"]["kara"] == 2.0
    result = {"machine": "m", "threads": 1, "torch": "t", "rows": [row]}
    assert "same queries: met in 1 of 1 cases" in speed.page(result)
    seconds["predecessor"] = [2.9, 2.0, 10.0]
    assert "same queries: met in 0 of 1 cases" in speed.page(result | {"rows": [speed.row(speed.QUICK[0], seconds)]})


@pytest.mark.parametrize("argument", [["--threads", "0"], ["--rounds", "0"], ["--rounds", "x"]])
def test_bad_arguments_of_the_cpu_bench(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(argument)
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m bench.speed: error: ")


# ------------------------------------------------------------------------------------------------------ GPU


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    assert gpu.main(["--sample", "--rounds", "3", "--out", str(tmp_path)]) == 0
    return tmp_path / "gpu-sample.json"


def test_a_sample_says_what_it_is(sample: Path) -> None:
    result = report.read(sample)
    assert "not a GPU timing" in result["kind"]
    assert result["machine"]["device"] == "CPU"
    assert "not a GPU timing" in sample.with_suffix(".md").read_text()
    assert sample.with_suffix(".md").read_text() == report.page(result)
    assert sample.with_suffix(".png").stat().st_size > 10_000
    stored = report.read(gpu.RESULTS / "gpu-sample.json")
    assert stored.keys() == result.keys()
    assert stored["kind"] == result["kind"]


def test_two_runs_are_compared(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = report.read(sample)
    after = copy.deepcopy(before)
    assert " *" not in report.compare(before, after)
    for time in after["rows"][0]["times"].values():
        for key in ("low", "median", "high"):
            time[key] *= 100
    after["machine"]["device"] = "another"
    assert report.compare(before, after).count("| 100.000 * |") == len(after["rows"][0]["times"])
    assert "Different device: CPU and another." in report.compare(before, after)
    assert gpu.main(["--compare", str(sample), str(sample)]) == 0
    assert "| 1.000 |" in capsys.readouterr().out
    for content in ("{}", "no json", '{"schema": 99}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(SystemExit):
            gpu.main(["--compare", str(sample), str(tmp_path / "other.json")])
        assert "other.json: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    # Skipped tests are no green suite.
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
    lists, rows = 2 * 3 * 5, 8 + measure.TAIL
    assert measure.floor_bytes(case) == {"score": lists * 16 * 8 * 2 * 5, "compact": lists * rows * 8 * 2 * 2 * 2}
    latent = measure.Case("c", 2, 3, 4, 8, 16, 5, values=False)
    assert measure.floor_bytes(latent)["compact"] == lists * rows * 8 * 2 * 2


def test_the_reference_check_sees_a_wrong_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the PyTorch path on both sides; then with rows that moved wrong, and with other keep lists."""
    real = measure.compress_window
    monkeypatch.setattr(measure, "compress_window", lambda *a, **k: real(*a, **k | {"backend": "torch"}))
    world = measure.World(measure.SAMPLE[0], "cpu", torch.float32)
    assert measure.differs_from_reference(world) is None

    def spoiled(*a: object, **k: object) -> object:
        result = real(*a, **k | {"backend": "torch"})  # type: ignore[arg-type]
        if k["backend"] == "triton":
            world.cache.k.stacked[0, 0, 0, 0, 0] += 1  # type: ignore[index]
        return result

    monkeypatch.setattr(measure, "compress_window", spoiled)
    assert measure.differs_from_reference(world) == "moved rows"
