"""One process runs the kernels one way: interpreted on CPU tensors unless TRITON_INTERPRET=0 asks for compiled code.

Triton decides when a kernel is decorated, so the choice is made here, before anything imports the package.
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
    """Both ways to run an operation on the tensors of this machine."""
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only lose by more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
