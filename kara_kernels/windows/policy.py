"""Settings for operators: how much is compressed, when, and by which scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..options import OPTIONS, Scoring, Selection
from ..values import MAX_WINDOW, check_choice, check_count, check_number

KARA = "kara"
QUERY_HEADS = ("all", "mean")
QUERY_DTYPES = ("int4", "fp8", "auto")
OF_KARA = (
    "attention", "reduction", "value_norm", "redundancy", "chunk_fraction", "max_chunk", "max_loss", "query_stride",
    "query_heads",
)  # fmt: skip
"""Settings that only Kara's own scores have, or that would change what another method is."""


def _needs(scorer: str) -> str:
    """See :class:`kara_kernels.scorers.Entry`. Command lines show Kara's settings without importing PyTorch."""
    if scorer == KARA:
        return "queries"
    from ..scorers import registered

    return registered(scorer).needs


@dataclass(frozen=True, kw_only=True)
class Policy(Scoring, Selection):
    """Settings of an engine's compression. Every field has a default and is checked on construction.

    The options of :class:`~kara_kernels.options.Scoring` and :class:`~kara_kernels.options.Selection` are fields too.
    Lengths are in tokens.

    Raises:
        TypeError, ValueError: naming field, expected and got.
    """

    scorer: str = KARA
    """Whose scores choose the tokens: ``"kara"``, whose kernels the options of scoring belong to, or for comparison a
    published method or an installed one, by its name in :mod:`kara_kernels.scorers`. Those are PyTorch. They see the
    rows of the sequence and recorded queries, and select without Token2Chunk."""
    window: int = 256
    """``W``: uncompressed tokens that one compression chooses from; 2..4096, at least one block of the cache."""
    keep: int = 128
    """``K``: tokens of a window that are kept; less than ``window``."""
    tail: int = 128
    """Newest tokens, which a compression leaves alone. Their queries score the window before them."""
    pressure_tail: int | None = None
    """``tail`` when an engine is short of blocks. None is a quarter of ``tail``."""
    pressure_keep: int | None = None
    """``keep`` when an engine is still short of blocks with that tail, and the survivors of earlier windows are reduced
    to the same share. None is half of ``keep``; ``keep`` leaves survivors alone."""
    pressure_window: int | None = None
    """Smallest ``window`` when an engine is short of blocks. None is a quarter of ``window``."""
    max_loss: float | None = None
    """Guard: most share of a window's scores that its dropped tokens may have, 0..1. Each compression of a sequence
    sets ``keep`` of its next window to what that would have taken. None leaves ``keep`` alone."""
    min_keep: int | None = None
    """Smallest ``keep`` that the guard sets. None is half of ``keep``."""
    max_keep: int | None = None
    """Largest ``keep`` that the guard sets. A sequence that needs more is no longer compressed. None is halfway from
    ``keep`` to ``window``."""
    protected: int = 0
    """Tokens from the start of a sequence that are never compressed. The whole prompt is protected in any case."""
    period: int = 1
    """Engine steps from one planning round to the next."""
    max_sequences: int = 4
    """Most sequences compressed in one step. Those with most to compress go first; the others wait."""
    min_freed_blocks: int = 1
    """A compression waits until it frees this many blocks, but never for more than one block of tokens. With 0 it never
    waits, blocks may be longer than a window, and ``keep`` may equal ``window``."""
    query_stride: int = 1
    """Records the query of every n-th decoded token; 1 records all of them. Recorded queries score the window."""
    query_heads: str = "all"
    """Records ``"all"`` query heads, or the ``"mean"`` of each GQA group, which takes ``G`` times less memory."""
    query_dtype: str = "int4"
    """Records queries in four bits with a scale per token and head (``"int4"``), as ``"fp8"`` (e4m3fn, saturated), or
    in their own dtype (``"auto"``)."""
    look_ahead: int | None = None
    """Scores with queries rotated this many positions ahead. None means ``window`` positions if the engine's adapter
    knows the model's rotary embedding, else 0; and 0 with ``attention="causal"``."""
    max_query_gib: float = 4.0
    """Most memory of the query ring per worker, in GiB. A larger ring is refused."""

    def __post_init__(self) -> None:
        Scoring.__post_init__(self)
        Selection.__post_init__(self)
        self._check_scorer()
        for name, low in (("tail", 0), ("protected", 0), ("period", 1), ("max_sequences", 1), ("min_freed_blocks", 0)):
            check_count(name, getattr(self, name), low, 2**31 - 1)
        if self.pressure_tail is not None:
            check_count("pressure_tail", self.pressure_tail, 0, self.tail)
        if self.pressure_keep is not None:
            check_count("pressure_keep", self.pressure_keep, 1, MAX_WINDOW)
        if self.pressure_window is not None:
            check_count("pressure_window", self.pressure_window, 1, MAX_WINDOW)
        if self.max_loss is not None:
            check_number("max_loss", self.max_loss, 0.0, 1.0)
        least = min(1, self.min_freed_blocks)  # tokens that must be dropped, because dropping none never frees a block
        check_count("window", self.window, 1 + least, MAX_WINDOW)
        check_count("keep", self.keep, 1, self.window - least)
        if self.min_keep is not None:
            check_count("min_keep", self.min_keep, 1, self.keep)
        if self.max_keep is not None:
            check_count("max_keep", self.max_keep, self.keep, self.window - least)
        check_count("query_stride", self.query_stride, 1, self.window)
        if self.attention == "causal" and self.query_stride != 1:
            raise ValueError(
                f"query_stride: expected 1 with attention='causal' (query i is window token i), got {self.query_stride}"
            )
        check_choice("query_heads", self.query_heads, QUERY_HEADS)
        check_choice("query_dtype", self.query_dtype, QUERY_DTYPES)
        if self.look_ahead is not None:
            check_count("look_ahead", self.look_ahead, 0, 2**31 - 1)
        check_number("max_query_gib", self.max_query_gib, 0.0, 1e6)

    def _check_scorer(self) -> None:
        if not isinstance(self.scorer, str):
            raise TypeError(f"scorer: expected a str, got {type(self.scorer).__name__}")
        if _needs(self.scorer) == "context":
            raise ValueError(f"scorer: expected one that can score a window, got {self.scorer!r}")
        if self.scorer == KARA:
            return
        fields = {field.name: field.default for field in dataclasses.fields(self) if field.name in OF_KARA}
        for name, expected in {**fields, "look_ahead": self.look_ahead and 0}.items():
            if (given := getattr(self, name)) != expected:
                raise ValueError(f"{name}: expected {expected!r} with scorer={self.scorer!r}, got {given!r}")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, beside: Sequence[str] = ()) -> Policy:
        """The policy of a mapping such as parsed JSON.

        Args:
            settings: fields of the policy.
            beside: further keys that an engine's adapter handles itself. The error for an unknown key lists them too.

        Raises:
            TypeError, ValueError: unknown keys or invalid values.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings: expected a mapping, got {type(settings).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := ", ".join(sorted(map(str, set(settings) - set(known)))):
            raise ValueError(f"{unknown}: expected one of {', '.join([*known, *beside])}, got {unknown}")
        return cls(**settings)

    def resized(self, window: int | None = None, keep: int | None = None) -> Policy:
        """The same policy with another ``window`` or ``keep``, where one is given, and then without the guard. Shortage
        of blocks takes no smaller windows then."""
        if window is None and keep is None:
            return self
        window, keep = self.window if window is None else window, self.keep if keep is None else keep
        return dataclasses.replace(
            self, window=window, keep=keep, pressure_window=MAX_WINDOW, max_loss=None, min_keep=None, max_keep=None
        )

    def check_page_size(self, page_size: int) -> None:
        """Raises ValueError for settings that could never free a block of ``page_size`` tokens."""
        check_count("page_size", page_size, 1, 2**31 - 1)
        if not self.min_freed_blocks:
            return
        if self.window < page_size:
            raise ValueError(f"window: expected at least one block of {page_size} tokens, got {self.window}")
        dropped = self.window - self.most_keep
        most = -(-dropped // page_size)
        if self.min_freed_blocks > most:
            raise ValueError(
                f"min_freed_blocks: expected at most {most}, which is what dropping {dropped} of {self.window} tokens "
                f"can free with blocks of {page_size}, got {self.min_freed_blocks}"
            )

    @property
    def dropped(self) -> int:
        """Tokens that one compression drops."""
        return self.window - self.keep

    @property
    def query_rows(self) -> int:
        """Queries recorded per sequence: those of one window and its tail, or none if the scorer needs none."""
        if _needs(self.scorer) == "rows":
            return 0
        return -(-(self.window + self.tail) // self.query_stride)

    def spare_rows(self, drafts: int) -> int:
        """Rows that a ring needs beyond ``query_rows``, so that the queries of up to ``drafts`` tokens that are
        rejected after their step overwrite none that still score."""
        return -(-drafts // self.query_stride) if self.query_rows else 0

    def recorded_heads(self, query_heads: int, kv_heads: int) -> int:
        """The number of heads that a recorded query has, of a model with ``H*G`` and ``H``."""
        return kv_heads if self.query_heads == "mean" else query_heads

    @property
    def least_keep(self) -> int:
        """``pressure_keep``, or what None means."""
        return max(1, self.keep // 2) if self.pressure_keep is None else min(self.keep, self.pressure_keep)

    def guarded(self, needed: int) -> int | None:
        """The guard's ``keep`` for a sequence that needs so many tokens; None if it may not be compressed."""
        least = max(1, self.keep // 2) if self.min_keep is None else self.min_keep
        return max(least, needed) if needed <= self.most_keep else None

    @property
    def most_keep(self) -> int:
        """The most tokens of a window that are kept."""
        if self.max_loss is None:
            return self.keep
        return (self.keep + self.window) // 2 if self.max_keep is None else self.max_keep

    @property
    def least_tail(self) -> int:
        """``pressure_tail``, or what None means."""
        return self.tail // 4 if self.pressure_tail is None else self.pressure_tail

    @property
    def least_window(self) -> int:
        """``pressure_window``, or what None means. With ``attention="causal"``, where the queries are those of a whole
        window, it is ``window``."""
        if self.attention == "causal":
            return self.window
        return -(-self.window // 4) if self.pressure_window is None else min(self.window, self.pressure_window)

    @property
    def positions_ahead(self) -> int:
        """``look_ahead``, or what None means for a model whose rotary embedding is known."""
        if self.look_ahead is not None:
            return self.look_ahead
        return 0 if self.attention == "causal" or self.scorer != KARA else self.window

    @property
    def own_queries(self) -> bool:
        """Whether every token of a window must have its query in the ring."""
        return self.attention == "causal" or _needs(self.scorer) == "every query"

    @property
    def selection(self) -> dict[str, Any]:
        """The options of :func:`kara_kernels.compress_window` that decide which tokens are kept."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return options if self.scorer == KARA else options | {"chunk_fraction": 0.0}
