"""vLLM's scheduler with a plan before each step, and its KV cache manager with logical and physical lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kara_kernels.engine import Held, Ledger, Plan

from ..live import LiveFile
from ..requests import Choice, RequestError, choose
from ..settings import LIVE, Settings, settings_of
from ..stats import Report, with_report
from ..traces import client_id
from .configure import check_sizes, query_ring_bytes

logger = init_logger("vllm.kara")


@dataclass
class Step:
    """What workers must know about one step. It is sent as the attribute ``kara`` of a SchedulerOutput."""

    plans: list[Plan] = field(default_factory=list)
    """Compressions to execute before the step touches any block."""
    clients: list[tuple[str, int]] = field(default_factory=list)
    """For each plan: the client's request id, and the tokens recomputed when it last resumed, else 0."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Logical minus physical length of scheduled requests if not 0, after these plans."""
    alone: set[str] = field(default_factory=set)
    """Scheduled requests that are never compressed, so their queries are not recorded."""
    preempted: list[str] = field(default_factory=list)
    """Requests that lost their blocks."""
    contexts: dict[str, int] = field(default_factory=dict)
    """Scheduled requests that compute a context whose queries will rank its rows, and its tokens."""


def recomputed_as(request: Request) -> Mapping[str, int] | None:
    """The own settings of a request that was preempted and is compressed while it is recomputed; None for others."""
    return request.kara.own if request.num_preemptions else None


