"""Random paged caches to test against, in memory that can be checked.

Hypothesis draws a `Plan`, which describes the world. `World(plan)` builds it deterministically. Each tensor is a view
inside a larger buffer of random bits, so the bytes around it, between its rows, in other blocks and after the ends of
sequences can be compared afterwards:

    world = World(plan)
    before = world.snapshot()
    ...  # compact world.k_caches and world.v_caches
    world.assert_compacted(before, keep_indices)

passes if the oracle's moves happened and nothing else in memory changed. Keys outside the scored windows are NaN, so
reading one of them shows in the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import oracle
import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Layouts of a pool, as engines allocate them. All but `k_transposed` keep the last dimension's stride at 1.
LAYOUTS = ("NHD", "HND", "stacked", "kv_interleaved", "packed", "cross_layer")
NEEDS_EQUAL_DIMS = ("stacked", "kv_interleaved", "cross_layer")

# Or-ing these bits into a value makes it NaN and leaves the payload's other bits alone.
NAN_BITS = {
    torch.float32: 0x7FC00000,
    torch.float16: 0x7E00,
    torch.bfloat16: 0x7FC0,
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7D,
    torch.float8_e4m3fnuz: 0,  # it has a single NaN pattern
    torch.float8_e5m2fnuz: 0,
    torch.uint8: 0,
    torch.int8: 0,
    torch.float64: 0x7FF8 << 48,
}
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
POISON_IDS = (-1, -(2**31), 2**31 - 1, 2**30)

Keeps = Sequence[Sequence[Sequence[Sequence[int]]]]  # [L][S][H][K]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that NaN payloads compare and copy exactly."""
    return tensor.view(INTEGER[tensor.element_size()])


@dataclass(frozen=True)
class Sequenced:
    """One sequence: `start` tokens, the window, a tail; or one of the two reasons to be skipped.

    `lacking > 0`: the number of tokens missing at the window's end. `overlap > 0`: how far protection reaches past the
    window's start.
    """

    start: int = 0
    tail: int = 0
    lacking: int = 0
    overlap: int = 0

    @property
    def skipped(self) -> bool:
        return self.lacking > 0 or self.overlap > 0

    def length(self, window: int) -> int:
        return max(0, self.start + window - self.lacking) if self.lacking else self.start + window + self.tail


@dataclass(frozen=True)
class Plan:
    """Everything that determines a world. Symbols as in docs/method.md."""

    sequences: tuple[Sequenced, ...] = (Sequenced(),)
    layers: int = 1
    heads: int = 1
    group: int = 1
    window: int = 4
    queries: int = 4
    dim: int = 4
    v_dim: int = 4  # 0: no value cache
    page: int = 2
    layout: str = "NHD"
    dtype: torch.dtype = torch.float32
    query_dtype: torch.dtype = torch.float32
    content: str = "normal"  # or "integers": exact products; or "equal": all keys of a window the same
    k_pad: int = 0
    v_pad: int = 0
    guard: int = 64  # elements before and after each tensor; an odd number misaligns it
    share_prefix: bool = False  # blocks entirely before both windows may belong to two sequences
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        return [sequence.length(self.window) for sequence in self.sequences]


