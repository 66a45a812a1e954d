"""``pytest -p second_runner``: on a CPU, vLLM's V2 model runner, the default on GPUs. Its kernels are interpreted."""

import os

os.environ.update(VLLM_USE_V2_MODEL_RUNNER="1", TRITON_INTERPRET="1")

from triton.backends import backends
from triton.runtime import interpreter

backends["nvidia"].driver.is_active = staticmethod(lambda: True)
backends["cpu"] = backends["nvidia"]

_load = interpreter.InterpreterBuilder.create_masked_load


def load_by_bools(self, ptrs, mask, *rest):
    """The n-gram kernel computes a mask from scalars, which the interpreter takes for an integer."""
    return _load(self, ptrs, interpreter.TensorHandle(mask.data.astype(bool), mask.dtype), *rest)


interpreter.InterpreterBuilder.create_masked_load = load_by_bools
