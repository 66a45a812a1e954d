"""The shim inside a small serving engine that is checked after every step. Hypothesis drives it.

Scheduler, block pool and prefix cache behave like vLLM's. Full blocks are hashed by the tokens up to their end when
they are allocated. Freed blocks can be found until they are reused, and other requests take them with one more
reference. Prompts are computed in chunks. A request that finds no block preempts the newest one, which is recomputed
later.

The cache contents are modelled: for every block, row, layer and head, the model knows *which token of which text* is
there. With `tensors` the shim's own `execute` moves rows of real pools that encode the same. In addition to the ledger
under test, every request has a second one: the logical positions that its rows must hold.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from recorded import as_recorded, held

from kara_kernels import PagedCache
from kara_kernels.engine import Held, Ledger, PackedCache, Plan, Policy, QueryRing, Span, execute

LAYERS, HEADS, GROUP, DIM, V_DIM = 2, 2, 2, 4, 3
GARBAGE = 0  # the contents of a row that was never written
MAX_TEXT = 4096

Text = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of one engine: the policy, and the sizes of memory and steps."""

    policy: Policy
    page: int
    blocks: int
    budget: int = 16  # tokens in one step
    max_running: int = 4
    tensors: str = ""  # "strided" or "packed" pools; "": none, and keep lists are drawn
    widest: int  # the largest window that a request may ask for


@dataclass(eq=False)
class Request:
    name: str
    prompt_len: int
    text: list[int]
    limit: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    # What the shim's ledger must agree with.
    rows: list[list[int]] = field(default_factory=list)  # per (layer, head): logical position of every row
    looked_at: set[int] = field(default_factory=set)  # positions that a window has judged
    looked_at_twice: list[set[int]] = field(default_factory=list)  # per (layer, head)
    frontier: int = 0
    squeezed: int = 0  # rows before it were judged twice, or never
    windows: int = 0
    dropped: int = 0
    compress: bool = True
    own: bool = False  # it asked for its own window or keep
    window: int = 0
    keep: int = 0
    guarded: int | None = None  # keep of the next window, from the guard
    stopped: bool = False  # by the guard
    away: int = 0  # tokens of its context without rows, when it was admitted
    came: int = 0  # rows that it was admitted with, out of a context with fewer rows than tokens
    loads: bool = False  # in this step
    recorded: list[int] = field(default_factory=list)  # positions whose queries the ring has seen

    def restart(self, lists: int) -> None:
        self.computed, self.blocks, self.frontier, self.windows, self.dropped = 0, [], self.prompt_len, 0, 0
        self.rows, self.looked_at, self.recorded = [[] for _ in range(lists)], set(), []
        self.looked_at_twice, self.squeezed = [set() for _ in range(lists)], 0
        self.guarded, self.stopped, self.away, self.came, self.loads = None, False, 0, 0, False

    @property
    def decodes(self) -> bool:
        """Whether the prompt, or everything to be recomputed, has been computed."""
        return self.computed >= self.prompt_len and len(self.text) - self.computed == 1

    @property
    def length(self) -> int:
        return len(self.rows[0])


