"""vLLM's workers with Kara: each gives the model runner that vLLM has made Kara's methods on top of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu_worker import Worker

from .runner import KaraRunnerV1, KaraRunnerV2

try:
    from vllm.v1.worker.cpu_worker import CPUWorker
except ImportError:  # wheels for GPUs may lack what it imports; then nobody asks for it
    CPUWorker = Worker

_Mixin: Any = Any if TYPE_CHECKING else object  # what stands behind it is one of vLLM's workers


class _KaraWorker(_Mixin):
    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        kara = KaraRunnerV2 if self.use_v2_model_runner else KaraRunnerV1
        runner.__class__ = type(kara.__name__, (kara, type(runner)), {})
        runner.kara_init()


class KaraCPUWorker(_KaraWorker, CPUWorker):
    """vLLM's worker for CPUs, with Kara."""


class KaraGPUWorker(_KaraWorker, Worker):
    """vLLM's worker for GPUs, with Kara. Untested: no GPU was at hand."""
