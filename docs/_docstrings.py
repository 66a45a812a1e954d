"""Extension of Griffe: what docstrings abbreviate is written out for the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`(~?)([\w.]+)`")
GROUP = re.compile(r"^( +)((?:\w+, )+\w+): (.*(?:\n\1 +.*)*)", re.M)


class Written(griffe.Extension):
    """Roles such as ``:func:`kara_kernels.ops.select_topk``` become links, where a page has what they name. Parameters
    that share a line, ``scale, k_scale: ...``, get one each."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            name = match[2].lstrip(".")
            try:
                target = name if name.startswith("kara_kernels") else obj.resolve(name)
            except griffe.NameResolutionError:
                return f"`{name}`"
            shown = name.rpartition(".")[2] if match[1] else name
            return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'

        def each(match: re.Match[str]) -> str:
            return "\n".join(f"{match[1]}{name}: {match[3]}" for name in match[2].split(", "))

        obj.docstring.value = GROUP.sub(each, ROLE.sub(link, obj.docstring.value))
