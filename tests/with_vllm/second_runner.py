"""``pytest -p second_runner``: on a CPU, vLLM's V2 model runner, the default on GPUs. Its kernels are interpreted."""

import os

os.environ.update(VLLM_USE_V2_MODEL_RUNNER="1", TRITON_INTERPRET="1")

from triton.backends import backends

backends["nvidia"].driver.is_active = staticmethod(lambda: True)
backends["cpu"] = backends["nvidia"]
