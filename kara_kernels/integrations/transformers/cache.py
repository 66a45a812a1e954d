"""A paged KV cache for transformers that compresses itself while ``generate()`` decodes.

    from kara_kernels.integrations.transformers import KaraCache   # also registers the attention "kara"

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kara")
    cache = KaraCache(model, window=256, keep=128)
    model.generate(**inputs, past_key_values=cache)
    print(cache.retention, cache.peak_blocks, len(cache.events))

``KaraCache.update`` only tags the new keys. The attention function "kara", which also sees queries and mask, finds the
tag. It lets the cache write the new tokens into its blocks, record the queries of decoded tokens, and gather keys and
values for transformers' own sdpa attention. No model is patched. A sequence is due when it has ``window + tail``
uncompressed decoded tokens. After the last layer of a forward pass, the oldest ``window`` of them are compressed to
``keep`` in all layers. The queries of window and tail score them.

Each sequence has two lengths. The *logical* length counts every token ever seen. Positions, RoPE and the model's masks
use it. The *physical* length counts the rows that a sequence still holds. Padding is never stored. The first forward
pass is the prompt and is never compressed. All later tokens are decoded text, however many a forward pass adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kara_kernels.engine import Compression, Policy
from kara_kernels.options import split_options
from kara_kernels.values import check_choice, check_count

from .models import HOW_TO_LOAD, check_model, kinds_of
from .rotary import resolve_look_ahead
from .sequences import Forward, Sequences
from .sliding import SlidingLayers

_INT32_MAX = 2**31 - 1


def _refused(what: str) -> Callable[..., Any]:
    def method(self: KaraCache, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"KaraCache does not support {what}")

    return method


class KaraCache(Cache):
    """A paged KV cache for ``generate()`` and plain forwards that compresses decoded text window by window.

    Args:
        model_or_config: the model, whose attention implementation is checked, or its config. Layers must be causal
            softmax attention, without sinks, soft caps or an encoder. Some may slide (Gemma 3). They are left alone:
            layers, blocks and bytes below are those of the others.
        window: decoded tokens that are compressed together (``W``), up to 4096.
        keep: how many of them are kept (``K``), ``1 <= keep <= window``.
        tail: decoded tokens that must follow a window before it is compressed. They are all kept for now, their
            queries help to score this window, and the next window starts with them.
        block_size: tokens per block.
        protected: prompt length in real tokens, one int or one per sequence. Needed only if the prompt is split over
            several forward passes. By default the first forward pass is the prompt.
        num_blocks: size of the pool that all sequences share. With None a full pool doubles.
        backend: of :func:`kara_kernels.compress_window`: ``"auto"``, ``"triton"`` or ``"torch"``.
        scorer: replaces the built-in scoring. A name is one of :attr:`kara_kernels.engine.Policy.scorer`. A callable
            is called for the sequences that are due as ``scorer(query=, k_cache=, v_cache=, block_tables=,
            window_starts=, window=)`` with ``query [L, S, N, H*G, D]`` (window, then tail, oldest first), ``L`` tensors
            ``[B, P, H, D]`` each, ``block_tables [S, max_blocks]`` and ``window_starts [S]`` int32. Returns float32
            scores ``[L, S, H, W]``; the highest are kept.
        look_ahead: score with queries rotated this many positions ahead, because kept tokens serve queries that come
            after the window. None means ``window`` positions if the model's rotary position embedding is found. It
            means 0 for other models, for a config, and with ``attention="causal"``. ``cache.look_ahead`` holds the
            value in use. A scorer gets the queries unrotated.
        **options: ``attention``, ``reduction``, ``value_norm``, ``redundancy`` of
            :class:`~kara_kernels.options.Scoring` and ``pool``, ``chunk_fraction``, ``max_chunk`` of
            :class:`~kara_kernels.options.Selection`. With ``attention="causal"`` only the window's queries score.

    Raises:
        TypeError, ValueError: an unknown argument, or one of the wrong type or range; a model whose attention
            implementation is not "kara".
        NotImplementedError: an unsupported model or, when it is called, an unsupported operation: beam search, assisted
            generation, batch selection, offloading, ``torch.compile``.
        RuntimeError: in a forward pass, if the fixed pool is too small. The message says how many blocks it needs.

    It is for inference: no gradient flows through cached attention. All layers must be on one device. A failed forward
    pass leaves the cache unchanged. A finished sequence in a batch that still decodes is stored and compressed like the
    others.
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
        scorer: str | Callable[..., Tensor] | None = None,
        look_ahead: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layers=[])
        self.num_layers = check_model(model_or_config)
        kinds = kinds_of(model_or_config)
        self._full = {layer: i for i, layer in enumerate(layer for layer, window in enumerate(kinds) if window is None)}
        self._sliding = SlidingLayers({layer: window for layer, window in enumerate(kinds) if window is not None})
        self.window, self.keep, self.tail = window, keep, tail
        self.block_size = check_count("block_size", block_size, 1, _INT32_MAX)
        if num_blocks is not None:
            check_count("num_blocks", num_blocks, 1, _INT32_MAX)
        for count in [protected] if isinstance(protected, int) else protected or ():
            check_count("protected", count, 0, _INT32_MAX)
        check_choice("backend", backend, ("auto", "triton", "torch"))
        if isinstance(scorer, str):
            options, scorer = {**options, "scorer": scorer}, None
        elif scorer is not None and not callable(scorer):
            raise TypeError(f"scorer: expected a name, a callable or None, got {type(scorer).__name__}")
        self.policy, ahead = resolve_look_ahead(_policy(window, keep, tail, look_ahead, options), model_or_config)
        self.look_ahead = self.policy.positions_ahead
        self._sequences = Sequences(
            self.policy, len(self._full), block_size, num_blocks, protected, scorer=scorer, ahead=ahead, backend=backend
        )
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences and records. Blocks return to the pool, and memory stays allocated."""
        self._sequences.reset()
        self._sliding.reset()
        self._forward: Forward | None = None
        self._unanswered: int | None = None  # the layer whose update() was not yet followed by attention

    # ---------------------------------------------------------------------------------- public properties

    @property
    def events(self) -> list[Compression]:
        """One record per sequence and compression. ``request_id`` is the sequence's index in the batch."""
        return self._sequences.events

    @property
    def physical_lengths(self) -> list[int]:
        """Rows that each sequence holds."""
        return self._sequences.physical_lengths

    @property
    def retention(self) -> float:
        """Realised retention: rows held divided by real tokens seen, prompt included, over all sequences."""
        seen = sum(self._sequences.seen)
        return sum(self.physical_lengths) / seen if seen else 1.0

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences hold. A block spans all layers."""
        return self._sequences.blocks.allocator.in_use

    @property
    def peak_blocks(self) -> int:
        """The most blocks in use at once since construction or ``reset()``."""
        return self._sequences.blocks.allocator.peak

    @property
    def kv_bytes(self) -> int:
        """Bytes of the blocks in use, for keys and values of all layers. The pool itself may be larger."""
        return sum(pool[:, 0].nbytes for pool in self._sequences.blocks.pools) * self.blocks_in_use

    @property
    def pool_bytes(self) -> int:
        """Bytes allocated for keys and values of all layers."""
        return sum(pool.nbytes for pool in self._sequences.blocks.pools)

    @property
    def query_bytes(self) -> int:
        """Bytes allocated for queries: ``window + tail`` rows per layer and sequence, or more if a forward pass adds
        more decoded tokens than that, plus one row per layer for the queries of prompts."""
        ring = self._sequences.ring
        return 0 if ring is None else ring.nbytes

    # --------------------------------------------------------------------------- methods called by transformers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Passes new keys ``[S, H, q, D]`` and values ``[S, H, q, Dv]`` on to the attention "kara"."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("KaraCache does not support torch.compile")
        if self._unanswered is not None:
            raise RuntimeError(
                f"the keys of layer {self._unanswered} never reached KaraCache's attention: {HOW_TO_LOAD}"
            )
        if layer_idx in self._sliding.windows:
            key_states, value_states = self._sliding.update(layer_idx, key_states, value_states)
            if layer_idx == self.num_layers - 1:
                self._commit()
            return key_states, value_states
        self._unanswered = layer_idx
        key_states._kara = (self, self._full[layer_idx])  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length, padding included. It is the next token's position, regardless of compression."""
        return self._sequences.logical

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Logical sizes of full attention. The cache builds the masks over its rows itself. Those of a layer that
        slides begin at the first token that it holds."""
        if layer_idx in self._sliding.windows:
            return self._sliding.mask_sizes(layer_idx, self._sequences.logical, query_length)
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
    is_sliding = property(lambda self: [layer in self._sliding.windows for layer in range(self.num_layers)])
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
        """Stores the new tokens of one layer and computes attention over all its cached tokens. Layers are those of
        full attention, from 0 on.

        ``query [S, H*G, q, D]``, ``key [S, H, q, D]``, ``value [S, H, q, Dv]``, ``mask`` from
        ``kara_mask``. Returns what transformers' sdpa attention returns: ``[S, q, H*G, Dv]`` and None.
        """
        self._unanswered = None
        if layer == 0:
            self._forward = self._sequences.plan(query, mask, kwargs.get("scaling"))
        step = self._forward
        if step is None:
            raise RuntimeError(f"KaraCache expected layer 0 first and then all layers in order, got layer {layer}")
        if key.device != step.slots.device:
            raise NotImplementedError(
                f"KaraCache expected all layers on {step.slots.device}, got layer {layer} on {key.device}"
            )
        self._sequences.store(step, layer, query, key, value)
        if not step.first:
            key, value = self._sequences.blocks.read(layer, step.longest)
            mask = step.mask
        output = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        if self.num_layers - 1 in self._full and layer == len(self._full) - 1:
            self._commit()
        return output

    def _commit(self) -> None:
        """After the last layer of a forward pass."""
        step, self._forward = self._forward, None
        if step is None:
            raise RuntimeError("KaraCache expected all layers of a forward pass in order, got the last one alone")
        self._sequences.commit(step)
        self._sliding.commit()


def _policy(window: int, keep: int, tail: int, look_ahead: int | None, options: dict[str, Any]) -> Policy:
    """Records every query and compresses a window as soon as it and its tail exist, whatever that frees."""
    split_options(
        {name: value for name, value in options.items() if name != "scorer"}
    )  # raises a TypeError for unknown options and lists the known ones
    return Policy(
        window=window, keep=keep, tail=tail, look_ahead=look_ahead, query_dtype="auto", min_freed_blocks=0,
        max_sequences=_INT32_MAX, max_query_gib=1e6, **options,
    )  # fmt: skip
