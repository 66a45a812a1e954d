"""Runs of the quality bench: what is measured again, what is not, and what the page says."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_transformers import make_model

import bench.quality.__main__ as command
from bench import tables
from bench.quality import models, report, run, sources
from bench.quality.methods import DEFAULT, FULL, METHODS, Kara, ablations, guards, pyramid, served
from bench.quality.replay import Replay
from bench.store import Store, code_of
from demos.screen import Screen
from kara_kernels.contexts.profile import digest_of
from kara_kernels.options import Scoring
from kara_kernels.scorers import kara, published

pytestmark = pytest.mark.usefixtures("one_thread")

BY_NAME = {method.name: method for method in METHODS}


class Letters:
    """A byte tokenizer, for models without a vocabulary of words."""

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[byte % 61 for byte in text.encode()])


# ---- what is measured again, and what is not ------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``measured(checkout, home)``: runs the quick bench on a tiny model and returns how many cells it measured."""
    monkeypatch.setattr(run, "WINDOWS", 1)
    monkeypatch.setattr(run, "HAYSTACK_WINDOWS", 6)
    monkeypatch.setattr(run, "QUICK_METHODS", (DEFAULT, "H2O", "random"))
    monkeypatch.setattr(run, "QUICK_TEXTS", ("manual-1", "argparse"))
    monkeypatch.setattr("demos.model.load", lambda *_, dtype, **__: (make_model().to(getattr(torch, dtype)), Letters()))
    compressed, cells = Replay.compressed, []

    def counted(self: Replay, *arguments: Any, **options: Any) -> Any:
        cells.append(1)
        if len(cells) == counted.stop:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return compressed(self, *arguments, **options)

    monkeypatch.setattr(Replay, "compressed", counted)

    def go(checkout: str, home: str = "home", stop: int = 0, *options: str) -> int:
        cells.clear()
        counted.stop = stop  # type: ignore[attr-defined]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
        out = str(tmp_path / checkout / "bench/results")
        run = ["--quick", "--threads", "1", "--device", "cpu", "--out", out, *options]
        assert command.main(run) == (130 if stop else 0)
        return len(cells) - bool(stop)

    return go


SERVED = 2 * 2  # two texts, two retentions
CELLS = 4 * 3 * 2 + SERVED  # two texts and two haystacks, three methods, two retentions
WITH_ALL = 2  # haystacks, with everything


