"""The documentation site: it builds in strict mode, loads nothing from other servers, and works in Chromium."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = """
    --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"the site needs {package}: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_docstrings_are_pages(site: Path) -> None:
    api = (site / "api/index.html").read_text(encoding="utf-8")
    assert 'id="kara_kernels.compress_window"' in api
    assert 'id="kara_kernels.CompressedWindow.frontiers"' in api
    for name in ("score_window", "select_topk", "expand_chunks", "compact_blocks"):
        assert f'id="kara_kernels.ops.{name}"' in (site / "api/operations/index.html").read_text(encoding="utf-8")


def test_nothing_is_left_of_roles_and_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r":(func|class|meth|mod|data|attr):", text), page
        assert not re.search(r"<(script|img|link)[^>]+(src|href)=\"?(https?:)?//", text), page


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """An installed Chromium. Every context has an empty profile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield browser
        browser.close()


def watched(browser: Any, address: str, width: int) -> tuple[Any, list[str]]:
    """A tab, and its problems: errors, failed requests, requests to other servers."""
    tab = browser.new_context(viewport={"width": width, "height": 800}).new_page()
    wrong: list[str] = []
    tab.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    # Opening the next page aborts pending requests.
    tab.on("requestfailed", lambda r: r.failure == "net::ERR_ABORTED" or wrong.append(f"{r.failure} {r.url}"))
    tab.on("response", lambda answer: answer.status >= 400 and wrong.append(f"{answer.status} {answer.url}"))
    tab.on("request", lambda request: request.url.startswith((address, "data:")) or wrong.append(request.url))
    return tab, wrong


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "telephone"])
def test_every_page_loads(site: Path, browser: Any, width: int) -> None:
    pages = sorted(str(file.parent.relative_to(site)) for file in site.rglob("index.html"))
    assert len(pages) > 15
    with served(site) as address:
        tab, wrong = watched(browser, address, width)
        for page in pages:
            tab.goto(address + page, wait_until="load")
            pictures = tab.evaluate("[...document.images].map(i => [i.src, i.naturalWidth])")
            assert all(size for _, size in pictures), f"{page}: {pictures}"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{page} is too wide"
            assert not wrong, f"{page}: {wrong}"
        tab.context.close()


@pytest.mark.parametrize(
    ("words", "page"), [("frontier", "method"), ("compress_window", "api"), ("preemption", "vllm")]
)
def test_search_finds(site: Path, browser: Any, words: str, page: str) -> None:
    with served(site) as address:
        tab, wrong = watched(browser, address, 1280)
        tab.goto(address, wait_until="load")
        tab.locator("input.md-search__input").click()
        tab.keyboard.type(words)
        results = tab.locator("a.md-search-result__link")
        results.first.wait_for(timeout=20_000)
        links = results.evaluate_all("all => all.map(a => a.href)")
        assert any(f"{address}{page}/" in link for link in links), links
        assert not wrong
        tab.context.close()
