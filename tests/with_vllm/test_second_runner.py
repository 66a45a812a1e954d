"""The tests that reach all of ``KaraRunnerV2``, with vLLM's V2 model runner in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ON_GPU

HERE = Path(__file__).parent
CASES = [
    "test_equal.py::test_mixed_lengths_and_several_compressions[defaults]",
    "test_equal.py::test_preemption_in_a_tiny_pool[asynchronous-16]",
    "test_equal.py::test_a_request_that_skips_a_step_comes_back_with_its_blocks[synchronous]",
    "test_equal.py::test_blocks_that_another_request_reads_are_not_rewritten[asynchronous]",
    "test_equal.py::test_aborted_requests_leave_nothing[asynchronous]",
    "test_speculative.py::test_every_token_is_the_dense_models[defaults]",
    "test_latent.py::test_every_token_is_the_dense_models[defaults]",
    "test_both.py::test_a_preempted_request_is_admitted_and_compressed_again[asynchronous-computed first]",
    "test_contexts_dropped.py::test_a_preempted_request_is_admitted_with_fewer_rows_again[asynchronous]",
    "test_preempted.py::test_a_preempted_request_goes_on_with_its_rows[asynchronous-twice]",
    "test_preempted.py::test_what_a_window_leaves_in_the_step_of_the_preemption_counts[synchronous]",
]


@pytest.fixture(scope="module")
def said():
    """By a process that runs all of them: importing vLLM takes longer than each."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "second_runner", *(f"{HERE / case}" for case in CASES)]
    path = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900)


@pytest.mark.skipif(ON_GPU, reason="run all tests with VLLM_USE_V2_MODEL_RUNNER=1 instead")
@pytest.mark.parametrize("case", CASES)
def test_it_serves_what_the_first_runner_serves(said, case):
    assert f"{case} PASSED" in said.stdout, said.stdout[-9000:] + said.stderr[-1000:]
