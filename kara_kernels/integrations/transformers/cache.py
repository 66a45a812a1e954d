"""A paged KV cache for transformers that compresses itself while ``generate()`` decodes.

    from kara_kernels.integrations.transformers import KaraCache   # also registers the attention "kara"

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kara")
    cache = KaraCache(model, window=256, keep=128)
    model.generate(**inputs, past_key_values=cache)
    print(cache.retention, cache.peak_blocks, len(cache.events))

``KaraCache.update`` stores nothing: it tags the new keys. The attention function "kara", which also sees
queries and mask, finds the tag and lets the cache write the new tokens into its blocks, note the queries of
decoded tokens, and gather keys and values for transformers' own sdpa attention. No model is patched. After
the last layer of a forward, every sequence with ``window + tail`` uncompressed decoded tokens has the oldest
``window`` of them compressed to ``keep`` in all layers, judged by the queries of the window and of the tail.

Two numbers are kept apart: the *logical* length (positions, RoPE, the model's masks) counts every token ever
seen, the *physical* length counts the rows that a sequence still holds. Padding is never stored. The first
forward is the prompt and never compressed; whatever follows is decoded text, however many tokens a forward
brings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kara_kernels import PagedCache, compress_window
from kara_kernels.checks import check_choice, check_count, check_window
from kara_kernels.engine import Policy
from kara_kernels.integrations.transformers.rotary import find_rotation

_DEFAULTS = Policy().selection
_SELECTION = ("attention", *_DEFAULTS)
_NOT_PLAIN = ("sliding_window", "softcap", "s_aux", "position_bias")  # arguments of other kinds of attention
_INT32_MAX = 2**31 - 1
_HOW_TO_LOAD = (
    'load the model with attn_implementation="kara" or call model.set_attn_implementation("kara"), '
    "after importing kara_kernels.integrations.transformers"
)


class Compression(NamedTuple):
    """What one compression did; lists have one entry per sequence of the batch.

    ``logical_len``: tokens seen until then, padding included. ``window_start``: physical index of the first
    window token, -1 for a sequence that was not due. ``physical_before``, ``physical_after``: rows held.
    ``keep_indices [L, S, H, K]`` int32 on the CPU: window-relative, ascending, -1 for a sequence that was not
    due. ``freed_blocks``: blocks that went back to the pool. ``seconds``: wall clock, the copy of the keep
    lists to the host included.
    """

    logical_len: int
    window_start: list[int]
    physical_before: list[int]
    physical_after: list[int]
    keep_indices: Tensor
    freed_blocks: int
    seconds: float


class _BlockPool:
    """Which blocks are free; one id is the same block in every layer. The lowest ids are handed out first and
    sequences give back their last blocks, so a lone sequence always holds the blocks 0, 1, 2, ..."""

    def __init__(self, size: int | None) -> None:
        self.growable = size is None
        self.size = size or 0
        self.free = list(range(self.size - 1, -1, -1))
        self.peak = 0

    @property
    def in_use(self) -> int:
        return self.size - len(self.free)

    def take(self, count: int) -> list[int]:
        short = count - len(self.free)
        if short > 0:
            if not self.growable:
                raise RuntimeError(
                    f"KaraCache is out of blocks: num_blocks={self.size}, {self.in_use} in use, {count} more "
                    f"needed; give num_blocks >= {self.in_use + count} or a smaller batch"
                )
            grown = self.size + max(self.size, short)
            self.free = list(range(grown - 1, self.size - 1, -1)) + self.free
            self.size = grown
        taken = [self.free.pop() for _ in range(count)]
        self.peak = max(self.peak, self.in_use)
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self.free = sorted(self.free + blocks, reverse=True)


@dataclass
class _Forward:
    """What layer 0 works out for all layers: ``q`` new rows per sequence, ``n`` of all ``S * q`` are real."""

    first: bool  # nothing is stored yet: the model's own mask and the new keys are all that attention needs
    lengths: list[int]  # physical length of each sequence with the new tokens
    rows: Tensor | None  # [n] which of the S * q rows are real tokens; None: all of them
    slots: Tensor  # [n] where they go: block * block_size + row in the block
    fresh: Tensor | None  # blocks handed out for this forward
    mask: Tensor | None  # [S, 1, q, max(lengths)] bool; None: every query sees every row
    query_rows: Tensor | None = None  # which of the S * q rows are decoded tokens; None: all of them
    query_slots: Tensor | None = None  # where their queries go in the buffer; None: there are none


def _refused(what: str) -> Callable[..., Any]:
    def method(self: KaraCache, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"KaraCache does not support {what}")

    return method


class KaraCache(Cache):
    """A paged KV cache for ``generate()`` and plain forwards that compresses decoded text window by window.

    Args:
        model_or_config: the model (its attention implementation is checked) or its config. Every layer must
            be full causal softmax attention: no sliding windows, sinks, soft-capping, encoder-decoder.
        window: decoded tokens that are compressed together (``W``), up to 4096.
        keep: how many of them stay (``K``), ``1 <= keep <= window``.
        tail: decoded tokens that must lie behind a window before it is compressed. They stay whole, are the
            first of the next window, and their queries judge this one.
        block_size: tokens per block.
        protected: prompt length in real tokens, one int or one per sequence. Needed only where the prompt
            comes in more than one forward; by default the first forward is the prompt.
        num_blocks: size of the pool, shared by all sequences. None: the pool doubles when it is full.
        backend: of :func:`kara_kernels.compress_window`: ``"auto"``, ``"triton"`` or ``"torch"``.
        scorer: replaces the scoring. Called for the sequences that are due as ``scorer(query=, k_cache=,
            v_cache=, block_tables=, window_starts=, window=)`` with ``query [L, S, N, H*G, D]`` (window, then
            tail), ``L`` tensors ``[B, P, H, D]`` each, ``block_tables [S, max_blocks]`` and ``window_starts
            [S]`` int32. Returns float32 scores ``[L, S, H, W]``; the highest stay.
        look_ahead: judge as if the queries stood so many positions further on, which is where those come from that
            what is kept is for. None: ``window`` of them where the model's rotary position embedding is found
            (``cache.look_ahead`` tells), 0 for other models, for a config, and with ``attention="causal"``. A
            scorer gets the queries as they are.
        **selection: ``attention``, ``chunk_fraction``, ``max_chunk``, ``pool``, ``reduction``, ``value_norm``,
            ``redundancy`` of :func:`kara_kernels.compress_window`, with the defaults of
            :class:`kara_kernels.engine.Policy`. With ``attention="causal"`` only the window's queries judge.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or an unknown one; a model that runs
            another attention than "kara".
        NotImplementedError: a model that is not supported or, when it is called, an operation that is not:
            beam search, assisted generation, batch selection, offloading, ``torch.compile``.
        RuntimeError: in a forward, when the fixed pool is too small; the message says what it takes.

    For inference: no gradient flows through cached attention. All layers must be on one device. A forward
    that fails leaves the cache as it was. A finished sequence of a batch that still decodes is stored and
    compressed like the others.
    """

    is_compileable = False
    is_croppable = False

    def __init__(
        self,
        model_or_config: Any,
        *,
        window: int = 256,
        keep: int = 128,
        tail: int = 64,
        block_size: int = 16,
        protected: int | Sequence[int] | None = None,
        num_blocks: int | None = None,
        backend: str = "auto",
        scorer: Callable[..., Tensor] | None = None,
        look_ahead: int | None = None,
        **selection: Any,
    ) -> None:
        super().__init__(layers=[])
        self.num_layers = _check_model(model_or_config)
        self.window = check_window(window)
        self.keep = check_count("keep", keep, 1, window)
        self.tail = check_count("tail", tail, 0, _INT32_MAX)
        self.block_size = check_count("block_size", block_size, 1, _INT32_MAX)
        if num_blocks is not None:
            check_count("num_blocks", num_blocks, 1, _INT32_MAX)
        for count in [protected] if isinstance(protected, int) else protected or ():
            check_count("protected", count, 0, _INT32_MAX)
        check_choice("backend", backend, ("auto", "triton", "torch"))
        if scorer is not None and not callable(scorer):
            raise TypeError(f"scorer: expected a callable or None, got {type(scorer).__name__}")
        selection = {**_DEFAULTS, **selection}
        # The causal ablation takes query i for window token i: the tail cannot judge there.
        causal = selection.get("attention") == "causal"
        self.num_queries = window if causal else window + tail
        _check_selection(window, keep, self.num_queries, selection)
        self._ahead = find_rotation(model_or_config)
        if look_ahead is None:
            look_ahead = 0 if self._ahead is None or causal else window
        self.look_ahead = check_count("look_ahead", look_ahead, 0, _INT32_MAX)
        if look_ahead and self._ahead is None:
            raise ValueError(
                f"look_ahead: expected 0 for {type(model_or_config).__name__}, which has no rotary position embedding "
                f"of the common kind, got {look_ahead}"
            )

        self.events: list[Compression] = []
        self._protected, self._backend, self._scorer, self._selection = protected, backend, scorer, selection
        self._pool = _BlockPool(num_blocks)
        self._k: list[Tensor] = []  # [H, B, P, D] per layer
        self._v: list[Tensor] = []
        self._paged: PagedCache | None = None  # of the tensors above as [B, P, H, D]
        self._queries: Tensor | None = None  # [L, S, capacity, H*G, D]; row r: frontier + r
        self._scale: float | None = None
        self._tables: list[list[int]] = []  # block ids of each sequence
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences: blocks go back to the pool, records start anew, memory stays allocated."""
        self._pool.give_back([block for table in self._tables for block in table])
        self._pool.peak = 0
        self._tables = []
        self._table: Tensor | None = None  # the same on the device, [S, nb] int64
        self._blocks: slice | Tensor = slice(0)  # the same as one index into the pools
        self._physical: list[int] = []  # rows of each sequence
        self._frontier: list[int] = []  # physical index of the first token that may still be compressed
        self._seen: list[int] = []  # real tokens of each sequence
        self._logical = 0
        self._forward: _Forward | None = None
        self._unanswered: int | None = None  # the layer whose update() no attention has followed yet
        self.events.clear()

    # ---------------------------------------------------------------------------------- what users can read

    @property
    def physical_lengths(self) -> list[int]:
        """Rows that each sequence holds."""
        return list(self._physical)

    @property
    def retention(self) -> float:
        """Realised retention: rows held per real token seen, prompt included, over all sequences."""
        return sum(self._physical) / sum(self._seen) if self._seen else 1.0

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences hold; a block spans all layers."""
        return self._pool.in_use

    @property
    def peak_blocks(self) -> int:
        """The most blocks that were in use at once since construction or ``reset()``."""
        return self._pool.peak

    @property
    def kv_bytes(self) -> int:
        """Bytes of the blocks in use, keys and values of all layers. The pool itself may be larger."""
        return sum(pool[:, 0].nbytes for pool in self._k + self._v) * self.blocks_in_use

    @property
    def pool_bytes(self) -> int:
        """Bytes allocated for keys and values of all layers."""
        return sum(pool.nbytes for pool in self._k + self._v)

    @property
    def query_bytes(self) -> int:
        """Bytes allocated for queries: ``window + tail`` rows per layer and sequence, more if one forward
        brings more decoded tokens than that."""
        return 0 if self._queries is None else self._queries.nbytes

    # --------------------------------------------------------------------------- what transformers calls

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys ``[S, H, q, D]`` and values ``[S, H, q, Dv]`` on to the attention "kara"."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("KaraCache does not support torch.compile")
        if self._unanswered is not None:
            raise RuntimeError(
                f"the keys of layer {self._unanswered} never reached KaraCache's attention: {_HOW_TO_LOAD}"
            )
        self._unanswered = layer_idx
        key_states._kara = (self, layer_idx)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length, padding included: the next token's position, whatever was compressed."""
        return self._logical

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Logical sizes: masks over its rows are the cache's own business."""
        return self._logical + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        settings = f"window={self.window}, keep={self.keep}, tail={self.tail}"
        return f"KaraCache({settings}, logical={self._logical}, physical={self._physical})"

    batch_size = property(lambda self: len(self._tables) or -1)
    is_initialized = property(lambda self: bool(self._tables))
    is_sliding = property(lambda self: [False] * self.num_layers)
    is_linear = property(lambda self: [False] * self.num_layers)

    reorder_cache = _refused("beam search: a block belongs to one sequence")
    crop = _refused("crop (assisted generation): what was compressed cannot be taken back")
    batch_repeat_interleave = _refused("batch_repeat_interleave: repeat the prompt instead")
    batch_select_indices = _refused("batch_select_indices")
    offload = prefetch = _refused("offloading")
    early_initialization = _refused("export: the first forward allocates its blocks")

    # ---------------------------------------------------------------------------------------- one forward

    @torch.no_grad()
    def attend(
        self,
        module: torch.nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer over cached and new tokens; stores the new ones on the way.

        ``query [S, H*G, q, D]``, ``key [S, H, q, D]``, ``value [S, H, q, Dv]``, ``mask`` as ``kara_mask``
        makes it. Returns what transformers' sdpa attention returns: ``[S, q, H*G, Dv]`` and None.
        """
        self._unanswered = None
        if layer == 0:
            self._scale = kwargs.get("scaling")
            self._forward = self._plan(query, mask)
        step = self._forward
        if step is None:
            raise RuntimeError(f"layer {layer} came without layer 0: KaraCache needs all layers in order")
        self._store(layer, query, key, value, step)
        if not step.first:
            key, value = (self._gather(pools[layer], max(step.lengths)) for pools in (self._k, self._v))
            mask = step.mask
        output = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        if layer == self.num_layers - 1:
            self._commit(step, query.shape[2])
        return output

    def _plan(self, query: Tensor, mask: Tensor | None) -> _Forward:
        """Everything about a forward that its layers share. Lengths change only when it is through."""
        batch, q, device = query.shape[0], query.shape[2], query.device
        real = None if mask is None else mask[:, 0, -1, -q:]  # [S, q]: which new tokens the last of them sees
        new = [q] * batch if real is None else real.sum(1).tolist()
        if min(new) == q:
            real = None
        if self._logical == 0:
            self._start(new)
        if batch != len(self._tables):
            raise ValueError(f"batch size: expected {len(self._tables)} as in the first forward, got {batch}")
        lengths = [have + more for have, more in zip(self._physical, new, strict=True)]
        fresh = self._reserve(lengths, device)

        count = torch.arange(1, q + 1, device=device) if real is None else real.cumsum(1)
        visible = torch.tensor(self._physical, device=device)[:, None] + count  # [S, q]: rows a token sees
        place = (visible - 1).clamp_(min=0)
        assert self._table is not None
        slots = self._table.gather(1, place // self.block_size) * self.block_size + place % self.block_size
        rows = None if real is None else real.flatten().nonzero().squeeze(1)
        step = _Forward(self._logical == 0, lengths, rows, _take(slots.flatten(), rows), fresh, mask=None)
        if not step.first and (q > 1 or len(set(lengths)) > 1):
            step.mask = (torch.arange(max(lengths), device=device) < visible[:, :, None])[:, None]

        capacity = self._reserve_queries(lengths, query)
        if capacity:
            place = place - torch.tensor(self._frontier, device=device)[:, None]
            if real is not None or any(map(int.__lt__, self._physical, self._frontier)):
                decoded = place >= 0 if real is None else (place >= 0) & real
                step.query_rows = decoded.flatten().nonzero().squeeze(1)
            place += torch.arange(batch, device=device)[:, None] * capacity
            step.query_slots = _take(place.flatten(), step.query_rows)
        return step

    def _start(self, new: list[int]) -> None:
        """The first forward of a batch brings ``new`` real tokens of each sequence."""
        batch, protected = len(new), self._protected
        if protected is None:
            protected = new
        if isinstance(protected, Sequence) and len(protected) != batch:
            raise ValueError(f"protected: expected {batch} lengths, one per sequence, got {len(protected)}")
        if not any(new):
            raise ValueError("attention_mask: expected a token in the first forward, got only padding")
        self.reset()  # what a first forward that failed has left
        self._frontier = [protected] * batch if isinstance(protected, int) else list(protected)
        self._tables = [[] for _ in new]
        self._physical, self._seen = [0] * batch, [0] * batch
        if self._queries is not None and self._queries.shape[1] != batch:
            self._queries = None

    def _reserve(self, lengths: list[int], device: torch.device) -> Tensor | None:
        """Blocks for ``lengths`` rows; returns the ids of new ones, None if there are enough."""
        held = zip(lengths, self._tables, strict=True)
        missing = [max(0, self._blocks_for(rows) - len(table)) for rows, table in held]
        fresh = self._pool.take(sum(missing))
        if not fresh:
            return None
        given = iter(fresh)
        for table, count in zip(self._tables, missing, strict=True):
            table += [next(given) for _ in range(count)]
        self._tables_changed(device)
        return torch.tensor(fresh, device=device)

    def _tables_changed(self, device: torch.device) -> None:
        width = max(map(len, self._tables))
        # Short tables are filled up with a block of their own, which attention gathers and masks.
        filled = [table + (table or [0])[:1] * (width - len(table)) for table in self._tables]
        self._table = torch.tensor(filled, device=device)
        self._blocks = slice(width) if len(filled) == 1 else self._table.flatten()

    @torch.inference_mode(False)  # a tensor born in inference mode could not be written to outside of it
    def _reserve_queries(self, lengths: list[int], query: Tensor) -> int:
        """Room for the queries of uncompressed decoded tokens; returns rows per sequence, 0: not needed."""
        need = max(map(int.__sub__, lengths, self._frontier))
        if need <= 0:
            return 0
        old = self._queries
        if old is not None and old.shape[2] >= need:
            return old.shape[2]
        _, heads, _, dim = query.shape
        capacity = max(need, self.window + self.tail)
        self._queries = query.new_zeros(self.num_layers, len(lengths), capacity, heads, dim)
        if old is not None:
            self._queries[:, :, : old.shape[2]] = old
        return capacity

    def _store(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: _Forward) -> None:
        """Writes the new tokens of one layer into its blocks and their queries into the buffer."""
        if key.device != step.slots.device:
            raise NotImplementedError(f"KaraCache needs one device, layer {layer} is on {key.device}")
        for pools, new in ((self._k, key), (self._v, value)):
            if layer == len(pools) or pools[layer].shape[1] < self._pool.size:
                self._grow(pools, layer, new)
            pool = pools[layer]
            if step.fresh is not None:
                # Attention multiplies masked rows by 0, and a NaN left by a former owner would survive that.
                pool.index_fill_(1, step.fresh, 0)
            flat = new.transpose(0, 1).flatten(1, 2)  # [H, S * q, D]
            pool.flatten(1, 2).index_copy_(1, step.slots, _take(flat, step.rows, 1))
        if step.query_slots is not None:
            assert self._queries is not None
            flat = query.transpose(1, 2).flatten(0, 1)  # [S * q, H*G, D]
            self._queries[layer].flatten(0, 1).index_copy_(0, step.query_slots, _take(flat, step.query_rows))

    @torch.inference_mode(False)
    def _grow(self, pools: list[Tensor], layer: int, like: Tensor) -> None:
        pool = like.new_zeros(like.shape[1], self._pool.size, self.block_size, like.shape[3])
        if layer == len(pools):
            pools.append(pool)
        else:
            pool[:, : pools[layer].shape[1]] = pools[layer]
            pools[layer] = pool
        self._paged = None  # it holds the address of the old tensor

    def _gather(self, pool: Tensor, length: int) -> Tensor:
        """``[H, B, P, D]`` -> ``[S, H, length, D]``: one copy, and none for a lone sequence."""
        blocks = self._blocks
        chosen = pool[:, blocks] if isinstance(blocks, slice) else pool.index_select(1, blocks)
        return chosen.view(len(pool), len(self._tables), -1, pool.shape[3]).transpose(0, 1)[:, :, :length]

    def _commit(self, step: _Forward, q: int) -> None:
        """The forward is through: counts its tokens, then compresses what is due."""
        counts = zip(self._seen, step.lengths, self._physical, strict=True)
        self._seen = [seen + after - before for seen, after, before in counts]
        self._physical = step.lengths
        self._logical += q
        self._forward = None
        enough = self.window + self.tail
        while due := [s for s, rows in enumerate(self._physical) if rows - self._frontier[s] >= enough]:
            self._compress(due)

    # ------------------------------------------------------------------------------------- one compression

    def _compress(self, due: list[int]) -> None:
        """Compresses the oldest window of the sequences ``due`` in all layers; gives empty blocks back."""
        assert self._queries is not None
        assert self._table is not None
        began = time.perf_counter()
        if self._paged is None:
            self._paged = PagedCache(*([x.permute(1, 2, 0, 3) for x in pools] for pools in (self._k, self._v)))
        pick: Any = slice(None) if len(due) == len(self._tables) else due
        given: dict[str, Any] = {
            "query": self._queries[:, pick, : self.num_queries],
            "k_cache": self._paged.k,
            "v_cache": self._paged.v,
            "block_tables": self._table[pick].to(torch.int32),
            "window_starts": self._int32([self._frontier[s] for s in due]),
            "window": self.window,
        }
        scores = None if self._scorer is None else self._scorer(**given)
        if self.look_ahead and self._ahead is not None:
            given["query"] = self._ahead(given["query"], self.look_ahead)
        keep_indices = compress_window(
            **given,
            seq_lens=self._int32([self._physical[s] for s in due]),
            keep=self.keep,
            scores=scores,
            scale=self._scale,
            backend=self._backend,
            **self._selection,
        ).keep_indices
        layers, _, heads, _ = keep_indices.shape
        kept = torch.full((layers, len(self._tables), heads, self.keep), -1, dtype=torch.int32)
        kept[:, pick] = keep_indices.cpu()
        starts = [start if s in due else -1 for s, start in enumerate(self._frontier)]
        before = self.physical_lengths
        self._keep_later_queries(pick, max(self._physical[s] - self._frontier[s] for s in due))
        freed = self._shrink(due)
        seconds = time.perf_counter() - began
        record = Compression(self._logical, starts, before, self.physical_lengths, kept, freed, seconds)
        self.events.append(record)

    def _keep_later_queries(self, pick: Any, uncompressed: int) -> None:
        """The queries behind the window move to the front of the buffer."""
        assert self._queries is not None
        later = self._queries[:, pick, self.window : uncompressed].clone()
        self._queries[:, pick, : uncompressed - self.window] = later

    def _shrink(self, due: list[int]) -> int:
        """The host's side of a compression: it knows the lengths without a word from the device."""
        assert self._table is not None
        freed: list[int] = []
        for s in due:
            self._physical[s] -= self.window - self.keep
            self._frontier[s] += self.keep
            blocks = self._blocks_for(self._physical[s])
            freed += self._tables[s][blocks:]
            del self._tables[s][blocks:]
        if freed:
            # Whoever gets these blocks next writes to them on the same stream, hence after the moves.
            self._pool.give_back(freed)
            self._tables_changed(self._table.device)
        return len(freed)

    def _blocks_for(self, rows: int) -> int:
        return -(-rows // self.block_size)

    def _int32(self, values: list[int]) -> Tensor:
        assert self._table is not None
        return torch.tensor(values, dtype=torch.int32, device=self._table.device)


def kara_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention "kara": transformers' sdpa attention, over a KaraCache's blocks if the keys passed one.

    Raises NotImplementedError, with a KaraCache, for what is not plain causal softmax attention.
    """
    tag = getattr(key, "_kara", None)
    if tag is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    cache, layer = tag
    causal = kwargs.get("is_causal")
    odd = not_plain(kwargs)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        odd.append("is_causal=False")
    if attention_mask is not None and not getattr(attention_mask, "_kara_plain", False):
        odd.append("a custom mask (give a 2-D padding mask or none)")
    if odd:
        where = type(module).__name__
        raise NotImplementedError(f"KaraCache does not support attention with {', '.join(odd)} ({where})")
    return cache.attend(module, layer, query, key, value, attention_mask, **kwargs)


def kara_mask(*, mask_function: Callable = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """transformers' sdpa mask, marked so that a cache can tell causal + padding from other masks."""
    mask = sdpa_mask(mask_function=mask_function, **kwargs)
    if mask is not None:
        mask._kara_plain = mask_function is causal_mask_function
    return mask


def _take(rows: Tensor, which: Tensor | None, dim: int = 0) -> Tensor:
    return rows if which is None else rows.index_select(dim, which)


def not_plain(kwargs: dict[str, Any]) -> list[str]:
    """Arguments of an attention call that ask for more than causal softmax attention."""
    return [name for name in _NOT_PLAIN if kwargs.get(name) is not None]


def _check_model(model_or_config: Any) -> int:
    """Refuses, before a request runs, what cannot work; returns the number of layers."""
    config = getattr(model_or_config, "config", model_or_config)
    used = getattr(config, "_attn_implementation", None)
    if config is not model_or_config and used != "kara":
        raise ValueError(f'model: expected attention implementation "kara", got {used!r}: {_HOW_TO_LOAD}')
    return check_config(config, "KaraCache")


def check_config(config: Any, who: str) -> int:
    """Refuses, in the name of ``who``, models whose layers are not plain causal softmax attention; returns ``L``."""
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{who} does not support encoder-decoder models")
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise NotImplementedError(f"{who} needs full attention in every layer, got {', '.join(others)}")
    if not getattr(config, "is_causal", True):
        raise NotImplementedError(f"{who} does not support attention that is not causal")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotImplementedError(f"{who} does not support soft-capped attention (attn_logit_softcapping)")
    return config.num_hidden_layers


def _check_selection(window: int, keep: int, num_queries: int, selection: dict[str, Any]) -> None:
    """Lets the library judge the options on one head of zeros, now and not some hundred tokens later."""
    unknown = ", ".join(sorted(set(selection) - set(_SELECTION)))
    if unknown:
        raise TypeError(f"KaraCache: unknown arguments {unknown}; selection takes {', '.join(_SELECTION)}")
    query = torch.zeros(1, num_queries, 1, 1)
    k_cache, v_cache = torch.zeros(2, 1, window, 1, 1)
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([window], dtype=torch.int32)
    fixed = {"window": window, "keep": keep, "backend": "torch"}
    compress_window(query, k_cache, v_cache, table, length, **fixed, **selection)  # type: ignore[arg-type]


ALL_ATTENTION_FUNCTIONS.register("kara", kara_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("kara", kara_mask)
