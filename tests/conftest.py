"""A process runs kernels either interpreted on CPU tensors or, with TRITON_INTERPRET=0, as compiled code.

Triton decides at decoration time, so the choice is made here, before anything imports the package.
"""

import os
from importlib.util import find_spec

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

# `make test-vllm` runs these in an environment that has vLLM.
collect_ignore = [] if find_spec("vllm") else ["with_vllm"]

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"


@pytest.fixture(
    params=["torch", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter"))]
)
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends that run on this machine's tensors."""
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Limits PyTorch to one thread. More only slow down models this small, a lot on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
