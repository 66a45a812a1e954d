"""A paged KV cache for transformers that compresses itself while ``generate()`` decodes.

    from kara_kernels.integrations.transformers import KaraCache   # also registers the attention "kara"

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kara")
    cache = KaraCache(model, window=256, keep=128)
    model.generate(**inputs, past_key_values=cache)
    print(cache.retention, cache.peak_blocks, len(cache.events))

``KaraCache.update`` only tags the new keys. The attention function "kara", which also sees queries and mask, finds the
tag. It lets the cache write the new tokens into its blocks, record the queries of decoded tokens, and gather keys and
values for transformers' own sdpa attention. No model is patched. A sequence is due when it has ``window + tail``
uncompressed decoded tokens. After the last layer of a forward, the oldest ``window`` of them are compressed to ``keep``
in all layers. The queries of window and tail judge.

Two numbers are kept apart. The *logical* length counts every token ever seen; positions, RoPE and the model's masks use
it. The *physical* length counts the rows that a sequence still holds. Padding is never stored. The first forward is the
prompt and never compressed. Whatever follows is decoded text, however many tokens a forward brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kara_kernels.checks import check_choice, check_count
from kara_kernels.engine import Compression, Policy
from kara_kernels.options import split_options

from .models import HOW_TO_LOAD, check_model
from .rotary import find_rotation
from .sequences import Forward, Sequences

_INT32_MAX = 2**31 - 1


def _refused(what: str) -> Callable[..., Any]:
    def method(self: KaraCache, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"KaraCache does not support {what}")

    return method


class KaraCache(Cache):
    """A paged KV cache for ``generate()`` and plain forwards that compresses decoded text window by window.

    Args:
        model_or_config: the model, whose attention implementation is checked, or its config. Every layer must be full
            causal softmax attention, without sliding windows, sinks, soft caps or an encoder.
        window: decoded tokens that are compressed together (``W``), up to 4096.
        keep: how many of them stay (``K``), ``1 <= keep <= window``.
        tail: decoded tokens that must lie behind a window before it is compressed. They stay whole, their queries
            judge this window, and the next window begins with them.
        block_size: tokens per block.
        protected: prompt length in real tokens, one int or one per sequence. Needed only where the prompt comes in
            more than one forward; by default the first forward is the prompt.
        num_blocks: size of the pool that all sequences share. With None the pool doubles when it is full.
        backend: of :func:`kara_kernels.compress_window`: ``"auto"``, ``"triton"`` or ``"torch"``.
        scorer: replaces the scoring. Called for the sequences that are due as ``scorer(query=, k_cache=,
            v_cache=, block_tables=, window_starts=, window=)`` with ``query [L, S, N, H*G, D]`` (window, then
            tail, oldest first), ``L`` tensors ``[B, P, H, D]`` each, ``block_tables [S, max_blocks]`` and
            ``window_starts [S]`` int32. Returns float32 scores ``[L, S, H, W]``; the highest stay.
        look_ahead: score with queries rotated this many positions ahead: kept tokens serve queries that come after the
            window. None means ``window`` positions where the model's rotary position embedding is found, and 0 for
            other models, for a config, and with ``attention="causal"``; ``cache.look_ahead`` tells which. A scorer
            gets the queries as they are.
        **options: ``attention``, ``reduction``, ``value_norm``, ``redundancy`` of
            :class:`~kara_kernels.options.Scoring` and ``pool``, ``chunk_fraction``, ``max_chunk`` of
            :class:`~kara_kernels.options.Selection`. With ``attention="causal"`` only the window's queries judge.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or an unknown one; a model that runs
            another attention than "kara".
        NotImplementedError: a model that is not supported or, when it is called, an operation that is not:
            beam search, assisted generation, batch selection, offloading, ``torch.compile``.
        RuntimeError: in a forward, when the fixed pool is too small; the message says what it takes.

    It is for inference: no gradient flows through cached attention. All layers must be on one device. A forward that
    fails leaves the cache as it was. A finished sequence of a batch that still decodes is stored and compressed like
    the others.
    """

    is_compileable = False
    is_croppable = False

    def __init__(
        self,
        model_or_config: Any,
        *,
        window: int = 256,
        keep: int = 128,
        tail: int = 128,
        block_size: int = 16,
        protected: int | Sequence[int] | None = None,
        num_blocks: int | None = None,
        backend: str = "auto",
        scorer: Callable[..., Tensor] | None = None,
        look_ahead: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layers=[])
        self.num_layers = check_model(model_or_config)
        self.policy = _policy(window, keep, tail, options)
        self.window, self.keep, self.tail = window, keep, tail
        self.block_size = check_count("block_size", block_size, 1, _INT32_MAX)
        if num_blocks is not None:
            check_count("num_blocks", num_blocks, 1, _INT32_MAX)
        for count in [protected] if isinstance(protected, int) else protected or ():
            check_count("protected", count, 0, _INT32_MAX)
        check_choice("backend", backend, ("auto", "triton", "torch"))
        if scorer is not None and not callable(scorer):
            raise TypeError(f"scorer: expected a callable or None, got {type(scorer).__name__}")
        ahead = find_rotation(model_or_config)
        if look_ahead is None:
            look_ahead = 0 if ahead is None or self.policy.attention == "causal" else window
        self.look_ahead = check_count("look_ahead", look_ahead, 0, _INT32_MAX)
        if look_ahead and ahead is None:
            raise ValueError(
                f"look_ahead: expected 0 for {type(model_or_config).__name__}, which has no rotary position embedding "
                f"of the common kind, got {look_ahead}"
            )
        turn = None if ahead is None or not look_ahead else lambda query: ahead(query, look_ahead)
        self._sequences = Sequences(
            self.policy, self.num_layers, block_size, num_blocks, protected, scorer=scorer, turn=turn, backend=backend
        )
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences: blocks go back to the pool, records start anew, memory stays allocated."""
        self._sequences.reset()
        self._forward: Forward | None = None
        self._unanswered: int | None = None  # the layer whose update() no attention has followed yet

    # ---------------------------------------------------------------------------------- what users can read

    @property
    def events(self) -> list[Compression]:
        """One record per sequence and compression; ``request_id`` is the sequence's index in the batch."""
        return self._sequences.events

    @property
    def physical_lengths(self) -> list[int]:
        """Rows that each sequence holds."""
        return self._sequences.physical_lengths

    @property
    def retention(self) -> float:
        """Realised retention: rows held per real token seen, prompt included, over all sequences."""
        seen = sum(self._sequences.seen)
        return sum(self.physical_lengths) / seen if seen else 1.0

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences hold; a block spans all layers."""
        return self._sequences.blocks.allocator.in_use

    @property
    def peak_blocks(self) -> int:
        """The most blocks that were in use at once since construction or ``reset()``."""
        return self._sequences.blocks.allocator.peak

    @property
    def kv_bytes(self) -> int:
        """Bytes of the blocks in use, keys and values of all layers. The pool itself may be larger."""
        return sum(pool[:, 0].nbytes for pool in self._sequences.blocks.pools) * self.blocks_in_use

    @property
    def pool_bytes(self) -> int:
        """Bytes allocated for keys and values of all layers."""
        return sum(pool.nbytes for pool in self._sequences.blocks.pools)

    @property
    def query_bytes(self) -> int:
        """Bytes allocated for queries: ``window + tail`` rows per layer and sequence, or more if one forward brings
        more decoded tokens than that, and one row per layer for the queries of prompts."""
        ring = self._sequences.ring
        return 0 if ring is None else ring.nbytes

    # --------------------------------------------------------------------------- what transformers calls

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys ``[S, H, q, D]`` and values ``[S, H, q, Dv]`` on to the attention "kara"."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("KaraCache does not support torch.compile")
        if self._unanswered is not None:
            raise RuntimeError(
                f"the keys of layer {self._unanswered} never reached KaraCache's attention: {HOW_TO_LOAD}"
            )
        self._unanswered = layer_idx
        key_states._kara = (self, layer_idx)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length, padding included: the next token's position, whatever was compressed."""
        return self._sequences.logical

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Logical sizes. The cache makes masks over its rows itself."""
        return self._sequences.logical + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        settings = f"window={self.window}, keep={self.keep}, tail={self.tail}"
        return f"KaraCache({settings}, logical={self._sequences.logical}, physical={self.physical_lengths})"

    batch_size = property(lambda self: len(self._sequences.seen) or -1)
    is_initialized = property(lambda self: bool(self._sequences.seen))
    is_sliding = property(lambda self: [False] * self.num_layers)
    is_linear = property(lambda self: [False] * self.num_layers)

    reorder_cache = _refused("beam search: a block belongs to one sequence")
    crop = _refused("crop (assisted generation): what was compressed cannot be taken back")
    batch_repeat_interleave = _refused("batch_repeat_interleave: repeat the prompt instead")
    batch_select_indices = _refused("batch_select_indices")
    offload = prefetch = _refused("offloading")
    early_initialization = _refused("export: the first forward allocates its blocks")

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
            self._forward = self._sequences.plan(query, mask, kwargs.get("scaling"))
        step = self._forward
        if step is None:
            raise RuntimeError(f"layer {layer} came without layer 0: KaraCache needs all layers in order")
        if key.device != step.slots.device:
            raise NotImplementedError(f"KaraCache needs one device, layer {layer} is on {key.device}")
        self._sequences.store(step, layer, query, key, value)
        if not step.first:
            key, value = self._sequences.blocks.read(layer, step.longest)
            mask = step.mask
        output = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        if layer == self.num_layers - 1:
            self._forward = None
            self._sequences.commit(step)
        return output


def _policy(window: int, keep: int, tail: int, options: dict[str, Any]) -> Policy:
    """Records every query, and compresses a window as soon as it and its tail are there, whatever that frees."""
    split_options(options)  # a TypeError for unknown ones that names the known
    return Policy(
        window=window, keep=keep, tail=tail, query_stride=1, query_heads="all", min_freed_blocks=0,
        max_sequences=_INT32_MAX, max_query_gib=1e6, **options,
    )  # fmt: skip