class Pool:
    """Blocks with reference counts, a free queue, and the prefix cache's hash table."""

    def __init__(self, blocks: int) -> None:
        self.refs = [0] * blocks
        self.keys: list[Text | None] = [None] * blocks
        self.found: dict[Text, list[int]] = {}
        self.free = OrderedDict.fromkeys(range(blocks))

    def take(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.evict(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        self.free.pop(block, None)
        self.refs[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self.refs[block] > 0, f"block {block} freed twice"
            self.refs[block] -= 1
            if not self.refs[block]:
                self.free[block] = None

    def hash(self, block: int, key: Text) -> None:
        if self.keys[block] is None:
            self.keys[block] = key
            self.found.setdefault(key, []).append(block)

    def evict(self, block: int) -> None:
        key, self.keys[block] = self.keys[block], None
        if key is not None:
            self.found[key].remove(block)
            if not self.found[key]:
                del self.found[key]


class Pools:
    """Real pools of all layers, `[B, P, H, D]` inside, whose rows encode token, layer and head."""

    def __init__(self, setup: Setup) -> None:
        torch.manual_seed(setup.blocks)
        shape = setup.blocks, setup.page, HEADS
        self.packed: list[torch.Tensor] = []
        self.k = [torch.zeros(*shape, DIM) for _ in range(LAYERS)]
        self.v = [torch.zeros(*shape, V_DIM) for _ in range(LAYERS)]
        self.cache: PagedCache | PackedCache
        if setup.tensors == "strided":
            # Heads outermost within a block, as many engines have it.
            self.k = [k.transpose(1, 2).contiguous().transpose(1, 2) for k in self.k]
            self.cache = PagedCache(self.k, self.v)
        else:
            ks, vs = setup.page * HEADS * DIM, setup.page * HEADS * V_DIM
            places = torch.randperm(ks + vs + 5)
            self.k_at, self.v_at = places[:ks].view(-1, HEADS, DIM), places[ks : ks + vs].view(-1, HEADS, V_DIM)
            self.packed = [torch.full((setup.blocks, len(places)), -7.0) for _ in range(LAYERS)]
            self.padding = places[ks + vs :]
            self.cache = PackedCache(self.packed, self.k_at, self.v_at)
        nowhere = torch.full(shape, GARBAGE)
        for layer in range(LAYERS):
            self.write(layer, slice(None), slice(None), nowhere)

    def write(self, layer: int, block: int | slice, row: int | slice, contents: torch.Tensor) -> None:
        k, v = self.encode(layer, contents)
        if not self.packed:
            self.k[layer][block, row], self.v[layer][block, row] = k, v
            return
        for at, values in ((self.k_at, k), (self.v_at, v)):
            self.packed[layer][block, at[row]] = values

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.packed:
            return self.k[layer], self.v[layer]
        assert bool((self.packed[layer][:, self.padding] == -7).all()), "elements outside the rows were written"
        return self.packed[layer][:, self.k_at], self.packed[layer][:, self.v_at]

    @staticmethod
    def encode(layer: int, contents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[..., H]` ids as keys and values that differ by token, layer and head."""
        head = torch.arange(HEADS).expand_as(contents) + layer * HEADS
        k = torch.stack([contents, head, contents * 37 % 11 / 4, contents * 17 % 7 / 4], -1)
        v = torch.stack([contents, head + 100, -contents], -1)
        return k.float(), v.float()


class Engine:
    """See the module docstring. `events` counts what happened, so that a test knows what it covered."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.policy, self.page = setup, setup.policy, setup.page
        self.lists = LAYERS * HEADS if setup.tensors else 2
        self.pool = Pool(setup.blocks)
        nothing = (GARBAGE,) * self.lists
        self.cells = {(b, r): nothing for b in range(setup.blocks) for r in range(setup.page)}
        self.ids: dict[Text, int] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.count = 0
        self.steps = 0
        self.events: Counter[str] = Counter()
        rows = replace(setup.policy, window=setup.widest).query_rows
        self.ledger = Ledger(setup.policy, setup.page, query_rows=rows)
        self.ring = QueryRing(
            setup.policy, layers=LAYERS, query_heads=HEADS * GROUP, kv_heads=HEADS, head_dim=DIM,
            max_sequences=setup.max_running, max_tokens=setup.budget + 3, dtype=torch.float32, device="cpu", rows=rows,
        )  # fmt: skip
        self.pools = Pools(setup) if setup.tensors else None

    # ---- what users do ------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        return self.running + self.waiting

    @property
    def longest(self) -> int:
        """The number of tokens that fit into the pool for a single request."""
        return (self.setup.blocks - 1) * self.page

    def add(self, prompt: Sequence[int], decode: int, own: dict[str, int] | None) -> None:
        """A request with settings of its `own`, or one that is never compressed (None)."""
        prompt = list(prompt)[: self.longest - 2]
        request = Request(str(self.count), len(prompt), prompt, min(len(prompt) + decode, self.longest))
        request.compress = own is not None
        request.window, request.keep = self.policy.window, self.policy.keep
        for name, value in (own or {}).items():
            setattr(request, name, value)
        request.own = (request.window, request.keep) != (self.policy.window, self.policy.keep)
        request.restart(self.lists)
        self.count += 1
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        self.events["abort"] += 1
        self._leave(request)
        self.ring.release(request.name)

    # ---- one step -----------------------------------------------------------------------------------------

    def step(self, rng: random.Random) -> None:
        held = self._held(rng)
        plans = self.ledger.plan(held)
        self._check_round(held, plans)
        for plan in plans:
            self._commit(plan, self.policy.tail, urgent=False)
        plans += self._relieve(held, {plan.request_id for plan in plans}, rng)
        self.steps += 1
        scheduled, preempted = self._schedule()
        # A request that was preempted in this step has lost its blocks. Its plan does no harm either way.
        lost = {request.name for request in preempted}
        executed = [plan for plan in plans if plan.request_id not in lost or rng.random() < 0.5]
        self.events["preempted in the step of its plan"] += len(lost & {plan.request_id for plan in plans})
        self._execute(executed, rng)
        self._guard(executed, rng)
        for name in lost:
            self.ring.release(name)
        self._load(scheduled)
        rng.shuffle(scheduled)
        self._forward(scheduled)
        for request, _ in scheduled:
            if request.computed == len(request.text):
                request.text.append(rng.randrange(2))
                if len(request.text) >= request.limit:
                    self.events["finish"] += 1
                    self._leave(request)
                    self.ring.release(request.name)
        self.check()

    def _kept(self, request: Request) -> int:
        """Tokens of its next window that stay."""
        return request.keep if request.guarded is None else request.guarded

    def _guard(self, executed: list[Plan], rng: random.Random) -> None:
        """Workers say, perhaps later, how many tokens a window needed. The sequence may be gone by then."""
        low = self.policy.min_keep or max(1, self.policy.keep // 2)
        for plan in executed:
            if rng.random() < 0.3:
                continue
            needed = rng.randint(1, plan.window)
            self.ledger.observe(plan.request_id, needed)
            found = [request for request in self.running if request.name == plan.request_id]
            for request in found if self.policy.max_loss is not None else []:
                if not request.own:
                    request.stopped |= needed > self.policy.most_keep
                    request.guarded = max(low, needed)
                    self.events["stopped by the guard"] += request.stopped
                    self.events["kept what the guard asked for"] += not request.stopped

    def _relieve(self, held: list[Held], planned: set[str], rng: random.Random) -> list[Plan]:
        """Sometimes blocks are short, and more sequences are compressed, but no more than it takes."""
        short = rng.choice([0, 0, 0, 0, 0, 0, 1, 3])
        if not short:
            return []
        tail = self.policy.least_tail
        before = {sequence.request_id: self._uncompressed(sequence.request_id) for sequence in held}
        urgent = self.ledger.relieve(held, short)
        names = [plan.request_id for plan in urgent]
        assert len(set(names)) == len(names)
        assert not planned & set(names)
        again = [plan.window_start < self._named(plan.request_id).frontier for plan in urgent]
        assert again == sorted(again), "survivors before a window"
        keys = [before[name] for name in names[: again.count(False)]]
        assert keys == sorted(keys, reverse=True)
        freed = [len(plan.freed) for plan in urgent]
        assert sum(freed[:-1]) < short
        if sum(freed) < short:  # nobody is left who would free a block
            for name in set(before) - planned - set(names):
                request = self._named(name)
                window, keep = request.window, self._kept(request)
                if self._yields(request):
                    window, keep = self._least(request, before[name] - tail)
                kept = -(-(request.length - window + keep) // self.page)
                frees = len(request.blocks) > kept and before[name] >= window + tail + self.page
                frees |= self._squeezable(request)
                assert (
                    not frees
                    or not request.compress
                    or request.stopped
                    or len(request.recorded) < self._judges_of(request)
                )
        for plan in urgent:
            self._commit(plan, tail, urgent=True)
        self.events["urgent compression"] += len(urgent)
        self.events["urgent compression of a shorter tail"] += sum(
            plan.physical_len - plan.window_start < plan.window + self.policy.tail for plan in urgent
        )
        self.events["urgent compression of survivors"] += sum(again)
        self.events["urgent compression of a smaller window"] += sum(
            plan.window < self.policy.window and not self._named(plan.request_id).own for plan in urgent
        )
        return urgent

    def _yields(self, request: Request) -> bool:
        return not request.own and self.policy.max_loss is None

    def _least(self, request: Request, available: int) -> tuple[int, int]:
        """Window and keep under pressure, by how many tokens there are."""
        policy = self.policy
        if available >= request.window:
            return request.window, policy.least_keep
        return policy.least_window, max(1, policy.least_keep * policy.least_window // policy.window)

    def _protected(self, request: Request) -> int:
        """Rows that are never compressed: of the prompt, or those that the request was admitted with."""
        return max(max(request.prompt_len, self.policy.protected) - request.away, request.came)

    def _squeezable(self, request: Request) -> bool:
        """Whether compressing survivors once more would free a block."""
        start = max(request.squeezed, self._first_owned(request) * self.page, self._protected(request))
        window, _ = self._least(request, request.frontier - start)
        keep = max(1, window * self.policy.least_keep // self.policy.keep)
        freed = len(request.blocks) - -(-(request.length - window + keep) // self.page)
        allowed = self._yields(request) and self.policy.attention != "causal"
        return allowed and request.frontier - start >= window > keep and freed > 0

    def _held(self, rng: random.Random) -> list[Held]:
        held = []
        for request in self.running:
            if not request.decodes or rng.random() < 0.1:  # the rest of them: a token in flight
                continue
            held.append(Held(request.name, request.computed, list(request.blocks), self._first_owned(request)))
        rng.shuffle(held)
        return held

    def _first_owned(self, request: Request) -> int:
        first = len(request.blocks)
        while first and self.pool.refs[request.blocks[first - 1]] == 1:
            first -= 1
        return first

    def _named(self, name: str) -> Request:
        [request] = [request for request in self.running if request.name == name]
        return request

    def _commit(self, plan: Plan, tail: int, urgent: bool) -> None:
        """The scheduler's side of a compression. The cache is not touched yet."""
        request = self._named(plan.request_id)
        self._check_plan(plan, request, tail, urgent)
        for block in plan.touched:
            self.pool.evict(block)
        for row in range(plan.window_start, plan.new_len):
            block = request.blocks[row // self.page]
            assert self.pool.refs[block] == 1, f"block {block} is shared and would be rewritten"
            assert self.pool.keys[block] is None, f"block {block} would be rewritten, its hash is alive"
        assert all(self.pool.keys[block] is None for block in plan.freed)
        self.ledger.commit(plan)
        self.events["compression"] += 1
        self.events["blocks freed"] += len(plan.freed)
        self.events["compression behind fewer rows than tokens"] += request.away > 0
        self.events["window behind shared blocks"] += plan.window_start > request.frontier
        # The second ledger drops positions in _execute, once the keep lists are known.
        window = request.rows[0][plan.window_start : plan.window_start + plan.window]
        if plan.window_start < request.frontier:
            request.squeezed = plan.window_start + plan.keep
            request.frontier -= plan.window - plan.keep
            for twice, rows in zip(request.looked_at_twice, request.rows, strict=True):
                twice |= set(rows[plan.window_start : plan.window_start + plan.window])
        else:
            request.frontier = plan.window_start + plan.keep
            self.events["urgent compression to fewer tokens"] += urgent and plan.keep * request.window < (
                request.keep * plan.window
            )
        request.windows += 1
        request.dropped += plan.window - plan.keep
        request.looked_at |= set(window)
        del request.blocks[plan.kept_blocks :]
        self.pool.give_back(plan.freed)

    def _schedule(self) -> tuple[list[tuple[Request, int]], list[Request]]:
        budget = self.setup.budget
        scheduled: list[tuple[Request, int]] = []
        preempted: list[Request] = []
        for request in list(self.running):
            count = min(len(request.text) - request.computed, budget)
            while request in self.running and count:
                if self._allocate(request, count):
                    scheduled.append((request, count))
                    budget -= count
                    break
                preempted.append(self._preempt())
        while self.waiting and not preempted and budget and len(self.running) < self.setup.max_running:
            request = self.waiting[0]
            hits = self._hits(request)
            tokens, rows = self._context(request, len(hits) * self.page)
            if tokens:
                hits = []
            self.ledger.admit(request.name, tokens - rows)
            computed = tokens or len(hits) * self.page
            count = min(len(request.text) - computed, budget)
            idle = sum(not self.pool.refs[block] for block in hits)
            missing = -(-(computed - (tokens - rows) + count) // self.page) - len(hits)
            if missing > len(self.pool.free) - idle:
                self.ledger.admit(request.name, 0)
                break
            self.waiting.remove(request)
            self.running.append(request)
            for block in hits:
                self.pool.share(block)
            request.blocks = hits
            request.computed = computed
            request.rows = [list(range(computed)) for _ in range(self.lists)]
            self.events["prefix hit"] += bool(hits)
            self.events["decoded text from the prefix cache"] += request.computed > request.prompt_len
            if request.compress:
                own = {x: getattr(request, x) for x in ("window", "keep")}
                own = {x: value for x, value in own.items() if value != getattr(self.policy, x)}
                self.ledger.start(request.name, request.prompt_len, request.computed, **own)
            assert self._allocate(request, count)
            if tokens:
                self._admit(request, rows)
            scheduled.append((request, count))
            budget -= count
        self.events["chunk"] += sum(request.computed + count < len(request.text) for request, count in scheduled)
        return scheduled, preempted

    def _context(self, request: Request, hit: int) -> tuple[int, int]:
        """Tokens and rows of the stored context that a request begins with. Every fourth has one, some only of a part
        that the prefix cache has, too, and does not need. One that was preempted may go on with what it decoded."""
        rng = random.Random(f"{request.name} {self.steps}")
        known = request.prompt_len if rng.random() < 0.5 else len(request.text)  # longer: it was preempted
        if int(request.name) % 4 or known < 3:
            return 0, 0
        tokens = rng.randint(2, known - 1)
        return (tokens, rng.randint(1, tokens - 1)) if tokens > hit else (0, 0)

    def _admit(self, request: Request, count: int) -> None:
        """With other rows in each list, in any order."""
        rng = random.Random(f"{request.name} {count}")
        request.rows = [rng.sample(range(request.computed), count) for _ in range(self.lists)]
        request.came, request.away = count, request.computed - count
        request.dropped = request.away
        request.frontier, request.loads = max(request.frontier, request.computed) - request.away, True
        self.events["fewer rows than tokens, of those that were decoded"] += request.computed > request.prompt_len
        self.events["fewer rows than tokens"] += 1
        self.events["fewer rows than tokens, never compressed"] += not request.compress

    def _hits(self, request: Request) -> list[int]:
        """Blocks that already hold the first tokens. At least one token is left to compute."""
        hits: list[int] = []
        for end in range(self.page, len(request.text), self.page):
            if (blocks := self.pool.found.get(tuple(request.text[:end]))) is None:
                break
            hits.append(blocks[0])
        return hits

    def _allocate(self, request: Request, count: int) -> bool:
        rows = request.computed - self.ledger.dropped(request.name) + count
        missing = -(-rows // self.page) - len(request.blocks)
        if missing > len(self.pool.free):
            return False
        request.blocks += [self.pool.take() for _ in range(missing)]
        for block in request.blocks[(rows - count) // self.page :]:
            assert self.pool.refs[block] == 1, f"block {block} is shared and about to be written"
        if not self.ledger.dropped(request.name):  # compressed content is never hashed again
            for i in range((request.computed + count) // self.page):
                self.pool.hash(request.blocks[i], tuple(request.text[: (i + 1) * self.page]))
        return True

    def _preempt(self) -> Request:
        request = self.running.pop()
        self.events["preemption"] += 1
        self.events["preemption of a compressed sequence"] += request.windows > 0
        self.pool.give_back(request.blocks[::-1])
        self.ledger.forget(request.name)
        request.restart(self.lists)
        self.waiting.insert(0, request)
        return request

    def _leave(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            self.pool.give_back(request.blocks[::-1])
        else:
            self.waiting.remove(request)
        self.ledger.forget(request.name)

    # ---- the worker ---------------------------------------------------------------------------------------

    def _load(self, scheduled: list[tuple[Request, int]]) -> None:
        """Rows of requests that are admitted with fewer than tokens. Their blocks may be those of a plan."""
        for request, _ in scheduled:
            if not request.loads:
                continue
            request.loads = False
            for row, cell in enumerate(self._cells(request.blocks, request.length)):
                self.cells[cell] = tuple(self._id(request.text[: rows[row] + 1]) for rows in request.rows)
                if self.pools is not None:
                    for layer, contents in enumerate(torch.tensor(self.cells[cell]).view(LAYERS, HEADS)):
                        self.pools.write(layer, *cell, contents)

    def _execute(self, plans: list[Plan], rng: random.Random) -> None:
        """Moves rows in the model and in the pools, and updates the second ledger."""
        sizes = [(plan.window, plan.keep) for plan in plans]
        self.events["several settings in one step"] += len(set(sizes)) > 1
        if self.pools is None:
            keeps = [[sorted(rng.sample(range(w), k)) for _ in range(self.lists)] for w, k in sizes]
        else:
            self._check_queries(plans)
            kept = execute(plans, self.pools.cache, self.ring, self.policy, backend="torch")
            keeps = [keep.flatten(0, 1).tolist() for keep in kept]
        running = {request.name: request for request in self.running}
        for plan, keep, (window, count) in zip(plans, keeps, sizes, strict=True):
            start, length = plan.window_start, plan.physical_len
            for i, of_list in enumerate(keep):
                assert of_list == sorted(set(of_list)), "kept rows must be distinct and ascend"
                assert len(of_list) == count
                own = {cell: self.cells[cell][i] for cell in self._cells(plan.blocks, length)}
                after, new_len = oracle.compact(own, plan.blocks, self.page, start, length, of_list, window)
                assert new_len == plan.new_len
                for cell, content in after.items():
                    mixed = list(self.cells[cell])
                    mixed[i] = content
                    self.cells[cell] = tuple(mixed)
                if plan.request_id in running:
                    rows = running[plan.request_id].rows
                    chosen = [rows[i][start + j] for j in of_list]
                    rows[i] = rows[i][:start] + chosen + rows[i][start + window :]

    def _cells(self, blocks: Sequence[int], length: int) -> Iterator[oracle.Cell]:
        return (oracle.cell_of(blocks, self.page, row) for row in range(length))

    def _forward(self, scheduled: list[tuple[Request, int]]) -> None:
        """Every layer writes the new rows through the block table, and records queries."""
        codes: list[int] = []
        spans = []
        for request, count in scheduled:
            first = request.computed
            spans.append(Span(request.name, request.prompt_len, first, count))
            for position in range(first, first + count):
                slot = position - self.ledger.dropped(request.name)
                block, row = oracle.cell_of(request.blocks, self.page, slot)
                content = self._id(request.text[: position + 1])
                self.cells[block, row] = (content,) * self.lists
                for rows in request.rows:
                    rows.append(position)
                if self.pools is not None:
                    for layer in range(LAYERS):
                        self.pools.write(layer, block, row, torch.full((HEADS,), content))
                codes.append(self._query_code(request.name, position))
                if position >= request.prompt_len and position % self.policy.query_stride == 0:
                    request.recorded.append(position)
            request.computed += count
        anything = self.ring.prepare(spans)
        assert anything == any(
            position >= span.prompt_len and position % self.policy.query_stride == 0
            for span in spans
            for position in range(span.first_position, span.first_position + span.num_tokens)
        )
        if self.pools is None:
            return
        # Padding as in CUDA graphs, with queries that must never be read.
        codes += [-(10**6)] * (self.setup.budget + 3 - len(codes))
        for layer in range(LAYERS):
            self.ring.record(layer, self._queries(torch.tensor(codes), layer))

    @staticmethod
    def _query_code(name: str, position: int) -> int:
        return int(name) * MAX_TEXT + position

    @staticmethod
    def _queries(codes: torch.Tensor, layer: int) -> torch.Tensor:
        """`[T, H*G, D]` that encode token, layer and KV head; heads of a group differ by 1 around it."""
        member = torch.arange(HEADS * GROUP) % GROUP * 2 - (GROUP - 1)
        head = torch.arange(HEADS * GROUP) // GROUP
        first = codes[:, None] + member
        return torch.stack([first, (head + layer * HEADS).expand_as(first), first * 0, first * 0 + 1], -1).float()

    def _id(self, text: Sequence[int]) -> int:
        return self.ids.setdefault(tuple(text), len(self.ids) + 1)

    # ---- checking ------------------------------------------------------------------------------------------

    def _check_round(self, held: list[Held], plans: list[Plan]) -> None:
        """Checks which sequences are compressed: none out of turn, and none left out."""
        policy = self.policy
        names = [plan.request_id for plan in plans]
        assert len(set(names)) == len(names) <= policy.max_sequences
        assert set(names) <= {sequence.request_id for sequence in held}
        if self.steps % policy.period:
            assert not plans
            return
        most = [self._uncompressed(name) for name in names]
        assert most == sorted(most, reverse=True)
        for name in {sequence.request_id for sequence in held} - set(names):
            request = self._named(name)
            overdue = self._uncompressed(name) >= request.window + policy.tail + self.page
            if (
                overdue
                and request.compress
                and not request.stopped
                and len(request.recorded) >= self._judges_of(request)
            ):
                assert len(plans) == policy.max_sequences, f"{name} waits though nobody is before it"
                assert min(most) >= self._uncompressed(name), f"{name} waits for sequences with less to compress"
                self.events["waits for others"] += 1

    def _uncompressed(self, name: str) -> int:
        """Rows that may be compressed: after the prompt, protected and already scored rows, in blocks of its own."""
        request = self._named(name)
        below = max(request.frontier, self.policy.protected - request.away, self._first_owned(request) * self.page)
        return max(0, request.length - below)

    def _check_plan(self, plan: Plan, request: Request, tail: int, urgent: bool) -> None:
        policy, page = self.policy, self.page
        assert request.compress, "it asked to be left alone"
        assert not request.stopped
        start, end = plan.window_start, plan.window_start + plan.window
        assert plan.logical_len == request.computed
        assert plan.blocks == tuple(request.blocks)
        assert plan.physical_len == request.length
        assert plan.new_len == request.length - plan.window + plan.keep
        assert plan.kept_blocks == -(-plan.new_len // page)
        assert plan.first_written == start // page
        if start < request.frontier:
            self._check_squeeze(plan, request, urgent)
            return
        if not urgent or not self._yields(request):
            assert (plan.window, plan.keep) == (request.window, self._kept(request))
        else:
            window, least = self._least(request, plan.physical_len - start - tail)
            assert plan.window == window
            assert plan.keep in (max(1, request.keep * window // request.window), least)
        assert plan.physical_len - end >= tail
        for rows in request.rows:
            window = set(rows[start:end])
            assert not window & request.looked_at, "a token is looked at twice"
            assert min(window) >= max(request.prompt_len, policy.protected), "the window swallows the prompt"
            # The oldest possible window: the row before it is not available, or its query is not in the ring.
            before = start - 1
            assert (
                before < self._protected(request)
                or rows[before] in request.looked_at
                or before < self._first_owned(request) * page
                or (policy.attention == "causal" and rows[before] not in request.recorded[-self.ring.rows :])
            )
        overdue = self._uncompressed(request.name) >= plan.window + tail + page
        assert len(plan.freed) >= policy.min_freed_blocks or overdue
        assert plan.freed or not urgent
        self.events["goes ahead without gain"] += len(plan.freed) < policy.min_freed_blocks
        recorded, most = request.recorded[-self.ring.rows :], self._judges_of(request)
        if policy.attention == "causal":
            first = plan.last_query - plan.num_queries + 1
            assert set(range(first, plan.last_query + 1)) <= set(recorded)
            assert all(list(range(first, plan.last_query + 1)) == rows[start:end] for rows in request.rows)
            self.events["causal"] += 1
            self.events["causal behind tokens without queries"] += start > max(
                request.frontier, self._first_owned(request) * page, policy.protected - request.away
            )
            return
        # Its own queries and those of its tail, or the newest ones if fewer follow it. If urgent, only its own.
        own = [position for position in recorded if position >= request.rows[0][start]][:most]
        judges = own if urgent or len(own) == most else recorded[-most:]
        assert plan.num_queries == len(judges) > 0
        assert plan.last_query * policy.query_stride == judges[-1]
        self.events["few queries"] += len(judges) < most
        self.events["judged by its own queries after a wait"] += judges[-1] < recorded[-1]

    def _check_squeeze(self, plan: Plan, request: Request, urgent: bool) -> None:
        """A plan of survivors: the oldest that were judged once, by the newest queries."""
        start, policy, recorded = plan.window_start, self.policy, request.recorded[-self.ring.rows :]
        assert urgent
        assert self._yields(request)
        assert policy.attention != "causal"
        assert plan.freed
        assert start + plan.window <= request.frontier
        assert plan.window == self._least(request, request.frontier - start)[0]
        assert plan.keep == max(1, plan.window * policy.least_keep // policy.keep)
        first_owned = self._first_owned(request) * self.page
        for twice, rows in zip(request.looked_at_twice, request.rows, strict=True):
            window = set(rows[start : start + plan.window])
            assert not window & twice, "a token is looked at three times"
            assert min(window) >= max(request.prompt_len, policy.protected), "the window swallows the prompt"
            before = start - 1
            assert before < self._protected(request) or rows[before] in twice or before < first_owned
        judges = recorded[-self._judges_of(request) :]
        assert plan.num_queries == len(judges) > 0
        assert plan.last_query * policy.query_stride == judges[-1]

    def _judges_of(self, request: Request) -> int:
        """The number of queries that should score a window of this request."""
        return -(-(request.window + self.policy.tail) // self.policy.query_stride)

    def _check_queries(self, plans: list[Plan]) -> None:
        """Checks that the ring returns the queries at the plan's positions, layer by layer."""
        stride = self.policy.query_stride
        for count in {plan.num_queries for plan in plans}:
            group = [plan for plan in plans if plan.num_queries == count]
            _, rows = self.ring.select(group)
            assert rows.shape == (len(group), count)
            for plan, of_plan in zip(group, rows, strict=True):
                positions = [(plan.last_query - back) * stride for back in range(count)][::-1]
                codes = torch.tensor([self._query_code(plan.request_id, position) for position in positions])
                for layer in range(LAYERS):
                    expected = as_recorded(self._queries(codes, layer), self.policy, HEADS)
                    assert torch.equal(held(self.ring, layer, of_plan), expected)

    def check(self) -> None:
        """Checks what must hold between any two steps."""
        held = Counter(block for request in self.running for block in request.blocks)
        assert [held[block] for block in range(self.setup.blocks)] == self.pool.refs, "references that nobody holds"
        assert set(self.pool.free) == {b for b in range(self.setup.blocks) if not held[b]}, "blocks leaked"
        for request in self.waiting:
            assert self.ledger.dropped(request.name) == self.ledger.windows(request.name) == 0
            assert not request.blocks
        for request in self.running:
            assert self.ledger.windows(request.name) == request.windows
            assert self.ledger.dropped(request.name) == request.dropped
            assert {len(rows) for rows in request.rows} == {request.computed - self.ledger.dropped(request.name)}
            assert len(request.blocks) == -(-request.length // self.page)
            cells = list(self._cells(request.blocks, request.length))
            for i, rows in enumerate(request.rows):
                want = [self._id(request.text[: position + 1]) for position in rows]
                assert [self.cells[cell][i] for cell in cells] == want, f"rows of {request.name}, list {i}"
        for key, blocks in self.pool.found.items():
            for block in blocks:
                assert self.pool.keys[block] == key
                for row in range(self.page):
                    content = self._id(key[: len(key) - self.page + row + 1])
                    assert self.cells[block, row] == (content,) * self.lists, f"block {block} is served for {key}"
        assert self.ring.sequences <= len(self.running)
        if self.pools is not None:
            self._check_pools(self.pools)

    def _check_pools(self, pools: Pools) -> None:
        """Checks every row of every block bit for bit, including free blocks."""
        shape = self.setup.blocks, self.page, LAYERS, HEADS
        contents = torch.tensor(list(self.cells.values())).view(shape)
        for layer in range(LAYERS):
            for got, want in zip(pools.read(layer), pools.encode(layer, contents[:, :, layer]), strict=True):
                assert torch.equal(got, want), f"rows of layer {layer}"


# ---- the machine -----------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)


def draw_setup(rng: random.Random, tensors: str) -> Setup:
    """Small numbers, so that windows, blocks and steps meet in every way."""
    page = rng.randint(1, 8)
    window = rng.randint(max(2, page), page + 6)
    keep = rng.randint(1, window - 1)
    guard = {}
    if rng.random() < 0.3:
        guard = {"max_loss": 0.5, "min_keep": rng.choice([None, 1]), "max_keep": rng.choice([None, keep, window - 1])}
    policy = Policy(
        window=window,
        keep=keep,
        tail=(tail := rng.choice([0, 0, 1, 3, 6])),
        pressure_tail=rng.choice([None, 0, tail]),
        pressure_keep=rng.choice([None, 1, keep]),
        pressure_window=rng.choice([None, 1, 3, window]),
        protected=rng.choice([0, 0, 7]),
        period=rng.choice([1, 1, 2, 3]),
        max_sequences=rng.randint(1, 3),
        min_freed_blocks=1 if guard else rng.randint(1, -(-(window - keep) // page)),
        query_stride=rng.choice([1, 1, 2, min(3, window)]),
        query_heads=rng.choice(["all", "mean"]),
        query_dtype=rng.choice(["int4", "fp8", "auto"]),
        pool=rng.choice(["head", "layer", "model"]),
        **guard,
    )
    blocks = -(-rng.randint(40, 90) // page)
    budget, max_running = rng.choice([3, 8, 20]), rng.randint(1, 4)
    if policy.query_stride == 1 and rng.random() < 0.4:
        policy = replace(policy, attention="causal")
    widest = window + rng.choice([0, 0, 3])
    return Setup(
        policy=policy, page=page, blocks=blocks, budget=budget, max_running=max_running, tensors=tensors, widest=widest
    )  # fmt: skip


def draw_own(setup: Setup, rng: random.Random) -> dict[str, int] | None:
    """Settings of one request: usually none, sometimes its own window and keep, or None to be left alone."""
    policy = setup.policy
    if rng.random() < 0.5:
        return {}
    if rng.random() < 0.3:
        return None
    must_drop = (policy.min_freed_blocks - 1) * setup.page + 1
    window = rng.randint(max(2, setup.page, policy.query_stride, must_drop + 1), setup.widest)
    return {"window": window, "keep": rng.randint(1, window - must_drop)}


def new_prompt(engine: Engine, rng: random.Random) -> list[int]:
    """Often a prefix of another request's text, so that texts share prefixes and then diverge."""
    texts = [request.text for request in engine.requests]
    prompt = list(rng.choice(texts)) if texts and rng.random() < 0.7 else []
    prompt = prompt[: rng.randint(0, len(prompt))] if rng.random() < 0.5 else prompt
    return prompt + [rng.randrange(2) for _ in range(rng.randint(not prompt, 4))]


class Serving(RuleBasedStateMachine):
    tensors = ""

    @initialize(seed=SEEDS)
    def boot(self, seed: int) -> None:
        self.engine = Engine(draw_setup(random.Random(seed), self.tensors))

    @precondition(lambda self: len(self.engine.requests) < 6)
    @rule(seed=SEEDS, decodes=st.lists(st.sampled_from([80, 30, 5]), min_size=1, max_size=3))
    def request(self, seed: int, decodes: list[int]) -> None:
        rng = random.Random(seed)
        for decode in decodes:
            self.engine.add(new_prompt(self.engine, rng), decode, draw_own(self.engine.setup, rng))

    @precondition(lambda self: self.engine.requests)
    @rule(seed=SEEDS, count=st.sampled_from([20, 40, 5, 1]))
    def decode(self, seed: int, count: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            self.engine.step(rng)

    @precondition(lambda self: len(self.engine.requests) > 2)
    @rule(pick=st.integers(0, 20))
    def abort(self, pick: int) -> None:
        if pick < len(self.engine.requests):
            self.engine.abort(self.engine.requests[pick])
            self.engine.check()


class ServingStrided(Serving):
    tensors = "strided"


class ServingPacked(Serving):
    tensors = "packed"


quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
TestBlocksAndRows = Serving.TestCase
TestBlocksAndRows.settings = settings(
    max_examples=300, stateful_step_count=15, deadline=None, suppress_health_check=quiet
)
TestStridedCache = ServingStrided.TestCase
TestStridedCache.settings = settings(
    max_examples=50, stateful_step_count=12, deadline=None, suppress_health_check=quiet
)
TestPackedCache = ServingPacked.TestCase
TestPackedCache.settings = TestStridedCache.settings


# Events that the shim has to survive. If one of them never happens in the model, the test proves nothing.
EXPECTED = (
    "compression", "blocks freed", "preemption", "preemption of a compressed sequence", "prefix hit",
    "decoded text from the prefix cache", "window behind shared blocks", "goes ahead without gain", "few queries",
    "chunk", "finish", "abort", "waits for others", "preempted in the step of its plan", "causal",
    "causal behind tokens without queries", "several settings in one step", "judged by its own queries after a wait",
    "urgent compression", "urgent compression of a shorter tail", "urgent compression to fewer tokens",
    "urgent compression of survivors", "urgent compression of a smaller window",
    "kept what the guard asked for", "stopped by the guard", "fewer rows than tokens",
    "fewer rows than tokens, never compressed",
    "fewer rows than tokens, of those that were decoded", "compression behind fewer rows than tokens",
)  # fmt: skip


@pytest.mark.parametrize("tensors", ["", "strided", "packed"])
def test_a_long_day_sees_everything(tensors: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(100 if tensors else 250):
        rng = random.Random(seed)
        engine = Engine(draw_setup(rng, tensors))
        for _ in range(60):
            if len(engine.requests) < 5 and rng.random() < 0.3:
                engine.add(new_prompt(engine, rng), rng.randint(1, 60), draw_own(engine.setup, rng))
            if engine.requests and rng.random() < 0.02:
                engine.abort(rng.choice(engine.requests))
            engine.step(rng)
        seen += engine.events
    assert set(EXPECTED) <= set(seen), set(EXPECTED) - set(seen)
