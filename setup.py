"""What pyproject.toml cannot say: the README as PyPI shows it, where relative links lead nowhere."""

import re
import tomllib
from pathlib import Path

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def for_pypi(readme: str, public_url: str) -> str:
    """The README with absolute links. While there is no public address, links become their text and pictures go."""

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if not public_url:
            return "" if picture else text
        return f"{picture}[{text}]({public_url.format(kind='raw' if picture else 'blob')}{target})"

    return LINK.sub(absolute, readme)


if __name__ == "__main__":  # which build back ends say too
    from setuptools import setup

    root = Path(__file__).resolve().parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    setup(
        long_description=for_pypi(
            (root / "README.md").read_text(encoding="utf-8"), project["tool"]["kara-kernels"]["public-url"]
        ),
        long_description_content_type="text/markdown",
    )
