"""What vLLM calls: a KV connector whose unit is a whole context."""

from __future__ import annotations

import functools
import hashlib
import os
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger
from vllm.v1.request import Request

from kara_kernels.contexts.packet import Header
from kara_kernels.contexts.ranking import Judges
from kara_kernels.contexts.utility import Tier
from kara_kernels.payload import PayloadLayout

from ..layout import paged_view
from ..quantised import stored_as
from ..traces import client_id
from ..unsupported import cache_dtype_of
from .catalogue import Catalogue
from .configure import can_begin_without
from .conversations import Conversations
from .disk import DiskStore
from .grains import Grains
from .halves import Reports, SchedulerHalf, Step, WorkerHalf
from .manager import ContextManager
from .objects import ObjectStore
from .preempted import Preempted
from .region import open_region, part_of, shape
from .remote import SLOWEST, RemoteTier, measured
from .settings import CONVERSATION, RemoteSettings, context_settings_of, may_drop
from .sharing import Sharing
from .stats import ContextMetrics, ContextStats
from .store import RedisStore
from .trace import Trace, watch
from .weights import shared_name, weights_of
from .worker import ContextWorker

logger = init_logger("vllm.kara")


class ContextConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector of one engine, in the scheduler or in a worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config, self._cache_config = vllm_config, kv_cache_config
        self._settings = context_settings_of(vllm_config)
        self._region: Any = None
        self._store: Any = None  # of the scheduler's half: what lies on a disk
        self._remote: Any = None  # and what servers share
        self.contexts: Any = None  # the scheduler's half
        self._worker: Any = None  # the workers' half

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that never comes is a context that is computed again."""
        return False

    # ---------------------------------------------------------------------------------------- in the scheduler

    def bind_scheduler(self, scheduler: Any) -> None:
        """Called once, by our scheduler."""
        config, settings = self._config, self._settings
        workers = config.parallel_config.world_size
        count, grain, _ = shape(settings, workers)
        self._region = open_region(config, settings, None)
        if settings.disk is not None:
            view, name = self._region.create_kv_memoryview(), config.model_config.model
            rows = name_of(config, weights_on_disk(config))
            self._store = DiskStore(settings.disk, model_of(config, 0), view, grain, workers, name, rows)
        lower = [] if self._store is None else [(self._store.tier, self._store.disk)]
        if settings.remote is not None:
            tier, self._remote = open_remote(config, settings.remote, self._region.create_kv_memoryview(), grain)
            lower.append((tier, self._remote))
        grains = Grains(count, grain)
        header = functools.partial(header_of, config, 0)
        catalogue = Catalogue(
            header, grains, settings.methods, settings.profile, windows=can_begin_without(config),
            left=settings.keeps_left,
        )  # fmt: skip
        manager = ContextManager(
            grains=grains, block_size=config.cache_config.block_size, workers=workers,
            catalogue=catalogue, alpha=settings.alpha, floor=settings.floor, half_life=settings.half_life,
            min_tokens=settings.min_tokens, lower=lower,
        )  # fmt: skip
        if settings.trace is not None:
            watch(manager, Trace(settings.trace, client_id))
        if self._store is not None:
            self._store.restore(manager)
        self.contexts = SchedulerHalf(
            manager,
            None if settings.remote is None else Sharing(manager, self._remote, wait=settings.remote.wait),
            Conversations(manager, scheduler) if settings.conversations else None,
            Preempted(manager, scheduler) if settings.preempted else None,
            computed=lambda name: scheduler.requests[name].num_computed_tokens,
            blocks=lambda name: scheduler.kv_cache_manager.get_block_ids(name)[0],
            default=settings.default,
        )

    def on_new_request(self, request: Request) -> None:
        self.contexts.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.contexts.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        self.contexts.allocated(request, [block.block_id for block in blocks.blocks[0]])

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        step = self.contexts.build(scheduler_output)
        if self._store is not None:
            self._store.save(self.contexts.manager)
        return step

    def update_connector_output(self, connector_output: Any) -> None:
        self.contexts.reported(connector_output)

    def request_finished(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.contexts.finished(request)

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.contexts.finished(request)

    def get_kv_connector_stats(self) -> ContextStats | None:
        return self.contexts.stats() if self.contexts is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ContextStats:
        return ContextStats(data or {})

    @classmethod
    def build_prom_metrics(cls, config: Any, types: Any, labels: list[str], engines: Any) -> ContextMetrics:
        return ContextMetrics(config, types, labels, engines)

    def reset_cache(self) -> bool | None:
        if self.contexts is None:  # in a worker, which keeps nothing
            return None
        if self._store is not None:
            self._store.reset(self.contexts.manager)
        return self.contexts.reset()

    def has_pending_block_frees(self) -> bool:
        return self.contexts.short_of_blocks()

    def has_pending_push_work(self) -> bool:
        return self.contexts.busy

    # --------------------------------------------------------------------------------------------- in a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        config = self._config
        layers = [x for x in config.compilation_config.static_forward_context.values() if hasattr(x, "impl")]
        cache = paged_view(layers, self._cache_config.num_blocks, config.cache_config.block_size)
        rank = config.parallel_config.rank
        self._region = open_region(config, self._settings, rank)
        worker = ContextWorker(cache, part_of(self._region, self._settings), model_of(config, rank))
        worker.warm_up([*self._settings.methods, *[CONVERSATION] * self._settings.keeps_left])
        self._worker = WorkerHalf(worker)

    def judge_by(self, *given: Any) -> None:
        """Called once, by a model runner that records queries. See :class:`~kara_kernels.contexts.ranking.Judges`."""
        judges = Judges(*given)
        self._worker.worker.judge_by(judges, self._settings.methods, self._config.model_config.max_model_len)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._worker.flush(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None:
        self._worker.store(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.results(self._get_connector_metadata())

    def build_connector_worker_meta(self) -> Reports | None:
        return self._worker.report()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.worker.shutdown()
        if self._store is not None:
            self._store.close(self.contexts.manager)
        if self._remote is not None:
            self._remote.shutdown()
        if self._region is not None:
            self._region.cleanup()


def model_of(config: Any, rank: int) -> str:
    """Names what makes rows differ, always in as many characters."""
    model, size = config.model_config, config.parallel_config.tensor_parallel_size
    what = f"{model.model} {model.revision} {model.dtype} {cache_dtype_of(config)} {size}"
    return f"{hashlib.sha256(what.encode()).hexdigest()} {rank:04}"


def name_of(config: Any, weights: str, **others: Any) -> str:
    """Names what servers with equal rows have in common. See :func:`.weights.shared_name`."""
    model = config.model_config
    return shared_name(
        weights=weights, model=model_of(config, 0), text_config=model.hf_text_config.to_dict(),
        quantization=model.quantization, **others,
    )  # fmt: skip


def weights_on_disk(config: Any) -> str:
    """Names the weights as far as this machine can tell. A hub's model without a commit has only its own name, which
    :func:`model_of` holds."""
    with suppress(ValueError):
        return _weights_of(config, None)
    return ""


def _weights_of(config: Any, named: str | None) -> str:
    model = config.model_config
    return weights_of(model.model, getattr(model.hf_config, "_commit_hash", None), named)


def open_remote(config: Any, given: RemoteSettings, view: memoryview, grain: int) -> tuple[Tier, RemoteTier]:
    """The tier that this server shares with those that log the same name."""
    rows = np.asarray(view).view(np.uint8)
    hashes = [config.cache_config.prefix_caching_hash_algo, os.environ.get("PYTHONHASHSEED")]
    name = name_of(config, _weights_of(config, given.weights), hashes=hashes, grain=grain)
    logger.info("Kara's remote tier is shared by the servers that log this name: %s", name)
    url, size = given.address(), rows.shape[1]
    store = ObjectStore(url, size, SLOWEST) if url.startswith("s3+") else RedisStore(url)
    tier = RemoteTier(store, name, rows, grain=grain, ttl=given.ttl)
    return measured(store, tier, grain / size, size), tier


def header_of(config: Any, rank: int, key: str, tokens: int, method: str) -> Header:
    (scorer, _, form), places = method.partition("/"), may_drop(method)
    model, parallel = config.model_config, config.parallel_config
    layout = PayloadLayout(
        layers=model.get_num_layers(parallel), heads=model.get_num_kv_heads(parallel), dim=model.get_head_size(),
        v_dim=model.get_head_size(), dtype=stored_as(cache_dtype_of(config), model.dtype), tokens=tokens,
        rows=tokens, form=form, places=places,
    )  # fmt: skip
    return Header(model_of(config, rank), key, layout, scorer if places else "")
