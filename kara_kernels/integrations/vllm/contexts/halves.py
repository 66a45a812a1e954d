"""The connector's two halves, and what they send each other.

:class:`SchedulerHalf` answers vLLM's scheduler and books what the workers do. :class:`WorkerHalf` does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.logger import init_logger
from vllm.v1.request import Request

from .admission import Admission
from .catalogue import Way
from .conversations import Conversations
from .jobs import Ended, Load, Store
from .manager import GPU, ContextManager, Place
from .preempted import Preempted
from .requests import Asked, asked_of
from .scheduler import salt
from .sharing import Sharing
from .stats import ContextStats
from .worker import ContextWorker

logger = init_logger("vllm.kara")
MOST = 2**31 - 1
PAUSE = 0.01  # seconds: what a request that arrives now may wait


@dataclass
class Step(KVConnectorMetadata):
    """Work that begins with one step of the engine."""

    idle: bool = False
    """The step computes nothing."""
    stores: list[Store] = field(default_factory=list)
    """After the step's forward pass, which may write their last rows."""
    loads: list[Load] = field(default_factory=list)
    leaving: list[Store] = field(default_factory=list)
    """Of requests that have lost their blocks: before the step, which may overwrite them."""
    flush: list[int] = field(default_factory=list)
    """Stores that must have ended before the step, because their blocks are overwritten by it."""
    judged: dict[str, int] = field(default_factory=dict)
    """Requests of the step that compute a context whose queries may rank its rows, and its tokens."""


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """Jobs that ended since the last step, by number."""

    ended: dict[int, Ended] = field(default_factory=dict)

    def aggregate(self, other: Any) -> Reports:
        merged = dict(self.ended)
        for number, ended in other.ended.items():
            merged[number] = merged[number].and_another(ended) if number in merged else ended
        return Reports(merged)


class Silent(NamedTuple):
    """A request before its first token."""

    arrival: float
    source: str
    """Of the rows of its context."""
    predicted: float
    """Seconds, without those in queues."""


def ids_of(request: Request) -> Sequence[int]:
    """Tokens of a prompt, by which profiles know contexts. None of an adapter's: a profile is one of the model."""
    return () if request.lora_request is not None else request.prompt_token_ids or ()


