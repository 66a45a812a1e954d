"""vLLM's model runners with Kara: they record queries, execute plans before the step, and shift lengths and slots.

A step with plans first moves rows. Then it continues as in vLLM: block tables, from which freed blocks are cut first,
block zeroing, copies, inputs, forward pass. Compression runs outside captured CUDA graphs, on the stream of the forward
pass. Recording runs inside them and reads its indices from a fixed address.
"""

from __future__ import annotations

import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from kara_kernels.engine import Compression, Loss, Losses, PackedCache, QueryRing, Span, execute, warm_up
from kara_kernels.paged import PagedCache

from ..latent import is_latent, latent_query
from ..layout import paged_view
from ..quantised import plain, scales_of
from ..settings import settings_of
from ..traces import append
from ..unsupported import UNSUPPORTED_LAYERS, found_in
from .configure import check_sizes, ring_rows
from .rotary import look_ahead_by, look_ahead_of
from .scheduler import KaraLatentSpec, KaraSpec, Step

logger = init_logger("vllm.kara")

OURS = {FullAttentionSpec: KaraSpec, MLAAttentionSpec: KaraLatentSpec}
"""Specs of caches that are compressed, and what they become."""

_Mixin: Any = Any if TYPE_CHECKING else object  # the class after the mixin is one of several classes of vLLM