def with_another_h2o(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [replace(m, scorer=published.knorm) if m.name == "H2O" else m for m in METHODS]
    monkeypatch.setattr(run, "METHODS", changed)


def test_a_fresh_clone_measures_and_an_unchanged_one_does_not(measured: Any) -> None:
    assert measured("clone") == CELLS + WITH_ALL
    assert measured("clone") == 0
    assert measured("clone", home="of somebody else") == CELLS + WITH_ALL  # committed results do not count


def test_a_changed_scorer_is_measured_again_nothing_else_and_checkouts_do_not_mix(
    measured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One checkout, another with a different H2O scorer, the first again, then the change in the first."""
    results = tmp_path / "one/bench/results"
    measured("one")
    rows, said = tables.read(results / "quality.csv"), (results / "quality.md").read_text()
    with monkeypatch.context() as other:
        with_another_h2o(other)
        assert measured("two") == (CELLS - SERVED) // 3
        others = tables.read(tmp_path / "two/bench/results/quality.csv")
    assert others[0] == rows[0]
    assert {a["method"] for a, b in zip(rows[1], others[1], strict=True) if a != b} == {"H2O"}
    assert measured("one") == 0
    assert tables.read(results / "quality.csv") == rows
    with_another_h2o(monkeypatch)
    assert measured("one") == 0
    assert tables.read(results / "quality.csv") == others
    assert (results / "quality.md").read_text() != said
    for method in run.QUICK_METHODS:
        assert f"| {method} |" in said or f"| **{method}** |" in said
    assert (results / "quality.png").stat().st_size > 10_000


def test_a_key_says_all_that_a_record_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(model: Any, seed: int = 0, **changed: Any) -> dict[str, str]:
        made = run.Run(model, Letters(), run.Plan("m", True, seed), Store(tmp_path / "store"), Screen())
        item = replace(run.Item("fidelity", "a text", [1, 2, 3], [], lambda cells: iter(())), **changed)
        return {name: made.key(item, (BY_NAME[name], 0.3)) for name in ("H2O", DEFAULT)}

    model, other = make_model(), make_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    first = keys(model)
    assert keys(model) == first
    different = [keys(other), keys(model, seed=1), keys(model, content=[1, 2, 4]), keys(model, name="another"),
                 keys(model, task="recall")]  # fmt: skip
    for module, name in ((torch, "__version__"), (run.transformers, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "0.0")
            different.append(keys(model))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        different.append(keys(model))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "of_files", lambda task, own, device: "other files")
        different.append(keys(model))
    found = [key for some in (first, *different) for key in some.values()]
    assert len(set(found)) == len(found) == 2 * 10
    made = run.Run(model, Letters(), run.Plan("m", True, 0), Store(tmp_path / "store"), Screen())
    item = run.Item("fidelity", "a text", [1, 2, 3], [], lambda cells: iter(()))
    assert len({made.key(item, (BY_NAME["H2O"], r)) for r in (0.3, 0.5)}) == 2


def published_as(tmp_path: Path, old: str, new: str) -> Any:
    """The module of published scorers with changed source."""
    source = Path(published.__file__).read_text()
    assert old in source
    path = tmp_path / f"published_{len(list(tmp_path.iterdir()))}.py"
    path.write_text(
        source.replace(old, new)
        .replace("from ..", "from kara_kernels.")
        .replace("from .", "from kara_kernels.scorers.")
    )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("old", "new", "changed"), [
    ("-rows.scored_keys(layer).norm", "rows.scored_keys(layer).norm", {"knorm"}),
    ("masked_fill_(later, -math.inf)", "masked_fill_(later, 0)", {"snapkv", "h2o", "tova", "chunkkv"}),  # a helper
    ("[..., rows.span].sum", "[..., :1].sum", {"snapkv", "h2o", "tova", "chunkkv"}),
    ("COMPACTOR_CHUNK = 10", "COMPACTOR_CHUNK = 11", {"chunkkv"}),  # a constant
    ("SNAP_POOL = 32, 7", "SNAP_POOL = 32, 9", {"snapkv"}),
    ("    return _by_layer(rows, lambda layer: -", "    # !\n    return _by_layer(rows,  lambda layer: -", set()),
    ("Prefers keys of small norm", "Small keys", set()),
])  # fmt: skip
def test_code_that_a_scorer_reaches_counts(tmp_path: Path, old: str, new: str, changed: set[str]) -> None:
    before, after = (published_as(tmp_path, *change) for change in (("import math",) * 2, (old, new)))
    scorers = [method.scorer.__name__ for method in METHODS if method.family in ("peer", "null")]

    def of(module: Any) -> dict[str, list[str]]:
        return {name: sources.of_callable(getattr(module, name)) for name in scorers}

    assert {name for name, code in of(after).items() if code != of(before)[name]} == changed


def test_settings_and_models_count() -> None:
    methods = [BY_NAME[DEFAULT], replace(BY_NAME[DEFAULT], selection={"chunk_fraction": 0.2}), BY_NAME["straight"],
               replace(BY_NAME[DEFAULT], tail=63), replace(BY_NAME[DEFAULT], scorer=Kara(Scoring(redundancy=1.0))),
               BY_NAME["SnapKV"], replace(BY_NAME["SnapKV"], layer_budgets=pyramid)]  # fmt: skip
    assert len({sources.of_method(method) for method in methods}) == len(methods)
    assert sources.of_method(BY_NAME[DEFAULT]) == sources.of_method(replace(BY_NAME[DEFAULT]))


def test_a_partial_scorer_is_its_function_and_what_it_was_given() -> None:
    one, same, other = (partial(kara, window=window) for window in (256, 256, 512))
    assert sources.of_callable(one) == sources.of_callable(same) != sources.of_callable(other)
    assert sources.of_callable(one)[1:] == sources.of_callable(kara)
    model, twin = make_model(), make_model()
    assert digest_of(model) == digest_of(twin)
    twin.set_attn_implementation("sdpa")
    assert digest_of(model) == digest_of(twin)
    with torch.no_grad():
        twin.lm_head.weight[0, 0] += 1
    assert digest_of(model) != digest_of(twin)


OURS = {"fidelity of ours", "fidelity of ours, on a GPU"}
ALL = {"fidelity", "decoding", *OURS}


@pytest.mark.parametrize(("path", "changed"), [
    ("bench/quality/replay.py", ALL),
    ("bench/quality/measure.py", ALL - {"decoding"}),
    ("bench/quality/decode.py", {"decoding"}),
    ("kara_kernels/windows/run.py", ALL),
    ("kara_kernels/reference/chunks.py", ALL),
    ("kara_kernels/integrations/transformers/rotary.py", ALL),
    ("kara_kernels/reference/score.py", OURS),
    ("kara_kernels/ops/_triton.py", ALL),
    ("kara_kernels/ops/_tiles.py", {"fidelity of ours, on a GPU"}),
    ("kara_kernels/ops/chunks.py", {"fidelity of ours, on a GPU"}),
    ("kara_kernels/integrations/flashinfer.py", set()),
    ("kara_kernels/windows/queries.py", OURS | {"decoding"}),
    ("kara_kernels/engine/__init__.py", {"decoding"}),
    ("kara_kernels/integrations/vllm/settings.py", set()),
    ("kara_kernels/scorers/rows.py", ALL),
    ("kara_kernels/scorers/own.py", OURS),
    ("kara_kernels/scorers/published.py", set()),  # counts scorer by scorer, as above
    ("kara_kernels/reference/rank.py", set()),
    ("kara_kernels/windows/of_tomorrow.py", ALL),
])  # fmt: skip
def test_files_that_a_record_depends_on(tmp_path: Path, path: str, changed: set[str]) -> None:
    for folder in ("bench/quality", "kara_kernels"):
        shutil.copytree(sources.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def hashes() -> dict[str, str]:
        return {"fidelity": sources.of_files("fidelity", False, "cpu", tmp_path),
                "fidelity of ours": sources.of_files("fidelity", True, "cpu", tmp_path),
                "fidelity of ours, on a GPU": sources.of_files("fidelity", True, "cuda", tmp_path),
                "decoding": sources.of_files("decoding", False, "cpu", tmp_path)}  # fmt: skip

    before = hashes()
    file = tmp_path / path
    was = file.read_text() if file.exists() else ""
    file.write_text(was + "\n# a comment\n")
    assert not was or hashes() == before
    file.write_text(was + "\nCHANGED = True\n")
    assert {name for name, value in hashes().items() if value != before[name]} == changed


def test_prose_does_not_count_as_code() -> None:
    told = '"""A."""\nclass A:\n    """B."""\n    x: int = 1\n    """C."""\ndef f():\n    """D."""\n    return "E" #F\n'
    bare = 'class A:\n    x: int = 1\ndef f():\n    return "E"\n'
    assert code_of(told) == code_of(bare)
    assert code_of(told) != code_of(bare.replace("E", "e"))
    assert code_of('class A:\n    """B."""') == code_of("class A: pass")


def test_a_stopped_run_goes_on(measured: Any) -> None:
    assert measured("clone", stop=17) == 16
    assert measured("clone") == CELLS + WITH_ALL - 16


def test_two_runs_share_the_work(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forwards, one backwards: what the other has measured since is left out."""
    fidelity = run.fidelity
    met: list[str] = []

    def beside(model: Any, name: str, *arguments: Any, **options: Any) -> Any:
        met.append(name)
        if len(met) == 1:  # while the first run measures its first text, the other does all the rest
            monkeypatch.setattr(run, "fidelity", fidelity)
            assert measured("other", "home", 0, "--backwards") == CELLS + WITH_ALL
        return fidelity(model, name, *arguments, **options)

    monkeypatch.setattr(run, "fidelity", beside)
    assert measured("clone") == CELLS + WITH_ALL + 4 * 2  # the text that both had begun
    assert len(met) == 1


# ---- the report ---------------------------------------------------------------------------------------


def test_the_committed_page_is_that_of_its_table(tmp_path: Path) -> None:
    head, records = tables.read(command.RESULTS / "quality.csv")
    methods = {method.name for method in [FULL, *METHODS, *served(), *guards(), *ablations()]}
    if {record["method"] for record in records} != methods:
        pytest.skip("the committed table is of an earlier bench: make quality")
    page, _ = report.write({**head, "records": records}, tmp_path, models.others(command.RESULTS, "quality"))
    assert (command.RESULTS / "quality.md").read_text() == page.read_text()


def test_the_report_says_where_kara_loses(tmp_path: Any) -> None:
    def records(ours: float, theirs: float) -> list[dict[str, Any]]:
        common = {"task": "fidelity", "retention": 0.5, "top1": 0.9, "score_seconds": 0.1, "kl_by_distance": [1.0] * 4}
        return [{**common, "item": f"t{i} (prose)", "method": m, "kl": kl * (1 + i / 10)}
                for i in range(5) for m, kl in ((DEFAULT, ours), ("H2O", theirs))]  # fmt: skip

    head = {"kara_kernels": "v0", "torch": "v0", "transformers": "v0", "machine": "m", "window": 256, "tail": 64,
            "plan": {"model": "packaged", "quick": False, "seed": 0}}  # fmt: skip
    page, _ = report.write({**head, "records": records(2.0, 1.0)}, tmp_path, {})
    assert "- 50%, KL: *H2O*, by 2.00" in page.read_text()
    assert "lost 5." in page.read_text()
    page, _ = report.write({**head, "records": records(1.0, 2.0)}, tmp_path, {})
    assert "no method of the tables" in page.read_text()
    assert "| 50% | 1.2000 | H2O 2.4000 | 0.50 (0.50 to 0.50) |" in page.read_text()
    assert "side by side" not in page.read_text()

    tables.write(tmp_path / "quality-big.csv", records(1.0, 4.0), **head | {"plan": head["plan"] | {"model": "x/Big"}})
    page, _ = report.write({**head, "records": records(1.0, 2.0)}, tmp_path, models.others(tmp_path, "quality"))
    assert "| SmolLM2-135M-Instruct | 5 | 0.50 (0.50 to 0.50) H2O |" in page.read_text()
    assert "| Big | 5 | 0.25 (0.25 to 0.25) H2O |" in page.read_text()
    assert "[Big](quality-big.md)" in page.read_text()


def test_another_model_has_files_of_its_own(measured: Any, tmp_path: Path) -> None:
    """And figures in another dtype are measured again."""
    results = tmp_path / "one/bench/results"
    assert measured("one") == CELLS + WITH_ALL
    assert measured("one", "home", 0, "--model", "some/Big-Model", "--dtype", "bfloat16") == CELLS + WITH_ALL
    assert "with Big-Model in bfloat16 (" in (results / "quality-big-model.md").read_text()
    assert (results / "quality-big-model.png").exists()
    assert measured("one") == 0
    assert "| Big-Model | 2 |" in (results / "quality.md").read_text()


@pytest.mark.parametrize(("arguments", "said"), [(["--threads", "0"], "--threads: expected 1 or more, got 0")])
def test_options_out_of_range(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err


def test_problems_are_one_line(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command.main(["--out", str(tmp_path / "file")]) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert command.main(["--out", str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("quality: --out ")
    assert lines[1].startswith("quality: cannot keep measurements in ")