class World:
    """The tensors of a plan. `k_caches`, `v_caches` and `query` are lists with one tensor for each layer."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.buffers: list[torch.Tensor] = []
        self.starts = [sequence.start for sequence in plan.sequences]
        self.lengths = plan.lengths
        protected = [s.start + s.overlap if s.overlap else s.start // 2 for s in plan.sequences]
        facts = zip(self.starts, self.lengths, protected, strict=True)
        self.skipped = [oracle.is_skipped(start, plan.window, length, below) for start, length, below in facts]

        self._make_block_tables()
        self._make_caches()
        self.query = [self._make_query() for _ in range(plan.layers)]
        self.seq_lens = self._int32(self.lengths)
        self.window_starts = self._int32(self.starts)
        self.protected_lens = self._int32(protected)

    # ---- building ----------------------------------------------------------------------------------------

    def _random_bits(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of `shape` into a new buffer full of random bits."""
        count = 1
        for size in shape:
            count *= size
        itemsize = torch.empty((), dtype=dtype).element_size()
        size = (count + 2 * self.plan.guard) * itemsize
        buffer = torch.randint(256, (size,), dtype=torch.uint8, generator=self.generator).view(dtype)
        self.buffers.append(buffer)
        return buffer[self.plan.guard : self.plan.guard + count].view(shape)

    def _int32(self, values: Sequence[int]) -> torch.Tensor:
        tensor = self._random_bits([len(values)], torch.int32)
        return tensor.copy_(torch.tensor(values, dtype=torch.int32))

    def _make_block_tables(self) -> None:
        """Blocks in random order, a few of them unused. Tables are views of one that is full of invalid ids."""
        plan = self.plan
        used = [-(-length // plan.page) for length in self.lengths]
        self.blocks = sum(used) + 1 + self._draw(3)
        order = torch.randperm(self.blocks, generator=self.generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in used]
        if plan.share_prefix:
            for table, start in zip(self.tables[1:], self.starts[1:], strict=True):
                whole = min(start // plan.page, self.starts[0] // plan.page, len(table), len(self.tables[0]))
                table[:whole] = self.tables[0][:whole]

        left, right, width = self._draw(3), self._draw(3), max([1, *used]) + self._draw(2)
        poison = torch.tensor([*POISON_IDS, self.blocks], dtype=torch.int32)
        wide = self._random_bits([len(used), left + width + right], torch.int32)
        wide.copy_(poison[torch.randint(len(poison), wide.shape, generator=self.generator)])
        self.block_tables = wide[:, left : left + width]
        for row, table in zip(self.block_tables, self.tables, strict=True):
            row[: len(table)] = torch.tensor(table, dtype=torch.int32)

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def _make_caches(self) -> None:
        plan = self.plan
        pairs = list(self._allocate_caches())
        self.k_caches = [k for k, _ in pairs]
        self.v_caches = [v for _, v in pairs] if plan.v_dim else None
        for layer, cache in enumerate(self.k_caches):
            bits(cache)[..., 0] |= NAN_BITS[plan.dtype]
            for s, skipped in enumerate(self.skipped):
                if not skipped and plan.dtype.is_floating_point:
                    self.write_keys(layer, s, self._values([plan.window, plan.heads, plan.dim], plan.dtype))

    def _allocate_caches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The key and the value view of each layer."""
        plan = self.plan
        b, p, h, d, v = self.blocks, plan.page, plan.heads, plan.dim, plan.v_dim or plan.dim
        assert d == v or plan.layout not in NEEDS_EQUAL_DIMS
        k_row, v_row = d + plan.k_pad, v + plan.v_pad
        if plan.layout == "cross_layer":
            pool = self._random_bits([b, plan.layers, 2, p, h, k_row], plan.dtype)[..., :d]
            yield from ((pool[:, layer, 0], pool[:, layer, 1]) for layer in range(plan.layers))
            return
        for _ in range(plan.layers):
            match plan.layout:
                case "NHD":
                    k, v_cache = (self._random_bits([b, p, h, row], plan.dtype) for row in (k_row, v_row))
                case "HND":
                    k, v_cache = (
                        self._random_bits([b, h, p, row], plan.dtype).transpose(1, 2) for row in (k_row, v_row)
                    )
                case "stacked":
                    k, v_cache = self._random_bits([2, b, p, h, k_row], plan.dtype).unbind(0)
                case "kv_interleaved":
                    k, v_cache = self._random_bits([b, 2, p, h, k_row], plan.dtype).unbind(1)
                case "packed":
                    k, v_cache = self._random_bits([b, p, h, d + v + plan.k_pad], plan.dtype).tensor_split([d], -1)
                case "k_transposed":
                    k = self._random_bits([b, h, d, p], plan.dtype).permute(0, 3, 1, 2)
                    v_cache = self._random_bits([b, p, h, v_row], plan.dtype)
                case other:
                    raise ValueError(other)
            yield k[..., :d], v_cache[..., :v]

    def _values(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self.plan.content == "integers":
            values = torch.randint(-3, 4, shape, generator=self.generator).float()
        elif self.plan.content == "equal":
            values = torch.randn([1, *shape[1:]], generator=self.generator).expand(*shape)
        else:
            values = torch.randn(shape, generator=self.generator)
        return values.to(dtype)

    def _make_query(self) -> torch.Tensor:
        plan = self.plan
        shape = [len(self.starts), plan.queries, plan.heads * plan.group, plan.dim]
        padded = self._random_bits([*shape[:-1], plan.dim + plan.k_pad], plan.query_dtype)
        return padded[..., : plan.dim].copy_(self._values(shape, plan.query_dtype))

    # ---- reading --------------------------------------------------------------------------------------

    def cells(self, s: int) -> list[oracle.Cell]:
        """The cells of sequence `s`, by physical token."""
        return [oracle.cell_of(self.tables[s], self.plan.page, token) for token in range(self.lengths[s])]

    def window_cells(self, s: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and row of each token of the window, to index a cache with."""
        start = self.starts[s]
        blocks, rows = zip(*self.cells(s)[start : start + self.plan.window], strict=True)
        return torch.tensor(blocks), torch.tensor(rows)

    def read_keys(self, layer: int, s: int) -> torch.Tensor:
        """The window's keys, `[W, H, D]`."""
        cache = self.k_caches[layer]
        return bits(cache)[self.window_cells(s)].view(cache.dtype)

    def read_values(self, layer: int, s: int) -> torch.Tensor:
        """The window's values, `[W, H, Dv]`."""
        cache = self.v_caches[layer]
        return bits(cache)[self.window_cells(s)].view(cache.dtype)

    def give_values(self) -> World:
        """Replaces the random bits of the windows' values by numbers, because some scores use their norms."""
        for cache in self.v_caches or ():
            for s in range(len(self.starts)):
                if not self.skipped[s]:
                    values = self._values([self.plan.window, *cache.shape[2:]], torch.float32).to(cache.dtype)
                    bits(cache)[self.window_cells(s)] = bits(values)
        return self

    def write_keys(self, layer: int, s: int, keys: torch.Tensor) -> None:
        bits(self.k_caches[layer])[self.window_cells(s)] = bits(keys.contiguous())

    def oracle_scores(
        self,
        layer: int,
        s: int,
        *,
        scale: float | None = None,
        k_scale: float = 1.0,
        causal: bool = False,
        reduction: str = "mean",
        value_norm: bool = False,
        redundancy: float = 0.0,
    ) -> list[list[float]]:
        """The scores of one sequence of one layer, `[H][W]`, in float64."""
        plan = self.plan
        values = self.read_values(layer, s).double() if value_norm else None
        query = self.query[layer][s].double().view(plan.queries, plan.heads, plan.group, plan.dim)
        keys = self.read_keys(layer, s).double()
        return [
            oracle.score_window(
                query[:, h].tolist(),
                keys[:, h].tolist(),
                scale=scale,
                k_scale=k_scale,
                causal=causal,
                reduction=reduction,
                values=None if values is None else values[:, h].tolist(),
                redundancy=redundancy,
            )
            for h in range(plan.heads)
        ]

    # ---- checking ----------------------------------------------------------------------------------------

    def snapshot(self) -> list[torch.Tensor]:
        """Every byte of every buffer: caches, queries, tables, lengths and the memory around them."""
        return [buffer.clone() for buffer in self.buffers]

    def assert_untouched(self, before: list[torch.Tensor]) -> None:
        self._assert_equal(before)

    def assert_compacted(self, before: list[torch.Tensor], keep: Keeps) -> list[int]:
        """Checks that the oracle's moves happened and nothing else changed. Returns the new lengths."""
        expected, lengths = self.expected(before, keep)
        self._assert_equal(expected)
        return lengths

    def expected(self, before: list[torch.Tensor], keep: Keeps) -> tuple[list[torch.Tensor], list[int]]:
        """The buffers after compaction with keep lists `[L][S][H][K]`, and the new lengths."""
        plan = self.plan
        after = [buffer.clone() for buffer in before]
        lengths = list(self.lengths)
        for layer, s, h in self._rows():
            cells = {cell: cell for cell in self.cells(s)}
            sources, lengths[s] = oracle.compact(
                cells,
                self.tables[s],
                plan.page,
                self.starts[s],
                self.lengths[s],
                keep[layer][s][h],
                plan.window,
            )
            for cache in self._caches_of(layer):
                old, new = self._moved_to(before, cache), self._moved_to(after, cache)
                for (block, row), (from_block, from_row) in sources.items():
                    if (block, row) != (from_block, from_row):
                        bits(new)[block, row, h] = bits(old)[from_block, from_row, h]
        return after, lengths

    def _rows(self) -> Iterator[tuple[int, int, int]]:
        plan = self.plan
        for layer in range(plan.layers):
            for s in range(len(self.starts)):
                yield from ((layer, s, h) for h in range(plan.heads))

    def _caches_of(self, layer: int) -> list[torch.Tensor]:
        return [self.k_caches[layer], *([self.v_caches[layer]] if self.v_caches else [])]

    def _moved_to(self, buffers: list[torch.Tensor], view: torch.Tensor) -> torch.Tensor:
        """The view into `buffers` that corresponds to `view` into this world's buffers."""
        address = view.untyped_storage().data_ptr()
        [index] = [i for i, own in enumerate(self.buffers) if own.untyped_storage().data_ptr() == address]
        return buffers[index].as_strided(view.size(), view.stride(), view.storage_offset())

    def _assert_equal(self, expected: list[torch.Tensor]) -> None:
        same = [torch.equal(bits(a), bits(b)) for a, b in zip(self.buffers, expected, strict=True)]
        if all(same):
            return
        wrong: list[str] = []
        for layer in range(self.plan.layers):
            for name, cache in zip("kv", self._caches_of(layer), strict=False):
                differs = (bits(cache) != bits(self._moved_to(expected, cache))).any(-1)
                for block, row, h in differs.nonzero().tolist():
                    where = f"{name} of layer {layer}, head {h}: block {block}, row {row}"
                    wrong.append(f"{where} ({self._owner(block, row)})")
        if not wrong:
            wrong = [f"memory outside the caches' rows, buffers {[i for i, ok in enumerate(same) if not ok]}"]
        raise AssertionError("bytes differ from what they must be:\n  " + "\n  ".join(wrong[:20]))

    def _owner(self, block: int, row: int) -> str:
        for s in range(len(self.starts)):
            if (block, row) in self.cells(s):
                return f"token {self.cells(s).index((block, row))} of sequence {s}"
        return "nobody's"


def queries_by_row(world: World) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The world's queries in buffers `[R, H*G, D]` that all sequences share, in any order, and their rows `[S, N]`.

    Unused rows are NaN. The row table is a view of a wider one.
    """
    plan, generator = world.plan, torch.Generator().manual_seed(world.plan.seed)
    count = len(world.starts) * plan.queries
    order = torch.randperm(count + 3, generator=generator)[:count].view(-1, plan.queries)
    buffers = []
    for query in world.query:
        buffers.append(query.new_full((count + 3, *query.shape[2:]), torch.nan))
        buffers[-1][order] = query
    wide = torch.full((len(world.starts), plan.queries + 2), 2**30, dtype=torch.int32)
    wide[:, 1:-1] = order
    return buffers, wide[:, 1:-1]


# ---- strategies ------------------------------------------------------------------------------------------


@st.composite
def sequences(draw: st.DrawFn, window: int, *, explicit_starts: bool, skips: bool) -> Sequenced:
    """One sequence. Without explicit starts the window is the newest tokens, so there is no tail."""
    kind = draw(st.sampled_from(["fits", "fits", "lacking", "overlap"])) if skips else "fits"
    start = draw(st.integers(0, 9))
    tail = draw(st.integers(0, 9)) if explicit_starts else 0
    if kind == "lacking":
        # A default start is seq_len - W, so the window of a short sequence would start below 0.
        start = start if explicit_starts else 0
        return Sequenced(start, lacking=draw(st.integers(1, window)))
    if kind == "overlap":
        return Sequenced(start, tail, overlap=draw(st.integers(1, window + 2)))
    return Sequenced(start, tail)


@st.composite
def plans(
    draw: st.DrawFn,
    *,
    max_layers: int = 1,
    max_window: int = 20,
    dtypes: Sequence[torch.dtype] = FLOATS,
    layouts: Sequence[str] = LAYOUTS,
    contents: Sequence[str] = ("normal", "integers", "equal"),
    explicit_starts: bool = True,
    skips: bool = False,
    latent: bool = False,
    more_queries: bool = True,
) -> Plan:
    """Plans with `S * H <= 4`. `more_queries` allows `N > W`; `latent` allows a world without values."""
    window = draw(st.integers(1, max_window))
    heads, most = draw(st.sampled_from([(1, 4), (2, 2), (1, 1), (3, 1), (4, 1)]))
    count = draw(st.integers(1, most))
    one = sequences(window, explicit_starts=explicit_starts, skips=skips)
    layout = draw(st.sampled_from(layouts))
    dim = draw(st.sampled_from([1, 3, 4, 8, 16]))
    v_dims = [dim] if layout in NEEDS_EQUAL_DIMS else [dim, 1, 5, 8]
    dtype = draw(st.sampled_from(dtypes))
    return Plan(
        sequences=tuple(draw(st.lists(one, min_size=count, max_size=count))),
        layers=draw(st.integers(1, max_layers)),
        heads=heads,
        group=draw(st.integers(1, 3)),
        window=window,
        queries=draw(st.integers(1, window + 3 if more_queries else window)),
        dim=dim,
        v_dim=draw(st.sampled_from([*v_dims, 0] if latent else v_dims)),
        page=draw(st.sampled_from([1, 2, 3, 4, 16])),
        layout=layout,
        dtype=dtype,
        query_dtype=dtype if dtype in FLOATS else draw(st.sampled_from(FLOATS)),
        content=draw(st.sampled_from(contents)),
        k_pad=draw(st.sampled_from([0, 3, 8])),
        v_pad=draw(st.sampled_from([0, 1, 8])),
        guard=draw(st.sampled_from([64, 67])),
        share_prefix=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def keep_lists(plan: Plan, keep: int) -> st.SearchStrategy[list[list[list[list[int]]]]]:
    """Any ascending keep lists `[L][S][H][K]`; all -1 for the sequences the plan marks as skipped."""
    row = st.permutations(range(plan.window)).map(lambda order: sorted(order[:keep]))
    untouched = [[-1] * keep] * plan.heads
    batch = [
        st.just(untouched) if sequence.skipped else st.lists(row, min_size=plan.heads, max_size=plan.heads)
        for sequence in plan.sequences
    ]
    return st.lists(st.tuples(*batch).map(list), min_size=plan.layers, max_size=plan.layers)


# Few enough bit patterns that ties, signed zeros and NaNs with different payloads meet in one row.
SPECIAL_BITS = (
    0x00000000,  # +0
    0x80000000,  # -0
    0x00000001,  # the smallest denormal
    0x80000001,
    0x007FFFFF,  # the largest denormal
    0x7F7FFFFF,  # the largest finite value
    0xFF7FFFFF,
    0x7F800000,  # +inf
    0xFF800000,  # -inf
    0x7FC00000,  # NaN, and others
    0xFFC00000,
    0x7F800001,
    0xFFFFFFFF,
    0x3F800000,  # 1
    0x3F800001,  # the value after 1
    0xBF800000,
)
SCORE_BITS = st.one_of(st.sampled_from(SPECIAL_BITS), st.integers(0, 2**32 - 1))


def score_rows(max_rows: int = 4, max_width: int = 40) -> st.SearchStrategy[torch.Tensor]:
    """Score rows `[R, W]` of any bit patterns, or of a few repeated values."""

    def rows(shape: tuple[int, int], patterns: st.SearchStrategy[int]) -> st.SearchStrategy[torch.Tensor]:
        count = shape[0] * shape[1]
        return st.lists(patterns, min_size=count, max_size=count).map(lambda drawn: from_bits(drawn).view(shape))

    shapes = st.tuples(st.integers(1, max_rows), st.integers(1, max_width))
    few = st.sampled_from([0x3F800000, 0x40000000, 0x40400000, 0x00000000, 0x80000000])
    return shapes.flatmap(lambda shape: st.one_of(rows(shape, SCORE_BITS), rows(shape, few)))


def from_bits(patterns: Sequence[int]) -> torch.Tensor:
    signed = [pattern - 2**32 if pattern >= 2**31 else pattern for pattern in patterns]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


HUGE = 2.0**63
HUGE_SCALE = 0.6 * 2.0**-125  # a normal number of float32


def huge_products(plan: Plan) -> World:
    """Products of queries and keys of about 1e39, beyond float32. Times HUGE_SCALE they are moderate logits."""
    world = World(plan)
    for layer, query in enumerate(world.query):
        query.mul_(HUGE)
        for s in range(len(world.starts)):
            world.write_keys(layer, s, world.read_keys(layer, s) * HUGE)
    return world


def assert_scores_of_huge_products(world: World, scores: torch.Tensor, *, scale: float, causal: bool) -> None:
    """Within the bound of the same logits made of moderate queries and keys: those differ by powers of two."""
    for layer, query in enumerate(world.query):
        for s in range(len(world.starts)):
            given = query[s] / HUGE, world.read_keys(layer, s) / HUGE
            how = {"scale": scale * HUGE * HUGE, "causal": causal}
            exact = dense_scores(*given, dtype=torch.float64, **how)  # type: ignore[arg-type]
            bound = allowed_error(*given, exact, **how)  # type: ignore[arg-type]
            assert (scores[layer, s].double() - exact).abs().max() <= bound


# ---- how wrong a float32 score may be --------------------------------------------------------------------


def dense_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    dtype: torch.dtype,
    scale: float | None = None,
    k_scale: float = 1.0,
    causal: bool = False,
    reduction: str = "mean",
    values: torch.Tensor | None = None,
    redundancy: float = 0.0,
) -> torch.Tensor:
    """The obvious torch expression in `dtype`: `query [N, H*G, D]`, `keys`, `values [W, H, D or Dv]` -> `[H, W]`."""
    queries, window, heads, dim = len(query), len(keys), keys.shape[1], keys.shape[2]
    grouped = query.to(dtype).view(queries, heads, -1, dim)
    keys = keys.to(dtype) * k_scale
    logits = torch.einsum("nhgd,whd->hgnw", grouped, keys) * (dim**-0.5 if scale is None else scale)
    if causal:
        visible = torch.ones(queries, window, dtype=torch.bool).tril(window - queries)
        logits = logits.masked_fill(~visible, -torch.inf)
    mass = logits.softmax(-1)
    scores = mass.square().mean((1, 2)).sqrt() if reduction == "rms" else mass.mean((1, 2))
    if values is not None:
        scores = scores * values.to(dtype).norm(dim=-1).t()
    if redundancy:
        unit = torch.nn.functional.normalize(keys, dim=-1, eps=torch.finfo(dtype).tiny)
        cosines = torch.einsum("ihd,jhd->hij", unit, unit)
        scores = scores - redundancy * cosines.mean(1).softmax(-1)
    return scores


def allowed_error(
    query: torch.Tensor,
    keys: torch.Tensor,
    exact: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: float = 1.0,
    causal: bool = False,
    reduction: str = "mean",
    values: torch.Tensor | None = None,
    redundancy: float = 0.0,
) -> float:
    """How far float32 scores may be from `exact`: twice the worst error of the obvious float32 expression.

    That error can be zero by luck on small inputs, so the bound never falls below what a single rounding of a
    logit does to a score, the relative error `eps * sum_d |q_d k_d|`, plus a few roundings of the score.
    """
    options = {"scale": scale, "k_scale": k_scale, "reduction": reduction, "values": values, "redundancy": redundancy}
    plain = dense_scores(query, keys, dtype=torch.float32, causal=causal, **options).double()
    heads, dim = keys.shape[1], keys.shape[2]
    grouped = query.double().view(len(query), heads, -1, dim).abs()
    terms = torch.einsum("nhgd,whd->hgnw", grouped, keys.double().abs())
    largest_logit = float(terms.max()) * abs(k_scale) * (dim**-0.5 if scale is None else abs(scale))
    # Subtracting the redundancy may cancel; what is rounded before that is no larger than this.
    magnitude = float(exact.abs().max()) + redundancy
    # The length of a value is the root of a sum of squares.
    floor = (
        torch.finfo(torch.float32).eps * (8 + largest_logit + (0 if values is None else values.shape[-1])) * magnitude
    )
    return 2 * float((plain - exact).abs().max()) + floor