class SchedulerHalf:
    """Requests and their contexts.

    Args:
        sharing: lookups and offers of a remote tier, if there is one.
        conversations: of requests that windows compress, if they are to be stored.
        preempted: what windows left of preempted requests, if it is to be stored.
        computed: tokens of a request whose rows are written when the step that is being built begins.
        blocks: ids of a request's blocks.
    """

    def __init__(
        self, manager: ContextManager, sharing: Sharing | None = None, conversations: Conversations | None = None,
        preempted: Preempted | None = None, *,
        computed: Callable[[str], int], blocks: Callable[[str], list[int]], default: str,
    ) -> None:  # fmt: skip
        self.manager, self._computed, self._blocks, self._default = manager, computed, blocks, default
        self._sharing, self._conversations, self._preempted = sharing, conversations, preempted
        self._undecided: set[str] = set()  # requests that must ask again: the remote tier or a store has not answered
        self._asked: dict[str, Asked] = {}
        self._places: dict[str, tuple[Place, Sequence[int]]] = {}  # to be stored once computed, and the prompt's tokens
        self._unjudged: dict[str, int] = {}  # the tokens that requests had before their first step
        self._admitted: dict[str, Admission] = {}
        self._entering: dict[str, str] = {}  # where requests find their packet's rows, until they are given blocks
        self._ended: set[str] = set()  # requests whose blocks are held by a store
        self._short = False  # of blocks, in the step that is being built
        self._silent: dict[str, Silent] = {}  # requests before their first token
        self._told: dict[tuple[str, ...], float] = {}

    @property
    def busy(self) -> bool:
        """Whether there is something to do, although no request runs."""
        return self.manager.transfers.busy or bool(self._ended) or (self._sharing is not None and self._sharing.busy)

    def arrived(self, request: Request) -> None:
        try:
            asked = asked_of(request.kv_transfer_params, self._default)
        except ValueError as error:  # no front end has checked it, because vLLM's front end in Rust runs no plugins
            logger.error("Request %s is left alone: %s", request.request_id, error)
            asked = Asked(False, None)
        self._asked[request.request_id] = asked
        if not asked.on or request.resumable:
            return
        if self._conversations is not None:
            self._conversations.arrived(request)
        place = self.manager.place(request.block_hashes, request.num_prompt_tokens, asked.tokens)
        if place is not None:
            self._places[request.request_id] = place, ids_of(request)
        if self._sharing is not None and (place is not None or asked.tokens is None):
            of_interest = place if asked.tokens is not None else None
            self._sharing.arrived(
                request.request_id, request.block_hashes, request.num_prompt_tokens, ids_of(request), of_interest
            )

    def leave(self, request: Request) -> None:
        """The request looks for hits again, as if it had never been admitted."""
        self._entering.pop(request.request_id, None)
        if (admission := self._admitted.pop(request.request_id, None)) is not None and not admission.exact:
            salt(request, "")

    def choose(self, request: Request, local: int) -> Admission | None:
        """What a request with ``local`` tokens in the engine's own cache is admitted from; None: from that."""
        self._expect(request, "computed", request.num_tokens - local)
        asked = self._asked[request.request_id]
        if not asked.on or request.skip_reading_prefix_cache or request.resumable:
            return None
        self._undecided.discard(request.request_id)
        if self._sharing is not None and self._sharing.is_looking(request.request_id, local):
            self._undecided.add(request.request_id)
            return None
        if self._preempted is not None and (left := self._preempted.place(request)) is not None:
            if self.manager.transfers.storing(request.request_id):  # its end has not been heard of
                self._undecided.add(request.request_id)
                return None
            if (admission := self.manager.admissions.resume(left, local)) is not None:
                return admission
        may_go_on = self._conversations is not None and request.request_id in self._conversations
        return self.manager.admissions.find(
            request.block_hashes, request.num_prompt_tokens, local, asked.forced, may_go_on
        )

    def admit(self, request: Request, admission: Admission, source: str) -> None:
        """``source``: the tier of the packet, or ``GPU`` if its rows are in the engine's cache already."""
        self._admitted[request.request_id] = admission._replace(tier=source)
        self._entering[request.request_id] = source

    def matched(self, request: Request, local: int) -> tuple[int | None, bool]:
        if request.request_id in self._undecided:
            return None, False
        admission = self._admitted.get(request.request_id)
        if admission is None or local >= admission.place.tokens:
            return 0, False
        if not admission.dropped and self.manager.transfers.is_loading(admission.packet):  # they will be in the pool
            return None, False
        return admission.place.tokens, True

    def allocated(self, request: Request, blocks: list[int]) -> None:
        """The request has blocks. It is called once more when they have been loaded."""
        source = self._entering.pop(request.request_id, None)
        if source is not None:
            self._enter(request, source, blocks)
        if self._preempted is not None:
            self._preempted.forget(request.request_id)

    def _enter(self, request: Request, source: str, blocks: list[int]) -> None:
        admission = self._admitted[request.request_id]
        if source != GPU:
            count = -(-admission.way.step.rows // self.manager.block_size)
            self.manager.load(request.request_id, admission, blocks[:count])
        if self._preempted is not None and admission.place == self._preempted.place(request):
            self.manager.counts["resumed", source] += 1
            return
        way, left = None if source == GPU else admission.way, request.num_tokens - admission.place.tokens
        if self._asked[request.request_id].forced is None:  # measuring a context is no use of it
            self.manager.used(admission.place, source, ids_of(request))
            if self._sharing is not None:
                self._sharing.used(admission.place.key)
            self._hit(request, admission, self.manager.admissions.seconds(left, way, source))
        self._expect(request, source, left, way)

    def build(self, output: Any) -> Step:
        step = Step(idle=not output.total_num_scheduled_tokens)
        for name in output.preempted_req_ids or ():
            step.flush += self.manager.transfers.storing(name)
            self.manager.rows.forget(name)
            self._unjudged[name] = MOST  # it computes decoded tokens with its prompt
        for name, tokens in output.num_scheduled_tokens.items():
            place, ids = self._places.get(name, (None, ()))
            if place is None:
                continue
            computed = self._unjudged.setdefault(name, self._computed(name))
            if self.manager.catalogue.judges and 4 * computed <= place.tokens:
                step.judged[name] = place.tokens
            if self._computed(name) + tokens < place.tokens:
                continue
            del self._places[name]
            admission = self._admitted.get(name)
            if admission is None or admission.exact:  # rows that lost something are not stored a second time
                blocks = self._blocks(name)[: place.tokens // self.manager.block_size]
                self.manager.offer(name, place, blocks, ids, computed if name in step.judged else None)
        if self._preempted is not None:
            self._preempted.offer()
        stores, step.loads = self.manager.step(output.total_num_scheduled_tokens)
        for job in stores:
            leaves = self._preempted is not None and job.request_id in self._preempted.leaving
            (step.leaving if leaves else step.stores).append(job)
        if self._preempted is not None:
            self._preempted.gone()
        for name in self._ended:
            self.manager.rows.forget(name, but_due=not self._short)
        self._short = False
        if self._sharing is not None:
            self._sharing.step()
        return step

    def reported(self, output: Any) -> None:
        """Books what workers have ended."""
        reports = output.kv_connector_worker_meta
        for number, ended in (reports.ended if reports is not None else {}).items():
            self.manager.ended(number, ended)

    def short_of_blocks(self) -> bool:
        """A request that runs needs a block, and none is free. Whether some will be, of requests that have ended. What
        only waits for room to be stored is given up in this step."""
        self._short = True
        return bool(self._ended)

    def preempted(self, request: Request) -> None:
        """A request is about to lose its blocks."""
        asked = self._asked[request.request_id]
        if self._preempted is not None and asked.on and asked.forced is None and not request.resumable:
            self._preempted.leaves(request, self._blocks(request.request_id))

    def let_go(self) -> list[str]:
        """Requests that have ended, and whose blocks nothing reads any more. Each is named once."""
        names = [name for name in self._ended if not self.manager.rows.hold(name)]
        self._ended.difference_update(names)
        return names

    def finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks of a request that has ended must be kept until :meth:`let_go`, and what its client is told
        about its context, if it has asked for anything."""
        name = request.request_id
        told = self._used_by(name)
        self._undecided.discard(name)
        if request.num_output_tokens:
            self.spoke(name)
        for of_request in (
            self._asked, self._places, self._unjudged, self._admitted, self._entering, self._silent,
        ):  # fmt: skip
            of_request.pop(name, None)
        self.manager.rows.forget(name)
        if self._preempted is not None:
            self._preempted.forget(name)
        if self._conversations is not None:
            self._conversations.ended(request, self._blocks(name))
        if held := self.manager.rows.hold(name):
            self._ended.add(name)
        return held, told

    def reset(self) -> bool:
        """Forgets all contexts; see :class:`~.reset.Reset`. Waiting requests look for theirs in every step, so
        they find nothing. Blocks that were held for what waits for room are let go."""
        no_load_runs = self.manager.reset()
        if self._sharing is not None:
            self._sharing.reset()
        return no_load_runs

    def _hit(self, request: Request, admission: Admission, seconds: float) -> None:
        """Tells who listens."""
        copy = self.manager.keeper.get(admission.place.key)
        if copy is not None:
            self.manager.transfers.heard(
                "hit", copy, request_id=request.request_id, tier=admission.tier, ratio=admission.way.step.ratio,
                nbytes=0 if admission.tier == GPU else admission.nbytes, predicted_seconds=seconds,
            )  # fmt: skip

    def _used_by(self, name: str) -> dict[str, Any] | None:
        asked = self._asked.get(name)
        if asked is None or not asked.told:
            return None
        admission = self._admitted.get(name)
        if admission is None:
            return {"context": {"source": "computed"}}
        method, step = admission.way
        return {
            "context": {
                "source": admission.tier, "tokens": admission.place.tokens, "method": method,
                "ratio": step.ratio, "sections": step.sections, "nbytes": step.nbytes,
            }
        }  # fmt: skip

    def spoke(self, name: str) -> None:
        """A request has received a token."""
        if (silent := self._silent.pop(name, None)) is not None:
            self.manager.counts["first_tokens", silent.source] += 1
            self.manager.counts["first_token_seconds", silent.source, "predicted"] += silent.predicted
            self.manager.counts["first_token_seconds", silent.source, "observed"] += time.time() - silent.arrival

    def stats(self) -> ContextStats:
        """What has happened since the last call."""
        counts = dict(self.manager.counts)
        news = {key: n - self._told.get(key, 0) for key, n in counts.items() if n != self._told.get(key)}
        self._told = counts
        return ContextStats.of(news, self.manager.gauges())

    def _expect(self, request: Request, source: str, computed: int, way: Way | None = None) -> None:
        if not request.num_output_tokens:
            predicted = self.manager.admissions.seconds(computed, way, source)
            self._silent[request.request_id] = Silent(request.arrival_time, source, predicted)


class WorkerHalf:
    """Jobs of one worker."""

    def __init__(self, worker: ContextWorker) -> None:
        self.worker = worker
        self._reports = Reports()

    def flush(self, step: Step) -> None:
        for job in step.leaving:
            self.worker.submit(job)
        self.worker.flush([*step.flush, *(job.number for job in step.leaving)])

    def load(self, step: Step) -> None:
        for job in step.loads:
            self.worker.submit(job)

    def store(self, step: Step) -> None:
        for job in step.stores:
            self.worker.submit(job)

    def results(self, step: Step) -> KVConnectorTransferResults:
        """What has ended. An engine that computes nothing asks again at once. That would take the core, and Python's
        lock, from the load that it waits for."""
        if step.idle:
            self.worker.wait_for_load(PAUSE)
        received, failed = set(), set()
        for job, ended in self.worker.ended():
            self._reports.ended[job.number] = ended
            if isinstance(job, Load):
                received.add(job.request_id)
                failed |= set() if ended.ok else {job.request_id}
        return KVConnectorTransferResults(set(), received, failed)

    def report(self) -> Reports | None:
        reports, self._reports = self._reports, Reports()
        return reports if reports.ended else None