class KaraRunner(_Mixin):
    """Kara's changes to every model runner of vLLM. It is mixed in before the runner's class."""

    def kara_init(self) -> None:
        """Called after the runner's own constructor."""
        self.kara = settings_of(self.vllm_config)
        self.kara_step = Step()
        self.kara_seconds = 0.0
        self.kara_losses = Losses(self.kara.policy.max_loss, self._mean_over_ranks)
        self.kara_lost: list[Loss] = []
        self.kara_ring: QueryRing | None = None
        self.kara_beside = 0  # attention layers that slide
        self.kara_cache: PagedCache | PackedCache | None = None
        self.kara_scales: tuple[Tensor | None, Tensor | None] = (None, None)

    # ------------------------------------------------------------------------------------------- start

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_model(*args, **kwargs)
        self.kara_layers = self._attention_layers()
        first = next(iter(self.kara_layers.values()))
        # Allocated before vLLM measures the memory left for blocks.
        self.kara_ring = QueryRing(
            self.kara.policy,
            layers=len(self.kara_layers),
            query_heads=first.num_heads,
            kv_heads=first.num_kv_heads,
            head_dim=first.head_size,
            max_sequences=self.max_num_reqs,
            max_tokens=self.max_num_tokens,
            dtype=self.vllm_config.model_config.dtype,
            device=self.device,
            rows=ring_rows(self.vllm_config),
        )
        self.kara_ring.warm_up()  # vLLM may capture graphs while it measures memory, and nothing loads in a capture
        logger.info(
            "Kara's query ring takes %.2f GiB: for each of %d sequences as much as %.0f tokens of KV cache",
            self.kara_ring.nbytes / 2**30,
            self.max_num_reqs,
            self.kara_ring.kv_tokens,
        )
        self.kara_look_ahead = look_ahead_of(self._kara_attention(), self.kara.policy, self.device)
        if self.kara_look_ahead is None and self.kara.policy.positions_ahead:
            logger.warning("Kara does not look ahead: the model's rotary embedding is not of a known kind")
        for index, layer in enumerate(self.kara_layers.values()):
            if is_latent(layer):
                layer.forward_impl = self._recording_latent(index, layer)
            else:
                layer.impl.forward = self._recording(index, layer.impl.forward)
        return loaded

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs = super().get_kv_cache_spec()
        refused = {
            type(spec).__name__
            for name, spec in specs.items()
            if (type(spec) not in OURS if name in self.kara_layers else type(spec) is not SlidingWindowSpec)
        }
        if refused:
            got = ", ".join(sorted(refused))
            raise ValueError(f"kara: expected caches of full attention, beside which others may slide, got {got}")
        return {
            name: OURS[type(spec)](**{field.name: getattr(spec, field.name) for field in fields(spec) if field.init})
            if name in self.kara_layers
            else spec
            for name, spec in specs.items()
        }

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:
            return
        groups = self.kv_cache_config.kv_cache_groups
        ours = [i for i, group in enumerate(groups) if set(group.layer_names) == set(self.kara_layers)]
        block_size = groups[ours[0]].kv_cache_spec.block_size if ours else 0
        if not ours or (size := self._kara_kernel_blocks()[ours[0]]) != block_size:
            got = f"kernel blocks of {size}" if ours else f"{len(groups)} groups of other layers"
            raise ValueError(
                f"kara: expected the layers of full attention to be one KV cache group, with blocks of its kernels "
                f"({block_size}), got {got}"
            )
        self._kara_adopt(ours[0], len(groups))
        check_sizes(self.vllm_config, block_size)
        self.kara_scales = scales_of(list(self.kara_layers.values()))
        self._check_value_scales(self.kara_scales[1])
        self.kara_cache = paged_view(list(self.kara_layers.values()), self.kv_cache_config.num_blocks, block_size)
        logger.info("Kara moves rows in %s blocks", "packed" if isinstance(self.kara_cache, PackedCache) else "plain")
        assert self.kara_ring is not None
        for policy in self.kara.policies:
            warm_up(self.kara_cache, self.kara_ring, policy, **self._kara_options())
        if has_kv_transfer_group() and hasattr(connector := get_kv_transfer_group(), "judge_by"):
            ahead, options = look_ahead_by(self._kara_attention()), self._kara_options()
            scales = (options[name] for name in ("scale", "k_scale", "v_scale"))
            connector.judge_by(self.kara_ring.of_context, self.kara_ring.blank, ahead, *scales)

    def _attention_layers(self) -> dict[str, Any]:
        """The layers of full attention in model order. Others slide, if there are any, and are left alone. Raises an
        error that names the first one that is not plain attention."""
        found = {name: x for name, x in self.compilation_config.static_forward_context.items() if hasattr(x, "impl")}
        layers = {name: x for name, x in found.items() if getattr(x, "sliding_window", None) is None} or found
        self.kara_beside = len(found) - len(layers)
        for name, layer in layers.items():
            if refused := found_in(layer, UNSUPPORTED_LAYERS):
                raise ValueError(f"kara: expected plain attention in layer {name}, got {'; '.join(refused)}")
        shapes = {(x.num_heads, x.num_kv_heads, x.head_size, x.impl.scale, x.kv_cache_dtype) for x in layers.values()}
        if len(shapes) != 1:
            raise ValueError(
                f"kara: expected the same heads, scale and cache in every layer, got {sorted(shapes) or 'no layer'}"
            )
        return layers

    def _kara_attention(self) -> list[Any]:
        """What has the rotary embeddings of these layers: the model, or the modules around them if others slide."""
        model = self.get_model()
        if not self.kara_beside:
            return [model]
        around = [name.rpartition(".")[0] for name in self.kara_layers]
        return [module for name, module in model.named_modules() if name in around]

    def _check_value_scales(self, scales: Tensor | None) -> None:
        """Lists that heads or layers share compare their value norms, which are those of stored values."""
        policy = self.kara.policy
        if scales is None or policy.pool == "head" or policy.value_norm is False or policy.scorer != "kara":
            return
        compared = scales if policy.pool == "layer" else scales.flatten()[None]
        if bool((compared != compared[:, :1]).any()):
            raise ValueError(
                f"kara: expected pool='head' or value_norm=False beside value scales that differ, got {policy.pool!r}"
            )

    def _recording(self, index: int, forward: Any) -> Any:
        """A layer's attention that first records its queries."""
        ring, dtype = self.kara_ring, self.vllm_config.model_config.dtype
        assert ring is not None

        def record_and_forward(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.kara_records:
                ring.record(index, plain(layer, query, dtype))
            return forward(layer, query, *args, **kwargs)

        return record_and_forward

    def _recording_latent(self, index: int, layer: Any) -> Any:
        """The same for a layer with a latent cache."""
        ring, forward, ahead = self.kara_ring, layer.forward_impl, self.kara_look_ahead
        assert ring is not None
        if ahead is not None:
            dtype = self.vllm_config.model_config.dtype
            ahead = ahead._replace(cos=ahead.cos.to(dtype), sin=ahead.sin.to(dtype))

        def record_and_forward(query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.kara_records:
                ring.record(index, latent_query(layer, query, ahead))
            return forward(query, *args, **kwargs)

        return record_and_forward

    # -------------------------------------------------------------------------------------------- step

    @property
    def kara_records(self) -> bool:
        """Captured graphs always record, possibly into a dummy row. Other steps record only if a query must be kept."""
        return self._kara_records or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing())

    _kara_records = False

    def _kara_prepare(self, names: Any, prompts: Any, firsts: Any, counts: Any) -> None:
        """Sets which queries of the step are recorded, given its requests in batch order."""
        assert self.kara_ring is not None
        ends = firsts + counts
        # A request that is left alone records nothing, as if the step computed its prompt.
        self._kara_records = self.kara_ring.prepare(
            Span(
                name,
                int(end if name in self.kara_step.alone else prompt),
                int(first),
                int(end - first),
                self.kara_step.contexts.get(name, 0),
            )
            for name, prompt, first, end in zip(names, prompts, firsts, ends, strict=True)
        )

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.kara_step = step = getattr(scheduler_output, "kara", Step())
        if step.plans:
            self._compress(step)
        assert self.kara_ring is not None
        for request_id in (*scheduler_output.finished_req_ids, *step.preempted):
            self.kara_ring.release(request_id)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        self.kara_lost += self.kara_losses.arrived()
        if output is not None and (self.kara_seconds or self.kara_lost):
            sent = _sent(output)
            sent.kara_seconds, sent.kara_lost = self.kara_seconds, self.kara_lost
            self.kara_seconds, self.kara_lost = 0.0, []
        return output

    # --------------------------------------------------------------------------------------- compression

    def _compress(self, step: Step) -> None:
        assert self.kara_cache is not None
        assert self.kara_ring is not None
        began = time.perf_counter()
        keep = execute(
            step.plans, self.kara_cache, self.kara_ring, self.kara.policy, **self._kara_options(),
            dry_run=self.kara.shadow, watch=self.kara_losses.watch,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        self.kara_seconds += seconds
        if self.kara.trace is not None:
            self._trace(self.kara.trace, step, keep, seconds / len(step.plans))

    def _kara_forget_freed(self) -> None:
        """Cuts the worker's copies of block tables to the length of the scheduler's."""
        if not self.kara.shadow:
            for plan in self.kara_step.plans:
                self._kara_forget_blocks(plan.request_id, plan.kept_blocks)

    def _kara_options(self) -> dict[str, Any]:
        pooled = self.kara.policy.pool != "head"
        scale = next(iter(self.kara_layers.values())).impl.scale
        reduce_scores = self._mean_over_ranks if pooled else None
        keys, values = self.kara_scales
        recorded_ahead = is_latent(next(iter(self.kara_layers.values())))
        return {"scale": scale, "k_scale": keys, "v_scale": values, "reduce_scores": reduce_scores,
                "look_ahead": None if recorded_ahead else self.kara_look_ahead}  # fmt: skip

    def _mean_over_ranks(self, scores: Tensor) -> Tensor:
        group = get_tp_group()
        return scores if group.world_size == 1 else group.all_reduce(scores) / group.world_size

    def _trace(self, path: str, step: Step, keep: list[Tensor], seconds: float) -> None:
        rank = get_tp_group().rank_in_group
        kept_of = [_of_all_ranks(kept.cpu()) for kept in keep]
        self.kara_lost += self.kara_losses.arrived()  # all of them, because the copies above have waited
        if rank:
            return
        lost = {loss.request_id: loss.lost for loss in self.kara_lost}
        for plan, (name, recomputed), kept in zip(step.plans, step.clients, kept_of, strict=True):
            record = Compression.of(
                plan, kept, seconds=seconds, request_id=name, recomputed_len=recomputed, lost=lost[plan.request_id],
                moved=not self.kara.shadow,
            )  # fmt: skip
            append(path, record.as_dict())


def _sent(output: Any) -> Any:
    """What the scheduler gets. V1 and V2 wrap it, under two names, while the tokens are copied to the host."""
    for name in ("_model_runner_output", "model_runner_output"):
        output = getattr(output, name, output)
    return output


def _of_all_ranks(kept: Tensor) -> Tensor:
    """A keep list ``[L, H, K]`` on the CPU with the heads of all tensor-parallel ranks, in rank order."""
    group = get_tp_group()
    if group.world_size == 1:
        return kept
    kept = kept.contiguous()
    of_ranks = [torch.empty_like(kept) for _ in range(group.world_size)]
    torch.distributed.all_gather(of_ranks, kept, group=group.cpu_group)
    return torch.cat(of_ranks, 1)
