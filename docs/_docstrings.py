"""Extension of Griffe that expands abbreviations in docstrings for the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`(~?)([\w.]+)`")
GROUP = re.compile(r"^( +)((?:\w+, )+\w+): (.*(?:\n\1 +.*)*)", re.M)


class Written(griffe.Extension):
    """Roles such as ``:func:`kara_kernels.ops.select_topk``` become links if a page documents the name. Parameters
    that share a line, ``scale, k_scale: ...``, get one line each."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        write_out(pkg)


def write_out(item: griffe.Object) -> None:
    if item.docstring is not None:
        text = ROLE.sub(lambda role: link(item, *role.groups()), item.docstring.value)
        item.docstring.value = GROUP.sub(each, text)
    for member in item.members.values():
        if not isinstance(member, griffe.Alias):
            write_out(member)


def link(item: griffe.Object, short: str, name: str) -> str:
    name = name.lstrip(".")
    shown = name.rpartition(".")[2] if short else name
    try:
        target = name if name.startswith("kara_kernels") else item.resolve(name)
    except griffe.NameResolutionError:
        return f"`{shown}`"
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def each(group: re.Match[str]) -> str:
    indent, names, text = group.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
