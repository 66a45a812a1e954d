"""Preempted requests in an engine of its own, with so few blocks that others overwrite theirs at once."""

import pytest
from both_harness import TAILED, resumed, serving_both, stored
from contexts_harness import ON
from harness import MODES, prompts


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_stored_before_others_overwrite_them(model, dense, trace, mode, monkeypatch):
    """Blocks for two requests of four, and stores that take longer than steps."""
    texts, options = prompts(90, 70, 110, 80, seed=440), {"num_gpu_blocks_override": 20, "max_model_len": 512}
    with serving_both(
        model, trace, TAILED, {**ON, "preempted": True}, mode=mode, max_num_batched_tokens=64, **options
    ) as both:
        both.dense = dense
        both.take_longer(monkeypatch, store=0.2)
        events = {
            3 * i: lambda both, i=i, prompt=prompt: both.add(f"short {i}", prompt, 240)
            for i, prompt in enumerate(texts)
        }
        served = both.drive(events)
        assert resumed(both) >= 2
        dense.assert_equal(both.engine, served.values(), compressions=1)
        assert stored(both) == []
        both.assert_nothing_leaks()