class KaraManager(FullAttentionManager):
    """A manager for full attention that indexes block tables by physical tokens. The scheduler sets ``ledger``."""

    ledger: Ledger
    requests: Mapping[str, Request]
    in_chunks: bool
    """Whether a recomputed text may be computed in chunks."""

    @property
    def has_positionally_stable_blocks(self) -> bool:
        return False

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        request, rows = self.requests[request_id], num_tokens - self.ledger.dropped(request_id)
        # At its admission vLLM asks for the whole text at once.
        if apply_admission_cap and self.in_chunks and (own := recomputed_as(request)) is not None:
            rows = min(rows, self.ledger.peak(request.num_prompt_tokens, num_tokens, **own))
        return super().get_num_blocks_to_allocate(request_id, rows, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        dropped = self.ledger.dropped(request_id)
        return super().allocate_new_blocks(request_id, num_tokens - dropped, num_tokens_main_model - dropped)

    def allocate_external_computed_blocks(
        self, request_id: str, num_local_computed_tokens: int, num_external_computed_tokens: int, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        rows = num_external_computed_tokens - self.ledger.dropped(request_id)
        super().allocate_external_computed_blocks(request_id, num_local_computed_tokens, rows, *args, **kwargs)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # A compressed block no longer holds the tokens of its place in the text, so its hash would be wrong.
        if not self.ledger.dropped(request.request_id):
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finish, abort and preemption all end here.
        self.ledger.forget(request_id)
        return super().pop_blocks_for_free(request_id)

    def shrink(self, plan: Plan) -> None:
        """Applies a plan to the blocks: removes hashes of rewritten blocks and returns empty blocks to the pool."""
        blocks = self.req_to_blocks[plan.request_id]
        freed = blocks[plan.kept_blocks :]
        if self.enable_caching:
            self.block_pool.evict_blocks(set(plan.touched))
        del blocks[plan.kept_blocks :]
        self.block_pool.free_blocks(reversed(freed))


@register_kv_cache_spec(manager_class=KaraManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class KaraSpec(FullAttentionSpec):
    """The spec that makes vLLM use a :class:`KaraManager`. Workers report it instead of FullAttentionSpec."""


@register_kv_cache_spec(manager_class=KaraManager, uniform_type_base_spec=MLAAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class KaraLatentSpec(MLAAttentionSpec):
    """The same for latent caches."""


class KaraScheduler(Scheduler):
    """Plans and commits before vLLM schedules, and sends the plans to the workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        ours = [manager for manager in managers if isinstance(manager, KaraManager)]
        self._others = [manager for manager in managers if isinstance(manager, SlidingWindowManager)]
        if len(ours) != 1 or len(ours) + len(self._others) != len(managers):
            kinds = ", ".join(type(manager).__name__ for manager in managers)
            raise ValueError(
                f"kara: expected one KV cache group of full attention, beside which others may slide, got "
                f"{kinds or 'none'}"
            )
        self._manager = ours[0]
        check_sizes(self.vllm_config, self._manager.block_size)
        self._settings = settings_of(self.vllm_config)
        self._ledger = self._manager.ledger = Ledger(
            self._settings.policy, self._manager.block_size, query_rows=self._settings.query_rows,
            shadow=self._settings.shadow,
        )  # fmt: skip
        live = self._settings.live
        self._live = LiveFile(self.vllm_config.additional_config, live) if live else None
        self._manager.requests = self.requests
        self._manager.in_chunks = self.scheduler_config.enable_chunked_prefill
        self._ring_bytes = query_ring_bytes(self.vllm_config)
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._opted_out: Counter[str] = Counter()
        self._ended: list[float] = []
        self._lost: list[float] = []
        self._preempted: list[str] = []

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        logical = request.num_computed_tokens
        choice = getattr(request, "kara", None)  # none yet, if it waits for rows that a connector loads
        if self.log_stats and logical and choice is not None and choice.own is not None:
            self._ended.append(1 - self._ledger.dropped(request.request_id) / logical)
            if lost := getattr(request, "kara_lost", None):
                self._lost.append(sum(lost) / len(lost))
        return super()._free_request(request, *args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        request.kara_computed = request.num_computed_tokens
        super()._preempt_request(request, *args, **kwargs)
        self._preempted.append(request.request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._live is not None and (settings := self._live.changed()) is not None:
            self._change(settings)
        plans = self._apply(self._ledger.plan(self._held()))
        if (lacking := self._lacking_blocks()) > 0:
            urgent = self._apply(self._ledger.relieve(self._held(urgent=True), lacking))
            self._counts["urgent_compressions"] += len(urgent)
            plans += urgent
        output = super().schedule(*args, **kwargs)
        plans = [plan for plan in plans if not self._is_lost(plan, output)]
        self._start(output)
        dropped = {name: n for name in output.num_scheduled_tokens if (n := self._ledger.dropped(name))}
        alone = {name for name in output.num_scheduled_tokens if self.requests[name].kara.own is None}
        output.kara = Step(plans, [self._client(plan.request_id) for plan in plans], dropped, alone, self._preempted)
        self._preempted = []
        would = "shadow_" if self._settings.shadow else ""
        self._counts[f"{would}compressions"] += len(plans)
        self._counts[f"{would}tokens_dropped"] += sum(plan.physical_len - plan.new_len for plan in plans)
        self._counts[f"{would}blocks_freed"] += sum(len(plan.freed) for plan in plans)
        return output

    def _is_lost(self, plan: Plan, output: SchedulerOutput) -> bool:
        """Whether nobody will read what a plan leaves: vLLM has preempted its request in this step."""
        return not self._ledger.windows(plan.request_id)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on the size of a chunk. A preempted text is recomputed up to its next window only, so that
        it never needs the blocks that it had before it was compressed."""
        most = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        own, text = recomputed_as(request), request.num_tokens - num_computed_tokens
        # The step of the newest token is no chunk of a text, and vLLM wants all of its drafts.
        if (
            own is None
            or not self._manager.in_chunks
            or text == 1
            or num_computed_tokens + most <= request.num_prompt_tokens
        ):
            return most
        return min(most, self._ledger.chunk(request.request_id, request.num_prompt_tokens, num_computed_tokens, **own))

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        self._seconds += getattr(model_runner_output, "kara_seconds", 0.0)
        for name, lost, needed in getattr(model_runner_output, "kara_lost", ()):
            self._ledger.observe(name, needed)
            if name in self.requests:
                self.requests[name].kara_lost.append(lost)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        # vLLM sends its statistics to one of several front ends. The report goes with them.
        for client, output in outputs.items():
            if output.scheduler_stats is not None:
                outputs[client] = with_report(output, self._report())
        return outputs

    def _apply(self, plans: list[Plan]) -> list[Plan]:
        for plan in plans:
            self._ledger.commit(plan)
            if not self._settings.shadow:
                self._manager.shrink(plan)
        return plans

    def _change(self, settings: Settings) -> None:
        """Takes over settings that changed while serving."""
        try:
            self._ledger.update(settings.policy)
        except ValueError as error:
            logger.error("Kara's settings stay as they are: %s", error)
            return
        self._settings = settings
        values = settings.values
        logger.info("Kara's settings changed: %s", ", ".join(f"{name}={values[name]!r}" for name in LIVE))

    def _lacking_blocks(self) -> int:
        """Blocks that the next token of every running request needs, and its drafts, beyond those that are free."""
        needed = 0
        for request in self.running:
            name, tokens = request.request_id, request.num_computed_tokens + 1 + len(request.spec_token_ids)
            for manager in (self._manager, *self._others):
                rows = tokens - (self._ledger.dropped(name) if manager is self._manager else 0)
                needed += max(0, -(-rows // manager.block_size) - len(manager.req_to_blocks[name]))
        return needed - self._manager.block_pool.get_num_free_blocks()

    def _held(self, *, urgent: bool = False) -> Sequence[Held]:
        """Running requests that are due. Tokens of a step in flight count, because it runs before the plans do."""
        held = []
        for request in self.running:
            name, computed = request.request_id, request.num_computed_tokens
            if not self._ledger.is_due(name, computed, urgent=urgent):
                continue
            if request.resumable:  # the next prompt of a session would come after its frontier
                continue
            blocks = self._manager.req_to_blocks[name]
            first_owned = len(blocks)
            while first_owned and blocks[first_owned - 1].ref_cnt == 1 and not blocks[first_owned - 1].is_null:
                first_owned -= 1
            held.append(Held(name, computed, [block.block_id for block in blocks], first_owned))
        return held

    def _start(self, output: SchedulerOutput) -> None:
        """Registers requests that start, or restart after preemption, with the tokens from the prefix cache."""
        cached = output.scheduled_cached_reqs
        begun = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        begun += [
            x for x in zip(cached.req_ids, cached.num_computed_tokens, strict=True) if x[0] in cached.resumed_req_ids
        ]
        for name, computed in begun:
            request = self.requests[name]
            if request.num_preemptions:
                request.kara_recomputed = request.num_tokens
                self._counts["recomputed_tokens"] += max(0, request.kara_computed - computed)
            else:
                request.kara_recomputed, request.kara_lost, request.kara = 0, [], self._choose(request)
                self._opted_out.update(filter(None, [request.kara.reason]))
            if request.kara.own is not None:
                self._ledger.start(name, request.num_prompt_tokens, computed, **request.kara.own)

    def _choose(self, request: Request) -> Choice:
        try:
            return choose(request.sampling_params, self._settings, self._manager.block_size)
        except RequestError as error:  # no front end has checked it, because vLLM's front end in Rust runs no plugins
            logger.error("Kara leaves request %s alone: %s", request.request_id, error)
            return Choice(None, "request")

    def _client(self, request_id: str) -> tuple[str, int]:
        """The client's request id, and the recomputed tokens."""
        return client_id(request_id), self.requests[request_id].kara_recomputed

    def _report(self) -> Report:
        """Counts and ended requests since the last report, and current values."""
        running = [r for r in self.running if r.status == RequestStatus.RUNNING]
        logical = sum(r.num_computed_tokens for r in running)
        dropped = sum(self._ledger.dropped(r.request_id) for r in running)
        report = Report(
            counts={**self._counts, "compress_seconds": self._seconds},
            skipped=dict(self._ledger.skipped),
            opted_out=dict(self._opted_out),
            ended=self._ended,
            lost=self._lost,
            retention=1 - dropped / logical if logical else 1.0,
            query_ring_bytes=self._ring_bytes,
            keep=self._settings.policy.keep,
        )
        self._counts, self._opted_out, self._ledger.skipped = Counter(), Counter(), Counter()
        self._seconds, self._ended, self._lost = 0.0, [], []
        return report


class KaraAsyncScheduler(KaraScheduler, AsyncScheduler):
    """The same while vLLM schedules asynchronously: a step is planned before the tokens of the last one are known.

    No plan depends on them. Lengths count tokens that are scheduled, and workers run steps in order: they move the rows
    of a step when those of the steps before are written, and nothing of an earlier step reads a freed block later.
    """
