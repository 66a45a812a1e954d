"""How far ahead of their own positions queries are scored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_tensor, check_unit_stride
from .values import check_count, check_flag


class LookAhead(NamedTuple):
    """Scores with queries rotated ``n`` positions ahead, because kept tokens serve queries that come after the window.

    A rotary position embedding rotates pairs of dimensions by angles that are linear in the position. Rotating keys
    back by the angles of ``n`` gives the same products as rotating queries ahead, and a window has fewer keys than
    queries. :meth:`of_table` takes the angles from a table such as vLLM's ``cos_sin_cache``.
    """

    cos: Tensor
    """float32 ``[R/2]``: cosines of the angles at position ``n``. The first ``R`` of ``D`` dimensions rotate."""
    sin: Tensor
    """float32 ``[R/2]``: their sines. A factor of the embedding, such as YaRN's, is not in them."""
    interleaved: bool = False
    """Pairs are dimensions ``2i`` and ``2i + 1`` (GPT-J). By default they are ``i`` and ``i + R/2`` (GPT-NeoX)."""

    @staticmethod
    def of_table(table: Tensor, n: int, *, interleaved: bool = False) -> LookAhead:
        """From ``table [positions, R]``, whose rows are cosines and then sines of all pairs, as vLLM keeps them.

        A common factor of all rows is divided out. Reads the table's rows 0 and ``n``, without a synchronisation.

        Raises:
            TypeError, ValueError: a table of another kind; ``n`` beyond the table.
        """
        check_tensor("table", table, (None, None), (torch.float16, torch.bfloat16, torch.float32), None)
        positions, dims = table.shape
        if not dims or dims % 2:
            raise ValueError(f"table: expected rows of cosines and sines, got shape {list(table.shape)}")
        check_count("n", n, 0, positions - 1)
        cos, sin = (table[n].float() / table[0, 0].float()).chunk(2)
        return LookAhead(cos, sin, interleaved)


def check_look_ahead(given: object, dim: int, device: torch.device) -> LookAhead | None:
    """Checks ``look_ahead`` for keys of ``D = dim`` dimensions. A plain tuple ``(cos, sin)`` will do."""
    if given is None:
        return None
    if not isinstance(given, tuple) or not 2 <= len(given) <= 3:
        raise TypeError(f"look_ahead: expected LookAhead(cos, sin, interleaved), got {type(given).__name__}")
    ahead = LookAhead(*given)
    cos = check_tensor("look_ahead.cos", ahead.cos, (None,), (torch.float32,), device)
    if not 2 <= 2 * len(cos) <= dim:
        raise ValueError(f"look_ahead.cos: expected 1..{dim // 2} angles for D = {dim}, got {len(cos)}")
    check_tensor("look_ahead.sin", ahead.sin, (len(cos),), (torch.float32,), device)
    check_unit_stride("look_ahead.cos", cos)
    check_unit_stride("look_ahead.sin", ahead.sin)
    check_flag("look_ahead.interleaved", ahead.interleaved)
    return ahead
