"""Tests of the vLLM plugin. They need an environment with vLLM. `make test-vllm` creates one and runs them."""

import os

import pytest
import torch

# Before vLLM is imported. One thread: tests share the cores, and spinning threads on a busy machine are far slower.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

if torch.cuda.is_available():
    # Kernels run as compiled code, and attention multiplies float32 as float32, as the dense model does.
    os.environ.update(TRITON_INTERPRET="0", TRITON_F32_DEFAULT="ieee", VLLM_USE_FLASHINFER_SAMPLER="0")

vllm = pytest.importorskip("vllm")

import harness  # noqa: E402

LONG = ("test_second_runner.py", "test_reasoning_served.py")


def pytest_collection_modifyitems(items):
    """A file runs in one process. These have few tests that take minutes, so they begin first."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A random Llama: 3 layers, 4 query heads, 2 KV heads of 32, decisive logits, and a tokenizer of 512 words."""
    return harness.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dense(model):
    return harness.Dense(model)


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace.jsonl"


@pytest.fixture
def both(served_both):
    """The engine of a module, with windows and contexts, whose own cache is empty."""
    served_both.server.forget()
    return served_both
