"""Random runs of an engine: pools, policies, prompts that share prefixes, aborts. Compared with the dense model."""

import random

import pytest
from harness import MODES, engine, prompts


def drawn(seed):
    draw = random.Random(seed)
    window = draw.choice([33, 48, 64, 96])
    policy = {
        "window": window,
        "keep": draw.randrange(1, window),
        "tail": draw.choice([0, 1, 16, 50]),
        "period": draw.choice([1, 1, 3]),
        "max_sequences": draw.choice([1, 4]),
        "pool": draw.choice(["head", "head", "layer", "model"]),
        "query_stride": draw.choice([1, 2, 8]),
        "reduction": draw.choice(["mean", "rms"]),
        "value_norm": draw.choice([False, True]),
        "redundancy": draw.choice([0.0, 9.0]),
        "chunk_fraction": draw.choice([0.0, 0.3]),
        "protected": draw.choice([0, 0, 60]),
    }
    if policy["query_stride"] == 1 and seed % 2:
        policy["attention"] = "causal"
    length = draw.choice([288, 320, 416])
    options = {
        "max_model_len": length,
        "num_gpu_blocks_override": length // 32 + 2 + draw.randrange(12),
        "max_num_batched_tokens": draw.choice([16, 100, 2048]),
        "max_num_seqs": draw.choice([3, 6]),
        "enable_prefix_caching": draw.random() < 0.8,
    }
    if options["max_num_batched_tokens"] < length and draw.random() < 0.5:
        options["scheduler_reserve_full_isl"] = False
    return draw, policy, options


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_a_random_day(model, dense, trace, seed, mode):
    draw, policy, options = drawn(seed)
    common = prompts(60, seed=seed)[0]
    arrivals = {}

    def arrive(name):
        def event(kara):
            prompt = common[: draw.randrange(61)] + prompts(draw.randrange(1, 40), seed=name)[0]
            if kara.said and draw.random() < 0.3:  # continues another request's text
                prompt = (kara.prompts[other := draw.choice(sorted(kara.said))] + kara.said[other])[:150]
            own = draw.choice([..., ..., True, False, {"keep": draw.randrange(1, policy["window"])}])
            kara.add(str(name), prompt, min(draw.randrange(20, 300), options["max_model_len"] - len(prompt)), own)

        return event

    def abort(kara):
        running = [request.request_id for request in kara.scheduler.running]
        if running:
            kara.abort(draw.choice(running).rsplit("-", 1)[0])

    step = 0
    for name in range(12):
        step += draw.randrange(40)
        arrivals[step] = arrive(name)
        if draw.random() < 0.25:
            arrivals[step + draw.randrange(1, 120)] = abort
    with engine(model, policy, trace=trace, mode=mode, **options) as kara:
        served = kara.drive(arrivals)
        kara.assert_nothing_leaks()
        assert len(served) >= 6
        dense.assert_equal(kara, served.values(), compressions=0)
        assert kara.events()
