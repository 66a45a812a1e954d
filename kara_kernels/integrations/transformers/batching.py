"""The KV cache of transformers' continuous batching, compressed while ``generate_batch()`` decodes.

    from kara_kernels.integrations.transformers import KaraBatching

    with KaraBatching(model, window=256, keep=128) as kara:
        outputs = model.generate_batch(inputs, generation_config=..., continuous_batching_config=...)
    print(kara.retention, len(kara.events))

A request is due when it has ``window + tail`` uncompressed decoded tokens. Between two steps a window of them is
compressed in transformers' own pages, and the emptied blocks return to its pool. The scheduler then counts the
request's *physical* length (``position_offset``), so admission, allocation, masks, slots and block tables need no
change. Only the positions that the model sees are restored to *logical* ones.

While the context is open, four methods of every batch processor made from the model are wrapped on that instance, and
the attention function also passes its queries to the recorder. Prefix sharing stays on. Only blocks that a request owns
alone are written. Their hashes are removed first, and compressed content is never hashed again.

A window must be at least one page. transformers' default ``page_size`` is 256, and smaller pages free more memory. The
memory for queries is in addition to what ``max_memory_percent`` gives to the cache.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kara_kernels import PagedCache
from kara_kernels.engine import Compression, Held, Ledger, Losses, Policy, QueryRing, Span, execute
from kara_kernels.values import check_choice

from .models import check_config, not_plain
from .rotary import resolve_look_ahead

_EXPECTED = "5.19"
_MODEL = "destroy_cached_continuous_batching_manager generate_batch"
_MANAGER = """
    _create_batch_processor _original_attn_impl continuous_batching_config destroy distributed_helper.tp_size
    is_running stop"""
_PROCESSOR = """
    cache.cache_allocators cache.mark_complete_blocks cache.max_batch_tokens cb_config.max_requests_per_batch
    inputs_and_outputs.compute_stream inputs_and_outputs.position_ids inputs_and_outputs.prepare_batch_tensors
    prepare_next_batch scheduler.active_requests"""
_ALLOCATOR = """
    block_physical_stride block_table cache_tensor free_blocks layer_indices ledger.block_to_hash ledger.hash_to_block
    ledger.shared_ref_counts pool.free_blocks tokens_per_page"""
_REQUEST = "_true_initial_tokens initial_tokens position_offset remaining_prefill_tokens request_id status.name"


class KaraBatching:
    """Compresses the KV cache of a model's continuous batching while this context is open.

    It works with ``generate_batch``, ``continuous_batching_context_manager`` and ``init_continuous_batching``. On exit
    it waits for running managers, or stops them if an exception was raised. It destroys a persistent manager and undoes
    all wrapping.

    Args:
        model: a transformers model whose layers are all full causal softmax attention.
        backend: of :func:`kara_kernels.compress_window`: ``"auto"``, ``"triton"`` or ``"torch"``.
        **policy: fields of :class:`kara_kernels.engine.Policy`.

    Raises:
        TypeError, ValueError: unknown settings or settings out of range. On entry: a model that is already in use. When
            a batch starts: a window below the page size, or a query ring above ``max_query_gib``.
        NotImplementedError: on entry: models with sliding, linear, soft-capped or sink attention and encoder-decoder
            models. When a batch starts: tensor parallelism, asynchronous batching, CUDA graphs, ``torch.compile`` and
            CPU offloading (``use_async_batching``, ``use_cuda_graph``, ``*_compile_config``, ``cpu_offload_space``).
        RuntimeError: a version of transformers with a different continuous batching. The message names the version.

    A preempted request (transformers' "soft reset") is recomputed in full and compressed again.
    """

    def __init__(self, model: Any, *, backend: str = "auto", **policy: Any) -> None:
        self.policy, self.ahead = resolve_look_ahead(Policy.from_settings(policy), model)
        check_choice("backend", backend, ("auto", "triton", "torch"))
        self.model, self.backend = model, backend
        self.events: list[Compression] = []
        """Every compression. Clear it now and then if you serve for a long time."""
        self.skipped: Counter[str] = Counter()
        """Windows that had to wait, by reason; see :class:`kara_kernels.engine.Ledger`."""
        self.tokens = 0
        """Tokens that requests computed or took from the prefix cache."""
        self.dropped = 0
        """Rows removed by compressions."""
        self._managers: list[Any] = []
        self._attentions: list[str] = []

    @property
    def retention(self) -> float:
        """Realised retention: rows kept divided by tokens seen, prompts included, over all requests."""
        return 1 - self.dropped / self.tokens if self.tokens else 1.0

    def __enter__(self) -> KaraBatching:
        model = self.model
        if not hasattr(type(model), "init_continuous_batching"):
            raise TypeError(f"model: expected one that has generate_batch, got {type(model).__name__}")
        _need(model, _MODEL)
        check_config(model.config, "KaraBatching")
        if any(hasattr(module, "sinks") for module in model.modules()):
            raise NotImplementedError("KaraBatching does not support attention sinks")
        if "init_continuous_batching" in vars(model):
            raise ValueError("model: expected one outside of any KaraBatching, got one that is in use")
        if getattr(model, "_cached_continuous_batching_manager", None) is not None:
            raise ValueError(
                "model: expected no existing persistent manager, got one: call "
                "destroy_cached_continuous_batching_manager() first"
            )
        model.init_continuous_batching = self._init_continuous_batching
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for manager in self._managers:
                if manager.is_running():
                    manager.stop(hard_stop=kind is not None)
            self.model.destroy_cached_continuous_batching_manager()
        finally:
            del self.model.init_continuous_batching
            for name in self._attentions:
                _unwrap_attention(name)
            self._managers, self._attentions = [], []

    def _init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """``model.init_continuous_batching``: the manager it returns makes processors that compress."""
        manager = type(self.model).init_continuous_batching(self.model, *args, **kwargs)
        if manager in self._managers:  # a persistent manager
            return manager
        try:
            _check_manager(manager)
            create = manager._create_batch_processor

            def create_batch_processor() -> Any:
                processor = create()
                if getattr(processor.cache, "_kara", None) is None:
                    processor.cache._kara = _Run(processor, self)
                return processor

            manager._create_batch_processor = create_batch_processor
            # Check now. An error here reaches the caller, an error in the manager's thread does not.
            with torch.inference_mode(False):
                manager.batch_processor = create_batch_processor()
            name = self.model.config.get_text_config()._attn_implementation
            _wrap_attention(name)
            self._attentions.append(name)
        except BaseException:
            manager.destroy()
            if manager._original_attn_impl is not None:
                self.model.set_attn_implementation(manager._original_attn_impl)
            raise
        self._managers.append(manager)
        return manager


class _Run:
    """One batch processor with compression: its ledger, its query ring and its wrapped methods."""

    def __init__(self, processor: Any, kara: KaraBatching) -> None:
        _need(processor, _PROCESSOR)
        cache, self.io, self.scheduler = processor.cache, processor.inputs_and_outputs, processor.scheduler
        (self.allocator,) = cache.cache_allocators.values()
        allocator, config = self.allocator, processor.config
        _need(allocator, _ALLOCATOR)
        self.kara, self.policy = kara, kara.policy
        self.ledger = Ledger(self.policy, allocator.tokens_per_page)
        self.ledger.skipped = kara.skipped  # counted over all managers
        self.losses = Losses(self.policy.max_loss)
        # [blocks, K and V of every layer, page, H, D], including the trash at the start, so ids are the allocator's.
        layers = len(allocator.layer_indices)
        heads, dim = allocator.cache_tensor.shape[2:]
        pool = allocator.cache_tensor.view(-1, 2 * layers, allocator.tokens_per_page, heads, dim)
        assert pool[0].numel() == allocator.block_physical_stride * heads * dim
        self.pool = PagedCache(list(pool[:, 0::2].unbind(1)), list(pool[:, 1::2].unbind(1)))
        self.room = processor.cb_config.max_requests_per_batch
        self.ring = QueryRing(
            self.policy,
            layers=layers,
            query_heads=config.num_attention_heads,
            kv_heads=heads,
            head_dim=dim,
            max_sequences=self.room,
            max_tokens=cache.max_batch_tokens,
            dtype=pool.dtype,
            device=pool.device,
        )
        self.look_ahead = kara.ahead and kara.ahead(self.policy.positions_ahead, pool.device)
        self.running: set[str] = set()
        self.recording = False
        self.recorded: set[int] = set()  # layers
        self.scale: float | None = None

        self._prepare_next_batch = processor.prepare_next_batch
        self._prepare_batch_tensors = self.io.prepare_batch_tensors
        self._free_blocks = allocator.free_blocks
        self._mark_complete_blocks = cache.mark_complete_blocks
        processor.prepare_next_batch = self.prepare_next_batch
        self.io.prepare_batch_tensors = self.prepare_batch_tensors
        allocator.free_blocks = self.free_blocks
        cache.mark_complete_blocks = self.mark_complete_blocks

    # ------------------------------------------------------------------------- wrapped methods

    def prepare_next_batch(self) -> bool:
        """First compresses what is due, so that requests of this step can use the freed blocks."""
        self.compress()
        return self._prepare_next_batch()

    def prepare_batch_tensors(self, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        """Makes tensors from physical lengths, then restores logical positions."""
        spans, shift = [], []
        for future in requests_in_batch:
            state, count = future.state, future.query_length
            self._start(state)
            self.kara.tokens += count
            dropped = self.ledger.dropped(state.request_id)
            begin = state.position_offset + dropped
            known = state.request_id in self.running
            spans.append(Span(state.request_id, _prompt_len(state) if known else begin + count, begin, count))
            shift += [dropped] * count
        self._prepare_batch_tensors(requests_in_batch, *args, **kwargs)
        if any(shift):
            positions = self.io.position_ids[: len(shift)]
            positions += torch.tensor(shift, dtype=positions.dtype, device=positions.device)
        with self._stream():
            self.recording = self.ring.prepare(spans)

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """The request finished, failed, or was cancelled or preempted. Its compressed state is dropped."""
        self.ledger.forget(request_id)
        self.ring.release(request_id)
        self.running.discard(request_id)
        self._free_blocks(request_id, no_cache)

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """Skips compressed requests, whose blocks do not hold the tokens that a hash would stand for."""
        if not self.ledger.dropped(state.request_id):
            self._mark_complete_blocks(state, complete_blocks)

    def record(self, module: Any, query: Tensor, kwargs: dict[str, Any]) -> None:
        """Records queries ``[1, H*G, T, D]`` of one layer before its attention runs."""
        if odd := not_plain(kwargs):
            where = type(module).__name__
            raise NotImplementedError(f"KaraBatching does not support attention with {', '.join(odd)} ({where})")
        if self.recording:
            self.scale = kwargs.get("scaling")
            self.recorded.add(module.layer_idx)
            self.ring.record(module.layer_idx, query[0].transpose(0, 1))

    # ----------------------------------------------------------------------------------------- one compression

    def compress(self) -> None:
        """Plans, executes and commits what is due. Nothing is in flight between two steps."""
        due = {
            request_id: state
            for request_id, state in self.scheduler.active_requests.items()
            if state.status.name == "DECODING"
            and not state.remaining_prefill_tokens
            and self.ledger.is_due(request_id, state.position_offset + self.ledger.dropped(request_id))
        }
        plans = self.ledger.plan(self._held(state) for state in due.values())
        if not plans:
            return
        if len(self.recorded) < len(self.pool.k):
            raise RuntimeError(
                f"KaraBatching saw queries of layers {sorted(self.recorded)} of {len(self.pool.k)}: the model's "
                f"attention does not go through transformers' ALL_ATTENTION_FUNCTIONS"
            )
        hashes = self.allocator.ledger
        for block in (block for plan in plans for block in plan.touched):
            if (block_hash := hashes.block_to_hash.pop(block, None)) is not None:
                del hashes.hash_to_block[block_hash]
        began = time.perf_counter()
        with self._stream():
            lists = execute(
                plans, self.pool, self.ring, self.policy, scale=self.scale, look_ahead=self.look_ahead,
                backend=self.kara.backend, watch=self.losses.watch,
            )  # fmt: skip
            kept = [keep.cpu() for keep in lists]
        seconds = (time.perf_counter() - began) / len(plans)
        losses = {loss.request_id: loss for loss in self.losses.arrived()}  # all, because the copies have waited
        for plan, keep_indices in zip(plans, kept, strict=True):
            self.ledger.commit(plan)
            due[plan.request_id].position_offset = plan.new_len
            del self.allocator.block_table[plan.request_id][plan.kept_blocks :]
            self.allocator.pool.free_blocks(self.allocator.index, list(plan.freed))
            self.kara.dropped += plan.physical_len - plan.new_len
            _, lost, needed = losses[plan.request_id]
            self.ledger.observe(plan.request_id, needed)
            self.kara.events.append(Compression.of(plan, keep_indices, seconds=seconds, lost=lost))

    def _held(self, state: Any) -> Held:
        blocks, shared = self.allocator.block_table[state.request_id], self.allocator.ledger.shared_ref_counts
        owned = next((i for i in range(len(blocks), 0, -1) if blocks[i - 1] in shared), 0)
        return Held(
            state.request_id, state.position_offset + self.ledger.dropped(state.request_id), blocks, first_owned=owned
        )

    def _start(self, state: Any) -> None:
        """A request is scheduled, possibly again. If the ring is full, it is retried every step."""
        if state.request_id in self.running or len(self.running) >= self.room:
            return
        self.running.add(state.request_id)
        self.kara.tokens += state.position_offset
        self.ledger.start(state.request_id, _prompt_len(state), computed=state.position_offset)

    def _stream(self) -> Any:
        stream = self.io.compute_stream
        return nullcontext() if stream is None else torch.get_device_module().stream(stream)


def _prompt_len(state: Any) -> int:
    # After a preemption, initial_tokens also contains the decoded text.
    return state._true_initial_tokens or len(state.initial_tokens)


def _check_manager(manager: Any) -> None:
    """Rejects unsupported settings before a batch starts."""
    _need(manager, _MANAGER)
    try:
        from transformers.generation.continuous_batching.requests import RequestState

        _need(RequestState("", []), _REQUEST)
    except ImportError as error:
        raise _mismatch("requests.RequestState") from error
    config = manager.continuous_batching_config
    refused = {
        "tensor parallelism": manager.distributed_helper.tp_size > 1,
        "asynchronous batching: set use_async_batching=False": config.use_async_batching,
        "CUDA graphs: set use_cuda_graph=False": any(config.cuda_graph_booleans),
        "torch.compile: leave varlen_compile_config, decode_compile_config and default_compile_level unset": (
            config.varlen_compile_config is not None or config.decode_compile_config is not None
        ),
        "CPU offloading: set cpu_offload_space=0.0": config.cpu_offload_space != 0,
    }
    for what, is_on in refused.items():
        if is_on:
            raise NotImplementedError(f"KaraBatching does not support {what}")


def _need(thing: Any, names: str) -> None:
    for name in names.split():
        try:
            operator.attrgetter(name)(thing)
        except AttributeError as error:
            raise _mismatch(f"{type(thing).__name__}.{name}") from error


def _mismatch(name: str) -> RuntimeError:
    return RuntimeError(
        f"KaraBatching expected the continuous batching of transformers {_EXPECTED}, got {transformers.__version__} "
        f"without {name}"
    )


# -------------------------------------------------------------------------------------- recording queries

_lock = threading.Lock()
_wrapped: dict[str, tuple[Callable[..., Any], int]] = {}  # name: the original function, and how many batches use it


def _wrap_attention(name: str) -> None:
    """Makes the attention ``name`` pass its queries to the run that owns the call's cache, if any."""
    with _lock:
        inner, users = _wrapped.get(name, (ALL_ATTENTION_FUNCTIONS[name], 0))
        _wrapped[name] = inner, users + 1
        if users:
            return

        def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            run = getattr(kwargs.get("cache"), "_kara", None)
            if run is not None:
                run.record(module, query, kwargs)
            return inner(module, query, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(name, attention)


def _unwrap_attention(name: str) -> None:
    with _lock:
        inner, users = _wrapped.pop(name)
        if users > 1:
            _wrapped[name] = inner, users - 1
        else:
            ALL_ATTENTION_FUNCTIONS.register(name, inner)
