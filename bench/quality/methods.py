"""The compared methods by name: how they score, how lists are shared, and other settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kara_kernels import scorers
from kara_kernels.engine import Policy, QueryRing, Span, needed_tokens
from kara_kernels.options import PAPER, Scoring, Selection, split_options
from kara_kernels.scorers import Rows, Scorer
from kara_kernels.windows.queries import FORMS

PLAIN: dict[str, Any] = {"chunk_fraction": 0.0}
WINDOW, TAIL = Policy().window, Policy().tail
RETENTIONS = (0.2, 0.3, 0.4, 0.5, 0.6)
DEFAULT, BASE = "kara", "kara, no chunks"  # BASE is the method whose settings are changed one at a time


@dataclass(frozen=True)
class Method:
    """``family``: ``"kara"``, ``"peer"``, ``"null"`` or ``"ablation"``. ``selection`` goes to ``compress_window``."""

    name: str
    what: str
    family: str
    scorer: Scorer
    selection: dict[str, Any] = field(default_factory=lambda: PLAIN)
    window: int = WINDOW
    tail: int = TAIL
    layer_budgets: Callable[[int, int], list[int]] | None = None
    window_budgets: Callable[[list[Tensor], int], list[int]] | None = None

    @property
    def own_scores(self) -> bool:
        """Whether the method uses the library's scores."""
        return isinstance(self.scorer, Kara | Served)

    @property
    def scored_as(self) -> tuple[Any, ...]:
        """Methods with the same value share their scores."""
        return self.scorer, self.window, self.tail

    def keep(self, retention: float, scores: list[Tensor]) -> list[list[int]]:
        """Tokens kept of every window, in every layer, given the windows' scores ``[L, H, W]``."""
        kept, layers = round(retention * self.window), len(scores[0]) if scores else 0
        budgets = [kept] * layers if self.layer_budgets is None else self.layer_budgets(kept, layers)
        if self.window_budgets is not None:
            return [[kept] * layers for kept in self.window_budgets(scores, kept)]
        return [budgets] * len(scores)


Cell = tuple[Method, float]  # a method at a retention


@dataclass(frozen=True)
class Kara:
    """The library's scores. ``stride``: uses every n-th query. ``mean_heads``: uses means of GQA groups."""

    scoring: Scoring = Scoring()  # noqa: RUF009, frozen
    look_ahead: bool = True
    tail_queries: bool = True
    stride: int = 1
    mean_heads: bool = False

    def __call__(self, rows: Rows) -> Tensor:
        scoring = self.scoring
        everything = self.tail_queries and scoring.attention != "causal"
        query = rows.query if everything else rows.query[:, : rows.length]
        query = query[:, self.stride - 1 :: self.stride]
        query = query.mean(3) if self.mean_heads else query.flatten(2, 3)
        return scorers.kara(rows, query=list(query[:, None]), scoring=scoring, look_ahead=self.look_ahead)


@dataclass(frozen=True)
class Served:
    """The library's scores with queries as an engine's ring records them."""

    policy: Policy = Policy()  # noqa: RUF009, frozen

    def __call__(self, rows: Rows) -> Tensor:
        layers, count, heads, group, dim = rows.query.shape
        policy = self.policy
        ring = QueryRing(
            policy, layers=layers, query_heads=heads * group, kv_heads=heads, head_dim=dim, max_sequences=1,
            max_tokens=count, dtype=rows.query.dtype, device=rows.query.device,
        )  # fmt: skip
        ring.prepare([Span("text", 0, 0, count)])
        for layer, query in enumerate(rows.query.flatten(2, 3)):
            ring.record(layer, query)
        last = (count - 1) // policy.query_stride
        recorded = torch.tensor([ring.rows_of("text", last, last + 1)], dtype=torch.int32, device=rows.query.device)
        return scorers.kara(
            rows, query=ring.queries, query_rows=recorded, scoring=policy, look_ahead=policy.positions_ahead > 0
        )


