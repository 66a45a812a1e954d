"""The sequences of a batch: stores the tokens of each forward pass and compresses what is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kara_kernels.engine import Compression, Held, Ledger, Plan, Policy, QueryRing, Span, execute

from .blocks import Blocks
from .rotary import Ahead


@dataclass
class Forward:
    """State of a forward pass, computed at layer 0: ``q`` new rows per sequence, ``n`` of all ``S * q`` are real."""

    first: bool  # nothing is stored yet, so attention needs only the model's mask and the new keys
    width: int  # q
    new: list[int]  # real tokens of each sequence
    longest: int  # rows of the longest sequence, including the new ones
    rows: Tensor | None  # [n] which of the S * q rows are real tokens; None: all of them
    slots: Tensor  # [n] their slots: block * page + row in the block
    fresh: Tensor | None  # blocks allocated for this forward pass
    scale: float | None
    mask: Tensor | None = None  # [S, 1, q, longest] bool; None: every query sees every row
    ring: QueryRing | None = None  # where queries are recorded; None: no new token is a decoded one


class Sequences:
    """A batch in blocks, with the shim's ledger and query ring. A sequence is named by its index.

    Args:
        policy: the compression settings.
        layers: ``L``.
        page: rows in a block.
        num_blocks, protected, scorer, backend: see :class:`.KaraCache`.
        ahead: the model's angles, if the policy looks ahead.
    """

    def __init__(
        self,
        policy: Policy,
        layers: int,
        page: int,
        num_blocks: int | None,
        protected: int | Sequence[int] | None,
        *,
        scorer: Callable[..., Tensor] | None,
        ahead: Ahead | None,
        backend: str,
    ) -> None:
        self.policy, self.layers, self.protected = policy, layers, protected
        self.scorer, self.ahead, self.backend = scorer, ahead, backend
        self.blocks = Blocks(page, num_blocks)
        self.ring: QueryRing | None = None
        self.events: list[Compression] = []
        self.seen: list[int] = []  # real tokens of each sequence
        self.logical = 0  # tokens of the batch, padding included
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences. Memory stays allocated."""
        self._begin([])
        self.events.clear()

    @property
    def physical_lengths(self) -> list[int]:
        """Rows that each sequence holds."""
        return [seen - self.ledger.dropped(str(s)) for s, seen in enumerate(self.seen)]

    def plan(self, query: Tensor, mask: Tensor | None, scale: float | None) -> Forward:
        """Computes what the layers of a forward pass share. Lengths change only at its end.

        ``query [S, H*G, q, D]`` of layer 0, ``mask`` from ``kara_mask``, ``scale`` of the logits.
        """
        batch, q, device = query.shape[0], query.shape[2], query.device
        real = None if mask is None else mask[:, 0, -1, -q:]  # [S, q]: which new tokens the last one sees
        new = [q] * batch if real is None else real.sum(1).tolist()
        if min(new) == q:
            real = None
        if self.logical == 0:
            self._begin(self._prompts_of(new))
        if batch != len(self.seen):
            raise ValueError(f"batch size: expected {len(self.seen)} as in the first forward, got {batch}")
        held = self.physical_lengths
        lengths = [have + more for have, more in zip(held, new, strict=True)]
        fresh = self.blocks.reserve(lengths, device)

        count = torch.arange(1, q + 1, device=device) if real is None else real.cumsum(1)
        visible = torch.tensor(held, device=device)[:, None] + count  # [S, q]: rows a token sees
        slots = self.blocks.slots((visible - 1).clamp_(min=0)).flatten()
        rows = None if real is None else real.flatten().nonzero().squeeze(1)
        step = Forward(self.logical == 0, q, new, max(lengths), rows, _take(slots, rows), fresh, scale)
        if not step.first and (q > 1 or len(set(lengths)) > 1):
            step.mask = (torch.arange(max(lengths), device=device) < visible[:, :, None])[:, None]
        ring = self._room(new, query)
        spans = [Span(str(s), self._prompts[s], self.seen[s], count) for s, count in enumerate(new)]
        step.ring = ring if ring is not None and ring.prepare(spans) else None
        return step

    def store(self, step: Forward, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes the new tokens of one layer into its blocks, and the queries of decoded ones into the ring."""
        k, v = (_take(x.transpose(0, 1).flatten(1, 2), step.rows, 1) for x in (key, value))
        self.blocks.write(layer, k, v, step.slots, step.fresh)
        if step.ring is not None:
            step.ring.record(layer, _take(query.transpose(1, 2).flatten(0, 1), step.rows))

    def commit(self, step: Forward) -> None:
        """Ends a forward pass: counts its tokens, then compresses what is due."""
        self.seen = [seen + new for seen, new in zip(self.seen, step.new, strict=True)]
        self.logical += step.width
        while plans := self.ledger.plan(
            Held(str(s), seen, table, first_owned=0)
            for s, (seen, table) in enumerate(zip(self.seen, self.blocks.tables, strict=True))
        ):
            self._compress(plans, step.scale)

    # ------------------------------------------------------------------------------------- before a forward pass

    def _begin(self, prompts: Sequence[int]) -> None:
        """Starts sequences, each with the number of its tokens that are never compressed."""
        if self.ring is not None and prompts and len(prompts) != self.ring.max_sequences:
            self.ring = None  # otherwise new sequences would reuse the rows of earlier ones with the same names
        self.blocks.begin(len(prompts))
        # Every query after the frontier is in the ring, which grows if a forward pass adds many.
        self.ledger = Ledger(self.policy, self.blocks.page, query_rows=2**31 - 1)
        for s, prompt in enumerate(prompts):
            self.ledger.start(str(s), prompt, computed=0)
        self._prompts = list(prompts)
        self.seen, self.logical = [0] * len(prompts), 0

    def _prompts_of(self, new: list[int]) -> list[int]:
        """Prompt lengths. The first forward pass of a batch has ``new`` real tokens of each sequence."""
        batch, protected = len(new), self.protected
        if not any(new):
            raise ValueError("attention_mask: expected a token in the first forward, got only padding")
        if protected is None:
            return new
        if isinstance(protected, int):
            return [protected] * batch
        if len(protected) != batch:
            raise ValueError(f"protected: expected {batch} lengths, one per sequence, got {len(protected)}")
        return list(protected)

    @torch.inference_mode(False)  # a ring created in inference mode cannot be written outside of it
    def _room(self, new: list[int], query: Tensor) -> QueryRing | None:
        """A ring with room for all uncompressed tokens including ``new`` ones, or None if there are none."""
        batch, old = len(new), self.ring
        need = max(self._uncompressed(s, count) for s, count in enumerate(new))
        if not self.policy.query_rows:
            need = min(need, 1)  # the scorer needs no queries
        if need == 0:
            return None
        if old is not None and old.rows >= need and old.max_tokens >= sum(new):
            return old
        rows = max(need, self.policy.query_rows)
        _, heads, _, dim = query.shape
        ring = self.ring = QueryRing(
            self.policy, layers=self.layers, query_heads=heads, kv_heads=heads, head_dim=dim, max_sequences=batch,
            max_tokens=max(batch * rows, sum(new)), dtype=query.dtype, device=query.device, rows=rows,
        )  # fmt: skip
        if old is not None and self.policy.query_rows:
            for s, seen in enumerate(self.seen):
                ring.copy(old, str(s), seen - 1, self._uncompressed(s))
        return ring

    def _uncompressed(self, s: int, new: int = 0) -> int:
        return self.ledger.uncompressed(str(s), self.seen[s] + new)

    # ------------------------------------------------------------------------------------- one compression

    def _compress(self, plans: list[Plan], scale: float | None) -> None:
        """Compresses a window of each plan's sequence in all layers and returns empty blocks."""
        assert self.ring is not None
        began = time.perf_counter()
        lists = execute(
            plans,
            self.blocks.paged,
            self.ring,
            self.policy,
            scale=scale,
            backend=self.backend,
            look_ahead=self.ahead and self.ahead(self.policy.positions_ahead, self.blocks.paged.k[0].device),
            scores=self._scores(plans, self.ring),
        )
        kept = torch.stack(lists).cpu()
        for plan in plans:
            self.ledger.commit(plan)
        self.blocks.shorten({int(plan.request_id): plan.kept_blocks for plan in plans})
        seconds = (time.perf_counter() - began) / len(plans)
        self.events += [Compression.of(plan, keep, seconds=seconds) for plan, keep in zip(plans, kept, strict=True)]

    def _scores(self, plans: list[Plan], ring: QueryRing) -> Tensor | None:
        """The scorer's scores of the windows, float32 ``[L, S, H, W]``. None without a scorer."""
        if self.scorer is None:
            return None
        queries, rows = ring.select(plans)
        assert isinstance(queries, Tensor)
        return self.scorer(
            query=queries.index_select(1, rows.flatten()).unflatten(1, rows.shape),
            k_cache=self.blocks.paged.k,
            v_cache=self.blocks.paged.v,
            block_tables=self.blocks.table([int(plan.request_id) for plan in plans]),
            window_starts=torch.tensor([plan.window_start for plan in plans], dtype=torch.int32, device=rows.device),
            window=self.policy.window,
        )


def _take(rows: Tensor, which: Tensor | None, dim: int = 0) -> Tensor:
    return rows if which is None else rows.index_select(dim, which)
