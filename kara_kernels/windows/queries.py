"""Records the queries used for scoring. Attention layers write the newest ones of every running sequence into a ring.

Only decoded tokens are recorded, every ``query_stride``-th. Sample ``n`` of a sequence is the query at logical
position ``n * query_stride``, in row ``n % rows``. A ring therefore needs no state, and a sequence that is recomputed
after preemption writes the same rows again. Scoring reads the rows in place.

Before that the same rows may hold queries of a context that the prompt begins with, as evenly spread as they fit. They
rank the rows of the context if it is stored, and are copied for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.pack import pack_queries
from ..packed import PackedQueries
from ..reference.pack import pack_rows, unpacked
from ..values import CONTEXT_QUERIES, check_count
from .plan import Plan
from .policy import KARA, Policy

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max

FORMS = (("all", 2), ("mean", 1), ("mean", 2), ("mean", 4), ("mean", 8))
"""``(query_heads, query_stride)`` by what they lose, least first. ``make quality`` measures it. Memory falls, too."""


class Span(NamedTuple):
    """The tokens of one sequence in a step. Spans are in batch order."""

    request_id: str
    prompt_len: int
    first_position: int
    """Logical position of the first query."""
    num_tokens: int
    context: int = 0
    """Tokens of the context of which queries are recorded, less than ``prompt_len``. The step computes no decoded
    token of this sequence then."""


class QueryRing:
    """Rings of post-RoPE queries for up to ``max_sequences`` running sequences, in one permanent allocation.

    It allocates :attr:`nbytes` once without zeroing, so on a CPU a page uses memory only after it is first written.
    Call ``prepare`` on the host before a step, and ``record`` in each layer of the forward pass. The indices that
    ``record`` reads are at a fixed address, so a captured CUDA graph follows the latest ``prepare``. Call both on one
    stream. The host may then run ahead of it.

    Args:
        policy: stride, rows, whether groups are averaged, and the form of a recorded query.
        layers: ``L``.
        query_heads, kv_heads: ``H*G`` and ``H`` of this worker.
        head_dim: ``D``.
        max_sequences: most sequences that run at once.
        max_tokens: most tokens in one step, padding included.
        dtype, device: of the queries.
        rows: queries recorded per sequence. The default and minimum is ``policy.query_rows``. An engine that may
            reject tokens after their step adds ``policy.spare_rows``, and tells its :class:`Ledger` the smaller number.

    Raises:
        TypeError, ValueError: too few rows; an odd ``head_dim`` with ``query_dtype="int4"``; the ring would be larger
            than ``policy.max_query_gib``.
    """

    def __init__(
        self, policy: Policy, *, layers: int, query_heads: int, kv_heads: int, head_dim: int, max_sequences: int,
        max_tokens: int, dtype: torch.dtype, device: torch.device | str, rows: int | None = None,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.rows = policy.query_rows if rows is None else check_count("rows", rows, policy.query_rows, 2**31 - 1)
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        self._query_heads, self._kv_heads, self._head_dim, self._dtype = query_heads, kv_heads, head_dim, dtype
        heads = policy.recorded_heads(query_heads, kv_heads)
        self._mean = heads < query_heads
        # Queries that are not recorded go to the last row.
        self._trash = max_sequences * self.rows
        self.nbytes = check_ring(policy, layers, heads, head_dim, max_sequences, dtype, self.rows)
        """Bytes of all rings together."""
        self.kv_tokens = self.nbytes / (max_sequences * layers * 2 * kv_heads * head_dim * dtype.itemsize)
        """Tokens whose keys and values, in ``dtype``, take as much memory as one sequence's ring."""
        self._shape = layers, self._trash + 1, heads, head_dim
        self._queries = _room(self._shape, policy.query_dtype, dtype, device)
        self._unpacked: list[tuple[int, Tensor]] = []  # on a CPU: recorded rows and their layers
        self._targets = torch.full((max_tokens,), self._trash, dtype=torch.int64, device=device)
        self._written = 0  # leading targets that may point elsewhere than to the last row
        self._marked = torch.empty(0, dtype=torch.int64)  # on a CPU: tokens of the step that are recorded
        self._contexts: dict[str, int] = {}  # sequences whose rows hold queries of a context, and its tokens
        self._slots: dict[str, int] = {}
        self._free = list(range(max_sequences - 1, -1, -1))

    @property
    def queries(self) -> Tensor | PackedQueries:
        """``[L, R, H*G, D]``: the rows of all sequences, and a last one that takes what is not recorded."""
        self._pack()
        return self._queries

    @property
    def sequences(self) -> int:
        """Sequences that have a ring."""
        return len(self._slots)

    def release(self, request_id: str) -> None:
        """Frees the ring of a sequence that finished, was aborted or was preempted. Unknown names are ignored."""
        slot = self._slots.pop(request_id, None)
        self._contexts.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def prepare(self, spans: Iterable[Span]) -> bool:
        """Sets where the next step's queries go. Returns whether any is recorded.

        Raises ValueError for more tokens, and RuntimeError for more sequences, than the ring was made for. The latter
        means that the engine forgot to release some.
        """
        self._pack()  # what the last step recorded, before the targets change
        stride, rows = self.policy.query_stride, self.rows
        offset = 0
        marks: list[tuple[int, int]] = []
        for request_id, prompt_len, first, count, context in spans:
            if context:
                marks += self._marks_of_context(request_id, first, count, context, offset)
            # Only the newest `rows` samples of a long chunk are kept, and no row may be written twice in one step.
            last_sample = (first + count - 1) // stride
            begin = max(first, prompt_len, (last_sample - rows + 1) * stride)
            sample = -(-begin // stride)
            if sample <= last_sample and self.policy.query_rows:
                base = self._slot(request_id) * rows
                self._contexts.pop(request_id, None)
                marks += [(offset + n * stride - first, base + n % rows) for n in range(sample, last_sample + 1)]
            offset += count
        if offset > len(self._targets):
            raise ValueError(f"spans: expected at most {len(self._targets)} tokens in one step, got {offset}")
        end = marks[-1][0] + 1 if marks else 0
        # Tokens after the last mark are padding, or left over from a longer step.
        targets = [self._trash] * max(end, self._written)
        for at, row in marks:
            targets[at] = row
        if targets:
            # New memory for every step, because the stream may not have finished the previous copy.
            self._targets[: len(targets)].copy_(staged(targets, torch.int64, self._targets.device), non_blocking=True)
        self._written = end
        if self._targets.device.type == "cpu":
            self._marked = torch.tensor([at for at, _ in marks], dtype=torch.int64)
        return bool(marks)

    def _marks_of_context(
        self, request_id: str, first: int, count: int, context: int, offset: int
    ) -> list[tuple[int, int]]:
        """Tokens of the step whose queries of a context are recorded, and their rows."""
        stride, samples = spread(context, self.rows)
        begin, end = (min(computed // stride, samples) for computed in (first, first + count))
        if begin < end:
            self._contexts[request_id] = context
        return [
            (offset + (n + 1) * stride - 1 - first, self._slot(request_id) * self.rows + n) for n in range(begin, end)
        ]

    def warm_up(self) -> None:
        """Compiles what ``record`` launches. Call it before the first step."""
        query = torch.zeros(1, self._query_heads, self._head_dim, dtype=self._dtype, device=self._targets.device)
        self.record(0, query)

    def record(self, layer: int, query: Tensor) -> None:
        """Writes the queries ``[T, H*G, D]`` of one layer, padding included, to the rows set by ``prepare``."""
        if self._mean:
            query = query.unflatten(1, (self._kv_heads, -1)).mean(2)
        rows = self._targets[: query.shape[0]]
        if isinstance(self._queries, PackedQueries):
            if query.device.type == "cpu":  # a layer at a time, small operations would take longer than its attention
                self._unpacked.append((layer, query[self._marked]))
            else:
                pack_queries(query, out=self._queries.layer(layer), rows=rows)
        elif self._queries.dtype == FP8:
            query = query.clamp(-_LARGEST, _LARGEST).to(FP8)  # beyond the largest, older PyTorch makes NaN
            self._queries[layer].view(torch.uint8).index_copy_(0, rows, query.view(torch.uint8))
        else:
            self._queries[layer].index_copy_(0, rows, query)

    def _pack(self) -> None:
        """Packs what a CPU has recorded since the last call."""
        if self._unpacked:
            layers, rows = zip(*self._unpacked, strict=True)
            self._unpacked = []
            packed, places = pack_rows(torch.stack(rows)), self._targets[self._marked]
            for mine, new in zip(_parts(self._queries), packed, strict=True):
                mine[torch.tensor(layers)[:, None], places] = new

    def copied(self, request_id: str, last: int, count: int) -> Tensor:
        """``[L, N, H*G, D]`` in the dtype of the queries: the samples of :meth:`rows_of`."""
        if not count:
            return self.blank[:, :0]
        rows = upload(self.rows_of(request_id, last, count), torch.int64, self._targets.device)
        held = self.queries
        if isinstance(held, PackedQueries):
            return unpacked(PackedQueries(*(part.index_select(1, rows) for part in held))).to(self._dtype)
        (codes,) = _parts(held)
        return codes.index_select(1, rows).view(held.dtype).to(self._dtype)

    def rows_of(self, request_id: str, last: int, count: int) -> list[int]:
        """Rows of ``queries`` that hold the ``count`` samples of a sequence up to number ``last``, oldest first.

        Raises KeyError for a sequence without recorded queries.
        """
        base = self._slots[request_id] * self.rows
        return [base + sample % self.rows for sample in range(last - count + 1, last + 1)]

    @property
    def blank(self) -> Tensor:
        """``[L, 1, H*G, D]`` zeros, as :meth:`of_context` returns queries."""
        layers, _, heads, dim = self._shape
        return torch.zeros(layers, 1, heads, dim, dtype=self._dtype, device=self._targets.device)

    def of_context(self, request_id: str, context: int, computed: int) -> Tensor | None:
        """A copy ``[L, N, H*G, D]`` of the queries of a context, oldest first, without those of its first ``computed``
        tokens. Where groups are averaged, heads are KV heads. None: they were not recorded, or decoded tokens have
        taken their rows."""
        stride, samples = spread(context, self.rows)
        begin = computed // stride
        if self._contexts.get(request_id) != context or begin >= samples:
            return None
        base = self._slots[request_id] * self.rows
        if isinstance(self.queries, PackedQueries):
            held = PackedQueries(*(part[:, base + begin : base + samples] for part in self.queries))
            return unpacked(held).to(self._dtype)
        return self.queries[:, base + begin : base + samples].to(self._dtype, copy=True)

    def select(self, plans: Sequence[Plan]) -> tuple[Tensor | PackedQueries, Tensor]:
        """``(queries [L, R, H*G, D], rows int32 [S, N])`` for plans with the same ``num_queries``, oldest query first.

        No query is copied: :func:`kara_kernels.compress_window` takes the rows as ``query_rows``.
        """
        rows = [self.rows_of(plan.request_id, plan.last_query, plan.num_queries) for plan in plans]
        return self.queries, upload(rows, torch.int32, self._targets.device)

    def copy(self, other: QueryRing, request_id: str, last: int, count: int) -> None:
        """Copies ``count`` samples of a sequence, up to number ``last``, from a ring with another number of rows."""
        if count:
            self._slot(request_id)
            to, rows = (
                upload(ring.rows_of(request_id, last, count), torch.int64, ring._targets.device)
                for ring in (self, other)
            )
            for mine, others in zip(_parts(self.queries), _parts(other.queries), strict=True):
                mine.index_copy_(1, to, others.index_select(1, rows))

    def _slot(self, request_id: str) -> int:
        slot = self._slots.get(request_id)
        if slot is None:
            if not self._free:
                raise RuntimeError(
                    f"query ring: expected at most {len(self._slots)} sequences at once, got {request_id} as one more"
                )
            slot = self._slots[request_id] = self._free.pop()
        return slot


def spread(context: int, rows: int) -> tuple[int, int]:
    """``(stride, samples)``: of a context, the last of every ``stride`` queries is recorded, as rows allow."""
    stride = -(-context // max(1, min(rows, CONTEXT_QUERIES)))
    return stride, min(rows, context // stride)


def ring_bytes(
    policy: Policy, layers: int, heads: int, head_dim: int, max_sequences: int, dtype: torch.dtype,
    rows: int | None = None,
) -> int:  # fmt: skip
    """Bytes of a :class:`QueryRing` that records ``heads`` heads: query heads, or KV heads if groups are averaged."""
    rows = policy.query_rows if rows is None else rows
    size = {"int4": head_dim // 2 + 2, "fp8": head_dim, "auto": head_dim * dtype.itemsize}[policy.query_dtype]
    return layers * (max_sequences * rows + 1) * heads * size


def check_ring(
    policy: Policy, layers: int, heads: int, head_dim: int, max_sequences: int, dtype: torch.dtype, rows: int
) -> int:
    """The bytes of :func:`ring_bytes`. Raises ValueError if they exceed ``max_query_gib``."""
    nbytes = ring_bytes(policy, layers, heads, head_dim, max_sequences, dtype, rows)
    if nbytes > policy.max_query_gib * 2**30:
        raise ValueError(
            f"max_query_gib: expected a query ring of at most {policy.max_query_gib} GiB, got {nbytes / 2**30:.2f} for "
            f"{max_sequences} sequences ({rows} queries of {heads} heads of {head_dim} in {layers} layers each): raise "
            f"query_stride or max_query_gib, set query_heads to 'mean', or let fewer sequences run at once"
        )
    return nbytes


def fit_queries(
    policy: Policy, layers: int, query_heads: int, kv_heads: int, head_dim: int, max_sequences: int, dtype: torch.dtype,
    drafts: int = 0,
) -> Policy:  # fmt: skip
    """The policy with the form of :data:`FORMS` whose ring is within ``max_query_gib`` and loses least.

    The first form is what the policy itself says. If none fits, or the scorer is not Kara's, the policy stays as it is,
    and a ring that does not fit is refused. ``drafts``: tokens of a step that may be rejected.
    """
    if policy.scorer != KARA:  # methods of others are as they were published
        return policy
    most = 1 if policy.attention == "causal" else policy.window
    for heads, stride in ((policy.query_heads, policy.query_stride), *FORMS):
        form = replace(policy, query_heads=heads, query_stride=min(stride, most))
        recorded = form.recorded_heads(query_heads, kv_heads)
        rows = form.query_rows + form.spare_rows(drafts)
        if ring_bytes(form, layers, recorded, head_dim, max_sequences, dtype, rows) <= policy.max_query_gib * 2**30:
            return form
    return policy


def _room(shape: tuple[int, ...], form: str, dtype: torch.dtype, device: torch.device | str) -> Tensor | PackedQueries:
    if form == "int4":
        if shape[-1] % 2:
            raise ValueError(f"query_dtype: expected 'fp8' or 'auto' for an odd head dimension, got D = {shape[-1]}")
        return PackedQueries.empty(*shape, device=device)
    return torch.empty(shape, dtype=FP8 if form == "fp8" else dtype, device=device)


def _parts(queries: Tensor | PackedQueries) -> tuple[Tensor, ...]:
    """Tensors ``[L, R, ...]`` that can be indexed."""
    if isinstance(queries, PackedQueries):
        return tuple(queries)
    return (queries.view(torch.uint8) if queries.dtype == FP8 else queries,)


def staged(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values on the host that can be copied without waiting. Pinned memory is not reused before the copy is done."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def upload(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies values to ``device`` without waiting. ``torch.tensor(..., device=...)`` and list indices would wait."""
    return staged(values, dtype, device).to(device, non_blocking=True)
