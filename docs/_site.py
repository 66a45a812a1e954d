"""Hook of MkDocs that adds README, CONTRIBUTING, CHANGELOG, LICENSE and the result pages of the benches to the site.

Links in Markdown are relative to their own file, so that they work in a clone. Some files have another place on the
site. This hook rewrites their links, and links to them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
RESULTS = "bench/results"
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds pages from outside ``docs``."""
    for source, page in MOVED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    files.append(File.generated(config, "licence.md", content=f"# Licence\n\n```text\n{licence}\n```\n"))
    for result in sorted((ROOT / RESULTS).iterdir()):
        if result.suffix in (".md", ".png"):
            files.append(File.generated(config, f"results/{result.name}", abs_src_path=str(result)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page. Broken links stay unchanged, and the strict build reports them."""
    site = page.file.src_uri
    here = posixpath.dirname(_in_repository(site))

    def turn(match: re.Match[str]) -> str:
        target = _on_site(posixpath.normpath(posixpath.join(here, match[2])))
        return match[1] + posixpath.relpath(target, posixpath.dirname(site) or ".")

    return LINK.sub(turn, markdown)


def _in_repository(page: str) -> str:
    """The source file of a page of the site."""
    moved = {page: source for source, page in MOVED.items()}
    if page.startswith("results/"):
        return f"{RESULTS}/{posixpath.basename(page)}"
    return moved.get(page, f"docs/{page}")


def _on_site(source: str) -> str:
    """The place of a repository file on the site."""
    if source.startswith(f"{RESULTS}/"):
        return f"results/{posixpath.basename(source)}"
    return {**MOVED, "LICENSE": "licence.md"}.get(source, source.removeprefix("docs/"))
