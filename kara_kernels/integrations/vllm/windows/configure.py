"""Configures vLLM to compress running requests, and rejects features that cannot be combined with that.

Nothing of vLLM is imported at module level, because every process of vLLM loads it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kara_kernels.engine import Held, Ledger, Policy, check_ring, fit_queries

from ..settings import Additional, refusal, settings_of
from ..unsupported import UNSUPPORTED, found_in, full_layers

_ROOM = __name__.rpartition(".")[0]
SCHEDULERS = (f"{_ROOM}.scheduler.KaraScheduler", f"{_ROOM}.scheduler.KaraAsyncScheduler")
"""Our schedulers, synchronous and asynchronous."""
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{_ROOM}.worker.KaraCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": f"{_ROOM}.worker.KaraGPUWorker",
}
"""vLLM's workers, and the workers that replace them."""


def before(config: Any) -> None:
    """Before vLLM completes its configuration: rejects unsupported features."""
    _refuse(config)


def after(config: Any) -> None:
    """After vLLM has completed its configuration: sets scheduler and worker, and logs the settings."""
    from vllm.logger import init_logger

    _refuse(config)  # again, because only now quantisation is known
    _fit_queries(config)
    config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
    settings = settings_of(config)
    parallel = config.parallel_config
    if parallel.worker_cls not in WORKERS.values():
        if parallel.worker_cls not in WORKERS:
            raise ValueError(f"kara: expected one of the workers {', '.join(WORKERS)}, got {parallel.worker_cls}")
        parallel.worker_cls = WORKERS[parallel.worker_cls]
    check_sizes(config, config.cache_config.block_size)
    said = ", ".join(f"{key}={value!r}" for key, value in settings.values.items())
    # A child of vLLM's logger, so that its handlers and levels apply.
    init_logger("vllm.kara").info_once(f"Kara compresses the KV cache while decoding: {said}")


def check_sizes(config: Any, block_size: int) -> None:
    """Raises a ValueError for settings that could never free a block, or never compress a request.

    vLLM may choose another block size or a shorter model length when it has measured its memory.
    """
    settings, given = settings_of(config), config.additional_config["kara"]
    policy = settings.policy
    longest = config.model_config.max_model_len
    try:
        settings.check_page_size(block_size)
    except ValueError as error:
        raise refusal(error, given, "--block-size changes the block") from None
    if not _ever_compresses(policy, block_size, longest):
        names = ("window", "tail", "protected")
        got = ", ".join(f"{x}={getattr(policy, x)}{'' if x in given else ' (default)'}" for x in names)
        raise ValueError(
            f"kara: window: expected a request to fill protected, window and tail before --max-model-len {longest}, "
            f"got {got}"
        )


def _ever_compresses(policy: Policy, block_size: int, longest: int) -> bool:
    """Whether a prompt of one token, to which most can be added, is compressed before it is ``longest`` tokens long."""
    ledger = Ledger(dataclasses.replace(policy, period=1), block_size)
    ledger.start("", 1, 0)
    due = max(1, policy.protected) + policy.window + policy.tail
    # Of `longest` tokens the last is never computed, and the one before only after the last plan. No window waits for
    # more than one block.
    lengths = range(due, min(due + block_size, longest - 2) + 1)
    return any(ledger.plan([Held("", length, range(-(-length // block_size)), 0)]) for length in lengths)


def _refuse(config: Any) -> None:
    if refused := found_in(config, UNSUPPORTED):
        raise ValueError(f"kara: expected only supported features, got {'; '.join(refused)}")


def _fit_queries(config: Any) -> None:
    """Unless the operator chose what is recorded, picks what loses least among the forms that fit ``max_query_gib``.

    vLLM runs up to 1,024 requests at once, and their queries may take too much memory. The form is part of the plan, so
    it is fixed here, once for all processes.
    """
    from vllm.logger import init_logger

    kara = config.additional_config["kara"]
    policy = max(settings_of(config).policies, key=lambda policy: policy.window)
    form = {}
    if "query_stride" not in kara and "query_heads" not in kara:
        fitted = fit_queries(policy, *_recorded(config), config.num_speculative_tokens)
        form = {"query_heads": fitted.query_heads, "query_stride": fitted.query_stride}
        if fitted != policy:
            init_logger("vllm.kara").warning_once(
                f"Kara records fewer queries, to stay within max_query_gib={policy.max_query_gib}: {form}. Scores are "
                f"less accurate. Raise max_query_gib, or let fewer sequences run at once (--max-num-seqs)"
            )
    config.additional_config = Additional({**config.additional_config, "kara": {**kara, **form}})
    try:
        query_ring_bytes(config)
    except ValueError as error:
        raise refusal(error, kara, "--max-num-seqs sets how many run") from None


def query_ring_bytes(config: Any) -> int:
    """Bytes of the query ring of each worker. Raises ValueError if that is more than ``max_query_gib``."""
    settings = settings_of(config)
    layers, heads, kv_heads, size, most, dtype = _recorded(config)
    recorded = settings.policy.recorded_heads(heads, kv_heads)
    return check_ring(settings.policy, layers, recorded, size, most, dtype, ring_rows(config))


def ring_rows(config: Any) -> int:
    """Queries that the ring holds per request."""
    settings = settings_of(config)
    return settings.query_rows + settings.policy.spare_rows(config.num_speculative_tokens)


def _recorded(config: Any) -> tuple[int, int, int, int, int, Any]:
    """Layers, query heads and KV heads of a worker, size of a head, requests that run at once, and the dtype."""
    model, parallel = config.model_config, config.parallel_config
    return (
        full_layers(config) or model.get_num_layers(parallel), model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel), model.get_head_size(), config.scheduler_config.max_num_seqs, model.dtype,
    )  # fmt: skip
