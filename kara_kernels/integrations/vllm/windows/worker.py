"""vLLM's workers with Kara. Each adds Kara's methods to the model runner that vLLM created."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from .runners import KaraRunnerV1, KaraRunnerV2

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker
else:  # importing it would replace torch.cuda.Event
    CPUWorker = Worker

_Mixin: Any = Any if TYPE_CHECKING else object  # the class after it is one of vLLM's workers


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
    """vLLM's worker for GPUs, with Kara."""