def nothing_known(rows: Rows) -> Tensor:
    """The same score for every key."""
    return torch.zeros(rows.shape, device=rows.keys.device)


def pyramid(kept: int, layers: int) -> list[int]:
    """Budgets that fall linearly from the first layer to the last, whose budget is a twentieth of the mean. Their mean
    is ``kept``, as far as a window has that many tokens (arXiv 2406.02069, beta 20)."""
    low = max(1, kept // 20)
    budgets = [round(2 * kept - low - (2 * kept - 2 * low) * layer / max(1, layers - 1)) for layer in range(layers)]
    # Budget beyond a window's length goes to the next layers.
    spare = 0
    for layer, budget in enumerate(budgets):
        budgets[layer] = min(WINDOW, budget + spare)
        spare += budget - budgets[layer]
    return budgets


PAPER_SCORING, PAPER_SELECTION = split_options(PAPER)
STRAIGHT = Kara(PAPER_SCORING, look_ahead=False, tail_queries=False)
WITH_TAIL = Kara(PAPER_SCORING, look_ahead=False)
OURS = Kara()
SELECTION, CHUNKS = asdict(Selection()), asdict(PAPER_SELECTION)


def _chunks(selection: dict[str, Any]) -> str:
    return f"{selection['chunk_fraction']} / {selection['max_chunk']}"


FULL = Method("full", "the full cache: at retention 1 all scores keep everything", "full", nothing_known)
METHODS = [
    Method(DEFAULT, f"{OURS.scoring.reduction}, value norms, tail queries, looking ahead, chunks {_chunks(SELECTION)}",
           "kara", OURS, SELECTION),
    Method(BASE, "the default without Token2Chunk", "kara", OURS),
    Method("kara, chunks", f"the default with Token2Chunk {_chunks(CHUNKS)}", "kara", OURS, CHUNKS),
    Method("kara, not ahead", "no chunks, queries where they stood", "kara", Kara(look_ahead=False)),
    Method("kara, layer", "no chunks, one list per layer", "kara", OURS, {**PLAIN, "pool": "layer"}),
    Method("kara, model", "no chunks, one list for the model", "kara", OURS, {**PLAIN, "pool": "model"}),
    Method("kara, model, chunks", f"one list for the model, chunks {_chunks(CHUNKS)}", "kara", OURS,
           {**CHUNKS, "pool": "model"}),
    Method("straight", f"as published: mean attention of the window's queries, chunks {_chunks(CHUNKS)}", "kara",
           STRAIGHT, CHUNKS),
    Method("straight, causal", "the same with the causal mask", "kara",
           Kara(replace(PAPER_SCORING, attention="causal"), look_ahead=False), CHUNKS),
    Method("straight, no chunks", "the same without Token2Chunk", "kara", STRAIGHT),
    Method("mean", "mean attention of window and tail queries", "kara", WITH_TAIL),
    Method("mean, redundancy 9", "the same with redundancy 9", "kara",
           Kara(replace(PAPER_SCORING, redundancy=9.0), look_ahead=False)),
    Method("mean, value norms", "the same weighed by value norms", "kara",
           Kara(Scoring(reduction="mean"), look_ahead=False)),
    Method("random", "chance, per head", "null", scorers.random_per_head),
    Method("random, shared", "chance, one list", "null", scorers.random_shared),
    Method("StreamingLLM", "newest first", "null", scorers.streaming_llm),
    Method("SnapKV", "last 32 queries, max-pooled", "peer", scorers.snapkv),
    Method("H2O", "attention received so far", "peer", scorers.h2o),
    Method("TOVA", "newest query, per layer", "peer", scorers.tova),
    Method("R-KV", "last 8 queries, redundancy", "peer", scorers.rkv),
    Method("KeyDiff", "unlike the mean key", "peer", scorers.keydiff),
    Method("Knorm", "small keys", "peer", scorers.knorm),
    Method("ChunkKV", "fixed chunks of 10, per layer", "peer", scorers.chunkkv),
    Method("PyramidKV", "SnapKV with layer budgets", "peer", scorers.snapkv, layer_budgets=pyramid),
    Method("Compactor", "attention without mask x value norm", "peer", scorers.compactor),
]  # fmt: skip

SERVED_RETENTIONS = (0.3, 0.5)


def served() -> list[Method]:
    """The default with queries as an engine records them: by default, in its other forms, and what memory falls back
    to."""
    forms = [Policy(), *(Policy(query_dtype=form) for form in ("fp8", "auto")), Policy(look_ahead=0)]
    forms += [Policy(query_heads=heads, query_stride=stride) for heads, stride in FORMS]
    return [Method(_recorded(policy), "", "served", Served(policy), SELECTION) for policy in forms]


def _recorded(policy: Policy) -> str:
    heads = "all heads" if policy.query_heads == "all" else "group means"
    every = {1: "every token", 2: "every 2nd token"}.get(policy.query_stride, f"every {policy.query_stride}th token")
    dtype = "16 bits" if policy.query_dtype == "auto" else policy.query_dtype
    return f"{heads}, {every}, {dtype}" + ", not ahead" * (policy.positions_ahead == 0)


def guarded(scores: list[Tensor], keep: int, late: int = 1) -> list[int]:
    """Budgets of windows as the guard sets them, by the scores of the window ``late`` windows earlier, with the limit
    whose budgets have a mean closest to ``keep``."""

    def budgets(max_loss: float) -> list[int]:
        policy = Policy(keep=keep, max_loss=max_loss)
        needed = [int(needed_tokens(window[:, None], max_loss)) for window in scores]
        wanted = [policy.guarded(count) or policy.most_keep for count in needed]
        return ([keep] * late + wanted)[: len(scores)]

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(budgets(middle)) > keep * len(scores) else (low, middle)
    return min(budgets(low), budgets(high), key=lambda found: abs(sum(found) - keep * len(scores)))


GUARDED_RETENTIONS = (0.3, 0.5)


def guards() -> list[Method]:
    """The default with the guard: as it is, and if it acted on the very window that it measured."""
    return [
        Method("guard", "acts one window late, as in an engine", "guard", OURS, SELECTION, window_budgets=guarded),
        Method("guard, at once", "would need a synchronisation", "guard", OURS, SELECTION, window_budgets=at_once),
    ]


def at_once(scores: list[Tensor], keep: int) -> list[int]:
    return guarded(scores, keep, late=0)


ABLATION_RETENTION = 0.3


def ablations() -> list[Method]:
    def one(name: str, scorer: Scorer = OURS, selection: dict[str, Any] = PLAIN, **where: Any) -> Method:
        return Method(name, "", "ablation", scorer, selection, **where)

    return [
        *(one(f"window {n}", window=n) for n in (64, 128, 256, 512, 1024) if n != WINDOW),
        *(one(f"tail {n}", tail=n) for n in (0, 16, 64, 128, 256) if n != TAIL),
        one("no tail queries", Kara(tail_queries=False)),
        one("every 2nd query", Kara(stride=2)),
        one("every 8th query", Kara(stride=8)),
        one("group means, every 2nd", Kara(stride=2, mean_heads=True)),
        one("group means, every 2nd, not ahead", Kara(stride=2, mean_heads=True, look_ahead=False)),
        one("group means, every 2nd, mean, redundancy 9",
            Kara(replace(PAPER_SCORING, redundancy=9.0), False, stride=2, mean_heads=True)),
        *(one(f"chunks {fraction} / {span}", selection={"chunk_fraction": fraction, "max_chunk": span})
          for fraction in (0.1, 0.3, 0.5) for span in (4, 8, 16) if (fraction, span) != (0.3, 8)),
        one("no value norms", Kara(Scoring(value_norm=False))),
        one("mean of queries", Kara(Scoring(reduction="mean"))),
        *(one(f"redundancy {rho}", Kara(Scoring(redundancy=rho))) for rho in (1.0, 9.0)),
    ]  # fmt: skip
